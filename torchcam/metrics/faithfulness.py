"""Faithfulness of maps: the change of the score when the positions that they show, or the others, are removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, positive_integer

from ._imputation import impute
from ._statistics import descending_ranks, relative_fall
from .core import POSITIVE, UNBOUNDED, UNIT, Baseline, CAMMetric, Explained, Extractor, Keys, LogitsFn, check_seed


class ClassificationMetric(CAMMetric):
    r"""Change of a class score when the input is masked with the map of the class, or with the inverted map.

    With the map :math:`m_i` in [0, 1], upsampled to the input :math:`x_i`, and the score :math:`p` of the explained
    class, after ``logits_fn``:

    .. math::
        \text{avg\_drop} = \frac{1}{N} \sum_i \frac{\mathrm{ReLU}(p(x_i) - p(m_i \odot x_i))}{|p(x_i)|}, \qquad
        \text{conf\_increase} = \frac{1}{N} \sum_i [p(m_i \odot x_i) > p(x_i)]

    from Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063), there for probabilities. ``compute`` adds

    .. math::
        \text{avg\_gain} = \frac{1}{N} \sum_i \frac{\mathrm{ReLU}(p(m_i \odot x_i) - p(x_i))}{1 - p(x_i)}, \qquad
        \text{deletion\_drop} = \frac{1}{N} \sum_i \frac{\mathrm{ReLU}(p(x_i) - p((1 - m_i) \odot x_i))}{|p(x_i)|}

    A good map has a low ``avg_drop`` (0 or more) and a high ``conf_increase`` (0 to 1), ``avg_gain`` (0 to 1) and
    ``deletion_drop`` (0 or more); with probabilities no key exceeds 1. The gain is one of probabilities, 0 where
    :math:`p(x_i) = 1`: it is NaN once a score has been outside [0, 1], as logits are.

    A negative score falls, like a positive one, by a share of its absolute value. A score of 0 that does not fall has
    a drop of 0; one that falls has none, and its sample is left out. So is every sample whose map or scores are not
    finite: ``nan_count`` says how many, ``total`` how many are in the means.

    The metric is a :class:`torchmetrics.Metric`: it syncs across processes, moves with ``to``, and goes into a
    ``MetricCollection``, which prefixes the keys of two metrics of this class with their names there. Copies share the
    extractor. As the keys disagree, ``higher_is_better`` is None, and ``key_higher_is_better`` says it for each.

    Cost: for each batch a forward pass, what the extractor needs, and two forward passes.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; or a
            model, if every update is given ``maps``
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output. The map explains the score after it, but for methods that do not read the model's
            output: CAM reads its weights, LeGrad its blocks.
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        drop: the sum of the relative drops so far
        increase: the number of samples whose score rose so far
        gain: the sum of the relative gains so far
        deletion_drop: the sum of the relative drops in deletion so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if ``cam_extractor`` or ``logits_fn`` has another type than above

    Example:
        >>> from functools import partial
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = ClassificationMetric(extractor, partial(torch.softmax, dim=-1))
        ...     metric.update(torch.rand(2, 3, 224, 224))
        >>> sorted(metric.summary())
        ['avg_drop', 'conf_increase']
    """

    _keys: ClassVar[Keys] = {
        "avg_drop": ("drop", False, POSITIVE),
        "conf_increase": ("increase", True, UNIT),
        "avg_gain": ("gain", True, UNIT),
        "deletion_drop": ("deletion_drop", True, POSITIVE),
    }
    _more_sums = ("out_of_range",)
    _masks_with_maps = True
    _summary_keys = ("avg_drop", "conf_increase")

    def __init__(self, cam_extractor: Extractor | nn.Module, logits_fn: LogitsFn | None = None, **kwargs: Any) -> None:
        super().__init__(cam_extractor, logits_fn, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return ``avg_drop``, ``conf_increase``, ``avg_gain`` and ``deletion_drop`` of the samples so far."""
        means = super().compute()
        means["avg_gain"] = torch.where(self.out_of_range > 0, torch.nan, means["avg_gain"])
        return means

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        score = explained.score
        kept, deleted = explained.replay(masking(explained), 2, batch_size=len(score)).unbind(1)
        rise = (kept - score).relu()
        scores = torch.stack([score, kept])
        return {
            "drop": relative_fall(score - kept, score),
            "increase": (kept > score).to(score),
            "gain": torch.where(score < 1, rise / (1 - score), 0.0),
            "deletion_drop": relative_fall(score - deleted, score),
            "out_of_range": ((scores - 0.5).abs() > 0.5 + 1e-3).any(0).to(score),  # but for float rounding
        }


