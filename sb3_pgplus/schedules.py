"""
Schedules: a number, a string or a callable becomes SB3's picklable ``FloatSchedule`` of the remaining progress.

====================  ===========================================================================
``3e-4``, ``"3e-4"``  constant (YAML 1.1 reads ``3e-4`` as a string)
``"lin_a"``           linear from a to 0
``"lin_a_b"``         linear from a to b
``"cos_a"``           half a cosine from a to 0
``"cos_a_b"``         half a cosine from a to b
callable              SB3's convention: called with the remaining progress, which goes from 1 to 0
====================  ===========================================================================
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_pgplus.errors import HyperparameterError

#: What a schedulable argument accepts.
ScheduleLike = float | str | Callable[[float], float]


class CosineSchedule:
    """
    Half a cosine, ``end + (start − end) (1 + cos π(1 − p)) / 2`` for the remaining progress p (SGDR, Loshchilov and
    Hutter 2017, equation 5, without restarts).

    :param start: value at p = 1
    :param end: value at p = 0
    """

    def __init__(self, start: float, end: float) -> None:
        self.start = start
        self.end = end

    def __call__(self, progress_remaining: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * (1 - progress_remaining)))

    def __repr__(self) -> str:
        return f"CosineSchedule(start={self.start}, end={self.end})"


_SHAPES: dict[str, Callable[[float, float], Callable[[float], float]]] = {
    "lin": lambda start, end: LinearSchedule(start, end, 1.0),
    "cos": CosineSchedule,
}
_PREFIXES = {LinearSchedule: "lin", CosineSchedule: "cos"}


def as_schedule(name: str, value: Any) -> FloatSchedule:
    """
    Turn what the user wrote into a schedule.

    :param name: the argument's name, for the error
    :param value: see the module
    :return: a picklable callable of the remaining progress
    :raises ValueError: on a string that is no schedule
    :raises TypeError: on anything else that is neither a number nor a callable
    """
    if isinstance(value, str):
        return FloatSchedule(_parse(name, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return FloatSchedule(float(value))
    if callable(value):
        return FloatSchedule(value)
    raise TypeError(
        f"`{name}` must be a number, a string such as 'lin_3e-4' or 'cos_3e-4_1e-5', or a callable of the remaining "
        f"progress, got {value!r}"
    )


def describe_schedule(value: Any) -> Any:
    """
    The inverse of :func:`as_schedule` for the config file: a number or a string where one says it all, else a
    description.

    :param value: number, string or schedule
    :return: number or string
    """
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        return value.val
    if type(value) in _PREFIXES and getattr(value, "end_fraction", 1.0) == 1.0:
        end = "" if value.end == 0 else f"_{_shortest(value.end)}"
        return f"{_PREFIXES[type(value)]}_{_shortest(value.start)}{end}"
    return _in_words(value) if callable(value) else value


def _in_words(schedule: Callable[[float], float]) -> str:
    """A repr that says something, or name and values at start, middle and end."""
    text = repr(schedule)
    if " at 0x" not in text:
        return text
    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return f"{name}: {' → '.join(f'{schedule(progress):g}' for progress in (1.0, 0.5, 0.0))}"


def _shortest(number: float) -> str:
    """The shortest text that reads back as the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def depends_on_progress_alone(value: Any) -> bool:
    """
    Whether a schedulable value is a number, a string, or one of SB3's and our schedules; any other callable may know
    more.

    :param value: as :func:`as_schedule` takes it, or None
    """
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    return not callable(value) or type(value) in (ConstantSchedule, *_PREFIXES)


def is_constant(schedule: Callable[[float], float]) -> bool:
    """Whether a schedule gives the same value at the start, in the middle and at the end."""
    return len({schedule(progress) for progress in (1.0, 0.7, 0.5, 0.2, 0.0)}) == 1


def _parse(name: str, text: str) -> float | Callable[[float], float]:
    shape, *numbers = text.strip().split("_")
    try:
        if shape in _SHAPES and 1 <= len(numbers) <= 2:
            start, end = float(numbers[0]), float(numbers[1]) if len(numbers) == 2 else 0.0
            return _SHAPES[shape](start, end)
        return float(text)
    except ValueError:
        raise HyperparameterError(
            f"`{name}` is {text!r}, which is no schedule: write a number, 'lin_<start>', 'lin_<start>_<end>', "
            "'cos_<start>' or 'cos_<start>_<end>'"
        ) from None
