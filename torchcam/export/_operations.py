"""Operations in the way of a graph for other runtimes, and the same in operations that these runtimes have.

What autograd calls has no translation for the most part. ``RULES`` decomposes it; what torch decomposes by itself
(layer norm, GELU, softmax and so on) is not listed. :class:`Rewritten` replaces functions before they are traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["KEPT", "RULES", "Rewritten", "explicit_attention"]

aten = torch.ops.aten
Sizes = Sequence[int]


_CHECKS = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}


class Rewritten(TorchFunctionMode):
    """Replaces functions whose implementation cannot be traced, or is traced badly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        rewrite, kwargs = _REWRITES.get(getattr(func, "__name__", "")), kwargs or {}
        if rewrite is not None:
            return rewrite(func, *args, **kwargs)
        if isinstance(func, FunctionType) and func.__globals__ is functional.__dict__:
            with self:  # what a function of Python calls is looked at as well
                return _body(func)(*args, **kwargs)
        return func(*args, **kwargs)


@cache
def _body(function: FunctionType) -> FunctionType:
    """Return a function of ``torch.nn.functional`` that does not hand itself to modes as a whole."""
    names = {**function.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _pool_to(func: Any, input: Tensor, output_size: Any) -> Any:  # noqa: A002 - torch's name
    """A pool to one position of a channels-last tensor changes strides in place: the mean says the same."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    if any(size != 1 for size in sizes):
        return func(input, output_size)
    dimensions = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3}[func.__name__]
    return input.mean(tuple(range(-dimensions, 0)), keepdim=True)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002 - torch's name
    """Of an input that is not contiguous, a batched product would expand the weight to every sample."""
    return func(input.contiguous() if input.ndim > 2 else input, weight, bias)


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Where nothing is masked, no row of scores is empty: torch looks for such rows, which takes half as long again."""
    if attn_mask is not None or dropout_p or is_causal or options:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    return torch.softmax(scores, -1) @ value


def _silu(_func: Any, input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's name
    """The backward operation of the whole is not decomposed, whatever rule there is; those of its parts are."""
    source = input.clone() if inplace else input
    activated = source * torch.sigmoid(source)
    return input.copy_(activated) if inplace else activated


_REWRITES: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool1d": _pool_to,
    "adaptive_avg_pool2d": _pool_to,
    "adaptive_avg_pool3d": _pool_to,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "silu": _silu,
}


def explicit_attention() -> AbstractContextManager[Any]:
    """Return a context without fused attention: its backward operation would stay, and its forward be another one."""
    context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return context


# Rules. Each takes what the operation takes; the gradient of an input is its linear map, transposed.


def _convolution_backward(
    gradient: Tensor,
    source: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    _output_padding: Sizes,
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    if wanted[1] or wanted[2]:
        return NotImplemented
    dimensions = weight.ndim - 2
    if transposed:
        flipped = aten.convolution(gradient, weight, None, stride, padding, dilation, False, [0] * dimensions, groups)
        return flipped, None, None
    rest = [0] * dimensions  # positions at the end that no stride reaches
    if any(step != 1 for step in stride):
        rest = [
            source.shape[2 + i]
            - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i in range(dimensions)
        ]
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups), None, None


def _max_pool_backward(
    gradient: Tensor,
    source: Tensor,
    kernel: Sizes,
    _stride: Sizes,
    _padding: Sizes,
    _dilation: Sizes,
    _ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    first = -len(kernel)
    rows, cells = [[*tensor.shape[:first], math.prod(tensor.shape[first:])] for tensor in (gradient, source)]
    flat = aten.full(cells, 0.0, dtype=gradient.dtype, device=gradient.device)
    flat = aten.scatter_add(flat, flat.ndim - 1, aten.reshape(indices, rows), aten.reshape(gradient, rows))
    placed: Tensor = aten.reshape(flat, source.shape)
    return placed


def _scatter_add(target: Tensor, dimension: int, index: Tensor, source: Tensor) -> Any:
    if source.dtype not in {torch.float16, torch.bfloat16}:  # which ONNX Runtime cannot add
        return NotImplemented
    return aten.scatter_add(target.float(), dimension, index, source.float()).to(target.dtype)


def _transposed(gradient: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last axes of a gradient (..., outputs) by the transpose of a matrix (outputs, inputs)."""
    for axis, matrix in enumerate(matrices, -len(matrices)):
        gradient = (gradient.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return gradient


def _positions(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _adaptive_pool_backward(gradient: Tensor, source: Tensor) -> Tensor:
    dimensions = gradient.ndim - 2

    def means(inputs: int, outputs: int) -> Tensor:
        row, column = _positions(outputs, gradient).unsqueeze(1), _positions(inputs, gradient)
        start, end = (row * inputs) // outputs, ((row + 1) * inputs + outputs - 1) // outputs
        inside = ((column >= start) & (column < end)).to(gradient.dtype)
        return inside / (end - start).to(gradient.dtype)

    sides = zip(source.shape[-dimensions:], gradient.shape[-dimensions:], strict=True)
    return _transposed(gradient, [means(inputs, outputs) for inputs, outputs in sides])


def _average_pool_backward(
    gradient: Tensor,
    source: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    _ceil_mode: bool,
    counts_padding: bool,
    divisor: int | None,
) -> Tensor:
    dimensions = len(kernel)
    matrices = []
    for axis in range(dimensions):
        inputs, outputs = source.shape[axis - dimensions], gradient.shape[axis - dimensions]
        size, margin = kernel[axis], padding[axis % len(padding)]
        start = _positions(outputs, gradient) * (stride[axis % len(stride)] if stride else size) - margin
        column = _positions(inputs, gradient)
        inside = ((column >= start.unsqueeze(1)) & (column < (start + size).unsqueeze(1))).to(gradient.dtype)
        if divisor is None:
            ends = torch.clamp(start + size, max=inputs + margin) - start if counts_padding else inside.sum(1)
            inside = inside / ends.to(gradient.dtype).unsqueeze(1)
        matrices.append(inside)
    return _transposed(gradient if divisor is None else gradient / divisor, matrices)


def _linear_resize_backward(
    gradient: Tensor, output_size: Sizes, input_size: Sizes, align_corners: bool, *scales: float | None
) -> Tensor:
    def weights(inputs: int, outputs: int, scale: float | None) -> Tensor:
        place = _positions(outputs, gradient).to(gradient.dtype)
        if align_corners:
            place = place * ((inputs - 1) / max(outputs - 1, 1))
        else:
            place = ((place + 0.5) * (inputs / outputs if scale is None else 1 / scale) - 0.5).clamp(min=0)
        place = place.clamp(max=inputs - 1)
        column = _positions(inputs, gradient).to(gradient.dtype)
        return (1 - (place.unsqueeze(1) - column).abs()).relu()

    given = scales or (None,) * len(output_size)
    return _transposed(gradient, list(map(weights, input_size[2:], gradient.shape[2:], given)))


def _nearest_resize_backward(offset: float) -> Callable[..., Tensor]:
    def rule(gradient: Tensor, output_size: Sizes, input_size: Sizes, *scales: float | None) -> Tensor:
        def chosen(inputs: int, outputs: int, scale: float | None) -> Tensor:
            place = _positions(outputs, gradient) + offset
            place = torch.floor(place * (inputs / outputs if scale is None else 1 / scale)).clamp(max=inputs - 1)
            return (place.unsqueeze(1) == _positions(inputs, gradient)).to(gradient.dtype)

        given = scales or (None,) * len(output_size)
        return _transposed(gradient, list(map(chosen, input_size[2:], gradient.shape[2:], given)))

    return rule


def _view(source: Tensor, shape: Sizes) -> Any:
    """What a rule returns may be laid out otherwise in memory than what was traced: then a view takes a copy."""
    return NotImplemented if source.is_contiguous() else aten.view(source.contiguous(), shape)


RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
    aten.scatter_add.default: _scatter_add,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_pool_backward,
    aten._adaptive_avg_pool3d_backward.default: _adaptive_pool_backward,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten.upsample_linear1d_backward.default: _linear_resize_backward,
    aten.upsample_bilinear2d_backward.default: _linear_resize_backward,
    aten.upsample_trilinear3d_backward.default: _linear_resize_backward,
    aten.upsample_nearest1d_backward.default: _nearest_resize_backward(0.0),
    aten.upsample_nearest2d_backward.default: _nearest_resize_backward(0.0),
    aten.upsample_nearest3d_backward.default: _nearest_resize_backward(0.0),
    aten._upsample_nearest_exact2d_backward.default: _nearest_resize_backward(0.5),
    aten.view.default: _view,
}
KEPT = (aten.hardsigmoid.default, aten.hardswish.default)
"""What torch would decompose, but ONNX has: written out, it takes longer than the convolutions around it."""
