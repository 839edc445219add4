"""The layer that is looked at where the user names none."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from torchcam._passes import find_image, image_shape
from torchcam.layers import automatic_layer, candidates

__all__ = ["DefaultLayer"]

logger = logging.getLogger(f"{__package__}.core")


class DefaultLayer:
    """Chooses the default layer by a pass over noise, and again if the first pass has another input.

    Args:
        model: the model
        input_shape: shape of the model's input without the batch dimension
        wanted_input: name or position of the image-like input

    Attributes:
        names: the chosen layer; empty if the model does not take such an input, for the first pass to decide
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], wanted_input: str | int | None) -> None:
        self.model = model
        self.wanted_input = wanted_input
        self.names: list[str] = []
        self._probed: tuple[int, ...] | None = ()
        try:
            found = automatic_layer(model, input_shape)
        except Exception as error:  # noqa: BLE001 - whatever a model raises at an input that is not its kind
            logger.info("%s does not take an input of shape %s: %s", type(model).__name__, input_shape, error)
            return
        self._probed = tuple(input_shape)
        self.names = self._announced(found, self._probed)

    def confirm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
        """Return the layer for the arguments of the first pass; None where the choice stays, as in all later passes."""
        probed, self._probed = self._probed, None
        image = None if probed is None else image_shape(find_image(args, kwargs, self.wanted_input))
        if image is None or image[1:] == probed:
            return None
        found = candidates(self.model, *args, **kwargs).choice
        if [found] != self.names:
            self.names = self._announced(found, image[1:])
        return self.names

    def _announced(self, layer: str | None, shape: tuple[int, ...]) -> list[str]:
        if layer is None:
            raise ValueError(
                f"no layer of {type(self.model).__name__} has positions that the score depends on, for an input of "
                f"shape {shape}: name a `target_layer`"
            )
        logger.warning("no value was provided for `target_layer`, thus set to '%s'.", layer)
        return [layer]
