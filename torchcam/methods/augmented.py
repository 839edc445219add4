"""Methods that ask another one about variants of the input: transformed ones, and windows of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, one_of, positive_integer
from torchcam._tensors import gaussian_blur, resize, to_float
from torchcam.layers import TargetLayer
from torchcam.targets import Selector

from ._replay import Replay
from .composite import Wrapper
from .core import _CAM, Request
from .gradient import GradCAM

Transform = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class AugmentedCAM(Wrapper):
    r"""Test-time augmentation: the mean of a method's maps over transformed inputs, each transformed back.

    .. math::
        M = \frac{1}{T} \sum_t b_t\big(\mathrm{minmax}(M(a_t(X)))\big)

    with :math:`a_t` a transform of the input and :math:`b_t` its inverse on maps. By default those are the six pairs of
    one of {nothing, mirroring the last axis} and a multiplication of the input by 0.9, 1 or 1.1. The transformed
    passes run in evaluation mode.

    Cost: the user's forward pass and, for each transform, a forward pass and what the base method needs; and a forward
    pass of the first sample, which must get its recorded score.

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
        super().__init__(model, target_layer, input_shape, base_method=base_method, **base_kwargs)
        self._runs_model = True

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        image = self._recorded_call(request).image
        count = max(len(image), 1)
        total = len(self.transforms) * len(image)
        numbers = torch.arange(total, device=image.device)  # all samples under the first transform, then the second

        def transformed(chunk: slice) -> Tensor:
            which, samples = numbers[chunk] // count, numbers[chunk] % count
            first, last = chunk.start // count, max(chunk.stop - 1, 0) // count
            parts = [(self.transforms[t][0], image[samples[which == t]]) for t in range(first, last + 1)]
            return torch.cat([_same_shape(augment, part) for augment, part in parts])

        layers = self._explain_variants(transformed, numbers % count, request, self.batch_size, **options)
        means = []
        for maps in layers:
            by_transform = zip(self.transforms, maps.chunk(len(self.transforms)), strict=True)
            means.append(torch.stack([back(cam) for (_, back), cam in by_transform]).mean(0))
        return means

    def _pool_layers(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        return maps


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


class SESS(Wrapper):
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
    and what the base method needs; and one of the first sample, which must get its recorded score. Twelve scales of a
    square image make 122 windows.

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
        if not 0 <= pre_filter_ratio < 1:
            raise ValueError(f"`pre_filter_ratio` must be in [0, 1), got {pre_filter_ratio}")
        self.scales = positive_integer("scales", scales)
        self.window_size = positive_integer("window_size", window_size)
        self.pre_filter_ratio = pre_filter_ratio
        self.theta = finite_number("theta", theta, 0)
        self.smooth = smooth
        self.pool = one_of("pool", pool, ("mean", "max"))
        self.batch_size = positive_integer("batch_size", batch_size)
        super().__init__(model, target_layer, input_shape, base_method=base_method, **base_kwargs)
        self._runs_model = True
        self._explains_many = False  # each class looks at windows of its own

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        call = self._recorded_call(request)
        image = call.image
        windows = _Windows(image, self.window_size, self.scales)

        def cut(numbers: Tensor) -> tuple[Callable[[slice], Tensor], Tensor]:
            samples = torch.arange(len(image), device=image.device).repeat_interleave(numbers.shape[1])
            return lambda chunk: windows.cut(image[samples[chunk]], numbers.flatten()[chunk]), samples

        every = torch.arange(len(windows), device=image.device).expand(len(image), -1)  # (N, W)
        probability = request.targets
        if not isinstance(probability, Selector):
            probability = _Probability(request.class_idx, request.targets, len(image))
        replay = Replay(self.model, call, probability, self.batch_size, description="SESS")
        found = to_float(replay.masked(*cut(every))).relu().reshape(every.shape)
        best, kept = found.topk(len(windows) - int(self.pre_filter_ratio * len(windows)), dim=1)
        weights = torch.where(best[:, :1] > 0, best / best[:, :1], 1.0)

        layers = self._explain_variants(*cut(kept), request, self.batch_size, **options)
        fused = [self._fuse(windows, maps.reshape(*kept.shape, *maps.shape[1:]), weights, kept) for maps in layers]
        return [gaussian_blur(cam.unsqueeze(1), 11, 5.0).squeeze(1) for cam in fused] if self.smooth else fused

    def _pool_layers(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        return maps

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
        """Place maps of windows (B, *grid) where these are in the image, 0 around: (B, *spatial)."""
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
