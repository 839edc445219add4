"""The metrics against hand-computed numbers, a slow oracle, and what torchmetrics asks of a metric."""

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection, MetricTracker

from tests.metrics_under_test import SOFTMAX, Backward, Given, Line, assert_same, cnn, images, snapshot, states
from torchcam.methods import CAM, FinerCAM, GradCAM, LayerCAM, RefineCAM, ScoreCAM, SmoothGradCAMpp
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

METRICS = [ClassificationMetric, partial(DeletionInsertionMetric, steps=3, batch_size=4)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as these, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Sums(nn.Module):
    """Scores (N, 2): the sum of the input over 16, and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Conv2d(1, 1, 1, bias=False)
        self.classifier = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.identity.weight.fill_(1)
            self.classifier.weight.copy_(torch.tensor([[0.25], [-0.25]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.identity(x).flatten(2).mean(-1))


# By hand. `Sums` scores the sum over 16, so the map of class 0 is relu(x), scaled to [0, 1].

TOY = torch.tensor([[[[4.0, 2.0], [1.0, 0.0]]], [[[4.0, 2.0], [1.0, -3.0]]]])  # maps 1, 1/2, 1/4, 0 both


def test_classification_by_hand(device: torch.device) -> None:
    model = Sums().to(device)
    with GradCAM(model, "identity") as extractor:
        metric = ClassificationMetric(extractor)
        metric.update(TOY.to(device), 0)
    # p = 7/16 and 4/16; with the map 5.25/16 both; with its inverse 1.75/16 and -1.25/16.
    assert metric.drop.item() == pytest.approx((7 - 5.25) / 7)
    assert metric.increase.item() == 1
    assert metric.gain.item() == pytest.approx((5.25 - 4) / 12)
    assert metric.deletion_drop.item() == pytest.approx((7 - 1.75) / 7 + (4 + 1.25) / 4)
    assert (int(metric.total), int(metric.nan_count)) == (2, 0)
    assert {key: value.item() for key, value in metric.compute().items()} == pytest.approx(
        {"avg_drop": 0.125, "conf_increase": 0.5, "avg_gain": 1.25 / 24, "deletion_drop": (0.75 + 1.3125) / 2}
    )
    summary = metric.summary()
    assert summary == pytest.approx({"avg_drop": 0.125, "conf_increase": 0.5})
    assert all(type(value) is float for value in summary.values())


@pytest.mark.parametrize(
    ("steps", "baseline", "deletion", "insertion"),
    [
        # Sums of the first sample for k = 0, 1, ...: the areas in units of 1/16.
        (4, None, (7 / 2 + 3 + 1 + 0 + 0 / 2) / 4, (0 / 2 + 4 + 6 + 7 + 7 / 2) / 4),
        (2, None, (7 / 2 + 1 + 0 / 2) / 2, (0 / 2 + 6 + 7 / 2) / 2),
        (3, None, (7 / 2 + 1 + 0 / 2) / 2, (0 / 2 + 6 + 7 / 2) / 2),  # two positions at a time, as 4/3 is rounded up
        (1, None, (7 + 0) / 2, (0 + 7) / 2),
        (99, None, (7 / 2 + 3 + 1 + 0 + 0 / 2) / 4, (0 / 2 + 4 + 6 + 7 + 7 / 2) / 4),
        (4, torch.tensor(1.0), (7 / 2 + 4 + 3 + 3 + 4 / 2) / 4, (4 / 2 + 7 + 8 + 8 + 7 / 2) / 4),
        (4, lambda x: x.amax((1, 2, 3), keepdim=True), (7 / 2 + 7 + 9 + 12 + 16 / 2) / 4, (8 + 16 + 14 + 11 + 3.5) / 4),
        (4, lambda x: x, 7, 7),
    ],
)
def test_deletion_insertion_by_hand(
    steps: int, baseline: Any, deletion: float, insertion: float, device: torch.device
) -> None:
    model = Sums().to(device)
    with GradCAM(model, "identity") as extractor:
        metric = DeletionInsertionMetric(extractor, steps=steps, baseline=baseline)
        metric.update(TOY[:1].to(device), 0)
    assert metric.deletion.item() == pytest.approx(deletion / 16)
    assert metric.insertion.item() == pytest.approx(insertion / 16)
    assert metric.summary() == pytest.approx({"deletion_auc": deletion / 16, "insertion_auc": insertion / 16})


def test_the_last_interval_may_be_shorter() -> None:
    metric = DeletionInsertionMetric(Given(Line(), torch.tensor([[5.0, 4, 3, 2, 1]])), steps=2)
    metric.update(torch.tensor([[[1.0, 1, 1, 1, 1]]]))
    # Sums 5, 2, 0 at the fractions 0, 3/5, 1.
    assert metric.summary()["deletion_auc"] == pytest.approx(0.6 * (5 + 2) / 2 + 0.4 * (2 + 0) / 2)
    assert metric.summary()["insertion_auc"] == pytest.approx(0.6 * (0 + 3) / 2 + 0.4 * (3 + 5) / 2)


def test_equal_values_rank_in_their_order() -> None:
    x = torch.tensor([[[8.0, 4, 2, 1]]])
    metric = DeletionInsertionMetric(Given(Line(), torch.ones(1, 4)), steps=4)
    metric.update(x)
    assert metric.deletion.item() == (15 / 2 + 7 + 3 + 1 + 0) / 4  # one position less each time, from the left


@pytest.mark.parametrize(
    ("constant", "drop"),
    [
        (-3.0, 2 / 2),  # from -2 to -4, half of the map's 1 hidden: a fall by as much as it was
        (-1.5, 2 / 0.5),
        (1.0, 2 / 2),
    ],
)
def test_drop_of_a_negative_score_is_relative_to_its_size(constant: float, drop: float) -> None:
    # p = constant + 1 (or + 1 + 1); the map hides an evidence of 2.
    x = torch.tensor([[[3.0, -2.0]]])
    metric = ClassificationMetric(Given(Line(constant), torch.tensor([[1 / 3, 1.0]])))
    metric.update(x)
    assert metric.drop.item() == pytest.approx(drop)
    assert metric.increase.item() == 0


def test_score_of_zero() -> None:
    x = torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]], [[2.0, 2.0]]])  # scores 0, 0, 4
    hidden = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # to -1, 1, 4
    metric = ClassificationMetric(Given(Line(), hidden))
    metric.update(x)
    # The first falls from 0, the second does when its map is deleted: no share of 0 is that.
    assert (int(metric.total), int(metric.nan_count)) == (1, 2)
    metric.reset()
    metric.cam_extractor.maps = [torch.zeros(3, 2)]
    metric.update(torch.zeros(3, 1, 2))
    assert (int(metric.total), int(metric.nan_count)) == (3, 0)
    assert metric.summary() == {"avg_drop": 0.0, "conf_increase": 0.0}


def test_gain_is_one_of_probabilities() -> None:
    extractor = Given(Line(), torch.tensor([[1.0, 0.0]]))
    metric = ClassificationMetric(extractor)
    metric.update(torch.tensor([[[0.75, -0.5]]]))
    assert metric.compute()["avg_gain"].item() == pytest.approx(0.5 / 0.75)
    metric.update(torch.tensor([[[1.0, 0.0]]]))  # nothing to gain
    assert metric.compute()["avg_gain"].item() == pytest.approx(0.5 / 0.75 / 2)
    metric.update(torch.tensor([[[2.0, 1.0]]]))  # a score of 3
    values = metric.compute()
    assert values.pop("avg_gain").isnan()
    assert all(value.isfinite() for value in values.values())
    assert (int(metric.total), int(metric.nan_count)) == (3, 0)


# Against the definitions, sample by sample in float64.


def oracle(model: nn.Module, x: Tensor, maps: Tensor, classes: list[int], steps: int) -> dict[str, float]:
    """The means of both metrics for maps of the input's size, from the formulas."""

    def p(image: Tensor, c: int) -> float:
        with torch.no_grad():
            return float(model(image.unsqueeze(0))[0, c])

    sums = dict.fromkeys(("avg_drop", "conf_increase", "avg_gain", "deletion_drop", "deletion_auc", "insertion_auc"), 0)
    for image, m, c in zip(x, maps, classes, strict=True):
        score, kept, deleted = p(image, c), p(image * m, c), p(image * (1 - m), c)
        sums["avg_drop"] += max(0, score - kept) / abs(score)
        sums["conf_increase"] += kept > score
        sums["avg_gain"] += max(0, kept - score) / (1 - score)
        sums["deletion_drop"] += max(0, score - deleted) / abs(score)
        order = sorted(range(m.numel()), key=lambda i: (-float(m.flatten()[i]), i))
        per_step = math.ceil(m.numel() / steps)
        counts = [*range(0, m.numel(), per_step), m.numel()]
        curves: tuple[list[float], list[float]] = ([], [])
        for count in counts:
            removed, revealed = image.flatten(1).clone(), torch.zeros_like(image).flatten(1)
            removed[:, order[:count]] = 0
            revealed[:, order[:count]] = image.flatten(1)[:, order[:count]]
            for curve, changed in zip(curves, (removed, revealed), strict=True):
                curve.append(p(changed.reshape(image.shape), c))
        for name, curve in zip(("deletion_auc", "insertion_auc"), curves, strict=True):
            for left in range(len(counts) - 1):
                width = (counts[left + 1] - counts[left]) / m.numel()
                sums[name] += width * (curve[left] + curve[left + 1]) / 2
    return {name: float(value) / len(x) for name, value in sums.items()}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("method", [GradCAM, LayerCAM, ScoreCAM])
def test_against_the_definition(method: Any, dim: int, device: torch.device) -> None:
    model = cnn(dim, device)
    x = images(3, dim, device)
    whole = nn.Sequential(*model, nn.Softmax(-1)).eval()
    with method(whole, ["0", "4"]) as extractor:
        classes = whole(x).argmax(1).tolist()
        fused = extractor.fuse_cams(extractor(classes))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dim]
    maps = nn.functional.interpolate(fused.unsqueeze(1), x.shape[2:], mode=mode, align_corners=False)
    expected = oracle(whole, x, maps.squeeze(1), classes, steps=5)
    model.train()
    with method(model, ["0", "4"]) as extractor:
        first = ClassificationMetric(extractor, SOFTMAX)
        second = DeletionInsertionMetric(extractor, SOFTMAX, steps=5, batch_size=7)
        for metric in (first, second):
            metric.update(x)
    computed = {key: value.item() for key, value in {**first.compute(), **second.compute()}.items()}
    assert computed == pytest.approx(expected, rel=1e-9, abs=1e-12)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": lambda model: GradCAM(model, "4"),
    "LayerCAM": lambda model: LayerCAM(model, ["0", "4"]),
    "SmoothGradCAMpp": lambda model: SmoothGradCAMpp(model, "4"),
    "ScoreCAM": lambda model: ScoreCAM(model, "4"),
    "CAM": lambda model: CAM(model, "5", fc_layer="7"),
    "FinerCAM": lambda model: FinerCAM(model, "4"),
    "RefineCAM": lambda model: RefineCAM(model, ["0", "4"]),
}


