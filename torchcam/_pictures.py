"""Conversion of inputs and arrays to pictures, and of pictures to text; maps are drawn by :mod:`torchcam.utils`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._tensors import min_max

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TOLERANCE = 0.02  # by which rounding may carry an input out of [0, 1]
SMALLEST = 256  # pictures with less on their longest side are enlarged, to 512 at least: maps over them are smooth
TINY = 112  # of pictures whose longest side is shorter, the pixels can be seen
LOSSLESS_PIXELS = 128 * 128  # pictures with more pixels are encoded as JPEG


def from_unit_range(values: ArrayLike) -> Image.Image:
    """Convert an array (height, width[, channels]) in [0, 1] to a picture of 8 bits per channel.

    Values outside are clipped, NaN becomes 0.
    """
    shares = np.clip(np.nan_to_num(np.asarray(values)), 0, 1)
    return Image.fromarray(np.rint(255 * shares).astype(np.uint8))


def to_picture(sample: Tensor, normalisation: tuple[Sequence[float], Sequence[float]] | None = None) -> Image.Image:
    """Convert one input of a model to an RGB picture.

    Inputs without three channels are drawn in grey, by the mean of the channels; signals and volumes as
    :func:`as_plane` says. An input out of [0, 1] is stretched from its minimum to its maximum.

    Args:
        sample: the input, (C, *spatial)
        normalisation: mean and standard deviation of each channel, or of all. They are undone if the result is in
            [0, 1]; otherwise the input was normalised by others.
    """
    pixels = sample.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    if normalisation is not None and len(normalisation[0]) in {1, len(pixels)}:
        shape = (-1, *[1] * (pixels.ndim - 1))
        mean, std = (torch.as_tensor(numbers, dtype=torch.float32).reshape(shape) for numbers in normalisation)
        restored = pixels * std + mean
        pixels = restored if _in_unit_range(restored) else pixels
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, *pixels.shape[1:])
    if not _in_unit_range(pixels):
        pixels = min_max(pixels, start_dim=0)
    return from_unit_range(np.stack([as_plane(channel.numpy()) for channel in pixels], axis=-1))


def _in_unit_range(values: Tensor) -> bool:
    return bool(values.amin() >= -TOLERANCE) and bool(values.amax() <= 1 + TOLERANCE)


def as_plane(values: NDArray[Any]) -> NDArray[Any]:
    """Return values over positions as (height, width): a signal as a band, a volume by its maxima along its depth."""
    if values.ndim == 1:
        return np.repeat(values[None], max(1, len(values) // 3), axis=0)
    return values if values.ndim == 2 else values.max(0)


def fitted_size(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return (width, height) in the same proportion, neither longer than ``edge``; smaller ones unchanged."""
    scale = min(edge / max(size), 1.0)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def fitted(picture: Image.Image, edge: int) -> Image.Image:
    """Shrink a picture so that no side is longer than ``edge``; return a smaller one unchanged."""
    size = fitted_size(picture.size, edge)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def enlarged_size(size: tuple[int, int]) -> tuple[int, int]:
    """Multiply (width, height) by an integer so that one is twice `SMALLEST` or more, if both are below it."""
    times = -(-2 * SMALLEST // max(size)) if max(size) < SMALLEST else 1
    return size[0] * times, size[1] * times


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarge a picture that is small to :func:`enlarged_size`: tiny ones pixel by pixel."""
    is_tiny = max(picture.size) < TINY or picture.mode not in {"L", "RGB"}
    resample = Image.Resampling.NEAREST if is_tiny else Image.Resampling.BICUBIC
    size = enlarged_size(picture.size)
    return picture if size == picture.size else picture.resize(size, resample)


def data_uri(picture: Image.Image) -> str:
    """Encode a picture as a data URI: small ones as PNG, without loss, others as JPEG."""
    buffer = io.BytesIO()
    if picture.width * picture.height <= LOSSLESS_PIXELS:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64_text(buffer.getvalue())}"


def base64_text(data: bytes) -> str:
    """Encode bytes as Base64 text."""
    return base64.b64encode(data).decode()
