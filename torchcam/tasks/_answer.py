"""Explained answers: their tokens, the maps of these, and pictures, pages and files of them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from torchcam import _page
from torchcam._cached import cached_property
from torchcam._displays import Pictures
from torchcam._figures import Cell, Column, Row, Sheet
from torchcam._files import atomic_write, free_directory
from torchcam._method_maps import draw_over
from torchcam._numbers import to_json
from torchcam._pictures import enlarged, fitted, fitted_size
from torchcam.layout import Cells
from torchcam.utils import ALPHA, on_picture

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

_METHOD = "balanced activation × gradient"
_LAYER = "the decoder's input"
_COLUMNS = 4  # of the words in a figure
_EDGE = 512  # the longest side of maps whose places form no grid
_HEIGHT = 760  # of the page in a notebook, in pixels


@dataclass(frozen=True, eq=False, repr=False)
class AnswerExplanation(Pictures):
    """The answer of a vision-language model, and the regions of its pictures that made each word. All is on the CPU.

    A notebook shows the answer and its pictures: point at a word, and its map is shown.

    Attributes:
        prompt: the prompt, as the processor got it
        answer: the answer
        tokens: the text of each token of the answer
        token_ids: their ids
        probabilities: the probability of each token, given all before it, (T,)
        explained: the tokens of each map, by their indices in the answer
        scores: the score that each map explains, (K,)
        maps: the relevance of each visual token for each score, (K, V): activation × gradient, negative where it speaks
            against the score
        cells: where the visual tokens are: the cells of each picture, in the order of ``maps``
        images: the pictures, RGB
        model: the name of the model's class, with its module
        question: what the scores are, in words
        unbalanced: the names of operations that have no rule for balanced gradients
        versions: the versions of Python, torch, transformers and torchcam
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    probabilities: Tensor
    explained: tuple[tuple[int, ...], ...]
    scores: Tensor
    maps: Tensor
    cells: tuple[Cells, ...]
    images: tuple[Image.Image, ...]
    model: str
    question: str
    unbalanced: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        """The text that each map explains."""
        return tuple("".join(self.tokens[token] for token in group).strip() for group in self.explained)

    @property
    def title(self) -> str:
        """The answer in one line."""
        return f"{self.model.rpartition('.')[2]} answers: {self.answer}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}; maps of {len(self.maps)} on {len(self.images)} picture(s)>"

    # Maps.

    def relevance(self, word: int | str | Sequence[int | str] | None = None) -> Tensor:
        """Return the relevance of each visual token for one map's score, or for the sum of several, (V,).

        Args:
            word: the number of a map or its text, or several; by default all

        Raises:
            ValueError: if there is no such map
        """
        return self.maps[self._numbers(word)].sum(0)

    def map(
        self, word: int | str | Sequence[int | str] | None = None, picture: int = 0, *, signed: bool = False
    ) -> NDArray[np.float32]:
        """Return the map of a word on a picture: (height, width) of a grid, or else of the picture.

        Relevance is per area: the tokens of some models see parts of different sizes. The largest value on all pictures
        of the prompt is 1.

        Args:
            word: the number of a map or its text, or several, whose sum is meant; by default all
            picture: the number of the picture
            signed: whether relevance against the word is kept, as negative values, and not set to 0

        Returns:
            the map, in [0, 1], or in [-1, 1] if it is ``signed``; NaN where the model sees nothing of the picture
        """
        return self._rasters(self.relevance(word), signed)[self._picture(picture)]

    def _numbers(self, word: int | str | Sequence[int | str] | None) -> list[int]:
        """Return the numbers of maps."""
        if word is None:
            return list(range(len(self.maps)))
        numbers = []
        for one in word if isinstance(word, (list, tuple)) else [word]:
            if isinstance(one, str) and one.strip() in self.words:
                numbers.append(self.words.index(one.strip()))
            elif isinstance(one, int) and not isinstance(one, bool) and -len(self.maps) <= one < len(self.maps):
                numbers.append(one % len(self.maps))
            else:
                raise ValueError(
                    f"`word` {one!r} was not explained; there are maps 0 to {len(self.maps) - 1} of {list(self.words)}"
                )
        return numbers

    def _picture(self, number: int) -> int:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.images):
            raise ValueError(f"`picture` must be a number in [0, {len(self.images)}), got {number!r}")
        return number

    @cached_property
    def _boxes(self) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(cells.boxes, dtype=np.float64) for cells in self.cells])

    def _rasters(self, relevance: Tensor, signed: bool = False) -> list[NDArray[np.float32]]:
        """Lay relevance per area out on each picture, scaled so that 1 is the largest value on all of them.

        The values of a grid that covers its picture stay as they are.
        """
        boxes = self._boxes
        area = np.abs((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2]))
        is_padding = (boxes[:, 1:3].max(1) >= 1) | (boxes[:, 3:].min(1) <= 0)
        values = np.asarray(relevance, dtype=np.float64) / area
        values = np.where(is_padding | ~np.isfinite(values), np.nan, values)
        values = (values if signed else np.maximum(values, 0)).astype(np.float32)
        parts = np.split(values, np.cumsum([len(cells.boxes) for cells in self.cells])[:-1])
        rasters, peak = [], 0.0
        for picture, (cells, image, own) in enumerate(zip(self.cells, self.images, parts, strict=True)):
            is_plain = cells.grid is not None and _covers(cells)
            size = fitted_size(image.size, _EDGE)
            rasters.append(own.reshape(cells.grid) if is_plain else on_picture(own, cells, size, picture))
            # Interpolation within a grid goes beyond its values; where cells lie over each other, their mean counts.
            known = own if cells.grid is not None else rasters[-1]
            peak = max(peak, float(np.nanmax(np.abs(known), initial=0.0)))
        return [np.clip(raster / (peak or 1.0), -1 if signed else 0, 1) for raster in rasters]

    # Pictures.

    def overlay(
        self,
        word: int | str | Sequence[int | str] | None = None,
        picture: int = 0,
        *,
        alpha: float = ALPHA,
        colormap: str | Colormap | None = None,
        grey: bool = False,
        signed: bool = False,
    ) -> Image.Image:
        """Draw the map of a word over a picture.

        Args:
            word: the number of a map or its text, or several, whose sum is drawn; by default all
            picture: the number of the picture
            alpha: the opacity of the picture under the strongest values, in [0, 1)
            colormap: a matplotlib colormap, or the name of one
            grey: whether the picture is drawn in grey, so that all colour is the map's
            signed: whether relevance against the word is drawn as well

        Raises:
            ValueError: if there is no such map or picture, or ``alpha`` is out of range
        """
        below = self.images[self._picture(picture)]
        values = self.map(word, picture, signed=signed)
        return draw_over(below, values, colormap, alpha, grey=grey, signed=signed)

    @property
    def _items(self) -> Sequence[_AnsweredPicture]:
        return [_AnsweredPicture(self, number) for number in range(len(self.images))]

    @property
    def _sentence(self) -> list[tuple[str, int | None]]:
        """The pieces of the answer, each with the number of its map."""
        numbers = {token: number for number, group in enumerate(self.explained) for token in group}
        parts = groupby(enumerate(self.tokens), key=lambda part: numbers.get(part[0]))
        return [("".join(text for _, text in part), number) for number, part in parts]

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" '
            f'style="width:100%;height:{_HEIGHT}px;border:0">'
            f"{html.escape(self.title)}</iframe>"
        )

    def _name_of(self, number: int) -> str:
        return self.words[number] or repr("".join(self.tokens[token] for token in self.explained[number]))

    def _value_of(self, number: int) -> str:
        """Return the probability of the tokens of a map, as text."""
        share = float(self.probabilities[list(self.explained[number])].prod())
        return "<0.1%" if share < 0.0005 else f"{share:.1%}"

    def _origin(self) -> list[tuple[str, str]]:
        where = f"of {_LAYER}, at {self.maps.shape[1]} visual tokens"
        lines = [("model", self.model), ("prompt", self.prompt), ("explained", self.question), (_METHOD, where)]
        without = [("without a rule", ", ".join(self.unbalanced))] if self.unbalanced else []
        return [*lines, *without, *self.versions.items()]

    # Files.

    def save(self, directory: str | Path, *, alpha: float = ALPHA, colormap: str | Colormap | None = None) -> Path:
        """Write the explanation into a directory of its own, all of it or nothing.

        The directory holds the pictures as `image-<number>.png`, an overlay of each map on each of them as
        `map-<number>-image-<number>.png`, the relevance of each visual token as `maps.npy` (K, V), their places as
        `cells.npy` (V, 5), and `manifest.json`, which says what was done.

        Args:
            directory: where to write; made if needed, with its parents
            alpha: the opacity of the pictures under the strongest values, in [0, 1)
            colormap: a matplotlib colormap, or the name of one

        Returns:
            the directory

        Raises:
            FileExistsError: if ``directory`` exists and is not empty
            ValueError: if ``alpha`` is out of range
        """
        directory = free_directory(directory)
        with atomic_write(directory) as folder:
            folder.mkdir()
            np.save(folder / "maps.npy", np.asarray(self.maps), allow_pickle=False)
            np.save(folder / "cells.npy", self._boxes, allow_pickle=False)
            for picture, image in enumerate(self.images):
                image.save(folder / f"image-{picture}.png")
            entries = []
            for number, group in enumerate(self.explained):
                names = [f"map-{number}-image-{picture}.png" for picture in range(len(self.images))]
                for picture, name in enumerate(names):
                    self.overlay(number, picture, alpha=alpha, colormap=colormap).save(folder / name)
                score = float(self.scores[number])
                entries.append({"word": self.words[number], "tokens": group, "score": score, "overlays": names})
            manifest = {
                "schema_version": 1,
                "prompt": self.prompt,
                "answer": self.answer,
                "tokens": [
                    {"text": text, "id": token, "probability": float(share)}
                    for text, token, share in zip(self.tokens, self.token_ids, self.probabilities, strict=True)
                ],
                "maps": entries,
                "question": self.question,
                "method": _METHOD,
                "unbalanced": list(self.unbalanced),
                "model": self.model,
                "versions": dict(self.versions),
            }
            (folder / "manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")
        return directory