class DeletionInsertionMetric(CAMMetric):
    r"""Areas under the score curve while the positions that a map ranks highest are removed, or revealed.

    From RISE (Petsiuk et al. 2018, arXiv:1806.07421). The positions of the input are ranked by the map, upsampled to
    its size; of equals, the first in memory ranks higher. With :math:`x_k` the input whose :math:`k` highest-ranked
    positions (all channels) are replaced by the baseline, :math:`\bar x_k` the baseline whose :math:`k` highest-ranked
    positions are the input's, and :math:`p` the score of the explained class, after ``logits_fn``:

    .. math::
        \text{deletion\_auc} = \int_0^1 p(x_{f |S|})\, df, \qquad
        \text{insertion\_auc} = \int_0^1 p(\bar x_{f |S|})\, df

    by the trapezoidal rule, at the fractions :math:`f = k / |S|` for :math:`k = 0, s, 2s, \ldots, |S|` with
    :math:`s = \lceil |S| / \mathrm{steps} \rceil`: equally spaced, but for the last interval where :math:`s` does not
    divide :math:`|S|`. The curves are not divided by :math:`p(x)`; with probabilities both areas lie in [0, 1]. A good
    map has a low ``deletion_auc`` and a high ``insertion_auc``.

    Samples whose map or scores are not finite are left out: ``nan_count`` says how many, ``total`` how many are in the
    means.

    The metric is a :class:`torchmetrics.Metric`: it syncs across processes, moves with ``to``, and goes into a
    ``MetricCollection``, which prefixes the keys of two metrics of this class with their names there. Copies share the
    extractor. As the keys disagree, ``higher_is_better`` is None, and ``key_higher_is_better`` says it for each.

    Cost: for each batch a forward pass, what the extractor needs, and ``2 * steps - 1`` inputs per sample in chunks of
    ``batch_size``; the curves share both their ends.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; or a
            model, if every update is given ``maps``
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output. The map explains the score after it, but for methods that do not read the model's
            output: CAM reads its weights, LeGrad its blocks.
        steps: largest number of intervals
        baseline: what a removed position becomes: a tensor that broadcasts to the input, or a function of the input
            (say, a blur); by default 0
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        deletion: the sum of the areas under the deletion curves so far
        insertion: the sum of the areas under the insertion curves so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``steps`` or ``batch_size`` is not positive

    Example:
        >>> from functools import partial
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = DeletionInsertionMetric(extractor, partial(torch.softmax, dim=-1), steps=4)
        ...     metric.update(torch.rand(2, 3, 224, 224))
        >>> sorted(metric.summary())
        ['deletion_auc', 'insertion_auc']
    """

    _keys: ClassVar[Keys] = {
        "deletion_auc": ("deletion", False, UNBOUNDED),
        "insertion_auc": ("insertion", True, UNBOUNDED),
    }

    def __init__(
        self,
        cam_extractor: Extractor | nn.Module,
        logits_fn: LogitsFn | None = None,
        *,
        steps: int = 20,
        baseline: Baseline | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        if not (baseline is None or isinstance(baseline, Tensor) or callable(baseline)):
            raise TypeError(f"`baseline` must be a tensor, a callable or None, got {baseline!r}")
        super().__init__(cam_extractor, logits_fn, {"baseline": baseline}, **kwargs)
        self.steps = positive_integer("steps", steps)
        self.batch_size = positive_integer("batch_size", batch_size)

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        image, score = explained.image, explained.score.unsqueeze(1)
        baseline = self._baseline_of(image)
        positions = image[0, 0].numel()
        counts = [*range(0, positions, math.ceil(positions / self.steps)), positions]
        inner = len(counts) - 2
        # The input is visible at ranks from `first` to `last` - 1: deletion, the bare baseline, insertion. The ends
        # that are the input itself have its score.
        first, last = counts[1:] + [0] * inner, [positions] * (inner + 1) + counts[1:-1]
        visible = _ranked_between(explained.cam, first, last)

        def perturbed(samples: Tensor, variants: Tensor) -> Tensor:
            return torch.where(visible(samples, variants).unsqueeze(1), image[samples], baseline[samples])

        scores = explained.replay(perturbed, len(first), self.batch_size)
        removed, bare, added = scores[:, :inner], scores[:, inner : inner + 1], scores[:, inner + 1 :]
        fractions = torch.tensor(counts, device=scores.device).to(scores) / positions
        return {
            "deletion": torch.trapezoid(torch.cat([score, removed, bare], 1), fractions),
            "insertion": torch.trapezoid(torch.cat([bare, added, score], 1), fractions),
        }

    def _baseline_of(self, image: Tensor) -> Tensor:
        """Return the baseline of each input, shaped like it."""
        if self.baseline is None:
            return torch.zeros_like(image)
        baseline = self.baseline if isinstance(self.baseline, Tensor) else self.baseline(image)
        if not isinstance(baseline, Tensor):
            raise TypeError(f"`baseline` must return a tensor, got {type(baseline).__name__}")
        try:
            return baseline.detach().to(image).expand_as(image)
        except RuntimeError:
            raise ValueError(
                f"`baseline` of shape {tuple(baseline.shape)} does not broadcast to the input's {tuple(image.shape)}"
            ) from None


class ROAD(CAMMetric):
    r"""Change of the score when the positions that a map ranks highest, or lowest, are imputed from the others.

    From ROAD, remove and debias (Rong et al. 2022, arXiv:2202.00449). A removed position is replaced by the weighted
    mean of its neighbours, removed or not (direct neighbours 1/6, diagonal ones 1/12, more at the border in
    proportion), plus Gaussian noise: so neither the values nor the shape of what was removed tell the model much, as a
    black patch would. With :math:`x^{+}_{q}` and :math:`x^{-}_{q}` the input :math:`x` whose :math:`q` percent of the
    positions that the map ranks highest and lowest are replaced, and :math:`p` the score of the explained class, after
    ``logits_fn``:

    .. math::
        \text{morf} = \operatorname{mean}_q \, p(x^{+}_{q}) - p(x), \qquad
        \text{lerf} = \operatorname{mean}_q \, p(x^{-}_{q}) - p(x), \qquad
        \text{road} = \tfrac{1}{2} (\text{lerf} - \text{morf})

    A good map has a low ``morf`` (most relevant first) and a high ``lerf`` (least relevant first) and ``road``; a
    random one has a ``road`` of 0. With probabilities the first two lie in [-1, 1], ``road`` in [-0.5, 0.5].

    Exactly :math:`\lfloor q |S| / 100 \rfloor` of the positions :math:`S` of the input are replaced: of equals, the
    first in memory rank higher. The noise is drawn once for each percentile and order, and is the same for every
    sample, so that the result depends neither on the batches nor on the number of processes.

    Samples whose map or scores are not finite are left out: ``nan_count`` says how many, ``total`` how many are in the
    means.

    Cost: for each batch a forward pass, what the extractor needs, and two inputs per sample and percentile in chunks of
    ``batch_size``. Each chunk is imputed in one batched solve on its device, which costs about as much as a pass of a
    small network.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; or a
            model, if every update is given ``maps``
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        percentiles: the shares of positions to replace, in percent, each above 0 and below 100
        noise: the standard deviation of the noise, in the units of the input
        seed: the seed of the noise
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        morf: the sum of the changes so far, most relevant first
        lerf: the sum of the changes so far, least relevant first
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a percentile, ``noise`` or ``batch_size`` is out of range

    Example:
        >>> from functools import partial
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = ROAD(extractor, partial(torch.softmax, dim=-1), percentiles=(50,))
        ...     metric.update(torch.rand(2, 3, 64, 64))
        >>> sorted(metric.summary())
        ['lerf', 'morf', 'road']
    """

    _keys: ClassVar[Keys] = {
        "morf": ("morf", False, UNBOUNDED),
        "lerf": ("lerf", True, UNBOUNDED),
        "road": ("", True, UNBOUNDED),
    }

    def __init__(
        self,
        cam_extractor: Extractor | nn.Module,
        logits_fn: LogitsFn | None = None,
        *,
        percentiles: Sequence[float] = (20, 40, 60, 80),
        noise: float = 0.01,
        seed: int = 0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(cam_extractor, logits_fn, **kwargs)
        vars(self).update(removal_options(percentiles, noise, seed))
        self.batch_size = positive_integer("batch_size", batch_size)

    def compute(self) -> dict[str, Tensor]:
        """Return ``morf``, ``lerf`` and ``road`` of the samples so far."""
        means = super().compute()
        return {**means, "road": (means["lerf"] - means["morf"]) / 2}

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        morf, lerf = changes_by_removal(explained, self.percentiles, self.noise, self.seed, self.batch_size)
        return {"morf": morf, "lerf": lerf}


def masking(explained: Explained) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from the numbers of samples and variants, (B,) each, to inputs multiplied by their maps.

    The maps are inverted for variant 1.
    """
    image, mask = explained.image, explained.cam.unsqueeze(1).to(explained.image.dtype)

    def masked(samples: Tensor, variants: Tensor) -> Tensor:
        m = mask[samples]
        inverted = (variants == 1).reshape(-1, *[1] * (m.ndim - 1))
        return torch.where(inverted, 1 - m, m) * image[samples]

    return masked


def _ranked_between(cam: Tensor, first: list[int], last: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from the numbers of samples and variants, (B,) each, to masks (B, *spatial).

    Those of variant v hold the positions that the map ranks from ``first[v]`` to ``last[v] - 1``.
    """
    ranks = descending_ranks(cam).reshape(cam.shape)
    bounds = torch.tensor([first, last], device=cam.device).reshape(2, -1, *[1] * (cam.ndim - 1))

    def mask(samples: Tensor, variants: Tensor) -> Tensor:
        rank, (lowest, end) = ranks[samples], bounds[:, variants]
        inside: Tensor = (rank >= lowest) & (rank < end)
        return inside

    return mask


def removal_options(percentiles: Sequence[float], noise: float, seed: int) -> dict[str, Any]:
    """Check what ROAD takes: the shares of positions to replace, and the standard deviation and seed of the noise.

    Raises:
        TypeError: if the percentiles or ``noise`` are not numbers, or the seed is not an integer
        ValueError: if a percentile is not above 0 and below 100, ``noise`` is negative or not finite, or no generator
            takes the seed
    """
    listed = percentiles.tolist() if hasattr(percentiles, "tolist") else percentiles
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise TypeError(f"`percentiles` must be a sequence of numbers, such as (20, 40), got {percentiles!r}")
    shares = tuple(finite_number("percentiles", percentile) for percentile in listed)
    if not shares or not all(0 < percentile < 100 for percentile in shares):
        raise ValueError(
            f"`percentiles` must be shares above 0 and below 100 percent, as something must be left to impute "
            f"from, got {percentiles!r}"
        )
    return {"percentiles": shares, "noise": finite_number("noise", noise, lowest=0), "seed": check_seed(seed)}


def changes_by_removal(
    explained: Explained, percentiles: Sequence[float], std: float, seed: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return the mean change of each sample's score, most and least relevant positions first: (N,) each."""
    image = explained.image
    positions = image[0, 0].numel()
    counts = [math.floor(percentile * positions / 100 + 1e-9) for percentile in percentiles]
    first = [0] * len(counts) + [positions - count for count in counts]
    to_remove = _ranked_between(explained.cam, first, counts + [positions] * len(counts))
    # Drawn where it comes out the same for every device.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(first), *image.shape[1:]), generator=generator).to(image) * std

    def imputed(samples: Tensor, variants: Tensor) -> Tensor:
        removed = to_remove(samples, variants)
        filled = impute(image[samples], removed)
        return torch.where(removed.unsqueeze(1), filled + noise[variants], filled)

    scores = explained.replay(imputed, len(first), batch_size)
    morf, lerf = (scores - explained.score.unsqueeze(1)).chunk(2, dim=1)
    return morf.mean(1), lerf.mean(1)
