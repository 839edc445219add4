"""Maps of one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchcam._passes import model_device
from torchcam._tensors import map_tensors
from torchcam.targets import class_scores

from ._replicas import on_replica

__all__ = ["batch_arguments", "stream"]


def stream(
    extractor: Any,
    batches: Iterable[Any],
    class_idx: Any | Callable[[Any], Any],
    targets: Any,
    **kwargs: Any,
) -> Iterator[list[Tensor]]:
    """Run the model of an extractor on batches and yield the maps of each."""
    if class_idx is not None and targets is not None:
        raise ValueError("give `class_idx` or `targets`, not both")
    device = model_device(extractor.model)
    for batch in batches:
        args, options = batch_arguments(batch, device)
        with on_replica(extractor) as watching:
            with torch.inference_mode():
                output = watching.model(*args, **options)
                asked = _asked(extractor, class_idx, targets, output)
            maps = watching(scores=output, **asked, **kwargs)
        del args, options, output, asked, watching, batch  # nothing of a batch stays while its maps are looked at
        yield maps
        del maps


def batch_arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the model is called with: of a tuple or list, as loaders of data sets give, the first entry."""
    args: tuple[Any, ...] = (batch,)
    options: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        args, options = (), {key: value for key, value in batch.items() if key not in {"label", "labels"}}
    elif isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("`batches` holds an empty batch: each is the model's input, or begins with it")
        args = (batch[0],)
    moved: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors(
        lambda t: t.to(device, non_blocking=True), (args, options)
    )
    return moved


def _asked(extractor: Any, class_idx: Any, targets: Any, output: Any) -> dict[str, Any]:
    if targets is not None:
        return {"targets": targets}
    if class_idx is None:
        return {} if getattr(extractor, "class_agnostic", False) else {"class_idx": class_scores(output).argmax(1)}
    return {"class_idx": class_idx(output) if callable(class_idx) else class_idx}
