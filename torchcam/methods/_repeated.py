"""Scores that must come again when a model runs again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchcam.targets import Selector

from ._running import warn

TF32 = 2**-10  # the rounding of what a GPU may compute float32 in
_SAME_IN_TRAINING = frozenset({nn.Linear, nn.Conv2d, nn.ReLU, nn.Identity, nn.Sequential})  # of a head that is new


def recorded_scores(modules: Iterable[nn.Module], output: Any, select: Selector) -> Tensor | None:
    """Return the scores that were recorded, (N,); None if they are not known, or of training mode."""
    if output is None or any(one.training and type(one) not in _SAME_IN_TRAINING for one in modules):
        return None
    return select(output)


def is_repeated(found: Tensor, expected: Tensor) -> bool:
    """Check whether another pass has given the same scores, by kernels that may be others."""
    return is_close(found, expected, TF32 if found.is_cuda else 0.0)


def is_close(found: Tensor, expected: Tensor, eps: float = 0.0) -> bool:
    """Check whether numbers are the same, up to what another order of the same operations makes of them."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = max(eps, torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps) ** 0.5
    if expected.numel() == 1 and math.isclose(found.item(), expected.item(), rel_tol=tolerance):
        return True
    scale = torch.where(expected.isfinite(), expected.abs(), 0.0).amax() if expected.numel() else 0.0
    near = (found == expected) | ((found - expected).abs() <= tolerance * scale)
    return bool((near | (found.isnan() & expected.isnan())).all())


def warn_unless_repeated(extractor: Any, found: Tensor, expected: Tensor | None) -> None:
    """Warn if the scores of a repeated pass are not those that were recorded, unless these are not known."""
    if expected is not None and not is_repeated(found.detach(), expected):
        warn(
            f"{type(extractor).__name__} explains the model as it runs again, but its scores are not those of the "
            "recorded pass: it draws random numbers, or its weights or arguments have changed since",
            stacklevel=3,
        )
