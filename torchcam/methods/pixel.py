"""Methods of input resolution."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchcam._passes import without_inference
from torchcam._replica import modules_of, normal_mode, replicated
from torchcam._tensors import is_constant, resize, to_float

from ._gradients import nodes_of
from ._recorder import Pass, Recorder
from ._repeated import recorded_scores, warn_unless_repeated
from .core import _CAM, Request
from .gradient import GradCAM


class _PixelCAM(_CAM):
    """What the methods share that look at the model's input in place of a layer's output.

    The recorded call is repeated when the maps are computed, with gradients down to the input and in evaluation mode;
    so the user's pass may run with gradients on or off. ``hook_a`` is the input, ``hook_g`` its gradient.
    """

    _runs_model = True
    looks_at_a_layer = False
    _options = ()

    def __init__(
        self,
        model: nn.Module,
        target_layer: None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if target_layer not in (None, "", [""]):
            raise ValueError(f"{type(self).__name__} looks at the input, not at a `target_layer`: got {target_layer!r}")
        super().__init__(model, model, input_shape, **kwargs)

    def _recording(self, model: nn.Module, names: Sequence[str], **options: Any) -> Recorder:
        return Recorder(model, names, keeps_outputs=False, ended=_keep_image, **options)

    def _batch_dimension(self, recorded: Pass, tensor: Tensor, name: str) -> int:
        return 0

    def _to_grid(self, recorded: Pass, tensor: Tensor, name: str) -> Tensor:
        return to_float(tensor)


def _keep_image(ended: Pass) -> None:
    call = ended.call
    if call.found is None and call.signal is not None:
        call.axes = (1,)
    if call.signal is not None:
        image = call.image_now
        ended.layers[0] = {"input": (image, image)}


class GuidedBackprop(_PixelCAM):
    r"""Guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806): the input's gradient through positive paths.

    .. math::
        M = \frac{\partial Y}{\partial X} \quad \text{with} \quad
        \frac{\partial Y}{\partial z} = \mathrm{ReLU}\Big(\sigma'(z)\,
        \mathrm{ReLU}\Big(\frac{\partial Y}{\partial \sigma(z)}\Big)\Big)

    at every rectifier :math:`\sigma`: ReLU, and those that take its place, of which the paper does not speak (ReLU6,
    leaky ReLU, ELU, CELU, SELU, GELU, SiLU, Mish, Hardswish), whether a module or a function applies it. The model
    itself is not changed: it is the graph of a repeated pass that is edited. Activation functions that a model composes
    of other operations are not recognised.

    The map has the input's shape, (N, C, *spatial), and values of both signs; scaled to [0, 1] over a sample's
    channels and positions together if it is ``normalized``.

    Cost: the user's forward pass, another one and a backward pass to the input.

    Args:
        model: the model to explain
        target_layer: None; there so that every method is made alike
        input_shape: not used
        kwargs: arguments of the base class

    Raises:
        ValueError: if there is a ``target_layer``; when maps are asked for, if a part of the model is compiled
    """

    @staticmethod
    def map(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient, (N, C, *spatial)."""
        return gradient

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        (image,) = self._activations(request)
        gradient = _guided_gradient(self, request)
        request.recorded.gradients = [gradient]
        return [(image, gradient)]


class GuidedGradCAM(GradCAM):
    r"""Guided Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): guided backpropagation where Grad-CAM looks.

    .. math::
        M = U\Big(\mathrm{ReLU}\Big(\sum_k w_k A_k\Big)\Big) \odot \mathrm{GuidedBackprop}(X)

    with :math:`U` the upsampling of the Grad-CAM map to the input's size. As for guided backpropagation, the map has
    the input's shape and values of both signs.

    Cost: the user's forward pass, a backward pass to the target layer, another forward pass and a backward pass to the
    input.
    """

    _relu = False
    _runs_model = True
    _explains_many = False

    def map(self, activation: Tensor, gradient: Tensor, guided: Tensor) -> Tensor:
        """Return the Grad-CAM map, resized, times the input's guided gradient, (N, C, *spatial)."""
        cam = super().map(activation, gradient).relu()
        return resize(cam.unsqueeze(1), guided.shape[2:]) * guided

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        evidence = super()._evidence(request)
        guided = _guided_gradient(self, request)
        return [(*of_layer, guided) for of_layer in evidence]


