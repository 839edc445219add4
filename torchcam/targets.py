"""From a model's output to one score per sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import callable_object, integer
from ._detector_rows import SIDES, overlaps, read_rows
from ._tensors import map_tensors, named_tensor, tensors_in, to_float

__all__ = [
    "BinaryLogit",
    "Box",
    "BoxScores",
    "ClassIndex",
    "ClassLogit",
    "ClassProbability",
    "Contrast",
    "Difference",
    "OutputTarget",
    "RawScore",
    "ReST",
    "Segmentation",
    "Selector",
    "Similarity",
    "Token",
    "read_logits",
]

OutputTarget = Callable[[Any], Tensor]
ClassIndex = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


def read_logits(output: Any) -> Tensor:
    """Read the class scores out of a model's output.

    A tensor is taken as it is. Of an output class or a mapping the entry ``logits``, else ``logits_per_image`` (CLIP),
    else ``out`` (torchvision's segmentation models), else the first floating-point tensor is meant; of a tuple or list
    the first such tensor. One without dimensions, such as a loss, counts only if there is no other.

    Raises:
        TypeError: if the output holds no floating-point tensor
    """
    if isinstance(output, Tensor):
        return output
    named = named_tensor(output, "logits", "logits_per_image", "out")
    if named is not None:
        return named
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    logits = next((tensor for tensor in found if tensor.ndim), found[0] if found else None)
    if logits is None:
        raise TypeError(
            f"no class scores found in an output of type {type(output).__name__}: "
            "pass `targets`, a callable from one sample's output to a scalar"
        )
    return logits


def class_scores(output: Any) -> Tensor:
    """Return one score for each class of each sample, (N, K): summed over positions where there are any."""
    logits = to_float(read_logits(output).detach())
    logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
    return logits.flatten(2).sum(-1) if logits.ndim > 2 else logits


def sample_of(output: Any, index: int, batch_size: int) -> Any:
    """Return one sample's part of a batched output.

    Tensors lose their batch dimension; a list with one entry per sample (as detectors return) gives that entry.
    """
    if isinstance(output, list) and len(output) == batch_size:
        return output[index]
    return map_tensors(lambda t: t[index] if t.ndim and t.shape[0] == batch_size else t, output)


def as_class_indices(class_idx: ClassIndex, batch_size: int, num_classes: int, device: torch.device) -> Tensor:
    """Turn any way to name classes into a long tensor on ``device``: (N,), or (N, K) for several of each sample.

    To check a tensor on a GPU is to wait for it; integers and lists are checked without.

    Raises:
        TypeError: if an index is not an integer (a ``bool`` is not)
        ValueError: if an index is negative or too large, or if there is not one per sample
    """
    if isinstance(class_idx, Tensor):
        if class_idx.dtype.is_floating_point or class_idx.dtype.is_complex or class_idx.dtype == torch.bool:
            raise TypeError(f"`class_idx` must hold integers, got a tensor of {class_idx.dtype}")
        indices = class_idx.detach().to(device=device, dtype=torch.long)
        if indices.is_inference():  # a graph can not hold on to it
            indices = indices.clone()
        lowest, highest = (indices.amin(), indices.amax()) if indices.numel() else (0, 0)
    elif isinstance(class_idx, (str, bytes)) or not (hasattr(class_idx, "__iter__") and hasattr(class_idx, "__len__")):
        lowest = highest = integer("class_idx", class_idx)
        indices = torch.full((), lowest, dtype=torch.long, device=device)
    else:
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in class_idx]
        values = [integer("class_idx", one) for row in rows for one in row]
        lowest, highest = (min(values), max(values)) if values else (0, 0)
        several = any(isinstance(row, (list, tuple)) for row in class_idx)
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"`class_idx` must name as many classes for each sample, got {class_idx!r}")
        indices = torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda")
        indices = indices.to(device, non_blocking=True)  # without waiting for the device
        indices = indices.reshape(len(rows), -1) if several else indices
    if indices.ndim > 2 or (indices.ndim and len(indices) != batch_size):
        raise ValueError(
            f"`class_idx` must be one integer, one per sample, or as many for each sample: got shape "
            f"{tuple(indices.shape)} for a batch of {batch_size}"
        )
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"`class_idx` must lie between 0 and {num_classes - 1} for a model with {num_classes} classes, "
            f"got {class_idx!r}"
        )
    return indices.expand(batch_size) if indices.ndim < 2 else indices


class Selector:
    """The score that is explained: one scalar per sample, read from any output of the model.

    Args:
        class_idx: one class for the whole batch, one per sample, or K per sample
        targets: one callable from a sample's output to a scalar for the whole batch, one per sample, or K per sample
        batch_size: the number of samples N

    Raises:
        ValueError: unless exactly one of ``class_idx`` and ``targets`` is given, and if there is not one per sample
        TypeError: if a target is not callable
    """

    _indices: Tensor | None = None
    _samples: Tensor | None = None
    _sign = 1

    def __init__(
        self,
        class_idx: ClassIndex | None,
        targets: OutputTarget | Sequence[OutputTarget] | None,
        batch_size: int,
    ) -> None:
        check_one_of(class_idx, targets)
        self.class_idx = class_idx
        self.batch_size = batch_size
        self.targets: list[Any] = []
        if targets is not None:
            self.targets = [targets] * batch_size if callable(targets) else list(targets)
            if len(self.targets) != batch_size:
                raise ValueError(
                    f"`targets` must be one callable or one per sample: got {len(self.targets)} "
                    f"for a batch of {batch_size}"
                )
        self._scorers = list(map(_as_one_target, self.targets))

    def __call__(self, output: Any, samples: Tensor | None = None) -> Tensor:
        """Score the rows of an output.

        Args:
            output: what the model returned for B rows
            samples: the sample of the explained batch that each row stands for, (B,); by default row i is sample i

        Returns:
            the scores, (B,), or (B, K) for several of each sample
        """
        samples = self._samples if samples is None else samples
        score = self.by_target(output, samples) if self.targets else self.by_class(read_logits(output), samples)
        return score if self._sign == 1 else -score

    def negative(self) -> Selector:
        """Return the selection of the negative scores; of one that is negative already, itself."""
        selector = copy.copy(self)
        selector._sign = -1
        return selector

    def of(self, samples: Tensor) -> Selector:
        """Return the same selection for outputs whose rows stand for ``samples``, (B,)."""
        selector = copy.copy(self)
        selector._samples = samples
        return selector

    def arguments(self, output: Any, samples: Tensor) -> dict[str, Any]:
        """Return the arguments of a call that asks the same of an output whose rows stand for ``samples``, (B,)."""
        if self.targets:
            return {"targets": [self.targets[owner] for owner in samples.tolist()]}
        return {"class_idx": self.indices(read_logits(output))[samples]}

    def by_class(self, logits: Tensor, samples: Tensor | None) -> Tensor:
        """Pick each row's class score from logits ``(B, K)``; ``(B, K, *S)`` is summed over positions."""
        logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
        class_idx = self.class_idx
        if self.batch_size == 1 and type(class_idx) is list and len(class_idx) == 1:
            class_idx = class_idx[0]
        fits = samples is not None or logits.shape[0] == self.batch_size
        if type(class_idx) is int and 0 <= class_idx < logits.shape[1] and fits:
            scores = logits.select(1, class_idx)  # for all rows at once
            return scores.flatten(1).sum(-1) if scores.ndim > 1 else scores
        indices = self.indices(logits)
        indices = indices if samples is None else indices[samples]
        if len(indices) != len(logits):
            raise ValueError(f"the model gave scores of shape {tuple(logits.shape)} for {len(indices)} samples")
        rows = torch.arange(len(logits), device=logits.device).reshape(-1, *[1] * (indices.ndim - 1))
        scores = logits[rows, indices]
        return scores.flatten(indices.ndim).sum(-1) if scores.ndim > indices.ndim else scores

    def indices(self, logits: Tensor) -> Tensor:
        """Return the classes as a ``(N,)`` long tensor, checked against logits ``(B, K, ...)`` or ``(B,)``."""
        if self._indices is None:
            assert self.class_idx is not None  # noqa: S101 - for the type checker: __init__ has seen to it
            num_classes = logits.shape[1] if logits.ndim > 1 else 1
            self._indices = as_class_indices(self.class_idx, self.batch_size, num_classes, logits.device)
        return self._indices

    def by_target(self, output: Any, samples: Tensor | None) -> Tensor:
        """Score each row's part of the output with that row's target."""
        owners = range(self.batch_size) if samples is None else samples.tolist()
        return torch.stack(
            [self._scorers[owner](sample_of(output, row, len(owners))) for row, owner in enumerate(owners)]
        )


def _as_one_target(target: Any) -> OutputTarget:
    """Check a target and let it return a scalar; make a list of K targets one that returns (K,).

    Raises:
        TypeError: if it is not callable
    """
    if isinstance(target, (list, tuple)):
        several = [_as_one_target(one) for one in target]
        return lambda output: torch.stack([one(output) for one in several])
    callable_object("targets", target)

    def scalar(output: Any) -> Tensor:
        score = target(output)
        if not isinstance(score, Tensor) or score.numel() != 1:
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"`targets` must return one scalar tensor per sample, got {found}")
        return score.reshape(())

    return scalar


