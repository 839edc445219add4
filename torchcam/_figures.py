"""Maps in a grid, methods in columns and questions in rows: as a matplotlib figure, and as HTML for a notebook."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ._pictures import data_uri, fitted
from ._templates import render
from .utils import colormap_of

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SCALES = {
    False: ("relevance, each map scaled by itself", ("0", "0.5", "1")),
    True: ("evidence against (−) and for (+), each map scaled by itself", ("−1", "0", "1")),
}
# In inches: the width of a picture, the heights of a colour bar with its text, of a note below a picture and of a line
# of text, the gaps between pictures, and the margin of the figure.
CELL, BAR, NOTE, LINE, GAP, MARGIN = 2.3, 0.72, 0.22, 0.155, 0.1, 0.1
PAPER, INK = {False: "#ffffff", True: "#16181c"}, {False: "#16181c", True: "#e8e8e8"}
MAX_PIXELS = 640_000  # of all pictures in the output of a notebook cell
MAX_PANELS = 36  # in the output of a notebook cell


class Cell(NamedTuple):
    """A map over its image, and a remark about it, such as that it is blank."""

    picture: Image.Image
    note: str = ""


class Column(NamedTuple):
    """The head of a method's maps: its name, its layers, and whether the maps are signed."""

    name: str
    layers: str = ""
    signed: bool = False


class Row(NamedTuple):
    """The maps of one class or target: its name, its probability or score, and a cell for each column."""

    name: str
    value: str
    cells: Sequence[Cell]

    @property
    def heading(self) -> str:
        """What is asked, in one line."""
        return " · ".join(filter(None, (self.name, self.value)))


@dataclass(frozen=True)
class Sheet:
    """The image and the maps of one input.

    Attributes:
        image: the input as a picture
        columns: the methods
        rows: the classes or targets, with their maps
    """

    image: Image.Image | None
    columns: Sequence[Column]
    rows: Sequence[Row]


# A figure.


def draw(sheets: Sequence[Sheet], title: str, colormap: str | Colormap | None, dark: bool | None) -> Figure:
    """Draw the maps of one or several inputs into a figure that is not registered with pyplot.

    Args:
        sheets: the image and maps of each input, all by the same methods
        title: the figure's title
        colormap: the colormap of all maps; None for the defaults
        dark: whether to draw light text on dark paper; None for the colours that matplotlib is set to
    """
    from matplotlib import rcParams
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    paper, ink = rcParams["figure.facecolor"], rcParams["text.color"]
    if dark is not None:
        paper, ink = PAPER[dark], INK[dark]
    elif to_rgba(paper)[3] < 1:  # the background is unknown
        paper = PAPER[sum(to_rgba(ink)[:3]) > 1.5]
    signs = sorted({column.signed for sheet in sheets for column in sheet.columns})
    size = (CELL, CELL / _aspect(sheets))
    panels, labels = _places(sheets, size)
    width = max(4.6, *(left + size[0] + MARGIN for _, left, _ in panels))
    heading = _wrapped(title, int(12.5 * width))
    head = MARGIN + 0.2 * (heading.count("\n") + 1)
    body = max(top + size[1] + NOTE * bool(cell.note) for cell, _, top in panels)
    height = head + body + BAR * len(signs)
    figure = Figure(figsize=(width, height), dpi=120, facecolor=paper)
    text: dict[str, Any] = {"color": ink, "parse_math": False}
    figure.text(0.5, 1 - MARGIN / height, heading, fontsize=11, ha="center", va="top", **text)
    for cell, left, top in panels:
        bottom = height - head - top - size[1]
        axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
        sharp = max(cell.picture.size) < 64
        axes.imshow(np.asarray(cell.picture), interpolation="nearest" if sharp else "antialiased")
        axes.set_axis_off()
        middle = (left + size[0] / 2) / width
        figure.text(middle, (bottom - 0.04) / height, cell.note, fontsize=8, ha="center", va="top", **text)
    for label, left, bottom, ha in labels:
        place = left / width, (height - head - bottom) / height
        figure.text(*place, label, fontsize=9, ha=ha, va="bottom", **text)
    for number, signed in enumerate(signs):
        _draw_bar(figure, colormap, signed, ink, BAR * (len(signs) - number))
    # Notebooks show only figures of pyplot by themselves.
    setattr(figure, "_repr_png_", partial(png, figure))  # noqa: B010 - the class has no such attribute
    return figure


def _aspect(sheets: Sequence[Sheet]) -> float:
    sizes = [cell.picture.size for sheet in sheets for row in sheet.rows for cell in row.cells]
    return min(max(0.5, *(width / height for width, height in sizes)), 2.5)


