"""Cluttered handwritten digits with ground truth: scenes made from a seed, nothing downloaded.

A scene is a textured background (smooth noise at several octaves, a gradient, random strokes, pieces of digits) with
up to three handwritten digits of different classes pasted on top. The pixels of each digit are known exactly, so the
share of a map's energy on a digit can be measured.

The handwriting is the set that scikit-learn ships (`sklearn.datasets.load_digits`, 1797 digits, 8 x 8 grey, by thirteen
writers). It does not name the writers, but it holds fourteen forms of about 130 digits in a row, and the order of
the labels shows where each form begins. The split is at such a border: the first eleven forms are `"train"`
(1415 digits), the last three are `"test"` (382 digits), so that no form is in both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchcam._checks import one_of, positive_integer
from torchcam._extras import extra

CLASS_NAMES: tuple[str, ...] = tuple("0123456789")
"""The class names, in the order of the logits of the demo model."""

Split = Literal["train", "test"]

_FIRST_TEST_DIGIT = 1415  # where the twelfth form begins
_MAX_DIGITS = 3
_MAX_PIECES = 3
_MAX_STROKES = 5
_CHUNK = 64  # scenes rendered at once; part of the recipe, since it decides the order of the random draws
_OCTAVES = (2, 4, 8, 16, 32)
_CELL = 0.62  # half of the space that a digit of side 1 may need once it is rotated and sheared
_BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes and their ground truth. Unused digit slots have label -1, an empty mask and a zero box.

    Attributes:
        images: `(N, 3, S, S)` float32 in [0, 1], quantised to the 256 levels that a PNG can hold.
        labels: `(N, 3)` int64, the class of every digit, -1 where there is none.
        masks: `(N, 3, S, S)` bool, the pixels of every digit, dilated; masks of one scene do not overlap.
        boxes: `(N, 3, 4)` int64, the bounding box of every mask as (left, top, right, bottom), right and bottom
            exclusive.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def presence(self) -> Tensor:
        """`(N, 10)` float32, 1 where the class is in the scene: the target of a multi-label loss."""
        hot = F.one_hot(self.labels.clamp_min(0), len(CLASS_NAMES)) * (self.labels >= 0).unsqueeze(-1)
        return hot.sum(dim=1).float()


@lru_cache(maxsize=2)
def _load_handwriting(split: Split) -> tuple[Tensor, Tensor]:
    """Load the digits of one split: `(M, 8, 8)` float32 in [0, 1], 1 being full ink, and their classes `(M,)`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"making scenes needs the handwriting that scikit-learn ships: {extra('demo')} "
            "(the demo model and its sample images work without it)"
        ) from error
    bunch = load_digits()
    part = slice(None, _FIRST_TEST_DIGIT) if split == "train" else slice(_FIRST_TEST_DIGIT, None)
    digits = torch.from_numpy(bunch.images[part].astype(np.float32) / 16)
    classes = torch.from_numpy(bunch.target[part].astype(np.int64))
    return digits, classes


