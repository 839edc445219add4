"""The base class of the metrics: the explained pass or the given maps, variants of the input, sums over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from torchcam._checks import callable_object, integer
from torchcam._chunks import run_chunks
from torchcam._passes import Call, forwards_replaced
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import map_tensors, over_positions, resize, to_float
from torchcam.layout import axes_of
from torchcam.methods._replay import VariantRunner
from torchcam.methods.core import _CAM, on_replica
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, class_scores, read_logits

LogitsFn = Callable[[Any], Any]
Baseline = Tensor | Callable[[Tensor], Tensor]
Variant = Callable[[Tensor, Tensor], Tensor]
Bounds = tuple[float, float]
Keys = dict[str, tuple[str, bool, Bounds]]

UNIT: Bounds = (0.0, 1.0)
POSITIVE: Bounds = (0.0, math.inf)
UNBOUNDED: Bounds = (-math.inf, math.inf)


class Extractor(Protocol):
    """The interface that a metric needs of an extractor."""

    @property
    def model(self) -> nn.Module:
        """The model with the extractor's hooks."""

    @property
    def fuse_cams(self) -> Callable[..., Tensor]:
        """The function that fuses the maps of several layers: from a list of maps (N, *spatial) to one."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the maps of the last forward pass for ``(class_idx, scores)``, or for ``scores=`` and ``targets=``."""


def missing_parts(extractor: Any) -> list[str]:
    """Return the names of the attributes that an extractor must have and this object lacks."""
    return [name for name in ("model", "fuse_cams", "__call__") if not hasattr(extractor, name)]


@dataclass
class Subject:
    """The extractor and the options of a metric: modules among its attributes would be parts of it to ``nn.Module``.

    Copies of a metric share it, as the hooks of a copied extractor would be on no model. Pickles leave the extractor
    and the model out, as these belong to the process.

    Attributes:
        source: the extractor, or a plain model whose maps have to be given; None if there is neither
        options: arguments that are not plain values, such as callables; attributes of the metric by these names
        unpickled: whether the metric comes from a pickle
    """

    source: Extractor | nn.Module | None
    options: Mapping[str, Any]
    unpickled: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Subject:
        return self

    def __reduce__(self) -> tuple[Callable[..., Subject], tuple[Any, ...]]:
        return partial(Subject, unpickled=True), (None, self.options)


@dataclass
class Explained:
    """A batch of inputs with their maps and explained scores.

    Attributes:
        model: the model
        extractor: the extractor, None if the metric has none
        logits_fn: the function from the model's output to the scores, None if the output is the scores
        image: the inputs, (N, C, *spatial)
        cam: one map per sample, of the input's size, (N, *spatial)
        score: the explained scores of the inputs, (N,)
        output: the model's output for the inputs, after ``logits_fn``
        select: reads the explained score off such an output
        valid: the samples whose map and scores are all finite, (N,)
    """

    model: nn.Module
    extractor: Any
    logits_fn: LogitsFn | None
    image: Tensor
    cam: Tensor
    score: Tensor
    output: Any
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
        with replicated(self.model) as model:
            run = VariantRunner(model, Call((self.image,), {}))

            def score(samples: Tensor, variants: Tensor) -> Tensor:
                output = run(variant(samples, variants), samples)
                return self.select(with_logits(self.logits_fn, output), samples)

            return to_float(self._by_variant(score, num_variants, batch_size))

    def explain_again(
        self,
        variant: Variant,
        measure: Callable[[Tensor, Tensor, Tensor], Tensor],
        num_variants: int,
        batch_size: int,
        *,
        classes: Tensor | None = None,
        extractor: Any = None,
    ) -> Tensor:
        """Explain variants of the inputs and measure the maps, no more than ``batch_size`` of them in memory.

        Args:
            variant: builds inputs (B, C, *spatial) from the numbers of the samples and of their variants, (B,) each
            measure: from maps (B, *spatial) of the input's size, of NaN where not finite, and the same numbers, to
                (B, ...)
            num_variants: the number of variants V of each sample
            batch_size: largest number of inputs in one pass
            classes: the class to explain of each variant, (N, V); by default the score that was explained before
            extractor: an extractor to use in place of the metric's

        Returns:
            the measures, (N, V, ...)
        """

        def explain(samples: Tensor, variants: Tensor) -> Tensor:
            inputs = variant(samples, variants)
            asked = self.select.arguments(self.output, samples)
            if classes is not None:
                asked = {"class_idx": classes[samples, variants]}
            with explaining(extractor or self.extractor, self.logits_fn) as own:
                maps = maps_of(own, run_to_explain(own, inputs), inputs, **asked)
            return measure(maps, samples, variants)

        return self._by_variant(explain, num_variants, batch_size)

    def _by_variant(self, evaluate: Variant, num_variants: int, batch_size: int) -> Tensor:
        """Evaluate the variants in chunks, to (N, V, ...), and mark samples with values that are not finite."""
        rows = torch.arange(len(self.image) * num_variants, device=self.image.device)
        samples, variants = rows.div(num_variants, rounding_mode="floor"), rows % num_variants
        chunks = run_chunks(lambda part: evaluate(samples[part], variants[part]), len(rows), batch_size)
        values = torch.cat(chunks)
        values = values.reshape(-1, num_variants, *values.shape[1:])
        self.valid = self.valid & values.isfinite().flatten(1).all(1)
        return values


