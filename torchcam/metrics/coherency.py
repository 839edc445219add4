"""ADCC and ARCC: coherency, complexity and faithfulness of maps in one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from torchcam._checks import positive_integer

from ._statistics import harmonic_mean, pearson, relative_fall
from .core import POSITIVE, UNBOUNDED, UNIT, CAMMetric, Explained, Extractor, Keys, LogitsFn
from .faithfulness import changes_by_removal, masking, removal_options


class _CoherencyMetric(CAMMetric):
    """The base class of metrics that compare the map of an input with that of the masked input."""

    _explains_again = True
    _masks_with_maps = True

    def __init__(
        self, cam_extractor: Extractor, logits_fn: LogitsFn | None = None, *, batch_size: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(cam_extractor, logits_fn, **kwargs)
        self.batch_size = positive_integer("batch_size", batch_size)

    def compute(self) -> dict[str, Tensor]:
        """Return the means over the samples so far, in all processes; NaN if there are none."""
        means = super().compute()
        _, of_means, coherency, complexity, change = self._keys
        faithfulness = self._faithfulness(means[change])
        means[of_means] = harmonic_mean(means[coherency], 1 - means[complexity], faithfulness)
        return {key: means[key] for key in self._keys}

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        def alike(again: Tensor, samples: Tensor, _variants: Tensor) -> Tensor:
            return (pearson(again, explained.cam[samples]) + 1) / 2

        coherency = explained.explain_again(masking(explained), alike, 1, self.batch_size).squeeze(1)
        complexity = explained.cam.abs().flatten(1).mean(1)
        change = self._change(explained)
        joined = harmonic_mean(coherency, 1 - complexity, self._faithfulness(change))
        sums = [state for state, *_ in self._keys.values() if state]
        return dict(zip(sums, (joined, coherency, complexity, change), strict=True))

    def _change(self, explained: Explained) -> Tensor:
        """Return how much each sample's score changes with what the map shows, (N,)."""
        raise NotImplementedError

    @staticmethod
    def _faithfulness(change: Tensor) -> Tensor:
        """Return such a change as a number in [0, 1], of which more is better."""
        raise NotImplementedError


class ADCC(_CoherencyMetric):
    r"""Average DCC (Poppi et al. 2021, arXiv:2104.10252): drop, coherency and complexity in one number.

    With the map :math:`m` in [0, 1], upsampled to the input :math:`x`, the score :math:`p` of the explained class,
    after ``logits_fn``, and :math:`\mathrm{CAM}` the extractor:

    .. math::
        \text{coherency} = \frac{\operatorname{pearson}(\mathrm{CAM}(m \odot x), m) + 1}{2}, \qquad
        \text{complexity} = \operatorname{mean} |m|, \qquad
        \text{avg\_drop} = \frac{\mathrm{ReLU}(p(x) - p(m \odot x))}{|p(x)|}

    .. math::
        \text{adcc} = 3 \left( \frac{1}{\text{coherency}} + \frac{1}{1 - \text{complexity}} +
        \frac{1}{1 - \text{avg\_drop}} \right)^{-1}

    ``compute`` gives the mean over the images of each; ``adcc`` is the mean of their harmonic means, and
    ``adcc_of_means`` the harmonic mean of the three means, as the authors' tables have it. All lie in [0, 1], as long
    as the scores are probabilities: pass a softmax as ``logits_fn``. A drop of 1 or more makes ``adcc`` 0. Nothing
    correlates with a constant map, whose coherency is thus 1/2.

    A good map has a high ``adcc``, ``adcc_of_means`` and ``coherency``, and a low ``complexity`` and ``avg_drop``.

    Samples whose maps or scores are not finite are left out: ``nan_count`` says how many, ``total`` how many are in
    the means.

    Cost: for each batch a forward pass and what the extractor needs, the same again, and one forward pass.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; a
            model and given maps are not enough, as masked inputs are explained as well
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        adcc: the sum of the harmonic means so far
        coherency: the sum of the coherencies so far
        complexity: the sum of the complexities so far
        drop: the sum of the relative drops so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type, or there is no extractor
        ValueError: if ``batch_size`` is not positive

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = ADCC(extractor, partial(torch.softmax, dim=-1))
        ...     metric.update(torch.rand(2, 3, 64, 64))
        >>> sorted(metric.summary())
        ['adcc', 'adcc_of_means', 'avg_drop', 'coherency', 'complexity']
    """

    _keys: ClassVar[Keys] = {
        "adcc": ("adcc", True, UNIT),
        "adcc_of_means": ("", True, UNIT),
        "coherency": ("coherency", True, UNIT),
        "complexity": ("complexity", False, UNIT),
        "avg_drop": ("drop", False, POSITIVE),
    }

    def _change(self, explained: Explained) -> Tensor:
        kept = explained.replay(masking(explained), 1, self.batch_size).squeeze(1)
        return relative_fall(explained.score - kept, explained.score)

    @staticmethod
    def _faithfulness(change: Tensor) -> Tensor:
        return 1 - change


