"""What target layers return: it is recorded, and handed on with a graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence, Set
from functools import partial
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from torchcam._replica import ExtractorHook, modules_of
from torchcam._tensors import map_tensors, tensors_in
from torchcam.layout import primary_tensors, replace_tensors

from ._running import thread


def _save(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _load(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor that the gradient needs was changed in place after it was used")
    return tensor


followed = partial(saved_tensors_hooks, _save, _load)  # a graph that does not need its tensors to stay in it


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, NoneType, FunctionType, torch.dtype, torch.device})


def drop_graphs(model: nn.Module) -> None:
    """Detach what modules keep in buffers and attributes, as the caller has turned gradients off."""
    for module in modules_of(model):
        buffers, attributes = module._buffers, vars(module)
        for fields, names in ((buffers, list(buffers.keys())), (attributes, attributes.keys() - _OF_EVERY_MODULE)):
            for name in names:
                value = fields[name]
                kind = type(value)
                if kind in _PLAIN or (isinstance(value, tuple) and _PLAIN.issuperset(map(type, value))):
                    continue
                if any(tensor.grad_fn is not None for tensor in tensors_in(value)):
                    fields[name] = without_graph(value)


def without_graph(value: Any, given: Set[int] = frozenset()) -> Any:
    """Detach the tensors of a structure but for some, by identity; lists and dictionaries stay the same objects."""
    if isinstance(value, (list, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = without_graph(item, given)
        return value
    return map_tensors(lambda t: t if t.grad_fn is None or id(t) in given else t.detach(), value)


class LayerHook(ExtractorHook):
    """Records what a target layer returns. The extractor is held weakly: it must not live as long as the model."""

    def __init__(self, recorder: Any, index: int) -> None:
        self._recorder = id(recorder)
        self._layer = weakref.ref(recorder.layers[index])
        self._index = index
        self._differentiates = recorder.differentiates

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Record an output; return a replacement where what follows needs one."""
        if torch.compiler.is_compiling():  # what is traced now would run again without this extractor
            return None
        running = thread.passes.get(self._recorder)
        if running is None or module is not self._layer():
            return None
        kept: dict[str, tuple[Tensor, Tensor | GradientEdge]] = {}
        running.layers[self._index] = kept
        replaced = []
        for level, tensor in primary_tensors(output).items():
            if not self._differentiates or not tensor.is_floating_point():
                copied = tensor.detach() if tensor.requires_grad else tensor
                copied = copied.clone()  # an operation in place must not change what is recorded
                kept[level] = copied, copied
                continue
            source = tensor
            if running.private:
                torch.set_grad_enabled(True)
                source = next((output for output, handed in thread.written if handed is tensor), tensor)
            if tensor.requires_grad and torch.is_grad_enabled():
                kept[level] = tensor.clone(), get_gradient_edge(source)
                continue
            leaf, handed = _with_graph(tensor, module, args, running)
            kept[level] = leaf, leaf if leaf is not tensor else get_gradient_edge(leaf)
            replaced.append((tensor, handed))
        if replaced and not isinstance(output, Tensor):
            replaced += _others(output, [tensor for tensor, _ in replaced], running)
        changed = [pair for pair in replaced if pair[0] is not pair[1]]
        return replace_tensors(output, changed) if changed else None


def _others(output: Any, primary: Sequence[Tensor], running: Any) -> list[tuple[Tensor, Tensor]]:
    """Put leaves in the place of the other tensors of an output: a layer may compute them of the primary ones.

    Who uses these uses the primary ones, too, but without a graph. They share their memory with what is in their place.
    """
    storages = set(map(_storage, primary))
    pairs = []
    for tensor in tensors_in(output):
        if any(tensor is one for one in primary) or not tensor.is_floating_point():
            continue
        running.is_partial |= _storage(tensor) in storages  # a view
        leaf = tensor.detach().requires_grad_()
        for one in thread.passes.values():  # of extractors on the same layer
            one.others = [*one.others, leaf]
        pairs.append((tensor, torch.ops.aten._unsafe_view(leaf, leaf.shape)))
    return pairs


def _with_graph(tensor: Tensor, layer: nn.Module, args: Any, running: Any) -> tuple[Tensor, Tensor]:
    """Return a leaf with the values of a layer's output, and what is handed on: a function of the leaf.

    Where other parts of the model may use the values without the graph, the pass is noted to be partial.
    """
    storage, given = _storage(tensor), list(tensors_in(args))
    is_given = any(_storage(one) == storage for one in given)
    if (given and not is_given and not _may_be_kept(tensor, layer)) or running.is_of_model(tensor):
        leaf = tensor.detach().requires_grad_()
        return leaf, leaf.clone()
    # Whoever else uses the output gets the graph only if the tensor itself has it: not a view of what was given, nor
    # what was given and not changed, as it may have been used before.
    is_changed = tensor._version > 0 and any(one is tensor for one in given)
    if (is_given and not is_changed) or any(_storage(one) == storage for one, _ in running.call.versions):
        running.is_partial = True
        return tensor.detach().clone().requires_grad_(), tensor
    leaf = tensor.detach().clone().requires_grad_()
    try:
        tensor.copy_(leaf)
    except RuntimeError:  # a view that was made without gradients
        leaf, handed = tensor.requires_grad_(), tensor.clone()
    else:
        handed = tensor
    if running.private:
        thread.written.append((tensor, handed))
    return leaf, handed


def may_be_hooked(layer: nn.Module) -> bool:
    """Check whether forward hooks other than those of extractors are on a layer or a module of it."""
    return any(map(_has_hooks, modules_of(layer)))


def _may_be_kept(output: Tensor, layer: nn.Module) -> bool:
    """Check whether a layer's output may be used by others than those that it is handed on to."""
    return any(_has_hooks(one) or id(output) in map(id, vars(one).values()) for one in modules_of(layer))


def _has_hooks(module: nn.Module) -> bool:
    """Check whether forward hooks other than those of extractors are on a module."""
    hooks = module._forward_hooks
    return bool(hooks) and not all(isinstance(hook, ExtractorHook) for hook in [*hooks.values()])


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
