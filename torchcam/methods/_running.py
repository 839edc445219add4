"""What runs on a thread."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["thread"]


class _ThreadState(threading.local):
    """What extractors do on a thread while a model runs.

    Attributes:
        passes: the passes that run, by the identity of their recorders
        private: whether gradients are turned on for the passes alone, and not by the caller
        watches: who notes the attention that is computed
    """

    def __init__(self) -> None:
        self.passes: dict[int, Any] = {}
        self.private = False
        self.watches: list[Any] = []


thread = _ThreadState()