class FullGrad(_PixelCAM):
    r"""FullGrad (Srinivas & Fleuret 2019, arXiv:1905.00780): the input's and every bias's share of the score.

    .. math::
        M = \sum_c \psi\Big(X \odot \frac{\partial Y}{\partial X}\Big)
        + \sum_l \sum_c \psi\Big(b_l \odot \frac{\partial Y}{\partial z_l}\Big), \qquad
        \psi(t) = U(\mathrm{minmax}(|t|))

    with :math:`z_l` the output of a convolution, linear layer or batch normalisation, :math:`b_l` its bias (for batch
    normalisation :math:`\beta - \mu\gamma/\sigma`), min-max per sample and layer, and :math:`U` the resizing to the
    input's size. Layers without positions do not appear in the map. Without :math:`\psi`, the terms of a network of
    such layers and (leaky) ReLUs or max-pooling sum up to the score; other functions hold shares that have no term.

    Cost: the user's forward pass, another one and a backward pass to the input.

    Args:
        model: the model to explain
        target_layer: None; there so that every method is made alike
        input_shape: not used
        kwargs: arguments of the base class

    Raises:
        ValueError: if there is a ``target_layer``
    """

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        image = to_float(self._recorded_call(request).image)
        total = torch.zeros_like(image[:, :1])

        def add(term: Tensor) -> None:
            if term.ndim == image.ndim and len(term) == len(image):
                total.add_(resize(_scaled_sum(term.abs()), image.shape[2:]))

        self._each_term(request, add, **options)
        return [total.squeeze(1)]

    def _each_term(self, request: Request, take: Callable[[Tensor], None]) -> None:
        """Pass on the biases' shares of the score, from the last one back, and the input's: (N, C, *spatial) each.

        Each is released before the next one is computed.
        """

        def share(bias: Tensor, channels: int, gradient: Tensor | None) -> None:
            if gradient is None:  # what follows has no gradient
                return
            moved = to_float(gradient.detach()).movedim(channels, 1)
            take(moved * bias.reshape(-1, *[1] * (moved.ndim - 2)))

        with _BiasesWatched(share), _repeated(self, request, partial(_watch_frozen, share)) as (image, score):
            gradient = _gradient(score, image)
        request.recorded.gradients = [gradient]
        take(to_float(image.detach() * gradient))


def _scaled_sum(sizes: Tensor) -> Tensor:
    """Scale (N, C, *spatial) to [0, 1] in each sample and sum it over the channels, (N, 1, *spatial).

    Sum first, scale then: a large layer is read a few times, and not copied.
    """
    flat = sizes.flatten(1)
    lowest, highest = (bound.reshape(-1, *[1] * (sizes.ndim - 1)) for bound in (flat.amin(1), flat.amax(1)))
    constant = is_constant(lowest, highest)
    total = sizes.sum(1, keepdim=True) - sizes.shape[1] * lowest
    return torch.where(constant, 0.0, total / torch.where(constant, 1.0, highest - lowest))


