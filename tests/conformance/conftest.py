"""Makes the harness importable under any import mode, and prints what the inner runs did as one table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from upstream_run import summary_table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows travel as user properties, because those also arrive from xdist workers."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    properties = [pair for report in reports if report.when == "call" for pair in report.user_properties]
    rows = [row for name, row in properties if name == "conformance"]
    if rows:
        terminalreporter.write_sep("=", "SB3's and sb3-contrib's own tests on our classes")
        terminalreporter.write_line(summary_table(rows))
