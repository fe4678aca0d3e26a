"""
Run SB3's and sb3-contrib's own tests with our classes in place of PPO, A2C and TRPO.

Each combination of mode and suite is a pytest process of its own (the names are rebound for good), with its own
settings, in an empty working directory, because upstream tests leave files behind. From the command line::

    python tests/conformance/upstream_run.py                        # both modes, both suites
    python tests/conformance/upstream_run.py --mode stock           # SB3's own classes: what does this machine fail?
    python tests/conformance/upstream_run.py --as-a2c TRPOPlus      # TRPOPlus through the tests of A2C
    python tests/conformance/upstream_run.py --mode presets --suite sb3 -- -k test_gae -x
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from class_swap import COUNTERPARTS, MODES
from upstream_fetch import DISTRIBUTIONS, fetch_tests

HERE = Path(__file__).resolve().parent
WORKERS = 2
COLUMNS = ("passed", "failed", "excused", "skipped")
NO_TESTS = 5  # pytest's exit code when nothing is selected


@dataclass(frozen=True)
class Outcome:
    """What one inner run reported."""

    mode: str
    suite: str
    classes: tuple[str, ...]
    cases: dict[str, dict[str, Any]]
    deselected: int

    def ids(self, outcome: str) -> list[str]:
        """The test ids with this outcome."""
        return [case for case, result in self.cases.items() if result["outcome"] == outcome]

    def row(self) -> dict[str, Any]:
        """Its line in the summary table."""
        counts = {column: len(self.ids(column)) for column in COLUMNS}
        classes = ", ".join(self.classes) or "-"
        return {"mode": self.mode, "suite": self.suite, "classes": classes, **counts, "deselected": self.deselected}

    def failures(self, lines: int = 12) -> str:
        """The failed cases, with the end of each traceback."""
        tails = {case: self.cases[case]["detail"].strip().splitlines()[-lines:] for case in self.ids("failed")}
        return "\n\n".join("\n    ".join([f"{self.mode} {self.suite} {case}", *tail]) for case, tail in tails.items())


def run_upstream(
    mode: str,
    suite: str,
    *,
    fast: bool = False,
    as_a2c: str | None = None,
    timeout: float | None = 3600,
    extra: tuple[str, ...] = (),
) -> Outcome:
    """
    Run one upstream suite in a process of its own.

    :param mode: see class_swap.py
    :param suite: "sb3" or "contrib"
    :param fast: only the fast selection
    :param as_a2c: let this class stand in for A2C, and nothing else
    :param extra: further arguments for pytest
    :raises RuntimeError: when the run ended without a usable report
    """
    tests = fetch_tests(suite)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        workdir = Path(scratch) / "work"
        workdir.mkdir()
        command = _command(tests, mode, suite, report, fast, as_a2c) + list(extra)
        done = subprocess.run(
            command, cwd=workdir, env=_environment(), timeout=timeout, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode not in (0, 1, NO_TESTS) or not report.is_file():
            raise RuntimeError(f"the inner pytest ended with exit code {done.returncode}:\n{done.stdout[-6000:]}")
        found = json.loads(report.read_text())
    outcome = Outcome(mode, suite, tuple(found["classes"]), found["cases"], found["deselected"])
    if (done.returncode == 1) != bool(outcome.ids("failed")):
        raise RuntimeError(f"the report disagrees with exit code {done.returncode}:\n{done.stdout[-6000:]}")
    return outcome


def _command(tests: Path, mode: str, suite: str, report: Path, fast: bool, as_a2c: str | None) -> list[str]:
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "--no-header"]
    command += ["-c", str(HERE / "upstream.ini"), f"--rootdir={tests}", f"--confcutdir={tests}"]
    command += [f"--plus-mode={mode}", f"--plus-suite={suite}", f"--plus-report={report}"]
    command += [f"--plus-as-a2c={as_a2c}"] if as_a2c else []
    command += ["--plus-fast"] if fast else []
    # Inside a pytest that has workers itself, one process will do.
    parallel = importlib.util.find_spec("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    return command + (["-n", str(WORKERS)] if parallel else [])


def _environment() -> dict[str, str]:
    """One thread per worker; the plug-in and the package importable from the other working directory."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(HERE), os.environ.get("PYTHONPATH", ""), str(HERE.parents[1])]
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def summary_table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    columns = ("mode", "suite", "classes", *COLUMNS, "deselected")
    lines = [columns, *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, action="append", help="default: presets and defaults")
    parser.add_argument("--suite", choices=list(DISTRIBUTIONS), action="append", help="default: both")
    parser.add_argument("--fast", action="store_true", help="only the fast selection")
    parser.add_argument("--as-a2c", choices=list(COUNTERPARTS), help="let this class stand in for A2C, alone")
    parser.add_argument("pytest_args", nargs="*", help="after --: further arguments for pytest")
    chosen = parser.parse_args()
    outcomes = [
        run_upstream(mode, suite, fast=chosen.fast, as_a2c=chosen.as_a2c, extra=tuple(chosen.pytest_args))
        for mode in chosen.mode or ("presets", "defaults")
        for suite in chosen.suite or (("sb3",) if chosen.as_a2c else DISTRIBUTIONS)
    ]
    failures = [outcome.failures() for outcome in outcomes if outcome.ids("failed")]
    print("\n\n".join([*failures, summary_table([outcome.row() for outcome in outcomes])]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
