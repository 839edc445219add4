"""What methods share that run the model again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._checks import positive_integer
from torchcam._tensors import to_float
from torchcam.layers import TargetLayer

from ._recorder import Pass
from ._replay import Edit, Replay
from .core import _CAM, Request


class _ReplayCAM(_CAM):
    """What methods that run the model again share: how many variants are in memory at a time, and a final ReLU.

    All take ``autocast``, the type (``torch.bfloat16`` or ``torch.float16``) that the repeated passes run in where the
    hardware has it faster; weights and maps are off by its rounding. None is the type of the recorded pass.
    """

    _relu = True
    _runs_model = True
    _options: tuple[str, ...] = ("batch_size",)

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        progress: bool = False,
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        self.batch_size = positive_integer("batch_size", batch_size)
        self.progress = progress
        if autocast not in {None, torch.bfloat16, torch.float16}:
            raise ValueError(f"`autocast` must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
        self.autocast = autocast
        super().__init__(model, target_layer, input_shape, **kwargs)

    def _replay(self, request: Request, **options: Any) -> Replay:
        return Replay(
            self._recorder.model,
            self._recorded_call(request),
            self._selector(request),
            self.batch_size,
            progress=self.progress,
            description=type(self).__name__,
            autocast=self.autocast,
            output=request.recorded.output,
            kept=self._recorder.replicas,
            **options,
        )


class _ChannelCAM(_ReplayCAM):
    """What methods share that run the model once per channel.

    They take two options that trade exactness for time, of which the strictest counts; a channel that is left out has
    no weight. Channels are ranked by their energy, the sum of their squares, in each sample and layer.

    ``max_channels``: at most so many channels are evaluated; None for no limit.
    ``energy``: only the strongest channels are evaluated, as many as it takes to hold this share (0 to 1) of the energy
    of all; None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        max_channels: int | None = None,
        energy: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.max_channels = None if max_channels is None else positive_integer("max_channels", max_channels)
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"`energy` is a share, more than 0 and at most 1, got {energy}")
        self.energy = energy
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)

    def _chosen(self, activation: Tensor) -> Tensor | None:
        """Return which channels are evaluated, (N, C); None for all."""
        if self.max_channels is None and self.energy is None:
            return None
        energy, order = activation.flatten(2).square().sum(-1).sort(stable=True, dim=1, descending=True)
        chosen = torch.ones_like(order, dtype=torch.bool)
        if self.max_channels is not None:
            chosen[:, self.max_channels :] = False
        if self.energy is not None:
            before = energy.cumsum(1) - energy
            chosen &= before < self.energy * energy.sum(1, keepdim=True)
            chosen[:, 0] = True
        return torch.zeros_like(chosen).scatter_(1, order, chosen)


class _EditingCAM(_ReplayCAM):
    """What methods share that run what follows a layer on edited copies of its output."""

    def _edited(
        self, request: Request, index: int, edit: Edit, num_variants: int, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the inputs, (N,), and variants of them, (N, V), whose activation at a target layer is edited.

        ``edit`` goes from activations in grid form (B, C, *spatial), which it may change, and the numbers of a variant
        of each (B,) to the edited ones (B, C, *spatial). Where only some variants are ``chosen``, (N, V), the others
        get the score of the input.
        """
        recorded = request.recorded
        if recorded.names != self.target_names:
            raise ValueError(
                f"{type(self).__name__} edits one tensor of a layer, but the target layers returned "
                f"{', '.join(recorded.names)}: name a layer inside them"
            )
        name = self.target_names[index]

        def in_layout_of_layer(output: Tensor, variants: Tensor) -> Tensor:
            return self._from_grid(recorded, edit(self._to_grid(recorded, output, name), variants), output, name)

        activation = recorded.activations[index]
        assert activation is not None  # noqa: S101 - for the type checker: there is one of each name
        batch = self._batch_dimension(recorded, activation, name)
        unedited, edited = self._replay(request).edited(
            name, in_layout_of_layer, num_variants, batch=batch, chosen=chosen
        )
        if self._default is not None:
            self._default.check_target(recorded.call, self._selector(request), [edited - unedited.unsqueeze(1)])
        return to_float(unedited), to_float(edited)

    def _from_grid(self, recorded: Pass, grid: Tensor, output: Tensor, name: str) -> Tensor:
        """Return rows of a layer's output, in its layout, with the grids (B, C, *spatial) in the place of theirs."""
        if self.reshape_transform is None:
            return recorded.layout(output, name).from_grid(grid.to(output.dtype), output)
        row = output[:1]
        numbers = torch.arange(row.numel(), dtype=torch.float64, device=output.device).reshape(row.shape)
        places = self.reshape_transform(numbers).flatten().round().long().clamp(0, row.numel() - 1)  # (C * S,)
        found = self.reshape_transform(row).flatten()
        if not torch.allclose(row.flatten()[places], found, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"{type(self).__name__} edits the layer's output, but `reshape_transform` computes new values where it "
                "may only select and move them: there is no way back"
            )
        rows = output.flatten(1).clone().index_copy_(1, places, grid.flatten(1).to(output.dtype))
        return rows.reshape(output.shape)
