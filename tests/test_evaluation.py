"""Evaluations: the numbers, the batches, going on after an interruption, several processes, the table."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric

import torchcam
from tests.test_files import full_disk
from torchcam import evaluate
from torchcam.evaluation import Evaluation, MethodResult, discard_checkpoint
from torchcam.evaluation._checkpoint import Checkpoint, checksum, describe
from torchcam.evaluation._data import Stream
from torchcam.methods import GradCAM, LayerCAM, RandomCAM
from torchcam.metrics import ARCC, ROAD, ClassificationMetric, DeletionInsertionMetric, Localization, Sensitivity

softmax = partial(torch.softmax, dim=1)
METHODS = ("GradCAM", "LayerCAM", "RandomCAM")
METRICS = (ClassificationMetric, partial(DeletionInsertionMetric, steps=4))
COUNT, SIZE = 7, 2


def make_model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()


class Noise(Dataset[tuple[Tensor, int]]):
    """Images of noise; remembers which were taken."""

    def __init__(self, count: int = COUNT) -> None:
        self.images = torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(1))
        self.labels = [index % 4 for index in range(count)]
        self.taken: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.taken.append(index)
        return self.images[index], self.labels[index]


def make_loader(count: int = COUNT, **options: Any) -> DataLoader[Any]:
    return DataLoader(Noise(count), batch_size=SIZE, **options)


def run(loader: Any = None, **options: Any) -> Evaluation:
    options = {"methods": METHODS, "metrics": METRICS, "target_layer": "5", "logits_fn": softmax, **options}
    return evaluate(options.pop("model", None) or make_model(), make_loader() if loader is None else loader, **options)


def numbers(result: Evaluation) -> dict[str, Any]:
    """All that has to be the same in every run: everything but the seconds."""
    found = {name: (m.values, m.measured, m.left_out, m.empty, m.nan_maps) for name, m in result.methods.items()}
    return {"methods": found, "num_samples": result.num_samples, "agreement": result.agreement}


def saved_state(path: Path) -> dict[str, Any]:
    """The state in a file of a checkpoint."""
    return torch.load(io.BytesIO(path.read_bytes().partition(b"\n")[2]), weights_only=True)


def make_function(number: int) -> Any:
    """A function without a name of its own."""
    return lambda x: x * number


class Broken(LayerCAM):
    """Gives one map of NaN in the whole data set: that of the sample with the label 3."""

    def compute_cams(self, class_idx: Any = None, *args: Any, **kwargs: Any) -> list[Tensor]:
        (cam,) = super().compute_cams(class_idx, *args, **kwargs)
        cam[torch.tensor(class_idx) == 3] = math.nan
        return [cam]


class Positive(Metric):
    """A metric as others write them: no `maps`, one number, no direction."""

    total: Tensor
    higher_is_better = None

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, input_tensor: Tensor, class_idx: list[int]) -> None:
        scores = self.extractor.model(input_tensor)
        (cam,) = self.extractor(class_idx, scores)
        self.total += (cam > 0.5).sum()

    def compute(self) -> Tensor:
        return self.total


class TestNumbers:
    def test_are_those_of_the_metrics_alone(self) -> None:
        result = run()
        model = make_model()
        for name in METHODS:
            method = getattr(torchcam.methods, name)
            with method(model, "5") as extractor:
                metrics = [
                    ClassificationMetric(extractor, softmax),
                    DeletionInsertionMetric(extractor, softmax, steps=4),
                ]
                for image, labels in make_loader():
                    for metric in metrics:
                        metric.update(image, labels)
            for metric in metrics:
                for key, value in metric.compute().items():
                    assert result[name, key] == pytest.approx(float(value), abs=1e-7)
                    assert result[name, f"{type(metric).__name__}.{key}"] == result[name, key]
        assert result.num_samples == COUNT
        with torch.no_grad():
            predicted = model(Noise().images).argmax(1).tolist()
        assert result.agreement == pytest.approx(
            sum(a == b for a, b in zip(predicted, Noise().labels, strict=True)) / COUNT
        )
        assert all(m.measured == dict.fromkeys(m.values, COUNT) for m in result.methods.values())
        assert all(0 < m.seconds < 10 for m in result.methods.values())

    def test_methods_and_metrics_in_every_form(self) -> None:
        model = make_model()
        with GradCAM(model, "5") as own:
            result = run(
                model=model,
                methods={
                    "name": "Grad-CAM",
                    "class": GradCAM,
                    "partial": partial(GradCAM, target_layer="5"),
                    "function": lambda m: GradCAM(m, "5"),
                    "object": own,
                    "other layer": partial(GradCAM, target_layer="2"),
                },
                metrics={"name": "classification", "class": ClassificationMetric, "own": Positive},
            )
            assert len(own.hook_handles) == 1, "an extractor that was given stays on the model"
        assert len({json.dumps(dict(result.methods[name].values)) for name in list(result.methods)[:5]}) == 1
        first = result.methods["name"].values
        assert first["name"] == first["class"]
        assert set(first["own"]) == {"own"}
        with GradCAM(model, "5") as extractor:
            expected = sum(float((extractor(labels, model(images))[0] > 0.5).sum()) for images, labels in make_loader())
        assert first["own"]["own"] == expected > 0
        assert result.higher_is_better["own"] == {"own": None}
        assert result.methods["other layer"].values["class"] != first["class"]

    def test_each_map_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        compute = GradCAM.compute_cams
        monkeypatch.setattr(GradCAM, "compute_cams", lambda *a, **k: calls.append(1) or compute(*a, **k))
        run(methods=[GradCAM], metrics=[*METRICS, "ROAD"])
        assert len(calls) == 4, "one call for each batch"

    def test_a_metric_with_another_logits_fn_gets_maps_of_its_own(self) -> None:
        raw = run(logits_fn=None, methods=[GradCAM], metrics=[ClassificationMetric])
        mixed = run(
            methods=[GradCAM],
            metrics={"with": ClassificationMetric, "without": lambda extractor: ClassificationMetric(extractor, None)},
        )
        assert mixed["GradCAM", "without.avg_drop"] == pytest.approx(raw["GradCAM", "avg_drop"], abs=1e-7)
        assert mixed["GradCAM", "with.avg_drop"] == pytest.approx(run()["GradCAM", "avg_drop"], abs=1e-7)
        assert abs(mixed["GradCAM", "with.avg_drop"] - mixed["GradCAM", "without.avg_drop"]) > 1e-3

    def test_predicted_classes(self) -> None:
        model = make_model()
        predicted = model(Noise().images).argmax(1)
        named = run([(Noise().images, predicted)], methods=["GradCAM"])
        for loader in ([Noise().images], [(Noise().images,)], [(Noise().images, torch.zeros(COUNT, dtype=torch.long))]):
            assert numbers(run(loader, methods=["GradCAM"], class_source="predicted")) == numbers(named)
        assert named.agreement == 1
        for again in (pickle.loads(pickle.dumps(named)), copy.deepcopy(named)):
            assert again.to_json() == named.to_json()

    def test_what_else_a_batch_names_goes_to_the_metrics_that_take_it(self) -> None:
        masks = Noise().images[:, 0] > 0.5
        masks[2] = False
        options: dict[str, Any] = {"methods": ["GradCAM"], "metrics": ["Localization", "classification"]}
        images, labels = Noise().images, torch.tensor(Noise().labels)
        tuples = run([(images, labels, {"masks": masks, "path": ["x"] * COUNT})], **options)
        mapping = run([{"image": images, "label": labels, "masks": masks}], **options)
        assert numbers(tuples) == numbers(mapping)
        with GradCAM(make_model(), "5") as extractor:
            metric = Localization(extractor, softmax)
            metric.update(images, labels, masks=masks)
        assert tuples["GradCAM", "energy"] == pytest.approx(float(metric.compute()["energy"]), abs=1e-7)
        assert tuples.methods["GradCAM"].empty == {"Localization": 1}
        assert "GradCAM: Localization leaves out 1 of 7, their masks empty" in str(tuples)

    def test_maps_that_are_not_finite_are_counted_and_left_out(self) -> None:
        result = run(methods=["LayerCAM", Broken])
        assert result.methods["LayerCAM"].nan_maps == 0
        entry = result.methods["Broken"]
        assert Noise().labels.count(3) == 1
        assert (entry.nan_maps, set(entry.measured.values()), set(entry.left_out.values())) == (1, {COUNT - 1}, {1})
        kept = [index for index, label in enumerate(Noise().labels) if label != 3]
        rest = run([(Noise().images[kept], torch.tensor([Noise().labels[i] for i in kept]))], methods=["LayerCAM"])
        assert result["Broken", "avg_drop"] == pytest.approx(rest["LayerCAM", "avg_drop"], abs=1e-6)
        for text in (str(result), result.to_markdown()):
            assert "Broken: 1 of 7 maps are NaN; no metric includes them" in text
        (row,) = (row for row in csv.DictReader(io.StringIO(result.to_csv())) if row["method"] == "Broken")
        assert (row["nan_maps"], row["ClassificationMetric.left_out"], row["num_samples"]) == ("1", "1", "7")

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_in_every_mode_and_the_model_is_untouched(self, mode: Any) -> None:
        model = make_model().train()
        model[8].weight.grad = torch.ones_like(model[8].weight)
        before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
        batches = list(make_loader())  # making loaders draws from the global stream
        rng = torch.get_rng_state()
        with mode():
            result = run(batches, model=model)
        assert torch.equal(torch.get_rng_state(), rng)
        assert numbers(result) == numbers(run())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(model[8].weight.grad, torch.ones_like(model[8].weight))
        assert all(parameter.grad is None for parameter in model[0].parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_device(self) -> None:
        on_cuda = run(model=make_model().cuda())
        for name in METHODS:
            assert on_cuda[name, "avg_drop"] == pytest.approx(run()[name, "avg_drop"], abs=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"methods": ["GardCAM"]},
                ValueError,
                "`methods` names 'GardCAM', .* torchcam.methods; did you mean 'GradCAM'",
            ),
            (
                {"metrics": ["ROAR"]},
                ValueError,
                "`metrics` names 'ROAR', .* torchcam.metrics; did you mean 'ROAD'",
            ),
            ({"methods": []}, ValueError, "`methods` is empty"),
            ({"methods": [GradCAM, "grad-cam"]}, ValueError, "two entries named 'GradCAM': pass a dict"),
            ({"methods": [3]}, TypeError, "`methods` must hold names, classes, objects or functions"),
            ({"methods": [lambda m: 3]}, TypeError, "gives int, which is no extractor: it lacks model, fuse_cams"),
            ({"methods": {"a": lambda _: GradCAM(make_model(), "5")}}, ValueError, "'a' watches another model"),
            ({"metrics": [lambda e: 3]}, TypeError, "must make a torchmetrics.Metric, got int"),
            ({"metrics": Positive(None)}, TypeError, "each method needs one of its own"),
            ({"target_layer": "layer9"}, ValueError, "'layer9' is not a module"),
            ({"class_source": "both"}, ValueError, "`class_source` must be 'label' or 'predicted', got 'both'"),
            ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
            ({"logits_fn": 3}, TypeError, "`logits_fn` must be callable"),
            ({"distributed": True}, ValueError, "there is no process group"),
            ({"settings": {"a": object()}}, TypeError, "`settings` must be what a JSON file can hold"),
            ({"loader": 3}, TypeError, "`loader` must be an iterable of batches, got int"),
            ({"loader": []}, ValueError, "`loader` gives no batches"),
            ({"loader": [Noise().images]}, ValueError, "gives inputs without classes: pass class_source='predicted'"),
            ({"loader": [{"img": 1, "label": 2}]}, TypeError, r"got a mapping of \['img', 'label'\]"),
            ({"loader": [(1, 2, 3, 4)]}, TypeError, r"got a tuple of \(int, int, int, int\)"),
            (
                {"loader": [(Noise().images, torch.rand(COUNT))]},
                TypeError,
                "as integers, got a tensor of torch.float",
            ),
            ({"loader": [(Noise().images, [1, 2])]}, ValueError, r"one class for each of 7 inputs, got shape \(2,\)"),
            ({"loader": [(Noise().images, [9] * COUNT)]}, ValueError, "between 0 and 3"),
        ],
    )
    def test_say_what_to_do(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        model = make_model()
        with pytest.raises(error, match=message):
            run(model=model, **options)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_model_that_is_none(self) -> None:
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got int"):
            evaluate(3, make_loader(), METHODS)  # type: ignore[arg-type]

    def test_where_an_error_came_up(self) -> None:
        with pytest.raises(ValueError, match="between 0 and 3") as caught:
            run([(Noise().images, [0] * COUNT), (Noise().images, [9] * COUNT)])
        assert caught.value.__notes__ == [
            "torchcam.evaluate: this came up in the method GradCAM, batch 2 of this process",
            "1 of 2 batches were finished",
        ]


class Stopping(Dataset[Any]):
    """Images of noise, and an interruption when one of them is taken."""

    def __init__(self, at: int, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.noise, self.at, self.kind = Noise(), at, kind

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            raise self.kind
        return self.noise[index]


class TestGoingOn:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
    def test_the_same_to_the_bit_and_nothing_twice(self, kind: type[BaseException], tmp_path: Path) -> None:
        folder = tmp_path / "new" / "state"
        loader = DataLoader(Stopping(4, kind), batch_size=SIZE)
        for _ in range(2):  # the second time it gets no further
            with pytest.raises(kind) as caught:
                run(loader, checkpoint=folder)
            assert caught.value.__notes__[-1] == f"2 of 4 batches were finished, and are kept in '{folder}'"
        assert loader.dataset.noise.taken == [0, 1, 2, 3]
        loader.dataset.at = -1
        result = run(loader, checkpoint=folder)
        assert loader.dataset.noise.taken == [*range(COUNT)]
        assert numbers(result) == numbers(run())
        assert not folder.exists()

    def test_a_finished_evaluation_that_is_kept_takes_no_batch(self, tmp_path: Path) -> None:
        first = run(checkpoint=tmp_path, keep_checkpoint=True)
        loader = make_loader()
        again = run(loader, checkpoint=tmp_path, keep_checkpoint=True)
        assert loader.dataset.taken == []
        assert numbers(again) == numbers(first)
        assert [path.name for path in tmp_path.iterdir()] == ["process-0-of-1.pt"]
        discard_checkpoint(tmp_path)
        assert not tmp_path.exists()

    def test_iterables_that_are_no_loader(self, tmp_path: Path) -> None:
        def stream(stop: int) -> Iterator[Any]:
            for number, batch in enumerate(make_loader()):
                if number == stop:
                    raise KeyboardInterrupt
                yield batch

        with pytest.raises(KeyboardInterrupt) as caught:
            run(stream(2), checkpoint=tmp_path)
        assert caught.value.__notes__[-1].startswith("2 batches were finished")
        assert numbers(run(stream(9), checkpoint=tmp_path)) == numbers(run())

    def test_a_generator_that_moves_on(self, tmp_path: Path) -> None:
        def methods() -> dict[str, Any]:
            return {"random": RandomCAM(model, "5", generator=torch.Generator().manual_seed(5))}

        model = make_model()
        expected = run(model=model, methods=methods())
        loader = DataLoader(Stopping(4), batch_size=SIZE)
        with pytest.raises(KeyboardInterrupt):
            run(loader, model=model, methods=methods(), checkpoint=tmp_path)
        loader.dataset.at = -1
        assert numbers(run(loader, model=model, methods=methods(), checkpoint=tmp_path)) == numbers(expected)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"methods": ["GradCAM"]}, "methods.LayerCAM was .*, is nothing"),
            ({"target_layer": "2"}, r"methods.GradCAM was .*\['5'\].*, is .*\['2'\]"),
            ({"metrics": METRICS[:1]}, "metrics.DeletionInsertionMetric"),
            (
                {"metrics": (ClassificationMetric, partial(DeletionInsertionMetric, steps=5))},
                "metrics.DeletionInsertionMetric.steps was 4, is 5",
            ),
            (
                {"metrics": (METRICS[0], partial(DeletionInsertionMetric, steps=4, baseline=torch.zeros(1)))},
                r"metrics.DeletionInsertionMetric.made_by was .*\(steps=4\), is .*baseline=tensor of shape",
            ),
            ({"logits_fn": torch.sigmoid}, "logits_fn was functools|logits_fn was torch.*softmax.*, is torch.*sigmoid"),
            ({"class_source": "predicted"}, "class_source was label, is predicted"),
            ({"loader": make_loader(9)}, "data.samples was 7, is 9; data.batches was 4, is 5"),
            ({"settings": {"data": "b"}}, "settings.data was a, is b"),
            ({"model": make_model().double().float().requires_grad_(False)}, None),
            ({"model": nn.Sequential(*make_model()[:8], nn.Linear(8, 4))}, "model.checksum was .{8}, is"),
        ],
    )
    def test_other_settings(self, changed: dict[str, Any], message: str | None, tmp_path: Path) -> None:
        settings = {"settings": {"data": "a"}}
        run(checkpoint=tmp_path, keep_checkpoint=True, **settings)
        before = (tmp_path / "process-0-of-1.pt").read_bytes()
        if message is None:
            run(checkpoint=tmp_path, keep_checkpoint=True, **{**settings, **changed})
            return
        with pytest.raises(ValueError, match=f"with other settings: .*{message}") as caught:
            run(checkpoint=tmp_path, **{**settings, **changed})
        assert "Use those settings, name another folder, or remove it to begin anew" in str(caught.value)
        assert (tmp_path / "process-0-of-1.pt").read_bytes() == before

    @pytest.mark.parametrize(
        ("new", "changed", "message"),
        [
            *((new, {"percentiles": (30,)}, r"percentiles was \[20, 40, 60, 80\], is \[30\]") for new in (ROAD, ARCC)),
            *((new, {"noise": 0.5}, r"noise was 0\.01, is 0\.5") for new in (ROAD, ARCC)),
            *((new, {"seed": 1}, "seed was 0, is 1") for new in (ROAD, ARCC)),
            (Sensitivity, {"removal": "gaussian"}, "removal was square, is gaussian"),
            (Sensitivity, {"perturb": torch.sigmoid}, "perturb was nothing, is .*sigmoid"),
            (DeletionInsertionMetric, {"baseline": torch.ones(1)}, "baseline was nothing, is tensor of shape"),
        ],
    )
    def test_other_options_in_a_function(self, new: Any, changed: Any, message: str, tmp_path: Path) -> None:
        def run_with(**options: Any) -> Evaluation:
            metrics = {"m": lambda extractor: new(extractor, softmax, **options)}
            return run(make_loader(2), methods=["GradCAM"], metrics=metrics, checkpoint=tmp_path, keep_checkpoint=True)

        run_with()
        with pytest.raises(ValueError, match=rf"with other settings: metrics\.m\.{message}"):
            run_with(**changed)

    def test_functions_are_compared_by_name_and_by_what_is_bound_to_them(self, tmp_path: Path) -> None:
        def run_with(function: Any) -> Evaluation:
            return run(metrics=METRICS[:1], logits_fn=function, checkpoint=tmp_path, keep_checkpoint=True)

        run_with(lambda o: o.sigmoid())
        run_with(lambda o: o.sigmoid())
        for other in (torch.sigmoid, partial(torch.softmax, dim=1), partial(torch.softmax, dim=-1)):
            with pytest.raises(ValueError, match=r"with other settings: .*logits_fn was .*<lambda>, is .*(sig|dim)"):
                run_with(other)

    def test_an_interrupt_while_it_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save, saved = Checkpoint.save, []

        def interrupted(self: Checkpoint, *args: Any, **state: Any) -> None:
            saved.append(state["finished"])
            if len(saved) == 2:
                raise KeyboardInterrupt
            save(self, *args, **state)

        monkeypatch.setattr(Checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(checkpoint=tmp_path)
        assert caught.value.__notes__[-1] == f"1 of 4 batches were finished, and are kept in '{tmp_path}'"
        assert saved_state(tmp_path / "process-0-of-1.pt")["finished"] == 1
        loader = make_loader()
        assert numbers(run(loader, checkpoint=tmp_path)) == numbers(run())
        assert loader.dataset.taken == [*range(SIZE, COUNT)]

    def test_files_that_are_no_state(self, tmp_path: Path) -> None:
        path = tmp_path / "process-0-of-1.pt"
        other = io.BytesIO()
        torch.save({"finished": 1}, other)
        for content in (b"", b"half", other.getvalue(), b"torchcam evaluation 3 \n" + other.getvalue()):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"is damaged, or was not written by this .*: name another folder, or"):
                run(checkpoint=tmp_path)
        path.unlink()
        path.mkdir()
        with pytest.raises(ValueError, match=r"cannot be read \(IsADirectoryError|cannot be read \(PermissionError"):
            run(checkpoint=tmp_path)
        path.rmdir()
        path.write_bytes(b"half")
        with pytest.raises(ValueError, match="is not a folder"):
            run(checkpoint=path)
        path.rename(tmp_path / "process-1-of-3.pt")
        with pytest.raises(ValueError, match="by 3 processes, this one is by 1:"):
            run(checkpoint=tmp_path)

    def test_every_flipped_bit_and_every_cut_is_noticed(self, tmp_path: Path) -> None:
        run(checkpoint=tmp_path, keep_checkpoint=True)
        path = tmp_path / "process-0-of-1.pt"
        content = path.read_bytes()
        checkpoint, settings = Checkpoint(tmp_path), saved_state(path)["settings"]
        header = content.index(b"\n") + 1
        for bit in (*range(8 * header), *range(8 * header, 8 * len(content), 997)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="is damaged"):
                checkpoint.load(settings)
        for length in range(0, len(content), 101):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="is damaged"):
                checkpoint.load(settings)
        path.write_bytes(content)
        assert checkpoint.load(settings) is not None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"finished": 999}, "holds finished=999 of 4 batches, which this evaluation cannot have saved"),
            ({"finished": -1}, "finished=-1 of 4"),
            ({"finished": 2.0}, r"finished=2\.0 of 4"),
            ({"finished": 0}, "an impossible 'tally'"),
            ({"tally": torch.ones(3, dtype=torch.float64)}, "an impossible 'tally'"),
            ({"tally": torch.full((8,), math.nan, dtype=torch.float64)}, "an impossible 'tally'"),
            ({"tally": [7, 7]}, "an impossible 'tally'"),
            ({"states": []}, "an impossible 'states'"),
            ({"states": [{name: {} for name in ("ClassificationMetric", "DeletionInsertionMetric")}] * 3}, "'states'"),
            ({"generators": [{}, {0: torch.zeros(3)}, {}]}, "an impossible 'generators'"),
        ],
    )
    def test_states_that_cannot_be(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        run(checkpoint=tmp_path, keep_checkpoint=True)
        state = saved_state(tmp_path / "process-0-of-1.pt")
        Checkpoint(tmp_path).save(state.pop("settings"), **{**state, **change})
        with pytest.raises(ValueError, match=f"{message}.*: name another folder, or remove it"):
            run(checkpoint=tmp_path)

    def test_fewer_batches_than_were_finished(self, tmp_path: Path) -> None:
        def stream(count: int) -> Iterator[Any]:
            yield from list(make_loader())[:count]

        run(stream(4), checkpoint=tmp_path, keep_checkpoint=True)
        with pytest.raises(ValueError, match="`loader` gives 2 batches, but the checkpoint is of a run that has fini"):
            run(stream(2), checkpoint=tmp_path)
        assert numbers(run(stream(4), checkpoint=tmp_path)) == numbers(run())

    def test_a_full_disk(self, tmp_path: Path) -> None:
        folder = tmp_path / "state"
        with pytest.raises(OSError, match=r"free some .*: '.*process-0-of-1.pt'"), full_disk(2000):
            run(checkpoint=folder)
        assert not folder.exists(), "no half of a file remains"
        loader = DataLoader(Stopping(2, ValueError), batch_size=SIZE)
        with pytest.raises(ValueError):  # noqa: PT011 - raised by the data set
            run(loader, checkpoint=folder)
        before = (folder / "process-0-of-1.pt").read_bytes()
        loader.dataset.at = -1
        with pytest.raises(OSError, match="free some") as caught, full_disk(2000):
            run(loader, checkpoint=folder)
        assert caught.value.__notes__[-1] == f"1 of 4 batches were finished, and are kept in '{folder}'"
        assert [path.read_bytes() for path in folder.iterdir()] == [before]
        assert numbers(run(loader, checkpoint=folder)) == numbers(run())

    def test_loaders_that_are_different_each_time(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"RandomSampler, which draws its samples at random.*shuffle=False"):
            run(make_loader(shuffle=True), checkpoint=tmp_path)
        sampler = DistributedSampler(Noise(), num_replicas=2, rank=0, shuffle=False)
        with pytest.raises(ValueError, match="DistributedSampler, which repeats samples"):
            run(make_loader(sampler=sampler), checkpoint=tmp_path)
        batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(Noise()), 2, drop_last=False)
        with pytest.raises(ValueError, match="RandomSampler"):
            run(DataLoader(Noise(), batch_sampler=batches), checkpoint=tmp_path)
        shuffled = make_loader(shuffle=True, generator=torch.Generator().manual_seed(0))
        assert run(shuffled)["GradCAM", "avg_drop"] == pytest.approx(run()["GradCAM", "avg_drop"], abs=1e-6)

    def test_checksum_sees_every_bit(self) -> None:
        model = make_model()
        first = checksum(model)
        assert checksum(make_model()) == first
        for tensor in (model[1].running_var, model[8].weight.data):
            value = tensor.flatten()[0].clone()
            tensor.flatten()[0] = torch.nextafter(value, torch.tensor(9.0))
            assert checksum(model) != first
            tensor.flatten()[0] = value
        assert checksum(model) == first

    def test_descriptions_hold_no_addresses(self) -> None:
        assert describe(object()) == "<object object>"
        assert describe(partial(GradCAM, target_layer=["a"])) == (
            "torchcam.methods.gradient.GradCAM(target_layer=['a'])"
        )
        assert describe(torch.zeros(2)) != describe(torch.ones(2))

    def test_descriptions_of_functions_are_their_names(self) -> None:
        assert describe(torch.sigmoid) != describe(torch.exp)
        assert describe(partial(torch.softmax, dim=1)) != describe(partial(torch.softmax, dim=-1))
        assert describe(make_function(2)).endswith("test_evaluation.make_function.<locals>.<lambda>")
        assert describe(Noise().__getitem__).endswith("test_evaluation.Noise.__getitem__")


class Counted(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(5.0))


class TestSharing:
    @pytest.mark.parametrize("count", [1, 2, 5, 7, 12])
    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["loader", "list"])
    def test_every_batch_once(self, count: int, size: int, kind: str) -> None:
        whole = [labels.tolist() for _, labels in make_loader(count)]
        seen: dict[int, list[int]] = {}
        for rank in range(size):
            loader: Any = make_loader(count)
            stream = Stream(list(loader) if kind == "list" else loader, rank, size)
            if kind == "loader":
                loader.dataset.taken.clear()
            batches = [labels.tolist() for _, labels in stream.after(0)]
            assert stream.own == len(batches)
            if kind == "loader":
                assert len(loader.dataset.taken) == sum(map(len, batches)), "nothing is loaded in vain"
            seen |= {rank + size * k: batch for k, batch in enumerate(batches)}
            for finished in range(len(batches) + 1):
                assert [labels.tolist() for _, labels in stream.after(finished)] == batches[finished:]
        assert [seen[number] for number in sorted(seen)] == whole

    def test_a_loader_keeps_its_options(self) -> None:
        loader = make_loader(num_workers=1, collate_fn=len, prefetch_factor=3, timeout=60)
        found = list(Stream(loader, 1, 2).after(0))
        assert found == [2, 1]

    def test_data_without_random_access(self) -> None:
        stream = Stream(DataLoader(Counted(), batch_size=2), 1, 2)
        assert [batch.tolist() for batch in stream.after(0)] == [[2.0, 3.0]]
        assert stream.total is None


WORKER = """
import os, sys, json
from datetime import timedelta
import torch, torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.test_evaluation import *
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
meet, limit = f"file://{{folder}}/meet", timedelta(minutes=3)
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=limit)
found = {{}}
found["seven"] = numbers(run())
found["one batch"] = numbers(run(make_loader(2)))
found["list"] = numbers(run(list(make_loader())))
found["alone"] = numbers(run(distributed=False)) if rank == 0 else None
state = folder / "state"
for name, options in {{
    "error": {{"loader": DataLoader(Stopping(6, ValueError), batch_size=SIZE)}},
    "constructor": {{"target_layer": "5" if rank == 0 else "nowhere"}},
    "settings": {{"settings": {{"rank": rank}}}},
}}.items():
    try:
        run(**options, checkpoint=state if name == "error" else None)
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
found["kept"] = sorted(path.name for path in state.iterdir())
dist.barrier()
loader = make_loader()
found["resumed"] = numbers(run(DataLoader(Stopping(-1), batch_size=SIZE), checkpoint=state))
dist.barrier()
found["left"] = state.exists()
if rank == 1:
    (folder / "1.json").write_text(json.dumps(found))
    Stopping.__getitem__ = lambda self, index: os._exit(0)
