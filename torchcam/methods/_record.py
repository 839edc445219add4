"""What an extractor remembers of a forward pass."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcam._passes import Call
from torchcam._tensors import map_tensors
from torchcam.layout import Layout

from ._replay import Form, RecordedLayer

__all__ = ["Pass", "Record", "Request"]


class Pass:
    """One forward pass of a model, as all extractors on that model share it.

    Where the user turned gradients off, the pass is private: the extractors turn them on behind the earliest target
    layer, the model's output is kept with its graph, and the user gets it detached.
    """

    _under_way: ClassVar[weakref.WeakKeyDictionary[nn.Module, Pass]] = weakref.WeakKeyDictionary()
    # A guard that is destroyed late would switch inference mode on again in the middle of something else. Those of
    # passes that a KeyboardInterrupt cut short, which no hook hears of, therefore stay here for good.
    _guards: ClassVar[set[torch.inference_mode]] = set()

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Any] = weakref.WeakSet()
        self.private = False
        self.output: Any = None
        self._guard: torch.inference_mode | None = None

    @classmethod
    def join(cls, model: nn.Module, member: object) -> Pass:
        """Give the pass of ``model`` under way, or start one; a member that joins twice has begun another."""
        shared = cls._under_way.get(model)
        if shared is None or member in shared.members:
            shared = cls._under_way[model] = cls()
        shared.members.add(member)
        return shared

    def make_private(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Swap inference mode for ``no_grad``, whose tensors a graph may use, and copy inputs that no graph may use."""
        self.private = True
        if torch.is_inference_mode_enabled():
            self._guard = torch.inference_mode(False)
            self._guards.add(self._guard)
            self._guard.__enter__()
            torch.set_grad_enabled(False)
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors(
            lambda t: t.clone() if t.is_inference() else t, (args, kwargs)
        )
        return arguments

    def finish(self, model: nn.Module, output: Any) -> Any:
        """Restore the grad mode and keep the output; give what the user shall get. Runs once, for the first member."""
        if self._under_way.get(model) is not self:
            return output
        del self._under_way[model]
        self.output = output
        if not self.private:
            return output
        torch.set_grad_enabled(False)
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guards.discard(self._guard)
            self._guard = None
        return map_tensors(lambda t: t.detach(), output)


@dataclass(frozen=True)
class Request:
    """How maps are asked for.

    Attributes:
        relu: whether the evidence for a score is kept (True), that against it (``"negative"``) or both (False); None
            for what the method does by itself
        create_graph: whether the maps can be differentiated
        num_classes: how many classes of each sample are explained at once
    """

    relu: bool | str | None = None
    create_graph: bool = False
    num_classes: int = 1


class BrokenSamples:
    """Warns of samples that are not finite, without waiting for a GPU to know how many there are."""

    def __init__(self) -> None:
        self._counts: list[tuple[str, int, Tensor, torch.cuda.Event | None]] = []

    def add(self, layer: str, finite: Tensor) -> None:
        """Take note of which samples are finite in a layer, (N,)."""
        count = (~finite).sum()
        event = None
        if count.is_cuda:
            count = count.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(finite.device))
        self._counts.append((layer, len(finite), count, event))

    def report(self, *, wait: bool = False) -> None:
        """Warn of the samples that are known to be broken by now, or, with ``wait``, of all."""
        while self._counts:
            layer, total, count, event = self._counts[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                if not wait:
                    return
                event.synchronize()
            del self._counts[0]
            if count:
                warnings.warn(
                    f"the activation or gradient of layer '{layer}' holds NaN or infinite values: the maps of "
                    f"{int(count)} of {total} samples are NaN",
                    RuntimeWarning,
                    stacklevel=5,
                )


class Record:
    """What one forward pass left behind for an extractor, and what the maps computed from it need to know."""

    def __init__(self, target_names: Sequence[str]) -> None:
        self.target_names = target_names
        self.started = False
        self.shared: Pass | None = None
        self.call: Call | None = None
        self.input_shape: tuple[int, ...] | None = None
        self.layouts: dict[str, Layout] = {}
        self.attentions: list[list[Tensor] | None] = [None] * len(target_names)
        self.gradients: list[Tensor | None] = []
        self.num_scores: int | None = None  # of each sample, where the gradients are of several: (K, ...)
        self.request = Request()
        self.running = False  # whether the model's forward has started and not ended
        self.output: Any = None  # what the model returned, where methods edit what its layers return
        self.training = False  # whether a part of the model was in training mode
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._finished: list[tuple[str, nn.Module, Any]] = []
        self._before: dict[int, list[tuple[nn.Module, Any]] | None] = {}

    def note(self, name: str, module: nn.Module, output: Any) -> None:
        """Take note of the form of what a module returned, in place of those inside it."""
        if not self.running:  # a part of the model on its own
            return
        self._forget_inside(name)
        self._finished.append((name, module, Form.of(output)))

    def reached(self, index: int, output: Any) -> None:
        """Take note of what had finished before a target layer started, if that ran once and returned a tensor."""
        self._forget_inside(self.target_names[index])
        usable = index not in self._before and isinstance(output, Tensor) and not self.training
        self._before[index] = [(module, form) for _, module, form in self._finished] if usable else None

    def _forget_inside(self, name: str) -> None:
        while self._finished and self._finished[-1][0].startswith(f"{name}."):
            self._finished.pop()

    def known(self, index: int) -> RecordedLayer | None:
        """Give what is known of a target layer; None if that is not enough to run what follows it alone."""
        before = self._before.get(index)
        if before is None or self.output is None:
            return None
        return RecordedLayer(self._kept[index][""], before, self.output)

    def keep(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep what a target layer returned: one tensor, or several by what tells them apart."""
        self._kept[index] = tensors

    @property
    def activations(self) -> list[Tensor | None]:
        """What the target layers returned, in their order; None for one that was not reached."""
        missing: dict[str, Tensor | None] = {"": None}
        return [t for index in range(len(self.target_names)) for t in self._kept.get(index, missing).values()]

    @property
    def layers(self) -> list[str]:
        """The layer that each activation is from."""
        named = enumerate(self.target_names)
        return [name for index, name in named for _ in self._kept.get(index, {"": None})]

    @property
    def names(self) -> list[str]:
        """The name of each activation: its layer's, with the level where the layer returned several."""
        named = enumerate(self.target_names)
        return [f"{name}{level}" for index, name in named for level in self._kept.get(index, {"": None})]
