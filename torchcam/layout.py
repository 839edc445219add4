"""Where the positions are in the output of a layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._architecture import NOTHING, Kind, Shown
from ._cached import cached_property
from ._tensors import map_tensors, tensors_in

__all__ = [
    "AmbiguousLayoutError",
    "Cells",
    "Layout",
    "find_layout",
    "first_tensor",
    "has_consistent_stride",
    "patch_grid",
    "primary_tensors",
    "replace_tensors",
]


class AmbiguousLayoutError(ValueError):
    """The output of a layer can be read in several ways."""


_MOST_PREFIX_TOKENS = 8
_LARGEST_ANISOTROPY = 2.5  # of a grid that counts although it does not divide the input into squares
FEW = 9  # positions that anything may have as many of by chance: channels, the sides of a box
_FEW_CHANNELS = frozenset({1, 2, 3, 4})
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
        prefix: the number of tokens before the positions (class, distillation, registers), 0 for most maps
        before: the side of the grid that they come before, where each side has a dimension of its own
        fold: the dimensions of the grid in the order in which a row goes through them, the slowest first; by default
            the grid's own
        axes: the dimension of the input that each side of the grid follows, where that is known
    """

    grid: tuple[int, ...]
    batch: int
    channels: int
    positions: tuple[int, ...]
    prefix: int = 0
    fold: tuple[int, ...] = ()
    axes: tuple[int, ...] = field(default=(), compare=False, repr=False)
    before: int = 0

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
        if len(self.grid) == len(self.positions):
            return ordered.narrow(2 + self.before, self.prefix, self.grid[self.before])
        row = ordered[..., self.prefix :]
        fold = self.fold or range(len(self.grid))
        folded = row.reshape(*row.shape[:2], *(self.grid[side] for side in fold))
        if not self.fold:
            return folded
        return folded.permute(0, 1, *(2 + self.fold.index(side) for side in range(len(self.grid))))

    def from_grid(self, grid: Tensor, original: Tensor) -> Tensor:
        """Lay out ``(N, C, *grid)`` as the tensor it came from; tokens before the grid are those of ``original``."""
        order = (self.batch, self.channels, *self.positions)
        if len(self.grid) > len(self.positions):
            grid = (grid.permute(0, 1, *(2 + side for side in self.fold)) if self.fold else grid).flatten(2)
        if self.prefix:
            tokens = original.permute(order).narrow(2 + self.before, 0, self.prefix)
            grid = torch.cat([tokens.expand(*grid.shape[:2], *[-1] * len(self.positions)), grid], 2 + self.before)
        return grid.permute([order.index(dimension) for dimension in range(len(order))])

    def is_like(self, other: Layout) -> bool:
        """Check whether this layout is another one's for another size."""
        return replace(self, grid=()) == replace(other, grid=()) and len(self.grid) == len(other.grid)

    def without_tokens(self, count: int, side: int) -> Layout:
        """The same layout without the first positions of a side, which are no positions then."""
        grid = tuple(length - count if each == side else length for each, length in enumerate(self.grid))
        return replace(self, grid=grid, prefix=count, before=side)

    @property
    def with_prefix_only(self) -> Layout:
        """The layout of the tokens before the positions, where each side has a dimension of its own."""
        grid = tuple(self.prefix if side == self.before else length for side, length in enumerate(self.grid))
        return replace(self, grid=grid, prefix=0)

    @property
    def prefix_dimension(self) -> int:
        """The dimension that holds the tokens before the positions, counted from the last."""
        return self.positions[self.before] - len(self.positions) - 2

    @property
    def source(self) -> str:
        """The source of a function from such a tensor to ``(N, C, *grid)``."""
        order = (self.batch, self.channels, *self.positions)
        code = "t" if order == tuple(range(len(order))) else f"t.permute({', '.join(map(str, order))})"
        if self.prefix:
            code += f"[{':, ' * (2 + self.before)}{self.prefix}:]"
        if len(self.grid) > len(self.positions):
            fold = self.fold or range(len(self.grid))
            code += f".unflatten(-1, ({', '.join(str(self.grid[side]) for side in fold)}))"
            if self.fold:
                code += f".permute(0, 1, {', '.join(str(2 + fold.index(side)) for side in range(len(self.grid)))})"
        return f"lambda t: {code}"

    def __str__(self) -> str:
        named = {self.batch: "N", self.channels: "C"}
        sides = [str(side) for side in self.grid]
        if len(self.positions) == 1:
            sides = [" * ".join(sides[side] for side in self.fold or range(len(sides)))]
        if self.prefix:
            sides[self.before] = f"{self.prefix} + {sides[self.before]}"
        row = "positions " if len(self.positions) == 1 else ""
        named.update({position: row + side for position, side in zip(self.positions, sides, strict=True)})
        return f"({', '.join(named[dimension] for dimension in range(len(named)))})"


