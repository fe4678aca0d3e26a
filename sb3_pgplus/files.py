"""Files that are either there whole or not there."""

import contextlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """
    Write a file beside its place, flush it to the disk, then rename it: a crash leaves the old file or the new one.

    :param path: where the file goes; missing parent folders are created
    :param data: its content
    :raises OSError: if it cannot be written; the old file is untouched then
    """
    target = pathlib.Path(os.path.realpath(path))  # through a link, the file it names
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes: the temporary one is not to be what makes it too long.
    with _named(path):
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:50]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_of(target))
        with _named(path):
            os.replace(temporary, target)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let the system's errors name what the user wants to write, not the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _mode_of(target: pathlib.Path) -> int:
    """The permissions that an ordinary ``open()`` would leave: those of the old file, or a new one's."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _flush_folder(folder: pathlib.Path) -> None:
    """Put the new name on the disk, too; without that a power cut may bring the old file back."""
    with contextlib.suppress(OSError):  # not every system can, and the file is in place already
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
