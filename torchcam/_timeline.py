"""Thumbnails of a few images at several steps of a training run, and the pictures made of them: strip and film."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ._pictures import as_plane
from .utils import overlay_map

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (110, 110, 110)
_GAP = 6
_LOW, _HIGH = "none", "peak of the map"

_Tile = tuple[Image.Image, list[tuple[str, tuple[int, int, int]]]]
"""A picture, and the lines of text below it with their colours."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """The maps and scalars of the probe images at one step or epoch of the training.

    Attributes:
        at: the number of steps or epochs that the training had done
        values: each scalar by its name, one number per image; NaN where it is not defined
        means: the means of the scalars over the images for which they are defined; NaN if there are none
        thumbnails: the map of each image, drawn over it
    """

    at: int
    values: Mapping[str, tuple[float, ...]]
    means: Mapping[str, float]
    thumbnails: tuple[Image.Image, ...]


@lru_cache
def _font(size: int) -> Any:
    import matplotlib

    # It has more letters than the default font of Pillow.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


class Timeline:
    """A bounded number of probe results, equally spaced in time, and the pictures made of them.

    Args:
        pictures: the image below each map
        unit: what is counted, ``"step"`` or ``"epoch"``
        max_columns: the largest number of results to keep, two or more
        thumbnail: the longer side of a thumbnail, in pixels
        colormap: a matplotlib colormap, or the name of one
        captions: the scalars to write below each thumbnail, with their short names

    Attributes:
        results: the results that are kept, the first and the newest among them
        names: the name of each picture

    Raises:
        ValueError: if no colormap has that name
    """

    def __init__(
        self,
        pictures: list[Image.Image],
        unit: str,
        max_columns: int,
        thumbnail: int,
        colormap: Any,
        captions: Mapping[str, str],
    ) -> None:
        self.results: list[ProbeResult] = []
        self._indices: list[int] = []  # their numbers among all results
        self._seen, self._stride = 0, 1
        self._film: dict[ProbeResult, Image.Image] = {}
        self._unit, self._max_columns, self._colormap, self._captions = unit, max_columns, colormap, captions
        self.names = [f"image {index}" for index in range(len(pictures))]
        scale = thumbnail / max(max(picture.size) for picture in pictures)
        self.pictures = [
            picture.resize(
                (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
            )
            for picture in pictures
        ]
        self._width = max(*(picture.width for picture in self.pictures), thumbnail)
        self._height = max(picture.height for picture in self.pictures)
        self._text = max(10, round(thumbnail / 9))
        self._line = self._text + 3
        self._bar = overlay_map(Image.new("L", (120, self._text), 255), np.linspace(0, 1, 120)[None], colormap)

    def draw_thumbnails(self, cams: np.ndarray, stamps: list[str]) -> tuple[Image.Image, ...]:
        """Draw each map over its picture; stamp undefined maps."""
        thumbnails = []
        for picture, cam, stamp in zip(self.pictures, cams, stamps, strict=True):
            drawn = overlay_map(picture, as_plane(cam), self._colormap)
            if stamp:
                center = (drawn.width / 2, drawn.height / 2)
                pen = ImageDraw.Draw(drawn)
                left, top, right, bottom = pen.textbbox(center, stamp, _font(self._text), anchor="mm")
                pen.rectangle((left - 4, top - 3, right + 4, bottom + 3), _PAPER)
                pen.text(center, stamp, _INK, _font(self._text), anchor="mm")
            thumbnails.append(drawn)
        return tuple(thumbnails)

    def add(self, result: ProbeResult) -> None:
        """Keep a result. If there are too many, keep every second one only, from now on as well."""
        if self._indices and self._indices[-1] % self._stride:  # kept so far as the newest only
            self._indices.pop()
            self.results.pop()
        self._indices.append(self._seen)
        self.results.append(result)
        while len(self.results) > self._max_columns:
            self._stride *= 2
            kept = [k for k, index in enumerate(self._indices) if index % self._stride == 0 or index == self._seen]
            self._indices = [self._indices[k] for k in kept]
            self.results = [self.results[k] for k in kept]
        self._seen += 1

    def strip(self) -> Image.Image:
        """Draw one row per picture and one column per result, the picture itself first.

        Raises:
            RuntimeError: if there is no result
        """
        self.check_started()
        rows = []
        for index, (picture, name) in enumerate(zip(self.pictures, self.names, strict=True)):
            tiles = [(r.thumbnails[index], self._lines(r, index)) for r in self.results]
            rows.append([(picture, [(name, _INK)]), *tiles])
        paper = self._grid(rows)
        for column, result in enumerate(self.results, start=1):
            self._write(paper, column, _GAP, f"{self._unit} {result.at}", _INK)
        return paper

    def frame(self, result: ProbeResult) -> Image.Image:
        """Draw all pictures of one result, with about as many columns as rows."""
        tiles: list[_Tile] = [
            (thumbnail, [(name, _INK), *self._lines(result, index)])
            for index, (thumbnail, name) in enumerate(zip(result.thumbnails, self.names, strict=True))
        ]
        columns = max(min(len(tiles), 3), math.ceil(math.sqrt(len(tiles))))
        paper = self._grid([tiles[start : start + columns] for start in range(0, len(tiles), columns)])
        ImageDraw.Draw(paper).text((_GAP, _GAP), f"{self._unit} {result.at}", _INK, _font(self._text + 1))
        return paper

    def save_film(self, file: BinaryIO) -> None:
        """Write the pictures of all results as an endless GIF that pauses on its last one."""
        # Choosing the colours of a frame takes longer than all else, so it is done once for each.
        fast = Image.Quantize.FASTOCTREE
        self._film = {one: self._film.get(one) or self.frame(one).quantize(method=fast) for one in self.results}
        first, *others = self._film.values()
        durations = [500] * len(others) + [2000] if others else 2000
        first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the results that are kept, and how many there were."""
        moments = [
            {
                "at": result.at,
                "values": {name: list(values) for name, values in result.values.items()},
                "means": dict(result.means),
                "thumbnails": [torch.from_numpy(np.array(thumbnail)) for thumbnail in result.thumbnails],
            }
            for result in self.results
        ]
        return {"moments": moments, "indices": list(self._indices), "seen": self._seen, "stride": self._stride}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the results of another timeline.

        Raises:
            ValueError: if it has another number of pictures
        """
        counts = {len(moment["thumbnails"]) for moment in state["moments"]}
        if counts - {len(self.pictures)}:
            raise ValueError(f"the state is of {max(counts)} probe images, this monitor has {len(self.pictures)}")
        self.results = [
            ProbeResult(
                moment["at"],
                {name: tuple(values) for name, values in moment["values"].items()},
                dict(moment["means"]),
                tuple(Image.fromarray(thumbnail.numpy()) for thumbnail in moment["thumbnails"]),
            )
            for moment in state["moments"]
        ]
        self._indices, self._seen, self._stride = list(state["indices"]), state["seen"], state["stride"]

    def check_started(self) -> None:
        """Raise a ``RuntimeError`` if there is no result."""
        if not self.results:
            raise RuntimeError("nothing was explained yet: call `probe()`, or train on")

    def _grid(self, rows: Sequence[Sequence[_Tile]]) -> Image.Image:
        """Draw rows of pictures with their text between a free line at the top and the legend."""
        legend = self._legend()
        lines = max(len(texts) for row in rows for _, texts in row)
        step, top = self._height + lines * self._line + 2 * _GAP, self._line + 2 * _GAP
        width = max(max(map(len, rows)) * (self._width + _GAP) + _GAP, legend.width)
        paper = Image.new("RGB", (width, top + len(rows) * step + legend.height), _PAPER)
        for r, row in enumerate(rows):
            for c, (picture, texts) in enumerate(row):
                x, y = self._left(c) + (self._width - picture.width) // 2, top + r * step
                paper.paste(picture, (x, y + (self._height - picture.height) // 2))
                for number, (text, colour) in enumerate(texts):
                    self._write(paper, c, y + self._height + 3 + number * self._line, text, colour)
        paper.paste(legend, (0, paper.height - legend.height))
        return paper

    def _left(self, column: int) -> int:
        return column * (self._width + _GAP) + _GAP

    def _write(self, paper: Image.Image, column: int, y: int, text: str, colour: tuple[int, int, int]) -> None:
        """Write in the middle of a column, cut to its width."""
        font = _font(self._text)
        if font.getlength(text) > self._width:
            while text and font.getlength(f"{text}…") > self._width:
                text = text[:-1]
            text = f"{text}…"
        ImageDraw.Draw(paper).text((self._left(column) + self._width / 2, y), text, colour, font, anchor="ma")

    def _legend(self) -> Image.Image:
        """Draw the colour bar, the same for all maps as each is scaled to its own peak, and explain the numbers."""
        texts = ["p: probability of the class"] if "probability" in self.results[-1].values else []
        if self._captions:
            texts.append(f"{', '.join(self._captions.values())}: share of the map in the mask")
        font, key = _font(self._text), "    ".join(texts)
        scale = self._bar.width + font.getlength(_LOW) + font.getlength(_HIGH) + 3 * _GAP
        width = round(max(scale, font.getlength(key)) + 2 * _GAP)
        legend = Image.new("RGB", (width, self._line * (1 + bool(key)) + _GAP), _PAPER)
        pen = ImageDraw.Draw(legend)
        pen.text((_GAP, 0), _LOW, _FAINT, font)
        x = 2 * _GAP + round(font.getlength(_LOW))
        legend.paste(self._bar, (x, 1))
        pen.text((x + self._bar.width + _GAP, 0), _HIGH, _FAINT, font)
        pen.text((_GAP, self._line), key, _FAINT, font)
        return legend

    def _lines(self, result: ProbeResult, index: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Return the lines below the thumbnail of an image."""
        values, texts = result.values, []
        if "probability" in values:
            texts.append(f"p {_percent(values['probability'][index])}")
        elif "score" in values:
            texts.append(f"score {values['score'][index]:.3g}")
        texts += [f"{short} {_percent(values[name][index])}" for name, short in self._captions.items()]
        return [(text, _FAINT) for text in texts]


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"
