"""Signals that ask a training to end: they are noted, and acted upon where nothing is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self


class Interruption:
    """
    Takes note of signals while it is entered; the same signal once more acts at once.

    Signals that are ignored stay so (a shell's background jobs ignore Ctrl-C), and outside the main thread, where
    Python allows no handlers, nothing is changed.

    :param signals: their numbers
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self.signal: int | None = None
        """The first signal that came."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(exit_code(number))


def exit_code(number: int) -> int:
    """
    :param number: of a signal
    :return: what shells report of a program that it ended
    """
    return 128 + number
