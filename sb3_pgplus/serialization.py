"""
Values as JSON and back, so that a saved model needs no pickle.

JSON's own types stand for themselves; anything else is an object whose ``":type:"`` says how to read it. Classes are
named, and only those of SB3, torch and this package are known. What remains, a user's own classes and callables, is
pickled as SB3 does it, in an object with ``":serialized:"``; :func:`pickled_parts` finds those.
"""

import base64
import math
import pathlib
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from sb3_pgplus.schedules import CosineSchedule

TYPE = ":type:"
PICKLE = ":serialized:"
_NAME = ":name:"

#: Classes are looked up in these modules (a dot at the end: and those below), among those that Python has imported.
_CLASS_MODULES = (
    "torch.nn.modules.",
    "torch.optim.",
    "stable_baselines3.common.policies",
    "stable_baselines3.common.torch_layers",
    "stable_baselines3.common.buffers",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like",
    "sb3_pgplus.buffers",
    "numpy",
)
_CLASS_BASES = (nn.Module, th.optim.Optimizer, BaseBuffer, np.generic)
#: Schedules and the attributes that they consist of, in the order of their constructors.
_SCHEDULES: dict[type[Any], tuple[str, ...]] = {
    ConstantSchedule: ("val",),
    LinearSchedule: ("start", "end", "end_fraction"),
    CosineSchedule: ("start", "end"),
    FloatSchedule: ("value_schedule",),
}


def _unusual_dtype(space: Any) -> dict[str, Any]:
    return {} if space.dtype == np.int64 else {"dtype": space.dtype}  # Gymnasium 1.1's Discrete takes none


