"""Batch normalisation folded into the convolutions before it, for as long as a model runs many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._passes import forwards_replaced

__all__ = ["foldable", "folded"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Pairs = list[tuple[Any, Any]]


@contextmanager
def foldable(model: nn.Module) -> Iterator[Pairs]:
    """List the convolutions whose output goes straight to a batch normalisation in the pass that runs in the block.

    The list, of pairs of modules, is complete when the block ends. Whether something else uses the output of a
    convolution as well cannot be seen: compare the output of the folded model with that of the model itself.
    """
    pairs: Pairs = []
    calls: Counter[nn.Module] = Counter()
    last: dict[str, Any] = {}

    def watch(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls[module] += 1
            given = args[0] if args else kwargs.get("input")
            if isinstance(module, _NORMS) and last and given is last["output"] and given._version == last["version"]:
                pairs.append((last["convolution"], module))
            output = forward(*args, **kwargs)
            if isinstance(module, _CONVOLUTIONS):
                last.update(convolution=module, output=output, version=output._version)
            return output

        return watched

    with forwards_replaced(dict.fromkeys(filter(_is_plain, model.modules()), watch)):
        yield pairs
    pairs[:] = [(convolution, norm) for convolution, norm in pairs if calls[convolution] == calls[norm] == 1]


@contextmanager
def folded(pairs: Pairs) -> Iterator[None]:
    r"""Let convolutions compute what the batch normalisations after them would make of their output.

    With :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`, the weight is :math:`s W` and the bias
    :math:`s (b - \mu) + \beta`. The modules themselves, their parameters and buffers are not changed.
    """
    wrappers: dict[nn.Module, Callable[..., Callable[..., Any]]] = {}
    for convolution, norm in pairs:
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        weight = convolution.weight * scale.reshape(-1, *[1] * (convolution.weight.ndim - 1))
        wrappers[convolution] = _convolving(weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype))
        wrappers[norm] = _handing_through
    with forwards_replaced(wrappers):
        yield


def _convolving(weight: Tensor, bias: Tensor) -> Callable[..., Callable[..., Any]]:
    def wrap(module: Any, _forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda input: module._conv_forward(input, weight, bias)  # noqa: A006 - as it may be called by name

    return wrap


def _handing_through(_module: nn.Module, _forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda input: input  # noqa: A006 - as it may be called by name


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is a convolution or batch normalisation with statistics, and computes just that."""
    if isinstance(module, _CONVOLUTIONS):
        return type(module).forward in {kind.forward for kind in _CONVOLUTIONS}
    if not isinstance(module, _NORMS) or type(module).forward not in {kind.forward for kind in _NORMS}:
        return False
    return not module.training and isinstance(module.running_mean, torch.Tensor)