@dataclass(frozen=True, eq=False)
class _AnsweredPicture:
    """One picture of an explained answer, as figures and pages show it."""

    of: AnswerExplanation
    number: int

    @property
    def title(self) -> str:
        """The answer, and which picture it is where there are several."""
        return self.of.title if len(self.of.images) == 1 else f"picture {self.number}"

    @property
    def _panels(self) -> int:
        return len(self.of.maps) + 1

    def _drawable(self) -> bool:
        return True

    def _sheet(self, alpha: float = ALPHA, colormap: str | Colormap | None = None, grey: bool = False) -> Sheet:
        of, base = self.of, fitted(enlarged(self.of.images[self.number]), 512)
        cells = []
        for number in range(len(of.maps)):
            values = of.map(number, self.number)
            notes = filter(None, (of._name_of(number), of._value_of(number), _note(values)))
            cells.append(Cell(draw_over(base, values, colormap, alpha, grey=grey), " · ".join(notes)))
        rows = [Row("", "", cells[start : start + _COLUMNS]) for start in range(0, len(cells), _COLUMNS)]
        blank = [Column("")] * (min(len(cells), _COLUMNS) - 1)
        return Sheet(base, [Column(_METHOD, _LAYER), *blank], rows)

    def _page_item(self, name: str) -> dict[str, Any]:
        of = self.of
        maps = [of.map(number, self.number) for number in range(len(of.maps))]
        method = _page.method_entry(_METHOD, _LAYER, maps, [*map(_note, maps)])
        words = [{"name": of._name_of(number), "value": of._value_of(number)} for number in range(len(maps))]
        return _page.item_entry(name, of.images[self.number], words, [method])

    def _origin(self) -> list[tuple[str, str]]:
        return self.of._origin()


def _covers(cells: Cells) -> bool:
    """Check whether a grid covers its picture, to a thousandth."""
    ends = np.concatenate([np.asarray(cells.boxes[0, 1:3]), np.asarray(cells.boxes[-1, 3:5])])
    return bool(np.abs(ends - (0, 0, 1, 1)).max() < 1e-3)


def _note(values: NDArray[np.float32]) -> str:
    """Return a remark on a map whose picture looks empty."""
    known = values[np.isfinite(values)]
    return "" if known.any() else "blank: nothing above 0" if len(known) else "undefined (NaN)"
