"""Boxes of DETR and its relatives in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from torchcam._detector_rows import corners
from torchcam._inputs import Inputs, read_inputs, split_processor
from torchcam._replica import replicated

from ._found import Found, Looked, match_rows

__all__ = ["find", "is_detector"]

# What hands the backbone's maps, or patches, on to the transformer: behind it positions are mixed.
_ENTRANCES = (r"input_projection", r"(encoder_)?input_proj\.\d+", r"patch_embeddings\.projection")


def is_detector(model: nn.Module) -> bool:
    """Check whether a model is a detector of transformers that asks no text."""
    config = getattr(model, "config", None)
    is_one = any(base.__module__.startswith("transformers.") for base in type(model).__mro__)
    return is_one and type(model).__name__.endswith("ForObjectDetection") and not hasattr(config, "text_config")


def find(model: Any, looked: Looked) -> Found:
    """Ask a detector about a picture."""
    processor: Any = (
        looked.options.get("transform") if looked.processor is None else split_processor(looked.processor)[0]
    )
    if not callable(getattr(processor, "post_process_object_detection", None)):
        given = "is missing" if processor is None else f"is a {type(processor).__name__}, which makes no boxes"
        raise ValueError(  # noqa: TRY004 - most often it is missing
            f"`processor` {given}: {type(model).__name__} needs its own, "
            "`processor=AutoImageProcessor.from_pretrained(...)`"
        )
    if looked.picture is None:
        raise TypeError("`input_tensor` must be an image for `box`, a path, a PIL image or an array, got a tensor")
    inputs = _without_full_mask(
        read_inputs(model, looked.picture, **{**looked.options, "transform": processor}, image=looked.picture)
    )
    size = looked.picture.size
    try:
        with replicated(model) as replica, torch.inference_mode(False), torch.no_grad():
            output = inputs.call(replica, slice(0, 1))
        (answer,) = processor.post_process_object_detection(
            output,
            target_sizes=[size[::-1]],
            **({} if looked.threshold is None else {"threshold": looked.threshold}),
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`processor` {type(processor).__name__} does not fit {type(model).__name__}: pass the model's own "
            f"({type(error).__name__}: {error})"
        ) from error
    boxes, labels, scores = (answer[name].detach().cpu() for name in ("boxes", "labels", "scores"))
    logits, places = output.logits[0].float().cpu(), output.pred_boxes[0].float().cpu()
    has_no_object = logits.shape[-1] == model.config.num_labels + 1  # a class of its own: they exclude each other
    rows = match_rows(
        corners(places) * torch.tensor([*size, *size]),
        logits.softmax(-1) if has_no_object else logits.sigmoid(),
        boxes.float(),
        labels,
        scores.float(),
        f"`processor` {type(processor).__name__} may be that of another model than {type(model).__name__}",
    )
    names = getattr(model.config, "id2label", None) or {}
    return Found(
        model,
        inputs,
        boxes,
        labels,
        scores,
        rows,
        corners(places)[rows] if _chooses_queries(output) else None,
        size,
        MappingProxyType({int(label): str(name) for label, name in names.items()}),
        _entrances(model),
        least_stride=16,
    )


def _without_full_mask(inputs: Inputs) -> Inputs:
    """Leave out a mask of pixels that leaves out none: the model takes its input tensor alone then."""
    kwargs = inputs.kwargs
    if kwargs is None or set(kwargs) != {"pixel_values", "pixel_mask"} or not bool(kwargs["pixel_mask"].all()):
        return inputs
    return replace(inputs, kwargs=None)


def _chooses_queries(output: Any) -> bool:
    """Check whether a model chooses its queries among positions: then they have no place of their own."""
    keys = output.keys() if isinstance(output, Mapping) else ()
    return any(key.startswith(("enc_topk", "enc_outputs")) and output[key] is not None for key in keys)


def _entrances(model: nn.Module) -> list[str]:
    """Return the layers through which the picture enters the transformer."""
    names = [name for name, _ in model.named_modules()]
    for entrance in _ENTRANCES:
        found = [name for name in names if re.search(rf"(^|\.){entrance}$", name)]
        if found:
            return found
    return []
