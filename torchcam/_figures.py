"""Maps side by side: as a matplotlib figure, and as HTML for a notebook."""

from __future__ import annotations

import html
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ._pictures import data_uri, fitted
from .utils import colormap_of

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["Cell", "Row", "Sheet", "data_uri", "draw", "fitted", "png", "scores_as_html", "to_html"]

SCALES = {
    False: ("relevance, each map scaled by itself", ("0", "0.5", "1")),
    True: ("evidence against (−) and for (+), each map scaled by itself", ("−1", "0", "1")),
}
# In inches: the width of a picture, the heights of a colour bar with its text, of a note below a picture and of a line
# of text, the gaps between pictures, and the margin of the figure.
CELL, BAR, NOTE, LINE, GAP, MARGIN = 2.3, 0.72, 0.22, 0.155, 0.1, 0.1
COLUMNS = 4  # of the maps of one method
PAPER, INK = {False: "#ffffff", True: "#16181c"}, {False: "#16181c", True: "#e8e8e8"}
MAX_PIXELS = 640_000  # of all pictures in the output of a notebook cell
MAX_PANELS = 36  # in the output of a notebook cell


class Cell(NamedTuple):
    """A map over its image, and a remark about it, such as that it is blank."""

    picture: Image.Image
    note: str = ""


class Row(NamedTuple):
    """The maps of one method: its name, its layers, whether the maps are signed, and a cell for each class."""

    name: str
    layers: str
    signed: bool
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Sheet:
    """The image and the maps of one input.

    Attributes:
        title: the prediction of the model
        image: the input as a picture
        captions: the name of each class, and its probability or score
        rows: the maps
    """

    title: str
    image: Image.Image | None
    captions: Sequence[tuple[str, str]]
    rows: Sequence[Row]

    @property
    def panels(self) -> int:
        """The number of pictures."""
        return len(self.rows) * len(self.captions) + (self.image is not None)


# A figure.


@dataclass(frozen=True)
class _Panel:
    """A picture in a figure and its place, in inches from the left and the top."""

    cell: Cell
    caption: str
    left: float
    top: float
    label: str = ""


def draw(sheets: Sequence[Sheet], title: str, colormap: str | Colormap | None, dark: bool | None) -> Figure:
    """Draw the maps of one or several inputs into a figure that is not registered with pyplot.

    Args:
        sheets: the image and maps of each input
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
    signs = sorted({row.signed for sheet in sheets for row in sheet.rows})
    size = (CELL, CELL / _aspect(sheets))
    panels = _place_one(sheets[0], size) if len(sheets) == 1 else _place_several(sheets, size)
    width = max(4.6, *(panel.left + size[0] + MARGIN for panel in panels))
    heading = _wrapped(title, int(12.5 * width))
    head = MARGIN + 0.2 * (heading.count("\n") + 1)
    body = max(panel.top + size[1] + (NOTE if panel.cell.note else 0) for panel in panels)
    height = head + body + BAR * len(signs)
    figure = Figure(figsize=(width, height), dpi=120, facecolor=paper)
    text: dict[str, Any] = {"color": ink, "parse_math": False, "ha": "center"}
    figure.text(0.5, 1 - MARGIN / height, heading, fontsize=11, va="top", **text)
    for panel in panels:
        bottom = height - head - panel.top - size[1]
        axes = figure.add_axes((panel.left / width, bottom / height, size[0] / width, size[1] / height))
        sharp = max(panel.cell.picture.size) < 64
        axes.imshow(np.asarray(panel.cell.picture), interpolation="nearest" if sharp else "antialiased")
        axes.set_axis_off()
        middle = (panel.left + size[0] / 2) / width
        above = (bottom + size[1] + 0.05) / height
        figure.text(middle, above, panel.caption, fontsize=9, va="bottom", **text)
        figure.text(middle, (bottom - 0.04) / height, panel.cell.note, fontsize=8, va="top", **text)
        beside, centre = (panel.left - 0.06) / width, (bottom + size[1] / 2) / height
        figure.text(beside, centre, panel.label, fontsize=9, va="center", rotation=90, **{**text, "ha": "right"})
    for number, signed in enumerate(signs):
        _draw_bar(figure, colormap, signed, ink, BAR * (len(signs) - number))
    # Notebooks show only figures of pyplot by themselves.
    setattr(figure, "_repr_png_", partial(png, figure))  # noqa: B010 - the class has no such attribute
    return figure


def _aspect(sheets: Sequence[Sheet]) -> float:
    sizes = [cell.picture.size for sheet in sheets for row in sheet.rows for cell in row.cells]
    return min(max(0.5, *(width / height for width, height in sizes)), 2.5)


def _captions(sheet: Sheet, method: str = "") -> list[str]:
    return ["\n".join(filter(None, (method, _wrapped(name, 26), value))) for name, value in sheet.captions]


def _captions_height(captions: Sequence[str]) -> float:
    """Return the height of a row's captions, in inches."""
    return 0.12 + LINE * max(caption.count("\n") + 1 for caption in captions)


