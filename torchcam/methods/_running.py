"""What runs on a thread."""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchcam._passes import Call
from torchcam._replica import AS_IT_IS


class _ThreadState(threading.local):
    """What extractors do on a thread while a model runs.

    Attributes:
        passes: the passes that run, by the identity of their recorders
        private: whether gradients are turned on for the passes alone, and not by the caller
        written: outputs of target layers that got a graph for the passes alone, with what was handed on in their place
        watches: who notes the attention that is computed
        quiet: the innermost context in which nobody is warned of what extractors meet
    """

    quiet: weakref.ref[quietly] | None = None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what runs."""
        self.passes: dict[int, Any] = {}
        self.private = False
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.watches: list[Any] = []


thread = _ThreadState()


class quietly:  # noqa: N801 - a context
    """Do not warn of what extractors meet on this thread, inside the block; other threads are warned."""

    def __enter__(self) -> None:
        self._before = thread.quiet
        thread.quiet = weakref.ref(self)  # an interrupt may come before the end of the block is noted

    def __exit__(self, *_: object) -> None:
        thread.quiet = self._before


def warn(message: str, category: type[Warning] = UserWarning, *, stacklevel: int) -> None:
    """Warn of what an extractor met, unless it is asked quietly."""
    if thread.quiet is None or thread.quiet() is None:
        warnings.warn(message, category, stacklevel=stacklevel + 1)


def full_precision(call: Call) -> AbstractContextManager[Any]:
    """Return the context that the maps of a call are computed in: without autocast, if it is on."""
    return torch.autocast(call.device_type, enabled=False) if torch._C._is_any_autocast_enabled() else AS_IT_IS
