"""
Search spaces as tables: name → distribution, and how its value becomes a setting of the algorithm.

From a table come the sampler's distributions, the settings of a trial, and (backwards) the place of known settings in
the space. What belongs together is sampled as one: a rollout has a size and a number of minibatches, so that a
minibatch is never larger than the rollout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from sb3_pgplus.configs import ConfigError, RunSettings, algorithm_class, assign, default_n_envs, read_mapping
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.hparams import nearest

DERIVED = ("learning_rate_shape", "rollout_size", "n_minibatches")
"""Names that a table may use beside the constructor's arguments; :func:`trial_settings` turns them into those."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Parameter:
    """One row of a table."""

    distribution: BaseDistribution
    setting: str
    """The constructor's argument (``policy_kwargs.net_arch`` reaches inside), ``n_envs``, or one of ``DERIVED``."""
    to_setting: Callable[[Any], Any] = _same
    from_setting: Callable[[Any], Any] = _same


Space = Mapping[str, Parameter]


def _number(setting: str, low: float, high: float, *, log: bool = False) -> Parameter:
    distribution: BaseDistribution
    if isinstance(low, int) and isinstance(high, int):
        distribution = IntDistribution(low, high, log=log)
    else:
        distribution = FloatDistribution(low, high, log=log)
    return Parameter(distribution, setting, _readable, _start_value)


def _choice(setting: str, *choices: Any) -> Parameter:
    return Parameter(CategoricalDistribution(choices), setting)


def _power_of_two(setting: str, low: int, high: int) -> Parameter:
    return Parameter(IntDistribution(low, high), setting, lambda x: 2**x, lambda x: max(int(x), 1).bit_length() - 1)


def _close_to_one(setting: str, low: float, high: float) -> Parameter:
    """1 − γ and 1 − λ are one over a horizon: what counts is their order of magnitude."""
    flipped = Parameter(FloatDistribution(low, high, log=True), setting)
    return replace(flipped, to_setting=lambda x: _readable(1 - x), from_setting=lambda x: 1 - x)


def _plain(setting: str, *choices: Any) -> Parameter:
    """Choices among lists, which Optuna stores as JSON text only."""
    return Parameter(CategoricalDistribution([json.dumps(c) for c in choices]), setting, json.loads, json.dumps)