@pytest.mark.parametrize("new", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_logits_fn_is_a_part_of_what_is_explained(method: str, new: Any) -> None:
    """A model with ``logits_fn`` is measured as the model that ends with it, whatever the method reads."""
    plain, after, ending = cnn(), cnn(), nn.Sequential(*cnn(), nn.Softmax(-1))
    measured = []
    for model, logits_fn in ((plain, None), (after, SOFTMAX), (ending, None)):
        extractor = METHODS[method](model)
        metric = new(extractor, logits_fn)
        metric.update(images(), [1, 0, 3])
        measured.append(states(metric))
        extractor.remove_hooks()
    without, with_it, within = measured
    assert with_it == pytest.approx(within, rel=1e-12)
    assert with_it != pytest.approx(without, rel=1e-3)


def test_logits_fn_gets_the_output_as_it_is() -> None:
    class Dict(Line):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "extra": 1}

    extractor = Given(Dict(), torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[[3.0, 1.0]]])
    metric = ClassificationMetric(extractor, lambda output: 2 + output["extra"] * output["logits"])
    metric.update(x)
    assert metric.drop.item() == pytest.approx((6 - 5) / 6)
    metric = ClassificationMetric(extractor)
    metric.update(x)
    assert metric.drop.item() == pytest.approx((4 - 3) / 4)


