"""Attention probabilities, noted while blocks of a model run."""

from __future__ import annotations

import math
import weakref
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchcam._replica import ExtractorHook

from ._fused import with_graph_of
from ._recorder import Pass, Recorder
from ._running import thread

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}
# Under a function mode, this function is one call as a whole; its copy is the calls that it is made of.
_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Watch:
    """Notes attention probabilities, (N, heads, tokens, tokens), while a target layer runs in a pass.

    Args:
        recorded: the pass
        differentiates: whether what follows the probabilities can be differentiated with respect to them
        everywhere: whether all of the model is watched, not only target layers
    """

    def __init__(self, recorded: Pass, differentiates: bool, everywhere: bool) -> None:
        self.recorded = recorded
        self.differentiates = differentiates
        self.everywhere = everywhere
        self.blocks = [0] if everywhere else []  # the target layers that run, from the outermost to the innermost
        self.batch_size = 1 if recorded.input_shape is None else recorded.input_shape[0]
        if everywhere:
            recorded.attentions[0] = []


class AttentionWatched(TorchFunctionMode):
    """Shows the watches on this thread the attention that is computed, while one of their target layers runs.

    That is results of a softmax over the last of two equal dimensions, whether the model computes it or fused attention
    does so by itself. What fused attention returns stays as it is; where gradients are asked for, it gets the graph of
    the explicit computation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if not any(watch.blocks for watch in thread.watches):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and kwargs.get("dim", args[1] if len(args) > 1 else None) in {-1, result.ndim - 1}:
            return _note(result).clone()  # an operation in place must not change what is noted
        return result

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute fused attention, and note the probabilities that its documented formula gives."""
        options = {"enable_gqa": True} if enable_gqa else {}
        fused = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
        if query.shape[-2] != key.shape[-2]:
            _note_crossed((*query.shape[:-1], key.shape[-2]))
            return fused
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        logits = (query * root) @ (key * root).mT
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is None:
            probabilities = logits.softmax(-1)
        else:
            masked = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
            nowhere = logits.isneginf().all(-1, keepdim=True)  # such a query attends to nothing, and gets zeros
            probabilities = logits.masked_fill(nowhere, 0).softmax(-1).masked_fill(nowhere, 0)
        probabilities = _note(probabilities)
        if not probabilities.requires_grad or dropout_p:
            return fused
        attended: Tensor = with_graph_of(probabilities @ value, fused)
        return attended


def _note(probabilities: Tensor) -> Tensor:
    """Show probabilities to the watches on this thread; return them, with a graph where one is asked for."""
    shape = probabilities.shape
    watches = [watch for watch in thread.watches if watch.blocks]
    if len(shape) not in {3, 4} or shape[-1] != shape[-2]:
        if len(shape) == 4:
            _note_crossed(shape)
        return probabilities
    if len(shape) == 3:
        batch_size = watches[0].batch_size
        batch_size = batch_size if len(probabilities) % batch_size == 0 else len(probabilities)
        probabilities = probabilities.reshape(batch_size, -1, *shape[1:])
    if any(watch.differentiates for watch in watches) and not probabilities.requires_grad:
        if thread.private:
            torch.set_grad_enabled(True)
        probabilities = probabilities.detach().requires_grad_()
    for watch in watches:
        noted = watch.recorded.attentions[watch.blocks[-1]]
        if noted is not None:
            noted.append(probabilities if watch.differentiates else probabilities.detach())
    return probabilities.reshape(shape)


def _note_crossed(shape: tuple[int, ...]) -> None:
    """Show the watches of single blocks that there is attention to other tokens, by its shape."""
    for watch in thread.watches:
        noted = watch.recorded.attentions[watch.blocks[-1]] if watch.blocks and not watch.everywhere else None
        if noted is not None:
            noted.append(torch.empty(shape, device="meta"))


class BlockStarts(ExtractorHook):
    """Notifies the watch of a pass that a target layer starts or ends."""

    def __init__(self, recorder: Recorder, index: int, starts: bool) -> None:
        self._recorder = id(recorder)
        self._layer = weakref.ref(recorder.layers[index])
        self._index = index
        self._starts = starts

    def __call__(self, module: nn.Module, *_arguments: Any) -> None:
        """Notify the watch."""
        running = None if torch.compiler.is_compiling() else thread.passes.get(self._recorder)
        if running is None or running.watch is None or module is not self._layer():
            return
        if self._starts:
            running.attentions[self._index] = []
            running.watch.blocks.append(self._index)
        elif self._index in running.watch.blocks:
            del running.watch.blocks[running.watch.blocks.index(self._index) :]