def class_columns(class_idx: Any, targets: Any) -> list[dict[str, Any]] | None:
    """Split K classes or targets of each sample into K choices of one per sample; None where there is one anyway.

    Raises:
        ValueError: if there are not as many for each sample
    """
    for name, value in (("class_idx", class_idx), ("targets", targets)):
        if isinstance(value, Tensor):
            if value.ndim == 2:
                return [{name: column} for column in value.unbind(1)]
        elif isinstance(value, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in value):
            if not all(isinstance(row, (list, tuple)) for row in value) or len({len(row) for row in value}) != 1:
                raise ValueError(f"`{name}` must name as many for each sample, got {value!r}")
            return [{name: list(column)} for column in zip(*value, strict=True)]
    return None


def check_one_of(class_idx: object, targets: object) -> None:
    """Raise a ``ValueError`` unless exactly one of the two is given."""
    if (class_idx is None) == (targets is None):
        raise ValueError(
            "provide exactly one of class_idx or targets, got " + ("neither" if class_idx is None else "both")
        )


@dataclass(frozen=True)
class ClassLogit:
    """The score :math:`y_c` of a class; of scores (K, *S) the sum over positions.

    Attributes:
        class_idx: the class c
    """

    class_idx: int

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output."""
        return _class_scores(output, self.class_idx).sum()


@dataclass(frozen=True)
class ClassProbability:
    """The probability :math:`p_c = softmax(y)_c` of a class; of scores (K, *S) the sum over positions.

    Attributes:
        class_idx: the class c
    """

    class_idx: int

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output."""
        return _class_scores(read_logits(output).softmax(0), self.class_idx).sum()


