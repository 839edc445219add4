"""Training with a monitor equals training without; the reported scalars and pictures are correct."""

from __future__ import annotations

import copy
import csv
import gc
import logging
import math
import random
import sys
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.snapshots import own_attributes
from tests.test_files import full_disk
from torchcam import methods
from torchcam.methods import CAM, EigenCAM, GradCAM, GuidedBackprop, LayerCAM, ScoreCAM, SmoothGradCAMpp
from torchcam.monitor import CAMMonitor, ProbeResult
from torchcam.targets import ClassProbability

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Restless(nn.Module):
    """Draw from every global source of chance in each forward pass, in evaluation mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand((), device=x.device)  # noqa: NPY002
        return x * (1 + 0.01 * noise)


def make_net(seed: int = 0, num_classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Restless(),
            nn.Dropout(0.3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8, num_classes),
        )


def probes(num_images: int = 3, seed: int = 7, channels: int = 3, side: int = 10) -> Tensor:
    return torch.rand(num_images, channels, side, side, generator=torch.Generator().manual_seed(seed))


def count_hooks(model: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def everything(model: nn.Module, *others: Any) -> dict[str, Any]:
    """Take down all that a training is made of, and the state of chance."""
    return copy.deepcopy(
        {
            "parameters": dict(model.named_parameters()),
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "modes": {name: module.training for name, module in model.named_modules()},
            "attributes": {name: own_attributes(module) for name, module in model.named_modules()},
            "others": [other.state_dict() for other in others],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": np.random.get_state(),  # noqa: NPY002
            "python": random.getstate(),
            "global": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        }
    )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Name what is not bit for bit the same; NaN equals NaN."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [found for k, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}/{k}")]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        return [] if same and torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num()) else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [path]
    return [] if a == b else [path]


def train(
    watch: Callable[[nn.Module], Callable[[int], Any]] | None = None, steps: int = 50, accumulate: int = 1
) -> dict[str, Any]:
    """Train with everything that a probe could disturb: dropout, batch norm, autocast, a scheduler, augmentation."""
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    after_step = watch(model) if watch else lambda step: None
    model.train()
    for step in range(1, steps + 1):
        for _ in range(accumulate):
            x = torch.rand(4, 3, 10, 10) * random.uniform(0.5, 1) + 0.1 * float(np.random.rand())  # noqa: NPY002
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), torch.randint(3, (4,)))
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        after_step(step)
    return everything(model, optimizer, scheduler)


@pytest.fixture(scope="module")
def unwatched() -> dict[str, Any]:
    return train()


class TestTrainingIsUndisturbed:
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (GradCAM, {"target_layer": "7"}),
            (GradCAM, {}),
            (LayerCAM, {"target_layer": ["2", "7"]}),
            pytest.param(
                SmoothGradCAMpp,
                {"target_layer": "7"},
                marks=pytest.mark.filterwarnings("ignore:SmoothGradCAMpp explains the model as it runs"),
            ),
            pytest.param(
                ScoreCAM,
                {"target_layer": "2"},
                # The net is random in evaluation mode, and the replay says so.
                marks=pytest.mark.filterwarnings("ignore:the score of an input as it is"),
            ),
            pytest.param(
                GuidedBackprop,
                {},
                marks=pytest.mark.filterwarnings("ignore:GuidedBackprop explains the model as it runs"),
            ),
            (GradCAM, {"target_layer": "5", "autocast": torch.bfloat16}),
        ],
    )
    def test_bit_for_bit(
        self, unwatched: dict[str, Any], method: type[Any], options: dict[str, Any], tmp_path: Path
    ) -> None:
        moments: list[ProbeResult | None] = []

        def watch(model: nn.Module) -> Callable[[int], Any]:
            monitor = CAMMonitor(model, probes(), 1, every_n_steps=5, directory=tmp_path, method=method, **options)
            moments.append(monitor.probe(0))
            return lambda step: moments.append(monitor.step(step))

        assert differences(train(watch), unwatched) == []
        assert [moment.at for moment in moments if moment] == list(range(0, 51, 5))

    def test_the_comparison_notices_a_careless_look(self, unwatched: dict[str, Any]) -> None:
        def watch(model: nn.Module) -> Callable[[int], Any]:
            return lambda step: model.eval()(probes()) if step == 25 else None

        found = differences(train(watch), unwatched)
        assert {"/python/1/3", "/torch", "/numpy/1"} & set(found)
        assert any(name.startswith("/parameters") for name in found)
        assert any(name.startswith("/others/0") for name in found)

    def test_gradients_that_are_being_accumulated(self) -> None:
        model = make_net().train()
        monitor = CAMMonitor(model, probes(), 0, target_layer="7")
        F.cross_entropy(model(probes(4, seed=1)), torch.tensor([0, 1, 2, 0])).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        before = everything(model)
        monitor.probe()
        assert differences(everything(model), before) == []
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))

    def test_between_the_forward_and_the_backward_pass_under_autocast(self) -> None:
        """Weights that the probe cast must not stand in for those of the training, nor batch norm be disturbed."""

        def gradients(*, watched: bool) -> dict[str, Any]:
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            model = make_net().train()
            monitor = CAMMonitor(model, probes(), 0, target_layer="7", autocast=torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                if watched:
                    monitor.probe()
                first = model(probes(4, seed=1)).square().sum()
                if watched:
                    monitor.probe()
                (first + model(probes(4, seed=2)).square().sum()).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            return everything(model)

        assert differences(gradients(watched=True), gradients(watched=False)) == []

    def test_the_model_itself_is_not_touched_during_a_probe(self) -> None:
        """Other threads see the model in training, without hooks, and with the calls that it had."""
        model = make_net().train()
        before = everything(model)
        calls = []

        def forward(replica: nn.Module, images: Tensor) -> Tensor:
            output = replica(images)
            now = everything(model)
            found = [differences(now[what], before[what]) for what in ("modes", "attributes", "buffers", "parameters")]
            calls.append((replica is model, count_hooks(model), found))
            return output

        CAMMonitor(model, probes(), 0, target_layer="7", forward=forward, batch_size=2).probe()
        assert calls == [(False, 0, [[]] * 4)] * 2

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_in_every_grad_mode(self, mode: Callable[[], Any]) -> None:
        model = make_net().eval()
        expected = CAMMonitor(model, probes(), 2, target_layer="2").probe()
        with mode():
            before = everything(model)
            moment = CAMMonitor(model, probes(), 2, target_layer="2").probe()
            assert differences(everything(model), before) == []
        assert moment is not None
        assert expected is not None
        assert moment.values["score"] == pytest.approx(expected.values["score"], abs=0.05)  # the net is restless

    def test_no_hooks_between_moments_and_no_tensors_of_a_pass(self) -> None:
        model = make_net()
        seen: list[weakref.ref[Tensor]] = []
        handle = model[5].register_forward_hook(lambda _m, _i, output: seen.append(weakref.ref(output)))
        monitor = CAMMonitor(model, probes(), 0, target_layer="7", every_n_steps=2)
        for _ in range(4):
            monitor.step()
            assert count_hooks(model) == 1
        handle.remove()
        gc.collect()
        assert len(seen) == 2
        assert all(reference() is None for reference in seen)

    def test_dead_monitors_leave_the_model_alone(self) -> None:
        model = make_net()
        monitor = CAMMonitor(model, probes(), 0, target_layer="7")
        monitor.probe()
        gone = weakref.ref(monitor)
        del monitor
        gc.collect()
        assert gone() is None
        assert count_hooks(model) == 0

    def test_an_extractor_of_the_user_keeps_its_pass(self) -> None:
        model, x = make_net().eval(), probes(2, seed=1)
        monitor = CAMMonitor(model, probes(), 0, target_layer="7")
        with GradCAM(model, "7") as extractor:
            scores = model(x)
            before = extractor(1, scores, retain_graph=True)[0]
            monitor.probe()
            assert torch.equal(extractor(1, scores)[0], before)


class TestErrors:
    class Failing(nn.Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and not self.training:
                raise ArithmeticError("no")
            return x

    def make(self) -> tuple[nn.Sequential, Failing]:
        model = make_net()
        model[8] = nn.Sequential(nn.AdaptiveAvgPool2d(1), self.Failing())
        return model.train(), model[8][1]

    def test_raise(self) -> None:
        model, failing = self.make()
        monitor = CAMMonitor(model, probes(), 0, target_layer="7", every_n_steps=1)
        failing.fails = True
        before = everything(model)
        with pytest.raises(ArithmeticError, match="no"):
            monitor.step()
        assert differences(everything(model), before) == []
        assert count_hooks(model) == 0
        assert monitor.failures == 1

    def test_warn_and_go_on(self) -> None:
        model, failing = self.make()
        monitor = CAMMonitor(model, probes(), 0, target_layer="7", every_n_steps=1, on_error="warn")
        monitor.step()
        failing.fails = True
        before = everything(model)
        with pytest.warns(RuntimeWarning, match="could not be explained at step 2.*ArithmeticError: no"):
            assert monitor.step() is None
        assert differences(everything(model), before) == []
        assert count_hooks(model) == 0
        failing.fails = False
        assert monitor.step() is not None
        assert [entry["step"] for entry in monitor.history] == [1, 3]
        assert monitor.failures == 1
        assert not math.isnan(monitor.history[-1]["drift"])

    def test_training_goes_on_as_if_nothing_had_failed(self, unwatched: dict[str, Any]) -> None:
        def broken(model: nn.Module, images: Tensor) -> Tensor:
            random.random()
            model(images)
            raise ValueError("broken")

        def watch(model: nn.Module) -> Callable[[int], Any]:
            monitor = CAMMonitor(
                model, probes(), 1, every_n_steps=25, target_layer="7", forward=broken, on_error="warn"
            )
            return monitor.step

        with pytest.warns(RuntimeWarning, match="ValueError: broken"):
            assert differences(train(watch), unwatched) == []

    def test_a_full_disk_says_so_and_tears_nothing(self, tmp_path: Path) -> None:
        model = make_net()
        monitor = CAMMonitor(model, probes(), 0, target_layer="7", directory=tmp_path, on_error="warn")
        monitor.probe(0)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert sorted(before) == ["film.gif", "scalars.csv", "strip.png"]
        told = r"free some or write elsewhere: '.*scalars\.csv'"
        with pytest.warns(RuntimeWarning, match=told), full_disk(len(before["scalars.csv"]) + 40):  # one line of three
            monitor.probe(1)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        told = r"free some or write elsewhere: '.*strip\.png'"
        with pytest.warns(RuntimeWarning, match=told), full_disk(len(before["strip.png"])):
            monitor.probe(2)
        assert (tmp_path / "strip.png").read_bytes() == before["strip.png"]
        monitor.probe(3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "scalars.csv", "strip.png"]
        assert (tmp_path / "strip.png").read_bytes() != before["strip.png"]
        steps = [line["step"] for line in read_lines(tmp_path / "scalars.csv")]
        assert steps == [str(step) for step in (0, 2, 3) for _ in range(3)]
        assert monitor.failures == 2

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"model": "net"}, TypeError, "`model` must be a torch.nn.Module, got str"),
            ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "`images`.*torch.uint8"),
            ({"images": torch.zeros(3, 8)}, ValueError, r"`images`.*\(3, 8\)"),
            ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "one image or more"),
            ({"class_idx": None}, ValueError, "exactly one of class_idx or targets"),
            ({"targets": ClassProbability(0)}, ValueError, "exactly one of class_idx or targets"),
            ({"class_idx": [0, 1]}, ValueError, "`class_idx` must be one for all.*got 2 for 3 images"),
            ({"class_idx": [[0, 1]] * 3}, ValueError, "got several of each for 3 images"),
            ({"class_idx": None, "targets": [ClassProbability(0)]}, ValueError, "`targets`.*got 1 for 3"),
            ({"every_n_steps": 2, "every_n_epochs": 1}, ValueError, r"`every_n_steps` \(2\) or `every_n_epochs` \(1\)"),
            ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
            ({"every_n_epochs": 1.5}, TypeError, "`every_n_epochs` must be an integer"),
            ({"method": GradCAM(make_net(), "7")}, TypeError, "`method` must be a CAM class"),
            ({"method_kwargs": {"target_layer": "7"}}, ValueError, "pass `target_layer` itself"),
            ({"target_layer": "nine"}, ValueError, "'nine' is not a module"),
            ({"forward": 3}, TypeError, "`forward` must be callable"),
            ({"activation": "tanh"}, ValueError, "`activation` must be 'softmax' or 'sigmoid', got 'tanh'"),
            ({"autocast": True}, TypeError, "`autocast` must be a dtype"),
            ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
            ({"max_columns": 1}, ValueError, "`max_columns` must be at least 2"),
            ({"thumbnail": 8}, ValueError, "`thumbnail` must be at least 32"),
            ({"colormap": "jett"}, ValueError, "'jett' is not a matplotlib colormap"),
            ({"on_error": "ignore"}, ValueError, "`on_error` must be 'raise' or 'warn'"),
            ({"masks": [1]}, TypeError, "`masks` must be a tensor"),
            ({"masks": torch.ones(3, 8, 8)}, ValueError, r"`masks` must have the shape \(3, 10, 10\)"),
            ({"masks": {"cue": torch.ones(3, 8, 8)}}, ValueError, r"`masks` must have the shape \(3, 10, 10\)"),
            ({"labels": "abc"}, TypeError, "`labels` must be a sequence of strings"),
            ({"labels": ["a"]}, ValueError, "`labels` has 1 entries for 3 images"),
            ({"labels": ["a", "b\nc", "d"]}, ValueError, r"`labels` has 'b\\nc', which has no place in a line"),
            ({"labels": ["a", "b", "c\u2028"]}, ValueError, r"`labels` has 'c\\u2028', which has no place in a line"),
            ({"labels": ["\ud800", "b", "c"]}, ValueError, r"`labels` has '\\ud800', which has no place in a line"),
            ({"masks": {"a\r": torch.ones(3, 10, 10)}}, ValueError, r"`masks` has 'a\\r', which has no place in a"),
            ({"pictures": probes(2)}, ValueError, "`pictures` has 2 entries for 3 images"),
            ({"pictures": probes() + 1}, ValueError, r"`pictures`.*in \[0, 1\]"),
            ({"pictures": [1, 2, 3]}, TypeError, "`pictures` must be"),
            ({"writer": object()}, TypeError, "`writer` must have `add_scalar` and `add_image`"),
        ],
    )
    def test_bad_arguments(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments: dict[str, Any] = {"model": make_net(), "images": probes(), "class_idx": 0, **change}
        with pytest.raises(error, match=message):
            CAMMonitor(**arguments)

    def test_sharded_models(self) -> None:
        sharded = types.new_class("FullyShardedDataParallel", (nn.Sequential,))(make_net())
        with pytest.raises(ValueError, match="sharded over several processes"):
            CAMMonitor(sharded, probes(), 0)

    def test_a_class_that_does_not_exist(self) -> None:
        with pytest.raises(ValueError, match="`class_idx` must lie between 0 and 2"):
            CAMMonitor(make_net(), probes(), 3, target_layer="7").probe()

    def test_nothing_to_draw_yet(self) -> None:
        monitor = CAMMonitor(make_net(), probes(), 0)
        with pytest.raises(RuntimeError, match="nothing was explained yet"):
            monitor.strip()
        with pytest.raises(RuntimeError, match="nothing was explained yet"):
            monitor.film()


class Pixelwise(nn.Module):
    """One channel handed through, and two classes: its mean, and minus its mean times ``gain``."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(1)
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.layer(x).flatten(1).mean(1) * self.gain
        return torch.stack([mean, -mean], 1)