@pytest.mark.parametrize("new", METRICS)
def test_batch_is_its_samples(new: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        whole, parts = new(extractor, SOFTMAX), new(extractor, SOFTMAX)
        whole.update(images(4))
        for sample in images(4):
            parts.update(sample.unsqueeze(0))
    assert states(whole) == pytest.approx(states(parts), rel=1e-12)
    assert int(whole.total) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_deletion_chunks(batch_size: int) -> None:
    model, sizes = cnn(), []
    with GradCAM(model, "4") as extractor:
        expected = DeletionInsertionMetric(extractor, steps=9, batch_size=17)
        expected.update(images())
        handle = model.register_forward_hook(lambda _m, _a, output: sizes.append(len(output)))
        metric = DeletionInsertionMetric(extractor, steps=9, batch_size=batch_size)
        metric.update(images())
        handle.remove()
    assert states(metric) == pytest.approx(states(expected), rel=1e-12)
    explained, *chunks = sizes
    assert explained == 3
    assert sum(chunks) == 3 * (2 * 9 - 1)
    assert len(chunks) == math.ceil(3 * 17 / batch_size)
    assert max(chunks) <= batch_size


# Which score.


@pytest.mark.parametrize("new", METRICS)
def test_ways_to_name_the_score(new: Any) -> None:
    x = images()
    with GradCAM(cnn(), "4") as extractor:

        def measure(**score: Any) -> dict[str, float]:
            metric = new(extractor, SOFTMAX)
            metric.update(x, **score)
            return states(metric)

        predicted = cnn().eval()(x).argmax(1)
        assert measure() == measure(class_idx=predicted.tolist()) == measure(class_idx=predicted)
        assert measure() == measure(class_idx=tuple(predicted.tolist()))
        assert measure(class_idx=2) == measure(class_idx=[2, 2, 2]) == measure(targets=lambda p: p[2])
        mixed = [lambda p: p[3], lambda p: p[0], lambda p: p[1]]
        assert measure(class_idx=[3, 0, 1]) == measure(targets=mixed)
        assert measure(class_idx=2) != measure(class_idx=[3, 0, 1])


def test_predicted_class_of_a_map_of_scores() -> None:
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)  # two classes, scored at each position

    model = Pixels()
    extractor = Given(model, torch.tensor([[1.0, 0.0]]))
    metric = ClassificationMetric(extractor)
    metric.update(torch.tensor([[[-5.0, 1.0]]]))  # class 1 scores 5 - 1
    assert metric.drop.item() == 0
    assert metric.increase.item() == 1  # 5


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"class_idx": 0, "targets": lambda p: p[0]}, ValueError, "exactly one of class_idx or targets, got both"),
        ({"class_idx": 4}, ValueError, "between 0 and 3"),
        ({"class_idx": -1}, ValueError, "between 0 and 3"),
        ({"class_idx": [0, 1]}, ValueError, "one per sample"),
        ({"class_idx": True}, TypeError, "got True of type bool"),
        ({"class_idx": 1.0}, TypeError, "1.0"),
        ({"targets": [lambda p: p[0]]}, ValueError, "got 1 for a batch of 3"),
        ({"targets": 3}, TypeError, "."),
        ({"targets": lambda p: p}, ValueError, "one scalar"),
    ],
)
@pytest.mark.parametrize("new", METRICS)
def test_bad_scores(new: Any, kwargs: Any, error: Any, message: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = new(extractor)
        with pytest.raises(error, match=message):
            metric.update(images(), **kwargs)
    assert (int(metric.total), int(metric.nan_count)) == (0, 0)


@pytest.mark.parametrize("new", METRICS)
def test_bad_arguments(new: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = new(extractor)
        with pytest.raises(TypeError, match="list"):
            metric.update([[1.0]])
        with pytest.raises(TypeError, match=r"torch\.int64"):
            metric.update(torch.ones(1, 3, 8, 8, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\(3, 8\)"):
            metric.update(torch.ones(3, 8))
        with pytest.raises(ValueError, match=r"\(0, 3, 8, 8\)"):
            metric.update(torch.ones(0, 3, 8, 8))
        with pytest.raises(TypeError, match=r"`logits_fn`.*'softmax'"):
            new(extractor, "softmax")
        with pytest.raises(ValueError, match="Unexpected keyword arguments: `step`"):
            new(extractor, step=3)
    with pytest.raises(TypeError, match=r"`cam_extractor`.*: str lacks model, fuse_cams, __call__"):
        new("layer4")
    with pytest.raises(ValueError, match=r"maps of shape \(1, 2\) for 2 inputs"):
        new(Given(Line(), torch.ones(1, 2))).update(torch.ones(2, 1, 2))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "`steps`.*2.0"),
        ({"batch_size": -1}, ValueError, "`batch_size`.*-1"),
        ({"batch_size": True}, TypeError, "`batch_size`.*True"),
        ({"baseline": "blur"}, TypeError, "`baseline`.*'blur'"),
    ],
)
def test_bad_options(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        DeletionInsertionMetric(Given(Line()), **kwargs)


def test_bad_baselines() -> None:
    extractor, x = Given(Line(), torch.ones(2, 2)), torch.ones(2, 1, 2)
    with pytest.raises(ValueError, match=r"`baseline` of shape \(3, 1, 2\).*\(2, 1, 2\)"):
        DeletionInsertionMetric(extractor, baseline=torch.zeros(3, 1, 2)).update(x)
    with pytest.raises(TypeError, match="`baseline` must return a tensor, got int"):
        DeletionInsertionMetric(extractor, baseline=lambda _x: 0).update(x)


# Samples without a finite map or score.


@pytest.mark.parametrize("new", METRICS)
def test_samples_with_nan_are_counted(new: Any) -> None:
    x = images()
    x[1, 0, 0, 0] = torch.nan
    with GradCAM(cnn(), "4") as extractor:
        metric, finite = new(extractor), new(extractor)
        finite.update(x[[0, 2]], [0, 2])
        with pytest.warns(RuntimeWarning, match="layer '4'.*1 of 3"):
            metric.update(x, [0, 1, 2])
    assert (int(metric.total), int(metric.nan_count)) == (2, 1)
    metric.nan_count.zero_()
    assert states(metric) == pytest.approx(states(finite), rel=1e-12)


@pytest.mark.parametrize("new", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_maps(new: Any, bad: float) -> None:
    maps = torch.tensor([[1.0, bad], [1.0, 0.0]])
    metric = new(Given(Line(), maps))
    metric.update(torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]]]))
    assert (int(metric.total), int(metric.nan_count)) == (1, 1)
    assert all(math.isfinite(value) for value in metric.summary().values())


