"""What a detector found in a picture, and boxes drawn over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ._views import View


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes that a detector found in a picture, the explained ones among them.

    Attributes:
        boxes: left, top, right and bottom in pixels of the picture, (D, 4)
        labels: the class of each, (D,)
        scores: the score of each as the detector gives it, (D,)
        size: the width and height of the picture
        class_names: the names of the classes, as far as they are known
        explained: the number of the box behind each explained target
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    size: tuple[int, int]
    class_names: Mapping[int, str] = field(default_factory=dict)
    explained: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        lines = [f"  {index}: {self.label(index)} {self.scores[index]:.3f}" for index in range(len(self))]
        return "\n".join([f"<{len(self)} boxes", *lines]) + ">"

    def label(self, index: int) -> str:
        """Return the name of a box's class."""
        label = int(self.labels[index])
        return self.class_names.get(label, f"class {label}")

    def entry(self, key: str) -> dict[str, Any]:
        """Describe the box behind a target as plain values; nothing where there is none."""
        index = self.explained.get(key)
        if index is None:
            return {}
        return {
            "number": index,
            "box": [round(side, 3) for side in self.boxes[index].tolist()],
            "class_idx": int(self.labels[index]),
            "class_name": self.class_names.get(int(self.labels[index])),
            "detection_score": float(self.scores[index]),
        }

    def drawn(self, picture: Image.Image, key: Any, view: View, here: View) -> Image.Image:
        """Draw the box behind a target over a picture; all explained ones if there is no such target.

        Args:
            picture: the original picture or the model's view of it, in any size
            key: the target
            view: where the model's view lies on the original
            here: where it lies on the picture
        """
        indices = [self.explained[key]] if key in self.explained else self.explained.values()
        picture = picture.convert("RGB")
        pen = ImageDraw.Draw(picture)
        width = max(2, round(max(picture.size) / 200))
        start, end, low, high = (np.array(ends[::-1]) for ends in (view[:2], view[2:], here[:2], here[2:]))  # (x, y)
        for index in dict.fromkeys(indices):
            corners = np.array(self.boxes[index].tolist()).reshape(2, 2) / self.size
            if view != here:
                corners = low + (corners - start) / (end - start) * (high - low)
            pixels = np.clip(corners * picture.size, 0, np.array(picture.size) - 1)
            first, last = pixels.min(0), pixels.max(0)
            pen.rectangle([*first, *last], outline="black", width=width + 2)
            pen.rectangle([*(first + 1), *np.maximum(last - 1, first + 1)], outline="white", width=width)
        return picture
