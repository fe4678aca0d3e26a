"""The part of upstream's tests that every CI run repeats: under the presets, and with the shipped defaults."""

from collections.abc import Callable
from typing import Any

import pytest
from upstream_run import run_upstream


@pytest.mark.parametrize("mode", ["presets", "defaults"])
def test_upstream_fast_selection(mode: str, record_property: Callable[[str, Any], None]) -> None:
    outcome = run_upstream(mode, "sb3", fast=True, timeout=900)
    record_property("conformance", outcome.row())
    assert outcome.classes, "sb3_pgplus has none of PPOPlus, A2CPlus, TRPOPlus"
    assert not outcome.ids("failed"), outcome.failures()
    assert outcome.ids("passed")
