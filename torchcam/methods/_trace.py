"""What a pass shows to one who watches all modules: what runs, what is changed, where NaN comes from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._tensors import tensors_in, to_float
from torchcam.layout import primary_tensors

from ._findings import listed

__all__ = ["GradientTrace", "Trace", "Watch", "all_finite"]

_SQUASHING = re.compile(r"(Log)?(Softmax(2d)?|Sigmoid)")


class Watch:
    """What one pass shows besides its result.

    Attributes:
        calls: how often each target layer ran
        changed: by target layer, what has changed its output in place
        normalization: of the first batch normalisation with statistics of a training: its name, by how many standard
            deviations the means of its input are typically off, and how many times the variance it typically has
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = model
        self.layers = layers
        self.calls: Counter[str] = Counter()
        self.changed: dict[str, str] = {}
        self.normalization: tuple[str, float, float] | None = None
        self._handed: dict[str, list[tuple[Tensor, int]]] = {}
        self._last: tuple[nn.Module, Any] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the pass that runs inside the block."""
        with _hooked(self.model, self._before, self._after):
            yield
        self._look("code of the model after its last module")

    def squashing_module(self, output: Any) -> str | None:
        """Give the class of the module that has made the output, if it is one that makes probabilities."""
        if self._last is None:
            return None
        module, made = self._last
        named = type(module).__name__
        same = any(a is b for a in tensors_in(made) for b in tensors_in(output))
        return named if same and _SQUASHING.fullmatch(named) else None

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        self._look(f"code that runs before '{name}'")
        if self.normalization is None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._compare(name, module, next(tensors_in(args), None))

    def _after(self, name: str, module: nn.Module, output: Any) -> None:
        is_leaf = next(module.children(), None) is None
        self._look(f"'{name}' ({type(module).__name__})" if is_leaf else f"code at the end of '{name}'")
        if is_leaf and name:
            self._last = module, output
        if name in self.layers:
            self.calls[name] += 1
            self.changed.pop(name, None)
            self._handed[name] = [
                (tensor, tensor._version) for tensor in primary_tensors(output).values() if not tensor.is_inference()
            ]

    def _look(self, culprit: str) -> None:
        for layer, handed in self._handed.items():
            if layer not in self.changed and any(tensor._version != version for tensor, version in handed):
                self.changed[layer] = culprit

    def _compare(self, name: str, module: Any, tensor: Tensor | None) -> None:
        seen = module.num_batches_tracked
        if tensor is None or module.running_mean is None or (seen is not None and not int(seen)):
            return
        flat = to_float(tensor.detach()).transpose(0, 1).flatten(1)  # (C, N * S)
        variance = to_float(module.running_var) + module.eps
        deviation = (flat.mean(1) - module.running_mean).abs() / variance.sqrt()
        ratio = flat.var(1, correction=0) / variance
        self.normalization = name, float(deviation.median()), float(ratio.median())


class Trace:
    """Finds where in a pass NaN or infinity appears first.

    Attributes:
        first: the place, in words
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the pass that runs inside the block."""
        with _hooked(self.model, self._before, self._after):
            yield

    def _before(self, name: str, _module: nn.Module, args: Any) -> None:
        if self.first is None and not all_finite(args):
            parent = name.rpartition(".")[0]
            of = f"'{parent}'" if parent else "the model itself"
            self.first = f"in the `forward` of {of}, before '{name}' is called"

    def _after(self, name: str, module: nn.Module, output: Any) -> None:
        if self.first is not None or all_finite(output):
            return
        named = f"'{name}' ({type(module).__name__})" if name else "the model itself"
        if next(module.children(), None) is not None:
            self.first = f"in the `forward` of {named}, after its modules have run"
            return
        broken = [key for key, value in module.named_parameters(recurse=False) if not all_finite(value)]
        broken += [key for key, value in module.named_buffers(recurse=False) if not all_finite(value)]
        self.first = f"in {named}" + (f", whose {listed(broken)} is not finite" if broken else "")


class GradientTrace:
    """Finds where a gradient stops to be finite on its way back from the score."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._outputs: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the pass that runs inside the block."""
        with _hooked(self.model, lambda *_: None, self._after):
            yield

    def _after(self, name: str, _module: nn.Module, output: Any) -> None:
        self._outputs += [(name or "the model", tensor) for tensor in tensors_in(output) if tensor.requires_grad]

    def last_broken(self, score: Tensor) -> str | None:
        """Give the module, nearest to the score, for whose output the gradient is not finite."""
        tensors = [tensor for _, tensor in self._outputs]
        gradients = torch.autograd.grad(score.sum(), tensors, allow_unused=True)
        for (name, _), gradient in zip(reversed(self._outputs), reversed(gradients), strict=True):
            if gradient is not None and not all_finite(gradient):
                return name
        return None


@contextmanager
def _hooked(
    model: nn.Module,
    before: Callable[[str, nn.Module, Any], None],
    after: Callable[[str, nn.Module, Any], None],
) -> Iterator[None]:
    """Call functions with the name, the module and its arguments or output whenever a module runs in the block."""

    def pre_hook(name: str) -> Callable[..., None]:
        return lambda module, args: before(name, module, args)

    def post_hook(name: str) -> Callable[..., None]:
        return lambda module, _args, output: after(name, module, output)

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(pre_hook(name)))
            handles.append(module.register_forward_hook(post_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_finite(value: Any) -> bool:
    """Tell whether all floating-point tensors of a structure are free of NaN and infinity."""
    return all(bool(t.isfinite().all()) for t in tensors_in(value) if t.is_floating_point())
