"""Boxes of DETR and its relatives in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from torchcam._detections import Detections
from torchcam._detector_rows import corners
from torchcam._inputs import read_inputs, split_processor
from torchcam._replica import normal_mode, replicated

from ._found import Found, match_rows

# What hands the backbone's maps, or patches, on to the transformer: behind it positions are mixed.
_ENTRANCES = (r"input_projection", r"(encoder_)?input_proj\.\d+", r"patch_embeddings\.projection")


def is_detector(model: nn.Module) -> bool:
    """Check whether a model is a detector of transformers that asks no text."""
    config = getattr(model, "config", None)
    is_one = any(base.__module__.startswith("transformers.") for base in type(model).__mro__)
    return is_one and type(model).__name__.endswith("ForObjectDetection") and not hasattr(config, "text_config")


def find(model: Any, _given: Any, picture: Image.Image, threshold: float | None, options: Mapping[str, Any]) -> Found:
    """Ask a detector about a picture."""
    given = options["processor"]
    processor = options["transform"] if given is None else split_processor(given)[0]
    if not callable(getattr(processor, "post_process_object_detection", None)):
        found = "is missing" if processor is None else f"is a {type(processor).__name__}, which makes no boxes"
        raise ValueError(  # noqa: TRY004 - most often it is missing
            f"`processor` {found}: {type(model).__name__} needs its own, "
            "`processor=AutoImageProcessor.from_pretrained(...)`"
        )
    inputs = read_inputs(model, picture, processor, options["weights"], image=picture)
    kwargs = inputs.kwargs or {}
    if set(kwargs) == {"pixel_values", "pixel_mask"} and bool(kwargs["pixel_mask"].all()):  # which leaves out nothing
        inputs = replace(inputs, kwargs=None)
    size = picture.size
    try:
        with replicated(model) as replica, normal_mode(graph=False):
            output = inputs.call(replica, slice(0, 1))
        (answer,) = processor.post_process_object_detection(
            output,
            target_sizes=[size[::-1]],
            **({} if threshold is None else {"threshold": threshold}),
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
    names = {int(label): str(name) for label, name in (getattr(model.config, "id2label", None) or {}).items()}
    # Queries that are chosen among positions have no place of their own.
    chooses_queries = any(key.startswith(("enc_topk", "enc_outputs")) for key, one in output.items() if one is not None)
    return Found(
        model,
        inputs,
        Detections(boxes, labels, scores, size, names),
        rows,
        corners(places)[rows] if chooses_queries else None,
        _entrances(model),
        least_stride=16,
    )


def _entrances(model: nn.Module) -> list[str]:
    """Return the layers through which the picture enters the transformer."""
    names = [name for name, _ in model.named_modules()]
    found = ([name for name in names if re.search(rf"(^|\.){one}$", name)] for one in _ENTRANCES)
    return next(filter(None, found), [])
