"""The maps that one method made of one input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from ._pictures import enlarged
from ._views import FULL, View
from .layout import Cells
from .utils import overlay_map

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class MethodMaps:
    """The maps that one method made of one input.

    Attributes:
        method: the name of the method's class
        target_layers: the names of the target layers
        method_kwargs: the arguments of the method, as plain values
        cams: class index (or name of a target) to one map (*spatial) per target layer (methods that merge layers: one
            in all)
        fused: class index (or name of a target) to the map that is drawn (*spatial), fused from those of all layers
        signed: whether the maps are in [-1, 1], negative where the evidence is against, rather than in [0, 1]
    """

    method: str
    target_layers: tuple[str, ...]
    method_kwargs: Mapping[str, Any]
    cams: Mapping[Any, tuple[Tensor, ...]]
    fused: Mapping[Any, Tensor]
    signed: bool = False

    def layer_names(self, key: int | str) -> list[list[str]]:
        """Return the names of the layers that each map of a class was made from."""
        layers, count = list(self.target_layers), len(self.cams[key])
        return [[name] for name in layers] if count == len(layers) else [layers] * count

    def values(self, key: int | str) -> NDArray[np.float32]:
        """Return the map of a class as it is drawn, (height, width)."""
        cam = self.fused[key].detach().float()
        if cam.ndim != 2:
            shapes = sorted({tuple(one.shape) for one in self.cams[key]})
            raise ValueError(f"only maps (height, width) can be drawn over an image, these have shapes {shapes}")
        return np.asarray(cam.cpu().numpy(), dtype=np.float32)

    def note(self, key: int | str) -> str:
        """Return a remark on a map whose picture looks empty: it is blank, or undefined."""
        cam = self.fused[key]
        if not bool(cam.isfinite().all()):
            return "undefined (NaN)"
        return "blank: nothing above 0" if not bool(cam.any()) else ""


def draw_over(
    picture: Image.Image,
    values: NDArray[np.float32],
    colormap: str | Colormap | None,
    alpha: float,
    *,
    grey: bool = False,
    signed: bool = False,
    view: View = FULL,
) -> Image.Image:
    """Draw a map over the part of a picture that is the model's view; small pictures are enlarged."""
    base = enlarged(picture.convert("L") if grey else picture)
    cells = Cells.of_grid((values.shape[0], values.shape[1]), view)
    return overlay_map(base, values, colormap, alpha, signed=signed, cells=cells)


def save_maps(
    result: MethodMaps,
    key: int | str,
    folder: Path,
    place: str,
    draw: Callable[[NDArray[np.float32]], Image.Image],
) -> list[dict[str, Any]]:
    """Write the maps of a class, and pictures of them, to ``place`` within ``folder``; return the files' names."""
    entries = []
    subject = f"target-{list(result.cams).index(key)}" if isinstance(key, str) else f"class-{key}"
    for number, (names, cam) in enumerate(zip(result.layer_names(key), result.cams[key], strict=True)):
        stem = f"{place}{subject}-layer-{number}"
        values = cam.numpy().astype(np.float32)
        shares = (values + 1) / 2 if result.signed else values
        grey = (255 * np.nan_to_num(shares)).round().astype(np.uint8)
        files = {"map": f"{stem}.npy", "heatmap": f"{stem}-heatmap.png", "overlay": f"{stem}-overlay.png"}
        np.save(folder / files["map"], cam.numpy(), allow_pickle=False)
        Image.fromarray(grey).save(folder / files["heatmap"])
        draw(values).save(folder / files["overlay"])
        entries.append({"target_layers": names, **files})
    return entries
