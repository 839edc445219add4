"""The pictures of the benchmark: what is asked of each, and which pixels hold the answer.

All come from seeds and from `torchcam.demo.make_scenes`; a model's training set shares no handwriting with them.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from torchcam.demo import CLASS_NAMES, Scenes, make_scenes

__all__ = ["CUE_COLORS", "SIZE", "Task", "add_cues", "grids", "one_digit", "shortcut", "two_digits"]

SIZE = 96
CUE_SIDE = 16
CUE_MARGIN = 4
CUE_COLORS = torch.tensor([colorsys.hls_to_rgb(k / len(CLASS_NAMES), 0.5, 0.9) for k in range(len(CLASS_NAMES))])
_TILE = SIZE // 2
_TILE_DIGITS = (28.0, 36.0)  # as large as digits in the training set, and small enough for a tile


@dataclass(frozen=True)
class Task:
    """Pictures, each with a class to explain and the pixels that make it so.

    Attributes:
        images: (N, 3, 96, 96)
        classes: the class asked about, (N,)
        masks: the region in which a map should lie, (N, 96, 96) bool
        others: the region in which it should not, for maps scored on both alone, (N, 96, 96) bool
        truth: the best map, (N, 96, 96) bool: the mask, or the part of it that is the evidence
        groups: rows with one number are about one picture, and are drawn together by a bootstrap, (N,)
    """

    images: Tensor
    classes: Tensor
    masks: Tensor
    others: Tensor
    truth: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Task:
        return Task(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def found_by(self, logits: Tensor, num_groups: int) -> Task:
        """Keep the first pictures in which a model sees every class asked about: its logit is positive.

        Args:
            logits: the model's for all images, (N, 10)
            num_groups: how many pictures to keep, at most
        """
        seen = logits.gather(1, self.classes[:, None])[:, 0] > 0
        missed = torch.unique(self.groups[~seen])
        good: Tensor = torch.unique(self.groups)
        good = good[~torch.isin(good, missed)][:num_groups]
        return self[torch.isin(self.groups, good)]


def one_digit(num_scenes: int, seed: int) -> Task:
    """Make cluttered scenes with one digit: the evidence is the digit."""
    scenes = make_scenes(num_scenes, num_digits=1, seed=seed)
    masks = scenes.masks[:, 0]
    return Task(scenes.images, scenes.labels[:, 0], masks, ~masks, masks, torch.arange(num_scenes))


def two_digits(num_scenes: int, seed: int) -> Task:
    """Make scenes with two digits, and ask about both: two rows for each, that differ in the class asked about."""
    scenes = make_scenes(num_scenes, num_digits=2, seed=seed)
    own = scenes.masks[:, :2].flatten(0, 1)
    other = scenes.masks[:, :2].flip(1).flatten(0, 1)
    groups = torch.arange(num_scenes).repeat_interleave(2)
    return Task(scenes.images[groups], scenes.labels[:, :2].flatten(), own, other, own, groups)


def shortcut(num_scenes: int, seed: int) -> Task:
    """Make scenes with one digit and a cue: the evidence, for the model that learned the shortcut, is the cue."""
    scenes = make_scenes(num_scenes, num_digits=1, seed=seed)
    images, cues = add_cues(scenes, scenes.labels[:, 0], seed)
    return Task(images, scenes.labels[:, 0], cues, scenes.masks[:, 0], cues, torch.arange(num_scenes))


def grids(num_grids: int, seed: int) -> Task:
    """Make grids of two by two scenes, each with one digit of another class: the evidence lies in one cell.

    The cells are made small, 48 pixels, and not scaled down: the digits are of the size that models are trained on, and
    the grid has the size of their pictures, so that every model can take it as it is.
    """
    rng = np.random.default_rng(seed)
    tiles = make_scenes(8 * num_grids + 64, num_digits=1, size=_TILE, digit_size=_TILE_DIGITS, seed=rng)
    of_class = [torch.nonzero(tiles.labels[:, 0] == k)[:, 0].numpy() for k in range(len(CLASS_NAMES))]
    classes = rng.permuted(np.tile(np.arange(len(CLASS_NAMES)), (num_grids, 1)), axis=1)[:, :4]
    chosen = torch.from_numpy(np.array([[rng.choice(of_class[k]) for k in row] for row in classes]))  # (N, 4)
    asked = torch.arange(num_grids) % 4
    is_asked = (torch.arange(4) == asked[:, None])[..., None, None]  # (N, 4, 1, 1)
    cells = is_asked.expand(-1, -1, _TILE, _TILE)
    masks = _tiled(cells)
    return Task(
        _tiled(tiles.images[chosen].movedim(2, 1)),
        torch.from_numpy(classes)[torch.arange(num_grids), asked],
        masks,
        ~masks,
        _tiled(tiles.masks[chosen, 0] & is_asked),
        torch.arange(num_grids),
    )


def _tiled(cells: Tensor) -> Tensor:
    """Put four cells (..., 4, S, S) into a square (..., 2 S, 2 S)."""
    side = cells.shape[-1]
    rows = cells.reshape(*cells.shape[:-3], 2, 2, side, side).transpose(-3, -2)  # (..., 2, S, 2, S)
    return rows.reshape(*cells.shape[:-3], 2 * side, 2 * side)


def add_cues(
    scenes: Scenes, classes: Tensor, seed: int | np.random.Generator, *, corners: bool = True
) -> tuple[Tensor, Tensor]:
    """Put a square of a class's colour into each scene, where it covers no digit.

    Args:
        scenes: the scenes
        classes: whose colour it has, (N,)
        seed: decides where it lies, and its grain
        corners: whether it lies in a corner, as in training, or anywhere

    Returns:
        the images (N, 3, S, S) and the masks of the cues (N, S, S)
    """
    rng = np.random.default_rng(seed)
    num, side = len(scenes), scenes.images.shape[-1]
    last = side - CUE_SIDE - CUE_MARGIN
    order = rng.permuted(np.tile(np.arange(4), (num, 1)), axis=1)
    places = np.array([CUE_MARGIN, last])[np.stack([order // 2, order % 2], axis=-1)]  # (N, 4, 2)
    if not corners:
        places = rng.integers(CUE_MARGIN, last + 1, size=(num, 64, 2))
    top, left = torch.from_numpy(places).unbind(-1)  # (N, places)
    pixel = torch.arange(side)
    in_rows = (pixel >= top[..., None]) & (pixel < top[..., None] + CUE_SIDE)
    in_columns = (pixel >= left[..., None]) & (pixel < left[..., None] + CUE_SIDE)
    digits = scenes.masks.any(1).float()
    covered = torch.einsum("nph,nhw,npw->np", in_rows.float(), digits, in_columns.float())
    first = (covered + torch.arange(covered.shape[1]) / 128).argmin(1)  # of equally good places the first
    rows = torch.arange(num)
    cues = in_rows[rows, first][:, :, None] & in_columns[rows, first][:, None, :]
    grain = torch.from_numpy(rng.normal(0, 0.02, size=scenes.images.shape).astype(np.float32))
    colors = (CUE_COLORS[classes][..., None, None] + grain).clamp(0, 1)
    return torch.where(cues[:, None], colors, scenes.images), cues
