"""
Pytest plug-in for the inner run: upstream's tests, our classes.

``pytest -p plus_conformance --plus-mode=presets FOLDER`` rebinds the stock classes before the tests are collected,
keeps the cases that concern our classes, turns excused ones into strict xfails (an excuse that is no longer needed
fails the run), and writes what happened to ``--plus-report``. Started by upstream_run.py.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from class_swap import MODES, set_switches, swap_in
from excuses import Excuse, load_excuses
from stable_baselines3.common.base_class import BaseAlgorithm

#: The fast selection: what breaks first when the shell changes. Cases that start processes take too long for it.
FAST_FILES = ("gae", "save_load", "callbacks", "dict_env", "deterministic", "spaces", "run")
SLOW_FUNCTIONS = {"test_multiprocessing"}
#: Judged by the clock, which a busy machine slows down: they get further tries.
CLOCKED_FUNCTIONS = {"test_fps_logger"}
#: Case → program that it calls; without the program it would judge nothing of ours.
NEEDED_PROGRAMS = {"test_load_invalid_object": "zip"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options upstream_run.py passes on."""
    group = parser.getgroup("sb3_pgplus conformance")
    group.addoption("--plus-mode", choices=MODES, default="presets", help="which variant of our classes stands in")
    group.addoption("--plus-suite", choices=("sb3", "contrib"), default="sb3", help="whose tests these are")
    group.addoption("--plus-fast", action="store_true", help="only the fast selection")
    group.addoption("--plus-as-a2c", default=None, metavar="CLASS", help="let this class stand in for A2C, alone")
    group.addoption("--plus-report", default=None, metavar="FILE", help="write the outcome of every case as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Swap the classes: this runs before any test module is imported, in every worker."""
    classes = swap_in(config.getoption("--plus-mode"), config.getoption("--plus-as-a2c"))
    config.pluginmanager.register(Selection(config, classes))
    if config.getoption("--plus-report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config, list(classes)))


class Selection:
    """Keeps the cases about our classes, and applies the excuses to them."""

    def __init__(self, config: pytest.Config, classes: dict[str, Any]) -> None:
        self.classes = classes
        self.mode: str = config.getoption("--plus-mode")
        self.fast: bool = config.getoption("--plus-fast")
        suite, as_a2c = config.getoption("--plus-suite"), config.getoption("--plus-as-a2c")
        self.excuses = load_excuses(self.mode, suite, as_a2c)
        self.deselected = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        """Deselect what is not about our classes; mark what is excused."""
        kept = [item for item in items if self._wanted(item)]
        for item in kept:
            excuse = self._excuse(item)
            if excuse and self.mode != "switched":
                item.add_marker(pytest.mark.xfail(reason=f"{excuse.reason} {list(excuse.switches)}", strict=True))
            program = NEEDED_PROGRAMS.get(item.originalname)
            if program and not shutil.which(program):
                item.add_marker(pytest.mark.skip(reason=f"needs the program {program}"))
        self.deselected = len(items) - len(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _excuse(self, item: pytest.Function) -> Excuse | None:
        return next((excuse for excuse in self.excuses if excuse.matches(item.nodeid)), None)

    def _wanted(self, item: pytest.Function) -> bool:
        if not algorithms_of(item) & set(self.classes.values()):
            return False
        if self.mode == "switched":
            excuse = self._excuse(item)
            return excuse is not None and bool(excuse.switches)
        file = item.path.stem.removeprefix("test_")
        return not self.fast or (file in FAST_FILES and item.originalname not in SLOW_FUNCTIONS)

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        """In mode "switched", the case runs with the switch that is said to explain its failure."""
        excuse = self._excuse(item) if self.mode == "switched" else None
        if excuse:
            for variant in algorithms_of(item) & set(self.classes.values()):
                set_switches(variant, excuse.switches)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker collects for itself: it sends the count to the main process."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["plus_deselected"] = self.deselected


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Repeat a case that is judged by the clock; None leaves it to pytest, as every other case and the last try."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for _ in range(3 if pyfuncitem.originalname in CLOCKED_FUNCTIONS else 0):
        try:
            pyfuncitem.obj(**arguments)
        except AssertionError:
            continue
        return True
    return None


def algorithms_of(item: pytest.Function) -> set[type]:
    """The algorithms a case is about: those among its parameters; without any, those its code or a fixture's names."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = {found for value in parameters for found in _algorithms_in(value, item.module)}
    if found:
        return found
    fixtures = (fixture.func for definitions in item._fixtureinfo.name2fixturedefs.values() for fixture in definitions)
    return {found for function in (item.function, *fixtures) for found in _algorithms_named_in(function)}


def _algorithms_in(value: Any, module: Any) -> Iterator[type]:
    if _is_algorithm(value):
        yield value
    elif isinstance(value, str):
        # test_tensorboard has "a2c" as its parameter, a key of the module's table of classes.
        rows = [table.get(value) for table in vars(module).values() if isinstance(table, dict)]
        yield from (entry for row in rows if isinstance(row, tuple) for entry in row if _is_algorithm(entry))


def _algorithms_named_in(function: Callable[..., Any]) -> Iterator[type]:
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    for name in _global_names(code) if code else ():
        if _is_algorithm(function.__globals__.get(name)):
            yield function.__globals__[name]


def _global_names(code: CodeType) -> set[str]:
    # A name that the function itself imports is a local variable: the swap does not reach it.
    names = set(code.co_names) - set(code.co_varnames)
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _is_algorithm(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseAlgorithm)


class Report:
    """Gathers the outcomes in the main process and writes them as JSON."""

    def __init__(self, config: pytest.Config, classes: list[str]) -> None:
        self.file = Path(config.getoption("--plus-report"))
        self.classes = classes
        self.cases: dict[str, dict[str, Any]] = {}
        self.deselected = 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count what this process itself deselects (without workers)."""
        self.deselected = len(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Every worker collects the same cases, so any one's count serves."""
        self.deselected = getattr(node, "workeroutput", {}).get("plus_deselected", self.deselected)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome: that of the call, unless a fixture failed or skipped."""
        if report.when != "call" and report.passed:
            return
        outcome = "excused" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        if self.cases.get(report.nodeid, {}).get("outcome") != "failed":
            detail = report.longreprtext if report.failed else str(report.longrepr or "")
            self.cases[report.nodeid] = {"outcome": outcome, "seconds": report.duration, "detail": detail}

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        report = {"classes": self.classes, "deselected": self.deselected, "cases": self.cases}
        self.file.write_text(json.dumps(report, indent=1))
