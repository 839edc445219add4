"""Statistics of batches of maps and scores, on their device: ranks, similarities, means."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcam._tensors import gaussian_blur, is_constant


def descending_ranks(maps: Tensor) -> Tensor:
    """Rank the positions of maps (N, *spatial), the highest 0; of equals, the first in memory ranks higher: (N, S)."""
    return maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1)


def energy(maps: Tensor, mask: Tensor) -> Tensor:
    """Return the share of maps (N, *spatial) inside masks of the same shape, (N,); NaN for maps of zeros."""
    return (maps * mask).flatten(1).sum(1) / maps.flatten(1).sum(1)


def relative_fall(fall: Tensor, score: Tensor) -> Tensor:
    """Return the positive part of a fall as a share of the score that falls; 0 where nothing falls."""
    fall = fall.relu()
    return torch.where(fall == 0, 0.0, fall / score.abs())


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Correlate maps (N, *spatial) over their positions, (N,) in [-1, 1]; 0 for a constant map."""
    x, y = first.flatten(1).double(), second.flatten(1).double()
    constant = is_constant(*first.flatten(1).aminmax(dim=1)) | is_constant(*second.flatten(1).aminmax(dim=1))
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    x, y = (z / torch.where(constant, 1.0, z.norm(dim=1)).unsqueeze(1) for z in (x, y))
    return torch.where(constant, 0.0 * (x + y).sum(1), (x * y).sum(1).clamp(-1, 1))


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlate the ranks of the positions in maps (N, *spatial), equals sharing their mean rank; (N,) in [-1, 1]."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(maps: Tensor) -> Tensor:
    flat = maps.flatten(1).contiguous()
    ordered = flat.sort(1).values
    lower, upper = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    broken = ~flat.isfinite().all(1, keepdim=True)
    return ((lower + upper).double() / 2).masked_fill(broken, torch.nan)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine between maps (N, *spatial), (N,): 1 if both are zero, 0 if only one is."""
    x, y = first.flatten(1).double(), second.flatten(1).double()
    norms = x.norm(dim=1), y.norm(dim=1)
    product = norms[0] * norms[1]
    both = (norms[0] == 0) & (norms[1] == 0)
    angle = (x * y).sum(1) / torch.where(product == 0, 1.0, product)
    return torch.where(both, 1.0, angle)


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    r"""Compare maps (N, *spatial) in [0, 1] by their mean SSIM (Wang et al. 2004), (N,) in [-1, 1].

    .. math::
        \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}{(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)},
        \qquad c_1 = 0.01^2, \quad c_2 = 0.03^2

    at each position, in a Gaussian window of 11 positions a side and standard deviation 1.5; borders are mirrored.
    """
    x, y = first.unsqueeze(1).double(), second.unsqueeze(1).double()
    mean_x, mean_y, xx, yy, xy = (gaussian_blur(z, 11, 1.5) for z in (x, y, x * x, y * y, x * y))
    covariance, variance = xy - mean_x * mean_y, xx - mean_x**2 + yy - mean_y**2
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return (luminance * (2 * covariance + 0.03**2) / (variance + 0.03**2)).flatten(1).mean(1)


def harmonic_mean(*values: Tensor) -> Tensor:
    """Return the harmonic mean of values of 0 and more; 0 if one of them is."""
    stacked = torch.stack([value.double() for value in values])
    positive = (stacked > 0) | stacked.isnan()
    inverse = (1 / torch.where(positive, stacked, 1.0)).sum(0)
    return torch.where(positive.all(0), len(values) / inverse, 0.0)
