"""Extractors on replicas of their models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchcam._passes import untouched
from torchcam._replica import replicated


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
