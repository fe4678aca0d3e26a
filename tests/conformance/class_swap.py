"""
Put our classes in the place of SB3's, for the tests that import them from there.

Upstream test modules say ``from stable_baselines3 import A2C, PPO`` and branch with ``model_class == PPO``. Rebinding
the names before those modules are imported redirects both the parametrisation and the branches.
"""

import importlib
import inspect
from typing import Any

from excuses import CLASS_NAME

#: Our class → where the one it replaces lives, and the preset that reproduces that one.
COUNTERPARTS = {
    "PPOPlus": ("stable_baselines3", "PPO", "SB3_PPO"),
    "A2CPlus": ("stable_baselines3", "A2C", "SB3_A2C"),
    "TRPOPlus": ("sb3_contrib", "TRPO", "SB3_TRPO"),
}

MODES = ("presets", "defaults", "switched", "stock")


def swap_in(mode: str, as_a2c: str | None = None) -> dict[str, Any]:
    """
    Rebind the names of the stock classes whose counterpart exists in ``sb3_pgplus``.

    :param mode: "presets": subclasses called as SB3's are, whose defaults are SB3's; "defaults": the shipped classes;
        "switched": the shipped classes with defaults that `set_switches` changes; "stock": nothing is replaced, to see
        what the machine itself fails
    :param as_a2c: the name of the one class of ours that stands in for A2C, and nothing else is replaced
    :return: name of our class → class that the tests see
    """
    targets = COUNTERPARTS if as_a2c is None else {as_a2c: ("stable_baselines3", "A2C", COUNTERPARTS[as_a2c][2])}
    # All imports come before the first rebinding: a module must not take our class for the one it builds on.
    modules = {module: importlib.import_module(module) for module, _, _ in COUNTERPARTS.values()}
    ours = importlib.import_module("sb3_pgplus") if mode != "stock" else None
    seen: dict[str, Any] = {}
    for name, (module, stock_name, preset) in targets.items():
        stock = getattr(modules[module], stock_name)
        shipped = stock if mode == "stock" else getattr(ours, name, None)
        if shipped is not None:
            seen[name] = _variant(mode, shipped, stock, preset)
    for name, variant in seen.items():
        module, stock_name, _ = targets[name]
        setattr(modules[module], stock_name, variant)
    return seen


def _variant(mode: str, shipped: Any, stock: Any, preset: str) -> Any:
    if mode in ("stock", "defaults"):
        return shipped
    values = dict(getattr(importlib.import_module("sb3_pgplus.presets"), preset))
    if mode == "presets":
        return _with_defaults(shipped, stock, values, stock.__name__)
    variant = _with_defaults(shipped, stock, {}, shipped.__name__)
    variant.conformance_preset, variant.conformance_names = values, (shipped.__name__, stock.__name__)
    return variant


def _with_defaults(shipped: Any, stock: Any, defaults: dict[str, Any], name: str) -> Any:
    """A subclass with other defaults for the arguments that are not given, by name or in the stock class's order."""
    order = list(inspect.signature(stock).parameters)

    class Variant(shipped):  # type: ignore[misc]
        conformance_defaults = defaults

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            by_position = order[: len(args)]
            others = {name: value for name, value in self.conformance_defaults.items() if name not in by_position}
            super().__init__(*args, **{**others, **kwargs})

    Variant.__name__ = Variant.__qualname__ = name
    return Variant


def set_switches(variant: Any, switches: tuple[str, ...]) -> None:
    """Give these defaults of a "switched" class their preset values (or it SB3's name), all others the shipped ones."""
    shipped_name, stock_name = variant.conformance_names
    variant.__name__ = stock_name if CLASS_NAME in switches else shipped_name
    variant.conformance_defaults = {name: variant.conformance_preset[name] for name in switches if name != CLASS_NAME}
