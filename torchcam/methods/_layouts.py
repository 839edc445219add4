"""The layouts of an extractor's target layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from torchcam._certainty import Certainty
from torchcam._passes import Call
from torchcam.layout import AmbiguousLayoutError, Layout, Reading, no_reading, unusual_axes

from ._running import warn


class Layouts:
    """Finds the layout of each target layer once for the shapes of its output and of the input.

    Where the layer and the model leave a doubt, an experiment decides, once for a layer: another size is read alike.

    Args:
        model: the model
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: dict[tuple[str, torch.Size, tuple[int, ...] | None], tuple[Layout, tuple[int, ...] | None]] = {}
        self._proven: dict[str, Layout] = {}

    def prove(self, name: str, layout: Layout) -> None:
        """Take note of the layout that a layer was chosen for."""
        self._proven[name] = layout

    def prefix(self, name: str) -> tuple[int, int] | None:
        """Return the dimension of a layer's tokens, from the last, and how many come before its positions, if any."""
        layout = self._proven.get(name)
        return None if layout is None or not layout.prefix else (layout.prefix_dimension, layout.prefix)

    def find(
        self,
        shape: torch.Size,
        name: str,
        target_names: Sequence[str],
        call: Call,
        input_shape: tuple[int, ...] | None,
    ) -> Layout:
        """Return the layout of a layer's output, and tell the call along which axes of the input its positions are.

        Args:
            shape: the shape of the output
            name: the name of the layer, with what tells the output apart where there are several
            target_names: the names of the layers
            call: how the model was called
            input_shape: the shape of the image-like input, if there is one

        Raises:
            ValueError: if the output has no positions, or several readings are possible
        """
        key = name, shape, input_shape
        found = self._found.get(key)
        if found is None:
            layer = _layer_of(name, target_names)
            layout = self._decide(tuple(shape), layer, name, call).placed
            found = self._found[key] = layout, unusual_axes(layout.axes)
        layout, axes = found
        if layout.axes:
            call.axes = axes
        return layout

    def axes(self, layout: Layout, name: str, target_names: Sequence[str], call: Call) -> tuple[int, ...]:
        """Return the dimensions of the image-like input that a grid follows, by an experiment where they are in doubt.

        Args:
            layout: the layout of the layer's output
            name: the name of the layer, with what tells the output apart where there are several
            target_names: the names of the layers
            call: how the model was called
        """
        known = self._proven.get(name)
        if known is None or not known.axes:
            layer = _layer_of(name, target_names)
            certainty = Certainty(self.model, call)
            certainty.try_out([layer])
            usual = tuple(range(2, 2 + len(layout.grid)))
            known = replace(layout, axes=certainty.axes(layout, layer, name[len(layer) :]) or usual)
            self._proven[name] = known
        return known.axes

    def _decide(self, shape: tuple[int, ...], layer: str, name: str, call: Call) -> Reading:
        certainty = Certainty(self.model, call)
        if len(shape) < 3:
            raise ValueError(no_reading(shape, certainty.input_shape, name))
        verdict = certainty.certain(shape, layer)
        if verdict is None:
            alike = self._alike(certainty.readings(shape, layer) or certainty.readings(shape, layer, wide=True), name)
            if alike is not None:
                return alike
            call.check_unchanged()
            certainty.try_out([layer])
            verdict = certainty.tried(shape, layer, name[len(layer) :])
        if verdict.reading is None:
            raise _no_layout(shape, certainty.input_shape, name, verdict.others)
        layout = verdict.reading.placed
        if verdict.holds is False:
            warn(
                f"the output of `target_layer` '{name}', of shape {shape}, is read as {layout}, but where the input is "
                "changed is not where that grid changes: its positions may not be those of the input. Name another "
                "layer, or pass `reshape_transform`, a function from that output to a tensor (N, C, *spatial)",
                stacklevel=2,
            )
        self._proven[name] = layout
        return verdict.reading

    def _alike(self, possible: Sequence[Reading], name: str) -> Reading | None:
        """Return the reading that is like the one that was proven for another size, if it is the only one."""
        known = self._proven.get(name)
        if known is None:
            return None
        found = [one for one in possible if one.layout.is_like(known)]
        found = [one for one in found if one.axes == known.axes] or found
        return found[0] if len({one.layout for one in found}) == 1 else None


def _layer_of(name: str, target_names: Sequence[str]) -> str:
    return next((one for one in target_names if name == one or name.startswith(f"{one}[")), name)


def _no_layout(
    shape: tuple[int, ...], input_shape: tuple[int, ...] | None, name: str, possible: Sequence[Reading]
) -> ValueError:
    """Return the error for the output of a layer that has no positions, or can be read in several ways."""
    if not possible:
        return ValueError(no_reading(shape, input_shape, name))
    layouts = list(dict.fromkeys(one.layout for one in possible))[:4]
    ways = " or ".join(f"as {layout}: `reshape_transform={layout.source}`" for layout in layouts)
    given = "" if input_shape is None else f" for an input of shape {input_shape}"
    return AmbiguousLayoutError(
        f"the output of `target_layer` '{name}', of shape {shape}{given}, can be read in several ways, and neither the "
        f"layer nor an experiment tells which: name one, {ways}; or another `target_layer`"
    )
