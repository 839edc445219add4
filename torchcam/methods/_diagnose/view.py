"""The only module of the diagnosis that reads an extractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._tensors import to_float
from torchcam.layers import Candidates, candidates
from torchcam.targets import Selector

__all__ = ["ExtractorView", "replica_of"]


@contextmanager
def replica_of(extractor: Any) -> Iterator[Any]:
    """Return an extractor like ``extractor`` whose model may be run inside the block, in evaluation mode."""
    with getattr(extractor, "base_cam", extractor)._inner_pass():
        yield extractor


class ExtractorView:
    """What a diagnosis reads of an extractor and of the last pass that it has recorded.

    Attributes:
        extractor: the extractor
        model: the explained model
        method: the name of the method
        target_names: the names of the target layers
        has_hooks: whether the extractor's hooks are on the model
        is_enabled: whether they record
        has_started: whether a pass has begun
        call: the arguments of the pass; None if a part of the model was called
        grad_enabled: whether the pass ran with gradients on
        batch_size: the number of samples
        names: the name of each activation
        layers: the layer of each activation
        activations: the outputs of the layers; None for those that did not run
        in_training: the modules in training mode that act differently in it
        class_agnostic: whether the map is the same for every class
        uses_gradients: whether the method differentiates the score
        keeps_positive: whether a ReLU is applied to the map
        reads_attention: whether the method reads attention
        reads_layers: whether the method reads outputs of layers: not attention, and not the input
        reshape_transform: the user's function to grid form
    """

    def __init__(self, extractor: Any) -> None:
        cam = self._cam = getattr(extractor, "base_cam", extractor)
        record = cam._record
        self.extractor = extractor
        self.model: nn.Module = cam.model
        self.method = type(cam).__name__
        self.target_names: list[str] = list(cam.target_names)
        self.has_hooks = bool(cam.hook_handles)
        self.is_enabled: bool = cam._hooks_enabled
        self.has_started: bool = record.started
        self.call: Any = record.call
        self.grad_enabled = record.shared is not None and not record.shared.private
        self.names: list[str] = record.names
        self.layers: list[str] = record.layers
        self.activations: list[Tensor | None] = record.activations
        first = next((activation for activation in self.activations if activation is not None), None)
        shape = record.input_shape
        self.batch_size: int = shape[0] if shape is not None else 1 if first is None else len(first)
        self.in_training = [
            name for name, module in self.model.named_modules() if module.training and _acts_in_training(module)
        ]
        self.class_agnostic: bool = cam.class_agnostic
        self.uses_gradients: bool = cam._uses_gradients
        self.keeps_positive: bool = cam._relu
        self.reads_attention = hasattr(cam, "prefix_tokens")
        self.reads_layers = not self.reads_attention and all(name in cam.submodule_dict for name in cam.target_names)
        self.reshape_transform: Callable[[Tensor], Tensor] | None = cam.reshape_transform

    @property
    def reached(self) -> bool:
        """Whether the pass has run a target layer."""
        return any(activation is not None for activation in self.activations)

    @cached_property
    def candidates(self) -> Candidates | None:
        """The layers that a map can be made from, if they can be found."""
        if self.call is None:
            return None
        try:
            return candidates(self.model, *self.call.args, **self.call.kwargs)
        except Exception:  # noqa: BLE001 - advice without a layer is better than an error
            return None

    @property
    def choice(self) -> str | None:
        """The layer that a map should be made from, if it can be found."""
        return None if self.candidates is None else self.candidates.choice

    def grids(self) -> Any:
        """Return the activations in grid form, (N, C, *spatial).

        Raises:
            ValueError: if one has no positions
        """
        return self._cam.hook_a

    def to_grid(self, tensor: Tensor, name: str) -> Any:
        """Return a tensor shaped as an activation in grid form."""
        return tensor if self.reads_attention else self._cam._to_grid(tensor, name)

    def layout(self, tensor: Tensor, name: str) -> Any:
        """Return the layout of an activation."""
        return self._cam._layout(tensor, name)

    def selector(self, classes: list[int] | None, select: Selector, output: Any) -> Selector:
        """Return the score that the method differentiates, for a question about some classes."""
        contrast = getattr(self.extractor, "_contrast", None)
        if contrast is None or classes is None:
            return select
        with torch.no_grad():
            contrasted: Selector = contrast(classes, output, None)
        return contrasted

    def with_graph(self, output: Any) -> Any:
        """Return an output of the recorded pass with its graph."""
        return self._cam._attached(output)

    def raw_maps(self, question: dict[str, Any], select: Selector | None, output: Any) -> Any:
        """Compute the maps of all layers before ReLU, scaling and fusion."""
        asked = {"targets": select} if hasattr(self.extractor, "_contrast") else question
        return self._cam.compute_cams(scores=output, normalized=False, relu=False, **self._keep_graph(), **asked)

    def gradients(self, select: Selector | None, output: Any) -> list[Tensor | None]:
        """Return the gradients of the score for the activations, as far as the method has any."""
        cam = self._cam
        if select is not None and self.uses_gradients and not self.reads_attention and not cam._record.gradients:
            cam._backprop(output, None, retain_graph=True, targets=select)
        return list(cam._record.gradients) or [None] * len(self.names)

    def fused_map(self, question: dict[str, Any], output: Any) -> Tensor:
        """Compute the map of each sample as a user gets it, all layers in one."""
        maps = self.extractor.compute_cams(scores=output, **self._keep_graph(), **question)
        return to_float(self.extractor.fuse_cams(maps).detach())

    def _keep_graph(self) -> dict[str, Any]:
        return {"retain_graph": True} if self.uses_gradients else {}


def _acts_in_training(module: Any) -> bool:
    """Check whether a module computes something else in training mode."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return bool(module.track_running_stats)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout) > 0
    if "drop" in type(module).__name__.lower() or isinstance(module, nn.modules.dropout._DropoutNd):
        rates = [getattr(module, name, None) for name in ("p", "drop_prob", "drop_rate", "rate")]
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
    return isinstance(module, nn.RReLU)
