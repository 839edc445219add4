"""Extractors that ask another extractor: with another target, fusion, sum of channels, or on variants of the input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, one_of, positive_integer
from torchcam._chunks import run_chunks
from torchcam._names import moved
from torchcam._tensors import min_max
from torchcam.layers import TargetLayer
from torchcam.targets import ClassIndex, OutputTarget, Selector, as_class_indices, read_logits

from ._finish import to_one_shape
from ._replay import VariantRunner
from ._running import quietly
from .core import _CAM, Request, on_replica
from .decomposition import along, first_component
from .gradient import GradCAM, GradCAMpp


def __getattr__(name: str) -> Any:
    return moved(name, ("AugmentedCAM", "SESS"), __name__)  # which the first edition had here


class Wrapper(_CAM):
    """An extractor that asks another one, whose hooks and recorded passes it shares.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        base_method: the method that is asked: a class, or a ``functools.partial`` of one
        base_kwargs: its other arguments
    """

    _options: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        **base_kwargs: Any,
    ) -> None:
        kind = base_method.func if isinstance(base_method, partial) else base_method
        if not (isinstance(kind, type) and issubclass(kind, _CAM)):
            raise TypeError(f"`base_method` must be a CAM method such as GradCAM, got {base_method!r}")
        self.base_cam = base_method(model, target_layer, input_shape=input_shape, **base_kwargs)
        self._recorder = self.base_cam._recorder
        self.reshape_transform = self.base_cam.reshape_transform
        self.gradients = self.base_cam.gradients
        self._weighs_gradients = self.base_cam._weighs_gradients
        self.class_agnostic = self.base_cam.class_agnostic
        self._relu = self.base_cam._relu
        self._differentiates = self.base_cam._differentiates
        self._runs_model = self.base_cam._runs_model
        self._explains_many = self.base_cam._explains_many

    def moved_to(self, replica: nn.Module) -> Self:
        """Return an extractor like this one with its hooks, if it has any, on a replica of the model."""
        moved = copy.copy(self)
        moved.base_cam = self.base_cam.moved_to(replica)
        moved._recorder = moved.base_cam._recorder
        return moved

    @property
    def inner(self) -> _CAM:
        """The extractor that looks at the layers."""
        return self.base_cam.inner

    def _activations(self, request: Request) -> list[Tensor]:
        return self.base_cam._activations(request)

    def _layer_weights(self, request: Request, **options: Any) -> list[tuple[Tensor, Tensor]]:
        return self.base_cam._layer_weights(request, **options)

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        return self.base_cam._raw_maps(request, **options)

    def _pool_layers(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        return self.base_cam._pool_layers(maps, request)

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:  # type: ignore[override]  # as the extractor that is held
        """Fuse the maps of several layers as the base method does."""
        return self.base_cam.fuse_cams(cams, target_shape)

    def __repr__(self) -> str:
        options = (*self._options, "gradients") if self.gradients == "balanced" else self._options
        values = "".join(f", {option}={getattr(self, option)}" for option in options)
        base = type(self.base_cam).__name__
        return f"{type(self).__name__}(base_method={base}, target_layer={self.target_names}{values})"

    def _explain_variants(
        self,
        variants: Callable[[slice], Tensor],
        samples: Tensor,
        request: Request,
        batch_size: int,
        **options: Any,
    ) -> list[Tensor]:
        """Compute the maps of variants of the recorded input, in passes of a replica of the model.

        Args:
            variants: builds the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)
            request: what is asked of the recorded pass
            batch_size: largest number of variants in one pass
            options: options of the method

        Returns:
            one normalised map (V, *spatial) per target layer, (V * K, *spatial) while K classes are explained; those
            of samples that are not finite are NaN
        """
        call = self._recorded_call(request)
        unasked = request.class_idx is None and request.targets is None
        select = None if unasked else self._selector(request)
        with on_replica(self.base_cam) as base:
            run = VariantRunner(base.model, call)
            if select is not None:
                with call.as_recorded():
                    run.check(self, request.recorded, select)

            def explain(chunk: slice) -> list[Tensor]:
                rows = samples[chunk]
                with call.as_recorded():
                    output = run(variants(chunk), rows)
                asked = {} if select is None else select.arguments(output, rows)
                of_rows = Request(base._recorder.find(), relu=request.relu, num_classes=request.num_classes, **asked)
                maps: list[Tensor] = base._finished(base._raw_maps(of_rows, **options), of_rows, normalized=True)
                request.recorded.unbalanced |= of_rows.recorded.unbalanced
                return maps

            with quietly():
                chunks = run_chunks(explain, len(samples), batch_size)
        return [torch.cat(maps) for maps in zip(*chunks, strict=True)]


class _Contrast(Selector):
    """The score of a class less that of its references, weighted.

    Args:
        select: the score of the class
        references: the classes each is compared with, (N, T)
        gamma: the strength of the comparison
        weighting: ``"mean"`` or ``"softmax"``
    """

    def __init__(self, select: Selector, references: Tensor, gamma: float, weighting: str) -> None:
        super().__init__(select.class_idx, None, select.batch_size)
        self.select = select
        self.references = references
        self.gamma = gamma
        self.weighting = weighting

    def by_class(self, logits: Tensor, samples: Tensor | None) -> Tensor:
        """Score logits (B, K)."""
        references = self.references if samples is None else self.references[samples]
        contrast = self.select.by_class(logits, samples).unsqueeze(1) - self.gamma * logits.gather(1, references)
        if self.weighting == "mean":
            return contrast.mean(1)
        weights = logits.softmax(1).gather(1, references)
        return (weights * contrast).sum(1) / weights.sum(1)

    def arguments(self, output: Any, samples: Tensor) -> dict[str, Any]:
        """Return the same question for an output whose rows stand for ``samples``, (B,)."""
        return {"targets": self.of(samples)}


class FinerCAM(Wrapper):
    r"""Finer-CAM (Zhang et al. 2025, arXiv:2501.11309): what tells a class from the classes most like it.

    Any method, on the contrast of the class :math:`c` with its references :math:`d_t` in place of the class score:

    .. math::
        y_c - \gamma \frac{1}{T} \sum_t y_{d_t} \qquad \text{or} \qquad
        \frac{\sum_t p_{d_t} (y_c - \gamma y_{d_t})}{\sum_t p_{d_t}}, \quad p = \mathrm{softmax}(y)

    for ``weighting="mean"`` and ``"softmax"``; the latter is differentiated through :math:`p`, as the authors do.
    Without ``comparison_idx``, the references are the ``num_references`` classes whose scores are closest to
    :math:`y_c`.

    Cost: that of the base method.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        base_method: the method that makes the maps
        gamma: the strength of the comparison; 0 gives the base method
        num_references: number of references T, as far as there are other classes
        weighting: how references are weighted
        base_kwargs: arguments of the base method

    Raises:
        TypeError: if ``base_method`` is not a method
        ValueError: if ``gamma`` is not finite, ``num_references`` not positive or ``weighting`` unknown
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        gamma: float = 0.6,
        num_references: int = 3,
        weighting: Literal["mean", "softmax"] = "mean",
        **base_kwargs: Any,
    ) -> None:
        self.weighting = one_of("weighting", weighting, ("mean", "softmax"))
        self.gamma = finite_number("gamma", gamma)
        self.num_references = positive_integer("num_references", num_references)
        super().__init__(model, target_layer, input_shape, base_method=base_method, **base_kwargs)
        self._explains_many = False

    _options = ("gamma", "num_references")

    def __call__(  # type: ignore[override]  # TorchCAM's order of arguments
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        comparison_idx: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps of the recorded pass.

        Args:
            class_idx: the class to explain, for the whole batch or one per sample
            scores: the model's output; may be left out
            comparison_idx: the reference class(es): one, several for the whole batch, or a list of as many per sample
            normalized: whether each map is scaled to [0, 1]
            kwargs: options of the base method

        Returns:
            one map (N, *spatial) per target layer

        Raises:
            AssertionError: if no forward pass was recorded
            TypeError: if an index is not an integer
            ValueError: if a class does not exist, is compared with itself or named twice, or is the only one
            RuntimeError: if the score does not depend on a target layer
        """
        return self.compute_cams(class_idx, scores, comparison_idx, normalized, **kwargs)

    def compute_cams(  # type: ignore[override]  # TorchCAM's order of arguments
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        comparison_idx: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps as a call does."""
        return super().compute_cams(class_idx, scores, normalized, comparison_idx=comparison_idx, **kwargs)

    def _layer_weights(
        self, request: Request, comparison_idx: Any = None, **options: Any
    ) -> list[tuple[Tensor, Tensor]]:
        return super()._layer_weights(self._contrasted(request, comparison_idx), **options)

    def _raw_maps(self, request: Request, comparison_idx: Any = None, **options: Any) -> list[Tensor]:
        return super()._raw_maps(self._contrasted(request, comparison_idx), **options)

    def _selector(self, request: Request) -> Selector:
        return self._contrasted(request, None).selector(self._batch_size(request))

    def _contrasted(self, request: Request, comparison_idx: Any) -> Request:
        """Ask for what tells each sample's class from its references."""
        if request.class_idx is None or request.targets is not None:
            raise ValueError("FinerCAM contrasts a class with others: it takes `class_idx`, and no `targets`")
        self._activations(request)  # there are none of a pass that was cut short
        output = request.recorded.output if request.scores is None else request.scores
        logits = read_logits(output).detach()
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"FinerCAM needs scores (N, classes) of two classes or more, got {tuple(logits.shape)}")
        select = request.selector(logits.shape[0])
        classes = select.indices(logits)
        if comparison_idx is None:
            references = self._closest(logits, classes)
        else:
            references = _reference_rows(comparison_idx, classes, logits.shape[1])
        contrast = _Contrast(select, references, self.gamma, self.weighting)
        return replace(request, class_idx=None, targets=contrast)

    def _closest(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Find the classes whose scores are closest to the explained one's, (N, T)."""
        distances = (logits - logits.gather(1, classes.unsqueeze(1))).abs()
        distances = distances.scatter(1, classes.unsqueeze(1), torch.inf)
        return distances.topk(min(self.num_references, logits.shape[1] - 1), dim=1, largest=False).indices


def _reference_rows(comparison_idx: Any, classes: Tensor, num_classes: int) -> Tensor:
    """Check explicit references and give them as (N, T)."""
    batch_size = len(classes)
    rows = comparison_idx.tolist() if isinstance(comparison_idx, Tensor) else comparison_idx
    rows = rows if isinstance(rows, (list, tuple)) else [rows]
    if not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        rows = [rows] * batch_size
    if len(rows) != batch_size or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            "`comparison_idx` must be a class, a list of classes, or a list of equally many per sample: "
            f"got {comparison_idx!r} for a batch of {batch_size}"
        )
    try:
        references = as_class_indices(rows, batch_size, num_classes, classes.device)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`class_idx`", "`comparison_idx`")) from None
    if (references == classes.unsqueeze(1)).any():
        raise ValueError(f"`comparison_idx` {comparison_idx!r} compares an explained class with itself")
    if any(len(set(row)) != len(row) for row in rows):
        raise ValueError(f"`comparison_idx` {comparison_idx!r} names a class twice")
    return references


