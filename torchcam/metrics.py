"""How faithful maps are to the model they explain, over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ._passes import EVERYONE, untouched
from ._tensors import resize, to_float
from .methods._replay import forwards_replaced, positive_integer, run_chunks
from .methods.core import _CAM, plain_tensors
from .targets import ClassIndex, OutputTarget, Selector, check_one_of, read_logits

__all__ = ["ClassificationMetric", "DeletionInsertionMetric"]

Baseline = Tensor | Callable[[Tensor], Tensor]
Variant = Callable[[Tensor, Tensor], Tensor]


class Extractor(Protocol):
    """What a metric asks of an extractor."""

    @property
    def model(self) -> nn.Module:
        """The model that it watches."""

    @property
    def fuse_cams(self) -> Callable[..., Tensor]:
        """Fuses the maps of several layers: from a list of maps (N, *spatial) to one."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Give the maps of the last forward pass for ``(class_idx, scores)``, or for ``scores=`` and ``targets=``."""


class _Subject:
    """What a metric is about: nothing that ``nn.Module`` should take for a part of the metric.

    Copies of a metric share it, as a copied extractor would watch no model. A pickle leaves the extractor out, whose
    hooks are on a model of this process.
    """

    def __init__(self, cam_extractor: Extractor | None, logits_fn: Callable[[Any], Any] | None, baseline: Any) -> None:
        self.cam_extractor = cam_extractor
        self.logits_fn = logits_fn
        self.baseline = baseline

    def __deepcopy__(self, memo: dict[int, Any]) -> _Subject:
        return self

    def __reduce__(self) -> tuple[type[_Subject], tuple[Any, ...]]:
        return _Subject, (None, self.logits_fn, self.baseline)


@dataclass
class _Explained:
    """A batch of inputs with their maps and explained scores.

    Attributes:
        model: the model, whose output is the scores
        image: the inputs, (N, C, *spatial)
        cam: one map per sample, of the input's size, (N, *spatial)
        score: the explained scores of the inputs, (N,)
        select: reads the explained score off the model's output
        valid: the samples whose map and scores are all finite, (N,)
    """

    model: nn.Module
    image: Tensor
    cam: Tensor
    score: Tensor
    select: Selector
    valid: Tensor

    def replay(self, variant: Variant, num_variants: int, batch_size: int) -> Tensor:
        """Score variants of the inputs, no more than ``batch_size`` of them in memory at a time.

        Args:
            variant: builds inputs (B, C, *spatial) from the numbers of the samples and of their variants, (B,) each
            num_variants: the number of variants V of each sample
            batch_size: largest number of inputs in one pass

        Returns:
            the scores, (N, V)
        """
        rows = torch.arange(len(self.image) * num_variants, device=self.image.device)
        samples, variants = rows.div(num_variants, rounding_mode="floor"), rows % num_variants

        def evaluate(chunk: slice) -> Tensor:
            return self.select(self.model(variant(samples[chunk], variants[chunk])), samples[chunk])

        with untouched(self.model), torch.inference_mode():
            scores = torch.cat(run_chunks(evaluate, len(rows), batch_size))
        scores = to_float(scores.clone()).reshape(-1, num_variants)
        self.valid = self.valid & scores.isfinite().all(1)
        return scores


