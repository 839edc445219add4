"""What an extractor remembers of a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcam._passes import Call
from torchcam._tensors import map_tensors
from torchcam.layout import Layout

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
        self.num_scores = 1  # of each sample, in the gradients
        self.request = Request()
        self._kept: dict[int, dict[str, Tensor]] = {}

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
