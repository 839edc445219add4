"""Files that are written completely or not at all, also where the disk is full."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write a file or directory to, and move it to ``path`` at the end.

    If the block raises, nothing remains. Missing parents are made.

    Raises:
        OSError: if the disk is full, with the name of the file
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if path.is_dir():  # an empty one: not every system lets a directory replace it
            path.rmdir()
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _no_space(error, path) from error
        raise


def free_directory(directory: str | Path) -> Path:
    """Check that a directory can be written."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"`directory` '{directory}' exists and is not an empty directory: name another one, or remove it first"
        )
    return directory


def append_lines(path: Path, text: str) -> None:
    """Add lines to a text file, all or none of them. A last line that was torn off is dropped.

    Raises:
        OSError: if the disk is full, with the name of the file, which keeps its whole lines
    """
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            file.seek(0)
            size = file.readall().rfind(b"\n") + 1
        file.truncate(size)
        file.seek(size)
        try:
            write_all(file, text.encode())
        except OSError as error:
            file.truncate(size)
            if error.errno in _FULL:
                raise _no_space(error, path) from error
            raise


def write_all(file: FileIO, content: bytes) -> None:
    """Write to a file without a buffer, which may take less than what it is given."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _no_space(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{error.strerror}, free some or write elsewhere", str(path))


written_whole = atomic_write  # the name in the public API
