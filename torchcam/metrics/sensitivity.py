"""Max-sensitivity and infidelity: the stability of maps, and how well they predict changes of the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcam._checks import callable_object, finite_number, positive_integer

from .core import POSITIVE, CAMMetric, Explained, Extractor, Keys, LogitsFn, check_seed

Perturbation = Callable[[Tensor], Tensor]


class Sensitivity(CAMMetric):
    r"""Max-sensitivity and infidelity (Yeh et al. 2019, arXiv:1901.09392).

    With the map :math:`\Phi`, upsampled to the input :math:`x`, and the score :math:`p` of the explained class, after
    ``logits_fn``:

    .. math::
        \text{max\_sensitivity} = \max_{\|\delta\|_\infty \le r}
        \frac{\|\Phi(x + \delta) - \Phi(x)\|_2}{\|\Phi(x)\|_2}, \qquad
        \text{infidelity} = \operatorname{mean}_I \big( \beta \textstyle\sum_s \Phi_s \sum_c I_{cs} -
        (p(x) - p(x - I)) \big)^2

    The maximum is over ``num_samples`` perturbations, by default uniform in the ball of radius :math:`r`; the class
    stays that of :math:`x`. The mean is over ``num_perturbations`` perturbations :math:`I`: by default, each is what a
    square of the input holds, so that :math:`x - I` has a hole of 0 there. As the scale of a map is arbitrary, the
    factor :math:`\beta` is by default that which fits the sample best, as the authors have it,
    :math:`\operatorname{mean}_I (\Phi^\top I \cdot \Delta p) / \operatorname{mean}_I (\Phi^\top I)^2`; with
    ``normalize=False`` it is 1.

    Both are 0 or more, and a good map has low values. A map that is the same for every input is not sensitive at all:
    read the two together. A sample with a map of zeros has no max-sensitivity, and is left out unless all its
    perturbed maps are zero as well.

    What is drawn is the same for every sample and batch, so that the result depends neither on the batches nor on the
    number of processes. Samples whose maps or scores are not finite are left out: ``nan_count`` says how many,
    ``total`` how many are in the means.

    Cost: for each batch a forward pass and what the extractor needs, that again ``num_samples`` times, and
    ``num_perturbations`` inputs per sample, in chunks of ``batch_size``.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; a
            model and given maps are not enough, as perturbed inputs are explained as well
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        radius: the radius of the ball, in the units of the input
        num_samples: number of perturbed inputs that are explained
        perturb: in place of the uniform noise, a function from inputs (B, C, *spatial) to perturbed ones; called
            for every chunk of inputs, in which each occurs as often as it shall be perturbed
        removal: the perturbation for the infidelity: ``"square"``, ``"gaussian"`` for normal noise, or a
            function from inputs (B, C, *spatial) to perturbations :math:`I`, called as ``perturb`` is
        num_perturbations: number of these perturbations
        square_size: the side of the square, as a share of the input's sides
        std: the standard deviation of the normal noise, in the units of the input
        normalize: whether the infidelity is that of the map in its best scale
        seed: the seed of the perturbations
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        sensitivity: the sum of the max-sensitivities so far
        infidelity: the sum of the infidelities so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type, or there is no extractor
        ValueError: if a number is out of range, or ``removal`` unknown

    Example:
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = Sensitivity(extractor, num_samples=2, num_perturbations=4)
        ...     metric.update(torch.rand(2, 3, 64, 64))
        >>> sorted(metric.summary())
        ['infidelity', 'max_sensitivity']
    """

    _keys: ClassVar[Keys] = {
        "max_sensitivity": ("sensitivity", False, POSITIVE),
        "infidelity": ("infidelity", False, POSITIVE),
    }
    _explains_again = True

    def __init__(
        self,
        cam_extractor: Extractor,
        logits_fn: LogitsFn | None = None,
        *,
        radius: float = 0.02,
        num_samples: int = 10,
        perturb: Perturbation | None = None,
        removal: Literal["square", "gaussian"] | Perturbation = "square",
        num_perturbations: int = 50,
        square_size: float = 0.25,
        std: float = 0.2,
        normalize: bool = True,
        seed: int = 0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        callable_object("perturb", perturb, optional=True)
        if not callable(removal) and removal not in ("square", "gaussian"):
            raise ValueError(f"`removal` must be 'square', 'gaussian' or a callable, got {removal!r}")
        if not isinstance(normalize, bool):
            raise TypeError(f"`normalize` must be True or False, got {normalize!r}")
        square_size = finite_number("square_size", square_size)
        if not 0 < square_size <= 1:
            raise ValueError(f"`square_size` must be a share of the input's sides, above 0 to 1, got {square_size!r}")
        super().__init__(cam_extractor, logits_fn, {"perturb": perturb, "removal": removal}, **kwargs)
        self.radius = finite_number("radius", radius, lowest=0)
        self.num_samples = positive_integer("num_samples", num_samples)
        self.num_perturbations = positive_integer("num_perturbations", num_perturbations)
        self.square_size = square_size
        self.std = finite_number("std", std, lowest=0)
        self.normalize = normalize
        self.seed = check_seed(seed)
        self.batch_size = positive_integer("batch_size", batch_size)

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        device = explained.image.device
        devices = [] if device.type == "cpu" else [device]
        draws = callable(self.perturb) or callable(self.removal)  # perhaps random numbers
        with torch.random.fork_rng(devices, enabled=draws, device_type=device.type):
            return {"sensitivity": self._max_sensitivity(explained), "infidelity": self._infidelity(explained)}

    def _max_sensitivity(self, explained: Explained) -> Tensor:
        """Return each sample's largest relative change of its map, (N,)."""
        image, cam = explained.image, explained.cam
        noise = torch.zeros(())
        if self.perturb is None:
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.rand((self.num_samples, *image.shape[1:]), generator=generator).to(image)
            noise = (2 * noise - 1) * self.radius

        def perturbed(samples: Tensor, variants: Tensor) -> Tensor:
            x = image[samples]
            return x + noise[variants] if self.perturb is None else _checked("perturb", self.perturb(x), x)

        def change(again: Tensor, samples: Tensor, _variants: Tensor) -> Tensor:
            length: Tensor = torch.linalg.vector_norm((again - cam[samples]).flatten(1).double(), dim=1)
            return length

        changes = explained.explain_again(perturbed, change, self.num_samples, self.batch_size).amax(1)
        return torch.where(changes == 0, 0.0, changes / torch.linalg.vector_norm(cam.flatten(1).double(), dim=1))

    def _infidelity(self, explained: Explained) -> Tensor:
        """Return each sample's mean squared error in predicting the fall of its score, (N,)."""
        image, cam = explained.image, explained.cam
        remove = self._removals(image)
        predicted = torch.zeros(len(image), self.num_perturbations, dtype=torch.float64, device=image.device)

        def rest(samples: Tensor, variants: Tensor) -> Tensor:
            x = image[samples]
            removed = remove(x, variants)
            predicted[samples, variants] = (removed.sum(1) * cam[samples]).flatten(1).sum(1, dtype=torch.float64)
            return x - removed

        left = explained.replay(rest, self.num_perturbations, self.batch_size)
        fall = explained.score.unsqueeze(1).double() - left
        if self.normalize:
            power = (predicted**2).sum(1, keepdim=True)
            best = (predicted * fall).sum(1, keepdim=True) / torch.where(power > 0, power, 1.0)
            predicted = predicted * best
        error: Tensor = ((predicted - fall) ** 2).mean(1)
        return error

    def _removals(self, image: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function from inputs (B, C, *spatial) and the numbers of perturbations (B,) to perturbations."""
        removal, number = self.removal, self.num_perturbations
        if callable(removal):
            return lambda x, _variants: _checked("removal", removal(x), x)
        # Drawn where it comes out the same for every device.
        generator = torch.Generator().manual_seed(self.seed)
        if removal == "gaussian":
            noise = torch.randn((number, *image.shape[1:]), generator=generator).to(image) * self.std
            return lambda _x, variants: noise[variants]
        square = torch.ones((number, 1, *image.shape[2:]), dtype=torch.bool)
        for axis, side in enumerate(image.shape[2:], start=2):
            length = max(round(self.square_size * side), 1)
            start = (torch.rand(number, generator=generator) * (side - length + 1)).long().unsqueeze(1)
            inside = (torch.arange(side) >= start) & (torch.arange(side) < start + length)  # (V, side)
            square &= inside.reshape(number, *[side if each == axis else 1 for each in range(1, image.ndim)])
        square = square.to(image.device)
        return lambda x, variants: x * square[variants]


def _checked(name: str, perturbed: Any, image: Tensor) -> Tensor:
    """Check what a perturbing function returns."""
    if not isinstance(perturbed, Tensor) or perturbed.shape != image.shape:
        found = tuple(perturbed.shape) if isinstance(perturbed, Tensor) else type(perturbed).__name__
        raise ValueError(f"`{name}` must return a tensor shaped like its input, {tuple(image.shape)}, got {found}")
    return perturbed.detach().to(image)
