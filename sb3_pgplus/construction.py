"""Constructor arguments from declarations: signatures, unknown names, classes named by strings."""

import inspect
import os
import pydoc
import sys
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

import numpy as np
from stable_baselines3.common.policies import BasePolicy

from sb3_pgplus.hparams import PolicyGradientHparams, nearest

# What SB3's constructors take besides hyperparameters, with SB3's defaults.
PLUMBING: dict[str, Any] = {
    "use_sde": False,
    "sde_sample_freq": -1,
    "rollout_buffer_class": None,
    "rollout_buffer_kwargs": None,
    "stats_window_size": 100,
    "tensorboard_log": None,
    "policy_kwargs": None,
    "verbose": 0,
    "seed": None,
    "device": "auto",
    "_init_setup_model": True,
}

_PLUMBING_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("use_sde", (bool, np.bool_), "True or False"),
    ("sde_sample_freq", (int, np.integer), "a whole number"),
    ("stats_window_size", (int, np.integer), "a whole number"),
    ("verbose", (int, np.integer, bool), "0, 1 or 2"),
    ("seed", (int, np.integer, NoneType), "a whole number or None"),
    ("tensorboard_log", (str, os.PathLike, NoneType), "a path or None"),
    ("policy_kwargs", (Mapping, NoneType), "a dict or None"),
    ("rollout_buffer_kwargs", (Mapping, NoneType), "a dict or None"),
    ("rollout_buffer_class", (type, str, NoneType), "a class, its dotted path or None"),
)


def signature_of(hparams_class: type[PolicyGradientHparams], positional: tuple[str, ...]) -> inspect.Signature:
    """
    The constructor's signature: SB3's positional arguments in SB3's order, the rest by keyword only.

    :param hparams_class: where the hyperparameters are declared
    :param positional: names after ``policy`` and ``env`` that may be given by position
    """
    parameter, defaults = inspect.Parameter, {**hparams_class.defaults(), **PLUMBING}
    required = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("policy", "env")]
    by_position = [parameter(n, parameter.POSITIONAL_OR_KEYWORD, default=defaults[n]) for n in positional]
    by_keyword = [
        parameter(name, parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
        if name not in positional
    ]
    return inspect.Signature([*required, *by_position, *by_keyword])


def bind(
    class_name: str,
    positional: tuple[str, ...],
    defaults: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """
    Constructor arguments by name, defaults filled in.

    :raises TypeError: on an unknown name, a name given twice, or too many positional arguments
    """
    if len(args) > len(positional):
        raise TypeError(f"{class_name} takes at most {len(positional) + 2} positional arguments, got {len(args) + 2}")
    by_position = dict(zip(positional, args, strict=False))
    for name in by_position.keys() & kwargs.keys():
        raise TypeError(f"{class_name} got multiple values for argument `{name}`")
    reject_unknown(class_name, kwargs, defaults)
    return {**defaults, **by_position, **kwargs}


def reject_unknown(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """
    :raises TypeError: naming the first unknown name and the known one nearest to it
    """
    known = set(known)
    for name in names:
        if name not in known:
            raise TypeError(f"{where} got an unknown argument `{name}`{nearest(name, known)}")


#: Smallest and largest values; -1 or 0 is gSDE's noise of a whole rollout.
_PLUMBING_RANGES = {"sde_sample_freq": (-1, sys.maxsize), "stats_window_size": (1, sys.maxsize), "seed": (0, 2**32 - 1)}


def checked_plumbing(given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param given: those of :data:`PLUMBING`, much of which SB3 would take without a look
    :return: the same, with Python's integers in place of NumPy's
    :raises TypeError: on a value of the wrong type
    :raises ValueError: on a number out of range
    """
    for name, types, allowed in _PLUMBING_TYPES:
        value = given[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"`{name}` must be {allowed}, got {value!r}")
    for name, (low, high) in _PLUMBING_RANGES.items():
        value = given[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"`{name}` must be at least {low} and at most {high}, got {value}")
    return {name: int(value) if isinstance(value, np.integer) else value for name, value in given.items()}


def check_policy(policy: Any) -> None:
    """
    :param policy: SB3's first argument
    :raises TypeError: if it is neither a name nor a class of policies
    """
    if not isinstance(policy, str) and not (isinstance(policy, type) and issubclass(policy, BasePolicy)):
        raise TypeError(f"`policy` must be a name such as 'MlpPolicy', or a class of policies, got {policy!r}")


def locate_class(path: str) -> type[Any]:
    """
    The class that a dotted path names.

    :param path: ``"package.module.Class"``
    :raises ValueError: if there is none
    """
    found = pydoc.locate(path)
    if not isinstance(found, type):
        raise ValueError(f"`rollout_buffer_class` is {path!r}, which names no importable class")
    return found
