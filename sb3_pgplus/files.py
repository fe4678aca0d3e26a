"""Files that are either there whole or not there."""

import os
import pathlib
import tempfile


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """
    Write a file beside its place, flush it to the disk, then rename it: a crash leaves the old file or the new one.

    :param path: where the file goes; missing parent folders are created
    :param data: its content
    :raises OSError: if it cannot be written; the old file is untouched then
    """
    target = pathlib.Path(os.path.realpath(path))  # through a link, the file it names
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give it the mode that an ordinary open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
