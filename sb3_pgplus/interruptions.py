"""Signals that ask a training to end: they are noted, and acted upon where nothing is under way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

NOTICE = "\n{}: finishing this iteration, then stopping. Once more: stopping at once.\n"


class Interruption:
    """
    Takes note of signals while it is entered, and says so; a second one acts at once.

    Signals that are ignored stay so (a shell's background jobs ignore Ctrl-C), and outside the main thread, where
    Python allows no handlers, nothing is changed.

    :param signals: their numbers
    :param only_unhandled: leave those alone for which the program has a handler of its own
    """

    def __init__(self, signals: Sequence[int], *, only_unhandled: bool = False) -> None:
        self._signals = tuple(signals)
        self._only_unhandled = only_unhandled
        self._before: dict[int, Any] = {}
        self.signal: int | None = None
        """The first signal that came."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if self._may_handle(signal.getsignal(number)):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _may_handle(self, handler: Any) -> bool:
        if self._only_unhandled:
            return handler in (signal.SIG_DFL, signal.default_int_handler)
        return handler is not signal.SIG_IGN

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, NOTICE.format(signal.Signals(number).name).encode())
        else:
            act_on(number)


@contextmanager
def deferred() -> Iterator[None]:
    """
    Ctrl-C and SIGTERM take effect at the end: for a moment in which an exception at any place would break something.
    Where nothing of Python's handles them, and outside the main thread, nothing is changed.
    """
    came: list[tuple[Callable[[int, FrameType | None], Any], int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append((before[number], number, frame))

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, signal.Handlers):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        for handler, received, frame in came:
            handler(received, frame)


def act_on(number: int) -> NoReturn:
    """
    End as a program does that does not handle the signal, with ``finally`` blocks run.

    :param number: of the signal
    :raises KeyboardInterrupt: for Ctrl-C
    :raises SystemExit: for others
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def exit_code(number: int) -> int:
    """
    :param number: of a signal
    :return: what shells report of a program that it ended
    """
    return 128 + number
