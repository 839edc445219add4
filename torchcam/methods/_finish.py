"""From raw maps to those that are returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor

from torchcam._tensors import is_finite, resize

from ._running import warn


def weighted_sum(weight: Tensor, activation: Tensor) -> Tensor:
    """Sum the weighted channels: (N, C) or (N, C, *spatial) by (N, C, *spatial) to (N, *spatial)."""
    if weight.ndim > 2:
        return (weight * activation).sum(1)
    return torch.bmm(weight.unsqueeze(1), activation.flatten(2)).reshape(-1, *activation.shape[2:])


def scale_signed(maps: Tensor) -> Tensor:
    """Scale to [-1, 1] per sample, zero kept."""
    peak = maps.flatten(1).abs().amax(1).reshape(-1, *[1] * (maps.ndim - 1))
    return torch.where(peak == 0, 0.0, maps / torch.where(peak == 0, 1.0, peak))


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Check whether a sum over all values is finite: if one value is not, it is not; if all are, it may overflow."""
    total = reduce(torch.add, [tensor.sum() for tensor in tensors if tensor is not None])
    return math.isfinite(total.item())


def broken_samples(cam: Tensor, activation: Tensor | None, gradient: Tensor | None, layer: str) -> Tensor:
    """Set the maps (N, *spatial) of samples to NaN whose map, activation or gradient is not finite, and warn."""
    finite = is_finite(cam)
    if activation is not None:
        finite &= is_finite(activation).repeat_interleave(len(cam) // len(activation))
    if gradient is not None:
        finite &= is_finite(gradient)
    if bool(finite.all()):
        return cam
    warn(
        f"the activation or gradient of layer '{layer}' holds NaN or infinite values: the maps of "
        f"{int((~finite).sum())} of {len(finite)} samples are NaN",
        RuntimeWarning,
        stacklevel=7,
    )
    return cam.masked_fill(~finite.reshape(-1, *[1] * (cam.ndim - 1)), torch.nan)


def to_one_shape(
    cams: list[Tensor],
    target_shape: tuple[int, ...] | None,
    scale: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Check, scale and resize maps (N, *spatial) to ``target_shape``, by default the largest of each side among them.

    Raises:
        TypeError: if ``cams`` is not a list of tensors
        ValueError: if it is empty
    """
    if not isinstance(cams, (list, tuple)) or not all(isinstance(cam, Tensor) for cam in cams):
        raise TypeError(f"`cams` must be a list of tensors, one map (N, *spatial) per layer, got {type(cams).__name__}")
    if not cams:
        raise ValueError("`cams` is an empty list: there is no map to fuse")
    shape = target_shape or [max(sides) for sides in zip(*(cam.shape[1:] for cam in cams), strict=True)]
    return [resize(cam.unsqueeze(1), shape).squeeze(1) for cam in scale(list(cams))]
