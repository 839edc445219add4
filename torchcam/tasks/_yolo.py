"""Boxes of ultralytics' models; the library itself is not imported, what is given is looked at."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._detector_rows import Rows, read_rows
from torchcam._inputs import Inputs
from torchcam._passes import model_device
from torchcam._replica import replicated
from torchcam._views import View, Views
from torchcam.targets import sample_of

from ._found import Found, Looked, match_rows

__all__ = ["find", "is_detector"]

# What decides which boxes there are, and how the picture is prepared.
_ASKED = ("conf", "iou", "imgsz", "classes", "agnostic_nms", "max_det", "rect", "device", "half", "quantize", "nms")

# Images that the library decodes itself: its pixels may differ by rounding. Others, such as GIF, are films to it.
_FILES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})


def is_detector(model: nn.Module) -> bool:
    """Check whether a model is a wrapper of ultralytics, as `YOLO(...)` returns."""
    return any(base.__module__ == "ultralytics.engine.model" for base in type(model).__mro__)


def find(wrapper: Any, looked: Looked) -> Found:
    """Ask a wrapper about a picture: it predicts as it does for its user, and the model inside is what is explained."""
    if looked.processor is not None:
        raise ValueError(f"`processor` is for transformers: {type(wrapper).__name__} prepares images by itself")
    if looked.picture is None:
        raise TypeError("`input_tensor` must be an image for `box`, a path, a PIL image or an array, got a tensor")
    model = wrapper.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` runs {model!r}, which is not PyTorch: load the .pt file that it was exported from")
    result, prepared, stretched = _predicted(wrapper, looked)
    size = (result.orig_shape[1], result.orig_shape[0])
    if result.boxes is None:
        raise ValueError(
            f"`model` finds no upright boxes, its task is {wrapper.task!r}: pass the model inside, "
            f"`{type(wrapper).__name__}(...).model`, with an input tensor"
        )
    answers = result.boxes.data.detach().float().cpu()
    boxes, scores, labels = answers[:, :4], answers[:, 4], answers[:, 5].long()
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    tensor = prepared.detach().clone().to(model_device(model), dtype)
    with replicated(model) as replica, torch.inference_mode(False), torch.no_grad():
        read = read_rows(sample_of(replica(tensor), 0, 1))
    frame = _Letterbox.of(size, (tensor.shape[3], tensor.shape[2]), stretched)
    rows, places = _rows_of(read, frame, boxes, labels, scores)
    picture = Image.fromarray(np.ascontiguousarray(result.orig_img[..., ::-1]))
    views = Views((tensor.shape[3], tensor.shape[2]), size, None, {size: frame.view})
    return Found(
        model,
        Inputs(tensor, None, False, (picture,), (frame.view,), (views,), None, None),
        boxes,
        labels,
        scores,
        rows,
        places,
        size,
        MappingProxyType({int(label): str(name) for label, name in dict(result.names).items()}),
        _stages(model),
        least_stride=8,
    )


def _predicted(wrapper: Any, looked: Looked) -> tuple[Any, Tensor, bool]:
    """Predict as the wrapper's user does, without the user's predictor and callbacks.

    Returns:
        the result, the picture as it was prepared for the model, and whether it was stretched to the model's size
    """
    twin = copy.copy(wrapper)
    twin.predictor = None
    twin.callbacks = defaultdict(list)
    last = getattr(wrapper.predictor, "args", None)
    asked = {name: getattr(last, name) for name in _ASKED if hasattr(last, name)}
    if looked.threshold is not None:
        asked["conf"] = looked.threshold
    is_file = isinstance(looked.given, (str, Path)) and Path(looked.given).suffix.lower() in _FILES
    source = str(looked.given) if is_file else looked.picture
    with _threads_kept():
        (result,) = twin.predict(source, verbose=False, save=False, show=False, stream=False, **asked)
        prepared = twin.predictor.preprocess([result.orig_img])
    return result, prepared, bool(getattr(twin.predictor, "scale_fill", False))


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Restore the number of threads, which the library sets for a CPU."""
    count = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