class TestScalars:
    @pytest.fixture
    def images(self) -> Tensor:
        return torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]], [[[3.0, 1.0], [1.0, 3.0]]]])

    def test_by_hand(self, images: Tensor) -> None:
        """Of one channel with a positive weight, Grad-CAM is the channel itself, from its minimum to its maximum."""
        masks = {
            "right": torch.tensor([[[0, 1], [0, 1]]] * 2).bool(),
            "half": torch.tensor([[[0.5, 0.5], [0.5, 0.5]]] * 2),
        }
        monitor = CAMMonitor(Pixelwise(), images, 0, target_layer="layer", masks=masks)
        moment = monitor.probe(3)
        assert moment is not None
        assert moment.at == 3
        assert moment.values["score"] == pytest.approx([1.75, 2.0])
        assert moment.values["probability"] == pytest.approx([1 / (1 + math.exp(-2 * m)) for m in (1.75, 2.0)])
        assert moment.values["energy_inside_right"] == pytest.approx([(1 + 4) / 7, 1 / 2])
        assert moment.values["energy_inside_half"] == pytest.approx([0.5, 0.5])
        assert moment.values["blank"] == (0.0, 0.0)
        assert moment.values["nan"] == (0.0, 0.0)
        assert moment.means["energy_inside_right"] == pytest.approx((5 / 7 + 1 / 2) / 2)
        assert all(math.isnan(drift) for drift in moment.values["drift"])
        assert math.isnan(moment.means["drift"])

    def test_drift_is_one_minus_the_correlation(self, images: Tensor) -> None:
        class Shifted(Pixelwise):
            shift = torch.zeros(1, 1, 2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + self.shift)

        model = Shifted()
        monitor = CAMMonitor(model, images, 0, target_layer="layer")
        monitor.probe()
        same = monitor.probe()
        model.shift = torch.tensor([[[[0.0, 5.0], [0.0, 0.0]]]])
        moved = monitor.probe()
        assert same is not None
        assert moved is not None
        assert same.values["drift"] == pytest.approx([0, 0], abs=1e-6)
        for k in range(2):
            before, after = images[k].flatten().numpy(), (images[k] + model.shift).flatten().numpy()
            assert moved.values["drift"][k] == pytest.approx(1 - np.corrcoef(before, after)[0, 1], abs=1e-6)

    def test_blank_and_broken_maps_are_counted(self, images: Tensor) -> None:
        images = torch.cat([images, torch.full((1, 1, 2, 2), math.nan), torch.full((1, 1, 2, 2), 5.0)])
        monitor = CAMMonitor(
            Pixelwise(), images, 0, target_layer="layer", masks=torch.ones(4, 2, 2), pictures=torch.zeros(4, 3, 8, 8)
        )
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="NaN"):
                moment = monitor.probe()
        assert moment is not None
        assert moment.values["nan"] == (0, 0, 1, 0)
        assert moment.values["blank"] == (0, 0, 0, 1)
        assert moment.means["nan"] == moment.means["blank"] == 0.25
        assert [math.isnan(v) for v in moment.values["energy_inside"]] == [False, False, True, True]
        assert [math.isnan(v) for v in moment.values["drift"]] == [False, False, True, True]
        assert moment.means["energy_inside"] == pytest.approx(1)
        assert moment.means["drift"] == pytest.approx(0, abs=1e-6)
        stamped = [bool((np.asarray(thumbnail) == 255).all(-1).any()) for thumbnail in moment.thumbnails]
        assert stamped == [False, False, True, True]

    def test_negative_evidence_is_blank(self, images: Tensor) -> None:
        moment = CAMMonitor(Pixelwise(-1.0), images, 0, target_layer="layer").probe()
        assert moment is not None
        assert moment.means["blank"] == 1

    def test_agrees_with_the_method_called_by_hand(self) -> None:
        model, images = make_net().eval(), probes()
        model[3] = nn.Identity()
        classes = [0, 2, 1]
        masks = probes(seed=9)[:, 0] > 0.5
        monitor = CAMMonitor(model, images, classes, target_layer=model[2], masks=masks, batch_size=2)
        moment = monitor.probe()
        assert moment is not None
        with GradCAM(model, "2") as extractor:
            logits = model(images)
            cams = extractor(classes, logits)[0]
        energy = (cams * masks).sum((1, 2)) / cams.sum((1, 2))
        assert moment.values["energy_inside"] == pytest.approx(energy.tolist(), rel=1e-5)
        expected = logits.softmax(1)[range(3), classes]
        assert moment.values["probability"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert moment.values["score"] == pytest.approx(logits[range(3), classes].tolist(), rel=1e-5)

    def test_a_coarse_map_is_stretched_to_the_mask(self) -> None:
        model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model[1].weight.data.fill_(1.0)
        images = torch.zeros(1, 1, 8, 8)
        images[..., :4, :4] = 1
        mask = torch.zeros(1, 8, 8)
        mask[:, :4, :4] = 1
        moment = CAMMonitor(model, images, 0, target_layer="1", masks=mask).probe()
        assert moment is not None
        ramp = np.interp(np.arange(8), [1.5, 5.5], [1, 0])  # centres of the two positions
        assert moment.values["energy_inside"][0] == pytest.approx((ramp[:4].sum() / ramp.sum()) ** 2, rel=1e-5)

    def test_sigmoid_and_a_single_score(self) -> None:
        model, images = make_net(num_classes=1).eval(), probes()
        model[3] = nn.Identity()
        moment = CAMMonitor(model, images, 0, target_layer="7").probe()
        assert moment is not None
        assert moment.values["probability"] == pytest.approx(model(images)[:, 0].sigmoid().tolist())
        model = make_net().eval()
        model[3] = nn.Identity()
        moment = CAMMonitor(model, images, 2, target_layer="7", activation="sigmoid").probe()
        assert moment is not None
        assert moment.values["probability"] == pytest.approx(model(images)[:, 2].sigmoid().tolist())

    def test_targets_have_a_score_and_no_probability(self) -> None:
        model, images = make_net().eval(), probes()
        model[3] = nn.Identity()
        moment = CAMMonitor(model, images, targets=[ClassProbability(k) for k in range(3)], target_layer="7").probe()
        assert moment is not None
        assert "probability" not in moment.values
        assert moment.values["score"] == pytest.approx(model(images).softmax(1).diagonal().tolist())

    def test_class_agnostic_methods_need_no_class(self, tmp_path: Path) -> None:
        monitor = CAMMonitor(make_net(), probes(), method=EigenCAM, target_layer="7", directory=tmp_path)
        moment = monitor.probe()
        assert moment is not None
        assert set(moment.values) == {"drift", "blank", "nan"}
        assert moment.means["blank"] == 0

    @pytest.mark.parametrize(
        "name", ["CAM", "GradCAMpp", "AblationCAM", "FullGrad", "GuidedGradCAM", "RefineCAM", "FinerCAM"]
    )
    @pytest.mark.filterwarnings("ignore:.* explains the model as it runs again")  # the net is random in evaluation mode
    def test_other_methods(self, name: str) -> None:
        method = getattr(methods, name)
        layer = {"RefineCAM": ["2", "7"], "FullGrad": None}.get(name, "7")
        options = {"fc_layer": "11"} if method is CAM else {}
        monitor = CAMMonitor(make_net(), probes(), 1, method=method, target_layer=layer, method_kwargs=options)
        monitor.probe()
        moment = monitor.probe()
        assert moment is not None
        assert moment.means["nan"] == 0
        assert moment.means["drift"] < 0.5  # the net is restless, but not that much

    def test_modules_among_the_arguments_of_the_method(self) -> None:
        model, images = make_net().eval(), probes()
        model[3] = nn.Identity()
        found = [
            CAMMonitor(model, images, 1, method=CAM, target_layer=layer, method_kwargs={"fc_layer": head}).probe()
            for layer, head in (("7", "11"), (model[7], model[11]))
        ]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0].values["score"] == found[1].values["score"]
        assert np.array_equal(np.asarray(found[0].thumbnails), np.asarray(found[1].thumbnails))
        assert found[0].means["blank"] == 0


class TestWhen:
    def at(self, counts: list[int | None], **options: Any) -> list[int]:
        monitor = CAMMonitor(make_net(), probes(1), 0, target_layer="7", **options)
        return [moment.at for count in counts if (moment := monitor.step(count)) is not None]

    def test_own_count(self) -> None:
        assert self.at([None] * 7, every_n_steps=3) == [3, 6]

    def test_given_count_with_repeats(self) -> None:
        assert self.at([1, 1, 2, 2, 2, 3, 4, 4], every_n_steps=2) == [2, 4]

    def test_given_count_that_begins_with_zero(self) -> None:
        assert self.at(list(range(6)), every_n_steps=5) == [0, 5]

    def test_count_that_leaves_numbers_out(self) -> None:
        assert self.at([2, 4, 6, 8, 10, 12], every_n_steps=5) == [6, 10]

    def test_only_on_call(self) -> None:
        assert self.at([None] * 5) == []

    def test_epochs(self) -> None:
        monitor = CAMMonitor(make_net(), probes(1), 0, target_layer="7", every_n_epochs=2)
        found = [monitor.step() or monitor.epoch() for _ in range(4)]
        assert [moment.at for moment in found if moment] == [2, 4]
        assert [entry["epoch"] for entry in monitor.history] == [2, 4]
        assert repr(monitor) == "CAMMonitor(GradCAM, 1 images, every 2 epochs)"

    def test_other_processes_do_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        assert self.at([None] * 4, every_n_steps=1) == []
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        assert self.at([None] * 4, every_n_steps=1) == [1, 2, 3, 4]


class TestModels:
    def test_wrapped_in_data_parallel_and_averaged(self) -> None:
        model, images = make_net().eval(), probes()
        model[3] = nn.Identity()
        expected = CAMMonitor(model, images, 1, target_layer="7").probe()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for wrapped in (nn.DataParallel(model), averaged, nn.DataParallel(averaged)):
            monitor = CAMMonitor(wrapped, images, 1, target_layer="7")
            moment = monitor.probe()
            assert expected is not None
            assert moment is not None
            assert moment.values["score"] == expected.values["score"]

    def test_wrapped_in_distributed_data_parallel(self, tmp_path: Path) -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
        try:
            model = make_net().train()
            wrapped = nn.parallel.DistributedDataParallel(model)
            monitor = CAMMonitor(wrapped, probes(), 1, target_layer="7", every_n_steps=1)
            loss = wrapped(probes(4, seed=3)).square().sum()
            before = everything(model)
            assert monitor.step() is not None  # between the forward and the backward pass
            assert differences(everything(model), before) == []
            loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("in_place", [False, True])
    def test_compiled_once_and_explained_as_written(self, in_place: bool) -> None:
        graphs = []

        def backend(graph: Any, _inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        plain = make_net().train()
        plain[3] = nn.Identity()
        expected = CAMMonitor(plain, probes(), 1, target_layer="7").probe()
        model: Any = plain
        if in_place:
            plain.compile(backend=backend)
        else:
            model = torch.compile(plain, backend=backend)
        x = probes(4, seed=3)
        model(x).sum().backward()
        count = len(graphs)
        assert count > 0
        monitor = CAMMonitor(model, probes(), 1, target_layer="7")
        before = everything(plain)
        moment = monitor.probe()
        assert differences(everything(plain), before) == []
        model(x).sum().backward()
        assert len(graphs) == count
        assert moment is not None
        assert expected is not None
        assert not math.isnan(moment.values["score"][0])
        assert moment.thumbnails[0].size == expected.thumbnails[0].size
        torch._dynamo.reset()

    def test_probe_passes_are_in_full_precision(self) -> None:
        model = make_net().train()
        model[3] = nn.Identity()

        def score(**options: Any) -> tuple[float, ...]:
            moment = CAMMonitor(model, probes(), 1, target_layer="7", **options).probe()
            assert moment is not None
            return moment.values["score"]

        plain = score()
        with torch.autocast("cpu", torch.bfloat16):
            assert score() == plain
            reduced = score(autocast=torch.bfloat16)
        assert score(autocast=torch.bfloat16) == reduced
        assert reduced != plain
        assert reduced == pytest.approx(plain, abs=0.05)

    def test_half_precision_weights(self) -> None:
        moment = CAMMonitor(make_net().bfloat16(), probes(), 1, target_layer="7").probe()
        assert moment is not None
        assert moment.means["nan"] == 0

    def test_called_in_another_way(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_net()

            def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
                return {"logits": self.net(pixels)}

        moment = CAMMonitor(Named(), probes(), 1, forward=lambda model, images: model(pixels=images)).probe()
        assert moment is not None
        assert moment.means["nan"] == 0

    def test_default_layer_is_chosen_once(self, caplog: pytest.LogCaptureFixture) -> None:
        monitor = CAMMonitor(make_net(), probes(), 1)
        with caplog.at_level(logging.WARNING, "torchcam.methods.core"):
            monitor.probe()
            monitor.probe()
        assert len(caplog.records) == 1
        assert "thus set to '7'" in caplog.text

    def test_moves_with_the_model(self, device: torch.device) -> None:
        model = make_net()
        monitor = CAMMonitor(model, probes(), [0, 1, 2], target_layer="7", masks=torch.ones(3, 10, 10))
        monitor.probe()
        model.to(device)
        before = everything(model)
        moment = monitor.probe()
        assert differences(everything(model), before) == []
        assert moment is not None
        assert moment.means["energy_inside"] == pytest.approx(1)
        assert moment.means["drift"] < 0.5

    def test_images_are_copied(self) -> None:
        images = probes()
        model = make_net().eval()
        model[3] = nn.Identity()
        monitor = CAMMonitor(model, images, 0, target_layer="7")
        first = monitor.probe()
        images.zero_()
        second = monitor.probe()
        assert first is not None
        assert second is not None
        assert first.values["score"] == second.values["score"]

    @pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d, (40,)), (nn.Conv3d, (6, 8, 8))])
    def test_signals_and_volumes(self, conv: type[nn.Module], shape: tuple[int, ...]) -> None:
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = conv(2, 4, 3, padding=1)
                self.fc = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.conv(x).relu().flatten(2).mean(2))

        torch.manual_seed(0)
        masks = torch.ones(2, *shape)
        monitor = CAMMonitor(Pooled(), torch.randn(2, 2, *shape), 1, target_layer="conv", masks=masks)
        moment = monitor.probe()
        assert moment is not None
        assert moment.means["energy_inside"] == pytest.approx(1)
        assert monitor.strip().width > 2 * 96


