"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary neighbour of ``path`` to write a file or directory to, moved to its place at the end.

    If the block raises, nothing of it stays. Missing parents are made.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if path.is_dir():  # an empty one: not every system lets a directory replace it
            path.rmdir()
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise
