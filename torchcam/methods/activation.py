"""Methods that need no gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._tensors import gaussian_blur, is_constant, min_max, resize, to_float
from torchcam.layers import TargetLayer, layer_name
from torchcam.targets import ClassIndex, OutputTarget, Selector, as_class_indices

from ._replay import Edit, Replay, finite_number, gaussian_noise, positive_integer, seeded
from .core import _CAM

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "SSCAM",
    "AblationCAM",
    "GroupCAM",
    "MeanActivation",
    "RandomCAM",
    "ReciproCAM",
    "ScoreCAM",
]

logger = logging.getLogger(__name__)

Perturbation = Callable[[Tensor, Tensor], Tensor]


class CAM(_CAM):
    r"""Class activation map (Zhou et al. 2016, arXiv:1512.04150): channels weighted by the linear classifier.

    .. math::
        M = \sum_k W_{c,k} A_k

    For models whose target layer is followed by global average pooling and one linear layer. The weights are read
    when the map is computed, so a head that was trained, replaced, moved or cast meanwhile is the one that counts.

    Cost: the user's forward pass.

    Args:
        model: the model to explain
        target_layer: the layer before the pooling
        fc_layer: the linear (or 1 x 1 convolution) classifier, as a module or its name; by default the last linear
            layer of the model
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        kwargs: arguments of the base class

    Raises:
        TypeError: if ``fc_layer`` is neither a module nor a string
        ValueError: if there are several target layers, or no linear classifier can be found
    """

    _options = ("target_layer",)

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        fc_layer: TargetLayer | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if isinstance(target_layer, (list, tuple)) and len(target_layer) > 1:
            raise ValueError(f"CAM explains one layer, the one before the pooling: got {len(target_layer)} of them")
        if fc_layer is None:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            if not linear:
                raise ValueError(f"{type(model).__name__} has no linear layer: name its classifier as `fc_layer`")
            fc_layer = linear[-1]
            logger.warning("no value was provided for `fc_layer`, thus set to '%s'.", fc_layer)
        self.fc_name = layer_name(model, fc_layer, "fc_layer")
        super().__init__(model, target_layer, input_shape, **kwargs)

    def _get_weights(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every method takes them
        targets: object = None,
    ) -> list[Tensor]:
        if targets is not None or class_idx is None:
            raise ValueError("CAM reads the classifier's weights of a class: pass `class_idx`, not `targets`")
        (activation,) = self._activations()
        weight = getattr(self.model.get_submodule(self.fc_name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape[2:].numel() != 1 or weight.ndim < 2:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else None
            raise ValueError(f"`fc_layer` '{self.fc_name}' has weights of shape {found}, not (classes, channels)")
        if weight.shape[1] != activation.shape[1]:
            raise ValueError(
                f"`fc_layer` '{self.fc_name}' takes {weight.shape[1]} channels, but `target_layer` "
                f"'{self.target_names[0]}' has {activation.shape[1]}: CAM needs the layer before the pooling"
            )
        indices = as_class_indices(class_idx, len(activation), len(weight), weight.device)
        weights = weight.detach().flatten(1)[indices].to(activation)
        return [-weights if self._record.request.relu == "negative" else weights]


class _ReplayCAM(_CAM):
    """What methods that run the model again share: how many variants are in memory at a time, and a final ReLU.

    All take ``autocast``, the type (``torch.bfloat16`` or ``torch.float16``) that the repeated passes run in where the
    hardware has it faster; weights and maps are off by its rounding. None is the type of the recorded pass.
    """

    _relu = True
    _uses_input = True
    _options: tuple[str, ...] = ("batch_size",)

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        progress: bool = False,
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        self.batch_size = positive_integer("batch_size", batch_size)
        self.progress = progress
        if autocast not in {None, torch.bfloat16, torch.float16}:
            raise ValueError(f"`autocast` must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
        self.autocast = autocast
        super().__init__(model, target_layer, input_shape, **kwargs)

    def _replay(
        self,
        class_idx: ClassIndex | None,
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None,
        **options: Any,
    ) -> Replay:
        return Replay(
            self.model,
            self._recorded_call(),
            self._selector(class_idx, targets),
            self.batch_size,
            progress=self.progress,
            description=type(self).__name__,
            autocast=self.autocast,
            **options,
        )

    def _edited(
        self, replay: Replay, index: int, edit: Edit, num_variants: int, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the inputs, (N,), and variants of them, (N, V), whose activation at a target layer is edited.

        ``edit`` goes from activations in grid form (B, C, *spatial), which it may change, and the numbers of a variant
        of each (B,) to the edited ones (B, C, *spatial). Where only some variants are ``chosen``, (N, V), the others
        get the score of the input.
        """
        if self._record.names != self.target_names:
            raise ValueError(
                f"{type(self).__name__} edits one tensor of a layer, but the target layers returned "
                f"{', '.join(self._record.names)}: name a layer inside them"
            )
        name = self.target_names[index]

        def in_layout_of_layer(output: Tensor, variants: Tensor) -> Tensor:
            return self._from_grid(edit(self._to_grid(output, name), variants), output, name)

        activation = self._record.activations[index]
        assert activation is not None  # noqa: S101 - for the type checker: there is one of each name
        batch = 0 if self.reshape_transform is not None else self._layout(activation, name).batch
        unedited, edited = replay.edited(
            self.submodule_dict[name],
            in_layout_of_layer,
            num_variants,
            batch=batch,
            chosen=chosen,
            recorded=self._record.known(index),
        )
        return to_float(unedited), to_float(edited)


class _ChannelCAM(_ReplayCAM):
    """What methods share that run the model once per channel.

    They take two options that trade exactness for time, of which the strictest counts; a channel that is left out has
    no weight. Channels are ranked by their energy, the sum of their squares, in each sample and layer.

    ``max_channels``: at most so many channels are evaluated; None for no limit.
    ``energy``: only the strongest channels are evaluated, as many as it takes to hold this share (0 to 1) of the energy
    of all; None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        max_channels: int | None = None,
        energy: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.max_channels = None if max_channels is None else positive_integer("max_channels", max_channels)
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"`energy` is a share, more than 0 and at most 1, got {energy}")
        self.energy = energy
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _chosen(self, activation: Tensor) -> Tensor | None:
        """Tell which channels are evaluated, (N, C); None for all."""
        if self.max_channels is None and self.energy is None:
            return None
        energy, order = activation.flatten(2).square().sum(-1).sort(stable=True, dim=1, descending=True)
        chosen = torch.ones_like(order, dtype=torch.bool)
        if self.max_channels is not None:
            chosen[:, self.max_channels :] = False
        if self.energy is not None:
            before = energy.cumsum(1) - energy
            chosen &= before < self.energy * energy.sum(1, keepdim=True)
            chosen[:, 0] = True
        return torch.zeros_like(chosen).scatter_(1, order, chosen)


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
        fold_batch_norm: whether batch normalisation is folded into the convolutions before it: the same scores to
            float rounding, in less time; models that allow no folding run as they are
        max_channels: at most so many channels of each sample, those of the most energy, are evaluated; the others get
            no weight
        energy: only the channels that hold this share of a sample's energy, 0 to 1, are evaluated
        autocast: the type that the repeated passes run in, ``torch.bfloat16`` or ``torch.float16``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``batch_size`` or ``max_channels`` is not positive, ``energy`` not in (0, 1], ``autocast``
            another type, or ``compile`` and ``fold_batch_norm`` are both on
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        compile: bool = False,  # noqa: A002 - the name that torch has for it
        fold_batch_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        if compile and fold_batch_norm:
            raise ValueError("`compile` and `fold_batch_norm` are both on: what is compiled cannot be folded")
        self.compile = compile
        self.fold_batch_norm = fold_batch_norm
        self._compiled: Callable[..., Any] | None = None
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _perturbations(self, image: Tensor) -> Iterator[Perturbation]:  # noqa: ARG002 - subclasses need it
        """Yield the ways to apply a mask (B, 1, *spatial) to inputs (B, C, *spatial); their scores are averaged."""
        yield torch.mul

    def _get_weights(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every method takes them
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
    ) -> list[Tensor]:
        if self.compile and self._compiled is None:
            self._compiled = torch.compile(self.model)
        replay = self._replay(class_idx, targets, compiled=self._compiled, fold_batch_norm=self.fold_batch_norm)
        return [self._mean_scores(replay, activation).softmax(1) for activation in self._activations()]

    def _mean_scores(self, replay: Replay, activation: Tensor) -> Tensor:
        """Score the input under each channel's mask, averaged over the perturbations, (N, C): -inf for those left out.

        How many masks differ is up to the activation, so a device is waited for, once.
        """
        image = replay.call.image
        num_channels = activation.shape[1]
        channels = activation.flatten(0, 1).unsqueeze(1)  # (N * C, 1, *spatial)
        flat = activation.flatten(2)
        chosen = self._chosen(activation)
        constant = is_constant(flat.amin(-1), flat.amax(-1))  # (N, C)
        constant = constant if chosen is None else constant & chosen
        stand_in = constant & (constant.cumsum(1) == 1)  # each sample's first constant channel
        distinct = ~constant | stand_in
        distinct = distinct if chosen is None else distinct & chosen
        evaluated = distinct.flatten().nonzero().squeeze(1)  # (V,)
        samples = evaluated.div(num_channels, rounding_mode="floor")
        blank = constant.flatten()[evaluated].reshape(-1, *[1] * (activation.ndim - 1))
        perturbations = list(self._perturbations(image))

        def variants(chunk: slice) -> Iterator[Tensor]:
            masks = min_max(resize(channels[evaluated[chunk]], image.shape[2:])).masked_fill(blank[chunk], 0.0)
            inputs, masks = image[samples[chunk]], masks.to(image.dtype)
            for perturb in perturbations[:-1]:
                yield perturb(inputs, masks)
            inputs = perturbations[-1](inputs, masks)
            del masks  # the passes need the memory
            yield inputs

        scores = activation.new_full(activation.shape[:2], -torch.inf).flatten()
        scores[evaluated] = replay.averaged(variants, samples).to(scores)
        scores = scores.reshape(activation.shape[:2])
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

    def _perturbations(self, image: Tensor) -> Iterator[Perturbation]:
        for noise in gaussian_noise((self.num_samples, 1, *image.shape[2:]), image, self.std, self.generator):
            yield partial(_noisy, noise)


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

    def _perturbations(self, image: Tensor) -> Iterator[Perturbation]:  # noqa: ARG002 - the strength depends on none
        for step in range(1, self.num_samples + 1):
            strength = step * (step + 1) / 2 / self.num_samples
            yield partial(_scaled, strength)


class AblationCAM(_ChannelCAM):
    r"""Ablation-CAM (Desai & Ramaswamy, WACV 2020): channels weighted by the drop of the score without them.

    .. math::
        w_k = \frac{f(X) - f_k}{|f(X)|}, \qquad M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    with :math:`f_k` the score when channel :math:`k` of the activation is set to ``baseline``. The paper divides by
    :math:`f(X)` itself, whose sign would turn the map round where the score is negative. The divisor is one number a
    sample and does not show in a normalised map; where it is 0, the drops are not divided.

    Cost: the user's forward pass, then what follows the layer once per channel, in evaluation mode. First runs of that
    part on a few rows tell whether the score depends on nothing else. If it does (because of a connection around the
    layer, say), or the recorded pass ran in training mode, each sample costs a forward pass more. If that part cannot
    take more rows than the input has, the whole model runs once per channel.

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

    _edits_layers = True
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

    def _get_weights(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every method takes them
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
    ) -> list[Tensor]:
        replay = self._replay(class_idx, targets)
        weights = []
        for index, activation in enumerate(self._activations()):
            chosen = self._chosen(activation)
            score, without = self._edited(replay, index, self._without_channels, activation.shape[1], chosen)
            scale = torch.where(score == 0, 1.0, score.abs())
            weights.append((score.unsqueeze(1) - without) / scale.unsqueeze(1))
        return weights

    def _without_channels(self, activation: Tensor, channels: Tensor) -> Tensor:
        activation[torch.arange(len(channels), device=channels.device), channels] = self.baseline
        return activation


class ReciproCAM(_ReplayCAM):
    r"""Recipro-CAM (Byun & Lee 2022, arXiv:2209.14074): the score of what is left of the activation around a position.

    .. math::
        M(s) = \mathrm{ReLU}\big(f(A \odot B_s)\big)

    with :math:`B_s` a window around position :math:`s`: in each dimension the binomial coefficients, scaled to sum 1
    and cut off at the border. In two dimensions and for ``window=3`` these are 1/4 at :math:`s`, 1/8 beside it, 1/16
    at the corners, as in the paper; ``window=1`` keeps the position alone.

    The map is made of scores: unlike those of other methods, it changes when a constant is added to the logits.

    Cost: the user's forward pass, then what follows the layer once per position, in evaluation mode. First runs of that
    part on a few rows tell whether the score depends on nothing else. If it does (because of a connection around the
    layer, say), or the recorded pass ran in training mode, each sample costs a forward pass more. If that part cannot
    take more rows than the input has, the whole model runs once per position.

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

    _edits_layers = True
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

    def _raw_maps(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - every method takes them
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
    ) -> list[Tensor]:
        replay = self._replay(class_idx, targets)
        maps = []
        for index, activation in enumerate(self._activations()):
            _, around = self._edited(replay, index, self._around_positions, activation[0, 0].numel())
            maps.append(around.reshape(-1, *activation.shape[2:]))
        return maps

    def _around_positions(self, activation: Tensor, positions: Tensor) -> Tensor:
        shape, reach = activation.shape[2:], self.window // 2
        coefficients = [math.comb(self.window - 1, reach + distance) for distance in range(reach + 1)]
        profile = activation.new_tensor([*coefficients, 0]) / 2 ** (self.window - 1)  # by distance
        for axis, place in enumerate(torch.unravel_index(positions, shape)):
            distance = (torch.arange(shape[axis], device=place.device) - place.unsqueeze(1)).abs()  # (B, side)
            factor = profile[distance.clamp(max=reach + 1)]
            activation = activation * factor.reshape(len(positions), 1, *[1] * axis, -1, *[1] * (len(shape) - axis - 1))
        return activation


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

    _uses_gradients = True
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

    def _raw_maps(
        self,
        class_idx: ClassIndex | None,
        scores: Any,
        retain_graph: bool = False,
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
    ) -> list[Tensor]:
        self._backprop(scores, class_idx, retain_graph, targets)
        replay = self._replay(class_idx, targets)
        image = replay.call.image
        blurred = gaussian_blur(image, 51, 50.0)
        samples = torch.arange(len(image), device=image.device)
        baseline = replay.masked(lambda chunk: blurred[chunk], samples)
        maps = []
        for activation, gradient in zip(self._activations(), self._gradients(), strict=True):
            masks = self._group_masks(activation, gradient)  # (N, g, *spatial)
            owners, flat = samples.repeat_interleave(masks.shape[1]), masks.flatten(0, 1).unsqueeze(1)

            def variants(chunk: slice, owners: Tensor = owners, flat: Tensor = flat) -> Tensor:
                rows = owners[chunk]
                return torch.lerp(blurred[rows], image[rows], resize(flat[chunk], image.shape[2:]).to(image.dtype))

            gains = replay.masked(variants, owners).reshape(masks.shape[:2]) - baseline.unsqueeze(1)
            maps.append(torch.einsum("ng,ng...->n...", gains.to(masks), masks))
        return maps

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

    def _raw_maps(
        self,
        class_idx: ClassIndex | None,  # noqa: ARG002 - the map is the same for every class
        scores: Any,  # noqa: ARG002 - same
        targets: object = None,  # noqa: ARG002 - same
    ) -> list[Tensor]:
        maps = []
        for activation in self._activations():
            positions = tuple(range(2, activation.ndim))
            deviation, mean = torch.std_mean(activation, positions, correction=0, keepdim=True)
            maps.append((mean * (activation > mean + self.n_sigma * deviation)).sum(1))
        return maps


class MeanActivation(_ClassAgnosticCAM):
    r"""Mean of the channels (LaFAM, Karjauv & Albayrak 2024, arXiv:2407.06059): a baseline that knows of no class.

    .. math::
        M = \mathrm{ReLU}\Big(\frac{1}{C} \sum_k A_k\Big)

    The map is the same for every class: one that is given is ignored.

    Cost: the user's forward pass.
    """

    def _get_weights(
        self,
        class_idx: ClassIndex | None,  # noqa: ARG002 - the map is the same for every class
        scores: Any,  # noqa: ARG002 - same
        targets: object = None,  # noqa: ARG002 - same
    ) -> list[Tensor]:
        return [a.new_full(a.shape[:2], 1 / a.shape[1]) for a in self._activations()]


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

    def _get_weights(
        self,
        class_idx: ClassIndex | None,  # noqa: ARG002 - the map is the same for every class
        scores: Any,  # noqa: ARG002 - same
        targets: object = None,  # noqa: ARG002 - same
    ) -> list[Tensor]:
        weights = []
        for activation in self._activations():
            generator = seeded(self.generator, activation.device)
            draws = torch.rand(activation.shape[1], generator=generator, device=generator.device, dtype=torch.float64)
            weights.append((2 * draws - 1).to(activation).expand(activation.shape[:2]))
        return weights


def _noisy(noise: Tensor, inputs: Tensor, masks: Tensor) -> Tensor:
    return inputs * (masks + noise)


def _scaled(strength: float, inputs: Tensor, masks: Tensor) -> Tensor:
    return strength * inputs * masks
