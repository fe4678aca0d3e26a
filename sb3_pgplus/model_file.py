"""
The zip file of a model: SB3's members, read with every byte checked.

``data`` holds the attributes (see :mod:`sb3_pgplus.serialization`), each ``.pth`` a ``state_dict``; other members are
left alone. Torch does not check the sums of the zip files that it writes, and ``zipfile`` does not where its reader
jumps about, as torch does. So each member is read whole, which compares its CRC-32, before anything looks inside.
"""

import errno
import io
import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.save_util import open_path, save_to_zip_file

from sb3_pgplus.errors import ModelFileError, UntrustedModelError, warn_user
from sb3_pgplus.serialization import decode, encode, pickled_parts

#: What ``save`` and ``load`` take.
PathOrFile = str | pathlib.Path | io.BufferedIOBase

DATA = "data"
TENSORS = ".pth"
VARIABLES = "pytorch_variables.pth"
SYSTEM_INFO = "system_info.txt"
FORMAT = "_sb3_pgplus_format"
#: Of files written now; one with a higher number has entries that this version does not know.
FORMAT_NUMBER = 1
#: Members may unpack to this many times the file's size (weights hardly shrink), and a little in any case.
_LARGEST_RATIO, _ALWAYS_ALLOWED = 100, 2**20
#: A zip file's last record, of which the total number of members is read here.
_END_RECORD, _IN_ZIP64_RECORD = struct.Struct("<10xH10x"), 0xFFFF
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class ModelFile:
    """A file's verified content; attributes are still JSON and tensors still bytes."""

    name: str
    """For messages."""
    data: dict[str, Any]
    members: dict[str, bytes]
    """State dicts and the system's description, as they are in the file."""
    variables: dict[str, Any]
    """Attributes that are tensors themselves; on the CPU."""
    is_ours: bool
    """Whether this package wrote it."""

    def attributes(self, *, trusted: bool, custom_objects: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """
        The model's attributes.

        :param trusted: whether pickles may be loaded
        :param custom_objects: values to take instead of the file's
        :raises UntrustedModelError: if a pickle would be needed that may not be loaded
        :raises ModelFileError: if an entry cannot be understood
        """
        replaced = {name: value for name, value in (custom_objects or {}).items() if name in self.data}
        entries = {name: entry for name, entry in self.data.items() if name not in replaced}
        pickled = {name: parts for name, entry in entries.items() if (parts := [*pickled_parts(entry, name)])}
        if pickled and not trusted:
            raise UntrustedModelError(self._needs_trust(pickled))
        return {**self._decoded(entries, trusted), **replaced}

    def _needs_trust(self, pickled: Mapping[str, list[str]]) -> str:
        parts = ", ".join(part for found in pickled.values() for part in found)
        once = ", or convert it once where you do (`sb3-pgplus convert`)"
        return (
            f"{self.name} holds pickles, which can run any code: {parts}. If you trust the file, load it with "
            f"trusted=True{'' if self.is_ours else once}. Otherwise give these attributes yourself: "
            f"custom_objects={{{', '.join(f'{attribute!r}: …' for attribute in pickled)}}}"
        )

    def _decoded(self, entries: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
        found = {}
        for name, entry in entries.items():
            pickled = any(pickled_parts(entry, name))
            try:
                found[name] = decode(entry, trusted=trusted)
            except Exception as error:
                # A pickle can raise anything. SB3 leaves such an attribute out in these three cases.
                if not pickled or not isinstance(error, (RuntimeError, TypeError, AttributeError)):
                    raise ModelFileError(_unreadable(self.name, name, error)) from error
                warn_user(_unreadable(self.name, name, error))
        return found

    def for_sb3(self, attributes: Iterable[str] = ()) -> io.BytesIO:
        """
        A zip file for SB3 to read: the same members, and no values of attributes.

        :param attributes: names that SB3 shall find, and take from ``custom_objects``
        """
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(DATA, json.dumps(dict.fromkeys(attributes)))
            for name, content in self.members.items():
                file.writestr(name, content)
        archive.seek(0)
        return archive


def _unreadable(name: str, attribute: str, error: Exception) -> str:
    return (
        f"cannot read `{attribute}` in {name}: {type(error).__name__}: {error}. Give it yourself: "
        f"custom_objects={{{attribute!r}: …}}"
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read(source: PathOrFile) -> ModelFile:
    """
    Read a model's file and verify what will be used of it.

    :param source: file name, with or without ``.zip``, or an open file
    :raises OSError: if there is no such file (``FileNotFoundError``), or it cannot be read
    :raises ModelFileError: if it is damaged, or no model's
    """
    name = getattr(source, "name", type(source).__name__) if isinstance(source, io.IOBase) else str(source)
    try:
        file = open_path(source, "r", suffix="zip")
    except FileNotFoundError as error:  # SB3's message has the suffix twice
        raise FileNotFoundError(errno.ENOENT, "there is no model file", name) from error
    try:
        with _as_model_file_error(str(name)), zipfile.ZipFile(file) as archive:
            contents = _read_members(archive)
            tensors = {member: _tensors(contents[member]) for member in contents if member.endswith(TENSORS)}
            contents.pop(VARIABLES, None)
            contents.get(SYSTEM_INFO, b"").decode()
            data = json.loads(contents.pop(DATA, b"{}"))
            if not isinstance(data, dict):
                raise ValueError(f"its member {DATA!r} is no JSON object")
            number = int(contents.pop(FORMAT, b"0"))
            if number > FORMAT_NUMBER:
                raise ValueError("a newer version of sb3_pgplus wrote it")
            return ModelFile(str(name), data, contents, tensors.get(VARIABLES) or {}, is_ours=number > 0)
    finally:
        if not isinstance(source, io.IOBase):
            file.close()


@contextmanager
def _as_model_file_error(name: str) -> Iterator[None]:
    try:
        yield
    except ModelFileError:
        raise
    except Exception as error:  # zipfile, zlib, json and torch each have their own for a damaged file
        reason = str(error) or type(error).__name__
        raise ModelFileError(f"{name} is damaged, or wasn't a zip-file of a model: {reason}") from error


def _read_members(archive: zipfile.ZipFile) -> dict[str, bytes]:
    used = [info for info in archive.infolist() if _is_used(info.filename)]
    for info in archive.infolist():  # a damaged name must not make a member one that is left alone
        archive.open(info).close()
    for info in used:
        if archive.NameToInfo[info.filename] is not info:
            raise ValueError(f"its member {info.filename!r} is there twice")
        if info.compress_type not in _COMPRESSIONS:
            raise ValueError(f"its member {info.filename!r} is compressed in a way that no model's file is")
    end = _checked_end(archive)
    _check_unpacked_size(used, end)
    contents = {info.filename: archive.read(info) for info in used}
    for name, content in contents.items():
        if name.endswith(TENSORS) and zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as inner:
                _check_unpacked_size(inner.infolist(), end)
    return contents


def _checked_end(archive: zipfile.ZipFile) -> int:
    """The file's size. Its last record says how many members there are: damage to their list could hide some."""
    assert archive.fp is not None  # it is open
    end = archive.fp.seek(0, os.SEEK_END)
    archive.fp.seek(end - _END_RECORD.size - len(archive.comment))
    n_members = _END_RECORD.unpack(archive.fp.read(_END_RECORD.size))[0]
    if n_members != len(archive.infolist()) and n_members != _IN_ZIP64_RECORD:
        raise ValueError(f"{n_members} members are in it, and {len(archive.infolist())} in its list")
    return end


def _is_used(name: str) -> bool:
    return name in (DATA, SYSTEM_INFO, FORMAT) or (name.endswith(TENSORS) and "/" not in name)


def _check_unpacked_size(members: list[zipfile.ZipInfo], file_size: int) -> None:
    unpacked = sum(info.file_size for info in members)
    if unpacked > _LARGEST_RATIO * file_size + _ALWAYS_ALLOWED:
        raise ValueError(f"{file_size:,} bytes would unpack to {unpacked:,}, more than any model's do")


def _tensors(content: bytes) -> dict[str, Any]:
    """What SB3 will have torch read again; nothing but tensors and plain values is allowed."""
    found = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"a member has a {type(found).__name__} where a state_dict belongs")
    return found


def pickled_attributes(source: PathOrFile) -> list[str]:
    """
    What of a saved model is pickled, so that loading it asks for trust. Nothing is unpickled to find out.

    :param source: file name, with or without ``.zip``, or an open file
    :return: such as ``["learning_rate (__main__.<lambda>)"]``; empty for a model without code in its settings
    :raises OSError: if there is no such file
    :raises ModelFileError: if it is damaged, or no model's
    """
    return [part for name, entry in read(source).data.items() for part in pickled_parts(entry, name)]


# --- writing ----------------------------------------------------------------------------------------------------------


def encode_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    A model's attributes as JSON.

    :param attributes: name → value
    :raises TypeError: naming the attribute that cannot be saved
    """
    entries = {}
    for name, value in attributes.items():
        try:
            entries[name] = encode(value)
        except Exception as error:  # whatever the object's own code raises when it is pickled
            raise TypeError(
                f"cannot save `{name}` ({type(value).__name__}): {error}. save(…, exclude=[{name!r}]) leaves it out"
            ) from error
    return entries


def as_bytes(entries: Mapping[str, Any], state_dicts: Mapping[str, Any], variables: Mapping[str, Any]) -> bytes:
    """
    A whole file.

    :param entries: from :func:`encode_attributes`
    :param state_dicts: name → ``state_dict``
    :param variables: name → tensor, for attributes that are tensors themselves
    """
    archive = io.BytesIO()
    save_to_zip_file(archive, data=dict(entries), params=dict(state_dicts), pytorch_variables=dict(variables))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(FORMAT, str(FORMAT_NUMBER))
    return archive.getvalue()
