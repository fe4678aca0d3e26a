"""
Checkpoint files: a model's zip with two more members and a checksum over everything.

``training_state.json`` is a plain tree (:mod:`sb3_pgplus.vec_env.state_trees`) whose arrays lie end to end in
``training_state.pt``, one tensor of bytes: nothing in them is pickled code. The file ends with the SHA-256 of all bytes
before it, inside the zip's comment, so that every other program that reads zips still reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th

from sb3_pgplus.errors import CheckpointError, warn_user
from sb3_pgplus.files import write_atomically

Tree = Any

#: Of the members that are added to a model's zip.
FORMAT = 1
TREE, ARRAYS = "training_state.json", "training_state.pt"  # SB3 takes whatever ends in .pth for parameters
#: A run keeps its checkpoints here.
FOLDER = "checkpoints"
_BEST = "best.json"
_LABEL = b"sb3_pgplus checkpoint, sha256 "
_N_DIGITS = 2 * hashlib.sha256().digest_size
_NAME = re.compile(r"step-(\d+)\.zip")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksum was right."""

    path: Path
    content: bytes
    """The whole file, which is also a model's zip."""
    state: Tree
    """Everything else that training goes on from."""


# --- one file ---------------------------------------------------------------------------------------------------------


def pack(model: bytes, state: Tree) -> bytes:
    """
    Make the content of a checkpoint.

    :param model: a model's zip
    :param state: a plain tree
    """
    tree, arrays = encode({"format": FORMAT, "state": state})
    stored, archive = io.BytesIO(), io.BytesIO(model)
    th.save(th.frombuffer(bytearray(arrays or b"\0"), dtype=th.uint8), stored)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(TREE, json.dumps(tree), zipfile.ZIP_DEFLATED)
        file.writestr(ARRAYS, stored.getvalue())
        file.comment = _LABEL + b"0" * _N_DIGITS
    content = archive.getvalue()[:-_N_DIGITS]
    return content + _digest(content)


def read(path: Path) -> Checkpoint:
    """
    Read a checkpoint. The checksum comes before anything else is looked at.

    :param path: the file
    :raises CheckpointError: if it is not a checkpoint, or not the bytes that were written
    :raises OSError: if it cannot be read
    """
    content = path.read_bytes()
    _verify(content, path)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        document = json.loads(file.read(TREE))
        arrays = th.load(io.BytesIO(file.read(ARRAYS)), weights_only=True)
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {document['format']}, and this version of sb3_pgplus reads {FORMAT}: use the version "
            "that wrote it"
        )
    return Checkpoint(path, content, decode(document["state"], arrays.numpy().tobytes()))


def verify(path: Path) -> None:
    """
    Check that a file is, byte for byte, the checkpoint that was written.

    :param path: the file
    :raises CheckpointError: if it is not
    :raises OSError: if it cannot be read
    """
    _verify(path.read_bytes(), path)


def _verify(content: bytes, path: Path) -> None:
    content, digest = content[:-_N_DIGITS], content[-_N_DIGITS:]
    if not content.endswith(_LABEL):
        if TREE.encode() not in content and zipfile.is_zipfile(io.BytesIO(content + digest)):
            raise CheckpointError(f"{path} is no checkpoint (a model that was saved? Use load() for that)")
        raise CheckpointError(f"{path} is damaged: it is cut off or was never a checkpoint")
    if _digest(content) != digest:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


# --- a folder of them -------------------------------------------------------------------------------------------------


def path_of(folder: Path, steps: int) -> Path:
    """
    :param folder: of the checkpoints
    :param steps: environment steps that the training has taken
    """
    return folder / f"step-{steps:09d}.zip"


def steps_of(path: Path) -> int:
    """
    :param path: of a checkpoint
    :return: environment steps that its name tells
    """
    found = _NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def in_folder(folder: Path) -> list[Path]:
    """
    List the checkpoints of a folder, damaged ones as well.

    :param folder: it need not exist
    :return: newest first
    """
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=steps_of, reverse=True)


def find(path: Path) -> Checkpoint:
    """
    Read a checkpoint, or the newest intact one of a folder; every damaged one that is passed over is warned about.

    :param path: a checkpoint, a folder of checkpoints, or a run folder
    :raises CheckpointError: if there is none that is intact
    :raises OSError: if a file that was named cannot be read
    """
    if not path.is_dir():
        return read(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    candidates, reasons = in_folder(folder), []
    for candidate in candidates:
        try:
            found = read(candidate)
        except (CheckpointError, OSError) as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warn_user(f"{reason}. Going back to the checkpoint before it, {found.path}.")
        return found
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} is intact: {'; '.join(reasons)}")
    raise CheckpointError(f"there is no checkpoint in {folder}")


