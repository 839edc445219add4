"""Thumbnails of a few images through time, and the pictures made of them: a strip, and the frames of a film."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ._tensors import min_max
from .utils import overlay_mask

__all__ = ["Film", "Moment", "as_pictures"]

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (110, 110, 110)
_GAP = 6


@dataclass(frozen=True, eq=False)
class Moment:
    """The probe images as the model saw them at one moment of its training.

    Attributes:
        at: how many steps or epochs the training had done
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

    # Knows more letters than the default font of Pillow.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def as_pictures(pictures: Any, num_images: int, *, given: bool) -> list[Image.Image]:
    """Turn tensors (N, C, *spatial) or PIL images into RGB pictures; those ``given`` as pictures must lie in [0, 1].

    Raises:
        TypeError: if they are neither
        ValueError: if they are not as many as the images, or out of range
    """
    if isinstance(pictures, Tensor):
        if given and (pictures.ndim < 3 or not pictures.is_floating_point() or not _in_unit_range(pictures)):
            raise ValueError(
                f"`pictures` must be a floating-point tensor (N, C, *spatial) in [0, 1], got {pictures.dtype} of shape "
                f"{tuple(pictures.shape)} in [{pictures.min()}, {pictures.max()}]"
            )
        found = [_to_picture(picture) for picture in pictures.detach().cpu().float()]
    else:
        found = list(pictures)
        if not all(isinstance(picture, Image.Image) for picture in found):
            raise TypeError("`pictures` must be a tensor (N, C, *spatial) in [0, 1] or PIL images")
        found = [picture.convert("RGB") for picture in found]
    if len(found) != num_images:
        raise ValueError(f"`pictures` has {len(found)} entries for {num_images} images")
    return found


def _in_unit_range(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _to_picture(image: Tensor) -> Image.Image:
    """Draw (C, *spatial): in colour if C is 3, else the mean in grey."""
    image = image if _in_unit_range(image) else min_max(image.nan_to_num(0.0, 0.0, 0.0), start_dim=0)
    image = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, *image.shape[1:])
    flat = np.stack([_as_plane(channel.numpy()) for channel in image], axis=-1)
    return Image.fromarray(np.rint(255 * flat).astype(np.uint8))


def _as_plane(values: np.ndarray) -> np.ndarray:
    """Show values over positions as (height, width): a signal as a band, a volume by its maxima over the first axis."""
    if values.ndim == 1:
        return np.repeat(values[None], max(1, len(values) // 3), axis=0)
    return values if values.ndim == 2 else values.max(0)


class Film:
    """The thumbnails of the moments that are kept, and the pictures made of them."""

    def __init__(self, pictures: list[Image.Image], unit: str, max_columns: int, thumbnail: int, colormap: Any) -> None:
        if max_columns < 2:
            raise ValueError(
                f"`max_columns` must be at least 2, for the first and the newest moment: got {max_columns}"
            )
        if thumbnail < 32:
            raise ValueError(f"`thumbnail` must be at least 32 pixels, got {thumbnail}")
        self.moments: list[Moment] = []
        self._indices: list[int] = []  # which of all moments these are
        self._seen, self._stride = 0, 1
        self._unit, self._max_columns, self._colormap = unit, max_columns, colormap
        scale = thumbnail / max(max(picture.size) for picture in pictures)
        self._pictures = [
            picture.resize(
                (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
            )
            for picture in pictures
        ]
        self._width = max(*(picture.width for picture in self._pictures), thumbnail)
        self._height = max(picture.height for picture in self._pictures)
        self._text = max(10, round(thumbnail / 9))
        ramp = Image.fromarray(np.linspace(0, 1, 120, dtype=np.float32)[None])
        self._bar = overlay_mask(Image.new("L", (120, self._text)), ramp, colormap, alpha=0.0)

    def draw(self, cams: np.ndarray, stamps: list[str]) -> tuple[Image.Image, ...]:
        """Draw each map over its picture, which is grey so that all colour is the map's; stamp what is no map."""
        thumbnails = []
        for picture, cam, stamp in zip(self._pictures, cams, stamps, strict=True):
            mask = Image.fromarray(np.ascontiguousarray(_as_plane(cam)))
            drawn = overlay_mask(picture.convert("L"), mask, self._colormap, alpha=0.4)
            if stamp:
                center = (drawn.width / 2, drawn.height / 2)
                pen = ImageDraw.Draw(drawn)
                left, top, right, bottom = pen.textbbox(center, stamp, _font(self._text), anchor="mm")
                pen.rectangle((left - 4, top - 3, right + 4, bottom + 3), _PAPER)
                pen.text(center, stamp, _INK, _font(self._text), anchor="mm")
            thumbnails.append(drawn)
        return tuple(thumbnails)

    def add(self, moment: Moment) -> None:
        """Keep a moment, and thin the others out if there are too many."""
        if self._indices and self._indices[-1] % self._stride:  # it was there as the newest only
            self._indices.pop()
            self.moments.pop()
        self._indices.append(self._seen)
        self.moments.append(moment)
        while len(self.moments) > self._max_columns:
            self._stride *= 2
            kept = [k for k, index in enumerate(self._indices) if index % self._stride == 0 or index == self._seen]
            self._indices = [self._indices[k] for k in kept]
            self.moments = [self.moments[k] for k in kept]
        self._seen += 1

    def strip(self, names: list[str], captions: Mapping[str, str]) -> Image.Image:
        """Draw one row per picture and one column per moment, the picture itself first."""
        self.check_begun()
        lines = self._lines_below(captions)
        cell, line = self._width + _GAP, self._text + 3
        row = self._height + lines * line + 2 * _GAP
        top = line + 2 * _GAP
        columns = 1 + len(self.moments)
        least, legend = self._legend_size(captions)
        size = max(columns * cell + _GAP, least), top + len(self._pictures) * row + legend
        paper = Image.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(paper)
        for column, moment in enumerate(self.moments, start=1):
            self._write(pen, column * cell + _GAP, _GAP, f"{self._unit} {moment.at}")
        for index, (picture, name) in enumerate(zip(self._pictures, names, strict=True)):
            y = top + index * row
            self._place(paper, picture, _GAP, y)
            self._write(pen, _GAP, y + self._height + 3, name)
            for column, moment in enumerate(self.moments, start=1):
                x = column * cell + _GAP
                self._place(paper, moment.thumbnails[index], x, y)
                for number, text in enumerate(self._below(moment, index, captions)):
                    self._write(pen, x, y + self._height + 3 + number * line, text, _FAINT)
        self._legend(paper, captions)
        return paper

    def frame(self, moment: Moment, names: list[str], captions: Mapping[str, str]) -> Image.Image:
        """Draw all pictures at one moment, side by side in rows of about as many as there are rows."""
        lines = 1 + self._lines_below(captions)
        columns = max(min(len(names), 3), math.ceil(math.sqrt(len(names))))
        rows = math.ceil(len(names) / columns)
        cell, line = self._width + _GAP, self._text + 3
        row = self._height + lines * line + 2 * _GAP
        top = line + 2 * _GAP
        least, legend = self._legend_size(captions)
        paper = Image.new("RGB", (max(columns * cell + _GAP, least), top + rows * row + legend), _PAPER)
        pen = ImageDraw.Draw(paper)
        pen.text((_GAP, _GAP), f"{self._unit} {moment.at}", _INK, _font(self._text + 1))
        for index, (thumbnail, name) in enumerate(zip(moment.thumbnails, names, strict=True)):
            x, y = _GAP + index % columns * cell, top + index // columns * row
            self._place(paper, thumbnail, x, y)
            self._write(pen, x, y + self._height + 3, name)
            for number, text in enumerate(self._below(moment, index, captions), start=1):
                self._write(pen, x, y + self._height + 3 + number * line, text, _FAINT)
        self._legend(paper, captions)
        return paper

    def state_dict(self) -> dict[str, Any]:
        """Give the moments that are kept, and how many there were."""
        moments = [
            {
                "at": moment.at,
                "values": {name: list(values) for name, values in moment.values.items()},
                "means": dict(moment.means),
                "thumbnails": [torch.from_numpy(np.array(thumbnail)) for thumbnail in moment.thumbnails],
            }
            for moment in self.moments
        ]
        return {"moments": moments, "indices": list(self._indices), "seen": self._seen, "stride": self._stride}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the moments of another film of as many pictures."""
        counts = {len(moment["thumbnails"]) for moment in state["moments"]}
        if counts - {len(self._pictures)}:
            raise ValueError(f"the state is of {max(counts)} probe images, this monitor has {len(self._pictures)}")
        self.moments = [
            Moment(
                moment["at"],
                MappingProxyType({name: tuple(values) for name, values in moment["values"].items()}),
                MappingProxyType(dict(moment["means"])),
                tuple(Image.fromarray(thumbnail.numpy()) for thumbnail in moment["thumbnails"]),
            )
            for moment in state["moments"]
        ]
        self._indices, self._seen, self._stride = list(state["indices"]), state["seen"], state["stride"]

    def check_begun(self) -> None:
        """Raise unless there is something to draw."""
        if not self.moments:
            raise RuntimeError("nothing was explained yet: call `probe()`, or train on")

    def _lines_below(self, captions: Mapping[str, str]) -> int:
        return ("score" in self.moments[-1].values) + len(captions)

    def _below(self, moment: Moment, index: int, captions: Mapping[str, str]) -> list[str]:
        values = moment.values
        if "probability" in values:
            texts = [f"p {_percent(values['probability'][index])}"]
        else:
            texts = [f"score {values['score'][index]:.3g}"] if "score" in values else []
        return [*texts, *(f"{short} {_percent(values[name][index])}" for name, short in captions.items())]

    def _place(self, paper: Image.Image, picture: Image.Image, x: int, y: int) -> None:
        paper.paste(picture, (x + (self._width - picture.width) // 2, y + (self._height - picture.height) // 2))

    def _write(self, pen: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: tuple[int, ...] = _INK) -> None:
        """Write in the middle of a column, cut to its width."""
        font = _font(self._text)
        if font.getlength(text) > self._width:
            while text and font.getlength(f"{text}…") > self._width:
                text = text[:-1]
            text = f"{text}…"
        pen.text((x + self._width / 2, y), text, colour, font, anchor="ma")

    _LOW, _HIGH = "none", "peak of the map"

    def _key(self, captions: Mapping[str, str]) -> str:
        """Say what is written below the thumbnails."""
        texts = ["p: probability of the class"] if "probability" in self.moments[-1].values else []
        if captions:
            texts.append(f"{', '.join(captions.values())}: share of the map in the mask")
        return "    ".join(texts)

    def _legend_size(self, captions: Mapping[str, str]) -> tuple[int, int]:
        font, key = _font(self._text), self._key(captions)
        scale = self._bar.width + font.getlength(self._LOW) + font.getlength(self._HIGH) + 3 * _GAP
        return round(max(scale, font.getlength(key)) + 2 * _GAP), (self._text + 3) * (1 + bool(key)) + _GAP

    def _legend(self, paper: Image.Image, captions: Mapping[str, str]) -> None:
        """Say what the colours mean, the same in every map since each is scaled to its own peak, and the numbers."""
        pen, font = ImageDraw.Draw(paper), _font(self._text)
        x, y = _GAP, paper.height - self._legend_size(captions)[1]
        pen.text((x, y), self._LOW, _FAINT, font)
        x += round(font.getlength(self._LOW)) + _GAP
        paper.paste(self._bar, (x, y + 1))
        pen.text((x + self._bar.width + _GAP, y), self._HIGH, _FAINT, font)
        pen.text((_GAP, y + self._text + 3), self._key(captions), _FAINT, font)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"
