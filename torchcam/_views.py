"""Where the model's view lies on the picture that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._replica import random_states_kept

View = tuple[float, float, float, float]
"""Top, left, bottom and right, as shares of a picture's height and width; beyond 0 and 1 where padding was added, and
the other way round where the picture was mirrored."""

FULL: View = (0.0, 0.0, 1.0, 1.0)

_STEP = 1 / 255  # what a picture of 8 bits can tell apart


def find_view(
    to_tensor: Callable[[Image.Image], Tensor], size: tuple[int, int], seen: tuple[int, int] | None = None
) -> View | None:
    """Find out by experiment which part of a picture a transform shows to a model.

    The transform is run on pictures whose values say where a pixel is. So it may be any combination of scaling,
    cropping, padding and mirroring, with any normalisation, written by anybody.

    Args:
        to_tensor: the transform, from an RGB picture to a tensor (C, H, W)
        size: the size of the picture, (width, height)
        seen: the size of the model's view, if it is known

    Returns:
        the view; None if the transform is random, turns or warps the picture, or does not give such a tensor, or one of
        another size
    """
    width, height = size
    along_x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    along_y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    black, white = np.zeros((height, width)), np.ones((height, width))
    try:
        with random_states_kept(), torch.random.fork_rng(devices=[]):
            found = [to_tensor(_grey(values)) for values in (black, white, along_x, along_y, along_x)]
    except Exception:  # noqa: BLE001 - whatever a transform raises at a picture that is not its kind
        return None
    if any(not isinstance(one, Tensor) or one.ndim != 3 or one.shape != found[0].shape for one in found):
        return None
    if seen is not None and tuple(found[0].shape[1:]) != seen[::-1]:
        return None
    dark, light, x, y, again = (one.detach().double().cpu().numpy() for one in found)
    if not np.array_equal(x, again):
        return None
    span = light - dark
    channel = int(np.abs(span).mean((1, 2)).argmax())
    covered = np.abs(span[channel]) > 0.5 * np.abs(span[channel]).max()
    rows, columns = covered.any(1), covered.any(0)
    if not covered.any() or not np.array_equal(covered, rows[:, None] & columns):
        return None
    inside = np.ix_(rows, columns)
    x, y = (((one[channel] - dark[channel])[inside] / span[channel][inside]) for one in (x, y))
    horizontal = _line(x, columns, width)
    vertical = _line(y.T, rows, height)
    if horizontal is None or vertical is None:
        return None
    return vertical[0], horizontal[0], vertical[1], horizontal[1]


def _grey(values: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")


def _line(values: np.ndarray[Any, Any], covered: np.ndarray[Any, Any], pixels: int) -> tuple[float, float] | None:
    """Fit places (across, along) in a picture by a line along one axis of the view; return where the view's ends are.

    Args:
        values: the places, as shares of the picture
        covered: which positions along the axis of the view they are of
        pixels: the length of the picture
    """
    places = (np.flatnonzero(covered) + 0.5) / len(covered)
    middle = values.mean(0)
    tolerance = 2 * _STEP + 0.75 / pixels
    if np.abs(values - middle).max() > tolerance:  # it is not the picture's own axis
        return None
    edge = 0.5 / pixels + _STEP  # beyond the centres of the outermost pixels there is nothing to interpolate
    usable = (middle > edge) & (middle < 1 - edge)
    if usable.sum() < 2:
        return None
    slope, start = np.polyfit(places[usable], middle[usable], 1)
    if np.abs(start + slope * places[usable] - middle[usable]).max() > tolerance or abs(slope) < _STEP:
        return None
    ends = [float(start), float(start + slope)]
    near = [round(end) if abs(end - round(end)) < max(_STEP, 0.5 / pixels) else end for end in ends]
    return float(near[0]), float(near[1])


@dataclass(frozen=True, eq=False)
class Views:
    """Tells where the model's view lies on pictures of one input. A pickle leaves it out.

    Attributes:
        seen: the size of the model's view, (width, height)
        source: the size of the picture that it was made of; None if that is not known
        to_tensor: the transform that made it; None if that is not known
    """

    seen: tuple[int, int]
    source: tuple[int, int] | None = None
    to_tensor: Callable[[Image.Image], Tensor] | None = None
    _known: dict[tuple[int, int], View | None] = field(default_factory=dict, repr=False)

    def on(self, size: tuple[int, int]) -> View | None:
        """Return the view on a picture of some size: the source, scaled or not, or the view itself; None if unknown."""
        if size == self.seen and self.source != size:
            return FULL
        is_source = _same_shape(size, size if self.source is None else self.source)
        found = self._found(size if self.source is None else self.source) if is_source else None
        if not _same_shape(size, self.seen) or found == FULL or size == self.source:
            return found
        return None if found is not None else FULL  # of the same shape as both, it may be either

    def unknown(self, size: tuple[int, int], place: str = "over the model's view") -> str:
        """Return the message for a picture on which the view is not known, with the place where the map is drawn."""
        why = "pass the `transform` that made it" if self.to_tensor is None else "its transform cannot be followed"
        if self._known.get(self.source or size) is not None:
            why = "it has the shape of the original as well as of the model's view, and the size of neither"
        return (
            f"where the model's view of {self.seen[0]} × {self.seen[1]} pixels lies on an `image` of {size[0]} × "
            f"{size[1]} is not known ({why}), so the map is drawn {place}. An image that was cropped as "
            "it was for the model can be drawn over."
        )

    def _found(self, source: tuple[int, int]) -> View | None:
        if source not in self._known:
            self._known[source] = None if self.to_tensor is None else find_view(self.to_tensor, source, self.seen)
        return self._known[source]

    def __deepcopy__(self, memo: dict[int, Any]) -> Views:
        return self

    def __reduce__(self) -> tuple[type[Views], tuple[tuple[int, int]]]:
        return Views, (self.seen,)


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Check whether one size is the other one scaled, to a pixel."""
    scale = max(first) / max(second)
    return all(abs(a - scale * b) <= max(1.0, scale) for a, b in zip(first, second, strict=True))