def read_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class TestPictures:
    def test_first_and_newest_are_kept_and_the_others_are_equally_spaced(self) -> None:
        monitor = CAMMonitor(make_net(), probes(1), 0, target_layer="7", max_columns=4)
        for count in range(40):
            monitor.probe(count)
            kept = [moment.at for moment in monitor._timeline.results]
            assert len(kept) <= 4
            assert kept[0] == 0
            assert kept[-1] == count
            gaps = np.diff(kept)
            assert len(set(gaps[:-1])) <= 1
            assert all(gap >= gaps[-1] for gap in gaps[:-1])
        assert kept == [0, 16, 32, 39]
        assert len(monitor.film()) == 4
        assert len(monitor.history) == 40

    def test_strip_has_a_row_per_image_and_a_column_per_moment(self) -> None:
        """The cells are found by their colours: each picture is of one colour."""
        colours = torch.eye(3)[:, :, None, None].expand(3, 3, 10, 10)
        monitor = CAMMonitor(make_net(), probes(), 0, target_layer="7", pictures=colours.contiguous(), thumbnail=40)
        for count in range(4):
            monitor.probe(count)
        strip = np.asarray(monitor.strip())
        for channel in range(3):
            pure = (strip == 255 * np.eye(3, dtype=int)[channel]).all(-1)
            rows, columns = np.where(pure)
            whole = strip[rows.min() : rows.min() + 40, columns.min() : columns.min() + 40] == 255 * np.eye(3)[channel]
            assert whole.all()  # the picture comes first; maps leave some pixels of theirs as they are
            thumbnails = [moment.thumbnails[channel] for moment in monitor._timeline.results]
            for number, thumbnail in enumerate(thumbnails, start=1):
                left = columns.min() + number * 46
                cell = strip[rows.min() : rows.min() + 40, left : left + 40]
                assert np.array_equal(cell, np.asarray(thumbnail))

    def test_maps_are_drawn_where_they_are_hot(self) -> None:
        images = torch.zeros(1, 1, 8, 8)
        images[..., :4, :4] = 1
        moment = CAMMonitor(Pixelwise(), images, 0, target_layer="layer", colormap="gray").probe()
        assert moment is not None
        drawn = np.asarray(moment.thumbnails[0], dtype=float).mean(-1)
        assert drawn[:40, :40].mean() > 240
        assert drawn[56:, 56:].mean() < 10

    def test_images_out_of_range_are_stretched(self) -> None:
        images = torch.tensor([[[[-2.0, 0.0], [0.0, 2.0]]]])
        monitor = CAMMonitor(Pixelwise(), images, 0, target_layer="layer")
        picture = np.asarray(monitor._timeline.pictures[0])
        assert picture.min() == 0
        assert picture.max() == 255
        assert picture.mean() == pytest.approx(127.5, abs=2)

    def test_labels_of_any_length_fit(self) -> None:
        monitor = CAMMonitor(
            make_net(), probes(2), 0, target_layer="7", labels=["a very long name " * 9, "ñandú"], thumbnail=64
        )
        monitor.probe(123456789012)
        sizes = monitor.strip().size
        monitor._labels = ["a", "b"]
        assert monitor.strip().size == sizes

    def test_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "run"
        model = make_net()
        masks = {"cue": torch.ones(3, 10, 10), "rest": torch.zeros(3, 10, 10)}
        monitor = CAMMonitor(
            model, probes(), [0, 1, 2], target_layer="7", directory=folder, masks=masks, every_n_steps=1
        )
        assert not folder.exists()
        found = [monitor.step() for _ in range(3)]
        assert sorted(path.name for path in folder.iterdir()) == ["film.gif", "scalars.csv", "strip.png"]
        with Image.open(folder / "strip.png") as strip:
            assert np.array_equal(np.asarray(strip), np.asarray(monitor.strip()))
        with Image.open(folder / "film.gif") as film:
            assert film.n_frames == 3
            assert film.info["loop"] == 0
            for number, frame in enumerate(monitor.film()):
                film.seek(number)
                error = np.abs(np.asarray(film.convert("RGB"), float) - np.asarray(frame, float))
                assert film.size == frame.size
                assert error.mean() < 8  # of 255: the colours of a GIF are few
        lines = read_lines(folder / "scalars.csv")
        assert [(line["step"], line["image"], line["class"], line["label"]) for line in lines] == [
            (str(step), str(k), str(k), f"class {k}") for step in (1, 2, 3) for k in range(3)
        ]
        for number, line in enumerate(lines):
            moment = found[number // 3]
            assert moment is not None
            for name, values in moment.values.items():
                assert float(line[name]) == pytest.approx(values[number % 3], rel=1e-4, abs=1e-6, nan_ok=True)
        assert {line["energy_inside_cue"] for line in lines} == {"1"}

    def test_a_torn_last_line_is_mended(self, tmp_path: Path) -> None:
        path = tmp_path / "scalars.csv"
        monitor = CAMMonitor(make_net(), probes(), 0, target_layer="7", directory=tmp_path)
        monitor.probe(1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-3])  # as a disk that was full, or a machine without power
        monitor.probe(2)
        assert path.read_bytes().startswith(whole[: whole[:-1].rindex(b"\n") + 1] + b"2,0,")
        assert [line["step"] for line in read_lines(path)] == ["1", "1", "2", "2", "2"]
        path.write_bytes(path.read_bytes()[:-3])
        again = CAMMonitor(make_net(), probes(), 0, target_layer="7", directory=tmp_path)
        again.resume(2)
        assert [line["step"] for line in read_lines(path)] == ["1", "1", "2", "2"]
        again.probe(3)
        assert [line["step"] for line in read_lines(path)] == ["1", "1", "2", "2", "3", "3", "3"]
        path.unlink()
        again.probe(4)
        assert [line["step"] for line in read_lines(path)] == ["4"] * 3

    def test_a_new_run_replaces_the_lines_of_an_old_one(self, tmp_path: Path) -> None:
        for _ in range(2):
            monitor = CAMMonitor(make_net(), probes(1), 0, target_layer="7", directory=tmp_path)
            monitor.probe(1)
            monitor.probe(2)
        assert [line["step"] for line in read_lines(tmp_path / "scalars.csv")] == ["1", "2"]