class _CAMMetric(Metric):
    """What the metrics of an extractor share: the explained pass, the sums over samples, the summary.

    A subclass names the sums it keeps in ``_sums``, gives each sample's part of them in ``_measure``, and the means in
    ``compute``. Every sum is a state of its own, float64, as are ``total`` and ``nan_count``, the numbers of samples
    that were summed and that were left out.
    """

    is_differentiable = False
    higher_is_better = None  # the keys of one metric do not agree: see `key_higher_is_better`
    full_state_update = False

    key_higher_is_better: ClassVar[dict[str, bool]]
    _sums: ClassVar[tuple[str, ...]]
    _summary_keys: ClassVar[tuple[str, ...]]

    total: Tensor
    nan_count: Tensor

    def __init__(
        self,
        cam_extractor: Extractor,
        logits_fn: Callable[[Any], Any] | None,
        baseline: Baseline | None = None,
        **kwargs: Any,
    ) -> None:
        missing = [name for name in ("model", "fuse_cams", "__call__") if not hasattr(cam_extractor, name)]
        if missing:
            raise TypeError(
                f"`cam_extractor` must have a `model`, be callable and have `fuse_cams`: "
                f"{type(cam_extractor).__name__} lacks {', '.join(missing)}"
            )
        if logits_fn is not None and not callable(logits_fn):
            raise TypeError(f"`logits_fn` must be callable or None, got {logits_fn!r}")
        super().__init__(**kwargs)
        self._subject = _Subject(cam_extractor, logits_fn, baseline)
        for name in self._sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("total", "nan_count"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # A `MetricCollection` updates only one of several metrics whose states were equal once. Chance can make them
        # equal for different extractors, so this state is not even equal to itself.
        self.add_state("_unlike_any", torch.tensor(torch.nan), dist_reduce_fx="sum")

    @property
    def cam_extractor(self) -> Extractor:
        """The extractor whose maps are measured.

        Raises:
            RuntimeError: if the metric comes from a pickle, which holds no extractor
        """
        if self._subject.cam_extractor is None:
            raise RuntimeError(
                f"this {type(self).__name__} was unpickled and has no extractor: it can compute and be merged, but not "
                "be updated; make a new one with an extractor, and `merge_state` this one into it"
            )
        return self._subject.cam_extractor

    @property
    def logits_fn(self) -> Callable[[Any], Any] | None:
        """What is applied to the model's output before a score is read off it."""
        return self._subject.logits_fn

    def update(
        self,
        input_tensor: Tensor,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> None:
        """Explain a batch of inputs, and add its part to the sums.

        The model runs in evaluation mode and is left as it was. So is an extractor of this library: the pass that it
        has recorded stays its own, and it may be disabled.

        Args:
            input_tensor: the model's input, (N, C, *spatial) with 1, 2 or 3 spatial dimensions
            class_idx: the class to explain, for the whole batch or one per sample; by default the predicted one
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output, after
                ``logits_fn``, to a scalar

        Raises:
            TypeError: if the input is not a floating-point tensor, or a class index not an integer
            ValueError: if the input has no samples or no positions, both ``class_idx`` and ``targets`` are given, a
                class does not exist, or there is not one per sample or one map per sample
        """
        _check_input(input_tensor)
        if class_idx is not None:
            check_one_of(class_idx, targets)
        model = self.cam_extractor.model
        with plain_tensors():
            # For this long, `logits_fn` is a part of the model: whatever reads its output explains what follows it.
            with forwards_replaced({} if self.logits_fn is None else {model: self._with_logits_fn}):
                explained = self._explain(model, input_tensor.detach(), class_idx, targets)
                parts = self._measure(explained)
            valid = explained.valid & torch.stack(list(parts.values())).isfinite().all(0)
            sums = {name: torch.where(valid, part, 0.0).sum() for name, part in parts.items()}
        for name, value in {**sums, "total": valid.sum(), "nan_count": (~valid).sum()}.items():
            state = getattr(self, name)
            # Not in place: a state may be a tensor of inference mode.
            setattr(self, name, state + value.to(state.device).to(state.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Give the means over the samples so far, in all processes; NaN if there are none."""
        raise NotImplementedError(f"{type(self).__name__} does not define its means")

    def summary(self) -> dict[str, float]:
        """Give the metric's main means over the samples so far, in all processes.

        Raises:
            AssertionError: if no sample was measured
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            total, left_out = int(self.total), int(self.nan_count)
            means = type(self).compute(self)
        if not total:
            why = f"; all {left_out} samples were left out, their maps or scores not finite" if left_out else ""
            raise AssertionError(f"you need to update the metric before getting the summary{why}")
        return {key: float(means[key]) for key in self._summary_keys}

    def _measure(self, explained: _Explained) -> dict[str, Tensor]:
        """Give each sample's part of the sums, (N,) each; a sample with any that is not finite is left out."""
        raise NotImplementedError(f"{type(self).__name__} does not define what it measures")

    def _with_logits_fn(self, _model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        logits_fn = self.logits_fn

        def scores(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            return output if logits_fn is None else logits_fn(output)

        return scores

    def _explain(
        self,
        model: nn.Module,
        image: Tensor,
        class_idx: ClassIndex | None,
        targets: OutputTarget | Sequence[OutputTarget] | None,
    ) -> _Explained:
        extractor = self.cam_extractor
        with _watched(extractor):
            if torch.is_grad_enabled() and image.is_inference():
                image = image.clone()  # no graph can hold on to it as it is
            output = model(image)
            if class_idx is None and targets is None:
                class_idx = _predicted(read_logits(output)).tolist()
            select = Selector(class_idx, targets, len(image))
            with torch.no_grad():
                score = to_float(select(output).detach())
            maps = extractor(class_idx, output) if targets is None else extractor(scores=output, targets=targets)
            fused = to_float(extractor.fuse_cams(maps).detach())
        if len(fused) != len(image):
            raise ValueError(
                f"`cam_extractor` gave maps of shape {tuple(fused.shape)} for {len(image)} inputs: a metric needs one "
                "map per sample"
            )
        cam = resize(fused.unsqueeze(1), image.shape[2:]).squeeze(1)
        finite = cam.flatten(1).isfinite().all(1)
        cam = cam.masked_fill(~finite.reshape(-1, *[1] * (cam.ndim - 1)), 0.0)
        return _Explained(model, image, cam, score, select, finite & score.isfinite())


class ClassificationMetric(_CAMMetric):
    r"""How the score of a class changes when only what its map shows, or only the rest, is left of the input.

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
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``
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
        TypeError: if ``cam_extractor`` or ``logits_fn`` is not what is said above

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

    key_higher_is_better: ClassVar[dict[str, bool]] = {
        "avg_drop": False,
        "conf_increase": True,
        "avg_gain": True,
        "deletion_drop": True,
    }
    _sums = ("drop", "increase", "gain", "deletion_drop", "out_of_range")
    _summary_keys = ("avg_drop", "conf_increase")

    drop: Tensor
    increase: Tensor
    gain: Tensor
    deletion_drop: Tensor
    out_of_range: Tensor

    def __init__(self, cam_extractor: Extractor, logits_fn: Callable[[Any], Any] | None = None, **kwargs: Any) -> None:
        super().__init__(cam_extractor, logits_fn, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Give ``avg_drop``, ``conf_increase``, ``avg_gain`` and ``deletion_drop`` of the samples so far."""
        return {
            "avg_drop": self.drop / self.total,
            "conf_increase": self.increase / self.total,
            "avg_gain": torch.where(self.out_of_range > 0, torch.nan, self.gain / self.total),
            "deletion_drop": self.deletion_drop / self.total,
        }

    def _measure(self, explained: _Explained) -> dict[str, Tensor]:
        image, score = explained.image, explained.score
        mask = explained.cam.unsqueeze(1).to(image.dtype)

        def masked(samples: Tensor, variants: Tensor) -> Tensor:
            m = mask[samples]
            inverted = (variants == 1).reshape(-1, *[1] * (m.ndim - 1))
            return torch.where(inverted, 1 - m, m) * image[samples]

        kept, deleted = explained.replay(masked, 2, batch_size=len(image)).unbind(1)
        rise = (kept - score).relu()
        scores = torch.stack([score, kept])
        return {
            "drop": _relative(score - kept, score),
            "increase": (kept > score).to(score),
            "gain": torch.where(score < 1, rise / (1 - score), 0.0),
            "deletion_drop": _relative(score - deleted, score),
            "out_of_range": ((scores - 0.5).abs() > 0.5 + 1e-3).any(0).to(score),  # but for float rounding
        }


class DeletionInsertionMetric(_CAMMetric):
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
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``
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

    key_higher_is_better: ClassVar[dict[str, bool]] = {"deletion_auc": False, "insertion_auc": True}
    _sums = ("deletion", "insertion")
    _summary_keys = ("deletion_auc", "insertion_auc")

    deletion: Tensor
    insertion: Tensor

    def __init__(
        self,
        cam_extractor: Extractor,
        logits_fn: Callable[[Any], Any] | None = None,
        *,
        steps: int = 20,
        baseline: Baseline | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        if not (baseline is None or isinstance(baseline, Tensor) or callable(baseline)):
            raise TypeError(f"`baseline` must be a tensor, a callable or None, got {baseline!r}")
        super().__init__(cam_extractor, logits_fn, baseline, **kwargs)
        self.steps = positive_integer("steps", steps)
        self.batch_size = positive_integer("batch_size", batch_size)

    @property
    def baseline(self) -> Baseline | None:
        """What a removed position becomes."""
        baseline: Baseline | None = self._subject.baseline
        return baseline

    def compute(self) -> dict[str, Tensor]:
        """Give ``deletion_auc`` and ``insertion_auc`` of the samples so far."""
        return {"deletion_auc": self.deletion / self.total, "insertion_auc": self.insertion / self.total}

    def _measure(self, explained: _Explained) -> dict[str, Tensor]:
        image, score = explained.image, explained.score.unsqueeze(1)
        baseline = self._baseline_of(image)
        flat = explained.cam.flatten(1)
        ranks = flat.argsort(dim=1, descending=True, stable=True).argsort(1)  # (N, positions)

        positions = flat.shape[1]
        counts = [*range(0, positions, math.ceil(positions / self.steps)), positions]
        inner = len(counts) - 2
        # The input is visible at ranks from `first` to `last` - 1: deletion, the bare baseline, insertion. The ends
        # that are the input itself have its score.
        first = torch.tensor(counts[1:] + [0] * inner, device=image.device)
        last = torch.tensor([positions] * (inner + 1) + counts[1:-1], device=image.device)

        def perturbed(samples: Tensor, variants: Tensor) -> Tensor:
            rank = ranks[samples]
            visible = (rank >= first[variants].unsqueeze(1)) & (rank < last[variants].unsqueeze(1))
            return torch.where(visible.reshape(-1, 1, *image.shape[2:]), image[samples], baseline[samples])

        scores = explained.replay(perturbed, len(first), self.batch_size)
        removed, bare, added = scores[:, :inner], scores[:, inner : inner + 1], scores[:, inner + 1 :]
        fractions = torch.tensor(counts, device=scores.device).to(scores) / positions
        return {
            "deletion": torch.trapezoid(torch.cat([score, removed, bare], 1), fractions),
            "insertion": torch.trapezoid(torch.cat([bare, added, score], 1), fractions),
        }

    def _baseline_of(self, image: Tensor) -> Tensor:
        """Give the baseline of each input, shaped like it."""
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


def _check_input(image: object) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"`input_tensor` must be a floating-point tensor (N, C, *spatial), got {found}")
    if image.ndim < 3 or not image.numel():
        raise ValueError(
            f"`input_tensor` must hold samples, channels and positions, (N, C, *spatial), got {tuple(image.shape)}"
        )


def _predicted(logits: Tensor) -> Tensor:
    """Give the class with the highest score, summed over positions where there are any, (N,)."""
    logits = logits.detach()
    logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
    return logits.reshape(*logits.shape[:2], -1).sum(-1).argmax(1)


def _relative(fall: Tensor, score: Tensor) -> Tensor:
    """Give the positive part of a fall as a share of the score it starts from; no fall is 0 of anything."""
    fall = fall.relu()
    return torch.where(fall == 0, 0.0, fall / score.abs())


@contextmanager
def _watched(extractor: Extractor) -> Iterator[None]:
    """Let an extractor watch the pass that runs inside the block, and leave no trace of it on the model.

    Extractors of this library record nothing that lasts, and make the graph that they need from the target layer on.
    Of others nothing is known: they get a full graph, and may call ``backward()``.
    """
    watcher = getattr(extractor, "base_cam", extractor)
    if isinstance(watcher, _CAM):
        with watcher._inner_pass():
            watcher.reset_hooks()  # if nothing gets recorded now, an older pass must not be explained
            yield
        return
    model = extractor.model
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with untouched(model, EVERYONE), torch.enable_grad():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
