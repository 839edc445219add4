"""Pipelines of transformers: the model and the processors inside."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn


def opened(model: Any, given: Any, transform: Any, processor: Any) -> tuple[Any, Any, Any, Any]:
    """Return the model of a pipeline, its input, and what makes tensors of images and of texts; others as they are.

    A pipeline of sounds turns an array (length,) into the model's arguments.
    """
    inside = getattr(model, "model", None)
    if (
        isinstance(model, nn.Module)
        or not isinstance(inside, nn.Module)
        or not callable(getattr(model, "preprocess", None))
    ):
        return model, given, transform, processor
    images, tokenizer, sounds = (
        getattr(model, part, None) for part in ("image_processor", "tokenizer", "feature_extractor")
    )
    if processor is None:
        transform, processor = transform or images, images if tokenizer is None else tokenizer
    if images is None and sounds is not None and isinstance(given, np.ndarray) and given.ndim == 1:
        given = dict(sounds(given, sampling_rate=sounds.sampling_rate, return_tensors="pt"))
    return inside, given, transform, processor
