"""Tensors and structures of tensors: what all modules use."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_TENSORS = (str, int, float, NoneType)
_WIDE = (torch.float32, torch.float64)
_LOST = 0.125  # a difference from a value is rounding where this share of it is lost in a sum with the value
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a structure of tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif not isinstance(item, _NO_TENSORS):
                yield from tensors_in(item)
    elif isinstance(value, _NO_TENSORS):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def named_tensor(output: Any, *names: str) -> Tensor | None:
    """Return the first of some entries of a mapping, or attributes of an object, that is a tensor."""
    for name in names:
        entry = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(entry, Tensor):
            return entry
    return None


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Rebuild a structure of tuples, lists, mappings and dataclasses with ``function`` applied to each tensor.

    Whatever is not such a structure is handed through as it is. The argument itself is never modified.
    """
    if isinstance(value, Tensor):
        return function(value)
    return map_structure(lambda item: function(item) if isinstance(item, Tensor) else NotImplemented, value)


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Rebuild a structure with each part replaced by what ``function`` makes of it.

    A part for which it gives ``NotImplemented`` is gone into, or, where it holds no parts, handed through as it is.
    """
    replaced = function(value)
    if replaced is not NotImplemented:
        return replaced
    if type(value) in {tuple, list}:
        return type(value)([map_structure(function, item) for item in value])
    if isinstance(value, Mapping):
        items = {key: map_structure(function, item) for key, item in value.items()}
        if type(value) is dict:
            return items
        rebuilt: Any = copy.copy(value)  # an output class of transformers is a mapping and a dataclass at once
        for key, item in items.items():
            rebuilt[key] = item
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        rebuilt = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(rebuilt, field.name, map_structure(function, getattr(value, field.name)))
        return rebuilt
    return value


def to_float(tensor: Tensor) -> Tensor:
    """Cast to the float type that maps are computed in: float32, or float64 for a float64 tensor."""
    return tensor if tensor.dtype in _WIDE else tensor.float()


def resize(maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate ``(N, C, *spatial)`` (bi/tri)linearly to ``(N, C, *shape)``, corners not aligned.

    Raises:
        ValueError: if ``shape`` has another number of dimensions than ``maps``, or one that is not 1, 2 or 3
    """
    size = tuple(map(int, shape))
    if maps.shape[2:] == size:
        return maps
    if maps.ndim - 2 != len(size) or len(size) not in _INTERPOLATION:
        raise ValueError(
            f"maps of spatial shape {tuple(maps.shape[2:])} cannot be resized to {size}: "
            "both need the same number of dimensions, 1, 2 or 3"
        )
    return F.interpolate(maps, size=size, mode=_INTERPOLATION[len(size)], align_corners=False)


def gaussian_blur(maps: Tensor, size: int, sigma: float) -> Tensor:
    """Blur ``(N, C, *spatial)`` with a Gaussian of ``size`` positions a side, an odd number; borders are mirrored."""
    offsets = torch.arange(size, device=maps.device) - size // 2
    kernel = torch.exp(-0.5 * (offsets.to(maps.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(2, maps.ndim):
        side = maps.shape[axis]
        period = max(2 * (side - 1), 1)
        sources = (torch.arange(side, device=maps.device).unsqueeze(1) + offsets) % period
        sources = torch.minimum(sources, period - sources)  # (side, size)
        matrix = maps.new_zeros(side, side).scatter_add_(1, sources, kernel.expand(side, -1))
        maps = torch.movedim(maps.movedim(axis, -1) @ matrix.mT, -1, axis)
    return maps


def seeded(generator: torch.Generator | int, device: torch.device) -> torch.Generator:
    """Return the generator, or make one on ``device`` from a seed."""
    return torch.Generator(device).manual_seed(generator) if isinstance(generator, int) else generator


def gaussian_noise(shape: tuple[int, ...], like: Tensor, std: float, generator: torch.Generator | int) -> Tensor:
    """Draw normal noise of standard deviation ``std`` on the device and in the type of ``like``.

    ``generator`` may be a seed. The global random state is untouched, unless the generator is the global one.
    """
    generator = seeded(generator, like.device)
    return std * torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def blurred_out(image: Tensor) -> Tensor:
    """Blur inputs (N, C, *spatial) until nothing can be told: σ is an eighth of the shorter side."""
    side = min(image.shape[2:])
    with torch.autocast(image.device.type, enabled=False):
        return gaussian_blur(to_float(image), 2 * (side // 4) + 1, max(side / 8, 1.0)).to(image)


def is_constant(lowest: Tensor, highest: Tensor) -> Tensor:
    """Check where the range from ``lowest`` to ``highest`` is no wider than float rounding makes it."""
    return torch.add(lowest, highest - lowest, alpha=_LOST) == lowest


def is_finite(tensor: Tensor) -> Tensor:
    """Check which samples hold finite values only, (N,)."""
    return (tensor.flatten(1) * 0).sum(1) == 0  # nothing else has a product with 0 that is not 0


def min_max(maps: Tensor, start_dim: int = 1) -> Tensor:
    r"""Scale to [0, 1] over all dimensions from ``start_dim`` on: :math:`(m - \min m) / (\max m - \min m)`.

    The result does not depend on the scale of ``maps``: tiny values reach 1 as well. What is constant up to float
    rounding becomes zero. NaN stays NaN.
    """
    positions = tuple(range(start_dim, maps.ndim))
    lowest = maps.amin(positions, keepdim=True)
    above = maps - lowest
    scale = above.amax(positions, keepdim=True)
    constant = torch.add(lowest, scale, alpha=_LOST) == lowest  # all its finite values become 0
    if maps.requires_grad:
        return above / scale.masked_fill(constant, torch.inf)
    return above.div_(scale.masked_fill_(constant, torch.inf))


def over_positions(maps: Tensor, image: Tensor) -> Tensor:
    """Return maps over positions, (N, *spatial): as they are, or :func:`over_channels` of an attribution of an input.

    A map has a dimension less than the input, but for inputs without channels: signals and spectrograms.
    """
    of_channels = maps.ndim > max(2, image.ndim - 1) and (image.ndim != 3 or maps.shape == image.shape)
    return over_channels(maps) if of_channels else maps


def over_channels(maps: Tensor) -> Tensor:
    """Make maps (N, *spatial) of attributions (N, C, *spatial), as guided backpropagation makes them.

    Each is how far the channels are from what they mostly are, which is where nothing matters: the largest distance,
    scaled to [0, 1]. NaN makes NaN of its sample.
    """
    flat = maps.flatten(1)
    distance = (flat - flat.median(1, keepdim=True).values).reshape(maps.shape).abs().amax(1)
    peak = distance.flatten(1).amax(1).reshape(-1, *[1] * (maps.ndim - 2))
    return distance / torch.where(peak == 0, 1.0, peak)
