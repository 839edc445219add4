"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write", "written_whole"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write a file or directory to, and move it to ``path`` at the end.

    If the block raises, nothing remains. Missing parents are made.
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


written_whole = atomic_write  # the name in the public API
