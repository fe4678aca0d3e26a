"""All of upstream's tests that concern our classes (``make conformance``)."""

from collections.abc import Callable
from typing import Any

import pytest
from class_swap import COUNTERPARTS
from excuses import load_excuses
from upstream_run import Outcome, run_upstream

import sb3_pgplus

pytestmark = [pytest.mark.conformance, pytest.mark.slow]

#: Cases of stable-baselines3 and sb3-contrib 2.9.2 about each class: the rule that selects them must not lose any.
CASES = {
    "sb3": {"PPOPlus": 103, "A2CPlus": 110, "TRPOPlus": 0},
    "contrib": {"PPOPlus": 0, "A2CPlus": 0, "TRPOPlus": 24},
}


def check(outcome: Outcome, record_property: Callable[[str, Any], None]) -> None:
    """No case failed, whatever was excused really failed, and every excuse met a case."""
    record_property("conformance", outcome.row())
    assert not outcome.ids("failed"), outcome.failures()
    if not outcome.classes:
        pytest.skip(f"sb3_pgplus has none of the classes that {outcome.suite} tests")


@pytest.mark.parametrize("suite", ["sb3", "contrib"])
@pytest.mark.parametrize("mode", ["presets", "defaults"])
def test_upstream_suite(mode: str, suite: str, record_property: Callable[[str, Any], None]) -> None:
    outcome = run_upstream(mode, suite)
    check(outcome, record_property)
    assert len(outcome.cases) == sum(CASES[suite][name] for name in outcome.classes)
    stale = [e.case for e in load_excuses(mode, suite) if not any(e.matches(case) for case in outcome.cases)]
    assert not stale, f"excused.toml speaks of cases that do not exist: {stale}"


@pytest.mark.parametrize("suite", ["sb3", "contrib"])
def test_each_excuse_is_explained_by_its_switch(suite: str, record_property: Callable[[str, Any], None]) -> None:
    if not any(excuse.switches for excuse in load_excuses("switched", suite)):
        pytest.skip("nothing is excused by a switch")
    check(run_upstream("switched", suite), record_property)


@pytest.mark.parametrize("mode", ["presets", "defaults"])
@pytest.mark.parametrize("name", ["TRPOPlus"])
def test_upstream_tests_of_a2c(name: str, mode: str, record_property: Callable[[str, Any], None]) -> None:
    """sb3-contrib does not test TRPO on advantages, gSDE, batch norm or determinism; the A2C cases of SB3 do."""
    assert name in COUNTERPARTS
    if not hasattr(sb3_pgplus, name):
        pytest.skip(f"sb3_pgplus has no {name}")
    check(run_upstream(mode, "sb3", as_a2c=name), record_property)