class RefineCAM(Wrapper):
    r"""RefineCAM (arXiv:2605.14641): maps of several layers multiplied into one of the finest layer's resolution.

    .. math::
        M = \mathrm{minmax}\Big(\prod_l U\big(\mathrm{minmax}(M_l)\big)\Big)

    with :math:`U` the resizing to the largest map's shape.

    Cost: that of the base method.

    Args:
        model: the model to explain
        target_layer: the layers, two or more
        input_shape: shape of the input without the batch dimension
        base_method: the method that makes the maps
        base_kwargs: arguments of the base method

    Raises:
        TypeError: if ``base_method`` is not a method, or ``target_layer`` not a list
        ValueError: if there are fewer than two layers
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Sequence[TargetLayer],
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAMpp,
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(target_layer, (list, tuple)):
            raise TypeError(f"`target_layer` must be a list of two layers or more, got {type(target_layer).__name__}")
        if len(target_layer) < 2:
            raise ValueError(
                f"`target_layer` must list two layers or more to refine one by the other, got {len(target_layer)}"
            )
        super().__init__(model, target_layer, input_shape, base_method=base_method, **base_kwargs)
        self._explains_many = False

    def __call__(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the refined map of the recorded pass.

        Args:
            class_idx: the class to explain, for the whole batch or one per sample
            scores: the model's output; may be left out
            normalized: whether the product is scaled to [0, 1]; the layers' maps always are
            target_shape: spatial shape of the map, by default the largest of each side among the layers
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar
            kwargs: options of the base method

        Returns:
            a list of one map, (N, *target_shape)

        Raises:
            AssertionError: if no forward pass was recorded
            TypeError: if a class index is not an integer
            ValueError: as any method
            RuntimeError: if the score does not depend on a target layer
        """
        return super().__call__(class_idx, scores, normalized, targets=targets, target_shape=target_shape, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the refined map as a call does, without its checks."""
        return super().compute_cams(class_idx, scores, normalized, target_shape=target_shape, **kwargs)

    def _raw_maps(self, request: Request, target_shape: tuple[int, ...] | None = None, **options: Any) -> list[Tensor]:
        cams = self.base_cam._finished(self.base_cam._raw_maps(request, **options), request, normalized=True)
        return [self._product(cams, target_shape)]

    def _finished(self, raw: list[Tensor], request: Request, normalized: bool) -> list[Tensor]:
        return [min_max(product) for product in raw] if normalized else raw

    @staticmethod
    @torch.no_grad()
    def fuse_cams(cams: list[Tensor], target_shape: tuple[int, ...] | None = None, normalized: bool = True) -> Tensor:
        """Scale each map to [0, 1], resize them to one shape and multiply them.

        Args:
            cams: maps of the same samples, (N, *spatial) each
            target_shape: spatial shape of the result, by default the largest of each side among the maps
            normalized: whether the product is scaled to [0, 1]

        Returns:
            the product, (N, *target_shape)

        Raises:
            TypeError: if ``cams`` is not a list of tensors
            ValueError: if it is empty
        """
        product = RefineCAM._product(cams, target_shape)
        return min_max(product) if normalized else product

    @staticmethod
    def _product(cams: list[Tensor], target_shape: tuple[int, ...] | None) -> Tensor:
        return torch.stack(to_one_shape(cams, target_shape, lambda maps: [min_max(cam) for cam in maps])).prod(0)


class EigenSmoothedCAM(Wrapper):
    r"""The first principal component of a method's weighted channels, in place of their sum.

    .. math::
        M = \mathrm{ReLU}(\pm \bar X v), \qquad X_k = w_k \odot A_k

    with :math:`w` the weights of the base method, :math:`\bar X` centred over positions and :math:`v` its first
    principal component, as in Eigen-CAM (Muhammad & Yeasin 2020, arXiv:2008.00299). The sign makes the map correlate
    positively with the sum :math:`\sum_k X_k`, and the ReLU is there if the base method has one. For methods that
    weight channels; others have no such weights.

    Cost: that of the base method.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        base_method: the method that gives the weights
        base_kwargs: arguments of the base method

    Raises:
        TypeError: if ``base_method`` is not a method
    """

    @staticmethod
    def map(activation: Tensor, weights: Tensor) -> Tensor:
        """Return the first principal component of the weighted channels, (N, *spatial)."""
        product = weights.reshape(*weights.shape, *[1] * (activation.ndim - weights.ndim)) * activation
        return along(first_component(product), product)

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        found = self.base_cam._layer_weights(request, **options)
        return [self.map(activation, weights) for weights, activation in found]
