"""Operations in the way of a graph for other runtimes, and the same in operations that these runtimes have.

What autograd calls has no translation for the most part. ``RULES`` decomposes it; what torch decomposes by itself
(layer norm, GELU, softmax and so on) is not listed. :class:`Rewritten` replaces functions before they are traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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
    """Where nothing is masked, no row of scores is empty: torch looks for such rows, in all layers."""
    if attn_mask is not None or dropout_p or is_causal or options:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    return torch.softmax(scores, -1) @ value


def _activation(func: Any, input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's name
    """In place it is traced through thousands of sizes; of SiLU, only what its parts have is a backward operation."""
    source = input.clone() if inplace else input
    activated: Tensor = source * torch.sigmoid(source) if func.__name__ == "silu" else func(source)
    return input.copy_(activated) if inplace else activated


def _interpolate(
    func: Any,
    input: Tensor,  # noqa: A002 - torch's name
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Torch takes each position of the output from the input by its index; what a matrix makes has a backward pass."""
    resized: Tensor = func(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if mode not in _RESIZES or antialias or not input.requires_grad:
        return resized
    center = 0.0 if align_corners or mode == "nearest" else 0.5
    factors = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor] * (input.ndim - 2)
    positions = partial(torch.arange, dtype=torch.promote_types(input.dtype, torch.float32), device=input.device)
    matrices = []
    for inputs, outputs, factor in zip(input.shape[2:], resized.shape[2:], factors, strict=True):
        step = inputs / outputs if factor is None or recompute_scale_factor else 1 / factor
        if align_corners:
            step = (inputs - 1) / max(outputs - 1, 1)
        place = (positions(outputs) + center) * step
        place = (place.floor() if "nearest" in mode else place - center).clamp(0, inputs - 1)
        matrices.append((1 - (place - positions(inputs).unsqueeze(1)).abs()).relu())
    return _multiplied(input, matrices)


def _multiplied(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last axes of a tensor by a matrix."""
    for axis, matrix in enumerate(matrices, -len(matrices)):
        tensor = (tensor.movedim(axis, -1) @ matrix.to(tensor.dtype)).movedim(-1, axis)
    return tensor


_RESIZES = {"nearest", "nearest-exact", "linear", "bilinear", "trilinear"}
_REWRITES: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool1d": _pool_to,
    "adaptive_avg_pool2d": _pool_to,
    "adaptive_avg_pool3d": _pool_to,
    "hardsigmoid": _activation,
    "hardswish": _activation,
    "interpolate": _interpolate,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "silu": _activation,
}


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
    return _multiplied(gradient, [means(inputs, outputs) for inputs, outputs in sides])


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
    return _multiplied(gradient if divisor is None else gradient / divisor, matrices)


def _index_put(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """ONNX Runtime adds on several threads, and loses what two of them add to one place: scattered, nothing is lost."""
    if not accumulate:
        return NotImplemented
    places = aten.index(torch.arange(target.numel(), device=target.device).reshape(target.shape), indices)
    added = aten.scatter_add(target.reshape(-1), 0, places.reshape(-1), values.expand(places.shape).reshape(-1))
    return added.reshape(target.shape)


def _view(source: Tensor, shape: Sizes) -> Any:
    """What a rule returns may be laid out otherwise in memory than what was traced: then a view takes a copy."""
    return NotImplemented if source.is_contiguous() else aten.view(source.contiguous(), shape)


RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
    aten.scatter_add.default: _scatter_add,
    aten.index_put.default: _index_put,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_pool_backward,
    aten._adaptive_avg_pool3d_backward.default: _adaptive_pool_backward,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten.view.default: _view,
}
KEPT = (aten.hardsigmoid.default, aten.hardswish.default)
"""What torch would decompose, but ONNX has: written out, it takes longer than the convolutions around it."""
