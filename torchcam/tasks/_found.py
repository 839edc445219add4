"""What the detectors of all libraries answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchcam._detections import Detections
from torchcam._inputs import Inputs
from torchcam.targets import Box


@dataclass(frozen=True)
class Found:
    """What a detector found in a picture, and how it is explained.

    Attributes:
        model: the model that returns rows: it runs on ``inputs``
        inputs: its inputs, with the original picture and where the model's view lies on it
        detections: the boxes
        rows: the row of the model's output behind each box
        near: each box in the output's own units, (D, 4), where rows have no place of their own; None where they have
        layers: the names of layers whose positions are those of the picture, the first one that all boxes depend on is
            explained
        least_stride: of the layers, first those whose positions span so many pixels of the input or more, the finest
            first; None for the order as it is
        targets: the target of each box that is asked about, by its name
        layer: the one of the layers that is explained by default
    """

    model: nn.Module
    inputs: Inputs
    detections: Detections
    rows: Sequence[int]
    near: Tensor | None
    layers: Sequence[str]
    least_stride: int | None = None
    targets: Mapping[str, Box] = field(default_factory=dict)
    layer: str | None = None


def match_rows(rows: Tensor, shares: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, argument: str) -> list[int]:
    """Return the row that each box came from, by its values; of rows with the same values, the first one left.

    Args:
        rows: the boxes of the rows, (R, 4), in the units of ``boxes``
        shares: the scores of all classes of the rows, in the units of ``scores``, (R, K)
        boxes: the boxes to look for, (D, 4)
        labels: their classes, (D,)
        scores: their scores, (D,)
        argument: what the error says of a box that no row has

    Raises:
        ValueError: if there is no row with these values
    """
    tolerance = max(1.0, 1e-3 * float(boxes.abs().amax())) if len(boxes) else 1.0
    found: list[int] = []
    for box, label, score in zip(boxes, labels.tolist(), scores, strict=True):
        if label >= shares.shape[1]:
            raise ValueError(f"{argument}: a box has class {label}, the model scores {shares.shape[1]}")
        # A thousandth of a score weighs as much as a pixel.
        miss = (rows - box).abs().amax(1) + 1e3 * (shares[:, label] - score).abs()
        miss = miss.nan_to_num(torch.inf)
        miss[[row for row, other in zip(found, labels.tolist(), strict=False) if other == label]] = torch.inf
        row = int(miss.argmin())
        if not miss[row] <= tolerance:
            raise ValueError(
                f"{argument}: no row of the model's output is the box {[round(side, 1) for side in box.tolist()]} of "
                f"class {label} with score {float(score):.3f}"
            )
        found.append(row)
    return found
