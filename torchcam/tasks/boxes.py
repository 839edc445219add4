"""Why this box: detectors of ultralytics, transformers and torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchcam._checks import finite_number
from torchcam._detections import Detections
from torchcam._inputs import as_rgb, read_picture
from torchcam._passes import Call
from torchcam._replica import normal_mode, replicated
from torchcam.layers import candidates_of, dependence, watch
from torchcam.targets import Box, Selector

from . import _detr, _torchvision, _yolo
from ._found import Found

__all__ = ["as_boxes", "is_detector"]

_LIBRARIES = (_yolo, _detr, _torchvision)


def is_detector(model: Any) -> bool:
    """Check whether the boxes of a model can be explained."""
    return any(library.is_detector(model) for library in _LIBRARIES)


def as_boxes(
    model: nn.Module,
    given: Any,
    box: Any,
    *,
    threshold: float | None,
    class_names: Sequence[str] | None,
    needs_layer: bool,
    **options: Any,
) -> Found:
    """Ask a detector about a picture, and find the rows of its output behind the boxes that are asked about.

    Args:
        model: the detector
        given: the picture: a path, a PIL image or an array; for torchvision also a tensor (1, C, H, W)
        box: the number of a box, a :class:`torchcam.targets.Box` with it, ``"all"``, or a list of them; by default the
            one with the highest score
        threshold: the least score of a box, by default the detector's own
        class_names: the names of the classes, by default those that the detector knows
        needs_layer: whether the default layer is looked for
        options: how inputs are read: ``transform``, ``weights`` and, of transformers, ``processor``

    Raises:
        TypeError: if the model is no detector, or an argument has the wrong type
        ValueError: if there is no such box, or none at all
    """
    library = next((one for one in _LIBRARIES if one.is_detector(model)), None)
    if library is None:
        raise TypeError(
            f"`box` asks about the boxes of a detector, and {type(model).__name__} is none that is known (the wrappers "
            "of ultralytics, detectors of transformers and of torchvision): leave it out, or pass `targets`, say "
            "torchcam.targets.Box of a row of the output"
        )
    if threshold is not None:
        finite_number("threshold", threshold, 0.0)
    picture = None if isinstance(given, Tensor) else as_rgb(read_picture(given))
    if isinstance(given, Tensor) and (given.ndim != 4 or len(given) != 1):
        raise ValueError(f"`input_tensor` must be one image, (1, C, H, W), for `box`, got shape {tuple(given.shape)}")
    if isinstance(given, Tensor) and library is not _torchvision:
        raise TypeError("`input_tensor` must be an image for `box`, a path, a PIL image or an array, got a tensor")
    if options["processor"] is not None and library is not _detr:
        raise ValueError(f"`processor` is for transformers: {type(model).__name__} makes boxes by itself")
    found: Found = library.find(model, given, picture, threshold, options)
    asked = _asked(box, found.detections)
    names = found.detections.class_names if class_names is None else dict(enumerate(class_names))
    targets = {_name(one): _target(found, one) for one in asked}
    explained = {_name(one): one.index for one in asked}
    detections = replace(found.detections, class_names=names, explained=explained)
    layer = _layer(found, list(targets.values())) if needs_layer else None
    return replace(found, detections=detections, targets=targets, layer=layer)


def _asked(box: Any, found: Detections) -> list[Box]:
    """Read which boxes are asked about; their index is that of the box among those that were found."""
    count = len(found)
    if not count:
        raise ValueError("`box`: the detector found no box in the picture; a lower `threshold` shows less certain ones")
    if box is None:
        box = int(found.scores.argmax())
    several = range(count) if isinstance(box, str) and box == "all" else box
    asked = []
    for one in several if isinstance(several, (list, tuple, range)) else [several]:
        index = one.index if isinstance(one, Box) else one
        if isinstance(index, (bool, np.bool_)) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"`box` must be the number of a box, a list of them, or 'all', got {one!r}")
        if not 0 <= index < count:
            raise ValueError(
                f"`box` must lie between 0 and {count - 1} for the {count} boxes that were found, got {index}"
            )
        asked.append(replace(one, index=int(index)) if isinstance(one, Box) else Box(int(index)))
    if not asked:
        raise ValueError("`box` is an empty list: name at least one box")
    return asked


def _name(box: Box) -> str:
    part = box.side if box.keypoint is None else f"point {box.keypoint}"
    label = None if box.label is None else f"as class {box.label}"
    return ", ".join(filter(None, [f"box {box.index}", part, label]))


def _target(found: Found, box: Box) -> Box:
    """Return the target of a box that was found: of its row, and of its class."""
    label = int(found.detections.labels[box.index]) if box.label is None else box.label
    near = None if found.near is None else found.near[box.index]
    return replace(box, index=found.rows[box.index], label=label, near=near)


def _layer(found: Found, targets: Sequence[Box]) -> str:
    """Return the first of the layers that all targets depend on; of none of them, the default of any model.

    Raises:
        ValueError: if there is none
    """
    inputs = found.inputs
    with replicated(found.model) as replica, normal_mode():
        outputs, _ = watch({name: replica.get_submodule(name) for name in found.layers})
        output = inputs.call(replica, slice(0, 1))
        scores = [Selector(None, target, 1)(output).sum() for target in targets]
        shares = dependence(scores, [(name, tensors[0]) for name, tensors in outputs.items()])
    names = [name for name in found.layers if shares.get(name) == 1]
    least = found.least_stride
    if least is not None:
        pixels = inputs.tensor.shape[2:].numel()
        strides = {name: (pixels / outputs[name][0].shape[-2:].numel()) ** 0.5 for name in names}
        # Grids are rounded up: a stride of 16 may count less.
        names.sort(key=lambda name: (strides[name] < 0.75 * least, abs(strides[name] - least)))
    if names:
        return names[0]
    args, kwargs = ((inputs.tensor,), {}) if inputs.kwargs is None else ((), dict(inputs.kwargs))
    choice = candidates_of(found.model, Call(args, kwargs), Selector(None, targets[0], 1)).choice
    if choice is None:
        raise ValueError(
            f"no layer of {type(found.model).__name__} is known to show the picture: name a `target_layer`"
        )
    return choice
