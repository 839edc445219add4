"""The rows of a detector's output: candidates with a box and a score of each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SIDES = ("left", "top", "right", "bottom")
_NEAR = 1e-4  # by which a score and what it was decoded from may differ


@dataclass(frozen=True)
class Rows:
    """The candidates that a detector's output holds for one sample.

    Attributes:
        scores: of each class (R, K); (R, 1) where a row is of one class alone
        boxes: left, top, right and bottom in the output's own units, (R, 4); None where they are in ``ranked``
        labels: the only class of each row, (R,); None where it has scores of several
        is_final: whether the rows are what is left after the choice among candidates: there may be none
        ranked: the best rows after that choice: box, score, class and others, (k, 6 + others)
        keypoints: the confidence in each point, (R, P)
        masks: the mask of each row in the input's pixels, (R, H, W)
        raw: of masks that are composed, what they are composed of
        protos: the masks that they are composed of, (M, h, w)
    """

    scores: Tensor
    boxes: Tensor | None
    labels: Tensor | None = None
    is_final: bool = False
    ranked: Tensor | None = None
    keypoints: Tensor | None = None
    masks: Tensor | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    protos: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def nothing(self) -> Tensor:
        """Zero, with a graph."""
        return self.scores.sum() * 0 + (0 if self.boxes is None else self.boxes.sum() * 0)

    def find(self, near: Tensor, label: int | None) -> int | None:
        """Return the row whose box overlaps another one most; of final rows, one of the class by half or more."""
        if not len(self) or self.boxes is None:
            return None
        overlap = overlaps(near.to(self.boxes), self.boxes.detach())
        if self.labels is not None and label is not None:
            of_class = self.labels == label
            if self.is_final or bool(of_class.any()):
                overlap = overlap.masked_fill(~of_class, -1.0)
        row = int(overlap.argmax())
        return None if self.is_final and overlap[row] < 0.5 else row

    def label(self, row: int) -> int:
        """Return the class of a row: its only one, or the one with the highest score."""
        return int(self.scores[row].argmax() if self.labels is None else self.labels[row])

    def score(self, row: int, label: int) -> Tensor:
        """Return the score of a class in a row."""
        if self.labels is not None:
            return self.scores[row, 0]
        if not 0 <= label < self.scores.shape[1]:
            raise ValueError(f"`label` must lie between 0 and {self.scores.shape[1] - 1}, got {label}")
        return self.scores[row, label]

    def box(self, row: int, label: int) -> Tensor:
        """Return left, top, right and bottom of a row's box, (4,)."""
        if self.boxes is not None:
            return self.boxes[row]
        assert self.ranked is not None  # noqa: S101 - for the type checker: one of both is there
        share = self.scores[row, label].detach().sigmoid()
        miss = (self.ranked[:, 4] - share).abs() + (self.ranked[:, 5] != label)
        return self.ranked[int(miss.argmin()), :4]

    def keypoint(self, row: int, number: int) -> Tensor:
        """Return the confidence in one point of a row."""
        if self.keypoints is None:
            raise ValueError(f"`keypoint` is {number}, but the detector tells no confidence in points")
        if not 0 <= number < self.keypoints.shape[1]:
            raise ValueError(f"`keypoint` must lie between 0 and {self.keypoints.shape[1] - 1}, got {number}")
        return self.keypoints[row, number]

    def mask(self, row: int, label: int) -> Tensor:
        """Return the sum of a row's mask over the pixels that belong to it."""
        if self.masks is not None:
            pixels = self.masks[row]
            return pixels[pixels.detach() > 0.5].sum()
        if self.protos is None:
            raise ValueError("`side` is 'mask', but the detector makes no masks")
        logits = torch.einsum("m,mhw->hw", self.raw["mask_coefficient"][:, row], self.protos)
        left, top, right, bottom = (self.box(row, label).detach() / self._pixels_of_proto(row, label)).tolist()
        window = logits[max(int(top), 0) : max(int(bottom) + 1, 1), max(int(left), 0) : max(int(right) + 1, 1)]
        return window[window.detach() > 0].sum()

    def _pixels_of_proto(self, row: int, label: int) -> float:
        """Return the pixels of the input that a pixel of the mask spans: boxes are decoded from sides in cells."""
        assert self.protos is not None  # noqa: S101 - for the type checker
        sides = self.raw["boxes"][:, row].detach().reshape(4, -1)  # (4, bins)
        if sides.shape[1] > 1:
            sides = sides.softmax(1) * torch.arange(sides.shape[1]).to(sides)
        left, _, right, _ = sides.sum(1).tolist()
        box = self.box(row, label).detach()
        stride = round(float(box[2] - box[0]) / (left + right))
        cells = 0
        for level in self.raw["feats"]:
            height, width = level.shape[-2:]
            cells += height * width
            if row < cells:
                return float(stride * width / self.protos.shape[-1])
        raise ValueError(f"`index` must lie between 0 and {cells - 1}, got {row}")


