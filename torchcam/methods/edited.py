"""Methods that score edited activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, positive_integer
from torchcam.layers import TargetLayer

from ._replaying import _ChannelCAM, _EditingCAM
from .core import Request


class AblationCAM(_EditingCAM, _ChannelCAM):
    r"""Ablation-CAM (Desai & Ramaswamy, WACV 2020): channels weighted by the drop of the score without them.

    .. math::
        w_k = \frac{f(X) - f_k}{|f(X)|}, \qquad M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    with :math:`f_k` the score when channel :math:`k` of the activation is set to ``baseline``. The paper divides by
    :math:`f(X)` itself, whose sign would turn the map round where the score is negative. The divisor is one number a
    sample and does not show in a normalised map; where it is 0, the drops are not divided.

    Cost: the user's forward pass, one more in evaluation mode, then what follows the layer once per channel. First runs
    of that part on a few rows prove that it gives the score of the whole model. Where it does not, or hooks of the
    user's are on the model, the whole model runs once per channel, hooks included.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of edited activations in one pass
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        baseline: the value that stands for an absent channel
        max_channels: at most so many channels of each sample, those of the most energy, are evaluated; the others get
            no weight
        energy: only the channels that hold this share of a sample's energy, 0 to 1, are evaluated
        autocast: the type that the repeated passes run in, ``torch.bfloat16`` or ``torch.float16``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``batch_size`` or ``max_channels`` is not positive, ``energy`` not in (0, 1], or ``baseline``
            not finite
    """

    _options = ("batch_size", "baseline")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 64,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        baseline: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.baseline = finite_number("baseline", baseline)
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    @staticmethod
    def weights(activation: Tensor, score: Tensor, without: Tensor) -> Tensor:
        """Return the relative drop of the score (N,) to the scores without each channel (N, C): (N, C)."""
        scale = torch.where(score == 0, 1.0, score.abs())
        return (score.unsqueeze(1) - without) / scale.unsqueeze(1)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        return [
            (a, *self._edited(request, index, self._without_channels, a.shape[1], self._chosen(a)))
            for index, a in enumerate(self._activations(request))
        ]

    def _without_channels(self, activation: Tensor, channels: Tensor) -> Tensor:
        activation[torch.arange(len(channels), device=channels.device), channels] = self.baseline
        return activation


class ReciproCAM(_EditingCAM):
    r"""Recipro-CAM (Byun & Lee 2022, arXiv:2209.14074): the score of what is left of the activation around a position.

    .. math::
        M(s) = \mathrm{ReLU}\big(f(A \odot B_s)\big)

    with :math:`B_s` a window around position :math:`s`: in each dimension the binomial coefficients, scaled to sum 1
    and cut off at the border. In two dimensions and for ``window=3`` these are 1/4 at :math:`s`, 1/8 beside it, 1/16
    at the corners, as in the paper; ``window=1`` keeps the position alone.

    The map is made of scores: unlike those of other methods, it changes when a constant is added to the logits.

    Cost: the user's forward pass, one more in evaluation mode, then what follows the layer once per position. First
    runs of that part on a few rows prove that it gives the score of the whole model. Where it does not, or hooks of the
    user's are on the model, the whole model runs once per position, hooks included.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of edited activations in one pass
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        window: the window's side, an odd number
        autocast: the type that the repeated passes run in, ``torch.bfloat16`` or ``torch.float16``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``batch_size`` is not positive, or ``window`` not positive and odd
    """

    _options = ("batch_size", "window")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 64,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        window: int = 3,
        **kwargs: Any,
    ) -> None:
        self.window = positive_integer("window", window)
        if window % 2 == 0:
            raise ValueError(f"`window` must be odd, so that a position is in its middle, got {window}")
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    @staticmethod
    def map(activation: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (N, positions) as a map, (N, *spatial)."""
        return scores.reshape(-1, *activation.shape[2:])

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        return [
            (a, self._edited(request, index, self._around_positions, a.shape[2:].numel())[1])
            for index, a in enumerate(self._activations(request))
        ]

    def _around_positions(self, activation: Tensor, positions: Tensor) -> Tensor:
        shape, reach = activation.shape[2:], self.window // 2
        coefficients = [math.comb(self.window - 1, reach + distance) for distance in range(reach + 1)]
        profile = activation.new_tensor([*coefficients, 0]) / 2 ** (self.window - 1)  # by distance
        for axis, place in enumerate(torch.unravel_index(positions, shape)):
            distance = (torch.arange(shape[axis], device=place.device) - place.unsqueeze(1)).abs()  # (B, side)
            factor = profile[distance.clamp(max=reach + 1)]
            activation = activation * factor.reshape(len(positions), 1, *[1] * axis, -1, *[1] * (len(shape) - axis - 1))
        return activation
