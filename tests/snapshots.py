"""What a model and torch's global state are, as plain Python values that can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def modes() -> dict[str, Any]:
    """Return every mode of torch that a pass may switch and an interrupt may leave switched."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "autocast type": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "function modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "anomaly": torch.is_anomaly_enabled(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    }


def random_state() -> int:
    """Return a number for the state of the global generators of torch and Python."""
    return hash((torch.get_rng_state().numpy().tobytes(), random.getstate()))


def own_attributes(module: nn.Module) -> list[str]:
    """Return the names of what a module holds, but for a wrapper without an extractor: it stays while threads live."""
    names = set(vars(module))
    if not getattr(module._compiled_call_impl, "members", True):
        names.remove("_compiled_call_impl")
    return sorted(names)


def attributes(model: nn.Module, *, identity: bool) -> dict[str, Any]:
    """Return what every module holds, by its name: type, flags, tensors, containers; hooks are left out.

    Args:
        model: the model
        identity: whether to compare which objects they are as well; not possible between a model and its copy
    """
    return {
        name: {
            "type": type(module).__name__,
            **{
                key: _value(value, identity)
                for key, value in vars(module).items()
                if key not in {*HOOKS, "_compiled_call_impl"}
            },
        }
        for name, module in model.named_modules()
    }


def hook_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of hooks of each kind on each module."""
    return {f"{name}.{kind}": len(getattr(module, kind)) for name, module in model.named_modules() for kind in HOOKS}


def changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return the entries that differ between two snapshots, as short lines."""
    lines = []
    for name in sorted({*now, *before}):
        new, old = now.get(name), before.get(name)
        if new == old:
            continue
        if isinstance(new, dict) and isinstance(old, dict):
            lines += [f"{name}.{line}" for line in changed(new, old)]
        else:
            lines.append(f"{name}: {str(old)[:80]} -> {str(new)[:80]}")
    return lines


def check_unchanged(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise an error that lists the entries that differ."""
    lines = changed(now, before)
    assert not lines, f"{len(lines)} entries differ: {lines[:5]}"


def _value(value: Any, identity: bool) -> Any:
    content: Any
    if isinstance(value, Tensor):
        numbers = value.detach().float().cpu().tolist()
        grad = None if not value.is_leaf or value.grad is None else value.grad.tolist()
        content = (tuple(value.shape), value.dtype, value.requires_grad, value.is_leaf, repr(numbers), repr(grad))
    elif isinstance(value, nn.Module):
        return type(value).__name__  # compared under its own name
    elif isinstance(value, Mapping):
        content = [(str(key), _value(item, identity)) for key, item in value.items()]
    elif isinstance(value, (set, frozenset)):
        content = sorted(map(repr, value))
    elif hasattr(value, "__iter__") and not isinstance(value, str):
        content = [_value(item, identity) for item in value]
    elif isinstance(value, (int, float, str, bytes, torch.dtype, torch.device, type(None))):
        return repr(value)
    else:
        content = type(value).__name__
    return (type(value).__name__, content, id(value) if identity else None)
