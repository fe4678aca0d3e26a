"""
NumPy arrays in memory that several processes share.

The memory is a file without a name, whose descriptor travels through a pipe. So there is nothing to unlink, and nothing
stays behind when processes are killed: the memory is gone with the last of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from sb3_pgplus.vec_env.common import Array

_ALIGNMENT = 64  # a cache line, so that no two processes write into the same one


class ArraySpec(NamedTuple):
    """Shape and type of an array that has yet to be allocated."""

    shape: tuple[int, ...]
    dtype: Any


class SharedArrays:
    """
    Named arrays in one piece of shared memory.

    :param specs: name → shape and type; the same in every process
    :param descriptor: of the memory, as :meth:`receive` got it; None allocates it, filled with zeros
    """

    def __init__(self, specs: Mapping[Any, ArraySpec], descriptor: int | None = None) -> None:
        offsets, size = {}, 0
        for name, spec in specs.items():
            offsets[name] = size
            n_bytes = int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
            size += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        size = max(size, 1)  # nothing cannot be mapped
        self._descriptor = _allocate(size) if descriptor is None else descriptor
        self._memory = mmap.mmap(self._descriptor, size)
        self.arrays: dict[Any, Array] = {
            name: np.ndarray(spec.shape, spec.dtype, buffer=self._memory, offset=offsets[name])
            for name, spec in specs.items()
        }

    def send(self, pipe: Connection, pid: int) -> None:
        """
        Give another process access.

        :param pipe: to that process, which has to call :meth:`receive`
        :param pid: of that process
        """
        reduction.send_handle(pipe, self._descriptor, pid)

    @classmethod
    def receive(cls, pipe: Connection, specs: Mapping[Any, ArraySpec]) -> SharedArrays:
        """
        Map the memory that :meth:`send` gave access to.

        :param pipe: to the process that sent it
        :param specs: of the arrays, as in that process
        """
        shared = cls(specs, reduction.recv_handle(pipe))
        shared.forget_descriptor()
        return shared

    def forget_descriptor(self) -> None:
        """Close the file; the memory stays until the arrays are gone. :meth:`send` works no longer."""
        os.close(self._descriptor)


def _allocate(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor: int = os.memfd_create("sb3_pgplus")
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