@pytest.mark.parametrize("new", METRICS)
def test_broken_scores_of_what_is_masked(new: Any) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 / x.flatten(1).sum(1, keepdim=True)

    metric = new(Given(Inverse(), torch.tensor([[1.0, 0.0]])))
    metric.update(torch.tensor([[[1.0, 1.0]]]))  # what is left of it without the map is 1, without both 0
    kept = new is ClassificationMetric
    assert (int(metric.total), int(metric.nan_count)) == (int(kept), int(not kept))
    metric.update(torch.tensor([[[1.0, 0.0]]]))  # all of it is in the map
    assert int(metric.nan_count) == 2 - int(kept)


@pytest.mark.parametrize("new", METRICS)
def test_summary_needs_samples(new: Any) -> None:
    metric = new(Given(Line(), torch.full((2, 2), torch.nan)))
    with pytest.raises(AssertionError, match=r"^you need to update the metric before getting the summary$"):
        metric.summary()
    metric.update(torch.ones(2, 1, 2))
    with pytest.raises(AssertionError, match="before getting the summary; all 2 samples were left out"):
        metric.summary()
    assert all(value.isnan() for value in metric.compute().values())
    metric.cam_extractor.maps = [torch.ones(2, 2)]
    metric.update(torch.ones(2, 1, 2))
    metric.summary()
    metric.reset()
    assert set(states(metric).values()) == {0.0}
    with pytest.raises(AssertionError, match="you need to update"):
        metric.summary()