class TestResuming:
    def test_goes_on_with_strip_history_and_lines(self, tmp_path: Path) -> None:
        model = make_net().eval()
        model[3] = nn.Identity()

        def start() -> CAMMonitor:
            return CAMMonitor(model, probes(), 0, every_n_steps=1, directory=tmp_path, max_columns=3)

        first = start()
        for _ in range(4):
            first.step()
        torch.save(first.state_dict(), tmp_path / "state.pt")
        kept = np.asarray(first.strip())
        first.step()
        first.step()

        second = start()
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert np.array_equal(np.asarray(second.strip()), kept)
        assert [entry["step"] for entry in second.history] == [1, 2, 3, 4]
        moment = second.step()
        assert moment is not None
        assert moment.at == 5
        assert moment.values["drift"] == pytest.approx([0, 0, 0], abs=1e-6)
        assert [line["step"] for line in read_lines(tmp_path / "scalars.csv")] == [
            str(step) for step in (1, 2, 3, 4, 5) for _ in range(3)
        ]
        assert [m.at for m in second._timeline.results] == [1, 3, 5]

    @pytest.mark.parametrize("text", ["", "epoch,image\n1,0\n"])
    def test_a_table_without_its_lines_begins_anew(self, text: str, tmp_path: Path) -> None:
        first = CAMMonitor(make_net(), probes(), 0, target_layer="7", directory=tmp_path)
        first.probe(1)
        (tmp_path / "scalars.csv").write_text(text)
        second = CAMMonitor(make_net(), probes(), 0, target_layer="7", directory=tmp_path)
        second.load_state_dict(first.state_dict())
        second.probe(2)
        assert [line["step"] for line in read_lines(tmp_path / "scalars.csv")] == ["2"] * 3

    def test_without_a_state_the_lines_stay(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"target_layer": "7", "directory": tmp_path, "every_n_steps": 2}
        first = CAMMonitor(make_net(), probes(), 0, **options)
        for _ in range(8):
            first.step()
        second = CAMMonitor(make_net(), probes(), 0, **options)
        second.resume(5)
        assert second.step(6) is not None
        assert second.step(7) is None
        steps = [line["step"] for line in read_lines(tmp_path / "scalars.csv")]
        assert steps == [str(step) for step in (2, 4, 6) for _ in range(3)]
        with pytest.raises(RuntimeError, match="`resume` was called after the first probe"):
            second.resume(5)

    def test_the_directory_is_a_path(self) -> None:
        with pytest.raises(TypeError, match="`directory` must be a path, got 3 of type int"):
            CAMMonitor(make_net(), probes(), 0, directory=3)  # type: ignore[arg-type]

    def test_of_other_images(self) -> None:
        first = CAMMonitor(make_net(), probes(2), 0, target_layer="7")
        first.probe()
        with pytest.raises(ValueError, match="the state is of 2 probe images, this monitor has 3"):
            CAMMonitor(make_net(), probes(3), 0, target_layer="7").load_state_dict(first.state_dict())


