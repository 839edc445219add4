"""What runs on a thread."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quietly", "thread", "warn"]


class _ThreadState(threading.local):
    """What extractors do on a thread while a model runs.

    Attributes:
        passes: the passes that run, by the identity of their recorders
        private: whether gradients are turned on for the passes alone, and not by the caller
        watches: who notes the attention that is computed
        quiet: whether nobody is warned of what extractors meet
    """

    def __init__(self) -> None:
        self.passes: dict[int, Any] = {}
        self.private = False
        self.watches: list[Any] = []
        self.quiet = False


thread = _ThreadState()


@contextmanager
def quietly() -> Iterator[None]:
    """Do not warn of what extractors meet on this thread, inside the block; other threads are warned."""
    before, thread.quiet = thread.quiet, True
    try:
        yield
    finally:
        thread.quiet = before


def warn(message: str, category: type[Warning] = UserWarning, *, stacklevel: int) -> None:
    """Warn of what an extractor met, unless it is asked quietly."""
    if not thread.quiet:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
