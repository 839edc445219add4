"""The only module of the diagnosis that reads an extractor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._tensors import to_float
from torchcam.layers import Candidates, candidates_of
from torchcam.methods._request import Request
from torchcam.targets import Selector


@dataclass(frozen=True)
class RawMaps:
    """The result of the method before its maps are finished.

    Attributes:
        maps: the map of each layer, (N, *spatial)
        gradients: the gradient for each activation, None for those without one
        error: the reason why there are no maps
        completeness: by layer, the share of each sample's score that gradient × activation sums to
        unbalanced: the operations that balanced gradients have no rule for
    """

    maps: list[Tensor]
    gradients: list[Tensor | None]
    error: Exception | None = None
    completeness: dict[str, list[float]] = field(default_factory=dict)
    unbalanced: list[str] = field(default_factory=list)


class ExtractorView:
    """What a diagnosis reads of an extractor and of the last pass that it has recorded.

    Attributes:
        extractor: the extractor
        model: the explained model
        method: the name of the method
        target_names: the names of the target layers
        has_hooks: whether the extractor's hooks are on the model
        is_enabled: whether they record
        is_compiled: whether the model was compiled in place
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
        expects_one_sign: whether the method is meant for activations of one sign
        keeps_positive: whether a ReLU is applied to the map
        reads_attention: whether the method reads attention
        reads_layers: whether the method reads outputs of layers: not attention, and not the input
        reshape_transform: the user's function to grid form
    """

    def __init__(self, extractor: Any) -> None:
        cam = self._cam = extractor.inner
        recorder = cam._recorder
        try:
            found = recorder.find()
        except AssertionError:
            found = None
        self._recorded: Any = found
        self.extractor = extractor
        self.model: nn.Module = cam.model
        self.method = type(cam).__name__
        self.target_names: list[str] = list(cam.target_names)
        self.has_hooks: bool = recorder.is_attached
        self.is_enabled: bool = recorder.enabled
        self.is_compiled: bool = recorder.is_compiled
        self.has_started = found is not None
        self.call: Any = None if found is None else found.call
        self.uses_gradients: bool = recorder.differentiates
        self.grad_enabled = self.uses_gradients and found is not None and not found.private
        self.names: list[str] = self.target_names if found is None else found.names
        self.layers: list[str] = self.target_names if found is None else [row.layer for row in found.rows]
        self.activations: list[Tensor | None] = [] if found is None else found.activations
        first = next((activation for activation in self.activations if activation is not None), None)
        shape = None if found is None else found.input_shape
        self.batch_size: int = shape[0] if shape is not None else 1 if first is None else len(first)
        self.in_training = [
            name for name, module in self.model.named_modules() if module.training and _acts_in_training(module)
        ]
        self.class_agnostic: bool = cam.class_agnostic
        self.expects_one_sign: bool = cam._expects_one_sign
        self.keeps_positive: bool = cam._relu
        self.reads_attention: bool = recorder.reads_attention
        self.reads_layers: bool = recorder.keeps_outputs and not recorder.reads_attention
        self.reshape_transform: Callable[[Tensor], Tensor] | None = cam.reshape_transform

    @property
    def reached(self) -> bool:
        """Whether the pass has run a target layer."""
        return any(activation is not None for activation in self.activations)

    @cached_property
    def candidates(self) -> Candidates:
        """The layers that a map can be made from; none if they cannot be found."""
        try:
            return candidates_of(self.model, self.call)
        except Exception:  # noqa: BLE001 - advice without a layer is better than an error
            return Candidates([])

    @property
    def choice(self) -> str | None:
        """The layer that a map should be made from, if it can be found."""
        return self.candidates.choice

    def grids(self) -> Any:
        """Return the activations in grid form, (N, C, *spatial).

        Raises:
            ValueError: if one has no positions
        """
        return self._cam.hook_a

    def to_grid(self, tensor: Tensor, name: str) -> Any:
        """Return a tensor shaped as an activation in grid form."""
        return tensor if self.reads_attention else self._cam._to_grid(self._recorded, tensor, name)

    def layout(self, tensor: Tensor, name: str) -> Any:
        """Return the layout of an activation."""
        return self._recorded.layout(tensor, name)

    def selector(self, classes: list[int], output: Any) -> Selector:
        """Return the score that the method explains, for a question about some classes."""
        with torch.no_grad():
            explained: Selector = self.extractor._selector(Request(self._recorded, classes, output))
        return explained

    def with_graph(self, output: Any) -> Any:
        """Return an output of the recorded pass with its graph."""
        return Request(self._recorded, scores=output).attached()

    def raw_maps(self, question: dict[str, Any], select: Selector | None, output: Any) -> RawMaps:
        """Compute the maps of all layers before ReLU, scaling and fusion."""
        cam, recorded = self._cam, self._recorded
        asked = question if select is None or type(select) is Selector else {"targets": select}
        maps = cam.compute_cams(scores=output, normalized=False, relu=False, **self._keep_graph, **asked)
        if select is not None and self.uses_gradients and not self.reads_attention and not recorded.gradients:
            cam._gradients(Request(recorded, scores=output, targets=select, retain_graph=True))
        shares = zip(self.names, cam.completeness, strict=True) if cam.completeness else ()
        completeness = {name: share.tolist() for name, share in shares}
        return RawMaps(maps, list(recorded.gradients) or [None] * len(self.names), None, completeness, cam.unbalanced)

    def fused_map(self, question: dict[str, Any], output: Any) -> Tensor:
        """Compute the map of each sample as a user gets it, all layers in one."""
        maps = self.extractor.compute_cams(scores=output, **self._keep_graph, **question)
        return to_float(self.extractor.fuse_cams(maps).detach())

    @property
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