# No trace.


class Raising(GradCAM):
    def _get_weights(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        raise ZeroDivisionError("the extractor")


@pytest.mark.parametrize("new", METRICS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ["normal", "smooth", "foreign", "extractor", "first", "second", "logits_fn", "class"])
def test_no_trace(new: Any, mode: Any, case: str) -> None:
    model = cnn()
    model[1].eval()  # a model that is partly in evaluation mode
    model(images(1)).sum().backward()
    x = images()
    calls: list[int] = []

    def count(_module: nn.Module, _args: Any, output: Tensor) -> None:
        calls.append(len(output))
        if len(calls) == {"first": 1, "second": 2}.get(case):
            raise ZeroDivisionError(case)

    def logits_fn(output: Tensor) -> Tensor:
        if case == "logits_fn":
            raise ZeroDivisionError(case)
        return output.softmax(-1)

    classes = {"smooth": SmoothGradCAMpp, "extractor": Raising}
    extractor = Backward(model, model[4]) if case == "foreign" else classes.get(case, GradCAM)(model, "4")
    metric = new(extractor, logits_fn)
    model[-1].register_forward_hook(count)
    with mode():
        before = snapshot(model), x.clone()
        if case in {"normal", "smooth", "foreign"}:
            metric.update(x)
            assert int(metric.total) == 3
        else:
            with pytest.raises((ZeroDivisionError, ValueError)):
                metric.update(x, 9 if case == "class" else 1)
            assert set(states(metric).values()) == {0.0}
        assert_same(before, (snapshot(model), x))


def test_what_extractors_have_recorded_stays_theirs() -> None:
    model, x = cnn().eval(), images()
    for new in METRICS:
        with GradCAM(model, "4") as measured, GradCAM(model, "0") as other, ScoreCAM(model, "0") as disabled:
            disabled.disable_hooks()
            scores = model(x)
            expected = [
                cam.clone() for extractor in (measured, other) for cam in extractor(0, scores, retain_graph=True)
            ]
            metric = new(measured)
            metric.update(images(2, seed=5))
            again = [cam for extractor in (measured, other) for cam in extractor(0, scores, retain_graph=True)]
            assert all(map(torch.equal, expected, again))
            metric = new(disabled)
            metric.update(x)
            with pytest.raises(AssertionError, match="no forward pass"):
                disabled(0)


@pytest.mark.parametrize("new", METRICS)
def test_no_older_pass_is_explained(new: Any) -> None:
    model = cnn().eval()
    extractor = GradCAM(model, "4")
    model(images())
    extractor.remove_hooks()
    with pytest.raises(AssertionError, match="no forward pass has reached"):
        new(extractor).update(images())


def test_only_the_head_keeps_a_graph() -> None:
    model = cnn()
    graphs = []
    model[0].register_forward_hook(lambda _m, _a, output: graphs.append(output.requires_grad))
    with GradCAM(model, "4") as extractor:
        ClassificationMetric(extractor).update(images())
    assert graphs == [False, False, False]  # the explained pass, two masked ones


# What others bring.


def test_third_party_extractor() -> None:
    """One that hooks the model and calls ``backward()`` gets the numbers of ours, whatever the grad mode."""
    ours, theirs = cnn(), cnn()
    foreign = Backward(theirs, theirs[4])
    for new in METRICS:
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with GradCAM(ours, "4") as extractor, mode():
                expected, metric = new(extractor, SOFTMAX), new(foreign, SOFTMAX)
                x = images()
                for each in (expected, metric):
                    each.update(x, [2, 1, 0])
            assert states(metric) == pytest.approx(states(expected), rel=1e-9)


def test_third_party_wrapper_of_an_extractor_of_ours() -> None:
    class Wrapper(Given):
        def __init__(self, inner: GradCAM) -> None:
            super().__init__(inner.model)
            self.inner = inner

        def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            return self.inner(*args, **kwargs)

    with GradCAM(cnn(), "4") as extractor:
        metric, expected = ClassificationMetric(Wrapper(extractor)), ClassificationMetric(extractor)
        for each in (metric, expected):
            each.update(images())
    assert states(metric) == pytest.approx(states(expected), rel=1e-12)


def test_maps_are_resized_and_fused() -> None:
    maps = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 0.0]])]
    metric = ClassificationMetric(Given(Line(), *maps))
    metric.update(torch.tensor([[[1.0, 1.0, 1.0, 1.0]]]))
    mask = [0.25, 0.4375, 0.8125, 1.0]  # 0.25 and 1, linearly upsampled to four
    assert metric.drop.item() == pytest.approx((4 - sum(mask)) / 4)


