"""Observers of a pass: hooks on all modules of a model, and a look at the graph of a score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._tensors import tensors_in, to_float
from torchcam.layout import primary_tensors

from .findings import listed

_SQUASHING_MODULE = re.compile(r"(Log)?(Softmax(2d)?|Sigmoid)")
_SQUASHING_NODE = re.compile(r"((?:Log)?(?:Softmax|Sigmoid))Backward\d*")
# Nodes that return some of the numbers unchanged.
_SELECTING_NODE = re.compile(
    r"(Index|Select|Slice|View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Clone|ToCopy|Stack|Sum|Permute|Transpose|T|"
    r"Alias|Expand|Gather|Take)Backward\d*"
)


class PassWatch:
    """Observes what a pass does besides its result.

    Args:
        layers: the target layers

    Attributes:
        calls: the number of calls of each target layer
        changed: by target layer, the code that changed its output in place
        normalization: for the first batch normalization with running statistics: its name, the typical distance of
            the means of its input from the running means, in standard deviations, and the typical ratio of variances
        first_not_finite: the place, in words, where NaN or infinity appears first
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.calls: Counter[str] = Counter()
        self.changed: dict[str, str] = {}
        self.normalization: tuple[str, float, float] | None = None
        self.first_not_finite: str | None = None
        self._versions: dict[str, list[tuple[Tensor, int]]] = {}
        self._last: tuple[nn.Module, Any] | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Observe the pass that runs inside the block."""
        handles = []
        try:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # which runs no hooks
                    continue
                handles.append(module.register_forward_pre_hook(partial(self._before, name)))
                handles.append(module.register_forward_hook(partial(self._after, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._compare_versions("code of the model after its last module")

    def squashing_module(self, output: Any) -> str | None:
        """Return the class of the module that returned the output, if it computes probabilities."""
        if self._last is None:
            return None
        module, made = self._last
        kind = type(module).__name__
        same = any(a is b for a in tensors_in(made) for b in tensors_in(output))
        return kind if same and _SQUASHING_MODULE.fullmatch(kind) else None

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        self._compare_versions(f"code that runs before '{name}'")
        if self.first_not_finite is None and not _all_finite(args):
            parent = name.rpartition(".")[0]
            of = f"'{parent}'" if parent else "the model itself"
            self.first_not_finite = f"in the `forward` of {of}, before '{name}' is called"
        if self.normalization is None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._compare_statistics(name, module, next(tensors_in(args), None))

    def _after(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        is_leaf = next(module.children(), None) is None
        self._compare_versions(f"'{name}' ({type(module).__name__})" if is_leaf else f"code at the end of '{name}'")
        if self.first_not_finite is None and not _all_finite(output):
            self.first_not_finite = self._place_after(name, module)
        if is_leaf and name:
            self._last = module, output
        if name in self.layers:
            self.calls[name] += 1
            self.changed.pop(name, None)
            tensors = [tensor for tensor in primary_tensors(output).values() if not tensor.is_inference()]
            self._versions[name] = [(tensor, tensor._version) for tensor in tensors]

    @staticmethod
    def _place_after(name: str, module: nn.Module) -> str:
        named = f"'{name}' ({type(module).__name__})" if name else "the model itself"
        if next(module.children(), None) is not None:
            return f"in the `forward` of {named}, after its modules have run"
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        broken = [key for key, tensor in tensors if not _all_finite(tensor)]
        return f"in {named}" + (f", whose {listed(broken)} is not finite" if broken else "")

    def _compare_versions(self, culprit: str) -> None:
        for layer, versions in self._versions.items():
            if layer not in self.changed and any(tensor._version != version for tensor, version in versions):
                self.changed[layer] = culprit

    def _compare_statistics(self, name: str, module: Any, tensor: Tensor | None) -> None:
        seen = module.num_batches_tracked
        if tensor is None or module.running_mean is None or (seen is not None and not int(seen)):
            return
        flat = to_float(tensor.detach()).transpose(0, 1).flatten(1)  # (C, N * S)
        variance = to_float(module.running_var) + module.eps
        deviation = (flat.mean(1) - module.running_mean).abs() / variance.sqrt()
        ratio = flat.var(1, correction=0) / variance
        self.normalization = name, float(deviation.median()), float(ratio.median())


def squashing_node(score: Tensor) -> str | None:
    """Return the function that made a probability of a score, read from its graph."""
    node: Any = score.grad_fn
    if node is not None and node.name().startswith("Mul"):  # the sign that the selector has applied
        node = node.next_functions[0][0]
    for _ in range(50):
        if node is None:
            return None
        if found := _SQUASHING_NODE.fullmatch(node.name()):
            return found[1].lower().replace("log", "log-")
        if not _SELECTING_NODE.fullmatch(node.name()):
            return None
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return None


def _all_finite(value: Any) -> bool:
    """Check whether all floating-point tensors of a structure are free of NaN and infinity."""
    return all(bool(t.isfinite().all()) for t in tensors_in(value) if t.is_floating_point())