def write(folder: Path, steps: int, content: bytes, *, keep: int) -> Path:
    """
    Write a checkpoint, then remove the oldest ones.

    :param folder: it is made if it is not there
    :param steps: environment steps that the training has taken
    :param content: from :func:`pack`
    :param keep: how many stay, the best one not counted
    :raises OSError: if it cannot be written; the others are untouched then
    """
    path = path_of(folder, steps)
    write_atomically(path, content)
    prune(folder, keep)
    return path


def prune(folder: Path, keep: int) -> None:
    """
    Remove all but the newest checkpoints and the best.

    :param folder: of the checkpoints
    :param keep: how many stay, the best one not counted
    """
    best = best_of(folder)
    for path in [path for path in in_folder(folder) if path != best][keep:]:
        path.unlink(missing_ok=True)


def mark_best(path: Path, score: float) -> None:
    """
    Keep a checkpoint as the best of its folder.

    :param path: of a checkpoint
    :param score: of the evaluation
    """
    write_atomically(path.with_name(_BEST), json.dumps({"checkpoint": path.name, "score": score}).encode())


def best_of(folder: Path) -> Path | None:
    """
    :param folder: of checkpoints
    :return: the one marked as the best
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = folder / json.loads((folder / _BEST).read_bytes())["checkpoint"]
        return path if path.is_file() else None
    return None


def remove_leftovers(folder: Path) -> None:
    """
    Remove what a killed process left of checkpoints that it was writing.

    :param folder: of the checkpoints
    """
    for path in folder.glob(".step-*.tmp"):
        path.unlink(missing_ok=True)


# --- plain trees as JSON and bytes ------------------------------------------------------------------------------------


def encode(tree: Tree) -> tuple[Any, bytes]:
    """
    Write a plain tree as JSON and the bytes of its arrays.

    :param tree: dicts, lists, tuples, strings, numbers, bools, None, NumPy arrays and scalars
    :return: what ``json.dumps`` takes, and the bytes
    :raises TypeError: if there is anything else in it
    """
    pieces: list[bytes] = []
    return _encode(tree, pieces), b"".join(pieces)


def _encode(tree: Tree, pieces: list[bytes]) -> Any:
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return {key: _encode(value, pieces) for key, value in tree.items()}
        return {"$items": [[_encode(key, pieces), _encode(value, pieces)] for key, value in tree.items()]}
    if isinstance(tree, list):
        return [_encode(value, pieces) for value in tree]
    if type(tree) is tuple:
        return {"$tuple": [_encode(value, pieces) for value in tree]}
    if isinstance(tree, (np.ndarray, np.generic)) and np.dtype(tree.dtype.str) == tree.dtype:
        data = tree.tobytes()
        pieces.append(data)
        kind = "$array" if isinstance(tree, np.ndarray) else "$scalar"
        return {kind: [tree.dtype.str, list(tree.shape), len(data)]}
    raise TypeError(f"{type(tree).__name__} is not plain data")


def decode(tree: Any, arrays: bytes) -> Tree:
    """
    Undo :func:`encode`.

    :param tree: what was JSON
    :param arrays: the bytes
    """
    return _Decoder(arrays).decode(tree)


class _Decoder:
    """Takes the arrays in the order in which they were written."""

    def __init__(self, arrays: bytes) -> None:
        self._arrays = arrays
        self._position = 0

    def decode(self, tree: Any) -> Tree:
        if isinstance(tree, list):
            return self._all(tree)
        if not isinstance(tree, dict):
            return tree
        kind, content = next(iter(tree.items()), ("", None))
        if kind in self._KINDS:
            return self._KINDS[kind](self, content)
        return {key: self.decode(value) for key, value in tree.items()}

    def _all(self, trees: Iterable[Any]) -> list[Tree]:
        return [self.decode(tree) for tree in trees]

    def _array(self, description: tuple[str, list[int], int]) -> Any:
        dtype, shape, n_bytes = description
        start, self._position = self._position, self._position + n_bytes
        return np.frombuffer(self._arrays[start : self._position], dtype=dtype).reshape(shape).copy()

    #: How dicts with a key that begins with a dollar are marked.
    _KINDS: ClassVar[dict[str, Callable[[_Decoder, Any], Tree]]] = {
        "$items": lambda self, items: dict(self._all(items)),
        "$tuple": lambda self, values: tuple(self._all(values)),
        "$array": _array,
        "$scalar": lambda self, description: self._array(description)[()],
    }