def _readable(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _start_value(value: Any) -> Any:
    """The number a schedule starts with: ``"lin_3e-4"`` → 3e-4."""
    return float(value.split("_")[1] if "_" in value else value) if isinstance(value, str) else value


_SHARED: dict[str, Parameter] = {
    "learning_rate": _number("learning_rate", 1e-5, 1e-2, log=True),
    "learning_rate_shape": _choice("learning_rate_shape", "constant", "linear"),
    "one_minus_gamma": _close_to_one("gamma", 1e-4, 0.2),
    "advantage_estimator": _choice("advantage_estimator", "gae", "n_step"),
    "one_minus_gae_lambda": _close_to_one("gae_lambda", 1e-3, 0.5),
    "n_step_horizon": _number("n_step_horizon", 1, 32, log=True),
    "ent_coef": _number("ent_coef", 1e-8, 0.1, log=True),
    "max_grad_norm": _number("max_grad_norm", 0.1, 10.0, log=True),
    "normalize_advantage": _choice("normalize_advantage", True, False),
    "normalize_observations": _choice("normalize_observations", "auto", False),
    "normalize_rewards": _choice("normalize_rewards", "auto", False),
    "normalize_value_targets": _choice("normalize_value_targets", False, True),
    "log_std_init": _number("log_std_init", -2.0, 0.5),
    "activation_fn": _choice("activation_fn", "tanh", "relu"),
    "net_arch": _plain("policy_kwargs.net_arch", [32, 32], [64, 64], [128, 128], [256, 256]),
}
_MINIBATCHES: dict[str, Parameter] = {
    "log2_rollout_size": _power_of_two("rollout_size", 7, 13),
    "log2_n_minibatches": _power_of_two("n_minibatches", 0, 6),
    "clip_range_vf": _choice("clip_range_vf", None, 0.2),
}

SPACES: dict[str, Space] = {
    "ppoplus": {
        **_SHARED,
        **_MINIBATCHES,
        "n_epochs": _number("n_epochs", 1, 20, log=True),
        "clip_range": _number("clip_range", 0.05, 0.4),
        "vf_coef": _number("vf_coef", 0.1, 2.0, log=True),
        "target_kl": _choice("target_kl", None, 0.01, 0.03),
        "recompute_advantages": _choice("recompute_advantages", "auto", False),
    },
    "a2cplus": {
        **_SHARED,
        "log2_n_envs": _power_of_two("n_envs", 2, 6),
        "log2_n_steps": _power_of_two("n_steps", 2, 7),
        "vf_coef": _number("vf_coef", 0.1, 2.0, log=True),
        "use_rms_prop": _choice("use_rms_prop", True, False),
    },
    "trpoplus": {
        **_SHARED,
        **_MINIBATCHES,
        "target_kl": _number("target_kl", 0.003, 0.1, log=True),
        "kl_reduction": _choice("kl_reduction", "sum", "mean"),
        "max_step_size": _choice("max_step_size", None, 5.0, 20.0),
        "n_critic_updates": _number("n_critic_updates", 5, 40, log=True),
        "cg_max_steps": _number("cg_max_steps", 5, 25),
        "cg_damping": _number("cg_damping", 1e-3, 0.3, log=True),
    },
}


# --- from a trial to settings, and back -------------------------------------------------------------------------------


def suggest(trial: optuna.trial.BaseTrial, space: Space) -> dict[str, Any]:
    """
    Ask a trial for every parameter of a space.

    :param trial: Optuna's
    :param space: the table
    :return: parameter → the sampler's value
    """
    return {name: _suggest(trial, name, row.distribution) for name, row in space.items()}


def _suggest(trial: optuna.trial.BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


def trial_settings(base: RunSettings, space: Space, params: Mapping[str, Any]) -> RunSettings:
    """
    Turn a trial's parameters into the settings of a training.

    :param base: what the space says nothing about
    :param space: the table
    :param params: parameter → value, from :func:`suggest`
    """
    hyperparameters = dict(base.hyperparameters)
    for name, row in space.items():
        assign(hyperparameters, row.setting.split("."), row.to_setting(params[name]))
    n_envs = int(hyperparameters.pop("n_envs", base.n_envs))
    shape = hyperparameters.pop("learning_rate_shape", None)
    if shape is not None:
        rate = _start_value(_value(base, hyperparameters, "learning_rate"))
        hyperparameters["learning_rate"] = f"lin_{rate!r}" if shape == "linear" else rate
    rollout_size = hyperparameters.pop("rollout_size", None)
    if rollout_size is not None:
        hyperparameters["n_steps"] = max(rollout_size // n_envs, 2)
    n_minibatches = hyperparameters.pop("n_minibatches", None)
    if "batch_size" in _defaults(base.algo):
        rollout = _value(base, hyperparameters, "n_steps") * n_envs
        batch_size = _value(base, hyperparameters, "batch_size")
        if n_minibatches is not None:
            batch_size = max(rollout // n_minibatches, 2)
        hyperparameters["batch_size"] = min(batch_size, rollout)
    return replace(base, n_envs=n_envs, hyperparameters=hyperparameters)


def known_params(space: Space, settings: RunSettings) -> dict[str, Any]:
    """
    Find the place of known settings in a space: for each parameter the allowed value nearest to theirs.

    :param space: the table
    :param settings: of a training
    :return: parameter → value; what the settings switch off (``None`` for a number) is left out
    """
    flat = _defaults(settings.algo) | settings.hyperparameters | {"n_envs": settings.n_envs}
    rate = flat["learning_rate"]
    flat["learning_rate_shape"] = "linear" if str(rate).startswith("lin_") else "constant"
    flat["rollout_size"] = flat["n_steps"] * settings.n_envs
    flat["n_minibatches"] = max(flat["rollout_size"] // flat.get("batch_size", flat["rollout_size"]), 1)
    of_policy = flat.get("policy_kwargs") or {}
    for name, default in _POLICY_DEFAULTS.items():
        if name not in settings.hyperparameters or flat[name] is None:
            flat[name] = of_policy.get(name, default if flat.get(name) is None else flat[name])
    flat["policy_kwargs"] = {"net_arch": [64, 64]} | of_policy
    params: dict[str, Any] = {}
    for name, row in space.items():
        outer, _, inner = row.setting.partition(".")
        value = flat.get(outer) if not inner else (flat.get(outer) or {}).get(inner)
        fitted = _fit(row, value)
        if fitted is not _NOWHERE:
            params[name] = fitted
    return params


_NOWHERE = object()
#: What a policy has where the algorithm's setting is None.
_POLICY_DEFAULTS = {"activation_fn": "tanh", "log_std_init": 0.0}


def _fit(row: Parameter, value: Any) -> Any:
    distribution = row.distribution
    if isinstance(distribution, CategoricalDistribution):
        raw = row.from_setting(value)
        return raw if raw in distribution.choices else _NOWHERE
    if value is None or callable(value):
        return _NOWHERE
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    raw = row.from_setting(value)
    raw = round(raw) if isinstance(distribution, IntDistribution) else float(raw)
    return min(max(raw, distribution.low), distribution.high)


def _defaults(algo: str) -> dict[str, Any]:
    defaults: dict[str, Any] = algorithm_class(algo).hparams_class.defaults()
    return defaults


def _value(base: RunSettings, hyperparameters: Mapping[str, Any], name: str) -> Any:
    return hyperparameters.get(name, _defaults(base.algo)[name])


def default_settings(base: RunSettings) -> RunSettings:
    """
    The same environment and budget with the constructor's defaults.

    :param base: the settings of the study
    """
    return replace(base, n_envs=default_n_envs(base.algo), hyperparameters={}, source="the constructor's defaults")


# --- the user's own ---------------------------------------------------------------------------------------------------


def read_space(path: Path, algo: str) -> Space:
    """
    Read a search space: ``name: {low: …, high: …, log: true}`` for numbers, ``name: [a, b, c]`` for choices.

    A name is an argument of the constructor, ``policy_kwargs.net_arch``, a derived one (``learning_rate_shape``,
    ``rollout_size``, ``n_minibatches``), or a row of the built-in table with the value ``default`` to take it over.

    :param path: YAML file
    :param algo: name of the algorithm
    :raises ConfigError: if it cannot be read, or says something impossible
    """
    content = read_mapping(path)
    if not content:
        raise ConfigError(f"{path} is empty: a search space needs at least one name")
    return {name: _row(name, entry, algo, f"{path}, {name}") for name, entry in content.items()}


def check_setting(name: str, algo: str, where: str) -> None:
    """
    :param name: of what a row of a table sets
    :param algo: name of the algorithm
    :param where: for the message
    :raises ConfigError: if the algorithm has no such setting
    """
    known = {*_defaults(algo), *PLUMBING, *DERIVED} - {"seed", "device", "verbose"}
    if name.partition(".")[0] not in known:
        raise ConfigError(f"{where}: no setting of {algo}{nearest(name, known)}")


def _row(name: str, entry: Any, algo: str, where: str) -> Parameter:
    builtin = SPACES[algo]
    if entry == "default":
        if name not in builtin:
            raise ConfigError(f"{where}: the built-in space has no such row; it has {', '.join(builtin)}")
        return builtin[name]
    check_setting(name, algo, where)
    if isinstance(entry, list) and entry:
        simple = all(isinstance(choice, bool | int | float | str | None) for choice in entry)
        return _choice(name, *entry) if simple else _plain(name, *entry)
    if not isinstance(entry, dict) or not {"low", "high"} <= entry.keys() <= {"low", "high", "log"}:
        raise ConfigError(f"{where}: expected a list of choices, or {{low: …, high: …, log: true}}, got {entry!r}")
    low, high = entry["low"], entry["high"]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high)):
        raise ConfigError(f"{where}: low and high must be numbers, got {low!r} and {high!r}")
    try:
        return _number(name, low, high, log=bool(entry.get("log", False)))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
