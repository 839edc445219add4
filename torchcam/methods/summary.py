"""Methods that look at the activation alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number
from torchcam._tensors import seeded
from torchcam.layers import TargetLayer

from .core import _CAM


class _ClassAgnosticCAM(_CAM):
    """What methods share that look at the activation alone: a class need not be given, and is ignored if it is."""

    class_agnostic = True
    _relu = True


class FEM(_ClassAgnosticCAM):
    r"""Feature explanation method (Fuad et al., IPTA 2020): where channels are unusually high, weighted by their mean.

    .. math::
        M(s) = \mathrm{ReLU}\Big(\sum_k \mu_k\, [A_k(s) > \mu_k + n_\sigma \sigma_k]\Big)

    with :math:`\mu_k` and :math:`\sigma_k` the mean and the (population) standard deviation over positions. The map is
    the same for every class: one that is given is ignored.

    Cost: the user's forward pass.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        n_sigma: how many standard deviations above the mean are unusual
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``n_sigma`` is not finite
    """

    _options = ("target_layer", "n_sigma")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        n_sigma: float = 2.0,
        **kwargs: Any,
    ) -> None:
        self.n_sigma = finite_number("n_sigma", n_sigma)
        super().__init__(model, target_layer, input_shape, **kwargs)

    def map(self, activation: Tensor) -> Tensor:
        """Return the sum of the means of the channels that are unusually high at a position, (N, *spatial)."""
        positions = tuple(range(2, activation.ndim))
        deviation, mean = torch.std_mean(activation, positions, correction=0, keepdim=True)
        return (mean * (activation > mean + self.n_sigma * deviation)).sum(1)


class MeanActivation(_ClassAgnosticCAM):
    r"""Mean of the channels (LaFAM, Karjauv & Albayrak 2024, arXiv:2407.06059): a baseline that knows of no class.

    .. math::
        M = \mathrm{ReLU}\Big(\frac{1}{C} \sum_k A_k\Big)

    The map is the same for every class: one that is given is ignored.

    Cost: the user's forward pass.
    """

    @staticmethod
    def weights(activation: Tensor) -> Tensor:
        """Return the same weight for each channel, (N, C)."""
        return activation.new_full(activation.shape[:2], 1 / activation.shape[1])


class RandomCAM(_ClassAgnosticCAM):
    r"""Channels weighted at random: the baseline that every comparison of methods needs.

    .. math::
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w_k \sim \mathcal{U}(-1, 1)

    The same weights go to every sample of a batch and, as long as there is no ``generator``, to every call and layer: a
    map can be made again. The map is the same for every class: one that is given is ignored.

    Cost: the user's forward pass.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        seed: seed of the weights; the global random state is neither read nor changed
        generator: source of the weights in place of ``seed``, for new ones in every call
        kwargs: arguments of the base class
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        self.generator = seed if generator is None else generator
        super().__init__(model, target_layer, input_shape, **kwargs)

    def weights(self, activation: Tensor) -> Tensor:
        """Return random weights, the same for each sample, (N, C)."""
        generator = seeded(self.generator, activation.device)
        draws = torch.rand(activation.shape[1], generator=generator, device=generator.device, dtype=torch.float64)
        return (2 * draws - 1).to(activation).expand(activation.shape[:2])