@dataclass(frozen=True)
class ReST:
    r"""The score :math:`y_c + \log p_c` that ShapleyCAM explains (Cai 2025, arXiv:2501.06261).

    Attributes:
        class_idx: the class c
    """

    class_idx: int

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output."""
        logits = read_logits(output)
        return (_class_scores(logits, self.class_idx) + _class_scores(logits.log_softmax(0), self.class_idx)).sum()


@dataclass(frozen=True)
class BinaryLogit:
    """The only score of a binary classifier, or its negative.

    Attributes:
        positive: whether the positive class is explained
    """

    positive: bool = True

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, a tensor of one element."""
        score = RawScore()(output)
        return score if self.positive else -score


@dataclass(frozen=True)
class RawScore:
    """The output itself, where it is one number: a regression."""

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, a tensor of one element."""
        score = read_logits(output)
        if score.numel() != 1:
            raise ValueError(f"the output has {score.numel()} scores for each sample, not one: name a class of them")
        return score.reshape(())


@dataclass(frozen=True)
class Contrast:
    r"""What tells a class from others (Finer-CAM, arXiv:2501.11309): :math:`y_c - \gamma \operatorname{mean}_d y_d`.

    Attributes:
        class_idx: the class c
        others: the classes d it is compared with
        gamma: the strength of the comparison
    """

    class_idx: int
    others: Sequence[int]
    gamma: float = 0.6

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output."""
        logits = read_logits(output)
        others = torch.stack([_class_scores(logits, other) for other in self.others]).mean(0)
        return (_class_scores(logits, self.class_idx) - self.gamma * others).sum()


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The scores of a class summed over the pixels of a mask.

    Attributes:
        class_idx: the class c
        mask: the pixels (*S), as booleans or weights, shaped as the model's scores (K, *S) are; by default all
    """

    class_idx: int
    mask: Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, (K, *S)."""
        scores = _class_scores(read_logits(output), self.class_idx)
        if self.mask is None:
            return scores.sum()
        if self.mask.shape != scores.shape:
            raise ValueError(
                f"`mask` has shape {tuple(self.mask.shape)}, but the scores of a class have {tuple(scores.shape)}"
            )
        return (scores * self.mask.to(scores)).sum()


