"""Pictures in and out: reading images, checking where results go, drawing maps."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam import __version__

from ._messages import UserError, library_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

__all__ = [
    "Panel",
    "add_colorbar",
    "add_colours",
    "check_colours",
    "check_output",
    "draw_panels",
    "overlay",
    "read_image",
    "show",
    "write",
    "writing",
]

MAX_COLUMNS = 4

Panel = tuple[str, "Tensor"]
"""A caption, and the map below it."""


def add_colours(parser: Any) -> None:
    """Add the options of pictures."""
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="opacity of the image under its maps, in [0, 1) (default: %(default)s)"
    )
    parser.add_argument("--colormap", default="jet", help="a colormap of matplotlib (default: %(default)s)")


def check_colours(alpha: float, colormap: str) -> None:
    """Check the options of pictures, before any is made."""
    from PIL import Image

    from torchcam.utils import overlay_mask

    with library_errors():
        overlay_mask(Image.new("L", (1, 1)), Image.new("L", (1, 1)), colormap, alpha)


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright."""
    import numpy as np
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.exists():
        raise UserError(f"IMAGE '{path}' does not exist")
    if path.is_dir():
        raise UserError(f"IMAGE '{path}' is a directory: name the images in it")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # decoders raise whatever they stumble over
        what = f"({type(error).__name__}: {error})"
        raise UserError(f"IMAGE '{path}' is not an image that Pillow can read {what}") from error
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(f"IMAGE '{path}' has floating-point pixels of unknown range: save it with 8 or 16 bits")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def check_output(paths: Sequence[Path], inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that results can be written, before any is made."""
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(
            f"several images would be written to '{twice[0]}': explain them one by one, with an --output each"
        )
    for path in paths:
        folder = next(place for place in (path.parent, *path.parent.parents) if place.exists())
        if not folder.is_dir():
            raise UserError(f"--output '{path.parent}' cannot be made: '{folder}' is not a directory")
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise UserError(f"'{there[0]}'{more}: pass --overwrite, or another --output")
    taken = {path.resolve() for path in inputs} & {path.resolve() for path in paths}
    if taken or any(path.is_dir() for path in there):
        raise UserError(f"'{min(taken, default=there[0] if there else None)}' is in the way: pass another --output")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which replaces ``path`` when it is whole."""
    from torchcam._files import written_whole

    try:
        with written_whole(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def write(figure: Figure, path: Path) -> None:
    """Write a picture, all of it or nothing."""
    with writing(path) as part:
        figure.savefig(part, format="png", metadata={"Software": f"torchcam {__version__}"})


def overlay(image: Image.Image, cam: Tensor, alpha: float, colormap: str) -> Image.Image:
    """Lay a map over an image."""
    import numpy as np
    from PIL import Image

    from torchcam.utils import overlay_mask

    return overlay_mask(image, Image.fromarray(cam.cpu().numpy().astype(np.float32)), colormap, alpha)


def draw_panels(
    image: Image.Image,
    panels: Sequence[Panel],
    title: str,
    alpha: float,
    colormap: str,
    *,
    max_columns: int = MAX_COLUMNS,
) -> Figure:
    """Draw an image and its maps side by side."""
    from matplotlib.figure import Figure

    count = 1 + len(panels)
    columns = min(count, max_columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(0.9 + 3 * columns, 0.6 + 3.6 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    show(axes.flat[0], image, "input")
    for axis, (caption, cam) in zip(list(axes.flat)[1:], panels, strict=False):
        show(axis, overlay(image, cam, alpha, colormap), caption)
    add_colorbar(figure, axes, colormap)
    figure.suptitle("\n".join(textwrap.wrap(title, 26 * columns)), fontsize=11, parse_math=False)
    return figure


def show(axis: Axes, image: Image.Image, caption: str) -> None:
    """Show an image below its caption."""
    axis.imshow(image)
    axis.set_title(caption, fontsize=10, parse_math=False)


def add_colorbar(figure: Figure, axes: Any, colormap: str) -> None:
    """Say what the colours mean."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=colormap), ax=axes, shrink=0.6, aspect=25, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("relevance, map by map", fontsize=9)
    bar.ax.tick_params(labelsize=8)