class Run:
    """What is sent to something with `log`."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def log(self, data: dict[str, Any]) -> None:
        self.sent.append(data)


class TestWriters:
    def test_tensorboard(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(tmp_path))
        masks = torch.ones(3, 10, 10)
        with CAMMonitor(
            make_net(), probes(), 1, target_layer="7", masks=masks, writer=writer, every_n_steps=10, tag="watch"
        ) as monitor:
            for step in range(10, 40, 10):
                monitor.step(step)
        frames, strip = monitor.film(), monitor.strip()
        writer.close()

        events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
        names = ["score", "probability", "energy_inside", "drift", "blank", "nan"]
        assert events.Tags()["scalars"] == [f"watch/{name}" for name in [*names[:3], "blank", "nan", "drift"]]
        assert events.Tags()["images"] == ["watch/maps", "watch/strip"]
        for name in names:
            found = [(event.step, event.value) for event in events.Scalars(f"watch/{name}")]
            expected = [(e["step"], e[name]) for e in monitor.history if not math.isnan(e[name])]
            assert [step for step, _ in found] == [step for step, _ in expected]
            assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
        assert len(events.Scalars("watch/drift")) == 2
        assert [event.step for event in events.Images("watch/maps")] == [10, 20, 30]
        assert [(image.width, image.height) for image in events.Images("watch/maps")] == [f.size for f in frames]
        (last,) = events.Images("watch/strip")
        assert (last.step, last.width, last.height) == (30, *strip.size)

    def test_anything_with_log_gets_numbers_and_pixels(self) -> None:
        run = Run()
        monitor = CAMMonitor(make_net(), probes(), 1, target_layer="7", writer=[run], every_n_epochs=1)
        monitor.epoch()
        monitor.epoch()
        monitor.close()
        monitor.close()
        first, second, last = run.sent
        assert set(first) == {"cam/epoch", "cam/maps"} | {f"cam/{k}" for k in ("score", "probability", "blank", "nan")}
        assert set(second) == {*first, "cam/drift"}
        assert [sent["cam/epoch"] for sent in run.sent] == [1, 2, 2]
        assert second["cam/score"] == monitor.history[1]["score"]
        assert np.array_equal(second["cam/maps"], np.asarray(monitor.film()[1]))
        assert set(last) == {"cam/epoch", "cam/strip"}
        assert np.array_equal(last["cam/strip"], np.asarray(monitor.strip()))

    def test_weights_and_biases_gets_its_own_images_and_axis(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class FakeImage:
            def __init__(self, picture: Image.Image) -> None:
                self.picture = picture

        class FakeRun(Run):
            __module__ = "wandb.sdk.wandb_run"

            def __init__(self) -> None:
                super().__init__()
                self.defined: list[tuple[str, str | None]] = []

            def define_metric(self, name: str, step_metric: str | None = None) -> None:
                self.defined.append((name, step_metric))

        fake = types.ModuleType("wandb")
        fake.Image = FakeImage
        monkeypatch.setitem(sys.modules, "wandb", fake)
        run = FakeRun()
        monitor = CAMMonitor(make_net(), probes(), 1, target_layer="7", writer=run)
        monitor.probe(5)
        monitor.probe(6)
        assert run.defined == [("cam/step", None), ("cam/*", "cam/step")]
        assert [sent["cam/step"] for sent in run.sent] == [5, 6]
        assert all(isinstance(sent["cam/maps"], FakeImage) for sent in run.sent)
        assert run.sent[1]["cam/maps"].picture.size == monitor.film()[1].size

    def test_several(self, tmp_path: Path) -> None:
        runs = [Run(), Run()]
        monitor = CAMMonitor(make_net(), probes(), 1, target_layer="7", writer=runs, directory=tmp_path)
        monitor.probe()
        assert [len(run.sent) for run in runs] == [1, 1]
        assert (tmp_path / "strip.png").is_file()
