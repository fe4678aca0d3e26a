"""The harness itself: what may be excused, and what is fetched."""

import hashlib
import subprocess
import tarfile
from pathlib import Path

import pytest
import upstream_fetch
from class_swap import COUNTERPARTS
from excuses import CLASS_NAME, Excuse, load_excuses
from upstream_fetch import FetchError, fetch_tests

from sb3_pgplus import presets

SUITES = ("sb3", "contrib")
#: Under the presets our classes stand for SB3's in these, or the package's first promise is broken.
NEVER_EXCUSED = ("gae", "save", "load", "callback", "dict", "vec_normalize")


def test_presets_are_excused_five_times_at_most_and_never_where_it_matters() -> None:
    cases = [excuse.case for suite in SUITES for excuse in load_excuses("presets", suite)]
    assert len(cases) <= 5
    assert "*" not in "".join(cases), "one entry, one case"
    assert not [case for case in cases if any(word in case for word in NEVER_EXCUSED)]


def test_switches_of_the_excuses_are_keywords_of_a_preset() -> None:
    known = {CLASS_NAME}.union(*(getattr(presets, preset, {}) for _, _, preset in COUNTERPARTS.values()))
    assert {switch for suite in SUITES for e in load_excuses("defaults", suite) for switch in e.switches} <= known


def test_an_excuse_matches_whole_ids_and_only_the_star_is_special() -> None:
    excuse = Excuse("defaults", "sb3", "test_a.py::test_x[*-PPOPlus]", "reason")
    assert excuse.matches("test_a.py::test_x[1.0-PPOPlus]")
    assert not excuse.matches("test_a.py::test_x[1.0-PPOPlus-2]")
    assert not excuse.matches("test_aXpy::test_x[1.0-PPOPlus]")


@pytest.fixture
def hand_made_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in an otherwise empty cache, its sum pinned."""
    release = tmp_path / "src" / "stable_baselines3-9.9"
    for name in ("tests/test_a.py", "stable_baselines3/__init__.py"):
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_text("")
    archive = tmp_path / "cache" / "stable_baselines3-9.9.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(release, arcname=release.name)
    monkeypatch.setenv("SB3_PGPLUS_CACHE", str(archive.parent))
    monkeypatch.setattr(upstream_fetch, "version", lambda distribution: "9.9")
    monkeypatch.setattr(upstream_fetch, "SHA256", {archive.name: hashlib.sha256(archive.read_bytes()).hexdigest()})
    return archive


def test_fetch_extracts_the_tests_alone_and_only_once(hand_made_archive: Path) -> None:
    tests = fetch_tests("sb3")
    assert [path.name for path in tests.iterdir()] == ["test_a.py"]
    hand_made_archive.unlink()
    assert fetch_tests("sb3") == tests
    assert [path.name for path in hand_made_archive.parent.iterdir()] == [tests.name]


def test_fetch_refuses_an_archive_with_another_sum(hand_made_archive: Path) -> None:
    hand_made_archive.write_bytes(b"something else")
    with pytest.raises(FetchError, match="not the pinned"):
        fetch_tests("sb3")


def test_fetch_refuses_a_version_without_a_pinned_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_fetch, "version", lambda distribution: "0.1")
    with pytest.raises(FetchError, match=r"no sha256 is pinned for stable_baselines3-0\.1\.tar\.gz"):
        fetch_tests("sb3")


def test_fetch_says_what_to_do_when_offline(hand_made_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_made_archive.unlink()
    failed = subprocess.CompletedProcess([], 1, stderr="no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(FetchError, match=r"offline\?\).*by hand\.\nno route to host"):
        fetch_tests("sb3")
