"""Check where the cells of a layer's grid look, from outside: change strips of the input and see which cells move.

Nothing here is shared with the library, which has an experiment of its own. The response of cell c to strip s, as a
logarithm and without what is common to the strip and to the cell, is compared with what a grid that lies over the
input would give: the closer a cell is to a strip, the more it moves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRIPS = 5
REPEATS = 2
NEEDED = 0.4  # a correlation; more where there are few cells


@dataclass(frozen=True)
class Verdict:
    """Whether a grid lies over the input.

    Attributes:
        scores: the correlation for each axis of the grid; None for an axis of one position, which shows nothing
        fault: what is wrong, empty if nothing is
    """

    scores: tuple[float | None, ...]
    fault: str

    @property
    def is_point(self) -> bool:
        """Whether the grid has a single position."""
        return bool(self.scores) and not any(score is not None for score in self.scores)


def judge(read: Callable[[Tensor], Sequence[Tensor]], x: Tensor, axes: Sequence[int]) -> list[Verdict]:
    """Judge the grids that a model's layers show for an input.

    Args:
        read: function from an input like ``x`` to the layers' grids, each (N, C, *grid)
        x: an input
        axes: the dimensions of ``x`` that the axes of each grid should lie over, in this order
    """
    moved: list[Tensor] = []
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(repeat)
        base = torch.randn(x.shape, generator=generator)
        before = [grid.double() for grid in read(base)]
        sums = [torch.zeros((len(axes), STRIPS, len(grid), *grid.shape[2:]), dtype=torch.double) for grid in before]
        for (number, axis), strip in itertools.product(enumerate(axes), range(STRIPS)):
            length = x.shape[axis]
            start, end = strip * length // STRIPS, (strip + 1) * length // STRIPS
            changed = base.clone()
            part = changed.narrow(axis, start, end - start)
            part.copy_(torch.randn(part.shape, generator=generator))
            for total, old, new in zip(sums, before, read(changed), strict=True):
                total[number, strip] = (new.double() - old).norm(dim=1)
        logs = [_logarithm(total, old) for total, old in zip(sums, before, strict=True)]
        moved = logs if not moved else [a + b for a, b in zip(moved, logs, strict=True)]
    return [_verdict(responses) for responses in moved]


def _logarithm(moved: Tensor, before: Tensor) -> Tensor:
    least = max(1e-3 * float(moved.max()), 1e-7 * float(before.abs().max()), 1e-30)
    return moved.clamp_min(least).log()  # (axes, strips, N, *grid)


def _verdict(responses: Tensor) -> Verdict:
    grid = responses.shape[3:]
    if len(grid) != len(responses):
        return Verdict((), f"{len(grid)} axes for {len(responses)} of the input")
    scores = _scores(responses)
    shown = [axis for axis, score in enumerate(scores) if score is not None]
    if not shown:
        return Verdict(scores, "one position")
    cells = math.prod(responses.shape[2:])
    needed = max(NEEDED, 2.5 / math.sqrt((STRIPS - 1) * (cells - 1)))  # of the standard deviation by chance
    for axis in shown:
        for other in shown:
            if other != axis and (cross := _agreement(responses[other], axis)) > max(needed, scores[axis] or 0):
                return Verdict(scores, f"axis {axis} follows axis {other} of the input ({cross:.2f})")
        if (scores[axis] or 0) < needed:
            return Verdict(scores, f"axis {axis} does not follow the input ({scores[axis]:.2f})")
    here = _mean(scores)
    for description, other_reading in _others(responses):
        there = _mean(_scores(other_reading))
        if there > here + 0.05:
            return Verdict(scores, f"{description} ({there:.2f} > {here:.2f})")
    return Verdict(scores, "")


def _others(responses: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the same responses for other readings of the positions: shifted, and folded at another width."""
    *before, height, width = responses.shape[2:]
    flat = responses.flatten(3)
    for shift in (-3, -2, -1, 1, 2, 3):  # that many tokens too few or too many before the positions
        yield f"the positions are {-shift} further on", flat.roll(shift, 3).view_as(responses)
    if before:
        for other in (other for other in range(2, height * width) if height * width % other == 0 and other != width):
            refolded = responses.reshape(*responses.shape[:-2], -1, other)
            yield f"the positions are folded at a width of {other}", refolded


def _scores(responses: Tensor) -> tuple[float | None, ...]:
    """Return the agreement of each axis of the grid, None for one that has a single position."""
    sizes = responses.shape[3:]
    return tuple(_agreement(responses[axis], axis) if size > 1 else None for axis, size in enumerate(sizes))


def _mean(scores: Sequence[float | None]) -> float:
    shown = [score for score in scores if score is not None]
    return sum(shown) / len(shown)


def _agreement(responses: Tensor, axis: int) -> float:
    """Correlate responses (strips, N, *grid) with how close each index along an axis of the grid is to each strip."""
    size = responses.shape[2 + axis]
    strips = (torch.arange(STRIPS, dtype=torch.double) + 0.5) / STRIPS
    cells = (torch.arange(size, dtype=torch.double) + 0.5) / size
    close = -(strips[:, None] - cells).abs()
    close = close.view(STRIPS, *[size if d == axis + 1 else 1 for d in range(responses.ndim - 1)]).expand_as(responses)
    seen, wanted = _centred(responses.flatten(1)), _centred(close.flatten(1))
    return float((seen * wanted).sum() / (seen.norm() * wanted.norm()).clamp_min(1e-12))


def _centred(matrix: Tensor) -> Tensor:
    """Take the means of rows and of columns off a matrix."""
    return matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()