_SPACE_ARGUMENTS: dict[type[Any], Callable[[Any], dict[str, Any]]] = {
    spaces.Box: lambda space: {"low": space.low, "high": space.high, "dtype": space.dtype},
    spaces.Discrete: lambda space: {"n": int(space.n), "start": int(space.start), **_unusual_dtype(space)},
    spaces.MultiDiscrete: lambda space: {"nvec": space.nvec, "dtype": space.dtype, "start": space.start},
    spaces.MultiBinary: lambda space: {"n": space.n},
    spaces.Dict: lambda space: {"spaces": list(space.spaces.items())},  # pairs: a Dict sorts the keys of a dictionary
    spaces.Tuple: lambda space: {"spaces": list(space.spaces)},
}
_BIT_GENERATORS = {name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")}
_SEED_SEQUENCE = ("entropy", "spawn_key", "pool_size", "n_children_spawned")
#: Kinds of NumPy's dtypes whose bytes say it all: no Python objects, no structures.
_PLAIN_KINDS = frozenset("?biufcSUmM")


# --- to JSON ----------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """
    Turn a value into what ``json`` writes.

    :param value: anything that JSON, this module or cloudpickle understands
    :return: None, bool, int, float, str, list or dict with such values
    :raises Exception: whatever cloudpickle raises on what it cannot pickle
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is dict and all(type(key) is str and not key.startswith(":") for key in value):
        return {key: encode(item) for key, item in value.items()}
    writer = _WRITERS.get(type(value)) or next((w for kind, w in _WRITERS_OF_BASES if isinstance(value, kind)), None)
    entry = writer(value) if writer else None
    return _pickle(value) if entry is None else entry


def _pickle(value: Any) -> dict[str, Any]:
    entry = {TYPE: str(type(value)), PICKLE: base64.b64encode(cloudpickle.dumps(value)).decode()}
    named = getattr(value, "__qualname__", None)
    return entry if named is None else {**entry, _NAME: f"{value.__module__}.{named}"}


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {TYPE: "float", "value": repr(value)}  # JSON has no NaN


def _items(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {TYPE: kind, "items": [encode(item) for item in value]}


def _pairs(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {TYPE: kind, "items": [[encode(key), encode(item)] for key, item in value.items()]}


def _array(value: Any) -> dict[str, Any] | None:
    if value.dtype.kind not in _PLAIN_KINDS or value.dtype.hasobject:
        return None
    kind = "array" if isinstance(value, np.ndarray) else "numpy scalar"
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {TYPE: kind, "dtype": value.dtype.str, "shape": list(value.shape), "data": data}


def _dtype(value: np.dtype[Any]) -> dict[str, Any] | None:
    return {TYPE: "dtype", "name": value.str} if value.kind in _PLAIN_KINDS and not value.hasobject else None


def _tensor(value: th.Tensor) -> dict[str, Any] | None:
    try:
        array = _array(value.detach().cpu().numpy())
    except (TypeError, RuntimeError):  # sparse, quantised, a type that NumPy has not
        return None
    return None if array is None or value.requires_grad else {TYPE: "tensor", "value": array}


def _class(value: type[Any]) -> dict[str, Any] | None:
    name = f"{value.__module__}.{value.__qualname__}"
    return {TYPE: "class", "name": name} if known_class(name) is value else None


def _schedule(value: Any) -> dict[str, Any] | None:
    names = _SCHEDULES[type(value)]
    if vars(value).keys() != set(names):
        return None
    return {TYPE: "schedule", "class": type(value).__name__, **{name: encode(vars(value)[name]) for name in names}}


def _space(value: spaces.Space[Any]) -> dict[str, Any] | None:
    arguments = _SPACE_ARGUMENTS[type(value)](value)
    if not _same_space(type(value)(**arguments), value):
        return None
    entry = {TYPE: "space", "class": type(value).__name__, **{name: encode(item) for name, item in arguments.items()}}
    return entry if value._np_random is None else {**entry, "random": encode(value._np_random)}


def _same_space(rebuilt: Any, space: Any) -> bool:
    """Whether its arguments are all there is to a space: somebody may have set bounds or attributes afterwards."""
    cached = {"_np_random", "low_repr", "high_repr"}
    ours, theirs = ({name: v for name, v in vars(each).items() if name not in cached} for each in (rebuilt, space))
    return ours.keys() == theirs.keys() and all(_equal(value, theirs[name]) for name, value in ours.items())


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def _generator(value: np.random.Generator) -> dict[str, Any] | None:
    bits = value.bit_generator
    name, seeds = type(bits).__name__, getattr(bits, "seed_seq", None)
    if _BIT_GENERATORS.get(name) is not type(bits) or type(seeds) is not np.random.SeedSequence:
        return None
    seed_sequence = {field: encode(getattr(seeds, field)) for field in _SEED_SEQUENCE}
    return {TYPE: "random generator", "class": name, "state": encode(bits.state), "seed_sequence": seed_sequence}


_WRITERS: dict[type[Any], Callable[[Any], dict[str, Any] | None]] = {
    float: _float,
    bytes: lambda value: {TYPE: "bytes", "data": base64.b64encode(value).decode()},
    tuple: _items("tuple"),
    set: _items("set"),
    frozenset: _items("frozenset"),
    deque: lambda value: {**_items("deque")(value), "maxlen": value.maxlen},
    dict: _pairs("dict"),
    OrderedDict: _pairs("OrderedDict"),
    np.ndarray: _array,
    th.Tensor: _tensor,
    np.random.Generator: _generator,
    **dict.fromkeys(_SCHEDULES, _schedule),
    **dict.fromkeys(_SPACE_ARGUMENTS, _space),
}
_WRITERS_OF_BASES: tuple[tuple[type[Any], Callable[[Any], dict[str, Any] | None]], ...] = (
    (type, _class),
    (np.generic, _array),
    (np.dtype, _dtype),
    (pathlib.PurePath, lambda value: {TYPE: "path", "value": str(value)}),
)


# --- from JSON --------------------------------------------------------------------------------------------------------


def decode(entry: Any, *, trusted: bool) -> Any:
    """
    The value that :func:`encode` made an entry of.

    :param entry: what ``json`` read
    :param trusted: whether pickles may be loaded, which can run any code; nothing else here runs or imports anything
    :raises Exception: on what :func:`encode` does not write, and whatever a pickle raises
    """
    if isinstance(entry, list):
        return [decode(item, trusted=trusted) for item in entry]
    if not isinstance(entry, dict):
        return entry
    if PICKLE in entry:
        if not trusted:
            raise ValueError("it is pickled")
        return cloudpickle.loads(base64.b64decode(entry[PICKLE]))
    kind = entry.get(TYPE)
    if kind is not None and kind not in _READERS:
        raise ValueError(f"this version does not know its type {kind!r}")
    content = {name: decode(item, trusted=trusted) for name, item in entry.items() if name != TYPE}
    return content if kind is None else _READERS[kind](content)


def pickled_parts(entry: Any, place: str) -> Iterator[str]:
    """
    Where an entry holds a pickle, and of what.

    :param entry: what :func:`encode` returned, or SB3 wrote
    :param place: the entry's own name
    :return: such as ``"policy_kwargs['features_extractor_class'] (mine.Extractor)"``
    """
    if isinstance(entry, dict) and PICKLE in entry:
        yield f"{place} ({entry.get(_NAME) or entry.get(TYPE)})"
    elif isinstance(entry, dict):
        for name, item in entry.items():
            yield from pickled_parts(item, f"{place}.{name}" if TYPE in entry else f"{place}[{name!r}]")
    elif isinstance(entry, list):
        for index, item in enumerate(entry):
            yield from pickled_parts(item, f"{place}[{index}]")


def known_class(name: str) -> type[Any] | None:
    """
    The class of that name, if it is one that models are made of; nothing is imported.

    :param name: ``"torch.nn.modules.activation.Tanh"``
    """
    module, _, short = name.rpartition(".")
    listed = any(module == known or (known.endswith(".") and module.startswith(known)) for known in _CLASS_MODULES)
    found = getattr(sys.modules.get(module), short, None) if listed else None
    is_model_part = isinstance(found, type) and issubclass(found, _CLASS_BASES) and found.__module__ == module
    return found if is_model_part else None


def _read_class(content: dict[str, Any]) -> type[Any]:
    found = known_class(content["name"])
    if found is None:
        raise ValueError(f"it names {content['name']!r}, which is no class that models are made of")
    return found


def _read_array(content: dict[str, Any]) -> Any:
    dtype = _read_dtype({"name": content["dtype"]})
    array = np.frombuffer(base64.b64decode(content["data"], validate=True), dtype)
    return array.reshape(content["shape"]).copy()  # a buffer's array is read-only


def _read_dtype(content: dict[str, Any]) -> np.dtype[Any]:
    dtype = np.dtype(str(content["name"]))
    if dtype.kind not in _PLAIN_KINDS or dtype.hasobject:
        raise ValueError(f"its dtype {dtype} is none of plain numbers or text")
    return dtype


def _read_schedule(content: dict[str, Any]) -> Any:
    schedule = {kind.__name__: kind for kind in _SCHEDULES}[content["class"]]
    return schedule(*(content[name] for name in _SCHEDULES[schedule]))


def _read_space(content: dict[str, Any]) -> spaces.Space[Any]:
    space_class = {kind.__name__: kind for kind in _SPACE_ARGUMENTS}[content.pop("class")]
    random = content.pop("random", None)
    space: spaces.Space[Any] = space_class(**content)
    space._np_random = random
    return space


def _read_generator(content: dict[str, Any]) -> np.random.Generator:
    seeds = np.random.SeedSequence(**content["seed_sequence"])
    bits = _BIT_GENERATORS[content["class"]](seeds)
    bits.state = content["state"]
    return np.random.Generator(bits)


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float": lambda content: float(content["value"]),
    "bytes": lambda content: base64.b64decode(content["data"], validate=True),
    "tuple": lambda content: tuple(content["items"]),
    "set": lambda content: set(content["items"]),
    "frozenset": lambda content: frozenset(content["items"]),
    "deque": lambda content: deque(content["items"], maxlen=content["maxlen"]),
    "dict": lambda content: dict(content["items"]),
    "OrderedDict": lambda content: OrderedDict(content["items"]),
    "array": _read_array,
    "numpy scalar": lambda content: _read_array(content)[()],
    "dtype": _read_dtype,
    "tensor": lambda content: th.as_tensor(content["value"]),
    "path": lambda content: pathlib.Path(content["value"]),
    "class": _read_class,
    "schedule": _read_schedule,
    "space": _read_space,
    "random generator": _read_generator,
}