def _place_one(sheet: Sheet, size: tuple[float, float]) -> list[_Panel]:
    """Place the pictures of one input: the classes of one method wrapped, or each of several methods in a row."""
    image = [] if sheet.image is None else [(Cell(sheet.image), "input")]
    if len(sheet.rows) == 1:
        entries = [*image, *zip(sheet.rows[0].cells, _captions(sheet), strict=True)]
        rows = [entries[start : start + COLUMNS] for start in range(0, len(entries), COLUMNS)]
        return _place_rows(rows, size)
    top = _captions_height(_captions(sheet))
    left = MARGIN + len(image) * (size[0] + GAP) + 0.12 + LINE * 2
    panels = []
    for r, row in enumerate(sheet.rows):
        label = "\n".join(filter(None, (_short(row.name), _short(row.layers))))
        for c, (cell, caption) in enumerate(zip(row.cells, _captions(sheet), strict=True)):
            place = (left + c * (size[0] + GAP), top)
            panels.append(_Panel(cell, "" if r else caption, *place, "" if c else label))
        top += size[1] + (NOTE if any(cell.note for cell in row.cells) else 0) + 2 * GAP
    middle = (panels[0].top + panels[-1].top) / 2
    return [*(_Panel(cell, caption, MARGIN, middle) for cell, caption in image), *panels]


def _place_several(sheets: Sequence[Sheet], size: tuple[float, float]) -> list[_Panel]:
    """Place the pictures of several inputs, a row each."""
    rows = []
    for number, sheet in enumerate(sheets):
        entries = [] if sheet.image is None else [(Cell(sheet.image), f"input {number}")]
        for row in sheet.rows:
            method = _wrapped(row.name, 26) if len(sheet.rows) > 1 else ""
            entries += zip(row.cells, _captions(sheet, method), strict=True)
        rows.append(entries)
    return _place_rows(rows, size)


def _place_rows(rows: Sequence[Sequence[tuple[Cell, str]]], size: tuple[float, float]) -> list[_Panel]:
    panels, top = [], 0.0
    for row in rows:
        top += _captions_height([caption for _, caption in row])
        panels += [_Panel(cell, caption, MARGIN + c * (size[0] + GAP), top) for c, (cell, caption) in enumerate(row)]
        top += size[1] + (NOTE if any(cell.note for cell, _ in row) else 0)
    return panels


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


def png(figure: Figure, max_pixels: int = MAX_PIXELS) -> bytes:
    """Encode a figure as a PNG of at most ``max_pixels``."""
    width, height = figure.get_size_inches()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib's font has no Chinese letters, for example, and draws boxes instead; the HTML has the letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=min(120.0, math.sqrt(max_pixels / (width * height))))
    return buffer.getvalue()


# HTML.