def _places(
    sheets: Sequence[Sheet], size: tuple[float, float]
) -> tuple[list[tuple[Cell, float, float]], list[tuple[str, float, float, str]]]:
    """Place the pictures and texts of all inputs: the methods' names above, and above each row what is asked.

    Args:
        sheets: the image and maps of each input
        size: the width and height of a picture, in inches

    Returns:
        the pictures, with their places in inches from the left and the top; and the texts, with where they begin or
        have their middle, their lower edge, and which of the two it is, ``"left"`` or ``"center"``
    """
    columns, panels, labels = sheets[0].columns, [], []
    left = MARGIN + (size[0] + GAP) * any(sheet.image is not None for sheet in sheets)
    lefts = [left + number * (size[0] + GAP) for number in range(len(columns))]
    room = max(lefts[-1] + size[0], 4.6 - MARGIN) - left
    heads = ["\n".join(filter(None, (_wrapped(c.name, 26), _short(c.layers)))) for c in columns]
    top = _height(heads)
    for head, start in zip(heads, lefts, strict=True):
        labels.append((head, start + size[0] / 2, top, "center"))
    for number, sheet in enumerate(sheets):
        for row in sheet.rows:
            heading = _wrapped(row.heading, int(11.5 * room))
            top += _height([heading])
            labels.append((heading, left, top - 0.04, "left"))
            if sheet.image is not None and row is sheet.rows[0]:
                name = f"input {number}" if len(sheets) > 1 else "input"
                labels.append((name, MARGIN, top - 0.04, "left"))
                panels.append((Cell(sheet.image), MARGIN, top))
            panels += [(cell, start, top) for cell, start in zip(row.cells, lefts, strict=False)]
            top += size[1] + NOTE * any(cell.note for cell in row.cells)
    return panels, labels


def _height(texts: Sequence[str]) -> float:
    """Return the height of texts beside each other, in inches."""
    return 0.12 + LINE * max(text.count("\n") + 1 for text in texts)


def _draw_bar(figure: Figure, colormap: str | Colormap | None, signed: bool, ink: str, top: float) -> None:
    """Draw a colour bar ``top`` inches above the figure's lower edge."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    label, ticks = SCALES[signed]
    width, height = figure.get_size_inches()
    share = min(4.0 / width, 0.9)
    axes = figure.add_axes(((1 - share) / 2, (top - 0.26) / height, share, 0.12 / height), label="colour bar")
    axes.set_facecolor("white")
    mappable = ScalarMappable(norm=Normalize(-1 if signed else 0, 1), cmap=colormap_of(colormap, signed))
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal", ticks=[-1, 0, 1] if signed else [0, 0.5, 1])
    bar.set_ticklabels(list(ticks))
    bar.set_label(label, fontsize=9, color=ink, labelpad=2)
    bar.outline.set_edgecolor(ink)
    axes.tick_params(labelsize=8, colors=ink, length=3, pad=2)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, max(width, 12)) or text


def _short(text: str) -> str:
    return textwrap.shorten(text, 34, placeholder=" …") if len(text) > 34 else text


def png(figure: Figure) -> bytes:
    """Encode a figure as a PNG of at most ``MAX_PIXELS``."""
    width, height = figure.get_size_inches()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib's font has no Chinese letters, for example, and draws boxes instead; the HTML has the letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=min(120.0, math.sqrt(MAX_PIXELS / (width * height))))
    return buffer.getvalue()


# HTML.


def fitting(panels: Sequence[int]) -> int:
    """Return how many inputs, of so many panels each, a notebook cell shows whole; the first one in any case."""
    return max(sum(total <= MAX_PANELS for total in accumulate(panels)), 1)


def to_html(sheets: Sequence[Sheet], title: str, more: int = 0) -> str:
    """Return the maps of one or several inputs as HTML without scripts, in the colours of the notebook.

    What is wider or higher than its place scrolls; the pictures and the names of the methods stay in sight.

    Args:
        sheets: the image and maps of each input, all by the same methods
        title: a heading
        more: the number of inputs that are left out
    """
    columns = sheets[0].columns if sheets else ()
    limit = max((MAX_PANELS - 1) // max(len(columns), 1), 1)
    omitted = len(columns) * sum(max(len(sheet.rows) - limit, 0) for sheet in sheets)
    omissions = [f"{n} more {kind}{'s' * (n > 1)}" for n, kind in ((more, "input"), (omitted, "map")) if n]
    sheets = [replace(sheet, rows=sheet.rows[:limit]) for sheet in sheets]
    total = sum(len(sheet.rows) * len(columns) + (sheet.image is not None) for sheet in sheets)
    edge = int(min(512, max(96, math.sqrt(MAX_PIXELS / max(total, 1)))))
    return render(
        "_grid.html",
        title=title,
        sheets=sheets,
        has_image=any(sheet.image is not None for sheet in sheets),
        width=max(min(edge // 2, 256), 168),  # on the screen; screens of high resolution show all pixels
        short=_short,
        uri=lambda picture: data_uri(fitted(picture, edge)),
        bars=[(*SCALES[signed], _stops(signed)) for signed in sorted({one.signed for one in columns})],
        omitted=" and ".join(omissions),
    )


def _stops(signed: bool) -> list[str]:
    """Return colours of a colour bar over white, equally spaced."""
    colors = colormap_of(None, signed)(np.linspace(0, 1, 17))
    colors[:, :3] = colors[:, :3] * colors[:, 3:] + 1 - colors[:, 3:]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color[:3]) for color in colors.tolist()]