def make_scenes(
    num_scenes: int,
    *,
    split: Split = "test",
    num_digits: int | tuple[int, int] = (1, 3),
    size: int = 96,
    digit_size: tuple[float, float] | None = None,
    warp: float = 0.0,
    erase: bool = False,
    seed: int | np.random.Generator = 0,
) -> Scenes:
    """Make cluttered scenes of handwritten digits.

    Every random number comes from `seed`: the same arguments give the same scenes, and the global random state of
    Python, NumPy and PyTorch is neither read nor changed.

    Args:
        num_scenes: the number of scenes.
        split: the handwriting to use, `"train"` (forms 1 to 11) or `"test"` (forms 12 to 14).
        num_digits: number of digits per scene, or its inclusive range; between 0 and 3. Their classes differ.
        size: height and width of the images in pixels.
        digit_size: range of the digits' height in pixels, by default 7/24 to 7/16 of `size`, but 8 at least. Digits
            that do not fit beside each other are made smaller.
        warp: strength of a smooth random deformation of the strokes, as a share of the digit's height; 0 is none. Meant
            for training, as a substitute for further writers.
        erase: leave the digits out of the images. Everything else, including labels and masks, stays the same: the two
            images differ only inside the masks.
        seed: an integer, or a NumPy generator, whose state advances.

    Returns:
        The scenes.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if an argument is out of range.

    Example:
        >>> from torchcam.demo import make_scenes
        >>> scenes = make_scenes(4, num_digits=2, seed=1)
        >>> scenes.images.shape, scenes.masks.shape
        (torch.Size([4, 3, 96, 96]), torch.Size([4, 3, 96, 96]))
    """
    fewest, most = (num_digits, num_digits) if isinstance(num_digits, int) else num_digits
    positive_integer("num_scenes", num_scenes)
    if digit_size is None:
        digit_size = (max(size * 7 / 24, 8.0), max(size * 7 / 16, 8.0))
    one_of("split", split, ("train", "test"))
    if not 0 <= fewest <= most <= _MAX_DIGITS:
        raise ValueError(f"`num_digits` must lie between 0 and {_MAX_DIGITS}, got {num_digits}")
    if not 8 <= digit_size[0] <= digit_size[1] or 2 * _CELL * digit_size[1] + 2 > size:
        raise ValueError(f"`digit_size` {digit_size} does not fit into images of {size} pixels (the least is 8)")
    if not 0 <= warp <= 0.5:
        raise ValueError(f"`warp` must lie between 0 and 0.5, got {warp}")

    digits, classes = _load_handwriting(split)
    rng = np.random.default_rng(seed)
    chunks = [
        _render(rng, min(_CHUNK, num_scenes - start), digits, classes, (fewest, most), size, digit_size, warp, erase)
        for start in range(0, num_scenes, _CHUNK)
    ]
    return Scenes(**{field.name: torch.cat([getattr(c, field.name) for c in chunks]) for field in fields(Scenes)})


def _render(
    rng: np.random.Generator,
    n: int,
    digits: Tensor,
    classes: Tensor,
    num_digits: tuple[int, int],
    size: int,
    digit_size: tuple[float, float],
    warp: float,
    erase: bool,
) -> Scenes:
    """Render one chunk of scenes."""
    count = rng.integers(num_digits[0], num_digits[1] + 1, size=n)
    present = np.arange(_MAX_DIGITS) < count[:, None]  # (n, 3)
    labels = rng.permuted(np.tile(np.arange(len(CLASS_NAMES)), (n, 1)), axis=1)[:, :_MAX_DIGITS]
    digit_ids = _pick(rng, classes.numpy(), labels)
    piece_ids = rng.integers(len(digits), size=(n, _MAX_PIECES))
    centers, sides, shown = _place(rng, present, size, digit_size)
    slots = _MAX_DIGITS + _MAX_PIECES

    # Digits are nearly upright; pieces may point anywhere.
    angle = rng.uniform(-0.2, 0.2, size=(n, slots))
    angle[:, _MAX_DIGITS:] = rng.uniform(-np.pi, np.pi, size=(n, _MAX_PIECES))
    source = digits[torch.from_numpy(np.concatenate([digit_ids, piece_ids], axis=1))]  # (n, 6, 8, 8)
    alpha = _draw_glyphs(rng, source, centers, sides, shown, angle, size, warp)

    background, is_dark = _background(rng, n, size)
    ink_luma = np.where(is_dark, rng.uniform(0.82, 0.98, size=n), rng.uniform(0.04, 0.2, size=n))
    ink = _colors(rng, np.repeat(ink_luma[:, None], slots, axis=1), chroma=0.9)  # (n, 6, 3)
    image = background
    for slot in (*range(_MAX_DIGITS, slots), *range(_MAX_DIGITS)):
        if erase and slot < _MAX_DIGITS:
            continue
        cover = alpha[:, slot, None]
        image = image * (1 - cover) + ink[:, slot, :, None, None] * cover

    masks = F.max_pool2d(alpha[:, :_MAX_DIGITS], 3, stride=1, padding=1) > 0
    masks[:, 1] &= ~masks[:, 0]  # a pixel claimed twice stays with the first digit
    masks[:, 2] &= ~(masks[:, 0] | masks[:, 1])
    labels = np.where(present, labels, -1)
    return Scenes(
        images=(image.clamp(0, 1) * 255).round() / 255,
        labels=torch.from_numpy(labels),
        masks=masks,
        boxes=_boxes(masks),
    )


