"""Localisation: the agreement of maps with known evidence, masks or boxes of the object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from torchcam._checks import finite_number
from torchcam._replica import normal_mode
from torchcam.targets import ClassIndex, OutputTarget

from ._statistics import energy
from .core import UNIT, CAMMetric, Extractor, Keys, LogitsFn, as_image, given_maps, tensor_of, zero_where_not_finite

Boxes = Tensor | Sequence[Tensor | Sequence[Sequence[float]]]


class Localization(CAMMetric):
    r"""Agreement of maps with masks or boxes of the evidence: pointing game, precision, energy and overlap.

    With the map :math:`m`, upsampled to the input, its positive part counting, and the mask :math:`E` of the evidence:

    * ``pointing_game``: whether the map's highest position is in :math:`E`, or no further than ``tolerance`` pixels
      from it (Zhang et al. 2016, arXiv:1608.00507; there, 15). Where several are highest, the share of them that are.
    * ``average_precision``: the area under the curve of precision over recall as the threshold falls,
      :math:`\sum_n (R_n - R_{n-1}) P_n`, with :math:`P_n` the share of the positions at the n-th highest value or
      above that are in :math:`E`, and :math:`R_n` the share of :math:`E` that is among them (as scikit-learn's
      ``average_precision_score``).
    * ``energy``: the share of the map in the mask, :math:`\sum_E m / \sum m` (Wang et al. 2020, arXiv:1910.01279).
    * ``rank_accuracy``: the share of the :math:`|E|` highest positions that are in the mask (Arras et al. 2020,
      arXiv:2003.07258). Of equals at the limit, as many are as one would meet by chance.
    * ``iou``: the overlap :math:`|B \cap E| / |B \cup E|` of the mask with
      :math:`B = \{s : m(s) \ge \text{threshold} \cdot \max m\}`.
    * ``best_iou``: that overlap at the threshold that is best for the sample, of all there are.

    ``compute`` gives their means over the samples; all lie in [0, 1], and higher is better. A map that is constant, or
    nowhere positive, has no preference: each number is then that of chance, the share of the input that is evidence.
    An increasing change of a map's values, such as a power, moves only ``energy`` and ``iou``.

    With a ``region``, all of this is about its positions alone: the others belong neither to the map nor to the mask.

    A sample without any evidence has nothing to be found: it is left out, and counted by ``empty_count``. Samples whose
    map or score is not finite are left out as well, and counted by ``nan_count``; ``total`` says how many are in the
    means.

    Cost: for each batch a forward pass and what the extractor needs; with ``maps``, nothing: the model is not called,
    and there need not be any.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; a
            model, or None, if every update is given ``maps``
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        tolerance: how far from the mask a map may point, in pixels
        threshold: the share of a map's highest value that counts as shown, for ``iou``
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        pointing_game: the sum of the hits so far
        average_precision: the sum of the average precisions so far
        energy: the sum of the shares of energy so far
        rank_accuracy: the sum of the rank accuracies so far
        iou: the sum of the overlaps so far
        best_iou: the sum of the best overlaps so far
        total: the number of samples in these sums
        nan_count: the number of samples left out, their map or score not finite
        empty_count: the number of samples left out, their mask empty

    Raises:
        TypeError: if ``cam_extractor`` or ``logits_fn`` has another type than above
        ValueError: if ``tolerance`` is negative, or ``threshold`` not in [0, 1]

    Example:
        >>> metric = Localization()
        >>> x, maps = torch.rand(1, 3, 4, 4), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> metric.update(x, maps=maps, boxes=torch.tensor([[0, 0, 2, 2]]))
        >>> metric.summary()["pointing_game"]
        1.0
    """

    _keys: ClassVar[Keys] = {
        key: (key, True, UNIT)
        for key in ("pointing_game", "average_precision", "energy", "rank_accuracy", "iou", "best_iou")
    }

    def __init__(
        self,
        cam_extractor: Extractor | nn.Module | None = None,
        logits_fn: LogitsFn | None = None,
        *,
        tolerance: float = 0,
        threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(cam_extractor, logits_fn, **kwargs)
        self.tolerance = finite_number("tolerance", tolerance, lowest=0)
        threshold = finite_number("threshold", threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a share of a map's highest value, from 0 to 1, got {threshold!r}")
        self.threshold = threshold
        self.add_state("empty_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        input_tensor: Tensor,
        class_idx: ClassIndex | None = None,
        *,
        masks: Any = None,
        boxes: Boxes | None = None,
        region: Any = None,
        maps: Any = None,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> None:
        """Explain a batch of inputs, compare the maps with the evidence, and add to the sums.

        Args:
            input_tensor: the model's input, (N, C, *spatial) with 1, 2 or 3 spatial dimensions
            class_idx: the class to explain, for the whole batch or one per sample; by default the predicted one
            masks: the evidence, (N, *spatial) or (N, 1, *spatial) of the input's size, booleans or integers of which
                those that are not 0 count
            boxes: in place of ``masks``, for images: a tensor (N, 4), or for each sample any number of boxes (k, 4), as
                (x1, y1, x2, y2) in pixels. A pixel is inside if its centre is: column x for x1 ≤ x + ½ < x2
            region: the positions that count, in the form of ``masks``; by default all. With two objects in a picture,
                their pixels: which of them is meant?
            maps: the maps to measure, in place of the extractor's: a tensor or array (N, *spatial) or (N, 1, *spatial)
                of any resolution, which is interpolated to the input's. The model is not called then, and of what class
                they are does not matter.
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output, after
                ``logits_fn``, to a scalar

        Raises:
            TypeError: if the input is not a floating-point tensor, a class index not an integer, a mask or region
                neither booleans nor integers, or boxes are not numbers
            ValueError: if not exactly one of ``masks`` and ``boxes`` is given, if there is not one mask, map or class
                per sample, or if any other argument does not fit the input
            RuntimeError: if there is neither an extractor nor ``maps``
        """
        image = as_image(input_tensor)
        if (masks is None) == (boxes is None):
            raise ValueError(
                "provide exactly one of `masks` and `boxes`, got " + ("neither" if masks is None else "both")
            )
        with normal_mode(graph=False):
            evidence = _mask_of_boxes(boxes, image) if masks is None else _checked_mask("masks", masks, image)
            if region is not None:
                region = _checked_mask("region", region, image)
                evidence = evidence & region
            if maps is None:
                explained = self._explain(image, class_idx, targets, None)
                cam, valid = explained.cam, explained.valid
            else:
                cam, valid = zero_where_not_finite(given_maps(maps, image))
            empty = valid & ~evidence.flatten(1).any(1)
            compared = self._compare(cam.relu(), evidence, region)
            parts = {name: part.masked_fill(empty, 0.0) for name, part in compared.items()}
            kept = valid & ~empty
            self._add(parts, kept, empty_count=empty.sum(), nan_count=(~valid).sum())

    def _compare(self, cam: Tensor, evidence: Tensor, region: Tensor | None) -> dict[str, Tensor]:
        """Return each sample's six numbers, (N,) each, for maps that are not negative."""
        m, mask = cam.flatten(1).double(), evidence.flatten(1)
        near = _within(evidence, self.tolerance).flatten(1)
        size, share = _count(mask), mask.double().mean(1)
        if region is not None:
            counts = region.flatten(1)
            m, share = m.masked_fill(~counts, -1.0), size / _count(counts)  # below all that count, also below 0
        peak = m.amax(1, keepdim=True)

        highest = m == peak
        shown = m >= self.threshold * peak
        ordered, order = m.sort(dim=1, descending=True)
        limit = ordered.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
        above, tied = m > limit, m == limit
        by_chance = (size - _count(above)) * _count(tied & mask) / _count(tied)

        # The k highest positions, for every k: of equals, each gets the numbers of the last.
        hits = mask.gather(1, order)
        met = hits.cumsum(1, dtype=torch.float64)
        taken = torch.arange(1, m.shape[1] + 1, device=m.device)
        whole = torch.cat([ordered[:, 1:] < ordered[:, :-1], torch.ones_like(mask[:, :1])], 1)
        last = torch.where(whole, taken, len(taken)).flip(1).cummin(1).values.flip(1) - 1
        precision = (met / taken).gather(1, last)
        overlap = met / (size.unsqueeze(1) + taken - met)

        positive = m.relu()
        return {
            "pointing_game": _count(highest & near) / _count(highest),
            "average_precision": (precision * hits).sum(1) / size,
            "energy": torch.where(positive.sum(1) > 0, energy(positive, mask), share),
            "rank_accuracy": (_count(above & mask) + by_chance) / size,
            "iou": _count(shown & mask) / _count(shown | mask),
            "best_iou": torch.where(whole, overlap, 0.0).amax(1),
        }


