"""Checks of the target layers: positions, size and layout of their grids, constant activations, signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from torchcam._tensors import to_float
from torchcam.layers import Candidate
from torchcam.layout import AmbiguousLayoutError
from torchcam.methods._gradients import OTHER_SIGN, share_of_other_sign

from .facts import Facts
from .findings import Finding, finding


def check_positions(facts: Facts) -> Iterator[Finding]:
    """Check that the target layers' outputs have positions."""
    if facts.layout_error is not None:
        choice = facts.recorded.choice
        yield finding(
            "layout_ambiguous" if isinstance(facts.layout_error, AmbiguousLayoutError) else "no_positions",
            f"{facts.layout_error}.",
            "There is nothing to draw a map on." + (f" A layer with positions is '{choice}'." if choice else ""),
        )


def check_grids(facts: Facts) -> Iterator[Finding]:
    """Check that the grids of the target layers are fine enough."""
    for name, grid in facts.grids.items() if facts.recorded.reads_layers else ():
        shape = tuple(grid.shape[2:])
        if math.prod(shape) > 1 and _is_fine(shape):
            continue
        advice = "give the model a larger input, if it takes one."
        finer = _finer_layer(facts, shape)
        if finer is not None:
            advice = f"Name an earlier layer: '{finer.name}' has a grid of {_by(finer.grid)}. Or {advice}"
        one = math.prod(shape) == 1
        effect = ": one position cannot be higher than another" if one else ", a very coarse map"
        yield finding(
            "one_position" if one else "coarse_grid",
            f"the grid of '{name}' is {_by(shape)}{effect}.",
            advice[0].upper() + advice[1:],
            layer=name,
        )


def _is_fine(shape: Sequence[int]) -> bool:
    """Check whether a grid has four positions a side on average."""
    return bool(math.prod(shape[-2:]) >= 4 ** len(shape[-2:]))


def _finer_layer(facts: Facts, shape: Sequence[int]) -> Candidate | None:
    """Return the last layer with a fine grid of at least four times as many positions, a stage if there is one."""
    usable = [c for c in facts.recorded.candidates if c.depends and c.fits and _is_fine(c.grid)]
    finer = [c for c in usable if math.prod(c.grid[-2:]) >= 4 * math.prod(shape[-2:])]
    finer = [c for c in finer if c.is_stage] or finer
    return finer[-1] if finer else None


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def check_layouts(facts: Facts) -> Iterator[Finding]:
    """Check that grids are read along the right dimensions: a change of the input must change them at its place."""
    view = facts.repeated
    if facts.image is None or not facts.is_sound or not view.reads_layers:
        return
    by_layout = view.cam.reshape_transform is None
    for index, (name, activation) in enumerate(zip(view.names, view.activations, strict=True)):
        if activation is None:
            continue
        grid = view.to_grid(activation, name)
        if math.prod(grid.shape[2:]) == 1 or (by_layout and view.layout(activation, name).channels == 1):
            continue
        variants = [activations[index] for activations in facts.moved_activations]
        if _is_in_place(activation, variants, partial(view.to_grid, name=name)) is False:
            yield finding(
                "wrong_layout",
                f"the output of '{name}', {tuple(activation.shape)}, is read along the wrong dimensions: "
                f"{'the layout found is' if by_layout else '`reshape_transform` gives'} a grid of "
                f"{_by(grid.shape[2:])}, but where one half of the input is changed, the other half of that grid, or "
                "another side of it, changes most.",
                "Pass a `reshape_transform` to (N, C, *spatial).",
                layer=name,
            )


def _is_in_place(base: Tensor, variants: Sequence[Tensor | None], to_grid: Callable[[Tensor], Tensor]) -> bool | None:
    """Check whether a grid changes on the side where the input was changed.

    Args:
        base: the activation
        variants: the activations for inputs changed in the lower and in the upper half, along each axis in turn
        to_grid: the function to grid form

    Returns:
        None if the changes do not tell
    """
    grid = to_grid(base.detach())
    if 2 * (grid.ndim - 2) != len(variants):
        return None
    centres = []
    for variant in variants:
        if variant is None or variant.shape != base.shape:
            return None
        change = to_float(to_grid(variant.detach()) - grid).abs().sum((0, 1))  # (*spatial)
        if not 0 < float(change.sum()) < math.inf:
            return None
        centres.append(_centre(change))
    shifts = torch.stack(centres[1::2]) - torch.stack(centres[::2])  # (changed axis, axis of the grid)
    own = shifts.diagonal()
    others = (shifts - own.diag()).abs()
    if (own < -0.1).any() or ((others > 0.1) & (others > 2 * own.abs().unsqueeze(1))).any():
        return False
    wide = torch.tensor([side > 1 for side in grid.shape[2:]], device=own.device)
    return True if (own[wide] > 0.1).all() else None


def _centre(amount: Tensor) -> Tensor:
    """Return the centre of mass of (*spatial), between 0 and 1 along each axis."""
    places = [torch.linspace(0.5 / side, 1 - 0.5 / side, side).to(amount) for side in amount.shape]
    return torch.stack([(amount * place).sum() for place in torch.meshgrid(places, indexing="ij")]) / amount.sum()


def check_constant_activations(facts: Facts) -> Iterator[Finding]:
    """Check that some channel of each target layer varies over the positions."""
    for name, constant in facts.constant_activations.items():
        grid = facts.grids[name]
        zero = not grid[constant].any()
        cause = "an activation function that lets nothing through" if zero else "a pooling over all positions"
        yield finding(
            "activation_constant",
            f"each of the {grid.shape[1]} channels of '{name}' is {'0' if zero else 'the same'} everywhere, so "
            "the map is constant whatever the weights.",
            f"Look at what comes before it: {cause}, weights that are all 0, or an input that is blank.",
            layer=name,
            samples=constant,
        )


def check_activation_signs(facts: Facts) -> Iterator[Finding]:
    """Check that activations have one sign, where the method expects that."""
    for name, grid in facts.grids.items() if facts.recorded.cam._expects_one_sign else ():
        if name in facts.broken_activations:
            continue
        shares = share_of_other_sign(grid)
        if bool((shares > OTHER_SIGN).any()):
            yield finding(
                "both_signs",
                f"'{name}' has activations of both signs (the rarer one has {float(shares.max()):.0%} of the sum of "
                f"their sizes), but the weights of {facts.recorded.method} are meant for one: sums over positions "
                "cancel.",
                "HiResCAM, the sum of G_k A_k over the channels at each position, holds for both signs; behind a norm, "
                'with `gradients="balanced"`.',
                layer=name,
                samples=shares > OTHER_SIGN,
            )


CHECKS = (check_positions, check_grids, check_layouts, check_constant_activations, check_activation_signs)