def _pick(rng: np.random.Generator, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pick a random digit of each class in `labels`, as indices into `classes`."""
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=len(CLASS_NAMES))
    first = np.cumsum(counts) - counts
    picked: np.ndarray = order[first[labels] + rng.integers(counts[labels])]
    return picked


def _place(
    rng: np.random.Generator, present: np.ndarray, size: int, digit_size: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find room for the digits, then for pieces of digits beside them.

    The room for a digit depends on its nominal height only, not on its class, so that the clutter that remains when
    the digit is erased is independent of it.

    Returns:
        Centres `(n, 6, 2)` as (x, y), heights `(n, 6)` and which of them are shown `(n, 6)`; the first three slots are
        the digits.
    """
    n = len(present)
    slots = _MAX_DIGITS + _MAX_PIECES
    centers = np.full((n, slots, 2), size / 2)
    sides = np.ones((n, slots))
    shown = np.concatenate([present, np.zeros((n, _MAX_PIECES), dtype=bool)], axis=1)
    num_pieces = rng.integers(1, _MAX_PIECES + 1, size=n)
    for i in range(n):
        wanted = int(present[i].sum())
        heights = np.sort(rng.uniform(*digit_size, size=wanted))[::-1]
        room = [_CELL * h + 1 for h in heights]
        while len(found := _pack(rng, room, [], size, 60)) < wanted:
            heights = heights * 0.95
            room = [_CELL * h + 1 for h in heights]
        order = rng.permutation(wanted)  # the first slot is not always the largest digit
        sides[i, :wanted] = heights[order]
        for slot, j in enumerate(order):
            centers[i, slot] = found[j]

        pieces = rng.uniform(0.6, 1.0, size=num_pieces[i]) * rng.uniform(*digit_size)
        # A piece is the part of a glyph near the middle of its cell, hence the smaller room.
        placed = _pack(rng, [0.4 * h for h in pieces], [(*c, r) for c, r in zip(found, room, strict=True)], size, 30)
        for j, center in enumerate(placed):
            slot = _MAX_DIGITS + j
            centers[i, slot], sides[i, slot], shown[i, slot] = center, pieces[j], True
    return centers, sides, shown


def _pack(
    rng: np.random.Generator,
    halves: list[float],
    taken: list[tuple[float, float, float]],
    size: int,
    tries: int,
) -> list[tuple[float, float]]:
    """Place squares of the given half sides without overlap; stop at the first that finds no room."""
    found: list[tuple[float, float, float]] = []
    for half in halves:
        for x, y in rng.uniform(half, size - half, size=(tries, 2)).tolist():
            if all(max(abs(x - u), abs(y - v)) >= half + other for u, v, other in (*taken, *found)):
                found.append((x, y, half))
                break
        else:
            break
    return [(x, y) for x, y, _ in found]


def _draw_glyphs(
    rng: np.random.Generator,
    source: Tensor,
    centers: np.ndarray,
    sides: np.ndarray,
    shown: np.ndarray,
    angle: np.ndarray,
    size: int,
    warp: float,
) -> Tensor:
    """Draw the glyphs at their places: how much ink covers each pixel, `(n, 6, size, size)` in [0, 1].

    The 8 x 8 digits count inked pixels of a finer binary scan, so sharpening, smooth (bicubic) enlargement and a soft
    threshold give back strokes with clean edges; the height of the threshold is the thickness of the pen.
    """
    n, slots = shown.shape
    warped = rng.uniform(-2 * warp, 2 * warp, size=(n, slots, 2, 4, 4))
    shear = rng.uniform(-0.12, 0.12, size=(n, slots))
    aspect = rng.uniform(0.88, 1.0, size=(n, slots))
    level = rng.uniform(0.42, 0.6, size=(n, slots))
    cut_at = rng.uniform(-0.05, 0.15, size=(n, slots))
    cut_angle = rng.uniform(-np.pi, np.pi, size=(n, slots))
    is_piece = np.arange(slots) >= _MAX_DIGITS

    def per_glyph(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.broadcast_to(values, (n, slots))[shown].astype(np.float32))[:, None, None]

    # Each glyph is drawn in a patch of its own. From the patch's pixels back to the glyph's coordinates, in which its
    # 8 x 8 box is [-1, 1] x [-1, 1]:
    half = int(np.ceil(_CELL * sides.max())) + 2
    corner = np.floor(centers).astype(int) - half
    pixel = torch.arange(2 * half) + 0.5
    x = (pixel[None, None, :] - per_glyph(centers[..., 0] - corner[..., 0])) * (2 / per_glyph(sides))
    y = (pixel[None, :, None] - per_glyph(centers[..., 1] - corner[..., 1])) * (2 / per_glyph(sides))
    cos, sin = per_glyph(np.cos(angle)), per_glyph(np.sin(angle))
    x, y = cos * x + sin * y, cos * y - sin * x
    x = (x + per_glyph(shear) * y) / per_glyph(aspect)
    grid = torch.stack([x, y], dim=-1)  # (M, P, P, 2), M glyphs shown, patches of P pixels
    if warp > 0:
        knots = torch.from_numpy(warped[shown].astype(np.float32))
        bend = F.interpolate(knots, size=(20, 20), mode="bicubic", align_corners=True)
        grid = grid + F.grid_sample(bend, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    flat = F.pad(source[torch.from_numpy(shown)][:, None], (1, 1, 1, 1))  # (M, 1, 10, 10)
    flat = 2 * flat - F.conv2d(flat, _BLUR, padding=1)
    flat = F.interpolate(flat, scale_factor=4, mode="bicubic", align_corners=False)
    ink = F.grid_sample(flat, grid * 0.8, align_corners=False)[:, 0]  # (M, P, P)

    # A piece keeps what lies beyond a cut near the middle and not far from it: less than half a digit.
    beyond_cut = per_glyph(np.cos(cut_angle)) * x + per_glyph(np.sin(cut_angle)) * y - per_glyph(cut_at)
    radius = (x.square() + y.square()).sqrt()
    kept = (beyond_cut * 10 + 1).clamp(0, 1) * ((0.8 - radius) * 10 + 1).clamp(0, 1)
    ink = torch.where(per_glyph(is_piece) > 0, ink * kept, ink)

    ramp = ((ink - per_glyph(level)) / 0.4 + 0.5).clamp(0, 1)
    patches = ramp * ramp * (3 - 2 * ramp)
    alpha = torch.zeros(n, slots, size, size)
    for patch, i, slot in zip(patches, *np.nonzero(shown), strict=True):
        left, top = corner[i, slot].tolist()
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + 2 * half, size), min(top + 2 * half, size)
        alpha[i, slot, y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return alpha


def _background(rng: np.random.Generator, n: int, size: int) -> tuple[Tensor, np.ndarray]:
    """Make the background: coloured noise, a gradient and strokes, `(n, 3, size, size)`, and which ones are dark."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=(n, *shape)).astype(np.float32))

    persistence = draw(0.45, 0.8, 1, 1, 1)
    noise = torch.zeros(n, 3, 1, 1)
    for octave, cells in enumerate((*_OCTAVES, size)):
        noise = F.interpolate(noise, size=(cells, cells), mode="bicubic", align_corners=False)
        if cells < size:
            knots = torch.from_numpy(rng.standard_normal((n, 3, cells, cells), dtype=np.float32))
            noise = noise + persistence**octave * knots
    noise = noise - noise.mean(dim=(2, 3), keepdim=True)
    noise = noise / noise.std(dim=(2, 3), keepdim=True)

    is_dark = rng.random(n) < 0.5
    luma = np.where(is_dark, rng.uniform(0.12, 0.38, size=n), rng.uniform(0.62, 0.85, size=n))
    # Three related colours: the noise mixes them, the gradient drifts towards the third.
    spread = rng.uniform(-0.1, 0.1, size=(n, 3))
    palette = _colors(rng, luma[:, None] + spread, chroma=0.45)
    axis = torch.linspace(-1, 1, size)
    direction = draw(-torch.pi, torch.pi, 1, 1)
    slope = 0.5 * (direction.cos() * axis[None, None, :] + direction.sin() * axis[None, :, None])
    weight = torch.softmax(1.2 * noise + torch.stack([slope, -slope, 0 * slope], dim=1) * 2, dim=1)
    image = torch.einsum("nkhw,nkc->nchw", weight, palette)
    image = image + draw(0.01, 0.05, 1, 1, 1) * noise[:, :1]

    # Strokes are arcs: near a circle, and not far from one point of it.
    pixel = torch.arange(size) + 0.5
    px, py = pixel[None, None, :], pixel[None, :, None]
    num_strokes = draw(1, _MAX_STROKES + 1).floor()
    stroke_luma = np.where(is_dark, rng.uniform(0.4, 0.7, size=n), rng.uniform(0.3, 0.55, size=n))
    stroke_colors = _colors(rng, np.repeat(stroke_luma[:, None], _MAX_STROKES, axis=1), chroma=0.8)
    for stroke in range(_MAX_STROKES):
        ax, ay = draw(0, size, 1, 1), draw(0, size, 1, 1)
        radius = draw(2.5, 6.0, 1, 1).exp()  # 12 to 400 pixels
        towards = draw(-torch.pi, torch.pi, 1, 1)
        cx, cy = ax + radius * towards.cos(), ay + radius * towards.sin()
        off_curve = ((px - cx).square() + (py - cy).square()).sqrt() - radius + noise[:, 0] * draw(0, 1.0, 1, 1)
        off_anchor = ((px - ax).square() + (py - ay).square()).sqrt()
        width = draw(0.6, 1.6, 1, 1)
        cover = (width + 0.5 - off_curve.abs()).clamp(0, 1) * (draw(10, 40, 1, 1) - off_anchor).clamp(0, 1)
        cover = cover * draw(0.3, 0.9, 1, 1) * (stroke < num_strokes)[:, None, None]
        image = torch.lerp(image, stroke_colors[:, stroke, :, None, None].expand_as(image), cover[:, None])

    grain = torch.from_numpy(rng.standard_normal((n, 3, size, size), dtype=np.float32))
    return image + draw(0.0, 0.03, 1, 1, 1) * grain, is_dark


def _colors(rng: np.random.Generator, luma: np.ndarray, chroma: float) -> Tensor:
    """Draw colours of random hue and given brightness: `luma.shape + (3,)`, clipped to [0, 1]."""
    hue = rng.uniform(0, 1, size=luma.shape)[..., None]
    pure = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    weights = np.array(_LUMA)
    strength = chroma * rng.uniform(0.3, 1, size=luma.shape)[..., None]
    tint = pure - (pure @ weights)[..., None]
    return torch.from_numpy(np.clip(luma[..., None] + strength * tint, 0, 1).astype(np.float32))


def _boxes(masks: Tensor) -> Tensor:
    """Compute the bounding box of every mask, `(..., 4)` as (left, top, right, bottom); zeros for an empty mask."""
    size = masks.shape[-1]
    ends = []
    for profile in (masks.any(dim=-2), masks.any(dim=-1)):  # columns, then rows
        hits = profile.int()
        first = hits.argmax(dim=-1)
        last = size - hits.flip(-1).argmax(dim=-1)
        ends.append((first, last))
    (left, right), (top, bottom) = ends
    boxes = torch.stack([left, top, right, bottom], dim=-1)
    return boxes * masks.any(dim=-1).any(dim=-1)[..., None]
