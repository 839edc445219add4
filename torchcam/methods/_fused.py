"""Fused kernels of attention: what they return stays as it is without an extractor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._replica import CallWrapper, has_hooks, replicate
from torchcam._tensors import map_tensors, tensors_in

from ._running import thread

_lock = threading.RLock()  # a dropped extractor leaves when it is collected, in the middle of anything


class SharedWrapper(CallWrapper):
    """A wrapper around a module's call that several extractors share; without one, it hands calls on.

    When the last extractor leaves, it is detached, but not while other threads live: torch looks twice whether a module
    has a wrapper, and a thread that calls the module at this moment must find one both times.
    """

    members: tuple[Any, ...] = ()

    def leave(self, member: Any) -> None:
        """Remove a member."""
        with _lock:
            self.members = tuple(one for one in self.members if one is not member)
            if not self.members and threading.active_count() == 1:
                self.detach()


def attached(kind: type[SharedWrapper], module: nn.Module, member: Any) -> Callable[[], None]:
    """Attach a wrapper, or join the one that is attached; return a function by which the member leaves again."""
    with _lock:
        found = vars(module).get("_compiled_call_impl")
        while isinstance(found, CallWrapper) and type(found) is not kind:
            found = found.inner
        wrapper = found if isinstance(found, kind) else kind(module)
        wrapper.members = (*wrapper.members, member)
        wrapper.attach(module)  # the last one may have left meanwhile
    return lambda: wrapper.leave(member)


def fused_modules(model: nn.Module, target_names: Iterable[str], every: bool) -> list[nn.Module]:
    """List the modules whose fused kernels an extractor would switch off.

    Modules of torch run a fused kernel where no gradient is asked for (LSTM: another one), and, if they are a whole
    block, where no hook is on a module inside.

    Args:
        model: the model
        target_names: the layers that the extractor hooks
        every: whether the extractor turns gradients on or reads attention: then every such module counts
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)}
    inside = {block for block in blocks for name in target_names if f"{name}.".startswith(f"{block}.")}
    found: list[nn.Module] = [module for name, module in blocks.items() if every or name in inside]
    if every:
        found += [
            module
            for name, module in model.named_modules()
            if isinstance(module, (nn.MultiheadAttention, nn.LSTM))
            and not any(name.startswith(f"{block}.") for block in blocks)
        ]
    return found


class FusedCall(SharedWrapper):
    """Returns what the fused kernel returns, with the graph of the explicit computation where a pass needs one."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module."""
        explicit = bool(thread.private and torch.is_grad_enabled()) or bool(thread.watches)
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in module.modules())
        can_be_fused = not module.training and (thread.private or not torch.is_grad_enabled())
        if not can_be_fused or not (explicit or hooked) or has_hooks(module):
            return self.run(module, args, kwargs)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            fused = replicate(module)(*args, **kwargs)
        if not explicit and not thread.passes:
            return fused
        return with_graph_of(self.run(module, args, kwargs), fused)


def with_graph_of(explicit: Any, fused: Any) -> Any:
    """Return the values of one computation with the graph of another one of the same result."""
    graphs = iter(list(tensors_in(explicit)))

    def attach(value: Tensor) -> Tensor:
        graph = next(graphs, value)
        if not graph.requires_grad or graph.shape != value.shape:
            return value
        return value.detach() + (graph - graph.detach())

    return map_tensors(attach, fused)
