"""Maps drawn over images."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ._checks import fraction

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import ArrayLike, NDArray

__all__ = ["COLORMAP", "SIGNED_COLORMAP", "overlay_map", "overlay_mask"]

COLORMAP = "viridis"
"""The default colormap of maps in [0, 1]: equal steps look equal, also in grey and to colour-blind eyes."""

SIGNED_COLORMAP = "coolwarm"
"""The colormap of signed maps: blue is against, red is for; what is near zero is left transparent."""

# The value of full intensity, for each greyscale mode of Pillow that has one meaning.
_FULL_SCALE = {"1": 1, "L": 255, "F": 1, "I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535}
# Older versions of Pillow open 16-bit files as 32-bit integers.
_BACKGROUND_FULL_SCALE = {**_FULL_SCALE, "I": 65535}


def overlay_mask(
    img: Image.Image, mask: Image.Image, colormap: str | Colormap = "jet", alpha: float = 0.7
) -> Image.Image:
    """Draw a map over an image.

    The mask is resized to the image (bicubic) and mapped linearly to the colormap. Each pixel of the result is
    `alpha * img + (1 - alpha) * color`, rounded.

    Where the mask is undefined (NaN or infinite, possible in mode `F`), and wherever else the colormap is transparent,
    the image shows through unchanged. Undefined values do not spread: their neighbours are resized without them. A
    colormap with a colour for bad values (`Colormap.set_bad`) shows them in that colour.

    Example:
        >>> from PIL import Image
        >>> from torchcam.utils import overlay_mask
        >>> image = Image.new("RGB", (4, 2), "black")
        >>> mask = Image.new("L", (2, 1), 255)
        >>> overlay_mask(image, mask, colormap="gray", alpha=0.5).getpixel((0, 0))
        (128, 128, 128)

    Args:
        img: the image below. RGB, a palette without transparency (`P`), or greyscale: `L`, `1`, 16-bit integers
            (`I;16` and its variants, or `I`, with values in [0, 65535]), or `F` with values in [0, 1].
        mask: the map, of any size. The colormap covers [0, 255] in mode `L`, [0, 65535] in mode `I;16` and its
            variants, and [0, 1] in modes `F` and `1`; values outside take the nearest end.
        colormap: a matplotlib colormap, or the name of one.
        alpha: the opacity of `img`, in [0, 1).

    Returns:
        An RGB image of the size of `img`.

    Raises:
        TypeError: if `img` or `mask` is not a PIL image, or `colormap` neither a name nor a colormap.
        ValueError: if `alpha` is not a number in [0, 1), a mode is not one of the above, a value of `img` is outside
            its range, or no colormap has that name.
    """
    for name, image in (("img", img), ("mask", mask)):
        if not isinstance(image, Image.Image):
            raise TypeError(f"`{name}` must be a PIL image, got {type(image).__name__}")
    alpha = float(fraction("alpha", alpha))
    background = _read_background(img)  # (H, W, 3)
    values = np.clip(resize_map(_read_mask(mask), img.size), 0, 1)  # (H, W)
    colors = find_colormap(colormap)(values).astype(np.float32)  # (H, W, 4), in [0, 1]
    opacity = (1 - alpha) * colors[..., 3:]
    blend = background + opacity * (255 * colors[..., :3] - background)
    return Image.fromarray(np.rint(blend).astype(np.uint8))


def overlay_map(
    img: Image.Image,
    values: ArrayLike,
    colormap: str | Colormap | None = None,
    alpha: float = 0.5,
    *,
    signed: bool = False,
) -> Image.Image:
    """Draw a map of numbers over an image, as :func:`overlay_mask` does.

    Example:
        >>> from PIL import Image
        >>> from torchcam.utils import overlay_map
        >>> image = Image.new("RGB", (4, 2), "white")
        >>> overlay_map(image, [[-1.0, 0.0, 1.0]], signed=True).size
        (4, 2)

    Args:
        img: the image below, see :func:`overlay_mask`.
        values: the map (height, width): an array, a tensor on the CPU, or lists of numbers. In [0, 1]; in [-1, 1] if it
            is `signed`. Values outside take the nearest end.
        colormap: a matplotlib colormap, or the name of one; by default :data:`COLORMAP`, and for signed maps
            :data:`SIGNED_COLORMAP`, transparent at zero. A diverging one has its middle at zero.
        alpha: the opacity of `img`, in [0, 1).
        signed: whether the map has negative values.

    Returns:
        An RGB image of the size of `img`.

    Raises:
        TypeError: see :func:`overlay_mask`.
        ValueError: if `values` is not two-dimensional; and see :func:`overlay_mask`.
    """
    numbers = np.asarray(values, dtype=np.float32)
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"`values` must be a map (height, width), got shape {numbers.shape}")
    mask = Image.fromarray((numbers + 1) / 2 if signed else numbers)
    return overlay_mask(img, mask, colormap_of(colormap, signed), alpha)


def colormap_of(colormap: str | Colormap | None, signed: bool) -> Colormap:
    """Look up a colormap; None is the default of maps in [0, 1], or of signed maps, which is transparent at 0."""
    if colormap is not None or not signed:
        return find_colormap(COLORMAP if colormap is None else colormap)
    from matplotlib.colors import ListedColormap

    steps = np.linspace(-1, 1, 255)  # an odd number: zero has an entry of its own
    colors = find_colormap(SIGNED_COLORMAP)((steps + 1) / 2)
    colors[:, 3] = np.minimum(1, 1.5 * np.abs(steps))
    return ListedColormap(colors, name=f"{SIGNED_COLORMAP}, transparent at 0")


def find_colormap(colormap: str | Colormap) -> Colormap:
    """Look up a colormap by name, or return it unchanged.

    Raises:
        TypeError: if it is neither a name nor a colormap.
        ValueError: if no colormap has that name.
    """
    import matplotlib
    from matplotlib.colors import Colormap

    if isinstance(colormap, Colormap):
        return colormap
    if not isinstance(colormap, str):
        raise TypeError(f"`colormap` must be a name or a matplotlib Colormap, got {type(colormap).__name__}")
    if colormap not in matplotlib.colormaps:
        closest = ", ".join(map(repr, get_close_matches(colormap, matplotlib.colormaps, cutoff=0.5)))
        hint = f"closest: {closest}" if closest else "`matplotlib.colormaps` lists them"
        raise ValueError(f"`colormap` {colormap!r} is not a matplotlib colormap; {hint}")
    return matplotlib.colormaps[colormap]


def _read_background(img: Image.Image) -> NDArray[np.float32]:
    """Read an opaque image as RGB in [0, 255], of shape `(H, W, 3)`."""
    if img.mode in _BACKGROUND_FULL_SCALE:
        full_scale = _BACKGROUND_FULL_SCALE[img.mode]
        grey = np.asarray(img, dtype=np.float32)
        if not ((grey >= 0) & (grey <= full_scale)).all():
            raise ValueError(
                f"`img` has mode {img.mode!r} and values in [{grey.min()}, {grey.max()}]; this mode needs "
                f"[0, {full_scale}]: rescale the values, or pass an `L` or `RGB` image"
            )
        return np.repeat((grey * np.float32(255 / full_scale))[..., None], 3, axis=-1)
    if img.mode == "RGB" or (img.mode == "P" and not img.has_transparency_data):
        return np.asarray(img.convert("RGB"), dtype=np.float32)
    what = "a palette with transparency" if img.mode == "P" else f"mode {img.mode!r}"
    raise ValueError(
        f'`img` must be a greyscale or RGB image without transparency, got {what}: pass `img.convert("RGB")`'
    )


def _read_mask(mask: Image.Image) -> NDArray[np.float32]:
    """Read a mask so that [0, 1] is its full range, of shape `(H, W)`."""
    if mask.mode not in _FULL_SCALE:
        raise ValueError(f"`mask` has mode {mask.mode!r}; expected one of {', '.join(map(repr, _FULL_SCALE))}")
    return np.asarray(mask, dtype=np.float32) / np.float32(_FULL_SCALE[mask.mode])


def resize_map(
    values: NDArray[np.float32], size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> NDArray[np.float32]:
    """Resize a map to `size` (width, height); undefined values stay undefined and do not spread."""

    def resize(array: NDArray[np.generic]) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(array.astype(np.float32)).resize(size, resample))

    defined = np.isfinite(values)
    resized = resize(np.where(defined, values, 0))
    if defined.all():
        return resized
    share = resize(defined)
    return np.where(share >= 0.5, resized / np.maximum(share, 0.5), np.nan)
