"""The layer that is looked at where the user names none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchcam._passes import Call, image_shape
from torchcam.layers import Candidate, Candidates, candidates_of, probe

from ._layouts import Layouts
from ._running import warn

logger = logging.getLogger(f"{__package__}.core")


class DefaultLayer:
    """Chooses the default layer by a pass over noise, and proves it on the first input if that has another shape.

    Args:
        model: the model
        input_shape: shape of the model's input without the batch dimension
        wanted_input: name or position of the image-like input
        layouts: is told how the output of the layer is laid out
        channels: how many channels the layer must have; by default any number

    Attributes:
        names: the chosen layer; empty if the model does not take such an input, for the first pass to decide
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        wanted_input: str | int | None,
        layouts: Layouts,
        channels: int | None = None,
    ) -> None:
        self.model = model
        self.wanted_input = wanted_input
        self.layouts = layouts
        self.channels = channels
        if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            raise ValueError(
                f"{type(model).__name__} has parameters that its first forward pass makes: run it once before, or name "
                "the `target_layer`"
            )
        self.names: list[str] = []
        self._probed: tuple[int, ...] | None = ()
        self._is_checked = False
        try:
            found = candidates_of(model, probe(model, input_shape))
        except Exception as error:  # noqa: BLE001 - whatever a model raises at an input that is not its kind
            logger.info("%s does not take an input of shape %s: %s", type(model).__name__, input_shape, error)
            return
        self._probed = tuple(input_shape)
        self._choose(found, self._probed)

    def confirm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Return the layer for the arguments of the first pass, of the model or of a replica; it stays from then on.

        Of an input of another shape than the probe's, the choice stays where it holds, even if one position is left.
        """
        probed, self._probed = self._probed, None
        if probed is None:
            return self.names
        call = Call(args, kwargs, self.wanted_input)
        shape = image_shape(call.signal)
        if probed and (shape is None or shape[1:] == probed):
            return self.names
        found = candidates_of(self.model, call)
        kept = next((one for one in found if [one.name] == self.names and one.depends), None)
        if kept is None or kept.is_proven is False:
            self._choose(found, () if shape is None else shape[1:], call)
            return self.names
        self.layouts.prove(kept.name, kept.layout)
        _warn_of_one_position(kept, found, () if shape is None else shape[1:])
        return self.names

    def choose_for(self, call: Call, select: Callable[[Any], Tensor]) -> None:
        """Choose another layer if what is explained in a call does not depend on the one that was chosen.

        Args:
            call: how the model will be called
            select: the explained scores, (N,) or (N, K)
        """
        found = candidates_of(self.model, call, select)
        own = next((one for one in found if [one.name] == self.names), None)
        if own is None or not own.influence or own.reach < 1:
            shape = image_shape(call.signal)
            self._choose(found, () if shape is None else shape[1:])
            self._probed = None

    def check_target(self, call: Call, select: Callable[[Any], Tensor], effects: Iterable[Tensor]) -> None:
        """Check once that the explained score depends on the layer, where no position shows an effect on it.

        Args:
            call: the recorded call
            select: the explained score
            effects: gradients of the score for the positions, or its changes when they are edited

        Raises:
            ValueError: if it does not, but does on another layer, which the message names
        """
        if not self._is_checked and not any(bool(effect.any()) for effect in effects):
            found = candidates_of(self.model, call, select)
            own = next((one for one in found if [one.name] == self.names), None)
            if found.choice is not None and (own is None or not own.depends):
                raise ValueError(
                    f"the explained score does not depend on the positions of the default layer '{self.names[0]}', but "
                    f"on those of '{found.choice}': name that as `target_layer`"
                )
        self._is_checked = True

    def of_positions(self, gradient: Tensor) -> Tensor:
        """Leave out what is before the positions: a class token may be all that a score is read from."""
        prefix = self.layouts.prefix(self.names[0])
        if prefix is None:
            return gradient
        dimension, count = prefix
        return gradient.narrow(dimension, count, gradient.shape[dimension] - count)

    def _choose(self, found: Candidates, shape: tuple[int, ...], call: Call | None = None) -> None:
        """Take the default among candidates, for an input of a shape without the batch dimension.

        Raises:
            ValueError: if there is none
        """
        chosen = next((one for one in found if one.name == found.choice), None)
        if self.channels is not None and (chosen is None or chosen.channels != self.channels):
            fitting = [c for c in found if c.depends and c.channels == self.channels and "Pool" not in c.type]
            chosen = fitting[-1] if fitting else chosen
        if chosen is None:
            way = "name a `target_layer`, or look at the input itself, with GuidedBackprop, say"
            if len(found) and not any(one.influence for one in found if math.prod(one.grid) > 1):
                way = (
                    "as no gradient leads from the scores to any layer (parts are quantised or detached, say), name a "
                    "`target_layer` for a method without gradients, such as ReciproCAM"
                )
            if (
                call is not None
                and len([t for t, _ in call.versions if t.ndim > 2 and tuple(t.shape[1:]) == shape]) > 1
            ):
                way += "; a layer that sees several inputs shows the last one: `input_index` says which is meant"
            raise ValueError(
                f"no layer of {type(self.model).__name__} has positions that the score depends on, and that are those "
                f"of the input, for an input of shape {shape}: {way}"
            )
        self.layouts.prove(chosen.name, chosen.layout)
        _warn_of_one_position(chosen, found, shape)
        if [chosen.name] != self.names:
            logger.warning("no value was provided for `target_layer`, thus set to '%s'.", chosen.name)
        self.names = [chosen.name]


def _warn_of_one_position(layer: Candidate, found: Candidates, shape: tuple[int, ...]) -> None:
    """Warn if a default layer has a single position for an input of a shape without the batch dimension."""
    if math.prod(layer.grid) == 1:
        other = "" if found.choice is None else f", such as '{found.choice}'"
        warn(
            f"the default layer '{layer.name}' has a single position for an input of shape {shape}, so its "
            f"map shows no place: give the model a larger input, or name an earlier `target_layer`{other}",
            stacklevel=3,
        )
