"""An interactive page of maps: one HTML file without external resources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import _templates
from ._figures import SCALES
from ._pictures import TINY, base64_text, data_uri, enlarged_size, fitted, fitted_size
from .utils import COLORMAP, colormap_of, resize_map

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

COLORMAPS = (COLORMAP, "plasma", "inferno", "cividis", "gray", "jet")
EDGE = 768  # the longest side of a picture in the page


def render(
    items: Sequence[Mapping[str, Any]],
    title: str,
    about: Sequence[tuple[str, str]],
    colormap: str | Colormap | None = None,
    alpha: float = 0.5,
    sentence: Sequence[tuple[str, int | None]] = (),
) -> str:
    """Return the page as HTML.

    Args:
        items: the inputs and their maps, by :func:`item_entry`
        title: the heading
        about: terms and their explanations: how the maps were made
        colormap: the colormap of all maps; by default the reader can choose
        alpha: the opacity of the image when the page opens, in [0, 1)
        sentence: pieces of a text, each with the class that it stands for: where there is one, the reader chooses a
            class in it
    """
    choice = COLORMAPS if colormap is None else (colormap,)
    data = {
        "items": items,
        "about": about,
        "sentence": [{"text": piece, "class": number} for piece, number in sentence],
        "opacity": round(100 * (1 - alpha)),
        "scales": [{"label": label, "ticks": ticks} for label, ticks in (SCALES[False], SCALES[True])],
        "colormaps": [
            {"name": entry if isinstance(entry, str) else entry.name, "table": color_table(entry, signed=False)}
            for entry in choice
        ],
        "signed": color_table(None, signed=True) if colormap is None else None,
    }
    return _templates.render("_page.html", title=title, data=data)


def item_entry(
    name: str, image: Image.Image, classes: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one input and its maps as the page holds them.

    Args:
        name: the name of the input, unique in the page
        image: the image below the maps
        classes: for each class its name, and further entries for the page: value, share, tags, and the verdict of trust
            on the first method's map
        methods: the maps of each method, by :func:`method_entry`
    """
    image = fitted(image, EDGE)
    width, height = enlarged_size(image.size)
    tiny = max(image.size) < TINY
    entry = {"name": name, "image": data_uri(image), "tiny": tiny, "size": [height, width]}
    return {**entry, "classes": classes, "methods": methods}


def method_entry(
    name: str, layers: str, maps: Sequence[NDArray[np.float32]], notes: Sequence[str], *, signed: bool = False
) -> dict[str, Any]:
    """Return the maps of one method as the page holds them.

    Args:
        name: the name of the method
        layers: its target layers
        maps: a map (height, width) for each class
        notes: a remark about each map
        signed: whether the maps are in [-1, 1], not in [0, 1]
    """
    entries = [_map(values, signed, note) for values, note in zip(maps, notes, strict=True)]
    return {"name": name, "layers": layers, "signed": signed, "maps": entries}


def _map(values: NDArray[np.float32], signed: bool, note: str) -> dict[str, Any]:
    """Return a map in two bytes for each position: 0 to 65534 for its range, 65535 for undefined values."""
    values = _fitted_map(values)
    defined = np.isfinite(values)
    shares = (values + 1) / 2 if signed else values
    levels = np.where(defined, np.rint(65534 * np.clip(np.where(defined, shares, 0), 0, 1)), 65535).astype("<u2")
    return {"shape": list(levels.shape), "values": base64_text(levels.tobytes()), "note": note}


def _fitted_map(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shrink a map so that no side is longer than ``EDGE``."""
    height, width = values.shape
    size = fitted_size((width, height), EDGE)
    return values if size == (width, height) else resize_map(values, size, Image.Resampling.LANCZOS)


def color_table(colormap: str | Colormap | None, signed: bool) -> str:
    """Return the colours of a colormap, four bytes each."""
    found = colormap_of(colormap, signed)
    return base64_text(found(np.arange(found.N), bytes=True).tobytes())