@pytest.mark.parametrize("new", METRICS)
def test_half_precision(new: Any) -> None:
    model = cnn(dtype=torch.bfloat16)
    with GradCAM(model, "4") as extractor:
        metric, expected = new(extractor, SOFTMAX), new(GradCAM(reference := cnn(), "4"), SOFTMAX)
        metric.update(images().bfloat16(), 1)
        expected.update(images(), 1)
    assert len(list(reference.children())) == 8
    assert states(metric) == pytest.approx(states(expected), rel=0.1, abs=0.1)


# As torchmetrics has it.


@pytest.mark.parametrize("new", METRICS)
def test_the_model_is_no_part_of_the_metric(new: Any) -> None:
    class Module(nn.Module, Given):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            return [torch.ones(3, 9, 7, dtype=torch.float64)]

    model, head = cnn(), nn.Linear(4, 4, dtype=torch.float64)
    for extractor in (GradCAM(model, "4"), Module(model)):
        metric = new(extractor, head)
        metric.persistent(True)
        assert list(metric.children()) == []
        assert list(metric.parameters()) == []
        assert all(value.ndim == 0 for value in metric.state_dict().values())
        before = snapshot(model)
        metric.eval().train().half().to(torch.float32)
        metric.to("meta")
        nn.ModuleList([metric]).to(torch.float16)
        metric.requires_grad_(False)
        assert_same(before, snapshot(model))
        assert head.weight.dtype == torch.float64
        assert head.weight.requires_grad