def to_html(sheets: Sequence[Sheet], title: str, colormap: str | Colormap | None, more: int = 0) -> str:
    """Return the maps of one or several inputs as HTML without scripts, in the colours of the notebook.

    Args:
        sheets: the image and maps of each input
        title: a heading
        colormap: the colormap of all maps; None for the defaults
        more: the number of inputs that are left out
    """
    total = sum(sheet.panels for sheet in sheets)
    edge = int(min(512, max(96, math.sqrt(MAX_PIXELS / max(total, 1)))))
    left = MAX_PANELS
    parts = [
        f'<div style="font:14px/1.4 system-ui,sans-serif;color:inherit"><div><strong>{_escaped(title)}</strong></div>'
    ]
    omitted = 0
    for number, sheet in enumerate(sheets):
        if number and sheet.panels > left:  # no input is cut in two
            more += len(sheets) - number
            break
        if len(sheets) > 1:
            parts.append(f'<div style="margin-top:.8em">{_escaped(sheet.title)}</div>')
        panels = _html_panels(sheet, min(edge, 256 if total > 1 else 512))
        parts.append(f'<div style="{_FLEX}">{"".join(panels[:left])}</div>')
        omitted += max(len(panels) - left, 0)
        left = max(left - len(panels), 0)
    signs = sorted({row.signed for sheet in sheets for row in sheet.rows})
    parts += [_html_bar(colormap, signed) for signed in signs]
    if omitted or more:
        omissions = " and ".join(
            f"{count} more {kind}{'s' if count > 1 else ''}"
            for count, kind in ((more, "input"), (omitted, "panel"))
            if count
        )
        parts.append(f"<div>… {omissions}: <code>to_html()</code> makes a page of all.</div>")
    return "".join((*parts, "</div>"))


def scores_as_html(title: str, values: Sequence[tuple[str, str]]) -> str:
    """Return the scores of a model as HTML, without pictures."""
    lines = "".join(f"<li>{_escaped(name)}: {_escaped(value)}</li>" for name, value in values)
    return f'<div style="color:inherit"><strong>{_escaped(title)}</strong><ul>{lines}</ul></div>'


_FLEX = "display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start;margin:8px 0"


def _html_panels(sheet: Sheet, edge: int) -> list[str]:
    panels = []
    if sheet.image is not None:
        panels.append(_html_panel(sheet.image, ["input"], "input", edge))
    for row in sheet.rows:
        for cell, (name, value) in zip(row.cells, sheet.captions, strict=True):
            lines = [name, value, f"{row.name} · {row.layers}" if row.layers else row.name, cell.note]
            panels.append(_html_panel(cell.picture, lines, f"{row.name} map of {name}", edge))
    return panels


def _html_panel(picture: Image.Image, lines: Sequence[str], alt: str, edge: int) -> str:
    small = fitted(picture, edge)
    width = max(small.width, 160)
    caption = "<br>".join(_escaped(line) for line in lines if line)
    return (
        f'<figure style="margin:0;width:{width}px"><img src="{data_uri(small)}" alt="{_escaped(alt)}" '
        f'style="display:block;width:100%;height:auto;margin:0"><figcaption style="font-size:13px;'
        f'overflow-wrap:anywhere;text-align:center">{caption}</figcaption></figure>'
    )


def _html_bar(colormap: str | Colormap | None, signed: bool) -> str:
    label, ticks = SCALES[signed]
    colors = colormap_of(colormap, signed)(np.linspace(0, 1, 17))
    colors[:, :3] = colors[:, :3] * colors[:, 3:] + 1 - colors[:, 3:]  # over white
    stops = ",".join("#" + "".join(f"{round(255 * part):02x}" for part in color[:3]) for color in colors.tolist())
    labels = "".join(f"<span>{tick}</span>" for tick in ticks)
    return (
        f'<div style="max-width:320px;font-size:12px;margin-top:4px"><div role="img" aria-label="colour bar" '
        f'style="height:10px;background:linear-gradient(to right,{stops});border:1px solid currentColor"></div>'
        f'<div style="display:flex;justify-content:space-between">{labels}</div><div>{_escaped(label)}</div></div>'
    )


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
