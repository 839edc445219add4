"""Extractors on replicas of their models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchcam._passes import untouched
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import map_tensors

from ._request import Request


@contextmanager
def on_replica(extractor: Any) -> Iterator[Any]:
    """Return an extractor like ``extractor`` that watches a replica of its model, to run passes that change nothing.

    A foreign extractor, without ``moved_to``, is returned itself, with its model in evaluation mode; the model is
    restored on exit.
    """
    if not callable(getattr(extractor, "moved_to", None)):
        with untouched(extractor.model):
            yield extractor
        return
    with replicated(extractor.model) as replica, extractor.moved_to(replica) as moved:
        yield moved


def gradients_of_copies(extractor: Any, request: Request) -> list[Tensor]:
    """Repeat the recorded pass on copies of its inputs, with a graph from these on, and differentiate that.

    Raises:
        RuntimeError: if the score is not the recorded one
    """
    call, recorded = extractor._recorded_call(request), request.recorded
    request.check_recorded()
    with on_replica(extractor) as repeated, call.as_recorded(), normal_mode():
        args, kwargs = map_tensors(_copied_with_graph, (call.args, call.kwargs))
        repeated.model(*args, **kwargs)
        again = replace(request, recorded=repeated._recorder.find(), scores=None)
        grids: list[Tensor] = [] if again.recorded.is_partial else repeated._gradients(again)
    request.check_repeated(again.recorded.score, extractor._selector(request))
    for name in ("rows", "gradients", "num_scores", "score", "unbalanced"):
        setattr(recorded, name, getattr(again.recorded, name))
    return grids


def _copied_with_graph(tensor: Tensor) -> Tensor:
    """Return a copy that can be changed in place, with a graph if it is of floating-point numbers."""
    copied = tensor.detach().clone()
    return copied.requires_grad_().clone() if tensor.is_floating_point() else copied