class Reading(NamedTuple):
    """A way to read the output of a layer.

    Attributes:
        layout: where the positions are
        axes: the dimension of the input that each side of the grid follows
        fits: whether the grid divides the input at a consistent stride
        is_shown: whether the model shows a grid of this shape: its patches, after tokens that it has parameters for
        is_plausible: whether the grid could divide the input if borders are padded, or strides differ somewhat
    """

    layout: Layout
    axes: tuple[int, ...]
    fits: bool = True
    is_shown: bool = False
    is_plausible: bool = True

    @property
    def placed(self) -> Layout:
        """The layout, with the dimensions of the input that it follows."""
        return replace(self.layout, axes=self.axes)


@dataclass(frozen=True)
class Cells:
    """Where the positions of a layer lie on pictures.

    Attributes:
        boxes: the number of the picture, and top, left, bottom and right as shares of its height and width, of each
            position: (P, 5). They reach beyond 0 and 1 where the picture was padded; NaN for a position without a
            place.
        grid: the shape (height, width) of the grid that the positions form, row by row; None for places of any kind
    """

    boxes: Tensor
    grid: tuple[int, int] | None = None

    @classmethod
    def of_grid(cls, grid: tuple[int, int], view: Sequence[float] = (0.0, 0.0, 1.0, 1.0), picture: int = 0) -> Cells:
        """Return the cells of a grid that covers a part of a picture.

        Args:
            grid: the shape (height, width) of the grid
            view: top, left, bottom and right of that part, by default the whole picture; the other way round where it
                is mirrored
            picture: the number of the picture
        """
        top, left, bottom, right = view
        rows = torch.linspace(top, bottom, grid[0] + 1, dtype=torch.float64)
        columns = torch.linspace(left, right, grid[1] + 1, dtype=torch.float64)
        starts, ends = torch.cartesian_prod(rows[:-1], columns[:-1]), torch.cartesian_prod(rows[1:], columns[1:])
        return cls(torch.cat([torch.full_like(starts[:, :1], picture), starts, ends], 1), grid)


def find_layout(shape: Sequence[int], input_shape: Sequence[int] | None, layer: str) -> Layout:
    """Find the grid in the output of a layer, by geometry alone: it divides the input at a consistent stride.

    Maps may have their channels first, ``(N, C, *S)``, or last, ``(N, *S, C)``; sequences of tokens may have the batch
    first, ``(N, T, D)``, or second, ``(T, N, D)``, and up to eight tokens before those of the patches. Unless the other
    reading of a map fits better, channels come first. An extractor asks for more than geometry: what the module is,
    what the model shows, and where that leaves a doubt, an experiment.

    Args:
        shape: the shape of the layer's output
        input_shape: the shape of the model's image-like input ``(N, C, *spatial)``, where it has one
        layer: the name of the layer, for the message

    Raises:
        ValueError: if no reading fits
    """
    shape, layout = tuple(shape), None
    if input_shape is None:
        layout = Layout(shape[2:], 0, 1, tuple(range(2, len(shape)))) if len(shape) > 2 else None
    elif len(shape) == len(input_shape) and shape[0] == input_shape[0]:
        layout = _maps(shape, tuple(range(2, len(shape))), tuple(input_shape), None)[0].layout
    elif len(shape) == 3 and input_shape[0] in shape[:2]:
        batch = 0 if shape[0] == input_shape[0] else 1
        found = _token_grid(shape[1 - batch], tuple(input_shape[2:]))
        if found is not None:
            layout = Layout(found[0], batch, 2, (1 - batch,), found[1])
    if layout is None:
        raise ValueError(no_reading(shape, input_shape, layer))
    return layout


def no_reading(shape: Sequence[int], input_shape: Sequence[int] | None, layer: str) -> str:
    """Return the message for the output of a layer that has no positions, or none that are those of the input."""
    given = "" if input_shape is None else f" for an input of shape {tuple(input_shape)}"
    lacks = "has no spatial extent" if len(shape) < 3 else "forms no grid that fits the input"
    return (
        f"the output of `target_layer` '{layer}', of shape {tuple(shape)}{given}, {lacks}: pass `reshape_transform`, a "
        "function from that output to a tensor (N, C, *spatial), or another `target_layer`"
    )


