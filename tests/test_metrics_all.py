"""What holds for every metric: batches, chunks, given maps, broken samples, no trace, torchmetrics' ways."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.metrics_under_test import (
    SOFTMAX,
    Backward,
    assert_close,
    assert_same,
    cnn,
    images,
    snapshot,
    states,
)
from torchcam import methods, metrics
from torchcam.methods import (
    EigenCAM,
    FinerCAM,
    FullGrad,
    GradCAM,
    GuidedBackprop,
    LayerCAM,
    RefineCAM,
    ScoreCAM,
)
from torchcam.metrics import (
    ADCC,
    ARCC,
    ROAD,
    ClassificationMetric,
    DeletionInsertionMetric,
    Localization,
    SanityCheck,
    Sensitivity,
)


class Located(Localization):
    """The metric with the bright part of the input as the evidence, so that it is called as the others are."""

    def update(self, input_tensor: Tensor, class_idx: Any = None, **kwargs: Any) -> None:
        super().update(input_tensor, class_idx, masks=input_tensor[:, 0] > 0, **kwargs)


METRICS: dict[str, Callable[..., Any]] = {
    "ClassificationMetric": ClassificationMetric,
    "DeletionInsertionMetric": partial(DeletionInsertionMetric, steps=3, batch_size=4),
    "ROAD": partial(ROAD, percentiles=(30, 70), batch_size=5),
    "ADCC": partial(ADCC, batch_size=2),
    "ARCC": partial(ARCC, percentiles=(40,), batch_size=2),
    "Localization": partial(Located, tolerance=1),
    "SanityCheck": partial(SanityCheck, layers=["7", "4"], batch_size=2),
    "Sensitivity": partial(Sensitivity, num_samples=2, num_perturbations=3, batch_size=4),
}
EXPLAIN_AGAIN = {"ADCC", "ARCC", "SanityCheck", "Sensitivity"}
MASK = {"ClassificationMetric", "ADCC", "ARCC", "SanityCheck"}
CHUNKED = METRICS.keys() - {"ClassificationMetric", "Localization"}

each = pytest.mark.parametrize("name", METRICS)


def test_all_metrics_are_here() -> None:
    assert set(metrics.__all__) == set(METRICS)


@each
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_batch_is_its_samples(name: str, dim: int, device: torch.device) -> None:
    with GradCAM(cnn(dim, device), "4") as extractor:
        whole, parts = (METRICS[name](extractor, SOFTMAX) for _ in range(2))
        x = images(3, dim, device)
        whole.update(x, [1, 0, 3])
        for sample, class_idx in zip(x.split(1), (1, 0, 3), strict=True):
            parts.update(sample, class_idx)
    assert (int(whole.total), int(whole.nan_count)) == (3, 0)
    assert_close(states(parts), states(whole))
    assert any(np.any(np.array(value) != 0) for key, value in states(whole).items() if key != "total")


@pytest.mark.parametrize("name", sorted(CHUNKED))
def test_size_of_chunks(name: str) -> None:
    model, sizes = cnn(), []
    model.register_forward_hook(lambda _m, _a, output: sizes.append(len(output)))
    with GradCAM(model, "4") as extractor:
        found = []
        for batch_size in (1, 2, 5, 1000):
            metric = METRICS[name](extractor, SOFTMAX, batch_size=batch_size)
            sizes.clear()
            metric.update(images(), 2)
            assert sizes[0] == 3
            assert max(sizes[1:]) <= batch_size
            found.append((states(metric), sum(sizes)))
    for values, passed in found[1:]:
        assert_close(values, found[0][0])
        assert passed == found[0][1]


@each
def test_ways_to_name_the_score(name: str) -> None:
    x = images()
    with GradCAM(cnn(), "4") as extractor:

        def measure(**score: Any) -> dict[str, Any]:
            metric = METRICS[name](extractor, SOFTMAX)
            metric.update(x, **score)
            return states(metric)

        predicted = cnn().eval()(x).argmax(1)
        assert_close(measure(), measure(class_idx=predicted))
        assert_close(measure(class_idx=[3, 0, 1]), measure(class_idx=torch.tensor([3, 0, 1])))
        assert_close(measure(class_idx=2), measure(targets=lambda p: p[2]))
        mixed = [lambda p: p[3], lambda p: p[0], lambda p: p[1]]
        assert_close(measure(class_idx=[3, 0, 1]), measure(targets=mixed))
        assert measure(class_idx=2) != measure(class_idx=[3, 0, 1])
        with pytest.raises(ValueError, match="exactly one of class_idx or targets, got both"):
            measure(class_idx=2, targets=mixed)
        with pytest.raises(ValueError, match=r"one map of each sample.*2 scores"):
            measure(class_idx=[[0, 1], [1, 2], [0, 3]])


# Extractors.

EXTRACTORS: dict[str, Callable[[nn.Module], Any]] = {
    "RefineCAM": lambda model: RefineCAM(model, ["0", "4"]),
    "FinerCAM": lambda model: FinerCAM(model, "4"),
    "LayerCAM": lambda model: LayerCAM(model, ["0", "4"]),
    "ScoreCAM": lambda model: ScoreCAM(model, "4"),
    "EigenCAM": lambda model: EigenCAM(model, "4"),
    "GuidedBackprop": GuidedBackprop,
    "FullGrad": FullGrad,
}


@each
@pytest.mark.parametrize("method", EXTRACTORS)
def test_any_extractor(name: str, method: str) -> None:
    """A metric of an extractor is that of the fused maps which it gives, wherever these are enough."""
    model, x = cnn().eval(), images(2)
    with EXTRACTORS[method](model) as extractor:
        metric, given = (METRICS[name](extractor) for _ in range(2))
        metric.update(x, [3, 1])
        assert (int(metric.total), int(metric.nan_count)) == (2, 0)
        scores = model(x)
        maps = extractor.fuse_cams(extractor([3, 1], scores))
        if method == "GuidedBackprop":  # one of every channel
            middle = maps.flatten(1).sort(1).values[:, (maps[0].numel() - 1) // 2]
            maps = (maps - middle[:, None, None, None]).abs().amax(1)
            maps = maps / maps.amax((1, 2), keepdim=True)
        given.update(x, [3, 1], maps=maps)
    assert_close(states(given), states(metric))


@pytest.mark.parametrize("name", ["ADCC", "ClassificationMetric"])
@pytest.mark.parametrize("method", ["GradCAM", "ScoreCAM", "AblationCAM", "ReciproCAM"])
def test_maps_explain_the_score_after_logits_fn(name: str, method: str) -> None:
    """As if ``logits_fn`` was the last module of the model, also where the method runs it again."""
    model, x = cnn().eval(), images(2)
    whole = nn.Sequential(*model, nn.Softmax(-1))
    found = []
    for subject, logits_fn in ((model, SOFTMAX), (whole, None)):
        with getattr(methods, method)(subject, "4") as extractor:
            metric = METRICS[name](extractor, logits_fn)
            metric.update(x, [3, 1])
            found.append(states(metric))
    assert_close(*found)


@each
def test_third_party_extractor(name: str) -> None:
    """One that hooks the model and calls ``backward()`` gets the numbers of ours, whatever the grad mode."""
    ours, theirs = cnn(), cnn()
    foreign = Backward(theirs, theirs[4])
    before = snapshot(theirs)
    for mode in (torch.enable_grad, torch.inference_mode):
        with GradCAM(ours, "4") as extractor, mode():
            expected, metric = METRICS[name](extractor, SOFTMAX), METRICS[name](foreign, SOFTMAX)
            x = images()
            for measured in (expected, metric):
                measured.update(x, [2, 1, 0])
        assert_close(states(metric), states(expected), rel=1e-6)
    assert_same(before, snapshot(theirs))


# Maps that are given.


@each
def test_given_maps_need_no_extractor(name: str) -> None:
    """Maps from elsewhere are scored as they are, at their own resolution, and the extractor is not asked for any."""

    class Silent(GradCAM):
        def compute_cams(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            raise AssertionError("the maps were given")

    x = images()
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with GradCAM(cnn(), "4") as extractor, Silent(cnn(), "4") as silent:
        found = []
        for source, given in (
            (extractor, maps),
            (extractor, maps.unsqueeze(1)),
            (silent, maps.numpy()),
            (cnn(), maps),
        ):
            if name in EXPLAIN_AGAIN and source is not extractor:
                continue
            metric = METRICS[name](source, SOFTMAX)
            metric.update(x, [1, 0, 3], maps=given)
            found.append(states(metric))
        own = METRICS[name](extractor, SOFTMAX)
        own.update(x, [1, 0, 3])
    for values in found[1:]:
        assert_close(values, found[0])
    assert found[0]["total"] == 3
    assert found[0] != states(own)


@each
def test_maps_that_do_not_fit(name: str) -> None:
    x = images()
    with GradCAM(cnn(), "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        for shape in ((2, 4, 5), (3, 4), (3, 2, 4, 5), (3, 0, 5)):
            with pytest.raises(ValueError, match=r"`maps` must hold one map for each of 3 samples.*got shape \("):
                metric.update(x, maps=torch.ones(shape))
        with pytest.raises(TypeError, match=r"`maps` must be a tensor or an array.*got list"):
            metric.update(x, maps=[[1.0]])
        for bad in (torch.full((3, 4, 5), 1.5), torch.full((3, 4, 5), -0.5)):
            if name in MASK:
                with pytest.raises(ValueError, match=r"`maps` must lie in \[0, 1\]"):
                    metric.update(x, maps=bad)
        assert set(np.concatenate([np.ravel(value) for value in states(metric).values()])) == {0}


@each
def test_without_an_extractor(name: str) -> None:
    if name in EXPLAIN_AGAIN:
        with pytest.raises(TypeError, match=r"given maps are not enough: `cam_extractor`.*GradCAM.*got Sequential"):
            METRICS[name](cnn())
        return
    model = cnn()
    metric = METRICS[name](model)
    assert metric.model is model
    with pytest.raises(RuntimeError, match=r"with a Sequential, a model and no extractor: give `maps`"):
        metric.update(images())
    with pytest.raises(RuntimeError, match="no extractor"):
        _ = metric.cam_extractor
    with pytest.raises(TypeError, match=r"`cam_extractor`.*: str lacks model, fuse_cams, __call__"):
        METRICS[name]("layer4")


# Samples without a finite map or score.


@each
def test_samples_with_nan_are_counted(name: str) -> None:
    x = images()
    x[1, 0, 0, 0] = torch.nan
    with GradCAM(cnn(), "4") as extractor:
        metric, finite = METRICS[name](extractor), METRICS[name](extractor)
        finite.update(x[[0, 2]], [0, 2])
        with pytest.warns(RuntimeWarning, match="layer '4'"):
            metric.update(x, [0, 1, 2])
    assert (int(metric.total), int(metric.nan_count)) == (2, 1)
    metric.nan_count.zero_()
    assert_close(states(metric), states(finite))


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_maps_that_were_given(name: str, bad: float) -> None:
    x, maps = images(), torch.rand(3, 9, 7)
    maps[1, 3, 3] = bad
    with GradCAM(cnn(), "4") as extractor:
        metric, finite = METRICS[name](extractor), METRICS[name](extractor)
        metric.update(x, [0, 1, 2], maps=maps)
        finite.update(x[[0, 2]], [0, 2], maps=maps[[0, 2]])
    assert (int(metric.total), int(metric.nan_count)) == (2, 1)
    metric.nan_count.zero_()
    assert_close(states(metric), states(finite))


@each
def test_summary_needs_samples(name: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        with pytest.raises(AssertionError, match=r"^you need to update the metric before getting the summary$"):
            metric.summary()
        metric.update(images(), maps=torch.full((3, 9, 7), torch.nan))
        with pytest.raises(AssertionError, match="before getting the summary; all 3 samples were left out"):
            metric.summary()
        assert all(value.isnan() for value in metric.compute().values())
        metric.update(images())
        summary, values = metric.summary(), metric.compute()
        assert all(summary[key] == values[key].item() for key in summary)
        metric.reset()
        assert set(np.concatenate([np.ravel(value) for value in states(metric).values()])) == {0}


# No trace.


@each
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("raises_at", [None, 1, 2, 3])
def test_no_trace(name: str, mode: Any, raises_at: int | None) -> None:
    model = cnn()
    model[1].eval()  # a model that is partly in evaluation mode
    model(images(1)).sum().backward()
    parameters, x, calls = list(model.parameters()), images(), []

    def count(_module: nn.Module, _args: Any, output: Tensor) -> None:
        calls.append(len(output))
        if len(calls) == raises_at:
            raise ZeroDivisionError("the model")

    with GradCAM(model, "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        model[-1].register_forward_hook(count)
        with mode():
            before = snapshot(model), x.clone()
            if raises_at is None or (name == "Localization" and raises_at > 1):
                metric.update(x)
                assert int(metric.total) == 3
            else:
                with pytest.raises(ZeroDivisionError, match="the model"):
                    metric.update(x, 1)
                assert set(np.concatenate([np.ravel(value) for value in states(metric).values()])) == {0}
            assert_same(before, (snapshot(model), x))
    assert all(map(lambda a, b: a is b, parameters, model.parameters()))


@each
def test_what_extractors_have_recorded_stays_theirs(name: str) -> None:
    model, x = cnn().eval(), images()
    with GradCAM(model, "4") as measured, GradCAM(model, "0") as other:
        scores = model(x)
        expected = [cam.clone() for each in (measured, other) for cam in each(0, scores, retain_graph=True)]
        METRICS[name](measured).update(images(2, seed=5))
        again = [cam for each in (measured, other) for cam in each(0, scores, retain_graph=True)]
        assert all(map(torch.equal, expected, again))


# As torchmetrics has it.


@each
@pytest.mark.parametrize("duplicate", [lambda m: m.clone(), copy.deepcopy, copy.copy])
def test_copies_share_the_extractor(name: str, duplicate: Any) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        metric.update(images(2))
        copied, kept = duplicate(metric), states(metric)
        assert copied.cam_extractor is extractor
        copied.update(images(1, seed=1))
        assert states(metric) == kept
        metric.update(images(1, seed=1))
        assert_close(states(copied), states(metric))


@each
def test_pickle_and_merge(name: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric, other = METRICS[name](extractor, SOFTMAX), METRICS[name](extractor, SOFTMAX)
        metric.update(images(2))
        loaded = pickle.loads(pickle.dumps(metric))
        assert loaded.summary() == metric.summary()
        with pytest.raises(RuntimeError, match="was unpickled and has no extractor"):
            loaded.update(images())
        other.update(images(1, seed=1))
        other.merge_state(loaded)
        metric.update(images(1, seed=1))
        assert_close(states(other), states(metric))


@each
def test_forward_gives_the_batch_and_accumulates(name: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric, once, both = (METRICS[name](extractor, SOFTMAX) for _ in range(3))
        once.update(images(1, seed=1))
        for seed, size in ((0, 2), (1, 1)):
            both.update(images(size, seed=seed))
            batch = metric(images(size, seed=seed))
        assert batch == once.compute()
        assert_close(states(metric), states(both))


def test_collection() -> None:
    """One call updates them all; each takes of the arguments what it knows."""
    with GradCAM(cnn(), "4") as extractor:
        known = {**METRICS, "Localization": Localization}
        collection = MetricCollection({name: known[name](extractor, SOFTMAX) for name in known})
        masks = images()[:, 0] > 0
        collection.update(images(), class_idx=1, masks=masks)
        values = collection.compute()
        for name, new in known.items():
            metric = new(extractor, SOFTMAX)
            metric.update(images(), 1, **({"masks": masks} if name == "Localization" else {}))
            for key, value in metric.compute().items():
                found = next(values[full] for full in (f"{name}_{key}", key) if full in values)
                assert torch.equal(found, value), (name, key)
        assert len(values) == sum(len(metric.key_bounds) for metric in collection.values())


@each
def test_directions_and_bounds(name: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        metric.update(images(8))
        values = metric.compute()
    assert list(values) == list(metric.key_higher_is_better) == list(metric.key_bounds)
    directions = set(metric.key_higher_is_better.values())
    assert metric.higher_is_better == (directions.pop() if len(directions) == 1 else None)
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    for key, (lowest, highest) in metric.key_bounds.items():
        assert lowest <= values[key].item() <= highest
        assert metric.plot_lower_bound is None or metric.plot_lower_bound <= lowest
        assert metric.plot_upper_bound is None or metric.plot_upper_bound >= highest


@each
def test_plot(name: str) -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = METRICS[name](extractor, SOFTMAX)
        metric.update(images())
    values = metric.compute()
    _, axes = metric.plot()
    drawn = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines() if line.get_label() in values}
    assert drawn == pytest.approx({key: value.item() for key, value in values.items()})
    _, (given, axes) = pyplot.subplots(1, 2)
    assert metric.plot([values, values, values], ax=axes)[1] is axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert all(len(lines[key].get_ydata()) == 3 for key in values)
    assert not given.get_lines()
    pyplot.close("all")


@each
def test_half_precision(name: str) -> None:
    x = images()
    with GradCAM(cnn(dtype=torch.bfloat16), "4") as extractor, GradCAM(cnn(), "4") as exact:
        metric, expected = METRICS[name](extractor, SOFTMAX), METRICS[name](exact, SOFTMAX)
        metric.update(x.bfloat16(), 1)
        expected.update(x.bfloat16().double(), 1)
    assert int(metric.total) == 3
    for key, value in metric.compute().items():
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(expected.compute()[key].item(), rel=0.1, abs=0.1), key


# Across processes.


def shard(name: str, rank: int) -> Any:
    """The metric of one of two uneven shards, one with a sample that does not count."""
    x, maps = images(5, seed=3), torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0))
    maps[2] = torch.nan
    metric = METRICS[name](GradCAM(cnn(), "4"), SOFTMAX)
    part = (slice(0, 4), slice(4, 5))[rank]
    metric.update(x[part], 1, maps=maps[part])
    return metric


def process(rank: int, store: str) -> list[dict[str, float]]:
    """What one of two processes computes."""
    timeout = timedelta(seconds=240)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    try:
        seen = []
        for name in METRICS:
            metric = shard(name, rank)
            before = states(metric)
            seen.append({key: value.item() for key, value in metric.compute().items()})
            assert states(metric) == before  # unsynced again
            if isinstance(metric, SanityCheck):
                seen += metric.by_layer().values()
        return seen
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    store = str(tmp_path / "store")
    code = (
        "import sys, torch; torch.set_num_threads(1); from tests import test_metrics_all\n"
        f"sys.stdout.write(repr(test_metrics_all.process(1, {store!r})))"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        seen = process(0, store)
        output, errors = other.communicate(timeout=240)
    finally:
        other.kill()
    assert other.returncode == 0, errors
    assert repr(seen) == output
    expected = []
    for name in METRICS:
        metric, rest = (shard(name, rank) for rank in range(2))
        metric.merge_state(rest)
        assert (int(metric.total), int(metric.nan_count)) == (4, 1)
        expected.append({key: value.item() for key, value in metric.compute().items()})
        if isinstance(metric, SanityCheck):
            expected += metric.by_layer().values()
    for found, single in zip(seen, expected, strict=True):
        assert found == pytest.approx(single, rel=1e-12, nan_ok=True)
