"""A page of its own to look at maps: one HTML file that fetches nothing."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ._figures import SCALES, data_uri, fitted
from .utils import COLORMAP, colormap_of

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

__all__ = ["PageItem", "PageMethod", "render"]

COLORMAPS = (COLORMAP, "plasma", "inferno", "cividis", "gray", "jet")
EDGE = 768  # the longest side of a picture in the page
SMALL = 128  # pictures with less on their longest side are shown with their pixels


@dataclass(frozen=True)
class PageMethod:
    """The maps of one method.

    Attributes:
        name: how it is called
        layers: the layers it looks at
        signed: whether the maps are in [-1, 1], not in [0, 1]
        maps: a map (height, width) for each class
        notes: what is to be said of each map
    """

    name: str
    layers: str
    signed: bool
    maps: Sequence[NDArray[np.float32]]
    notes: Sequence[str]


@dataclass(frozen=True)
class PageItem:
    """What there is to see of one input.

    Attributes:
        name: what tells it from other inputs
        image: what the model sees
        classes: for each class its name, and what else the page shows of it: value, share, tags
        methods: the maps
    """

    name: str
    image: Image.Image
    classes: Sequence[Mapping[str, Any]]
    methods: Sequence[PageMethod]


def render(
    items: Sequence[PageItem],
    title: str,
    about: Sequence[tuple[str, str]],
    colormap: str | Colormap | None = None,
    alpha: float = 0.5,
) -> str:
    """Write the page.

    Args:
        items: what there is to see of each input
        title: its heading
        about: terms and what is to be said to each: how the maps were made
        colormap: the colormap of all maps; by default the reader has a choice
        alpha: the opacity of the image when the page opens, in [0, 1)
    """
    choice = COLORMAPS if colormap is None else (colormap,)
    data = {
        "items": [_item(item) for item in items],
        "about": about,
        "opacity": round(100 * (1 - alpha)),
        "scales": [{"label": label, "ticks": ticks} for label, ticks in (SCALES[False], SCALES[True])],
        "colormaps": [
            {"name": entry if isinstance(entry, str) else entry.name, "table": _table(entry, signed=False)}
            for entry in choice
        ],
        "signed": _table(None, signed=True) if colormap is None else None,
    }
    # In a script element of any type, `</script>` and `<!--` would end or change what is read as data.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    template = files("torchcam").joinpath("_page.html").read_text(encoding="utf-8")
    head, between, tail = template.split("@@TITLE@@")
    before, after = tail.split("@@DATA@@")
    escaped = html.escape(title)
    return f"{head}{escaped}{between}{escaped}{before}{text}{after}"


def _item(item: PageItem) -> dict[str, Any]:
    image = fitted(item.image, EDGE)
    small = max(image.size) < SMALL
    times = -(-2 * SMALL // max(image.size)) if small else 1
    return {
        "name": item.name,
        "image": data_uri(image),
        "small": small,
        "size": [image.height * times, image.width * times],
        "classes": [dict(entry) for entry in item.classes],
        "methods": [
            {
                "name": method.name,
                "layers": method.layers,
                "signed": method.signed,
                "maps": [
                    _map(values, method.signed, note) for values, note in zip(method.maps, method.notes, strict=True)
                ],
            }
            for method in item.methods
        ],
    }


def _map(values: NDArray[np.float32], signed: bool, note: str) -> dict[str, Any]:
    """Give a map as bytes: 0 to 254 for its range, 255 where it is undefined."""
    values = _shrunk(values)
    defined = np.isfinite(values)
    shares = (values + 1) / 2 if signed else values
    levels = np.where(defined, np.rint(254 * np.clip(np.where(defined, shares, 0), 0, 1)), 255).astype(np.uint8)
    return {"shape": list(levels.shape), "values": _base64(levels.tobytes()), "note": note}


def _shrunk(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if max(values.shape) <= EDGE:
        return values
    defined = np.isfinite(values)
    shares = np.asarray(fitted(Image.fromarray(defined.astype(np.float32)), EDGE))
    sums = np.asarray(fitted(Image.fromarray(np.where(defined, values, 0).astype(np.float32)), EDGE))
    return np.where(shares < 0.5, np.nan, sums / np.maximum(shares, 0.5))


def _table(colormap: str | Colormap | None, signed: bool) -> str:
    """Give the colours of a colormap, four bytes each."""
    found = colormap_of(colormap, signed)
    return _base64(found(np.arange(found.N), bytes=True).tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
