"""The pictures that ship with the demo model, with their ground truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SAMPLES = Path(__file__).with_name("samples")


@dataclass(frozen=True)
class Sample:
    """A picture and its ground truth.

    Attributes:
        name: a short name, such as `"two_digits"`.
        image: the picture, RGB.
        labels: the class of every digit in it.
        masks: `(K, H, W)` bool, the pixels of every digit, in the order of `labels`.
        boxes: the bounding box of every mask as (left, top, right, bottom), right and bottom exclusive.
    """

    name: str
    image: Image.Image
    labels: tuple[int, ...]
    masks: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]

    def to_tensor(self) -> Tensor:
        """Return the picture as an input of the model: `(1, 3, H, W)` float32 in [0, 1]."""
        pixels = torch.from_numpy(np.array(self.image, dtype=np.float32) / 255)  # (H, W, 3)
        return pixels.permute(2, 0, 1).unsqueeze(0).contiguous()


def sample_images() -> list[Sample]:
    """Load the sample pictures. The first one holds two digits, and the model finds both.

    They show handwriting from the test split, on which the model was not trained.

    Example:
        >>> from torchcam.demo import sample_images
        >>> sample = sample_images()[0]
        >>> sample.image.size, len(sample.labels)
        ((96, 96), 2)
    """
    return [_load(entry) for entry in json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))]


def _load(entry: dict[str, Any]) -> Sample:
    """Load one picture; its mask file is 0 in the background and 1 + k at the k-th digit."""
    with Image.open(SAMPLES / entry["image"]) as image, Image.open(SAMPLES / entry["mask"]) as mask:
        owner = torch.from_numpy(np.array(mask))
        return Sample(
            name=entry["name"],
            image=image.convert("RGB"),
            labels=tuple(entry["labels"]),
            masks=torch.stack([owner == 1 + k for k in range(len(entry["labels"]))]),
            boxes=tuple((left, top, right, bottom) for left, top, right, bottom in entry["boxes"]),
        )
