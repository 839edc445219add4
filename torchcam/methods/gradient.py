"""Methods that weight activations by the gradient of the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchcam._checks import finite_number, positive_integer
from torchcam._chunks import run_chunks
from torchcam._names import moved
from torchcam._replica import normal_mode
from torchcam._tensors import gaussian_noise
from torchcam.layers import TargetLayer

from ._gradients import OTHER_SIGN, share_of_other_sign
from ._replay import VariantRunner
from ._running import thread, warn
from .core import _CAM, Request, on_replica

__all__ = [
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMpp",
    "HiResCAM",
    "LayerCAM",
    "ShapleyCAM",
    "SmoothGradCAMpp",
    "XGradCAM",
]


def __getattr__(name: str) -> Any:
    return moved(name, ("FinerCAM", "LeGrad", "RefineCAM"), __name__)  # which TorchCAM has here


class _GradientCAM(_CAM):
    """What gradient methods share: a pass that keeps its graph from the target layers on, and a final ReLU.

    They work the same whether the forward pass ran with gradients on, under ``torch.no_grad()`` or under
    ``torch.inference_mode()``; in the last two only what follows the (earliest) target layer keeps a graph. All take
    the call option ``retain_graph=False``: whether that graph is kept, for another call on the same pass or for the
    user's own ``loss.backward()``.

    The pure functions take the activation and the gradient of the score for it, (N, C, *spatial) each.
    """

    _relu = True
    _differentiates = True
    _weighs_gradients = True
    _explains_many = True

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        return list(zip(self._activations(request), self._gradients(request), strict=True))


class GradCAM(_GradientCAM):
    r"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): channels weighted by their mean gradient.

    .. math::
        w_k = \frac{1}{|S|} \sum_s \frac{\partial Y}{\partial A_k(s)}, \qquad
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    Cost: the user's forward pass and a backward pass to the target layer.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> with GradCAM(model, "layer4") as extractor, torch.inference_mode():
        ...     scores = model(torch.rand(2, 3, 224, 224))
        ...     (cam,) = extractor(scores.argmax(1), scores)
        >>> cam.shape
        torch.Size([2, 7, 7])
    """

    _hides_gradients = False

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the mean gradient of each channel, (N, C)."""
        return gradient.mean(tuple(range(2, gradient.ndim)))


class _OneSignCAM(_GradientCAM):
    """What methods share that sum activations over positions: sums of both signs cancel. They warn of such layers."""

    _expects_one_sign = True

    def moved_to(self, replica: nn.Module) -> Self:
        """Return an extractor like this one with its hooks, if it has any, on a replica of the model."""
        vars(self).setdefault("_checked", set())  # both look at a layer once
        return super().moved_to(replica)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        evidence = super()._evidence(request)
        self._check_signs(request, [activation for activation, *_ in evidence])
        return evidence

    def _check_signs(self, request: Request, activations: Sequence[Tensor]) -> None:
        """Warn, once for each layer, if activations have both signs."""
        checked: set[str] = vars(self).setdefault("_checked", set())
        for name, activation in zip(request.recorded.names, activations, strict=True):
            if thread.quiet or name in checked:
                continue
            checked.add(name)
            if bool((share_of_other_sign(activation) > OTHER_SIGN).any()):
                warn(
                    f"'{name}' has activations of both signs, but the weights of {type(self).__name__} are meant for "
                    "one: sums over positions cancel. HiResCAM, the sum of G_k A_k over the channels at each position, "
                    "holds for both",
                    stacklevel=6,
                )


class GradCAMpp(_OneSignCAM):
    r"""Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063): positive gradients, weighted position by position.

    With :math:`G = \partial Y / \partial A`, and equation 19 of the paper for :math:`\alpha`:

    .. math::
        \alpha_k(s) = \frac{G_k(s)^2}{2 G_k(s)^2 + G_k(s)^3 \sum_{s'} A_k(s')}, \qquad
        w_k = \sum_s \alpha_k(s)\, \mathrm{ReLU}(G_k(s)), \qquad
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    where :math:`\alpha`, in reduced form :math:`1 / (2 + G_k(s) \sum A_k)`, is 0 if that denominator is no larger than
    the call option ``eps=1e-8``.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the sum of each channel's positive gradients, weighted by alpha, (N, C)."""
        return _plus_plus_weights(gradient, gradient, activation, eps)


