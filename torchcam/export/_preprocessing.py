"""How images become inputs, as plain values that other runtimes can follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_INTERPOLATIONS = ("bilinear", "bicubic")
_NO_CHANGE = {"Compose", "ToTensor", "MaybeToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "ToDtype"}


def read_preprocessing(transform: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Return what a transform does: resize, crop to the shape of the input (C, H, W), normalise.

    Understood are the presets of torchvision's weights, and compositions of ``Resize``, ``CenterCrop``, ``ToTensor``
    and ``Normalize``, as timm makes them. Without a transform, images are resized to the shape, and scaled to [0, 1].

    Raises:
        ValueError: if a transform is not understood
    """
    channels = shape[0]
    found: dict[str, Any] = {
        "resize": list(shape[1:]),
        "interpolation": "bilinear",
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
    }
    for step in _steps(transform):
        kind = type(step).__name__
        if kind == "ImageClassification":
            found |= {"resize": _size(step.resize_size), "interpolation": _interpolation(step)}
            found |= {"mean": list(step.mean), "std": list(step.std)}
        elif kind == "Resize":
            found |= {"resize": _size(step.size), "interpolation": _interpolation(step)}
        elif kind == "Normalize":
            found |= {name: [float(value) for value in getattr(step, name)] for name in ("mean", "std")}
        elif kind == "CenterCrop":
            _size(step.size)
        elif kind not in _NO_CHANGE:
            raise ValueError(
                f"`transform` has a step {kind} that other runtimes cannot follow: give one of Resize, CenterCrop, "
                "ToTensor and Normalize, or leave it out"
            )
    return found


def _steps(transform: Any) -> Iterator[Any]:
    if transform is None:
        return
    parts = getattr(transform, "transforms", None)
    if callable(transform) and isinstance(parts, (list, tuple)):
        for part in parts:
            yield from _steps(part)
    else:
        yield transform


def _size(size: Any) -> int | list[int]:
    """Return the shorter side, or height and width."""
    sides = [int(size)] if isinstance(size, int) else [int(side) for side in size]
    return sides[0] if len(sides) == 1 else sides


def _interpolation(step: Any) -> str:
    given = step.interpolation
    name = str(getattr(given, "value", given)).lower()
    if name not in _INTERPOLATIONS:
        raise ValueError(f"`transform` resizes by {name!r}; other runtimes follow {' and '.join(_INTERPOLATIONS)}")
    return name
