"""
Functions in processes of their own: what ends one, a segfault or the kernel's out-of-memory killer, ends no other.

Processes are forked from a clean server that has imported torch once (spawned where there is no fork), so that starting
one takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch as th


class ProcessDiedError(RuntimeError):
    """A process ended without having said why."""


class Child:
    """
    A function in a process of its own, with one thread of torch; what it sends comes back through a pipe.

    Ctrl-C does not reach it, the parent decides; it ends with the parent, whatever ends that.

    :param function: called with the sending end of the pipe and the arguments; importable by name
    :param arguments: picklable
    :param name: of the process
    :param preload: modules that the server imports before the first process is forked from it
    """

    def __init__(
        self, function: Callable[..., None], arguments: Sequence[Any], *, name: str, preload: Sequence[str] = ()
    ) -> None:
        context = process_context(preload)
        self.connection: Connection
        self.connection, theirs = context.Pipe(duplex=False)
        self.started = time.perf_counter()
        self._process = context.Process(target=_call, args=(function, theirs, tuple(arguments)), name=name)
        self._process.start()
        theirs.close()  # so that its death is the end of the stream

    def receive(self) -> Any:
        """
        Wait for the next thing that the function sends.

        :raises ProcessDiedError: if there will be none
        """
        try:
            return self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            how = f"its process was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise ProcessDiedError(how) from None

    def end(self, *, terminate: bool = False) -> None:
        """
        Wait until the process has ended, at most ten seconds.

        :param terminate: ask it to end first
        """
        if terminate:
            self._process.terminate()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self.connection.close()


def process_context(preload: Sequence[str] = ()) -> Any:
    """
    The way to start processes here.

    :param preload: modules that the server imports, if it is not running yet
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch's optimisers import dynamo when they are first made: four seconds in each process.
    context.set_forkserver_preload(["sb3_pgplus.process_server", *preload, "torch._dynamo"])
    _start_server()
    return context


def _start_server() -> None:
    """
    Start what processes are forked from, if it is not running yet. Ctrl-C does not come there before it is ignored (see
    :mod:`sb3_pgplus.process_server`): what a process blocks is blocked in those that it starts.
    """
    resource_tracker.ensure_running()  # first: it unblocks what it has blocked for itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(function: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, and that decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    th.set_num_threads(1)
    function(connection, *arguments)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