def _count(positions: Tensor) -> Tensor:
    """Count the positions of each sample, (N,), as numbers to divide by."""
    return positions.sum(1, dtype=torch.float64)


def _checked_mask(name: str, masks: Any, image: Tensor) -> Tensor:
    """Return positions as booleans (N, *spatial)."""
    masks = tensor_of(name, masks)
    if masks.is_floating_point() or masks.is_complex():
        raise TypeError(
            f"`{name}` must hold booleans or integers, got {masks.dtype}: say what counts, as in `{name} > 0.5`"
        )
    found, wanted = tuple(masks.shape), (len(image), *image.shape[2:])
    if found == (wanted[0], 1, *wanted[1:]):
        masks = masks.squeeze(1)
    elif found != wanted:
        raise ValueError(f"`{name}` must have the shape of the input without its channels, {wanted}, got {found}")
    chosen: Tensor = masks.detach().to(image.device) != 0
    return chosen


def _mask_of_boxes(boxes: Any, image: Tensor) -> Tensor:
    """Return the pixels whose centres are in any of a sample's boxes, (N, H, W)."""
    if image.ndim != 4:
        raise ValueError(f"`boxes` are for images (N, C, H, W), got an input of {tuple(image.shape)}: give `masks`")
    if not hasattr(boxes, "__len__") or (isinstance(boxes, Tensor) and not boxes.ndim):
        raise TypeError(f"`boxes` must be a tensor (N, 4), or boxes (k, 4) for each sample, got {boxes!r}")
    if len(boxes) != len(image):
        raise ValueError(f"`boxes` must be one or several for each of {len(image)} samples, got {len(boxes)}")
    if not isinstance(boxes, Tensor):
        listed = [_numbers(several, number).to(image.device) for number, several in enumerate(boxes)]
        listed = [several.reshape(-1, 4) if several.numel() in {0, 4} else several for several in listed]
        if any(several.ndim != 2 or several.shape[1] != 4 for several in listed):
            shapes = [tuple(several.shape) for several in listed]
            raise ValueError(f"`boxes` must be (x1, y1, x2, y2), (k, 4) for each sample, got {shapes}")
        boxes = pad_sequence(listed, batch_first=True)  # the padding holds no pixel
    boxes = boxes.unsqueeze(1) if boxes.ndim == 2 else boxes
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"`boxes` must be (x1, y1, x2, y2), (N, 4) or (N, k, 4), got {tuple(boxes.shape)}")
    x1, y1, x2, y2 = boxes.detach().to(image.device, torch.float64).unsqueeze(-1).unbind(2)  # (N, k, 1)
    rows, columns = (torch.arange(side, device=image.device) + 0.5 for side in image.shape[2:])
    across, down = (columns >= x1) & (columns < x2), (rows >= y1) & (rows < y2)
    inside: Tensor = (down.unsqueeze(-1) & across.unsqueeze(-2)).any(1)
    return inside


def _numbers(boxes: Any, number: int) -> Tensor:
    """Return a sample's boxes in float64."""
    try:
        return torch.as_tensor(boxes, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:  # which of them depends on what it got
        raise TypeError(
            f"`boxes` must hold numbers (x1, y1, x2, y2), (k, 4) for each sample, got {boxes!r} for sample {number}"
        ) from error


def _within(evidence: Tensor, tolerance: float) -> Tensor:
    """Return the positions no further than ``tolerance`` from the evidence (N, *spatial)."""
    reach = math.floor(tolerance)
    if not reach:
        return evidence
    dims = evidence.ndim - 1
    offsets = torch.arange(-reach, reach + 1, device=evidence.device)
    squared = sum(offsets.reshape(-1, *[1] * (dims - 1 - axis)) ** 2 for axis in range(dims))
    ball = (torch.as_tensor(squared) <= tolerance**2).float()
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    met: Tensor = convolution(evidence.unsqueeze(1).float(), ball[None, None], padding=reach).squeeze(1) > 0.5
    return met
