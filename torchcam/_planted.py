"""Experiments: where does the output of a layer change when a strip of the input does, and what do positions see?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._chunks import run_chunks
from ._passes import Call
from ._replica import normal_mode, replicated
from ._tensors import tensors_in
from .layout import Layout, Reading, primary_tensors

_STRIPS = 4  # of each axis of the input
_PLACES: tuple[tuple[float, ...], ...] = (
    (0.125, 0.875, 0.125),
    (0.625, 0.125, 0.875),
    (0.875, 0.625, 0.375),
)  # as shares; not like their mirror images
_ROWS = 16  # in memory at a time
_INSIDE = 4  # positions in a row, from which on the rest may be padding
_IDLE = 0.1  # the share of what strips change in positions, up to which tokens before them are none
_NOTHING = 1e-12  # the share of the mean square of an output that counts as no change


class Changes(NamedTuple):
    """How much the output of a layer changes with each strip.

    Attributes:
        sizes: squares of the changes, summed over channels: shaped as the output, with as many rows as there are strips
            (axes x strips of each) and one channel
        axes: the dimensions of the input that were changed
        scale: the mean square of the output
    """

    sizes: Tensor
    axes: tuple[int, ...]
    scale: float


class Trial(NamedTuple):
    """How well a grid follows the input.

    Attributes:
        follows: whether it does; None if its sides are too short to tell
        score: the smallest share of the variance of where positions look that their place along a side explains
        sides: how many sides are long enough to tell
    """

    follows: bool | None
    score: float = 0.0
    sides: int = 0


class Seen(NamedTuple):
    """How much of what a few positions see lies where they lie, as multiples of what lies elsewhere.

    Attributes:
        least: that of the position that sees least of it
        mean: that of all of them
    """

    least: float
    mean: float

    @property
    def is_clear(self) -> bool:
        """Whether each position looks where it lies."""
        return self.least > 1.0 and self.mean > 1.15  # attention of fresh weights sees almost everything alike

    @property
    def is_against(self) -> bool:
        """Whether they look elsewhere, whatever an experiment with strips shows."""
        return self.mean <= 0.5


def changes_of(
    model: nn.Module, call: Call, input_shape: Sequence[int], layers: Sequence[str]
) -> dict[str, dict[tuple[int, int], Changes]]:
    """Run a replica on noise, and on copies in which one strip of one axis is other noise.

    Noise of the input's own scale takes the place of the input: a picture has bright parts that outweigh others. One
    pass of 1 + 4 rows for each axis, in chunks.

    Args:
        model: the model
        call: how it was called
        input_shape: the shape of the input, with its batch
        layers: the layers to watch

    Returns:
        what was measured, by the name of the output and its dimensions of batch and channels
    """
    inputs, axes = _planted(call, input_shape)
    measured: defaultdict[tuple[str, int, int], dict[int, Tensor]] = defaultdict(dict)
    scales: dict[str, float] = {}
    start, rows = 0, inputs  # of the chunk that runs

    def watch(layer: str, _module: nn.Module, _args: Any, output: Any) -> None:
        for level, tensor in primary_tensors(output).items():
            if tensor.ndim < 3 or not tensor.is_floating_point():
                continue
            values = tensor.double()  # of which squares overflow in float32
            scales[layer + level] = float(values.square().mean())
            pairs = [(0, 1), (0, tensor.ndim - 1), *([(1, 2)] if tensor.ndim == 3 else [])]
            for batch, channels in pairs:
                if tensor.shape[batch] == len(rows):
                    moved = values.narrow(batch, 1, len(rows) - 1) - values.narrow(batch, 0, 1)
                    # Of a layer that runs several times, the last call counts.
                    measured[layer + level, batch, channels][start] = moved.square().sum(channels, keepdim=True)

    def run(chunk: slice) -> None:
        nonlocal start, rows
        start, rows = chunk.start, torch.cat([inputs[:1], inputs[1:][chunk]])
        args, kwargs = call.with_signal(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
        replica(*args, **kwargs)

    with normal_mode(graph=False), call.as_recorded(), replicated(model) as replica:
        for layer in layers:
            replica.get_submodule(layer).register_forward_hook(partial(watch, layer))
        run_chunks(run, len(inputs) - 1, _ROWS)
    found: dict[str, dict[tuple[int, int], Changes]] = defaultdict(dict)
    for (name, batch, channels), parts in measured.items():
        if sum(part.shape[batch] for part in parts.values()) == len(inputs) - 1:
            found[name][batch, channels] = Changes(torch.cat([*parts.values()], batch), axes, scales[name])
    return found


def _planted(call: Call, input_shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return noise and copies of it with one strip changed, one strip of each axis after the other; and those axes."""
    first = next(tensors_in(call.signal))
    scale = float(first.float().std(correction=0)) or 1.0
    generator = torch.Generator().manual_seed(0)

    def noise(shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=generator) * scale + float(first.float().mean())
        return drawn.to(first.device, first.dtype)

    axes = tuple(axis for axis in range(1, len(input_shape)) if input_shape[axis] >= _STRIPS)
    base = noise((1, *input_shape[1:]))
    rows = [base]
    for axis in axes:
        edges = [round(input_shape[axis] * part / _STRIPS) for part in range(_STRIPS + 1)]
        for start, end in pairwise(edges):
            changed = base.clone()
            strip = changed.narrow(axis, start, end - start)
            strip.copy_(noise(strip.shape))
            rows.append(changed)
    return torch.cat(rows), axes


