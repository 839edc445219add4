"""Methods that score masked inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, positive_integer
from torchcam._tensors import gaussian_blur, gaussian_noise, is_constant, min_max, resize
from torchcam.layers import TargetLayer

from ._finish import weighted_sum
from ._replay import Replay
from ._replaying import _ChannelCAM, _ReplayCAM
from .core import Request

Perturbation = Callable[[Tensor, Tensor], Tensor]


class ScoreCAM(_ChannelCAM):
    r"""Score-CAM (Wang et al. 2020, arXiv:1910.01279): channels weighted by the score of the input they leave visible.

    .. math::
        w = \mathrm{softmax}_k\big(f(X \odot m_k)\big), \qquad
        m_k = \mathrm{minmax}\big(U(A_k)\big), \qquad
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    with :math:`U` the upsampling to the input's size. The paper's baseline score cancels in the softmax and is not
    computed. A constant channel masks everything; all of a sample's share one evaluation.

    Cost: the user's forward pass and one per channel, in evaluation mode.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of masked inputs in one pass
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        compile: whether the model is run as ``torch.compile`` makes it: worth it over many calls, as the first one
            compiles
        max_channels: at most so many channels of each sample, those of the most energy, are evaluated; the others get
            no weight
        energy: only the channels that hold this share of a sample's energy, 0 to 1, are evaluated
        autocast: the type that the repeated passes run in, ``torch.bfloat16`` or ``torch.float16``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``batch_size`` or ``max_channels`` is not positive, ``energy`` not in (0, 1], or ``autocast``
            another type
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        compile: bool = False,  # noqa: A002 - the name that torch has for it
        **kwargs: Any,
    ) -> None:
        self.compile = compile
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _perturbations(self, image: Tensor) -> list[Perturbation]:
        """List the ways to apply a mask (B, 1, *spatial) to inputs (B, C, *spatial); their scores are averaged."""
        return [torch.mul]

    @staticmethod
    def weights(activation: Tensor, scores: Tensor) -> Tensor:
        """Return the softmax over channels of the masked inputs' scores, (N, C)."""
        return scores.softmax(1)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        replay = self._replay(request, compiled=self.compile)
        return [(activation, self._mean_scores(replay, activation)) for activation in self._activations(request)]

    def _mean_scores(self, replay: Replay, activation: Tensor) -> Tensor:
        """Score the input under each channel's mask, averaged over the perturbations, (N, C): -inf for those left out.

        How many masks differ is up to the activation, so a device is waited for, once.
        """
        image = replay.image
        num_samples, num_channels = activation.shape[:2]
        chosen = self._chosen(activation)
        channels = activation.reshape(-1, 1, *activation.shape[2:])  # (V, 1, *spatial)
        evaluated = torch.arange(num_samples * num_channels, device=activation.device)  # (V,)
        constant = is_constant(*channels.flatten(1).aminmax(dim=1))
        has_constant = bool(constant.any())
        if has_constant or chosen is not None:
            constant = constant.reshape(num_samples, num_channels)
            constant = constant if chosen is None else constant & chosen
            stand_in = constant & (constant.cumsum(1) == 1)  # each sample's first constant channel
            distinct = ~constant | stand_in
            evaluated = evaluated[(distinct if chosen is None else distinct & chosen).flatten()]
            channels = channels[evaluated]
        samples = evaluated.div(num_channels, rounding_mode="floor")
        perturbations = self._perturbations(image)

        def variants(chunk: slice) -> Iterator[Tensor]:
            masks = min_max(resize(channels[chunk], image.shape[2:]))
            if has_constant:
                blank = constant.flatten()[evaluated[chunk]]
                masks = masks.masked_fill(blank.reshape(-1, *[1] * (masks.ndim - 1)), 0.0)
            masks = masks.to(image.dtype)
            inputs = image if num_samples == 1 else image[samples[chunk]]
            for perturb in perturbations[:-1]:
                yield perturb(inputs, masks)
            last = [perturbations[-1](inputs, masks)]
            del masks, inputs  # the passes need the memory
            yield last.pop()

        found = replay.averaged(variants, samples).to(activation)
        if found.shape[0] == num_samples * num_channels:
            return found.reshape(num_samples, num_channels)
        scores = activation.new_full((num_samples * num_channels,), -torch.inf)
        scores[evaluated] = found
        scores = scores.reshape(num_samples, num_channels)
        shared = torch.where(stand_in, scores, 0.0).sum(1, keepdim=True)
        return torch.where(constant, shared, scores)