def read_rows(output: Any) -> Rows:
    """Read the rows out of one sample's output of a detector of torchvision, transformers or ultralytics.

    Raises:
        TypeError: if it is none of these
    """
    if isinstance(output, Mapping) and {"boxes", "scores", "labels"} <= output.keys():
        masks = output.get("masks")
        return Rows(
            output["scores"].unsqueeze(1),
            output["boxes"],
            output["labels"],
            is_final=True,
            keypoints=output.get("keypoints_scores"),
            masks=None if masks is None else masks[:, 0],
        )
    logits, boxes = (
        output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        for name in ("logits", "pred_boxes")
    )
    if isinstance(logits, Tensor) and isinstance(boxes, Tensor):
        return Rows(logits, corners(boxes))
    if isinstance(output, (tuple, list)) and len(output) == 2:
        decoded, protos = output[0][:2] if isinstance(output[0], (tuple, list)) else (output[0], None)
        if isinstance(decoded, Tensor) and decoded.ndim == 2 and isinstance(output[1], Mapping):
            return _of_heads(decoded, output[1], protos)
        if isinstance(decoded, Tensor) and decoded.ndim == 2 and decoded.shape[1] == 6:  # RT-DETR
            return Rows(decoded[:, 4:5].logit(1e-6), corners(decoded[:, :4]), decoded[:, 5].long())
    raise TypeError(
        f"no boxes are found in an output of type {type(output).__name__}: `targets.Box` reads what detectors of "
        "torchvision, DETR and its relatives of transformers, and models of ultralytics return; pass `targets`, a "
        "callable from one sample's output to a scalar"
    )


def _of_heads(decoded: Tensor, raw: Mapping[str, Any], protos: Any) -> Rows:
    """Read the raw rows of the head that was decoded: several may have answered."""
    heads = [raw] if "scores" in raw else [head for head in raw.values() if head]
    for head in heads:
        scores = head["scores"]  # (K, R)
        kinds, count = scores.shape
        shares = scores.detach().sigmoid()
        if decoded.shape[-1] == count and len(decoded) >= 4 + kinds:
            if not torch.allclose(shares, decoded[4 : 4 + kinds].detach(), atol=_NEAR):
                continue
            boxes, ranked, others = corners(decoded[:4].T), None, decoded[4 + kinds :]
        else:
            best = shares.amax()
            if not torch.isclose(best, decoded[:, 4].detach().amax(), atol=_NEAR):
                continue
            boxes, ranked, others = None, decoded, decoded[:, 6:].T
        keypoints = head.get("kpts")
        if keypoints is not None:
            keypoints = _confidence(keypoints, others)
        protos = protos[0] if isinstance(protos, (tuple, list)) else protos
        return Rows(scores.T, boxes, ranked=ranked, keypoints=keypoints, raw=head, protos=protos)
    raise ValueError("none of the model's heads gives the scores that it returns")


def _confidence(raw: Tensor, decoded: Tensor) -> Tensor | None:
    """Return the logits of the confidence in points, (R, P), where each has one after its place: (x, y, c)."""
    if len(raw) % 3 or len(decoded) != len(raw):
        return None
    shares = decoded[2::3].detach()
    return raw[2::3].T if bool(((shares >= 0) & (shares <= 1)).all()) else None


def corners(boxes: Tensor) -> Tensor:
    """Return left, top, right and bottom of boxes given by their centres and sizes, (R, 4)."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Return the overlap (intersection over union) of a box (..., 4) with others (R, 4): (..., R)."""
    box = box.unsqueeze(-2)
    low, high = torch.maximum(box[..., :2], boxes[:, :2]), torch.minimum(box[..., 2:], boxes[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    union = (box[..., 2:] - box[..., :2]).prod(-1) + (boxes[:, 2:] - boxes[:, :2]).prod(-1) - shared
    return shared / union.clamp_min(torch.finfo(boxes.dtype).tiny)