def try_reading(
    reading: Reading, measured: Mapping[tuple[int, int], Changes], needed: float, *, only: bool = True
) -> Trial:
    """Find out whether the grid of a reading follows the input, along each side.

    Each position looks where the strips lie that change it, less what the weaker half of the strips does: global
    attention answers to everything a little. That place must rise with the index along the side.

    Args:
        reading: the reading
        measured: what was measured of the output
        needed: the least score
        only: whether no other reading is tried: three positions may follow by chance
    """
    changes = measured.get((reading.layout.batch, reading.layout.channels))
    if changes is None or not changes.axes:
        return Trial(None)
    above = _above_weaker(reading.layout, changes)
    amount = above.sum(1)  # (axes, *grid)
    if not float(amount.sum(0).amax()) > _NOTHING * changes.scale:
        return Trial(False)
    if reading.layout.prefix and len(reading.layout.positions) > 1:
        tokens = _above_weaker(reading.layout.with_prefix_only, changes)
        if float(tokens.mean()) > _IDLE * float(above.mean()):  # what would be left out looks somewhere as well
            return Trial(False)
    places = (torch.arange(_STRIPS, dtype=torch.double, device=amount.device) + 0.5) / _STRIPS
    centre = (above * places.reshape(-1, *[1] * (amount.ndim - 1))).sum(1) / amount.clamp_min(1e-300)
    moving = amount[amount > 1e-6 * amount.amax()]
    weight = amount.clamp_max(2 * float(moving.median()))  # one strong position must not outvote the rest
    scores = []
    for side, axis in enumerate(reading.axes):
        few = 4 if len(reading.axes) == 1 else 2 if only else 3  # that may be in order by chance
        if axis in changes.axes and reading.layout.grid[side] > few:
            own = changes.axes.index(axis)
            scores.append(_explained(centre[own], weight[own], side))
    if not scores:
        return Trial(None)
    total = weight.sum(0)
    spread = float((total > 0.01 * total.amax()).double().mean())
    return Trial(min(scores) >= needed and spread >= 0.25, min(scores), len(scores))


