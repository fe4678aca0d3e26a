"""Callbacks inside callbacks: SB3's lists and events hold others, and tells none of them that a training failed."""

from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback


def callbacks_in(callback: Any) -> Iterator[BaseCallback]:
    """
    All callbacks of a training, those first that hold others.

    :param callback: what ``learn`` takes: a callback, a list of them, a function or None
    """
    if isinstance(callback, list):
        for member in callback:
            yield from callbacks_in(member)
    elif isinstance(callback, BaseCallback):
        yield callback
        yield from callbacks_in(getattr(callback, "callbacks", None))  # of a CallbackList
        for name in ("callback", "callback_on_new_best", "callback_after_eval"):  # of an EventCallback
            yield from callbacks_in(getattr(callback, name, None))


def is_known(callback: Any) -> bool:
    """
    Whether all callbacks of a training are SB3's and ours, which do not change the policy's modules in a rollout.

    :param callback: what ``learn`` was given
    """
    packages = {__name__.partition(".")[0], "stable_baselines3"}
    return all(
        type(member).__module__.partition(".")[0] in packages
        and not any(hasattr(BaseCallback, name) for name in vars(member))  # a method put in its place
        # SB3 wraps functions in one of these, and None, too.
        and not (isinstance(member, ConvertCallback) and member.callback is not None)
        for member in callbacks_in(callback)
    )


def is_nobody(callback: BaseCallback) -> bool:
    """
    Whether ``learn`` was given no callback, which SB3 wraps, too.

    :param callback: SB3's object of it
    """
    return type(callback) is ConvertCallback and callback.callback is None


def tell_failure(callback: Any, error: BaseException) -> None:
    """
    Call ``on_training_failure(error)`` of the callbacks that have it: ``on_training_end`` is for those that ended well.

    :param callback: what ``learn`` was given
    :param error: what ended the training; ``KeyboardInterrupt`` for Ctrl-C
    """
    _call(callback, "on_training_failure", error)


def tell_return(callback: Any) -> None:
    """
    Call ``on_learn_return()`` of the callbacks that have it: every ``on_training_end`` is over, and ``learn`` is, too.

    :param callback: what ``learn`` was given
    """
    _call(callback, "on_learn_return")


def _call(callback: Any, method: str, *args: Any) -> None:
    told: set[int] = set()
    for member in callbacks_in(callback):
        listener = getattr(member, method, None)
        if listener is not None and id(member) not in told:  # an EvalCallback names one of its callbacks twice
            told.add(id(member))
            listener(*args)
