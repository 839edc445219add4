"""What runs on a thread."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from torchcam._passes import Call


class _ThreadState(threading.local):
    """What extractors do on a thread while a model runs.

    Attributes:
        passes: the passes that run, by the identity of their recorders
        private: whether gradients are turned on for the passes alone, and not by the caller
        written: outputs of target layers that got a graph for the passes alone, with what was handed on in their place
        watches: who notes the attention that is computed
        quiet: whether nobody is warned of what extractors meet
    """

    def __init__(self) -> None:
        self.passes: dict[int, Any] = {}
        self.private = False
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
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


class _PlainTensors:
    """A context without a graph, and without the restrictions that tensors made in inference mode keep.

    Less work than the contexts of torch.
    """

    _graph = False

    def __enter__(self) -> None:
        self._left = torch._C._InferenceMode(False) if torch.is_inference_mode_enabled() else None
        if self._left is not None:
            self._left.__enter__()  # type: ignore[no-untyped-call]  # torch's
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._graph)

    def __exit__(self, *raised: object) -> None:
        torch._C._set_grad_enabled(self._before)
        if self._left is not None:
            self._left.__exit__(*raised)


class _WithGraph(_PlainTensors):
    """A context with graphs, outside of inference mode."""

    _graph = True


plain_tensors, with_graph = _PlainTensors, _WithGraph


def computing(call: Call, graph: bool) -> AbstractContextManager[None]:
    """Return the context that the maps of a call are computed in: with or without a graph, in full precision."""
    mode = with_graph() if graph else plain_tensors()
    return _full_precision(call.device_type, mode) if torch._C._is_any_autocast_enabled() else mode


@contextmanager
def _full_precision(device_type: str, mode: AbstractContextManager[None]) -> Iterator[None]:
    with mode, torch.autocast(device_type, enabled=False):
        yield
