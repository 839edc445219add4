"""Figures, pages and notebook output of explanations of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _figures, _page
from ._checks import fraction
from ._files import atomic_write
from ._templates import render
from .utils import ALPHA

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


class Pictures:
    """Figures, pages and notebook output, for one explanation and for several alike."""

    @property
    def _items(self) -> Sequence[Any]:  # explanations, or whatever else has a title, a sheet and an item of a page
        raise NotImplementedError

    @property
    def _sentence(self) -> Sequence[tuple[str, int | None]]:
        """Pieces of a text in which the reader of a page chooses a map, each with its number."""
        return ()

    @property
    def title(self) -> str:
        """The heading of figures and pages."""
        raise NotImplementedError

    def plot(
        self,
        *,
        colormap: str | Colormap | None = None,
        alpha: float = ALPHA,
        grey: bool = False,
        dark: bool | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw images and maps into a matplotlib figure.

        It has a column for each method, after the image, and a row for each class or target, of several inputs one
        after the other. The figure is not one of pyplot's, so that nothing has to be closed. All maps share one scale
        of colours, signed ones another.

        Args:
            colormap: as for `overlay`
            alpha: the opacity of the image under the strongest values, in [0, 1)
            grey: whether the image below a map is drawn in grey
            dark: light text on dark paper, or the other way round; None for the style that matplotlib is set to
            title: the figure's title, by default the prediction

        Raises:
            ValueError: if the maps are not two-dimensional, ``alpha`` is out of range, or there are no explanations
        """
        sheets = [item._sheet(alpha, colormap, grey) for item in self._checked_items()]
        return _figures.draw(sheets, self.title if title is None else title, colormap, dark)

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        colormap: str | Colormap | None = None,
        alpha: float = ALPHA,
        title: str | None = None,
        names: Sequence[str] | None = None,
    ) -> str:
        """Write a page to look into the maps with: one map, two side by side, or all in a grid.

        It has the untouched picture beside the map or under a curtain, the value at any place, zoom, opacity, a
        threshold with its contour, what is shown as a PNG, and the verdict of `trust` if it was asked before. It is one
        file that fetches nothing, for any browser, also from a disk; the fragment of its address holds what is shown.

        Args:
            path: the file to write, if any; an existing file is replaced
            colormap: the colormap of all maps; by default the reader has a choice
            alpha: the opacity of the image when the page opens, in [0, 1)
            title: the heading, by default the prediction
            names: what the inputs are called, by default their numbers and predictions

        Returns:
            the page

        Raises:
            ValueError: if the maps are not two-dimensional, ``alpha`` is out of range, there are no explanations, or
                not as many names as inputs
        """
        items = self._checked_items()
        if names is not None and len(names) != len(items):
            raise ValueError(f"`names` must hold one name for each of the {len(items)} inputs, got {len(names)}")
        fraction("alpha", alpha)
        told = [f"{number}: {item.title}" for number, item in enumerate(items)] if names is None else names
        pages = [item._page_item(name) for name, item in zip(told, items, strict=True)]
        heading = self.title if title is None else title
        page = _page.render(pages, heading, items[0]._origin(), colormap, alpha, self._sentence)
        if path is not None:
            with atomic_write(Path(path)) as part:
                part.write_text(page, encoding="utf-8")
        return page

    def _checked_items(self) -> Sequence[Any]:
        if not self._items:
            raise ValueError("there is no explanation in here, so there is nothing to draw")
        return self._items

    def _repr_html_(self) -> str:
        shown = self._shown
        if not all(item._drawable() for item in shown):
            return render("_scores.html", items=shown)
        more = len(self._items) - len(shown)
        return _figures.to_html([item._sheet() for item in shown], self.title, more)

    def _repr_png_(self) -> bytes | None:
        shown = self._shown
        if not shown or not all(item._drawable() for item in shown):
            return None
        return _figures.png(_figures.draw([item._sheet() for item in shown], self.title, None, None))

    @property
    def _shown(self) -> Sequence[Any]:
        """The first of several inputs, as many as the output of a notebook cell shows."""
        return self._items[: _figures.fitting([item._panels for item in self._items])]