try:
    run(DataLoader(Stopping(-1), batch_size=SIZE))
except RuntimeError as error:
    found["gone"] = str(error)
(folder / "0.json").write_text(json.dumps(found))
os._exit(0)
"""


class TestProcesses:
    def test_several_discard_a_checkpoint_at_once(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(100):
                Checkpoint(tmp_path / "saved").save({})
                list(pool.map(discard_checkpoint, [tmp_path / "saved"] * 4))
                assert not (tmp_path / "saved").exists()

    def test_two(self, tmp_path: Path) -> None:
        code = WORKER.format(root=str(Path(__file__).parents[1]))
        both = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        expected = {"seven": numbers(run()), "one batch": numbers(run(make_loader(2)))}
        expected |= dict.fromkeys(("list", "alone", "resumed"), expected["seven"])
        messages = [process.communicate(timeout=240)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], messages
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        for name, alone in expected.items():
            plain = json.loads(json.dumps(alone))
            for found in (first[name], second[name]):
                if found is None:
                    continue
                assert found["num_samples"] == plain["num_samples"]
                for method, (values, *counts) in found["methods"].items():
                    assert counts == plain["methods"][method][1:]
                    for metric, keys in values.items():
                        assert keys == pytest.approx(plain["methods"][method][0][metric], abs=1e-9, nan_ok=True)
        assert first["resumed"] == second["resumed"] == first["seven"]
        # An error in one process ends both. Sample 6 is in the fourth batch, which is the second process's.
        assert second["error"] == "ValueError: "
        assert first["error"] == "RuntimeError: process 1 of 2 has failed, see its message; this one stops"
        assert "'nowhere' is not a module" in second["constructor"]
        assert first["constructor"].startswith("RuntimeError: process 1 of 2 has failed")
        assert "were given different settings" in first["settings"]
        assert "were given different settings" in second["settings"]
        assert first["gone"].startswith("another process of the evaluation has ended or does not answer (")
        assert first["kept"] == second["kept"] == ["process-0-of-2.pt", "process-1-of-2.pt"]
        assert not first["left"]
        assert not second["left"]

    def test_killed_midway(self, tmp_path: Path) -> None:
        code = (
            f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_evaluation import *\n"
            "torch.set_num_threads(1)\n"
            # The third batch comes too late, however slow the machine.
            "Noise.__getitem__ = lambda self, i: (time.sleep(300 * (i > 3)), (self.images[i], self.labels[i]))[1]\n"
            "Path(sys.argv[2]).write_text(describe(make_function(2)))\n"
            "run(checkpoint=sys.argv[1])\n"
        )
        state = tmp_path / "state"
        described = tmp_path / "described"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(state), str(described)],
            env={**os.environ, "PYTHONHASHSEED": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        path = state / "process-0-of-1.pt"
        deadline = time.monotonic() + 200
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        message = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, message
        (state / ".process-0-of-1.pt.7.part").write_bytes(b"half")
        finished = saved_state(path)["finished"]
        assert finished in (1, 2)
        loader = make_loader()
        assert numbers(run(loader, checkpoint=state)) == numbers(run())
        assert loader.dataset.taken == [*range(finished * SIZE, COUNT)]
        assert not state.exists(), "what a killed process leaves goes, too"
        # A function is described the same way in every process.
        assert described.read_text() == describe(make_function(2)).removeprefix("tests.")


@pytest.fixture
def table() -> Evaluation:
    def entry(first: float, second: float, nan_maps: int = 0, left_out: int = 0) -> MethodResult:
        values = {"A": {"x": first, "same": 0.5}, "B": {"x": second, "y": 0.00001}}
        return MethodResult(values, {"A": 10}, {"A": left_out}, {}, nan_maps, 0.25)

    return Evaluation(
        methods={"one": entry(0.125, 2.0), "two": entry(0.5, 1 / 3), "three": entry(math.nan, 0.1, 3, 4)},
        higher_is_better={"A": {"x": True, "same": True}, "B": {"x": False, "y": None}},
        num_samples=10,
        agreement=0.8,
        settings={"torchcam": "0"},
    )


class TestTable:
    def test_places(self, table: Evaluation) -> None:
        assert table["one", "A.x"] == 0.125
        assert table["two", "B.x"] == 1 / 3
        assert table["one", "y"] == table["one", "B.y"] == 0.00001
        with pytest.raises(KeyError, match="no method 'four'; there are one, two, three"):
            table["four", "y"]
        with pytest.raises(KeyError, match=r"no value 'x'; there are A.x, same, B.x, y"):
            table["one", "x"]

    def test_names_with_brackets(self, table: Evaluation) -> None:
        entry = MethodResult({"road[soft]": {"road[soft]": 0.5}}, {}, {}, {}, 0, 0.25)
        higher = {"road[soft]": {"road[soft]": True}}
        table = dataclasses.replace(table, methods={"[b]": entry}, higher_is_better=higher)
        assert repr(table).split()[:3] == ["method", "road[soft]", "↑"]
        assert "[b]" in repr(table)

    def test_markdown(self, table: Evaluation) -> None:
        assert table.to_markdown() == (
            "| method | A.x ↑ | same ↑ | B.x ↓ | y | NaN maps | s / map |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            "| one | 0.1250 | 0.5000 | 2.0000 | 1.00e-05 | 0 | 0.2500 |\n"
            "| two | **0.5000** | 0.5000 | 0.3333 | 1.00e-05 | 0 | 0.2500 |\n"
            "| three | NaN | 0.5000 | **0.1000** | 1.00e-05 | 3 | 0.2500 |\n"
            "\n10 samples; in 80.0% the explained class is the one that the model predicts.\n"
            "\nthree: 3 of 10 maps are NaN; no metric includes them.\n"
            "\nthree: A leaves out 1 more of 10, scores not finite.\n"
        )
        assert table._repr_markdown_() == table.to_markdown()

    def test_csv_holds_all_digits(self, table: Evaluation) -> None:
        one, two, three = csv.DictReader(io.StringIO(table.to_csv()))
        assert float(two["B.x"]) == 1 / 3
        assert math.isnan(float(three["A.x"]))
        assert (three["A.left_out"], three["nan_maps"], one["nan_maps"], one["num_samples"]) == ("4", "3", "0", "10")

    def test_json_is_strict(self, table: Evaluation) -> None:
        def refuse(name: str) -> None:
            raise AssertionError(name)

        found = json.loads(table.to_json(), parse_constant=refuse)
        assert found["methods"]["three"]["values"]["A"]["x"] is None
        assert found["methods"]["two"]["values"]["B"]["x"] == 1 / 3
        assert found["methods"]["three"]["left_out"] == {"A": 4}
        assert found["higher_is_better"]["B"] == {"x": False, "y": None}
        assert (found["num_samples"], found["agreement"], found["settings"]) == (10, 0.8, {"torchcam": "0"})

    def test_text_fits_the_terminal(self, table: Evaluation) -> None:
        from rich.console import Console

        for width, tables in ((120, 1), (50, 2), (30, 3)):
            console = Console(file=io.StringIO(), width=width, force_terminal=False)
            console.print(table)
            text = console.file.getvalue()  # type: ignore[attr-defined]
            assert "…" not in text
            assert text.count("method") == tables
            assert all(cell in text for cell in ("0.3333", "1.00e-05", "NaN maps", "s / map"))
            assert "\x1b" not in text
        assert "three: 3 of 10 maps are NaN" in str(table)
        colour = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", no_color=False)
        colour.print(table)
        assert "\x1b[1;32m0.5000" in colour.file.getvalue().replace(" ", "")  # type: ignore[attr-defined]

    @pytest.mark.parametrize("suffix", ["json", "csv", "md", "txt"])
    def test_save(self, table: Evaluation, suffix: str, tmp_path: Path) -> None:
        path = table.save(tmp_path / f"new/table.{suffix}")
        expected = {"json": table.to_json() + "\n", "csv": table.to_csv(), "md": table.to_markdown()}
        assert path.read_text(encoding="utf-8") == expected.get(suffix, f"{table}\n")
        with pytest.raises(ValueError, match=r"'x.png' has no suffix .* there are .json, .csv, .md, .txt"):
            table.save("x.png")


def test_is_exported_by_the_package() -> None:
    assert torchcam.evaluate is torchcam.evaluation.evaluate
    assert "evaluate" in dir(torchcam)


def test_progress_says_what_is_done_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=True)
    shown = capsys.readouterr().err
    assert "batch 1 of 4, GradCAM" in shown
    assert "batch 4 of 4, RandomCAM" in shown
    assert " left" in shown
    run()
    assert capsys.readouterr().err == ""
