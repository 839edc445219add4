"""Extractors that wrap another extractor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchcam._tensors import gaussian_blur, min_max, resize, to_float
from torchcam.layers import TargetLayer
from torchcam.targets import ClassIndex, OutputTarget, Selector, as_class_indices, class_columns, read_logits

from ._diagnose import Diagnosis, diagnose
from ._replay import Replay, finite_number, positive_integer
from ._stream import stream
from .core import _CAM, one_by_one, plain_tensors, to_one_shape
from .decomposition import along, first_component
from .gradient import GradCAM, GradCAMpp

__all__ = ["SESS", "AugmentedCAM", "EigenSmoothedCAM", "FinerCAM", "RefineCAM"]

Transform = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class _Wrapper:
    """An extractor whose hooks and recorded pass are those of the extractor it wraps."""

    def __init__(self, base_cam: _CAM) -> None:
        self.base_cam = base_cam

    @property
    def model(self) -> nn.Module:
        """The model to explain."""
        return self.base_cam.model

    @property
    def target_names(self) -> list[str]:
        """The names of the target layers."""
        return self.base_cam.target_names

    @property
    def submodule_dict(self) -> dict[str, nn.Module]:
        """The modules of the model by name."""
        return self.base_cam.submodule_dict

    @property
    def hook_handles(self) -> list[RemovableHandle]:
        """The handles of the hooks on the model."""
        return self.base_cam.hook_handles

    @property
    def hook_a(self) -> list[Tensor | None]:
        """The activation of each target layer, (N, C, *spatial)."""
        return self.base_cam.hook_a

    @property
    def hook_g(self) -> list[Tensor | None]:
        """The gradient of the last explained score for each target layer, (N, C, *spatial)."""
        return self.base_cam.hook_g

    def enable_hooks(self) -> None:
        """Record the forward passes from now on."""
        self.base_cam.enable_hooks()

    def disable_hooks(self) -> None:
        """Ignore the forward passes from now on."""
        self.base_cam.disable_hooks()

    def reset_hooks(self) -> None:
        """Forget the recorded pass."""
        self.base_cam.reset_hooks()

    def remove_hooks(self) -> None:
        """Take all hooks off the model. May be called more than once."""
        self.base_cam.remove_hooks()

    def stream(
        self,
        batches: Iterable[Any],
        class_idx: ClassIndex | Callable[[Any], ClassIndex] | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> Iterator[list[Tensor]]:
        """Run the model on batches and yield the maps of each, as :meth:`_CAM.stream` does."""
        yield from stream(self, self.base_cam, batches, class_idx, targets, **kwargs)

    def diagnose(
        self,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> Diagnosis:
        """Say what is wrong with the maps of the recorded pass, as :meth:`_CAM.diagnose` does."""
        return diagnose(self, class_idx, targets=targets)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.base_cam.__exit__(exc_type, exc_value, traceback)


def _check_base_method(base_method: Any) -> None:
    if not (isinstance(base_method, type) and issubclass(base_method, _CAM)):
        raise TypeError(f"`base_method` must be a CAM method such as GradCAM, got {base_method!r}")


class _Contrast(Selector):
    """The score of a class less that of its references, weighted.

    Args:
        classes: the explained classes, (N,)
        references: the classes each is compared with, (N, T)
        gamma: the strength of the comparison
        weighting: ``"mean"`` or ``"softmax"``
    """

    def __init__(self, classes: Tensor, references: Tensor, gamma: float, weighting: str) -> None:
        super().__init__(classes, None, len(classes))
        self.references = references
        self.gamma = gamma
        self.weighting = weighting

    def by_class(self, logits: Tensor, samples: Tensor | None) -> Tensor:
        """Score logits (B, K)."""
        references = self.references if samples is None else self.references[samples]
        contrast = super().by_class(logits, samples).unsqueeze(1) - self.gamma * logits.gather(1, references)
        if self.weighting == "mean":
            return contrast.mean(1)
        weights = logits.softmax(1).gather(1, references)
        return (weights * contrast).sum(1) / weights.sum(1)


class FinerCAM(_Wrapper):
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
        _check_base_method(base_method)
        if weighting not in {"mean", "softmax"}:
            raise ValueError(f"`weighting` must be 'mean' or 'softmax', got {weighting!r}")
        self.gamma = finite_number("gamma", gamma)
        self.num_references = positive_integer("num_references", num_references)
        self.weighting = weighting
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
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
        if class_idx is None or "targets" in kwargs:
            raise ValueError("FinerCAM contrasts a class with others: it takes `class_idx`, and no `targets`")
        self.base_cam._precheck(class_idx, scores)
        return self.compute_cams(class_idx, scores, comparison_idx, normalized, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        comparison_idx: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps as a call does, without its checks."""
        columns = class_columns(class_idx, None)
        if columns is not None:
            options = {"scores": scores, "comparison_idx": comparison_idx, "normalized": normalized}
            return one_by_one(columns, partial(self.compute_cams, **options, **kwargs), self.base_cam._uses_gradients)
        with plain_tensors():
            contrast = self._contrast(class_idx, scores, comparison_idx)
        return self.base_cam.compute_cams(None, scores, normalized, targets=contrast, **kwargs)

    def _contrast(self, class_idx: Any, scores: Any, comparison_idx: Any) -> Selector:
        """Give the score that tells each sample's class from its references."""
        logits = read_logits(self.base_cam._output(scores)).detach()
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"FinerCAM needs scores (N, classes) of two classes or more, got {tuple(logits.shape)}")
        classes = as_class_indices(class_idx, len(logits), logits.shape[1], logits.device)
        if comparison_idx is None:
            references = self._closest(logits, classes)
        else:
            references = _reference_rows(comparison_idx, classes, logits.shape[1])
        return _Contrast(classes, references, self.gamma, self.weighting)

    def _closest(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Find the classes whose scores are closest to the explained one's, (N, T)."""
        distances = (logits - logits.gather(1, classes.unsqueeze(1))).abs()
        distances = distances.scatter(1, classes.unsqueeze(1), torch.inf)
        return distances.topk(min(self.num_references, logits.shape[1] - 1), dim=1, largest=False).indices

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Fuse the maps of several layers as the base method does."""
        return self.base_cam.fuse_cams(cams, target_shape)

    def __repr__(self) -> str:
        return (
            f"FinerCAM(base_method={type(self.base_cam).__name__}, target_layer={self.target_names}, "
            f"gamma={self.gamma}, num_references={self.num_references})"
        )


def _reference_rows(comparison_idx: Any, classes: Tensor, num_classes: int) -> Tensor:
    """Check explicit references and give them as (N, T)."""
    batch_size = len(classes)
    rows = comparison_idx.tolist() if isinstance(comparison_idx, Tensor) else comparison_idx
    rows = [rows] if not isinstance(rows, (list, tuple)) else list(rows)
    if not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        rows = [rows] * batch_size
    if len(rows) != batch_size or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            "`comparison_idx` must be a class, a list of classes, or a list of equally many per sample: "
            f"got {comparison_idx!r} for a batch of {batch_size}"
        )
    device = classes.device
    references = torch.stack([as_class_indices(row, len(row), num_classes, device) for row in rows])
    if (references == classes.unsqueeze(1)).any():
        raise ValueError(f"`comparison_idx` {comparison_idx!r} compares an explained class with itself")
    if any(len(set(row)) != len(row) for row in rows):
        raise ValueError(f"`comparison_idx` {comparison_idx!r} names a class twice")
    return references


class RefineCAM(_Wrapper):
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
        _check_base_method(base_method)
        if not isinstance(target_layer, (list, tuple)):
            raise TypeError(f"`target_layer` must be a list of two layers or more, got {type(target_layer).__name__}")
        if len(target_layer) < 2:
            raise ValueError(
                f"`target_layer` must list two layers or more to refine one by the other, got {len(target_layer)}"
            )
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

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
        self.base_cam._precheck(class_idx, scores, targets)
        return self.compute_cams(class_idx, scores, normalized, target_shape, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the refined map as a call does, without its checks."""
        columns = class_columns(class_idx, targets)
        if columns is not None:
            options = {"scores": scores, "normalized": normalized, "target_shape": target_shape}
            return one_by_one(columns, partial(self.compute_cams, **options, **kwargs), self.base_cam._uses_gradients)
        cams = self.base_cam.compute_cams(class_idx, scores, targets=targets, **kwargs)
        with torch.enable_grad() if kwargs.get("create_graph") else plain_tensors():
            return [self._product(cams, target_shape, normalized)]

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
        return RefineCAM._product(cams, target_shape, normalized)

    @staticmethod
    def _product(cams: list[Tensor], target_shape: tuple[int, ...] | None, normalized: bool) -> Tensor:
        product = torch.stack(to_one_shape(cams, target_shape, lambda maps: [min_max(cam) for cam in maps])).prod(0)
        return min_max(product) if normalized else product

    def __repr__(self) -> str:
        return f"RefineCAM(base_method={type(self.base_cam).__name__}, target_layer={self.target_names})"


class _Smoothed(_Wrapper):
    """What the extractors share that are called as the extractor they wrap is, and give smoother maps.

    A subclass gives `_smooth_maps`, which take the place of the raw maps of the base method.
    """

    class_agnostic = False
    _options: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None,
        input_shape: tuple[int, ...],
        base_method: type[_CAM],
        **base_kwargs: Any,
    ) -> None:
        _check_base_method(base_method)
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))
        self.class_agnostic = base_method.class_agnostic

    def _smooth_maps(self, class_idx: ClassIndex | None, scores: Any, **kwargs: Any) -> list[Tensor]:
        """Give each target layer's map before ReLU and scaling, (N, *spatial)."""
        raise NotImplementedError

    def __call__(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps of the recorded pass.

        Args:
            class_idx: the class to explain, for the whole batch or one per sample
            scores: the model's output; may be left out
            normalized: whether each map is scaled to [0, 1]
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar
            kwargs: options of the base method

        Returns:
            one map (N, *spatial) per target layer

        Raises:
            AssertionError: if no forward pass was recorded
            TypeError: if a class index is not an integer
            ValueError: as any method
            RuntimeError: if the score does not depend on a target layer
        """
        self.base_cam._precheck(class_idx, scores, targets)
        return self.compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps as a call does, without its checks."""
        return self.base_cam.compute_cams(
            class_idx, scores, normalized, targets=targets, raw_maps=self._smooth_maps, **kwargs
        )

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Fuse the maps of several layers as the base method does."""
        return self.base_cam.fuse_cams(cams, target_shape)

    def __repr__(self) -> str:
        values = "".join(f", {option}={getattr(self, option)}" for option in self._options)
        return (
            f"{type(self).__name__}(base_method={type(self.base_cam).__name__}, "
            f"target_layer={self.target_names}{values})"
        )


class EigenSmoothedCAM(_Smoothed):
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

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, input_shape, base_method, **base_kwargs)

    def _smooth_maps(self, class_idx: ClassIndex | None, scores: Any, **kwargs: Any) -> list[Tensor]:
        weights = self.base_cam._get_weights(class_idx, scores, **kwargs)
        products = [
            weight.reshape(*weight.shape, *[1] * (activation.ndim - weight.ndim)) * activation
            for weight, activation in zip(weights, self.base_cam._activations(), strict=True)
        ]
        return [along(first_component(product), product.sum(1)) for product in products]


class AugmentedCAM(_Smoothed):
    r"""Test-time augmentation: the mean of a method's maps over transformed inputs, each transformed back.

    .. math::
        M = \frac{1}{T} \sum_t b_t\big(\mathrm{minmax}(M(a_t(X)))\big)

    with :math:`a_t` a transform of the input and :math:`b_t` its inverse on maps. By default those are the six pairs of
    one of {nothing, mirroring the last axis} and a multiplication of the input by 0.9, 1 or 1.1. The transformed
    passes run in evaluation mode.

    Cost: the user's forward pass and, for each transform, a forward pass and what the base method needs.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        base_method: the method that makes the maps
        transforms: pairs of functions: from inputs (B, C, *spatial) to transformed ones of the same shape, and from
            their maps (B, *spatial) to maps of the inputs
        batch_size: largest number of transformed inputs in one pass
        base_kwargs: arguments of the base method

    Raises:
        TypeError: if ``base_method`` is not a method, or ``transforms`` not a list of pairs of functions
        ValueError: if ``batch_size`` is not positive or ``transforms`` empty

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> flip = lambda tensor: tensor.flip(-1)
        >>> same = lambda tensor: tensor
        >>> extractor = AugmentedCAM(model, "layer4", base_method=GradCAM, transforms=[(same, same), (flip, flip)])
        >>> with extractor, torch.inference_mode():
        ...     scores = model(torch.rand(1, 3, 224, 224))
        ...     (cam,) = extractor(0, scores)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        transforms: Sequence[Transform] | None = None,
        batch_size: int = 32,
        **base_kwargs: Any,
    ) -> None:
        self.transforms = _flips_and_intensities() if transforms is None else list(transforms)
        if not self.transforms:
            raise ValueError("`transforms` is empty: there is no map to take the mean of")
        for pair in self.transforms:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(callable(step) for step in pair)):
                raise TypeError(f"`transforms` must be pairs of functions, for inputs and for maps, got {pair!r}")
        self.batch_size = positive_integer("batch_size", batch_size)
        super().__init__(model, target_layer, input_shape, base_method, **base_kwargs)
        self.base_cam._uses_input = True

    def _smooth_maps(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every transformed input has scores of its own
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        base = self.base_cam
        image = base._recorded_call().image
        total = len(self.transforms) * len(image)
        numbers = torch.arange(total, device=image.device)  # all samples under the first transform, then the second

        def transformed(chunk: slice) -> Tensor:
            which, samples = numbers[chunk] // len(image), numbers[chunk] % len(image)
            first, last = chunk.start // len(image), (chunk.stop - 1) // len(image)
            parts = [(self.transforms[t][0], image[samples[which == t]]) for t in range(first, last + 1)]
            return torch.cat([_same_shape(augment, part) for augment, part in parts])

        agnostic = class_idx is None and targets is None
        select = None if agnostic else base._selector(class_idx, targets)
        layers = base._explain_variants(transformed, numbers % len(image), select, self.batch_size, **kwargs)
        means = []
        for maps in layers:
            by_transform = zip(self.transforms, maps.chunk(len(self.transforms)), strict=True)
            means.append(torch.stack([back(cam) for (_, back), cam in by_transform]).mean(0))
        return means


def _flips_and_intensities() -> list[Transform]:
    def scaling(factor: float, flipped: bool) -> Callable[[Tensor], Tensor]:
        return lambda tensor: factor * (tensor.flip(-1) if flipped else tensor)

    return [
        (scaling(factor, flipped), scaling(1.0, flipped)) for flipped in (False, True) for factor in (0.9, 1.0, 1.1)
    ]


def _same_shape(augment: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Transform inputs (B, C, *spatial), whose shape must stay."""
    augmented = augment(image)
    if augmented.shape != image.shape:
        raise ValueError(f"`transforms` must keep the input's shape {tuple(image.shape)}, got {tuple(augmented.shape)}")
    return augmented


class SESS(_Smoothed):
    r"""SESS (Tursun et al. 2022, arXiv:2207.01769): a method's maps of sliding windows at several scales, pooled.

    The input is enlarged so that its shorter side is

    .. math::
        L_i = \mathrm{round}\big(w (1 + \tfrac{2}{7} i)\big), \qquad i = 0, \dots, n - 1

    with :math:`w` the window's side: 224, 288, 352, ... for 224. At each scale windows of :math:`w` a side cover it
    edge to edge, the last of a row moved back inside. With :math:`M_j` the normalised map of window j, :math:`p_j` the
    probability of the class in it (or the target's own score, where a target was given; none below 0) and
    :math:`P_j` the way from the window back to the input:

    .. math::
        M_j' = P_j\Big(\frac{p_j}{\max_i p_i} U(M_j)\Big), \qquad
        M(s) = \frac{\sum_j M_j'(s)\, [M_j'(s) > \theta]}{\sum_j [M_j'(s) > \theta]} \quad \text{or} \quad
        \max_j M_j'(s)

    which is smoothed by a Gaussian (11 positions, :math:`\sigma = 5`). Maps have the input's resolution.

    Cost: the user's forward pass, a forward pass per window, and for each window that the filter leaves a forward pass
    and what the base method needs. Twelve scales of a square image make 122 windows.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        base_method: the method that makes the windows' maps
        scales: number of scales n
        window_size: side w of a window
        pre_filter_ratio: share of the windows to leave out, those with the lowest scores
        theta: what a position's weighted map must exceed to count in the mean
        smooth: whether the result is smoothed
        pool: ``"mean"`` or ``"max"``
        batch_size: largest number of windows in one pass
        base_kwargs: arguments of the base method

    Raises:
        TypeError: if ``base_method`` is not a method, or a number that counts not an integer
        ValueError: if ``pool`` is unknown, ``pre_filter_ratio`` not in [0, 1) or another number out of range
    """

    _options = ("scales", "window_size", "pool")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        scales: int = 12,
        window_size: int = 224,
        pre_filter_ratio: float = 0.0,
        theta: float = 0.0,
        smooth: bool = True,
        pool: Literal["mean", "max"] = "mean",
        batch_size: int = 32,
        **base_kwargs: Any,
    ) -> None:
        if pool not in {"mean", "max"}:
            raise ValueError(f"`pool` must be 'mean' or 'max', got {pool!r}")
        if not 0 <= pre_filter_ratio < 1:
            raise ValueError(f"`pre_filter_ratio` must be in [0, 1), got {pre_filter_ratio}")
        self.scales = positive_integer("scales", scales)
        self.window_size = positive_integer("window_size", window_size)
        self.pre_filter_ratio = pre_filter_ratio
        self.theta = finite_number("theta", theta, 0)
        self.smooth = smooth
        self.pool = pool
        self.batch_size = positive_integer("batch_size", batch_size)
        super().__init__(model, target_layer, input_shape, base_method, **base_kwargs)
        self.base_cam._uses_input = True
        self.base_cam._explains_many = False  # each class looks at windows of its own

    def _smooth_maps(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every window has scores of its own
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        base, call = self.base_cam, self.base_cam._recorded_call()
        image = call.image
        windows = _Windows(image, self.window_size, self.scales)

        def cut(numbers: Tensor) -> tuple[Callable[[slice], Tensor], Tensor]:
            samples = torch.arange(len(image), device=image.device).repeat_interleave(numbers.shape[1])
            return lambda chunk: windows.cut(image[samples[chunk]], numbers.flatten()[chunk]), samples

        every = torch.arange(len(windows), device=image.device).expand(len(image), -1)  # (N, W)
        probability = _Probability(class_idx, targets, len(image))
        replay = Replay(self.model, call, probability, self.batch_size, progress=False, description="SESS")
        found = to_float(replay.masked(*cut(every))).relu().reshape(every.shape)
        best, kept = found.topk(len(windows) - int(self.pre_filter_ratio * len(windows)), dim=1)
        weights = torch.where(best[:, :1] > 0, best / best[:, :1], 1.0)

        select = base._selector(class_idx, targets)
        layers = base._explain_variants(*cut(kept), select, self.batch_size, **kwargs)
        fused = [self._fuse(windows, maps.reshape(*kept.shape, *maps.shape[1:]), weights, kept) for maps in layers]
        return [gaussian_blur(cam.unsqueeze(1), 11, 5.0).squeeze(1) for cam in fused] if self.smooth else fused

    def _fuse(self, windows: _Windows, maps: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        """Pool the maps (N, V, *spatial) of V windows a sample at each position of the input, (N, *spatial)."""
        total = count = maps.new_zeros(())
        for cam, weight, number in zip(maps.unbind(1), weights.unbind(1), numbers.unbind(1), strict=True):
            pasted = windows.paste(cam * weight.reshape(-1, *[1] * (cam.ndim - 1)), number)
            counted = ~(pasted <= self.theta)
            total = torch.maximum(total, pasted) if self.pool == "max" else total + torch.where(counted, pasted, 0.0)
            count = count + counted
        return total if self.pool == "max" else total / count.clamp(min=1)


class _Probability(Selector):
    """The probability of a class, or the score of a target."""

    def by_class(self, logits: Tensor, samples: Tensor | None) -> Tensor:
        """Score logits (B, K), or (B,) for the only class."""
        single = logits.ndim < 2 or logits.shape[1] == 1
        return super().by_class(logits.sigmoid() if single else logits.softmax(1), samples)


class _Windows:
    """Windows that cover an enlarged image edge to edge, at several scales.

    Args:
        image: the image, (N, C, *spatial)
        side: the windows' sides
        scales: the number of scales; the shorter side of the image is that of a window at the first
    """

    def __init__(self, image: Tensor, side: int, scales: int) -> None:
        self.shape = image.shape[2:]
        self.side = side
        windows = []
        for scale in range(scales):
            shorter = round(side * (1 + 2 * scale / 7))
            sizes = [round(shorter * length / min(self.shape)) for length in self.shape]
            corners = ([min(start, size - side) for start in range(0, size, side)] for size in sizes)
            windows += [(corner, sizes) for corner in itertools.product(*corners)]
        corners_and_sizes = torch.tensor(windows, dtype=to_float(image).dtype, device=image.device)  # (W, 2, D)
        self.corners, self.sizes = corners_and_sizes.unbind(1)

    def __len__(self) -> int:
        return len(self.corners)

    def cut(self, image: Tensor, numbers: Tensor) -> Tensor:
        """Cut a window out of each enlarged image: (B, C, *spatial) and (B,) to (B, C, side, ...)."""
        places = []
        for axis, length in enumerate(self.shape):
            corner, size = self.corners[numbers, axis, None], self.sizes[numbers, axis, None]
            centres = corner + torch.arange(self.side, device=image.device) + 0.5
            places.append((centres * length / size - 0.5).clamp(0, length - 1))
        return _interpolated(to_float(image), places).to(image.dtype)

    def paste(self, maps: Tensor, numbers: Tensor) -> Tensor:
        """Put maps of windows (B, *grid) where these are in the image, 0 around: (B, *spatial)."""
        maps = resize(maps.unsqueeze(1), [self.side] * (maps.ndim - 1))
        places = []
        for axis, length in enumerate(self.shape):
            corner, size = self.corners[numbers, axis, None], self.sizes[numbers, axis, None]
            centres = (torch.arange(length, device=maps.device) + 0.5) * size / length
            places.append(torch.minimum((centres - 0.5).clamp(min=0), size - 1) - corner)
        return _interpolated(maps, places).squeeze(1)


def _interpolated(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Read (B, C, *spatial) at fractional positions (B, P) along each axis, linearly and with 0 outside."""
    for axis, place in enumerate(places, 2):
        sources = torch.arange(tensor.shape[axis], device=tensor.device)
        weights = (1 - (place.unsqueeze(2) - sources).abs()).relu().to(tensor.dtype)  # (B, P, sources)
        tensor = torch.einsum("bc...s,bps->bc...p", tensor.movedim(axis, -1), weights).movedim(-1, axis)
    return tensor
