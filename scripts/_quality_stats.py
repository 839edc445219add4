"""How sure a mean over pictures is, and how much two rankings of methods agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]

__all__ = ["bootstrap_means", "group_means", "interval", "interval_of_mean", "rank_agreement", "spearman"]

Values = np.ndarray[Any, np.dtype[np.float64]]


def group_means(values: Values, groups: np.ndarray[Any, Any]) -> Values:
    """Average the rows of each group, (G,): rows about one picture are one observation. NaN is left out."""
    _, index = np.unique(groups, return_inverse=True)
    known = ~np.isnan(values)
    sums = np.bincount(index, np.where(known, values, 0.0))
    counts = np.bincount(index, known)
    means: Values = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def bootstrap_means(values: Values, num_resamples: int, seed: int) -> Values:
    """Draw as many values as there are, with replacement, and average them: (num_resamples,). NaN is left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.full(num_resamples, np.nan)
    # How often each value is drawn is all that a mean depends on.
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), num_resamples)
    means: Values = counts @ values / len(values)
    return means


def interval(values: Values, num_resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % percentile bootstrap interval."""
    if np.isnan(values).all():
        return np.nan, np.nan, np.nan
    low, high = np.percentile(bootstrap_means(values, num_resamples, seed), [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high)


def interval_of_mean(several: Sequence[Values], num_resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the mean of several means over different pictures, and the ends of its 95 % bootstrap interval."""
    drawn = np.mean([bootstrap_means(values, num_resamples, seed + k) for k, values in enumerate(several)], axis=0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.mean([np.nanmean(values) for values in several])), float(low), float(high)


def spearman(a: Values, b: Values) -> Values:
    """Return the rank correlation of the last axes of two arrays; equals share a rank. NaN where one does not vary."""
    x, y = (rankdata(part, axis=-1) for part in (a, b))
    x, y = (part - part.mean(-1, keepdims=True) for part in (x, y))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    with np.errstate(invalid="ignore"):
        rho: Values = np.where(scale > 0, (x * y).sum(-1) / scale, np.nan)
    return rho


def rank_agreement(a: list[Values], b: list[Values], num_resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the rank correlation of two scores over methods, and its 95 % bootstrap interval.

    What is drawn with replacement are the pictures behind each method's means, and then the methods.

    Args:
        a: each method's values of one score, one for each picture
        b: each method's values of the other
        num_resamples: how often to draw
        seed: decides what is drawn
    """
    rng = np.random.default_rng(seed)
    seeds = rng.integers(2**31, size=2)  # the same pictures for all methods that were asked about as many
    means = [np.array([np.nanmean(values) for values in score]) for score in (a, b)]
    drawn = [
        np.stack([bootstrap_means(values, num_resamples, int(start)) for values in score], axis=1)
        for score, start in zip((a, b), seeds, strict=True)
    ]
    chosen = rng.integers(len(a), size=(num_resamples, len(a)))
    replicates = spearman(*(np.take_along_axis(score, chosen, axis=1) for score in drawn))
    rho = float(spearman(*means))
    if np.isnan(rho):
        return np.nan, np.nan, np.nan
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return rho, float(low), float(high)
