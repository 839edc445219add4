"""Maps drawn over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ._checks import fraction
from ._names import closest

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import ArrayLike, NDArray

    from .layout import Cells

__all__ = ["ALPHA", "COLORMAP", "SIGNED_COLORMAP", "on_picture", "overlay_map", "overlay_mask"]

COLORMAP = "viridis"
"""The default colormap of maps in [0, 1]: equal steps look equal, also in grey and to colour-blind eyes."""

ALPHA = 0.25
"""The opacity of the image under the strongest values of a map, by default."""

SIGNED_COLORMAP = "coolwarm"
"""The colormap of signed maps: blue is against, red is for."""

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
    alpha: float = ALPHA,
    *,
    signed: bool = False,
    cells: Cells | None = None,
) -> Image.Image:
    """Draw a map of numbers over an image. All pictures of explanations are drawn by this function.

    The opacity of the map follows its values: where it is 0, the image is as it was.

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
            :data:`SIGNED_COLORMAP`. A diverging one has its middle at zero.
        alpha: the opacity of `img` under the strongest values, in [0, 1).
        signed: whether the map has negative values.
        cells: where the positions of the map are on the image; by default they form a grid that covers it. What is not
            covered is left as it is.

    Returns:
        An RGB image of the size of `img`.

    Raises:
        TypeError: see :func:`overlay_mask`.
        ValueError: if `values` is not two-dimensional; and see :func:`overlay_mask`.
    """
    numbers = np.asarray(values, dtype=np.float32)
    if cells is not None:
        numbers = on_picture(numbers, cells, img.size)
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"`values` must be a map (height, width), got shape {numbers.shape}")
    mask = Image.fromarray((numbers + 1) / 2 if signed else numbers)
    return overlay_mask(img, mask, colormap_of(colormap, signed), alpha)


def colormap_of(colormap: str | Colormap | None, signed: bool) -> Colormap:
    """Look up a colormap, and make it transparent where the map is 0; None is the default of such maps."""
    from matplotlib.colors import ListedColormap

    if colormap is None:
        colormap = SIGNED_COLORMAP if signed else COLORMAP
    found = find_colormap(colormap)
    shares = np.linspace(0, 1, 255)  # an odd number: the middle has an entry of its own
    colors = found(shares)
    colors[:, 3] *= np.minimum(1, 1.5 * np.abs(2 * shares - 1 if signed else shares))
    return ListedColormap(colors, name=found.name).with_extremes(bad=tuple(found.get_bad()))


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
        hint = closest(colormap, matplotlib.colormaps, ["those of `matplotlib.colormaps`"])
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


def on_picture(values: ArrayLike, cells: Cells, size: tuple[int, int], picture: int = 0) -> NDArray[np.float32]:
    """Lay out the values of a layer's positions on a picture.

    Example:
        >>> from torchcam.layout import Cells
        >>> from torchcam.utils import on_picture
        >>> left_half = Cells.of_grid((1, 1), view=(0, 0, 1, 0.5))
        >>> on_picture([[1.0]], left_half, (4, 1))
        array([[ 1.,  1., nan, nan]], dtype=float32)

    Args:
        values: a value of each position, (P,) or (height, width) of a grid; NaN where there is none
        cells: where the positions are
        size: the size of the picture, (width, height)
        picture: the number of the picture

    Returns:
        a value of each pixel, (height, width): interpolated within a grid (bicubic), the mean of the cells that a pixel
        lies in otherwise; NaN where there is no cell

    Raises:
        ValueError: if there is not one value of each position
    """
    numbers = np.asarray(values, dtype=np.float32)
    boxes = np.asarray(cells.boxes, dtype=np.float64)
    if numbers.size != len(boxes) or (numbers.ndim > 1 and numbers.shape != cells.grid):
        raise ValueError(f"`values` of shape {numbers.shape} do not fit {len(boxes)} cells of the grid {cells.grid}")
    width, height = size
    found = np.full((height, width), np.nan, dtype=np.float32)
    if cells.grid is not None:
        if boxes[0, 0] == picture:
            (top, left), (bottom, right) = boxes[0, 1:3], boxes[-1, 3:5]
            numbers = numbers.reshape(cells.grid)[:: 1 if top <= bottom else -1, :: 1 if left <= right else -1]
            rows, source_rows = _pixels((top, bottom), height, cells.grid[0])
            columns, source_columns = _pixels((left, right), width, cells.grid[1])
            part = (columns.stop - columns.start, rows.stop - rows.start)
            if min(part) > 0:
                box = (source_columns[0], source_rows[0], source_columns[1], source_rows[1])
                found[rows, columns] = resize_map(np.ascontiguousarray(numbers), part, box=box)
        return found
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for value, (number, top, left, bottom, right) in zip(numbers.flatten(), boxes, strict=True):
        if number == picture and np.isfinite([value, top, left, bottom, right]).all():
            rows, _ = _pixels((top, bottom), height, 1)
            columns, _ = _pixels((left, right), width, 1)
            total[rows, columns] += value
            count[rows, columns] += 1
    np.divide(total, count, out=found, where=count > 0, casting="same_kind")
    return found


def _pixels(ends: tuple[float, float], pixels: int, count: int) -> tuple[slice, tuple[float, float]]:
    """Return the pixels whose centres lie in a part of an axis, and where they begin and end among its positions."""
    start, stop = min(ends), max(ends)
    first, last = (min(max(round(end * pixels), 0), pixels) for end in (start, stop))
    begin, end = (min(max(count * (edge / pixels - start) / (stop - start), 0.0), count) for edge in (first, last))
    return slice(first, last), (begin, end)


def resize_map(
    values: NDArray[np.float32],
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    box: tuple[float, float, float, float] | None = None,
) -> NDArray[np.float32]:
    """Resize a map, or a box of it, to `size` (width, height); undefined values stay undefined and do not spread."""

    def resize(array: NDArray[np.generic]) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(array.astype(np.float32)).resize(size, resample, box))

    defined = np.isfinite(values)
    resized = resize(np.where(defined, values, 0))
    if defined.all():
        return resized
    share = resize(defined)
    return np.where(share >= 0.5, resized / np.maximum(share, 0.5), np.nan)
