"""The proof of a graph: what it computes beside what the extractor computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcam._tensors import is_finite
from torchcam.methods import RefineCAM
from torchcam.methods._request import Request
from torchcam.methods._running import quietly
from torchcam.targets import class_scores, read_logits

from ._formats import Run
from ._trace import Question, fused_map

_ALLOWED = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ALLOWED_BY_DEFAULT = 1e-5
_OTHER_SIDES = ((32, 64), (13, 27))  # how much larger the images of another size are


@dataclass(frozen=True)
class Case:
    """Images, and what an extractor makes of them.

    Attributes:
        images: the images (N, C, *spatial)
        classes: their classes (N,), where they are an input
        scores: the scores of the model
        cam: the maps (N, *grid)
        unit: what an error of 1 in each map is, as a share of the largest contribution to it, (N,)
    """

    images: Tensor
    classes: Tensor | None
    scores: Tensor
    cam: Tensor
    unit: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a graph takes."""
        return (self.images,) if self.classes is None else (self.images, self.classes)


def make_cases(question: Question, example: Tensor, *, dynamic_batch: bool, dynamic_size: bool) -> list[Case]:
    """Explain batches of one sample, of several, with a sample that is not finite, and of other sizes.

    Raises:
        ValueError: if the model does not take images of another size, or all maps are blank
    """
    first = example[:1]
    if dynamic_batch:
        several = torch.cat([first, example[-1:].flip(-1), first.roll(first.shape[-1] // 3, -1)])
        batches = [first, several]
    else:
        batches = [example, example.flip(-1)]
    broken = batches[-1].clone()
    broken[-1].flatten()[: broken.shape[-1] // 2] = torch.nan
    batches.append(broken)
    cases = [_case(question, images) for images in batches]
    for wider in _OTHER_SIDES if dynamic_size else ():
        sides = [side + wider[axis % 2] for axis, side in enumerate(first.shape[2:])]
        larger = torch.nn.functional.interpolate(first.float(), size=sides).to(first)
        try:
            cases.append(_case(question, larger))
        except Exception as error:
            raise ValueError(
                f"`dynamic_size`: {type(question.extractor.model).__name__} does not take images of {sides}: {error}"
            ) from error
    if not any(bool(case.cam.nan_to_num().any()) for case in cases):
        raise ValueError(
            "the maps of `example` are zero everywhere, for every class that was tried, so that they do not show "
            "whether the graph is right: pass other images; a model whose last weights are zero has no maps"
        )
    return cases


def _case(question: Question, images: Tensor) -> Case:
    extractor = question.extractor
    scores = read_logits(extractor.model(images)).detach()
    recorded = extractor._recorder.find()
    by_class = class_scores(scores)
    count = by_class.shape[1]
    classes = by_class.argmax(1)  # of a sample that is not finite, any
    if question.class_input:
        classes = (classes + torch.arange(len(classes), device=classes.device) * max(1, count // 3)) % count
    asked = None if extractor.class_agnostic else classes
    request = Request(recorded, asked, relu=question.relu, retain_graph=True)
    with quietly():
        raw = extractor._raw_maps(request, **question.options)
        cam = fused_map(extractor, extractor._finished(raw, request, question.normalized))
        unit = _unit(question, request)
    return Case(images, classes if question.class_input else None, scores, cam, unit)


def _unit(question: Question, request: Request) -> Tensor:
    r"""Return what an error of 1 in each map is, as a share of the largest :math:`\sum_k |w_k A_k(s)|`, (N,).

    So large is what a map sums up: where channels cancel, rounding errors are no smaller. Of maps that are scaled, an
    error of 1 is the range of what was scaled; the errors of both of its ends add to half of it at most.
    """
    extractor = question.extractor
    of_layers = extractor.base_cam if isinstance(extractor, RefineCAM) else extractor
    raw = of_layers._raw_maps(request, **question.options)
    try:
        weighted = of_layers._layer_weights(request, **question.options)
        largest = [
            _largest((weight.reshape(*weight.shape, *[1] * (activation.ndim - weight.ndim)) * activation).abs().sum(1))
            for weight, activation in weighted
        ]
    except NotImplementedError:  # a map that is no sum of weighted channels
        largest = [_largest(cam) for cam in raw]
    units = []
    for cam, peak in zip(of_layers._finished(raw, request, normalized=False), largest, strict=True):
        flat = cam.flatten(1)
        span = (flat.amax(1) - flat.amin(1)) / 2 if question.normalized else torch.ones_like(peak)
        units.append(torch.where((span > 0) & (peak > 0), span / torch.where(peak > 0, peak, 1.0), 1.0))
    return torch.stack(units).amin(0)


def _largest(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).abs().amax(1)


def check(run: Run, cases: Sequence[Case], what: str) -> float:
    """Run a graph on all cases, and return the largest error of a map as a share of its largest contribution.

    Raises:
        ValueError: if it is too large, or the scores are not those of the model
    """
    worst = 0.0
    for case in cases:
        scores, cam = (tensor.to(case.images.device) for tensor in run(*case.arguments))
        allowed = _ALLOWED.get(case.images.dtype, _ALLOWED_BY_DEFAULT)
        finite = is_finite(case.cam)
        if cam.shape != case.cam.shape or scores.shape != case.scores.shape:
            shapes = f"{tuple(scores.shape)} and {tuple(cam.shape)}"
            raise ValueError(f"{what} returns scores and maps of shapes {shapes} for images {tuple(case.images.shape)}")
        if bool((is_finite(cam) != finite).any()):
            raise ValueError(f"{what} marks other samples as not finite than the extractor does")
        error = ((cam.float() - case.cam.float()).flatten(1).abs().amax(1) * case.unit)[finite]
        known = is_finite(case.scores)
        peak = _largest(case.scores.float())
        apart = (_largest(scores.float() - case.scores.float()) / torch.where(peak > 0, peak, 1.0))[known]
        for name, found in (("maps", error), ("scores", apart)):
            largest = float(found.max()) if found.numel() else 0.0
            if not largest <= allowed:
                raise ValueError(
                    f"{what} is not right: its {name} differ from those of the extractor by {largest:.1e} of the "
                    f"largest {'contribution' if name == 'maps' else 'score'} (allowed: {allowed:.0e}), for images "
                    f"{tuple(case.images.shape)}. Nothing was written"
                )
        worst = max(worst, *map(float, error)) if error.numel() else worst
    return worst
