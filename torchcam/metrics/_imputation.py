"""Linear imputation of removed positions (ROAD), in one batched solve."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcam._tensors import to_float

_FIRST_LOOK, _LOOKS, _LAST = 8, 4, 100  # iterations: before the first look at the error, between two, at most


def impute(image: Tensor, removed: Tensor) -> Tensor:
    r"""Replace each removed position by the weighted mean of its neighbours, removed or not.

    The weights are those of Rong et al. 2022 (arXiv:2202.00449), 1/6 for the direct neighbours and 1/12 for the
    diagonal ones, divided by their sum where the border leaves some out. With 1 or 3 spatial dimensions they follow the
    same rule: a neighbour that differs in one coordinate counts twice as much as one that differs in two, and four
    times as much as one that differs in three.

    The linear system :math:`(D - W) u = W x` over the removed positions is symmetric and positive definite. It is
    solved for all samples and channels at once by conjugate gradients, preconditioned with one V-cycle of multigrid:
    bilinear interpolation that is cut off where positions are known, Galerkin operators, one Jacobi step before and
    after. The number of iterations hardly depends on the size of the input and of the holes: 8 are enough for most. The
    device is waited for once after 8 iterations, and once after every 4 from there, until the error in the energy norm,
    relative to that of the mean of what is left, is 5e-6, or 1e-10 in float64.

    Args:
        image: the inputs, (B, C, *spatial) with 1, 2 or 3 spatial dimensions
        removed: the positions to fill, (B, *spatial)

    Returns:
        the inputs with those positions filled; with NaN where nothing is left of a sample, or values that
        are not finite are left of a channel
    """
    dtype = image.dtype
    # A hole in a line is as hard as one in a plane of its length squared; and a line is short.
    values = image.double() if _is_line(image.shape[2:]) else to_float(image)
    removed = removed.unsqueeze(1)
    unknown = removed.to(values)  # (B, 1, *spatial)
    positions = tuple(range(2, values.ndim))
    finite = (values.isfinite() | removed).all(positions, keepdim=True)
    left_out = removed | ~finite
    mean = values.masked_fill(left_out, 0.0).sum(positions, keepdim=True) / (1 - unknown).sum(positions, keepdim=True)
    # Deviations from the mean, at most 1: what is constant is filled exactly, and nothing underflows.
    deviation = (values - mean).masked_fill(left_out, 0.0)
    scale = deviation.abs().amax(positions, keepdim=True)
    operator = _Laplacian(unknown)
    evidence = operator.neighbours(deviation / torch.where(scale > 0, scale, 1.0)) * unknown
    tolerance = 1e-10 if values.dtype == torch.float64 else 5e-6
    filled = _conjugate_gradients(operator, _Multigrid(operator), evidence, tolerance) * scale + mean
    return torch.where(removed, torch.where(finite, filled, torch.nan).to(dtype), image)


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, tolerance: float
) -> Tensor:
    """Solve one system for each sample and channel, (B, C, *spatial); those that are solved stay as they are.

    Overwrites ``right``.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(tuple(range(2, a.ndim)), keepdim=True)

    # In place where it can be: on the CPU, new memory costs more than the arithmetic.
    residual, solution = right, torch.zeros_like(right)
    direction = precondition(residual)
    energy = first = dot(residual, direction)
    for done in range(1, _LAST + 1):
        image = operator(direction)
        curvature = dot(direction, image)
        step = torch.where(curvature > 0, energy / torch.where(curvature > 0, curvature, 1.0), 0.0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        better = precondition(residual)
        last, energy = energy, dot(residual, better)
        look = done >= _FIRST_LOOK and (done - _FIRST_LOOK) % _LOOKS == 0
        if look and bool((energy <= tolerance**2 * first).all()):
            break
        direction.mul_(torch.where(last > 0, energy / torch.where(last > 0, last, 1.0), 0.0)).add_(better)
    return solution


class _Laplacian:
    r"""The system :math:`D - W` over the removed positions, the same stencil everywhere.

    With the sum over neighbours :math:`W = (S^{\otimes d} - 2^d) / (4^d - 2^d)`, where :math:`S` adds with the weights
    1, 2, 1 along an axis, nothing has to be stored.
    """

    def __init__(self, unknown: Tensor) -> None:
        self.unknown = unknown
        self.shape = unknown.shape[2:]
        self.itself, self.all = 2 ** len(self.shape), 4 ** len(self.shape)
        degree = self.neighbours(torch.ones_like(unknown[:1]))
        self.jacobi = unknown / (2 * _damping(self.shape) * degree)
        self._of_sum = unknown / (self.itself - self.all)
        self._of_itself = unknown * degree - self.itself * self._of_sum

    def neighbours(self, values: Tensor) -> Tensor:
        """Sum over each position's neighbours, weighted: (B, C, *spatial)."""
        return self._sum(values).sub_(values, alpha=self.itself).div_(self.all - self.itself)

    def __call__(self, values: Tensor) -> Tensor:
        """Apply the system to values that are 0 where nothing was removed."""
        return self._sum(values).mul_(self._of_sum).addcmul_(self._of_itself, values)

    def _sum(self, values: Tensor) -> Tensor:
        """Apply :math:`S` along each axis; nothing comes from beyond the border."""
        for axis, side in enumerate(self.shape, start=2):
            wider = 2 * values
            wider.narrow(axis, 1, side - 1).add_(values.narrow(axis, 0, side - 1))
            wider.narrow(axis, 0, side - 1).add_(values.narrow(axis, 1, side - 1))
            values = wider
        return values


class _Stencil:
    """A system with weights of its own at each position, for each neighbour: (B, 1, *spatial) by offset."""

    def __init__(self, weights: dict[tuple[int, ...], Tensor], shape: tuple[int, ...]) -> None:
        self.weights = weights
        self.shape = shape
        diagonal = weights[(0,) * len(shape)]
        # No eigenvalue of the scaled system exceeds 2, whatever the weights: Jacobi steps never make things worse.
        row = torch.stack([weight.abs() for weight in weights.values()]).sum(0)
        scale = torch.maximum(diagonal, max(_damping(shape), 0.55) * row)
        self.jacobi = torch.where(diagonal > 0, 1 / scale, 0.0)

    def __call__(self, values: Tensor) -> Tensor:
        """Apply the system."""
        padded = F.pad(values, [1, 1] * len(self.shape))
        result = torch.zeros_like(values)
        for offset, weight in self.weights.items():
            sides = zip(offset, self.shape, strict=True)
            moved: list[Any] = [slice(1 + shift, 1 + shift + side) for shift, side in sides]
            result.addcmul_(weight, padded[(..., *moved)])
        return result


class _Multigrid:
    """One V-cycle over systems that are each half as wide as the one before, down to a single position."""

    def __init__(self, finest: _Laplacian) -> None:
        self.unknown = finest.unknown
        self.systems: list[_Laplacian | _Stencil] = [finest]
        while max(self.systems[-1].shape) > 1:
            self.systems.append(self._coarser(len(self.systems) - 1))

    def __call__(self, residual: Tensor, level: int = 0) -> Tensor:
        """Return an approximate solution of a level's system for the right side ``residual``."""
        system = self.systems[level]
        solution = system.jacobi * residual
        if level == len(self.systems) - 1:
            return solution
        rest = system(solution).neg_().add_(residual)
        solution.add_(self._up(self(_down(rest), level + 1), level))
        rest = system(solution).neg_().add_(residual)
        return solution.addcmul_(system.jacobi, rest)

    def _up(self, values: Tensor, level: int) -> Tensor:
        finer = _up(values, self.systems[level].shape)
        return finer.mul_(self.unknown) if level == 0 else finer

    def _coarser(self, level: int) -> _Stencil:
        """Return the system of half the width: the finer one between interpolation and its transpose, found by probes.

        Positions three apart have no neighbour in common, so that one probe serves them all.
        """
        shape = tuple((side + 1) // 2 for side in self.systems[level].shape)
        periods = [min(side, 3) for side in shape]
        probes = self.unknown.new_zeros(1, *periods, *shape)
        for phase in itertools.product(*map(range, periods)):
            every_third: list[Any] = [slice(start, None, 3) for start in phase]
            probes[(0, *phase, *every_third)] = 1
        probes = probes.flatten(1, len(shape)).expand(len(self.unknown), *[-1] * (len(shape) + 1))
        answers = _down(self.systems[level](self._up(probes, level)))  # (B, probes, *shape)

        axes = [torch.arange(side, device=answers.device) for side in shape]
        weights = {}
        for offset in itertools.product((-1, 0, 1), repeat=len(shape)):
            probe = torch.zeros((), dtype=torch.long, device=answers.device)
            inside = torch.ones((), dtype=torch.bool, device=answers.device)
            for axis, (shift, side, period) in enumerate(zip(offset, shape, periods, strict=True)):
                place = (axes[axis] + shift).reshape(-1, *[1] * (len(shape) - 1 - axis))
                probe = probe * period + place % period
                inside = inside & (place >= 0) & (place < side)
            weights[offset] = answers.gather(1, probe.expand(len(answers), 1, *shape)) * inside
        return _Stencil(weights, shape)


def _damping(shape: tuple[int, ...]) -> float:
    """Return the share of a row's absolute sum to divide by: a line has higher frequencies to smooth than a plane."""
    return 0.75 if _is_line(shape) else 0.5


def _is_line(shape: Sequence[int]) -> bool:
    return sum(side > 1 for side in shape) <= 1


def _up(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate linearly: the values come to every other position, the last one also to a rest beyond it."""
    for axis in range(values.ndim - 1, 1, -1):
        side, count = shape[axis - 2], values.shape[axis]
        if side > 1:
            finer = values.new_empty(*values.shape[:axis], side, *values.shape[axis + 1 :])
            even, odd = (finer[(slice(None),) * axis + (slice(start, None, 2),)] for start in (0, 1))
            even.copy_(values)
            between = (values.narrow(axis, 0, count - 1) + values.narrow(axis, 1, count - 1)) / 2
            odd.narrow(axis, 0, count - 1).copy_(between)
            if odd.shape[axis] == count:
                odd.narrow(axis, -1, 1).copy_(values.narrow(axis, -1, 1))
            values = finer
    return values


def _down(values: Tensor) -> Tensor:
    """Apply the transpose of `_up`."""
    for axis in range(2, values.ndim):
        if values.shape[axis] > 1:
            even, odd = (values[(slice(None),) * axis + (slice(start, None, 2),)] for start in (0, 1))
            total, count = even.clone(), odd.shape[axis]
            rest = even.shape[axis] - 1
            total.narrow(axis, 0, count).add_(odd, alpha=0.5)
            total.narrow(axis, 1, rest).add_(odd.narrow(axis, 0, rest), alpha=0.5)
            if count > rest:
                total.narrow(axis, -1, 1).add_(odd.narrow(axis, -1, 1), alpha=0.5)
            values = total
    return values