class SSCAM(ScoreCAM):
    r"""SS-CAM (Wang et al. 2020, arXiv:2006.14255): Score-CAM with the masks' scores averaged over noise.

    .. math::
        w = \mathrm{softmax}_k\Big(\frac{1}{n} \sum_{i=1}^n f\big(X \odot (m_k + \delta_i)\big)\Big), \qquad
        \delta_i \sim \mathcal{N}(0, \sigma^2)

    The same :math:`\delta_i` goes to every channel and sample, as the formula has it: channels are compared under equal
    conditions, and neither the batch nor ``batch_size`` changes a map.

    Cost: the user's forward pass and ``num_samples`` per channel, in evaluation mode.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of masked inputs in one pass
        num_samples: number of noises n
        std: standard deviation of the noise
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        seed: seed of the noise; the global random state is neither read nor changed
        generator: source of the noise in place of ``seed``
        kwargs: arguments of ``ScoreCAM`` and the base class

    Raises:
        ValueError: if ``batch_size`` or ``num_samples`` is not positive, or ``std`` negative
    """

    _options = ("batch_size", "num_samples", "std")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        num_samples: int = 35,
        std: float = 2.0,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_samples = positive_integer("num_samples", num_samples)
        self.std = finite_number("std", std, 0)
        self.generator = seed if generator is None else generator
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _perturbations(self, image: Tensor) -> list[Perturbation]:
        noises = gaussian_noise((self.num_samples, 1, *image.shape[2:]), image, self.std, self.generator)
        return [partial(_noisy, noise) for noise in noises]