@dataclass(frozen=True, eq=False)
class Box:
    """The score of one of a detector's boxes, or one of its sides, its mask, or the confidence in one of its points.

    It reads the outputs of detectors of torchvision (a list of mappings with ``boxes``, ``labels`` and ``scores``), of
    DETR and its relatives of transformers (``logits`` and ``pred_boxes``), and of models of ultralytics (the decoded
    output and the raw ones). The score is the logit of the box's class, before the softmax or sigmoid; of torchvision,
    the final score.

    Attributes:
        index: the row: of torchvision the detection, of transformers the query, of ultralytics the anchor
        side: in place of the score ``"left"``, ``"top"``, ``"right"`` or ``"bottom"`` of the box, in the output's own
            units, or ``"mask"``: the sum of its mask over the pixels that belong to it
        keypoint: in place of the score, the confidence in this one of its points
        label: the class, by default the one with the highest score in the row (of DETR, the last one is "no object")
        near: left, top, right and bottom of a box, in the output's own units. Then the row whose box overlaps it most
            is read, in place of the row at ``index``: for models whose rows have no place of their own (torchvision,
            RT-DETR), when they run on variants of the input. Where torchvision finds no box of the class that overlaps
            it by half, the score is 0.

    Raises:
        TypeError: if ``index`` is no integer
        ValueError: if ``side`` is none of these, both ``side`` and ``keypoint`` are given, or there is no such row
    """

    index: int
    side: str | None = None
    keypoint: int | None = None
    label: int | None = None
    near: Tensor | None = None

    def __post_init__(self) -> None:
        integer("index", self.index, 0)
        if self.side not in {None, "mask", *SIDES}:
            raise ValueError(f"`side` must be one of {', '.join(map(repr, SIDES))}, 'mask' or None, got {self.side!r}")
        if self.side is not None and self.keypoint is not None:
            raise ValueError(f"give `side` ({self.side!r}) or `keypoint` ({self.keypoint}), not both")

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output."""
        rows = read_rows(output)
        row = self.index if self.near is None else rows.find(self.near, self.label)
        if row is None:
            return rows.nothing
        if row >= len(rows):
            raise ValueError(f"`index` must lie between 0 and {len(rows) - 1}, the rows of the output, got {row}")
        label = rows.label(row) if self.label is None else self.label
        if self.keypoint is not None:
            return rows.keypoint(row, self.keypoint)
        if self.side is None:
            return rows.score(row, label)
        return rows.mask(row, label) if self.side == "mask" else rows.box(row, label)[SIDES.index(self.side)]


@dataclass(frozen=True, eq=False)
class BoxScores:
    """How well a detector finds given boxes: the overlap (IoU) and the score of the detection that fits each best.

    Only detections with the box's label and an overlap above ``iou_threshold`` count; a box without one adds 0.

    Attributes:
        labels: the labels of the B boxes
        boxes: the boxes, (B, 4), as (x1, y1, x2, y2) in pixels of the input
        iou_threshold: the overlap that a detection must exceed
    """

    labels: Sequence[int] | Tensor
    boxes: Sequence[Sequence[float]] | Tensor
    iou_threshold: float = 0.5

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output: a mapping with ``boxes`` (D, 4), ``labels`` (D,) and ``scores`` (D,)."""
        found, labels, scores = output["boxes"], output["labels"], output["scores"]
        nothing: Tensor = scores.sum() * 0 + found.sum() * 0  # keeps the graph where no detection counts
        if not len(found):
            return nothing
        boxes = torch.as_tensor(self.boxes, dtype=found.dtype, device=found.device).reshape(-1, 4)
        wanted = torch.as_tensor(self.labels, device=labels.device).reshape(-1, 1)
        overlap = overlaps(boxes, found).masked_fill(wanted != labels, 0.0)  # (B, D)
        best, index = overlap.max(1)
        counted: Tensor = torch.where(best > self.iou_threshold, best + scores[index], 0.0).sum()
        return nothing + counted