def _above_weaker(layout: Layout, changes: Changes) -> Tensor:
    """Return by how much each strip changes each position, less what the weaker half does: (axes, strips, *grid)."""
    grid = layout.to_grid(changes.sizes).squeeze(1).double()
    sizes = grid.reshape(len(changes.axes), _STRIPS, *grid.shape[1:])
    return (sizes - sizes.sort(1).values[:, : _STRIPS // 2].mean(1, keepdim=True)).clamp_min(0)


def seen_at_places(layout: Layout, output: Tensor, signal: Tensor) -> Seen | None:
    """Find out whether a few positions of a layer look where a layout says that they lie, by one backward pass.

    Args:
        layout: the layout, with the dimensions of the input that it follows
        output: the output of the layer, with a graph
        signal: the input that the graph leads to

    Returns:
        how much of the squared gradient lies in the parts of the input, up to four along each axis, that hold the
        positions; None if there is no gradient, or the grid is too small
    """
    sides = layout.grid
    if len(sides) > len(_PLACES[0]) or len(layout.axes) != len(sides):
        return None
    parts = [min(_STRIPS, side, signal.shape[axis]) for side, axis in zip(sides, layout.axes, strict=True)]
    if max(parts) < 2:
        return None
    few = min(part for part in parts if part > 1) <= 2  # few parts are soon all taken
    places = _PLACES[: 1 if few else 2 if sum(part > 1 for part in parts) == 1 else 3]
    grid = layout.to_grid(output)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(parts, dtype=torch.bool)
    terms = []
    for place in places:
        position = [int(share * side) for share, side in zip(place, sides, strict=False)]
        cells = zip(position, sides, parts, strict=True)
        expected[tuple(int((index + 0.5) * part / side) for index, side, part in cells)] = True
        index: Any = (slice(None), slice(None), *position)
        values = grid[index]
        terms.append((torch.randn(values.shape[1], generator=generator).to(values) * values).sum())
    (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), signal, retain_graph=True, allow_unused=True)
    if gradient is None:
        return None
    mass = gradient.detach().cpu().double().square()
    mass = mass.sum([dimension for dimension in range(mass.ndim) if dimension not in layout.axes])
    for dimension, part in enumerate(parts):
        holds = F.one_hot(torch.arange(mass.shape[dimension]) * part // mass.shape[dimension], part).double()
        mass = torch.movedim(mass.movedim(dimension, -1) @ (holds / holds.sum(0)), -1, dimension)
    others = float(mass[~expected].mean())
    if not others >= 0 or not float(mass.sum()) > 0:
        return None
    found = mass[expected] / max(others, 1e-300)
    return Seen(float(found.min()), float(found.mean()))


def _explained(centre: Tensor, weight: Tensor, side: int) -> float:
    """Return the share of the weighted variance of (*grid) that the place along a side explains; 0 unless it rises."""
    centre, weight = (one.movedim(side, 0).reshape(one.shape[side], -1) for one in (centre, weight))
    weights = weight.sum(1)
    means = (weight * centre).sum(1) / weights.clamp_min(1e-300)
    index = torch.arange(len(means), dtype=torch.double, device=means.device)
    total = weight.sum().clamp_min(1e-300)
    mean = (weight * centre).sum() / total
    variance = (weight * (centre - mean) ** 2).sum()
    if not float(variance) > 1e-12 * float(total):
        return 0.0
    seen = (weights > 1e-6 * weights.amax()).nonzero().flatten()
    first, last = int(seen[0]), int(seen[-1])
    if len(seen) < _INSIDE or last - first >= len(seen):  # else what surrounds them is padding, which has no place
        first, last = 0, len(means) - 1
    rise = float(torch.corrcoef(torch.stack([index, means])[:, first : last + 1])[0, 1])
    if not rise > 0.8:
        return 0.0
    if weight.shape[1] == 1:  # each place is its own group: a line, not their means, must explain them
        index_mean = (weights * index).sum() / total
        covariance = (weights * (index - index_mean) * (means - mean)).sum()
        spread = (weights * (index - index_mean) ** 2).sum()
        return float(covariance**2 / (spread * variance))
    return float((weights * (means - mean) ** 2).sum() / variance)
