"""Where the positions are in the output of a layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ._tensors import map_tensors, tensors_in

__all__ = [
    "Layout",
    "find_layout",
    "first_tensor",
    "has_consistent_stride",
    "patch_grid",
    "primary_tensors",
    "replace_tensors",
]

_MOST_PREFIX_TOKENS = 8
_USUAL_PREFIX_TOKENS = 5  # a class token and four registers


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor that is meant by a layer's output: itself, or the first one in a structure."""
    return next(tensors_in(output), None)


def primary_tensors(output: Any) -> dict[str, Tensor]:
    """Return the primary tensors of a layer's output, by what tells them apart.

    That is one, without a name: the output itself, or the first tensor in a structure. Of a plain dictionary of maps
    of several sizes, as a feature pyramid returns, all are meant.
    """
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, dict) and type(output) in {dict, OrderedDict} and len(output) > 1:
        levels = {f"[{key!r}]": item for key, item in output.items() if isinstance(item, Tensor) and item.ndim > 2}
        if len(levels) == len(output) and len({level.shape[2:] for level in levels.values()}) > 1:
            return levels
    first = first_tensor(output)
    return {} if first is None else {"": first}


def replace_tensors(output: Any, replacements: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Rebuild a layer's output with each of some tensors replaced by its partner."""
    return map_tensors(lambda t: next((new for old, new in replacements if old is t), t), output)


@dataclass(frozen=True)
class Layout:
    """Where a tensor has its batch, its channels and its positions.

    Attributes:
        grid: the shape of the grid that the positions form
        batch: the dimension of the batch
        channels: the dimension of the channels
        positions: the dimension(s) of the positions: as many as the grid has, or one that holds them all in a row
        prefix: the number of tokens before the positions (class, distillation, registers), 0 for maps
    """

    grid: tuple[int, ...]
    batch: int
    channels: int
    positions: tuple[int, ...]
    prefix: int = 0

    @cached_property
    def is_plain(self) -> bool:
        """Whether a tensor of this layout is in grid form as it is."""
        order = (self.batch, self.channels, *self.positions)
        return order == tuple(range(len(self.grid) + 2)) and not self.prefix

    def to_grid(self, tensor: Tensor) -> Tensor:
        """Lay out a tensor as ``(N, C, *grid)``; tokens before the positions are left out."""
        if self.is_plain:
            return tensor
        ordered = tensor.permute(self.batch, self.channels, *self.positions)
        if len(self.positions) == 1 and (self.prefix or len(self.grid) > 1):
            ordered = ordered[..., self.prefix :].reshape(*ordered.shape[:2], *self.grid)
        return ordered

    def from_grid(self, grid: Tensor, original: Tensor) -> Tensor:
        """Lay out ``(N, C, *grid)`` as the tensor it came from; tokens before the grid are those of ``original``."""
        order = (self.batch, self.channels, *self.positions)
        if len(self.positions) == 1 and (self.prefix or len(self.grid) > 1):
            before = original.permute(order)[..., : self.prefix].expand(*grid.shape[:2], -1)
            grid = torch.cat([before, grid.flatten(2)], -1)
        return grid.permute([order.index(dimension) for dimension in range(len(order))])


def find_layout(shape: Sequence[int], input_shape: Sequence[int] | None, layer: str) -> Layout:
    """Find the grid in the output of a layer, by geometry: it has the input's aspect ratio at a consistent stride.

    Maps may have their channels first, ``(N, C, *S)``, or last, ``(N, *S, C)``; sequences of tokens may have the batch
    first, ``(N, T, D)``, or second, ``(T, N, D)``, and up to eight tokens before those of the patches. Unless the other
    reading of a map fits better, channels come first.

    Args:
        shape: the shape of the layer's output
        input_shape: the shape of the model's image-like input ``(N, C, *spatial)``, where it has one
        layer: the name of the layer, for the message

    Raises:
        ValueError: if no reading fits
    """
    shape = tuple(shape)
    if input_shape is None:
        layout = Layout(shape[2:], 0, 1, tuple(range(2, len(shape)))) if len(shape) > 2 else None
    else:
        layout = _reading(shape, tuple(input_shape))
    if layout is None:
        given = "" if input_shape is None else f" for an input of shape {tuple(input_shape)}"
        lacks = "has no spatial extent" if len(shape) < 3 else "forms no grid that fits the input"
        raise ValueError(
            f"the output of `target_layer` '{layer}', of shape {shape}{given}, {lacks}: pass `reshape_transform`, a "
            "function from that output to a tensor (N, C, *spatial), or another `target_layer`"
        )
    return layout


@lru_cache(maxsize=1024)
def _reading(shape: tuple[int, ...], input_shape: tuple[int, ...]) -> Layout | None:
    """Return the reading of a shape that fits the input best, None if none does."""
    batch_size, spatial = input_shape[0], input_shape[2:]
    if len(shape) == len(input_shape) and shape[0] == batch_size:
        return _map_reading(shape, spatial)
    if len(shape) == 3 and batch_size in shape[:2]:
        batch = 0 if shape[0] == batch_size else 1
        found = _token_grid(shape[1 - batch], spatial)
        if found is not None:
            grid, prefix = found
            return Layout(grid, batch=batch, channels=2, positions=(1 - batch,), prefix=prefix)
    return None


def _map_reading(shape: tuple[int, ...], spatial: tuple[int, ...]) -> Layout:
    dimensions = tuple(range(len(shape)))
    first = Layout(shape[2:], batch=0, channels=1, positions=dimensions[2:])
    last = Layout(shape[1:-1], batch=0, channels=dimensions[-1], positions=dimensions[1:-1])
    if len(spatial) == 1:  # one dimension has no aspect ratio: channels come first unless there are too many of them
        return last if shape[2] > spatial[0] >= shape[1] else first
    return last if _fit(last.grid, spatial) > _fit(first.grid, spatial) else first


def _fit(grid: tuple[int, ...], spatial: tuple[int, ...]) -> tuple[bool, bool]:
    """Check whether a grid divides an input into squares, give or take a position, and whether nothing is left over."""
    return has_consistent_stride(grid, spatial), _is_whole(grid, spatial)


def has_consistent_stride(grid: Sequence[int], spatial: Sequence[int]) -> bool:
    """Check whether a grid divides an input into squares, give or take one position for padding and rounding.

    Of more than two dimensions the last two count: time and depth have strides of their own.
    """
    if any(side > pixels for side, pixels in zip(grid, spatial, strict=True)):
        return False
    pairs = list(zip(grid, spatial, strict=True))[-2:]
    lowest = max(pixels / (side + 1) for side, pixels in pairs)
    highest = min(math.inf if side == 1 else pixels / (side - 1) for side, pixels in pairs)
    return lowest < highest


def _anisotropy(grid: Sequence[int], spatial: Sequence[int]) -> float:
    """Return the ratio of the larger to the smaller stride in the last two dimensions."""
    strides = [pixels / side for side, pixels in zip(grid, spatial, strict=True)][-2:]
    return max(strides) / min(strides)


def patch_grid(count: int, spatial: Sequence[int]) -> tuple[int, ...]:
    """Find the grid that a number of patches forms on an input.

    Raises:
        ValueError: if there is none with square patches
    """
    found = _token_grid(count, tuple(spatial))
    if found is None or found[1]:
        raise ValueError(f"{count} patches form no grid on an input of {tuple(spatial)}")
    return found[0]


def _token_grid(count: int, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], int] | None:
    """Find the grid of square patches that, after the fewest tokens that are no patches, a sequence is made of.

    A grid that divides the input with nothing left over, after no more such tokens than is usual, has precedence.
    """
    best: tuple[tuple[bool, int, float], tuple[int, ...]] | None = None
    for grid in _patch_grids(spatial):
        patches = math.prod(grid)
        prefix = count - patches
        if 0 <= prefix <= min(_MOST_PREFIX_TOKENS, patches):
            # Of two grids with as many positions, say of a video, the one that keeps more frames is meant.
            odd = prefix > _USUAL_PREFIX_TOKENS or not _divides(grid, spatial)
            rank = (odd, prefix, -grid[0] if len(grid) == 3 else _anisotropy(grid, spatial))
            if best is None or rank < best[0]:
                best = rank, grid
    return None if best is None else (best[1], best[0][1])


def _divides(grid: tuple[int, ...], spatial: tuple[int, ...]) -> bool:
    """Check whether a grid divides an input into squares with nothing left over."""
    return _anisotropy(grid, spatial) == 1 and _is_whole(grid, spatial)


def _is_whole(grid: tuple[int, ...], spatial: tuple[int, ...]) -> bool:
    """Check whether the sides of a grid divide those of an input with nothing left over."""
    return all(pixels % side == 0 for side, pixels in zip(grid, spatial, strict=True))


def _patch_grids(spatial: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the grids that patches of every size make, with what is left over at the border dropped or padded."""
    for stride in range(1, max(spatial[-2:]) + 1):
        for padded in (0, stride - 1):
            plane = tuple(max(1, (pixels + padded) // stride) for pixels in spatial[-2:])
            for frames in range(1, spatial[0] + 1) if len(spatial) == 3 else [0]:
                yield (frames, *plane) if frames else plane
