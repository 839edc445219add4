"""What a diagnosis reads of an extractor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._cached import cached_property
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
        cam: the extractor that looks at the layers: the same, or the one that it asks
        recorder: what records its passes
        model: the explained model
        method: the name of the method
        found: the pass; None if none has begun
        call: the arguments of the pass; None if a part of the model was called
        activations: the outputs of the layers; None for those that did not run
        batch_size: the number of samples
    """

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.cam = extractor.inner
        self.recorder = self.cam._recorder
        self.model: nn.Module = self.cam.model
        self.method = type(self.cam).__name__
        found: Any = self.cam._last_pass()
        self.found = found
        self.call: Any = None if found is None else found.call
        self.activations: list[Tensor | None] = [] if found is None else found.activations
        first = next((activation for activation in self.activations if activation is not None), None)
        shape = None if found is None else found.input_shape
        self.batch_size: int = shape[0] if shape is not None else 1 if first is None else len(first)

    @property
    def names(self) -> list[str]:
        """The name of each activation."""
        names: list[str] = self.found.names
        return names

    @property
    def reads_layers(self) -> bool:
        """Whether the method reads outputs of layers: not attention, and not the input."""
        return bool(self.recorder.keeps_outputs and not self.recorder.reads_attention)

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
        return self.cam.hook_a

    def to_grid(self, tensor: Tensor, name: str) -> Any:
        """Return a tensor shaped as an activation in grid form."""
        return tensor if self.recorder.reads_attention else self.cam._to_grid(self.found, tensor, name)

    def layout(self, tensor: Tensor, name: str) -> Any:
        """Return the layout of an activation."""
        return self.found.layout(tensor, name)

    def selector(self, classes: list[int], output: Any) -> Selector:
        """Return the score that the method explains, for a question about some classes."""
        with torch.no_grad():
            explained: Selector = self.extractor._selector(Request(self.found, classes, output))
        return explained

    def with_graph(self, output: Any) -> Any:
        """Return an output of the recorded pass with its graph."""
        return Request(self.found, scores=output).attached()

    def raw_maps(self, question: dict[str, Any], select: Selector | None, output: Any) -> RawMaps:
        """Compute the maps of all layers before ReLU, scaling and fusion."""
        cam, recorded = self.cam, self.found
        asked = question if select is None or type(select) is Selector else {"targets": select}
        maps = cam.compute_cams(scores=output, normalized=False, relu=False, **self._keep_graph, **asked)
        if (
            select is not None
            and self.recorder.differentiates
            and not self.recorder.reads_attention
            and not recorded.gradients
        ):
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
        return {"retain_graph": True} if self.recorder.differentiates else {}