@contextmanager
def _repeated(
    extractor: _CAM, request: Request, prepare: Callable[[nn.Module], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Repeat a recorded call quietly, with a graph down to its image-like input: that input, and the scores (N,).

    ``prepare`` is called with the replica that runs. If the scores are not those that were recorded, a warning says so.
    """
    model, call, select = extractor.model, extractor._recorded_call(request), extractor._selector(request)
    with normal_mode(), replicated(model) as replica, call.as_recorded():
        call.prove_rows(replica)
        if prepare is not None:
            prepare(replica)
        image = call.image.detach().clone().requires_grad_()
        args, kwargs = call.with_image(image.clone(), torch.arange(len(image), device=image.device))
        args, kwargs = without_inference((args, kwargs))
        score = select(replica(*args, **kwargs))
        warn_unless_repeated(extractor, score, recorded_scores(modules_of(model), request.recorded.output, select))
        yield image, score


def _gradient(score: Tensor, image: Tensor) -> Tensor:
    """Differentiate scores (N,) with respect to the input, on which they must depend."""
    gradient = None
    if score.requires_grad:
        (gradient,) = torch.autograd.grad(score.sum(), image, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "the explained score is not connected to every target layer: it does not depend on the input"
        )
    return gradient


def _guided_gradient(extractor: _CAM, request: Request) -> Tensor:
    """Differentiate the score with respect to the input, through positive paths alone: (N, C, *spatial)."""
    with _repeated(extractor, request) as (image, score), _clipped_at_rectifiers(score):
        gradient = _gradient(score, image)
    return to_float(gradient)


# The nodes that these functions leave in a graph. ReLU6 is a hard tanh.
_RECTIFIERS = re.compile(r"(Relu|Hardtanh|LeakyRelu|Elu|Celu|Gelu|Silu|Mish|Hardswish)(WithSelf)?Backward\d*")


@contextmanager
def _clipped_at_rectifiers(score: Tensor) -> Iterator[None]:
    """Set negative gradients to 0 before and after each rectifier in the graph of a score."""

    def clip(gradients: Sequence[Tensor | None], *_: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.relu() for gradient in gradients)

    graph = list(nodes_of(score))
    if any(node.name() == "CompiledFunctionBackward" for node in graph):
        raise ValueError(
            "a part of the model is compiled by `torch.compile`, and the rectifiers inside cannot be found: explain "
            "the model with that part as it was before"
        )
    nodes = [node for node in graph if _RECTIFIERS.fullmatch(node.name())]
    handles = [register(clip) for node in nodes for register in (node.register_prehook, node.register_hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Their third argument is the bias.
_BIASED = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


class _BiasesWatched(TorchFunctionMode):
    """Watches the biases that are added inside the block, by modules as by functions.

    Args:
        share: called in a backward pass with each bias, the dimension of the channels in what it was added to, and the
            gradient of that sum
    """

    def __init__(self, share: Callable[[Tensor, int, Tensor], None]) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.batch_norm:
            bias = _implicit_bias(*args, **kwargs)
        elif func in _BIASED:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if func is not F.linear and output.ndim != (args[1] if len(args) > 1 else kwargs["weight"]).ndim:
                return output  # a convolution of one sample without a batch dimension
        else:
            return output
        if bias is not None and output.requires_grad and output.ndim > 1:
            # The hook belongs to the value at this point, also if an operation in place changes the tensor later.
            output.register_hook(partial(self.share, bias.detach(), -1 if func is F.linear else 1))
        return output


def _watch_frozen(share: Callable[[Tensor, int, Tensor], None], model: nn.Module) -> None:
    """Watch the biases of batch normalisation whose statistics are constants, which no function of torch computes."""

    def watch(module: nn.Module, _args: Any, output: Tensor) -> None:
        buffers = module._buffers
        known = [buffers.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        bias = _implicit_bias(output, known[0], known[1], known[2], known[3], eps=vars(module).get("eps", 1e-5))
        if bias is not None and output.requires_grad:
            output.register_hook(partial(share, bias.detach(), 1))  # type: ignore[no-untyped-call]  # torch's

    for module in model.modules():
        if "FrozenBatchNorm" in type(module).__name__:
            module.register_forward_hook(watch)


def _implicit_bias(
    _input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001 - the function that is called has it
    eps: float = 1e-5,
) -> Tensor | None:
    """Return what batch normalisation with these arguments adds to a multiple of its input."""
    if training or running_mean is None or running_var is None:
        return bias
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return -running_mean * scale if bias is None else bias - running_mean * scale