class ARCC(_CoherencyMetric):
    r"""ROAD, coherency and complexity in one number (arXiv:2605.14641): ADCC with a drop that is not one of masking.

    With coherency and complexity as in :class:`ADCC`, and ``road`` as in :class:`~torchcam.metrics.ROAD`, that is half
    the change of the score when the least relevant positions are imputed, less that when the most relevant ones are:

    .. math::
        \text{arcc} = 3 \left( \frac{1}{\text{coherency}} + \frac{1}{1 - \text{complexity}} +
        \frac{1}{\operatorname{clip}(2\, \text{road}, 0, 1)} \right)^{-1}

    ``compute`` gives the mean over the images of each: ``arcc`` is the mean of their harmonic means, which is 0 for an
    image whose ``road`` is not positive, and ``arcc_of_means`` the harmonic mean of the three means. All but ``road``
    lie in [0, 1]. The scores should be probabilities: pass a softmax as ``logits_fn``.

    A good map has a high ``arcc``, ``arcc_of_means``, ``coherency`` and ``road``, and a low ``complexity``.

    Samples whose maps or scores are not finite are left out: ``nan_count`` says how many, ``total`` how many are in
    the means.

    Cost: for each batch a forward pass and what the extractor needs, the same again, and that of ROAD.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; a
            model and given maps are not enough, as masked inputs are explained as well
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        percentiles: the shares of positions to replace, in percent, each above 0 and below 100
        noise: the standard deviation of the noise, in the units of the input
        seed: the seed of the noise
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        arcc: the sum of the harmonic means so far
        coherency: the sum of the coherencies so far
        complexity: the sum of the complexities so far
        road: the sum of the changes by ROAD so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type, or there is no extractor
        ValueError: if a percentile, ``noise`` or ``batch_size`` is out of range

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = ARCC(extractor, partial(torch.softmax, dim=-1), percentiles=(50,))
        ...     metric.update(torch.rand(2, 3, 64, 64))
        >>> sorted(metric.summary())
        ['arcc', 'arcc_of_means', 'coherency', 'complexity', 'road']
    """

    _keys: ClassVar[Keys] = {
        "arcc": ("arcc", True, UNIT),
        "arcc_of_means": ("", True, UNIT),
        "coherency": ("coherency", True, UNIT),
        "complexity": ("complexity", False, UNIT),
        "road": ("road", True, UNBOUNDED),
    }

    def __init__(
        self,
        cam_extractor: Extractor,
        logits_fn: LogitsFn | None = None,
        *,
        percentiles: Sequence[float] = (20, 40, 60, 80),
        noise: float = 0.01,
        seed: int = 0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(cam_extractor, logits_fn, batch_size=batch_size, **kwargs)
        vars(self).update(removal_options(percentiles, noise, seed))

    def _change(self, explained: Explained) -> Tensor:
        morf, lerf = changes_by_removal(explained, self.percentiles, self.noise, self.seed, self.batch_size)
        return (lerf - morf) / 2

    @staticmethod
    def _faithfulness(change: Tensor) -> Tensor:
        return (2 * change).clamp(0, 1)
