"""Trainings on a device that is not the CPU, without a GPU: `make test-device`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stand_in.py")
NAMES = re.findall(r'^        "(\w+Plus.*?)": \(', SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case → what it raised; all of them in a process of their own, because the device changes torch."""
    folder = tmp_path_factory.mktemp("stand_in")
    run = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.parametrize("way", ["eager", "recorded"])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_on_another_device_ends_as_one_on_the_cpu(results: dict[str, str], name: str, way: str) -> None:
    assert results[f"{name}, {way}"] == ""


def test_there_are_cases_of_all_algorithms() -> None:
    assert {name.split(",")[0] for name in NAMES} == {"PPOPlus", "A2CPlus", "TRPOPlus"}