@dataclass(frozen=True, eq=False)
class Similarity:
    """The cosine between the model's embedding of the sample and a given one.

    Attributes:
        embedding: the embedding to compare with, (D,)
    """

    embedding: Tensor

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, an embedding (D,)."""
        named = named_tensor(output, "image_embeds", "pooler_output")  # of transformers
        embedding = read_logits(output) if named is None else named
        if embedding.numel() != self.embedding.numel():
            raise ValueError(
                f"`embedding` has {self.embedding.numel()} dimensions, but the model's has {embedding.numel()}"
            )
        cosine: Tensor = F.cosine_similarity(embedding.flatten(), self.embedding.to(embedding).flatten(), dim=0)
        return cosine


@dataclass(frozen=True, eq=False)
class Difference:
    """One minus the cosine between the model's embedding of the sample and a given one.

    Attributes:
        embedding: the embedding to compare with, (D,)
    """

    embedding: Tensor

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, an embedding (D,)."""
        return 1 - Similarity(self.embedding)(output)


@dataclass(frozen=True)
class Token:
    """The logit of a token of a text that a language model generates, alone or less that of another token.

    Attributes:
        position: the position of the scores that the token is chosen by, which is that of the token before it; counted
            from the end where it is negative, so that padding on the left does not move it
        token_id: the token
        against: another token whose logit is subtracted; ``"others"`` for the mean of all others'
    """

    position: int
    token_id: int
    against: int | str | None = None

    def __call__(self, output: Any) -> Tensor:
        """Score one sample's output, logits (T, V)."""
        logits = read_logits(output)
        if logits.ndim != 2 or not -len(logits) <= self.position < len(logits):
            raise ValueError(f"`position` is {self.position}, but the output has logits of shape {tuple(logits.shape)}")
        named = {"token_id": self.token_id} | ({} if self.against in {None, "others"} else {"against": self.against})
        for name, token in named.items():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < logits.shape[1]:
                raise ValueError(f"`{name}` must be a token id in [0, {logits.shape[1]}), got {token!r}")
        return token_scores(logits[self.position], torch.tensor(self.token_id, device=logits.device), self.against)


def token_scores(logits: Tensor, tokens: Tensor, against: Any = None, is_log: bool = False) -> Tensor:
    """Return the score of one token at each position, less that of another one.

    Args:
        logits: (..., V)
        tokens: the token at each position, (...)
        against: another token; "others" for the mean of all others; None for nothing
        is_log: whether log-probabilities are the scores, and not logits
    """
    scores = to_float(logits)
    scores = scores.log_softmax(-1) if is_log else scores
    own = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if against is None:
        return own
    if against == "others":
        return own - (scores.sum(-1) - own) / (scores.shape[-1] - 1)
    return own - scores[..., against]


def _class_scores(scores: Any, class_idx: int) -> Tensor:
    """Return a class's entry of one sample's scores (K, *S)."""
    logits = read_logits(scores)
    if not 0 <= integer("class_idx", class_idx) < len(logits):
        raise ValueError(f"`class_idx` must lie between 0 and {len(logits) - 1}, got {class_idx}")
    return logits[class_idx]