@lru_cache(maxsize=4096)
def readings(
    shape: tuple[int, ...], input_shape: tuple[int, ...], kind: Kind, shown: Shown, *, wide: bool = False
) -> tuple[Reading, ...]:
    """Return every way to read the output of a layer that its type and the model leave possible, the best fit first.

    Args:
        shape: the shape of the output
        input_shape: the shape of the input, whose first dimension is the batch
        kind: what the type of the layer says
        shown: what the model shows of its tokens
        wide: whether readings count that nothing speaks for, for an experiment to find the right one among them
    """
    found: list[Reading] = []
    for axes in input_axes(input_shape):
        if kind.spatial is not None and kind.spatial != len(shape) - 2:
            continue
        if len(shape) == len(axes) + 2:
            found += _maps(shape, axes, input_shape, kind.channels, shown)
            found += _one_row(shape, axes, input_shape, kind, shown) if len(axes) == 1 else []
        elif len(shape) == 3:
            found += _folded(shape, axes, input_shape, kind, shown, wide)
    found = [one for one in found if kind.batch in (None, one.layout.batch) or len(one.layout.positions) > 1]
    if any(one.is_shown for one in found) and not wide:
        found = [one for one in found if one.is_shown]
    return tuple(dict.fromkeys(found))


def input_axes(input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the dimensions of an input that its positions may be in: (N, C, *spatial) by convention."""
    few = _FEW_CHANNELS
    if len(input_shape) == 2:
        return [(1,)]
    if len(input_shape) == 3:
        return [(2,), (1,), (1, 2)]
    if len(input_shape) == 4:
        return [(1, 2)] if input_shape[3] in few and input_shape[1] not in few else [(2, 3)]
    if len(input_shape) == 5:
        volume, video = (2, 3, 4), (1, 3, 4)
        return [volume] if input_shape[2] not in few else [volume, video] if input_shape[1] in few else [video]
    return []


def axes_of(input_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the dimensions with positions of an input as its shape tells them; None for all from the third on."""
    if input_shape is None or len(input_shape) < 4:
        return None
    if len(input_shape) == 4 and input_shape[1] in _FEW_CHANNELS:
        return None
    if len(input_shape) == 4 and max(input_shape[1:3]) > 8 * min(input_shape[1:3]):  # a recording of several channels
        return None
    return unusual_axes(next(iter(input_axes(input_shape)), ()))


def unusual_axes(axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return dimensions with positions, None where they are all from the third on."""
    return None if axes == tuple(range(2, len(axes) + 2)) else axes


def _maps(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    input_shape: tuple[int, ...],
    channels: int | None,
    shown: Shown = NOTHING,
) -> list[Reading]:
    """Return the readings of a map, channels first and last."""
    if shape[0] != input_shape[0]:
        return []
    spatial = [input_shape[axis] for axis in axes]
    dimensions = tuple(range(len(shape)))
    first = Layout(shape[2:], 0, 1, dimensions[2:])
    last = Layout(shape[1:-1], 0, dimensions[-1], dimensions[1:-1])
    fits = {one: has_consistent_stride(one.grid, spatial) for one in (first, last)}
    if len(axes) == 1:  # one dimension has no aspect ratio: channels come first unless there are too many of them
        swapped = shape[2] > spatial[0] >= shape[1]
    else:
        swapped = (fits[last], _is_whole(last.grid, spatial)) > (fits[first], _is_whole(first.grid, spatial))
    ordered = [last, first] if swapped else [first, last]
    if channels is not None:
        ordered = [first if channels == 1 else last]
    found = [
        Reading(one, axes, fits[one], is_plausible=_anisotropy(one.grid, spatial) < _LARGEST_ANISOTROPY)
        for one in ordered
    ]
    if len(input_shape) == 3 and len(axes) == 2:  # none of the input's is that of the channels: the grid may be across
        across = [replace(one, grid=one.grid[::-1], positions=one.positions[::-1]) for one in ordered]
        across += [
            one.without_tokens(count, side)
            for one in [*ordered, *across]
            for side, count in product(range(2), shown.prefixes)
            if 0 < count < one.grid[side]
        ]
        found += [Reading(one, axes, has_consistent_stride(one.grid, spatial)) for one in across]
    return found


def _rows(shape: tuple[int, ...], batch_size: int, kind: Kind) -> Iterator[tuple[int, int, int]]:
    """Yield the dimensions of batch, channels and positions that a row of tokens may have."""
    for batch, channels in ((0, 2), (1, 2), (0, 1)):
        if shape[batch] == batch_size and kind.channels in (None, channels if channels == 1 else -1):
            yield batch, channels, 3 - batch - channels


def _one_row(
    shape: tuple[int, ...], axes: tuple[int, ...], input_shape: tuple[int, ...], kind: Kind, shown: Shown
) -> list[Reading]:
    """Return the readings of a sequence along one axis with the batch second, or with tokens before it."""
    found = []
    grids = shown.grids(input_shape, axes)
    for batch, channels, positions in _rows(shape, input_shape[0], kind):
        if batch == 1 and shape[0] == input_shape[0] and kind.batch is None and input_shape[0] == 1:
            continue
        for prefix in shown.prefixes:
            count = shape[positions] - prefix
            if count > 0 and (batch or prefix):
                is_shown = prefix > 0 and (count,) in grids and count >= FEW
                layout = Layout((count,), batch, channels, (positions,), prefix)
                found.append(Reading(layout, axes, count <= input_shape[axes[0]], is_shown))
    return found


def _folded(
    shape: tuple[int, ...], axes: tuple[int, ...], input_shape: tuple[int, ...], kind: Kind, shown: Shown, wide: bool
) -> list[Reading]:
    """Return the readings of a row of tokens that a grid is folded in."""
    spatial = tuple(input_shape[axis] for axis in axes)
    is_picture = len(input_shape) == 4
    orders = [()] if is_picture and not wide else [(), *[one for one in permutations(range(len(axes))) if one[0]]]
    shown_grids = shown.grids(input_shape, axes)
    if not is_picture:  # whose convolutions may see it turned round
        turned = shown.grids((*input_shape[:1], *input_shape[:0:-1]), axes) if len(input_shape) == 3 else set()
        shown_grids |= {grid[::-1] for grid in turned}
    prefixes = sorted({*shown.prefixes, *range(_MOST_PREFIX_TOKENS + 1)}) if wide else shown.prefixes
    found = []
    for batch, channels, positions in _rows(shape, input_shape[0], kind):
        if batch == 1 and shape[0] == input_shape[0] == 1:
            continue
        for prefix in prefixes:
            count = shape[positions] - prefix
            known = {grid for grid in shown_grids if math.prod(grid) == count and prefix in shown.prefixes}
            grids = [*known]
            if len(input_shape) > 3:
                grids += _patch_grids_of(count, spatial)
            if wide and len(axes) == 2:
                grids += [(side, count // side) for side in range(2, count // 2 + 1) if count % side == 0]
            for grid, order in product(dict.fromkeys(grids), orders):
                if channels == 1 and kind.channels is None and not wide and (grid not in known or count < FEW):
                    continue
                layout = Layout(grid, batch, channels, (positions,), prefix, order)
                found.append(Reading(layout, axes, has_consistent_stride(grid, spatial), grid in known))
    return sorted(found, key=lambda one: (not one.is_shown, not _divides(one.layout.grid, spatial), one.layout.prefix))


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
    found = [
        (prefix > _USUAL_PREFIX_TOKENS or not _divides(grid, spatial), prefix, grid)
        for prefix in range(_MOST_PREFIX_TOKENS + 1)
        for grid in _patch_grids_of(count - prefix, spatial)
        if prefix <= math.prod(grid)
    ]
    if not found:
        return None
    _, prefix, grid = min(found, key=lambda one: one[:2])
    return grid, prefix


def _divides(grid: tuple[int, ...], spatial: tuple[int, ...]) -> bool:
    """Check whether a grid divides an input into squares with nothing left over."""
    return _anisotropy(grid, spatial) == 1 and _is_whole(grid, spatial)


def _is_whole(grid: tuple[int, ...], spatial: Sequence[int]) -> bool:
    """Check whether the sides of a grid divide those of an input with nothing left over."""
    return all(pixels % side == 0 for side, pixels in zip(grid, spatial, strict=True))


@lru_cache(maxsize=4096)
def _patch_grids_of(count: int, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the grids of a number of square patches on an input, those that are closest to square first.

    A video keeps as many frames as it can.
    """
    grids = dict.fromkeys(grid for grid in _patch_grids(spatial) if math.prod(grid) == count)
    return tuple(sorted(grids, key=lambda grid: -grid[0] if len(grid) == 3 else _anisotropy(grid, spatial)))


def _patch_grids(spatial: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the grids that patches of every size make, with what is left over at the border dropped or padded."""
    for stride in range(1, max(spatial[-2:]) + 1):
        for padded in (0, stride - 1):
            plane = tuple(max(1, (pixels + padded) // stride) for pixels in spatial[-2:])
            for frames in range(1, spatial[0] + 1) if len(spatial) == 3 else [0]:
                yield (frames, *plane) if frames else plane