class CAMMetric(Metric):
    """The base class of all metrics: the explained pass, the sums over samples, the summary.

    A subclass names in ``_keys`` what ``compute`` gives, and returns each sample's part of the sums behind it from
    ``_measure``. Every sum is a state, float64, and so are ``total`` and ``nan_count``, the numbers of samples in the
    sums and of samples left out.

    Attributes:
        key_higher_is_better: for each key of ``compute``, whether a higher value is better
        key_bounds: for each key of ``compute``, the lowest and the highest value there is
    """

    is_differentiable = False
    higher_is_better: bool | None = None  # what all keys agree on; else see `key_higher_is_better`
    full_state_update = False

    key_higher_is_better: ClassVar[dict[str, bool]]
    key_bounds: ClassVar[dict[str, Bounds]]
    _keys: ClassVar[Keys]  # for each key of `compute` its sum, "" if it has none, and the two above
    _more_sums: ClassVar[tuple[str, ...]] = ()
    _summary_keys: ClassVar[tuple[str, ...] | None] = None  # by default all that `compute` gives
    _masks_with_maps: ClassVar[bool] = False  # the values of a map count, not only their order
    _explains_again: ClassVar[bool] = False  # maps that are given are not enough

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_keys" not in vars(cls):
            return
        cls.key_higher_is_better = {key: higher for key, (_, higher, _) in cls._keys.items()}
        cls.key_bounds = {key: bounds for key, (_, _, bounds) in cls._keys.items()}
        agreed = set(cls.key_higher_is_better.values())
        cls.higher_is_better = agreed.pop() if len(agreed) == 1 else None
        lowest, highest = zip(*cls.key_bounds.values(), strict=True)
        cls.plot_lower_bound = min(lowest) if math.isfinite(min(lowest)) else None
        cls.plot_upper_bound = max(highest) if math.isfinite(max(highest)) else None

    def __init__(
        self,
        cam_extractor: Extractor | nn.Module | None,
        logits_fn: LogitsFn | None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        missing = missing_parts(cam_extractor)
        if missing and cam_extractor is not None and not isinstance(cam_extractor, nn.Module):
            raise TypeError(
                f"`cam_extractor` must have a `model`, be callable and have `fuse_cams`, or be a model whose maps are "
                f"given: {type(cam_extractor).__name__} lacks {', '.join(missing)}"
            )
        if missing and self._explains_again:
            raise TypeError(
                f"{type(self).__name__} explains inputs of its own making, so given maps are not enough: "
                f"`cam_extractor` must be an extractor, such as GradCAM(model), got {type(cam_extractor).__name__}"
            )
        callable_object("logits_fn", logits_fn, optional=True)
        super().__init__(**kwargs)
        self._subject = Subject(cam_extractor, {"logits_fn": logits_fn, **(options or {})})
        of_keys = [state for state, *_ in self._keys.values() if state]
        for name in (*of_keys, *self._more_sums):
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
            RuntimeError: if there is none: the metric was made with a model, or comes from a pickle
        """
        extractor = self._extractor
        if extractor is not None:
            return extractor
        if self._subject.unpickled:
            raise RuntimeError(
                f"this {type(self).__name__} was unpickled and has no extractor: it can compute and be merged, but not "
                "be updated; make a new one with an extractor, and `merge_state` this one into it"
            )
        source = self._subject.source
        why = "without an extractor" if source is None else f"with a {type(source).__name__}, a model and no extractor"
        raise RuntimeError(
            f"this {type(self).__name__} was made {why}: give `maps` to every update, or make it with an extractor, "
            "such as GradCAM(model)"
        )

    @property
    def model(self) -> nn.Module:
        """The model whose maps are measured.

        Raises:
            RuntimeError: if there is none: the metric comes from a pickle
        """
        source = self._subject.source
        if self._extractor is None and isinstance(source, nn.Module):
            return source
        return self.cam_extractor.model

    def __getattr__(self, name: str) -> Any:
        subject = vars(self).get("_subject")
        if subject is not None and name in subject.options:
            return subject.options[name]
        return super().__getattr__(name)

    @property
    def _extractor(self) -> Extractor | None:
        source: Any = self._subject.source
        return source if hasattr(source, "fuse_cams") else None

    def update(
        self,
        input_tensor: Tensor,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        maps: Any = None,
    ) -> None:
        """Explain a batch of inputs, and add its part to the sums.

        A replica of the model runs, in evaluation mode, and the model is left as it was. So is an extractor of this
        library: it keeps the pass that it has recorded, and may be disabled.

        Args:
            input_tensor: the model's input, (N, C, *spatial) with 1, 2 or 3 spatial dimensions
            class_idx: the class to explain, for the whole batch or one per sample; by default the predicted one
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output, after
                ``logits_fn``, to a scalar
            maps: the maps to measure, in place of the extractor's: a tensor or array (N, *spatial) or (N, 1, *spatial)
                of any resolution, which is interpolated to the input's

        Raises:
            TypeError: if the input is not a floating-point tensor, or a class index not an integer
            ValueError: if the input has no samples or no positions, both ``class_idx`` and ``targets`` are given, a
                class does not exist, there is not one per sample or one map per sample, or the values of ``maps`` count
                and are not in [0, 1]
            RuntimeError: if there is neither an extractor nor ``maps``
        """
        image = as_image(input_tensor)
        with normal_mode(graph=False):
            explained = self._explain(image, class_idx, targets, maps)
            parts = self._measure(explained)
            self._add(parts, explained.valid)

    def compute(self) -> dict[str, Tensor]:
        """Return the means over the samples so far, in all processes; NaN if there are none."""
        return {key: getattr(self, state).mean() / self.total for key, (state, *_) in self._keys.items() if state}

    def summary(self) -> dict[str, float]:
        """Return the metric's main means over the samples so far, in all processes.

        Raises:
            AssertionError: if no sample was measured
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            total, left_out = int(self.total), int(self.nan_count)
            means = type(self).compute(self)
        if not total:
            why = f"; all {left_out} samples were left out, their maps or scores not finite" if left_out else ""
            raise AssertionError(f"you need to update the metric before getting the summary{why}")
        return {key: float(means[key]) for key in self._summary_keys or means}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the means, one mark for each key, or a line where ``val`` is a list of what ``compute`` gave.

        Args:
            val: what ``compute`` or ``forward`` gave, or a list of that; by default what ``compute`` gives now
            ax: the axes of matplotlib to draw on; by default new ones

        Returns:
            the figure and the axes
        """
        return self._plot(val, ax)

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        """Return each sample's part of the sums, (N, ...) each; samples with parts that are not finite are left out."""
        raise NotImplementedError(f"{type(self).__name__} does not define what it measures")

    def _add(self, parts: Mapping[str, Tensor], valid: Tensor, **counts: Tensor) -> None:
        """Add the parts of the valid samples to the sums, and counts of samples to their states."""
        for part in parts.values():
            valid = valid & part.isfinite().flatten(1).all(1) if part.ndim > 1 else valid & part.isfinite()
        sums = {
            name: torch.where(valid.reshape(-1, *[1] * (part.ndim - 1)), part, 0.0).sum(0, dtype=torch.float64)
            for name, part in parts.items()
        }
        counts = {"total": valid.sum(), "nan_count": (~valid).sum(), **counts}
        for name, value in {**sums, **counts}.items():
            state = getattr(self, name)
            # Not in place: a state may be a tensor of inference mode.
            setattr(self, name, state + value.to(state.device).to(state.dtype))

    def _explain(
        self,
        image: Tensor,
        class_idx: ClassIndex | None,
        targets: OutputTarget | Sequence[OutputTarget] | None,
        maps: Any,
    ) -> Explained:
        """Run the model on the inputs and explain them, unless maps are given."""
        if class_idx is not None:
            check_one_of(class_idx, targets)
        if maps is None:
            with explaining(self.cam_extractor, self.logits_fn) as extractor:
                output = run_to_explain(extractor, image)
                select, score = _select(output, class_idx, targets, len(image))
                asked = {"class_idx": select.class_idx} if targets is None else {"targets": targets}
                maps = maps_of(extractor, output, image, **asked)
        else:
            maps = given_maps(maps, image, in_unit_range=self._masks_with_maps)
            with replicated(self.model) as model, torch.inference_mode():
                output = with_logits(self.logits_fn, model(image))
                select, score = _select(output, class_idx, targets, len(image))
        cam, finite = zero_where_not_finite(maps)
        output = map_tensors(lambda t: t.detach().clone() if t.is_inference() else t.detach(), output)
        valid = finite & score.isfinite()
        return Explained(self.model, self._extractor, self.logits_fn, image, cam, score, output, select, valid)


def _select(
    output: Any, class_idx: ClassIndex | None, targets: OutputTarget | Sequence[OutputTarget] | None, batch_size: int
) -> tuple[Selector, Tensor]:
    """Return the selection of one score per sample, by default of the predicted class, and these scores, (N,)."""
    if class_idx is None and targets is None:
        class_idx = class_scores(read_logits(output)).argmax(1).tolist()
    select = Selector(class_idx, targets, batch_size)
    with torch.no_grad():
        score = to_float(select(output).detach()).clone()
    if score.ndim != 1:
        raise ValueError(
            f"a metric measures one map of each sample: `class_idx` or `targets` name {score.shape[1]} scores"
        )
    return select, score


def as_image(input_tensor: object) -> Tensor:
    """Check the model's input.

    Raises:
        TypeError: if it is not a floating-point tensor
        ValueError: if it has no samples, channels or positions, or they are in another order
    """
    if not isinstance(input_tensor, Tensor) or not input_tensor.is_floating_point():
        found = f"a tensor of {input_tensor.dtype}" if isinstance(input_tensor, Tensor) else type(input_tensor).__name__
        raise TypeError(f"`input_tensor` must be a floating-point tensor (N, C, *spatial), got {found}")
    if input_tensor.ndim < 3 or not input_tensor.numel():
        raise ValueError(
            f"`input_tensor` must hold samples, channels and positions, (N, C, *spatial), got "
            f"{tuple(input_tensor.shape)}"
        )
    if axes_of(tuple(input_tensor.shape)) is not None:
        raise ValueError(
            f"`input_tensor` of shape {tuple(input_tensor.shape)} has its channels behind positions, and what is "
            "hidden is a part of an input (N, C, *spatial): pass a module that takes such an input and permutes it for "
            "the model"
        )
    return input_tensor.detach()


def given_maps(maps: Any, image: Tensor, *, in_unit_range: bool = False) -> Tensor:
    """Check maps of the user, and resize them to the input's size, (N, *spatial).

    Raises:
        TypeError: if they are neither a tensor nor an array
        ValueError: if there is not one for each sample, or their values count and are not in [0, 1]
    """
    maps = tensor_of("maps", maps)
    maps = to_float(maps.detach().to(image.device))
    found = tuple(maps.shape)
    if maps.ndim == image.ndim and maps.shape[1] == 1:
        maps = maps.squeeze(1)
    if maps.ndim != image.ndim - 1 or len(maps) != len(image) or not maps.numel():
        raise ValueError(
            f"`maps` must hold one map for each of {len(image)} samples, (N, *spatial) or (N, 1, *spatial) with "
            f"{image.ndim - 2} spatial dimensions, got shape {found}; sum an attribution over its channels first"
        )
    if in_unit_range and bool(((maps < -1e-3) | (maps > 1 + 1e-3)).logical_and(maps.isfinite()).any()):
        raise ValueError(
            "`maps` must lie in [0, 1], as the input is multiplied by them: scale them, say, by their smallest and "
            "largest value"
        )
    return resize(maps.unsqueeze(1), image.shape[2:]).squeeze(1)


def tensor_of(name: str, value: Any) -> Tensor:
    """Convert an argument that is a tensor or an array (N, *spatial).

    Raises:
        TypeError: if it is neither
    """
    if not isinstance(value, Tensor) and not hasattr(value, "__array__"):
        raise TypeError(f"`{name}` must be a tensor or an array (N, *spatial), got {type(value).__name__}")
    return torch.as_tensor(value)


def check_seed(seed: int) -> int:
    """Check a seed.

    Raises:
        TypeError: if it is not an integer
        ValueError: if no generator takes it
    """
    integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must be from -2**63 to 2**64 - 1, got {seed}")
    return seed


@contextmanager
def explaining(extractor: Extractor, logits_fn: LogitsFn | None) -> Iterator[Extractor]:
    """Yield an extractor to explain one pass with; ``logits_fn`` is a part of its model inside the block.

    It is like ``extractor``, on a replica of the model. An extractor that is not of this library is yielded itself: it
    gets a full graph and may call ``backward()``, and its model is restored afterwards.
    """
    with on_replica(extractor) as own, ExitStack() as changed:
        if own is extractor:
            changed.enter_context(_gradients_restored(own.model))
        if logits_fn is not None:
            # A partial, unlike a closure, is bound to the replica's modules in a replica.
            changed.enter_context(
                forwards_replaced({own.model: lambda _model, forward: partial(_run_with_logits, logits_fn, forward)})
            )
        yield own


def _run_with_logits(logits_fn: LogitsFn, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return logits_fn(forward(*args, **kwargs))


@contextmanager
def _gradients_restored(model: nn.Module) -> Iterator[None]:
    """Record graphs inside the block, and put the parameters' gradients aside."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def run_to_explain(extractor: Extractor, image: Tensor) -> Any:
    """Run the model of an extractor on inputs; inference tensors are copied where a graph is recorded."""
    return extractor.model(image.clone() if torch.is_grad_enabled() and image.is_inference() else image)


def maps_of(extractor: Extractor, output: Any, image: Tensor, **asked: Any) -> Tensor:
    """Return the fused maps of the pass that returned ``output``, (N, *spatial) of the input's size.

    Args:
        extractor: the extractor
        output: the output of its model
        image: the inputs, (N, C, *spatial)
        asked: the ``class_idx`` or the ``targets`` to explain
    """
    if "targets" in asked:
        maps = extractor(scores=output, **asked)
    else:
        classes = asked["class_idx"]
        maps = extractor(classes.tolist() if isinstance(classes, Tensor) else classes, output)
    fused = to_float(extractor.fuse_cams(maps).detach())
    check_positions(extractor, output)
    if len(fused) != len(image):
        raise ValueError(
            f"`cam_extractor` gave maps of shape {tuple(fused.shape)} for {len(image)} inputs: a metric needs one "
            "map per sample"
        )
    return resize(over_positions(fused, image).unsqueeze(1), image.shape[2:]).squeeze(1)


def check_positions(extractor: Any, output: Any) -> None:
    """Check that the positions of the input of a pass follow its channels, as far as the extractor knows."""
    if isinstance(extractor, _CAM):
        extractor.inner.check_positions(output)


def with_logits(logits_fn: LogitsFn | None, output: Any) -> Any:
    """Apply ``logits_fn`` to a model's output, if there is one."""
    return output if logits_fn is None else logits_fn(output)


def zero_where_not_finite(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps with zeros in place of those that are not finite, and which are finite, (N,)."""
    finite = maps.flatten(1).isfinite().all(1)
    return maps.masked_fill(~finite.reshape(-1, *[1] * (maps.ndim - 1)), 0.0), finite