@dataclass(frozen=True)
class _Letterbox:
    """Where a picture lies on the model's input, which holds all of it.

    Attributes:
        size: the width and height of the picture
        seen: those of the input
        inner: those of the picture on the input
        offset: the padding at the left and the top
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    inner: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], seen: tuple[int, int], stretched: bool) -> _Letterbox:
        """Return how a picture became an input: scaled alike in both directions, or stretched."""
        if stretched:
            return cls(size, seen, seen, (0, 0))
        gain = min(seen[0] / size[0], seen[1] / size[1])
        inner = max(round(size[0] * gain), 1), max(round(size[1] * gain), 1)
        left, top = (round((whole - part) / 2 - 0.1) for whole, part in zip(seen, inner, strict=True))
        return cls(size, seen, inner, (left, top))

    @property
    def view(self) -> View:
        """Where the input lies on the picture."""
        (left, top), (width, height) = self.offset, self.inner
        return -top / height, -left / width, (self.seen[1] - top) / height, (self.seen[0] - left) / width

    def to_input(self, boxes: Tensor) -> Tensor:
        """Return boxes (R, 4) in pixels of the picture as pixels of the input."""
        scale = [part / whole for part, whole in zip(self.inner, self.size, strict=True)]
        return boxes * torch.tensor([*scale, *scale]) + torch.tensor([*self.offset, *self.offset])

    def cut(self, boxes: Tensor) -> Tensor:
        """Return boxes (R, 4) in pixels of the input, cut where the picture ends, as predicted ones are."""
        low = torch.tensor([*self.offset, *self.offset])
        return torch.minimum(torch.maximum(boxes, low), low + torch.tensor([*self.inner, *self.inner]))


def _rows_of(
    read: Rows, frame: _Letterbox, boxes: Tensor, labels: Tensor, scores: Tensor
) -> tuple[list[int], Tensor | None]:
    """Return the row of each predicted box, and, where rows have no place of their own, its box in their units."""
    missing = "the prediction cannot be followed into the model"
    wanted = frame.to_input(boxes), labels, scores, missing
    if read.labels is not None and read.boxes is not None:  # RT-DETR: shares of the picture, a row for each class
        places = read.boxes.float().cpu()
        shares = torch.zeros(len(places), int(read.labels.amax()) + 1)
        shares[torch.arange(len(places)), read.labels.cpu()] = read.scores[:, 0].float().cpu().sigmoid()
        rows = match_rows(places * torch.tensor([*frame.seen, *frame.seen]), shares, *wanted)
        return rows, places[rows]
    shares = read.scores.float().cpu().sigmoid()
    if read.boxes is not None:
        return match_rows(frame.cut(read.boxes.float().cpu()), shares, *wanted), None
    assert read.ranked is not None  # noqa: S101 - for the type checker: one of both is there
    ranked = read.ranked.float().cpu()
    best = torch.zeros(len(ranked), shares.shape[1])
    best[torch.arange(len(ranked)), ranked[:, 5].long()] = ranked[:, 4]
    among = match_rows(frame.cut(ranked[:, :4]), best, *wanted)
    found: list[int] = []
    for place, label in zip(among, labels.tolist(), strict=True):
        miss = (shares[:, label] - ranked[place, 4]).abs()
        miss[[row for row, other in zip(found, labels.tolist(), strict=False) if other == label]] = torch.inf
        found.append(int(miss.argmin()))
    return found, None


def _stages(model: Any) -> list[str]:
    """Return the layers of the backbone that the rest of the model reads, of which the finest is explained.

    On a YOLOv8n trained on small squares, the peak of HiResCAM was in the box for 21 of 21 boxes at stride 8, for 6 at
    stride 16 and for 4 at stride 32.

    Those of the neck, which the head reads, only say where a box is: a row depends on a few of their positions.
    """
    layers = list(model.model)
    count = len(model.yaml["backbone"]) if isinstance(getattr(model, "yaml", None), dict) else len(layers) - 1
    read = {count - 1}
    for number, layer in enumerate(layers[count:], count):
        sources = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
        read |= {source if source >= 0 else number + source for source in sources}
    return [f"model.{number}" for number in sorted(read) if number < count]