@pytest.mark.parametrize("new", METRICS)
@pytest.mark.parametrize("duplicate", [lambda m: m.clone(), copy.deepcopy, copy.copy])
def test_copies_share_the_extractor(new: Any, duplicate: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = new(extractor, SOFTMAX)
        metric.update(images(2))
        copied = duplicate(metric)
        assert copied.cam_extractor is extractor
        assert copied.logits_fn is SOFTMAX
        kept = states(metric)
        copied.update(images(1, seed=1))
        assert states(metric) == kept
        metric.update(images(1, seed=1))
        assert states(copied) == pytest.approx(states(metric))
        assert int(copied.total) == 3


@pytest.mark.parametrize("new", METRICS)
def test_pickle_has_the_numbers_and_no_extractor(new: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = new(extractor, SOFTMAX)
        metric.update(images(2))
        loaded = pickle.loads(pickle.dumps(metric))
        assert states(loaded) == states(metric)
        assert loaded.summary() == metric.summary()
        with pytest.raises(RuntimeError, match="was unpickled and has no extractor"):
            loaded.update(images())
        other = new(extractor, SOFTMAX)
        other.update(images(1, seed=1))
        other.merge_state(loaded)
        metric.update(images(1, seed=1))
        assert states(other) == pytest.approx(states(metric))


def test_the_metric_does_not_outlive_its_use() -> None:
    model = cnn()
    metric = ClassificationMetric(GradCAM(model, "4"))
    metric.update(images())
    dead = weakref.ref(model)
    del model, metric
    gc.collect()  # torchmetrics' wrappers of `update` and `compute` are cycles
    assert dead() is None


@pytest.mark.parametrize("new", METRICS)
def test_forward_gives_the_batch_and_accumulates(new: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric, once, both = (new(extractor, SOFTMAX) for _ in range(3))
        once.update(images(1, seed=1))
        for seed, size in ((0, 2), (1, 1)):
            both.update(images(size, seed=seed))
            batch = metric(images(size, seed=seed))
        assert batch == once.compute()
        assert states(metric) == pytest.approx(states(both))


@pytest.mark.parametrize("new", METRICS)
def test_update_and_reset_in_inference_mode_and_out_of_it(new: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric, expected = new(extractor), new(extractor)
        for _ in range(2):
            expected.update(images())
        with torch.inference_mode():
            metric.update(images())
            metric.reset()
            metric.update(images())
        metric.update(images())
    assert states(metric) == pytest.approx(states(expected))


def test_collection() -> None:
    model = cnn()
    with GradCAM(model, "4") as extractor:
        collection = MetricCollection([new(extractor, SOFTMAX) for new in METRICS], prefix="val_")
        collection.update(images(), class_idx=1)
        collection.clone().update(images())
        values = collection.compute()
        expected = {}
        for new in METRICS:
            metric = new(extractor, SOFTMAX)
            metric.update(images(), class_idx=1)
            expected |= {f"val_{key}": value for key, value in metric.compute().items()}
        assert values == expected
        assert len(values) == 6
        collection.reset()
        assert collection(images(), targets=lambda p: p[1]) == expected
        assert collection.state_dict() == {}


def test_metrics_in_a_collection_are_never_merged() -> None:
    model = Line()
    first = Given(model, torch.tensor([[1.0, 1.0]]))
    second = Given(model, torch.tensor([[1.0, 1.0]]))
    collection = MetricCollection({"a": ClassificationMetric(first), "b": ClassificationMetric(second)})
    x = torch.tensor([[[1.0, 3.0]]])
    collection.update(x)  # equal so far
    second.maps = [torch.tensor([[1.0, 0.0]])]
    collection.update(x)
    values = collection.compute()
    assert len(values) == 8
    assert values["a_avg_drop"].item() == 0
    assert values["b_avg_drop"].item() == pytest.approx(0.375)


def test_directions() -> None:
    for new in METRICS:
        metric = new(Given(Line(), torch.ones(1, 2)))
        metric.update(torch.ones(1, 1, 2))
        assert metric.is_differentiable is False
        assert metric.full_state_update is False
        assert metric.higher_is_better is None
        assert list(metric.key_higher_is_better) == list(metric.compute())
        with pytest.raises(AttributeError, match="higher_is_better"):
            MetricTracker(metric)
    metric.reset()
    tracker = MetricTracker(metric, maximize=True)
    for maps in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])):
        tracker.increment()
        metric.cam_extractor.maps = [maps]
        tracker.update(torch.tensor([[[1.0, 3.0]]]))
    # Scores 4, 3, 0, then 4, 1, 0.
    assert tracker.compute_all()["deletion_auc"].tolist() == pytest.approx([(2 + 3 + 0) / 2, (2 + 1 + 0) / 2])


def test_devices(device: torch.device) -> None:
    with GradCAM(cnn(device=device), "4") as extractor:
        here, there = ClassificationMetric(extractor), ClassificationMetric(extractor).to(device)
        for metric in (here, there):
            metric.update(images(device=device))
    assert here.drop.device.type == "cpu"
    assert there.drop.device.type == device.type
    assert there.drop.dtype == torch.float64
    assert states(here) == pytest.approx(states(there))


# Across processes.


def sharded(new: Any, extractor: Any, rank: int) -> Any:
    """The metric of one of two uneven shards, one with a sample that does not count."""
    metric = new(extractor)
    extractor.maps = [torch.tensor([[1.0, 0.0, 0.5]])]
    for number in range(5):
        if number in ((0, 1, 2, 3), (4,))[rank]:
            x = torch.tensor([[[1.0 + number, 2.0, torch.nan if number == 1 else 4.0]]])
            metric.update(x)
    return metric


def process(rank: int, store: str) -> list[dict[str, float]]:
    """What one of two processes computes."""
    timeout = timedelta(seconds=240)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    try:
        extractor, seen = Given(Line()), []
        for new in METRICS:
            metric = sharded(new, extractor, rank)
            before = states(metric)
            seen += [metric.summary(), {key: value.item() for key, value in metric.compute().items()}]
            assert states(metric) == before  # unsynced again
            lonely = new(extractor)  # one process has no samples at all
            if rank == 1:
                lonely.update(torch.tensor([[[1.0, 2.0, 4.0]]]))
            seen.append(lonely.summary())
            with pytest.raises(AssertionError, match="you need to update"):
                new(extractor).summary()
        return seen
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    store = str(tmp_path / "store")
    code = (
        "import sys, torch; torch.set_num_threads(1); import test_metrics\n"
        f"sys.stdout.write(repr(test_metrics.process(1, {store!r})))"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        seen = process(0, store)
        output, errors = other.communicate(timeout=240)
    finally:
        other.kill()
    assert other.returncode == 0, errors
    assert repr(seen) == output

    extractor, expected = Given(Line()), []
    for new in METRICS:
        metric, rest = (sharded(new, extractor, rank) for rank in range(2))
        metric.merge_state(rest)
        assert (int(metric.total), int(metric.nan_count)) == (4, 1)
        lonely = new(extractor)
        lonely.update(torch.tensor([[[1.0, 2.0, 4.0]]]))
        values = {key: value.item() for key, value in metric.compute().items()}
        expected += [metric.summary(), values, lonely.summary()]
    for found, single in zip(seen, expected, strict=True):
        assert found == pytest.approx(single, rel=1e-12, nan_ok=True)
