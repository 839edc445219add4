"""Boxes of ultralytics' models; the library itself is not imported, what is given is looked at."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from torchcam._detections import Detections
from torchcam._detector_rows import Rows, read_rows
from torchcam._inputs import Inputs
from torchcam._passes import to_model
from torchcam._replica import normal_mode, replicated
from torchcam._views import FULL, View, Views
from torchcam.targets import sample_of

from ._found import Found, match_rows

# What decides which boxes there are, and how the picture is prepared.
_ASKED = ("conf", "iou", "imgsz", "classes", "agnostic_nms", "max_det", "rect", "device", "half", "quantize", "nms")

# Images that the library decodes itself: its pixels may differ by rounding. Others, such as GIF, are films to it.
_FILES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})


def is_detector(model: nn.Module) -> bool:
    """Check whether a model is a wrapper of ultralytics, as `YOLO(...)` returns."""
    return any(base.__module__ == "ultralytics.engine.model" for base in type(model).__mro__)


def find(wrapper: Any, given: Any, picture: Image.Image, threshold: float | None, _options: Any) -> Found:
    """Ask a wrapper about a picture: it predicts as it does for its user, and the model inside is what is explained."""
    model = wrapper.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` runs {model!r}, which is not PyTorch: load the .pt file that it was exported from")
    is_file = isinstance(given, (str, Path)) and Path(given).suffix.lower() in _FILES
    result, prepared, stretched = _predicted(wrapper, str(given) if is_file else picture, threshold)
    size = (result.orig_shape[1], result.orig_shape[0])
    if result.boxes is None:
        raise ValueError(
            f"`model` finds no upright boxes, its task is {wrapper.task!r}: pass the model inside, "
            f"`{type(wrapper).__name__}(...).model`, with an input tensor"
        )
    answers = result.boxes.data.detach().float().cpu()
    boxes, scores, labels = answers[:, :4], answers[:, 4], answers[:, 5].long()
    tensor = to_model(model, prepared.detach().clone())
    with replicated(model) as replica, normal_mode(graph=False):
        read = read_rows(sample_of(replica(tensor), 0, 1))
    seen = (tensor.shape[3], tensor.shape[2])
    view = FULL if stretched else _letterbox(size, seen)
    names = {int(label): str(name) for label, name in dict(result.names).items()}
    detections = Detections(boxes, labels, scores, size, names)
    rows, places = _rows_of(read, detections, view, seen)
    picture = Image.fromarray(np.ascontiguousarray(result.orig_img[..., ::-1]))
    views = Views(seen, size, None, {size: view})
    return Found(
        model,
        Inputs(tensor, None, False, (picture,), (view,), (views,), None, None),
        detections,
        rows,
        places,
        _stages(model),
        least_stride=8,
    )


def _predicted(wrapper: Any, source: Any, threshold: float | None) -> tuple[Any, Tensor, bool]:
    """Predict as the wrapper's user does, without the user's predictor and callbacks.

    Returns:
        the result, the picture as it was prepared for the model, and whether it was stretched to the model's size
    """
    twin = copy.copy(wrapper)
    twin.predictor = None
    twin.callbacks = defaultdict(list)
    last = getattr(wrapper.predictor, "args", None)
    asked = {name: getattr(last, name) for name in _ASKED if hasattr(last, name)}
    if threshold is not None:
        asked["conf"] = threshold
    threads = torch.get_num_threads()
    try:
        (result,) = twin.predict(source, verbose=False, save=False, show=False, stream=False, **asked)
        prepared = twin.predictor.preprocess([result.orig_img])
    finally:
        if torch.get_num_threads() != threads:  # the library sets their number for a CPU
            torch.set_num_threads(threads)
    return result, prepared, bool(getattr(twin.predictor, "scale_fill", False))


def _letterbox(size: tuple[int, int], seen: tuple[int, int]) -> View:
    """Return where an input (width, height) lies on the picture that it holds, scaled alike in both directions."""
    gain = min(seen[0] / size[0], seen[1] / size[1])
    width, height = (max(round(side * gain), 1) for side in size)
    left, top = (round((whole - part) / 2 - 0.1) for whole, part in zip(seen, (width, height), strict=True))
    return -top / height, -left / width, (seen[1] - top) / height, (seen[0] - left) / width


def _rows_of(read: Rows, found: Detections, view: View, seen: tuple[int, int]) -> tuple[list[int], Tensor | None]:
    """Return the row of each predicted box, and, where rows have no place of their own, its box in their units."""
    top, left, bottom, right = view
    scale = torch.tensor([seen[0] / (right - left), seen[1] / (bottom - top)] * 2)  # of the picture on the input
    low = scale * torch.tensor([-left, -top] * 2)
    labels, missing = found.labels, "the prediction cannot be followed into the model"
    wanted = found.boxes / torch.tensor(2 * found.size) * scale + low, labels, found.scores, missing

    def cut(boxes: Tensor) -> Tensor:  # where the picture ends, as predicted ones are
        return torch.minimum(torch.maximum(boxes.float().cpu(), low), low + scale)

    if read.labels is not None and read.boxes is not None:  # RT-DETR: shares of the picture, a row for each class
        places = read.boxes.float().cpu()
        shares = F.one_hot(read.labels.cpu()) * read.scores.float().cpu().sigmoid()
        rows = match_rows(places * torch.tensor(2 * seen), shares, *wanted)
        return rows, places[rows]
    shares = read.scores.float().cpu().sigmoid()
    if read.boxes is not None:
        return match_rows(cut(read.boxes), shares, *wanted), None
    assert read.ranked is not None  # noqa: S101 - for the type checker: one of both is there
    ranked = read.ranked.float().cpu()
    best = F.one_hot(ranked[:, 5].long(), shares.shape[1]) * ranked[:, 4:5]
    among = match_rows(cut(ranked[:, :4]), best, *wanted)
    chosen: list[int] = []
    for place, label in zip(among, labels.tolist(), strict=True):
        miss = (shares[:, label] - ranked[place, 4]).abs()
        miss[[row for row, other in zip(chosen, labels.tolist(), strict=False) if other == label]] = torch.inf
        chosen.append(int(miss.argmin()))
    return chosen, None


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