class SmoothGradCAMpp(_OneSignCAM):
    r"""Smooth Grad-CAM++ (Omeiza et al. 2019, arXiv:1908.01224): Grad-CAM++ with gradients averaged over noisy inputs.

    With :math:`D_p = \frac{1}{n} \sum_i G_i^p`, the mean power of the gradients at :math:`X + \delta_i`,
    :math:`\delta_i \sim \mathcal{N}(0, \sigma^2)`, and the activation :math:`A` of the clean pass:

    .. math::
        \alpha = \frac{D_2}{2 D_2 + D_3 \sum_{s'} A(s')}, \qquad
        w = \sum_s \alpha(s)\, \mathrm{ReLU}(D_1(s)), \qquad
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    The same noise goes to every sample of a batch, so that a sample's map does not depend on its neighbours, and the
    noisy passes run in evaluation mode. The call takes ``eps=1e-8``, as Grad-CAM++ does.

    Cost: the user's forward pass, then ``num_samples`` forward passes and as many backward passes to the target layer;
    and a forward pass of the first sample, which must get its recorded score.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        num_samples: number of noisy inputs n
        std: standard deviation of the noise
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        batch_size: largest number of noisy inputs in one pass
        seed: seed of the noise; the global random state is neither read nor changed
        generator: source of the noise in place of ``seed``
        progress: whether to show a progress bar
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``num_samples`` or ``batch_size`` is not positive, or ``std`` negative
    """

    _runs_model = True
    _explains_many = False
    _options = ("target_layer", "num_samples", "std")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        num_samples: int = 4,
        std: float = 0.3,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        batch_size: int = 32,
        seed: int = 0,
        generator: torch.Generator | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        self.num_samples = positive_integer("num_samples", num_samples)
        self.std = finite_number("std", std, 0)
        self.batch_size = positive_integer("batch_size", batch_size)
        self.generator = seed if generator is None else generator
        self.progress = progress
        super().__init__(model, target_layer, input_shape, **kwargs)

    @staticmethod
    def weights(activation: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the weights for the mean powers of the gradient, (3, N, C, *spatial): (N, C)."""
        first, second, third = moments
        ratio = _ratio(third, second).to(activation.dtype)
        return _plus_plus_weights(first.to(activation.dtype), ratio, activation, eps)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        activations = self._activations(request)
        self._check_signs(request, activations)
        return list(zip(activations, self._gradient_moments(request, activations), strict=True))

    def _gradient_moments(self, request: Request, activations: list[Tensor]) -> list[Tensor]:
        """Average the first three powers of each layer's gradient over the noisy inputs: (3, N, C, *spatial) each."""
        call, select = self._recorded_call(request), self._selector(request)
        image = call.image
        noise = gaussian_noise((self.num_samples, *image.shape[1:]), image, self.std, self.generator)
        samples = torch.arange(len(image), device=image.device).repeat(self.num_samples)
        # The third power of a small gradient is 0 in float32.
        wide = image.dtype if image.device.type == "mps" else torch.float64
        moments = [activation.new_zeros((3, *activation.shape), dtype=wide) for activation in activations]

        with on_replica(self) as noisy, call.as_recorded():
            run = VariantRunner(noisy.model, call)
            run.check(self, request.recorded, select)

            def accumulate(chunk: slice) -> None:
                rows = samples[chunk]
                draws = torch.arange(chunk.start, chunk.stop, device=image.device) // len(image)
                run(image[rows] + noise[draws], rows)
                found = noisy._gradients(Request(noisy._recorder.find(), targets=select.of(rows)))
                for moment, gradient in zip(moments, found, strict=True):
                    for power in (1, 2, 3):
                        moment[power - 1].index_add_(0, rows, gradient.to(wide) ** power)

            run_chunks(accumulate, len(samples), self.batch_size, progress=self.progress, description="SmoothGradCAMpp")
            request.recorded.unbalanced = noisy._recorder.find().unbalanced
        return [moment / self.num_samples for moment in moments]


class XGradCAM(_OneSignCAM):
    r"""XGrad-CAM (Fu et al. 2020, arXiv:2008.02312): gradients averaged with the activation as their weight.

    .. math::
        w_k = \frac{\sum_s G_k(s) A_k(s)}{\sum_s A_k(s)}, \qquad M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    where :math:`w_k` is 0 if the denominator vanishes (below the call option ``eps=1e-8`` of
    :math:`\sum_s |A_k(s)|`).

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the mean gradient of each channel, weighted by the activation, (N, C)."""
        mass = eps * activation.abs().flatten(2).sum(-1)
        return _ratio((gradient * activation).flatten(2).sum(-1), activation.flatten(2).sum(-1), mass)


class LayerCAM(_GradientCAM):
    r"""LayerCAM (Jiang et al. 2021, IEEE TIP 30): positive gradients as element-wise weights.

    .. math::
        M(s) = \mathrm{ReLU}\Big(\sum_k \mathrm{ReLU}(G_k(s)) A_k(s)\Big)

    Fusing several layers takes the element-wise maximum of :math:`\tanh(2 M / \max M)`, per sample.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the positive gradients, (N, C, *spatial)."""
        return gradient.relu()

    @staticmethod
    def _scale_cams(cams: list[Tensor]) -> list[Tensor]:
        if len(cams) == 1:
            return cams
        peaks = [cam.flatten(1).amax(1).reshape(-1, *[1] * (cam.ndim - 1)) for cam in cams]
        return [torch.tanh(2 * _ratio(cam, peak)) for cam, peak in zip(cams, peaks, strict=True)]


class HiResCAM(_GradientCAM):
    r"""HiResCAM (Draelos & Carin 2020, arXiv:2011.08891): gradients as element-wise weights, not averaged.

    .. math::
        M(s) = \mathrm{ReLU}\Big(\sum_k G_k(s) A_k(s)\Big)

    With a linear head the map sums, before the ReLU, to the score less the bias: it shows what the model used. The maps
    of several layers are fused by their mean, as in pytorch-grad-cam: each is a sum of contributions to one score.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient, (N, C, *spatial)."""
        return gradient

    @staticmethod
    def _join_cams(cams: Tensor) -> Tensor:
        return cams.mean(0)


class GradCAMElementWise(_GradientCAM):
    r"""Element-wise Grad-CAM (as in pytorch-grad-cam): the positive contributions of each channel.

    .. math::
        M(s) = \sum_k \mathrm{ReLU}\big(G_k(s) A_k(s)\big)

    Where no activation is negative, this is LayerCAM.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient where its product with the activation is not negative, (N, C, *spatial)."""
        return torch.where(gradient * activation < 0, 0.0, gradient)


class ShapleyCAM(_GradientCAM):
    r"""ShapleyCAM (Cai 2025, arXiv:2501.06261): channels weighted by their mean gradient, corrected for its curvature.

    .. math::
        w_k = \frac{1}{|S|} \sum_s \Big(G - \frac{1}{2} H A\Big)_k(s), \qquad
        M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big)

    with :math:`H` the Hessian of the score for the layer's output, whose product with that output is computed without
    :math:`H` itself. Behind a piecewise linear head it vanishes, and the map is that of Grad-CAM; the author therefore
    explains the target :math:`y_c + \log p_c`.

    If an operation behind the target layer has no second derivative, as fused attention, a call is a ``RuntimeError``;
    a function marked ``once_differentiable`` counts as linear. Balanced gradients are those of a linear function,
    without curvature to correct for: with them, the map is that of Grad-CAM.

    Cost: the user's forward pass, a backward pass to the target layers and one more for each of them.
    """

    _explains_many = False

    @staticmethod
    def weights(activation: Tensor, gradient: Tensor, product: Tensor) -> Tensor:
        """Return the mean over positions of the gradient less half of the Hessian's product, (N, C)."""
        return (gradient - product / 2).flatten(2).mean(-1)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        if self.gradients == "balanced":
            return [(*of_layer, torch.zeros_like(of_layer[1])) for of_layer in super()._evidence(request)]
        recorded = request.recorded
        twice = replace(request, create_graph=True)
        activations, gradients = self._activations(request), self._gradients(twice)
        attached = recorded.gradients
        if not request.create_graph:
            recorded.gradients = [gradient.detach() for gradient in attached]
            gradients = [gradient.detach() for gradient in gradients]
        evidence = []
        for index, (activation, gradient, graph, row) in enumerate(
            zip(activations, gradients, attached, recorded.rows, strict=True)
        ):
            keep = request.retain_graph or index < len(attached) - 1
            product = _hessian_product(graph, row.edge, row.values, keep, request.create_graph)
            evidence.append((activation, gradient, self._to_grid(recorded, product, row.name)))
        return evidence


def _hessian_product(gradient: Tensor, edge: Any, activation: Any, retain_graph: bool, create_graph: bool) -> Tensor:
    """Multiply the Hessian of a score for an activation with that activation, given the gradient with its graph."""
    if not gradient.requires_grad:
        return torch.zeros_like(activation)
    try:
        with normal_mode():
            (product,) = torch.autograd.grad(
                gradient,
                edge,
                activation if create_graph else activation.detach(),
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in ("is not implemented", "ouble backward")):
            raise RuntimeError(
                "ShapleyCAM differentiates twice, but an operation behind the target layer has no second derivative. "
                "If that is fused attention, run the model in the block "
                "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`"
            ) from error
        raise
    return torch.zeros_like(activation) if product is None else product


def _plus_plus_weights(gradient: Tensor, ratio: Tensor, activation: Tensor, eps: float) -> Tensor:
    """Sum the positive gradients weighted by alpha = 1 / (2 + ratio * sum A) over positions, (N, C).

    ``ratio`` is the third power of the gradient by its second; where both vanish the gradient does as well.
    """
    mass = activation.flatten(2).sum(-1).reshape(*activation.shape[:2], *[1] * (activation.ndim - 2))
    alpha = _ratio(torch.ones_like(ratio), 2 + ratio * mass, eps)
    return (alpha * gradient.relu()).flatten(2).sum(-1)


def _ratio(numerator: Tensor, denominator: Tensor, eps: float | Tensor = 0.0) -> Tensor:
    """Divide; 0 where the denominator is no larger than ``eps``. NaN stays NaN."""
    return torch.where(denominator.abs() <= eps, 0.0, numerator / denominator)