class ISCAM(ScoreCAM):
    r"""IS-CAM (Naidu et al. 2020, arXiv:2010.03023): Score-CAM with the masks' scores integrated over their strength.

    .. math::
        w = \mathrm{softmax}_k\Big(\frac{1}{n} \sum_{i=1}^n f(a_i \cdot X \odot m_k)\Big), \qquad
        a_i = \sum_{j=1}^i \frac{j}{n}

    Cost: the user's forward pass and ``num_samples`` per channel, in evaluation mode.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of masked inputs in one pass
        num_samples: number of steps n
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        kwargs: arguments of ``ScoreCAM`` and the base class

    Raises:
        ValueError: if ``batch_size`` or ``num_samples`` is not positive
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        num_samples: int = 10,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        self.num_samples = positive_integer("num_samples", num_samples)
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _perturbations(self, image: Tensor) -> list[Perturbation]:
        strengths = [step * (step + 1) / 2 / self.num_samples for step in range(1, self.num_samples + 1)]
        return [partial(_scaled, strength) for strength in strengths]


class GroupCAM(_ReplayCAM):
    r"""Group-CAM (Zhang et al. 2021, arXiv:2103.13859): groups of channels weighted by their gain on a blurred image.

    The channels form groups of neighbours, :math:`r = 1 \dots g`. Of the sum of each, weighted as in Grad-CAM, the
    highest values are kept as a mask:

    .. math::
        D_r = \mathrm{ReLU}\Big(\sum_{k \in r} A_k \frac{1}{|S|} \sum_s \frac{\partial Y}{\partial A_k(s)}\Big),
        \qquad m_r = \mathrm{minmax}\big(D_r \cdot [D_r > P_q(D_r)]\big)

        \alpha_r = f\big(X \odot U(m_r) + \tilde X \odot (1 - U(m_r))\big) - f(\tilde X), \qquad
        M = \mathrm{ReLU}\Big(\sum_r \alpha_r m_r\Big)

    with :math:`P_q` the ``percentile`` over positions, :math:`U` the upsampling to the input's size and
    :math:`\tilde X` the input blurred with a Gaussian of 51 positions and a standard deviation of 50.

    The call takes ``retain_graph=False``, as gradient methods do.

    Cost: the user's forward pass, a backward pass to the target layer, a forward pass of the blurred input and one per
    group and layer, in evaluation mode.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        batch_size: largest number of masked inputs in one pass
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        groups: number of groups g, as far as there are channels; they differ by one channel at most
        percentile: the share of positions that a mask leaves out, in percent; 0 keeps all but the lowest
        autocast: the type that the repeated passes run in, ``torch.bfloat16`` or ``torch.float16``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``batch_size`` or ``groups`` is not positive, or ``percentile`` not in [0, 100)
    """

    _differentiates = True
    _weighs_gradients = True
    _options = ("batch_size", "groups", "percentile")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        groups: int = 32,
        percentile: float = 70.0,
        **kwargs: Any,
    ) -> None:
        self.groups = positive_integer("groups", groups)
        if not 0 <= percentile < 100:
            raise ValueError(f"`percentile` must lie in [0, 100), got {percentile}")
        self.percentile = percentile
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    @staticmethod
    def map(activation: Tensor, masks: Tensor, gains: Tensor) -> Tensor:
        """Return the masks (N, g, *spatial), weighted by their gains (N, g) and summed: (N, *spatial)."""
        return weighted_sum(gains.to(masks), masks)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        activations, gradients = self._activations(request), self._gradients(request)
        replay = self._replay(request)
        image = replay.image
        blurred = gaussian_blur(image, 51, 50.0)
        samples = torch.arange(len(image), device=image.device)
        baseline = replay.masked(lambda chunk: blurred[chunk], samples)
        evidence = []
        for activation, gradient in zip(activations, gradients, strict=True):
            masks = self._group_masks(activation, gradient)  # (N, g, *spatial)
            owners, flat = samples.repeat_interleave(masks.shape[1]), masks.flatten(0, 1).unsqueeze(1)

            def variants(chunk: slice, owners: Tensor = owners, flat: Tensor = flat) -> Tensor:
                rows = owners[chunk]
                return torch.lerp(blurred[rows], image[rows], resize(flat[chunk], image.shape[2:]).to(image.dtype))

            gains = replay.masked(variants, owners).reshape(masks.shape[:2]) - baseline.unsqueeze(1)
            evidence.append((activation, masks, gains))
        return evidence

    def _group_masks(self, activation: Tensor, gradient: Tensor) -> Tensor:
        num_channels, count = activation.shape[1], min(self.groups, activation.shape[1])
        group = torch.arange(num_channels, device=activation.device) * count // num_channels
        weighted = torch.einsum("nc,nc...->nc...", gradient.flatten(2).mean(-1), activation)
        sums = weighted.new_zeros(len(weighted), count, *weighted.shape[2:]).index_add_(1, group, weighted).relu()
        ordered = sums.flatten(2).sort(-1).values
        rank = self.percentile / 100 * (ordered.shape[-1] - 1)
        lower, upper = ordered[..., math.floor(rank)], ordered[..., math.ceil(rank)]
        threshold = lower.lerp(upper, rank % 1).reshape(*sums.shape[:2], *[1] * (sums.ndim - 2))
        return min_max(torch.where(sums <= threshold, 0.0, sums), start_dim=2)


def _noisy(noise: Tensor, inputs: Tensor, masks: Tensor) -> Tensor:
    return inputs * (masks + noise)


def _scaled(strength: float, inputs: Tensor, masks: Tensor) -> Tensor:
    return strength * inputs * masks
