"""Boxes of torchvision's detectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._detections import Detections
from torchcam._inputs import read_inputs
from torchcam._replica import normal_mode, replicated
from torchcam._views import View, Views

from ._found import Found


def is_detector(model: nn.Module) -> bool:
    """Check whether a model is a detector of torchvision."""
    return any(base.__module__.startswith("torchvision.models.detection.") for base in type(model).__mro__)


def find(
    model: nn.Module, given: Any, picture: Image.Image | None, threshold: float | None, options: Mapping[str, Any]
) -> Found:
    """Ask a detector about a picture, or a tensor (1, C, H, W) in place of one."""
    transform = None if picture is None else options["transform"] or _unit_tensor
    inputs = read_inputs(model, given if picture is None else picture, transform, options["weights"])
    with replicated(model) as replica, normal_mode(graph=False):
        (answer,) = replica(inputs.tensor)
        view = _padded(replica, inputs.tensor)
    height, width = inputs.tensor.shape[2:]
    shown = inputs.pictures[0] if picture is None else picture
    size = (width, height) if picture is None else picture.size
    kept = torch.arange(len(answer["scores"]))
    if threshold is not None:
        kept = kept[(answer["scores"] >= threshold).cpu()]
    boxes, labels, scores = (answer[name].cpu()[kept] for name in ("boxes", "labels", "scores"))
    known = Views((width, height), size, None, {size: view, (width, height): view})
    names = dict(enumerate(inputs.class_names or ()))
    return Found(
        model,
        replace(inputs, pictures=(shown,), shown=(view,), views=(known,)),
        Detections(boxes * torch.tensor([size[0] / width, size[1] / height] * 2), labels, scores, size, names),
        kept.tolist(),
        boxes,
        _layers(model),
    )


def _unit_tensor(picture: Image.Image) -> Tensor:
    """Return a picture as these models take it, (C, H, W) in [0, 1]: they resize and normalise it themselves."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _padded(replica: nn.Module, tensor: Tensor) -> View:
    """Return where what the layers see lies on the input: it is resized, and padded at the right and the bottom."""
    images, _ = replica.transform(list(tensor))  # type: ignore[operator]
    (height, width), (full_height, full_width) = images.image_sizes[0], images.tensors.shape[2:]
    return 0.0, 0.0, full_height / height, full_width / width


def _layers(model: Any) -> list[str]:
    """Return the stages of the backbone that boxes are found with, the finest first: a box depends on its own level."""
    backbone = model.backbone
    body = getattr(backbone, "body", None)
    stages = [f"backbone.body.{name}" for name in getattr(body, "return_layers", ())]
    if stages:  # a pyramid: what its last level gives reaches all others
        return [*stages[-3:], *stages[:-3]]
    features, extra = getattr(backbone, "features", None), getattr(backbone, "extra", None)
    if isinstance(features, nn.Sequential) and isinstance(extra, nn.ModuleList):  # SSD, whose levels follow each other
        is_whole = hasattr(backbone, "scale_weight")
        first = ["backbone.extra.0", "backbone.features"] if is_whole else ["backbone.features.0"]
        return [*first, "backbone"]
    return ["backbone"]
