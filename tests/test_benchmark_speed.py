"""The benchmark of time and memory: its clocks, its statistics, its tables, and that it notices a wrong map."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import _contenders
import _memory_case
import _peers
import _report
import _timing
import benchmark_speed
import pytest
import torch
from _contenders import GC, OURS, OVERHEAD, PLAIN, SMALL, TC, Case, Check, Peers, Setting, Trial
from torch import nn

from torchcam.methods import GradCAM

OF_CONTENDER = {"graph", "weights", "signed", "many"}
SLACK = 2**23  # the kernel counts pages by the batch
GREEDY = """
import sys
from contextlib import contextmanager

import _contenders, _memory_case, torch
from torch import nn


@contextmanager
def greedy(setting):
    yield _contenders.Trial(lambda: int(torch.ones(len(setting.x) * 2**23).sum()))  # 32 MiB for each image


contenders = {_contenders.PLAIN: _contenders.plain, "greedy": greedy}
case = _contenders.Case("greedy", ["tiny"], [2], contenders, layer="1", side=64)
_contenders.memory_cases = lambda *_, **__: [case]
_contenders.make_model = lambda *_: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
for contender in sys.argv[1:]:
    command = ["--peers", "nowhere", "--case", "0", "--contender", contender, "--model", "tiny"]
    assert _memory_case.main([*command, "--batch", "2", "--device", "cpu", "--threads", "1"]) == 0
"""
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the Linux process files")


class FakeClock:
    """A clock that goes on by what the calls say they take."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def measure(self, call: Callable[[], Any]) -> tuple[float, Any]:
        start = self.time
        result = call()
        return self.time - start, result


class Stage:
    """Calls that take what they are told to, and a log of what happened."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.log: list[str] = []

    def call(self, name: str, seconds: Sequence[float]) -> Callable[[], str]:
        left = list(seconds)

        def run() -> str:
            self.log.append(name)
            self.clock.time += left.pop(0) if len(left) > 1 else left[0]
            return f"result of {name}"

        return run

    def entrant(self, name: str, *seconds: float) -> _timing.Entrant:
        run = self.call(name, seconds)

        @contextmanager
        def prepared() -> Iterator[Callable[[], str]]:
            self.log.append(f"+{name}")
            yield run
            self.log.append(f"-{name}")

        return prepared


class TestInterleave:
    def test_takes_turns_between_forwards(self) -> None:
        stage = Stage()
        entrants = {name: stage.entrant(name, 3.0) for name in "AB"}
        _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=2)
        once = ["+A", "A", "-A", "F", "F", "+B", "B", "-B", "F", "F"]
        turn = ["+A", "A", "A", "-A", "F", "F", "+B", "B", "B", "-B", "F", "F"]  # of two in a row, the second counts
        assert stage.log == ["F", "F", *once, *turn * 2]

    def test_a_call_of_many_forwards_is_not_repeated(self) -> None:
        stage = Stage()
        entrants = {"A": stage.entrant("A", 10.0), "B": stage.entrant("B", 9.9)}
        _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=1)
        assert (stage.log.count("A"), stage.log.count("B")) == (2, 3)

    def test_the_first_round_does_not_count(self) -> None:
        stage = Stage()
        entrants = {"A": stage.entrant("A", 19.0, 13.0, 14.0)}
        timings = _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=2)
        assert timings["A"].seconds == [13.0, 14.0]

    def test_counts_in_the_forwards_around_a_call(self) -> None:
        stage = Stage()
        forwards = [1.0, 1.0, 1.0, 1.0, 1.0, 3.0]  # the last but one and the last follow the call that counts
        entrants = {"A": stage.entrant("A", 4.0)}
        timings = _timing.interleave(stage.call("F", forwards), entrants, stage.clock, repeats=1)
        assert timings["A"].forwards == [2.0]
        assert timings["A"].ratios == [2.0]
        assert timings["A"].beside == [2.0]

    def test_a_long_call_is_measured_once(self) -> None:
        stage = Stage()
        entrants = {"long": stage.entrant("long", 30.0, 1.0), "short": stage.entrant("short", 1.0)}
        timings = _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=3, once_above=20)
        assert timings["long"].seconds == [30.0]
        assert timings["short"].seconds == [1.0] * 3

    def test_a_call_longer_than_its_share_is_measured_once(self) -> None:
        stage = Stage()
        entrants = {"long": stage.entrant("long", 8.0, 1.0), "short": stage.entrant("short", 1.0)}
        timings = _timing.interleave(stage.call("F", [0.5]), entrants, stage.clock, repeats=2, seconds=14)
        assert timings["long"].seconds == [8.0]
        assert len(timings["short"].seconds) >= 1

    def test_seconds_end_the_rounds_of_each_but_one(self) -> None:
        stage = Stage()
        entrants = {"A": stage.entrant("A", 4.0), "B": stage.entrant("B", 1.0)}
        timings = _timing.interleave(stage.call("F", [0.5]), entrants, stage.clock, repeats=50, seconds=60)
        # The warm-up takes 8 of the 60 seconds and leaves 26 to each; a turn costs two calls and two forwards.
        assert len(timings["A"].seconds) == 3  # 2 × 9 s are less than 26 s
        assert len(timings["B"].seconds) == 9  # 8 × 3 s are less than 26 s

    def test_every_entrant_is_measured_even_without_time(self) -> None:
        stage = Stage()
        entrants = {name: stage.entrant(name, 1.0) for name in "AB"}
        timings = _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=5, seconds=-3)
        assert {name: timing.seconds for name, timing in timings.items()} == {"A": [1.0], "B": [1.0]}

    def test_looks_at_first_results_within_their_context(self) -> None:
        stage = Stage()
        seen = {}

        def look(name: str, result: str) -> None:
            seen[name] = (result, f"-{name}" in stage.log)

        entrants = {name: stage.entrant(name, 1.0) for name in "AB"}
        _timing.interleave(stage.call("F", [1.0]), entrants, stage.clock, repeats=2, look=look)
        assert seen == {"A": ("result of A", False), "B": ("result of B", False)}

    def test_clears_up_after_a_call_that_raises(self) -> None:
        closed = []

        @contextmanager
        def prepared() -> Iterator[Callable[[], None]]:
            def run() -> None:
                raise KeyError

            try:
                yield run
            finally:
                closed.append(True)

        with pytest.raises(KeyError):
            _timing.interleave(lambda: None, {"A": prepared}, FakeClock(), repeats=1)
        assert closed == [True]


class TestClocks:
    def test_wall_clock_reads_before_and_after(self) -> None:
        readings = iter([5.0, 7.5])
        assert _timing.WallClock(lambda: next(readings)).measure(lambda: "done") == (2.5, "done")

    def test_median_of_calls_in_a_row(self) -> None:
        readings = iter([0.0, 7.0, 10.0, 11.0, 20.0, 22.0])  # calls of 7, 1 and 2 seconds
        results = iter("abc")
        assert _timing.WallClock(lambda: next(readings), calls=3).measure(lambda: next(results)) == (2.0, "c")

    def test_garbage_is_collected_outside_only(self) -> None:
        import gc

        states = []
        _timing.WallClock().measure(lambda: states.append(gc.isenabled()))
        assert states == [False]
        assert gc.isenabled()

    def test_collection_goes_on_after_an_error(self) -> None:
        import gc

        with pytest.raises(ZeroDivisionError):
            _timing.WallClock().measure(lambda: 1 / 0)
        assert gc.isenabled()

    def test_cuda_clock(self, device: torch.device) -> None:
        if device.type != "cuda":
            pytest.skip("needs CUDA")
        x = torch.rand(2048, 2048, device=device)
        seconds, result = _timing.CudaClock().measure(lambda: x @ x)
        assert seconds > 0
        torch.testing.assert_close(result, x @ x)


class TestQuartiles:
    def test_numbers(self) -> None:
        # Interpolated: of 5 numbers, the second, third and fourth.
        assert _timing.quartiles([5, 1, 4, 2, 30]) == _timing.Quartiles(4, 2, 5, 5)

    def test_between_numbers(self) -> None:
        assert _timing.quartiles([0.0, 1.0]) == _timing.Quartiles(0.5, 0.25, 0.75, 2)

    def test_one_number(self) -> None:
        assert _timing.quartiles([3.0]) == _timing.Quartiles(3.0, 3.0, 3.0, 1)

    def test_none(self) -> None:
        with pytest.raises(ValueError, match="no numbers"):
            _timing.quartiles([])


class TestBudget:
    def test_what_one_task_leaves_goes_to_the_others(self) -> None:
        clock = FakeClock()
        budget = _timing.Budget(60, 3, clock)
        assert budget.share() == 20
        clock.time += 10
        assert budget.share() == 25
        clock.time += 50
        assert budget.share() == 0

    def test_overdrawn(self) -> None:
        clock = FakeClock()
        budget = _timing.Budget(60, 2, clock)
        clock.time += 90
        share = budget.share()
        assert share is not None
        assert share < 0

    def test_no_end(self) -> None:
        assert _timing.Budget(None, 2, FakeClock()).share() is None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a package that is called as ours is, and one with a module it cannot do without."""
    package = tmp_path / "torchcam"
    (package / "methods").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import methods\n")
    (package / "methods" / "__init__.py").write_text("from .parts import NAME\n")
    (package / "methods" / "parts.py").write_text("NAME = 'the other one'\n")
    before = dict(sys.modules), list(sys.path)
    yield tmp_path
    for name in sys.modules.keys() - before[0].keys():
        del sys.modules[name]
    sys.path[:] = before[1]


class TestPeers:
    def test_two_packages_of_one_name(self, folder: Path) -> None:
        import torchcam

        other = _peers.load(_contenders.TORCHCAM, folder, "torchcam_for_test")
        assert other.methods.NAME == "the other one"
        assert sys.modules["torchcam_for_test.methods.parts"].NAME == "the other one"
        assert sys.modules["torchcam"] is torchcam
        assert sys.modules["torchcam.methods"].GradCAM is GradCAM
        assert not any(str(folder) in entry for entry in sys.path)

    def test_is_imported_once(self, folder: Path) -> None:
        load = partial(_peers.load, _contenders.TORCHCAM, folder, "torchcam_for_test")
        assert load() is load()

    def test_under_its_own_name(self, folder: Path) -> None:
        (folder / "peer_for_test").mkdir()
        (folder / "peer_for_test" / "__init__.py").write_text("import needed_for_test\n")
        (folder / "needed_for_test.py").write_text("")
        peer = _peers.Peer(["peer==1"], "peer_for_test", __file__)
        assert _peers.load(peer, folder, "peer_for_test").__name__ == "peer_for_test"
        assert sys.path[-1] == str(folder)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"torchcam==0\.5\.0 is not in"):
            _peers.load(_contenders.TORCHCAM, tmp_path, "torchcam_for_test")

    def test_one_that_fails_is_not_kept(self, folder: Path) -> None:
        (folder / "torchcam" / "__init__.py").write_text("1 / 0\n")
        with pytest.raises(ZeroDivisionError):
            _peers.load(_contenders.TORCHCAM, folder, "torchcam_for_test")
        assert "torchcam_for_test" not in sys.modules

    def test_installed_where_missing_only(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands: list[list[str]] = []
        monkeypatch.setattr(_peers.subprocess, "run", lambda command, **_: commands.append(command))
        _peers.install(_contenders.TORCHCAM, folder)
        assert commands == []
        _peers.install(_contenders.TORCHCAM, folder / "empty")
        (command,) = commands
        assert command[-3:] == ["--target", str(folder / "empty"), "torchcam==0.5.0"]


class TestChecks:
    def test_maps_do_not_depend_on_scale_or_negative_values(self) -> None:
        one = torch.tensor([[[0.0, 1.0], [2.0, -7.0]]])
        other = torch.tensor([[[-3.0, 10.0], [20.0, 0.0]]])
        assert Check().compare(one, other).difference == pytest.approx(0.0, abs=1e-12)

    def test_the_worst_sample_counts(self) -> None:
        one = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 1.0, 4.0]]])
        other = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 2.0, 4.0]]])
        found = Check().compare(one, other)
        assert found.difference == pytest.approx(0.25)
        assert not found.good

    def test_a_reason_excuses(self) -> None:
        one, other = torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[2.0, 1.0, 0.0]]])
        assert Check(reason="turned round").compare(one, other).good
        assert not Check().compare(one, other).good

    def test_the_other_sign(self) -> None:
        one, other = torch.tensor([[[-2.0, 1.0, 0.5]]]), torch.tensor([[[4.0, -2.0, -1.0]]])
        assert Check(kind="signed").compare(one, other).difference == pytest.approx(0.0)
        assert Check().compare(one, other).difference == pytest.approx(1.0)

    def test_each_sample_has_a_sign_of_its_own(self) -> None:
        one, other = torch.tensor([[0.1, 0.2], [0.1, 0.2]]), torch.tensor([[0.1, 0.2], [-0.1, -0.2]])
        assert Check(kind="weights").compare(one, other).difference == pytest.approx(0.0)

    def test_weights_are_relative_to_the_largest(self) -> None:
        one, other = torch.tensor([[100.0, 200.0]]), torch.tensor([[102.0, 200.0]])
        assert Check(kind="weights").compare(one, other).difference == pytest.approx(0.01)

    def test_values_as_they_are(self) -> None:
        one, other = torch.tensor([[0.25]]), torch.tensor([[0.5]])
        assert Check(kind="values").compare(one, other).difference == pytest.approx(0.25)

    def test_nan_agrees_with_nothing(self) -> None:
        broken = torch.tensor([[[0.0, torch.nan, 2.0]]])
        assert not Check().compare(broken, broken).good

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 4, 4\) cannot be compared"):
            Check().compare(torch.zeros(1, 2, 2), torch.zeros(1, 4, 4))

    def test_tokens_become_rows(self) -> None:
        tokens = torch.arange(10.0).reshape(1, 5, 2)  # a class token, then 2 × 2 patches with 2 channels
        grid = _contenders.tokens_to_grid(tokens)
        assert grid.tolist() == [[[[2.0, 4.0], [6.0, 8.0]], [[3.0, 5.0], [7.0, 9.0]]]]


@pytest.fixture(scope="module")
def setting() -> Setting:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    return Setting("tiny", model, "1", torch.randn(2, 3, 12, 12), [1, 4])


def measured(setting: Setting, **contenders: Any) -> dict[str, Any]:
    names = {"ours": OURS, "peer": TC}
    case = Case(
        "tiny",
        ["tiny"],
        [2],
        {names[name]: contender for name, contender in contenders.items()},
        checks={TC: Check()},
    )
    return benchmark_speed.measure_case(case, setting, _timing.WallClock(), repeats=2, seconds=None, every=True)


class TestCases:
    """Real measurements, of a model that takes a moment; a method of ours stands in for a peer's."""

    def test_agreement(self, setting: Setting) -> None:
        row = measured(setting, ours=_contenders.ours, peer=partial(_contenders.ours, method="HiResCAM"))
        (agreement,) = row["agreements"]
        assert agreement["good"]  # they are equal where pooling follows the layer
        assert (row["layer"], row["batch"]) == ("1", 2)
        for timing in row["times"].values():
            assert len(timing["seconds"]) == len(timing["forwards"]) == 2
            assert all(seconds > 0 for seconds in timing["seconds"])

    def test_a_wrong_map_is_noticed(self, setting: Setting) -> None:
        row = measured(setting, ours=_contenders.ours, peer=partial(_contenders.ours, method="MeanActivation"))
        (agreement,) = row["agreements"]
        assert not agreement["good"]
        (line,) = _report.Results({"times": [row]}).disagreements()
        assert line.startswith("tiny tiny 1 batch 2: TorchCAM 0.5 by ")

    def test_weights(self, setting: Setting) -> None:
        with _contenders.ours(setting, method="AblationCAM", weights=True) as trial:
            assert trial.comparable is not None
            weights = trial.comparable(trial.run())
        with torch.no_grad():
            activation = setting.model[:2](setting.x)
            for sample, class_idx in enumerate(setting.classes):
                whole = setting.model[2:](activation)[sample, class_idx]
                for channel in range(6):
                    ablated = activation.clone()
                    ablated[:, channel] = 0
                    drop = whole - setting.model[2:](ablated)[sample, class_idx]
                    assert weights[sample, channel].item() == pytest.approx((drop / whole.abs()).item(), abs=1e-5)

    def test_many_classes_of_one_image(self, setting: Setting) -> None:
        one = Setting("tiny", setting.model, "1", setting.x[:1], [0, 3, 2])
        with _contenders.ours(one, many=True) as trial:
            assert trial.comparable is not None
            maps = trial.comparable(trial.run())
        assert maps.shape == (3, 10, 10)
        for class_idx, cam in zip(one.classes, maps, strict=True):
            with _contenders.ours(Setting("tiny", setting.model, "1", one.x, [class_idx])) as trial:
                torch.testing.assert_close(trial.run()[0][0], cam)

    def test_signed_maps(self, setting: Setting) -> None:
        with _contenders.ours(setting, method="EigenCAM", signed=True) as trial:
            assert trial.comparable is not None
            (cam,) = trial.run()
            signed = trial.comparable([cam])
        assert signed.amin() < 0
        torch.testing.assert_close(_contenders.scaled(signed), cam.clone())

    def test_leaves_no_hook(self, setting: Setting) -> None:
        one = Setting("tiny", setting.model, "1", setting.x[:1], [0, 3])
        for contender in (
            partial(_contenders.ours, many=True),
            _contenders.first_class,
            partial(_contenders.watched, enabled=True),
            _contenders.plain,
        ):
            with contender(one) as trial:
                trial.run()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in setting.model.modules())

    @pytest.mark.parametrize(("enabled", "records"), [(True, True), (False, False)])
    def test_hooks_enabled_or_not(self, setting: Setting, enabled: bool, records: bool) -> None:
        made: list[GradCAM] = []

        class Kept(GradCAM):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                made.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_contenders.methods, "GradCAM", Kept)
            with _contenders.watched(setting, enabled=enabled) as trial:
                trial.run()
                (extractor,) = made
                (activation,) = extractor.hook_a
        assert (activation is not None) is records

    def test_overhead_of_a_small_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All methods, with ours in the place of the peers, on one thread and back."""
        monkeypatch.setattr(_contenders, "theirs", lambda setting, **_: _contenders.ours(setting))
        monkeypatch.setattr(_contenders, "grad_cams", lambda setting, **_: _contenders.ours(setting))
        found = _contenders.overhead_cases(Peers(Path("nowhere")))
        options = benchmark_speed.parse(
            ["--models", SMALL, "--repeats", "2", "--device", "cuda"]
        )  # it is measured on the CPU
        number = torch.get_num_threads()
        threads = []

        def measure(*args: Any, **kwargs: Any) -> dict[str, Any]:
            threads.append(torch.get_num_threads())
            return measure_case(*args, **kwargs)

        measure_case = benchmark_speed.measure_case
        monkeypatch.setattr(benchmark_speed, "measure_case", measure)
        rows = benchmark_speed.measure_overhead(found, options, _timing.Budget(None, 4, FakeClock()))
        assert [row["case"] for row in rows] == list(OVERHEAD)
        assert threads == [1] * 4
        assert torch.get_num_threads() == number
        for row in rows:
            assert (row["model"], row["layer"], row["batch"]) == (SMALL, "2", 1)
            others = [] if row["case"] == "ScoreCAM" else [_contenders.IN_INFERENCE_MODE]
            expected = dict.fromkeys([OURS, *others, TC, GC], 2)
            assert {name: len(timing["seconds"]) for name, timing in row["times"].items()} == expected
            assert [agreement["contender"] for agreement in row["agreements"]] == [TC, GC]
        assert not _report.Results({"overhead": rows[:1]}).disagreements()  # Grad-CAM is what stands in for all
        assert _report.overhead_table(_report.Results({"overhead": rows})).count(f"| {SMALL} | 2 |") == 4

    def test_slow_ones_are_left_out(self, setting: Setting) -> None:
        def explode(_: Setting) -> AbstractContextManager[Trial]:
            raise AssertionError("it was not asked for")

        case = Case("tiny", ["tiny"], [2], {OURS: _contenders.ours, GC: explode}, checks={GC: Check()}, slow=[GC])
        row = benchmark_speed.measure_case(case, setting, _timing.WallClock(), repeats=1, seconds=None, every=False)
        assert (list(row["times"]), row["left_out"], row["agreements"]) == ([OURS], [GC], [])

    def test_every_case_can_be_set_up(self) -> None:
        """The names of methods, layers and contenders are right, in every case that there is."""
        import torchvision

        peers = Peers(Path("nowhere"))
        with torch.device("meta"):
            models = {
                name: dict(torchvision.models.get_model(name, weights=None).named_modules())
                for name in _contenders.PUBLISHED
            }
        models[SMALL] = dict(_contenders.make_model(SMALL, "cpu").named_modules())
        assert set(models) == set(_contenders.LAYERS)
        found = [*_contenders.cases(peers, every=True), *_contenders.memory_cases(peers, every=True)]
        for case in [*found, *_contenders.overhead_cases(peers)]:
            assert set(case.checks) <= set(case.contenders)
            assert set(case.slow) <= set(case.contenders)
            for name in case.models:
                assert (case.layer or _contenders.LAYERS[name]) in models[name]
            for contender in case.contenders.values():
                if isinstance(contender, partial) and contender.func is _contenders.ours:
                    options = {key: value for key, value in contender.keywords.items() if key not in OF_CONTENDER}
                    method = getattr(_contenders.methods, options.pop("method", "GradCAM"))
                    layers = () if method is _contenders.methods.FullGrad else ("1",)
                    method(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), *layers, **options)  # takes the options

    def test_channels_before_the_pooling(self) -> None:
        import torchvision

        model = _contenders.widened(torchvision.models.resnet18(), 40)
        with _contenders.methods.MeanActivation(model, "9") as extractor, torch.inference_mode():
            assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)
            (activation,) = extractor.hook_a
        assert activation is not None
        assert activation.shape == (1, 40, 2, 2)


def times(**seconds: Sequence[float]) -> dict[str, Any]:
    """Timings of contenders, with forwards of half a second."""
    names = {"ours": OURS, "tc": TC, "gc": GC}
    return {
        names.get(name, name): {"seconds": list(values), "forwards": [0.5] * len(values)}
        for name, values in seconds.items()
    }


def a_row(case: str, found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    row = {"case": case, "model": "resnet18", "layer": "layer4", "batch": 1, "note": "", "left_out": []}
    return {**row, "times": found, "agreements": [], **changes}


DATA: dict[str, Any] = {
    "machine": {"cpu": "a fast one", "cores": 2},
    "times": [
        a_row("GradCAM", times(ours=[0.51, 0.52, 0.53], tc=[0.55], gc=[1.5, 1.6])),
        a_row("AblationCAM", times(ours=[1.0]), left_out=[GC], note="all channels"),
        a_row("EigenCAM", times(ours=[0.6, 0.6])),
        a_row("EigenCAM", times(ours=[0.5, 0.5]), batch=8),
    ],
    "memory": [
        {
            "case": "GradCAM",
            "model": "resnet50",
            "layer": "layer4",
            "batch": 8,
            "note": "",
            "bytes": {PLAIN: 100e6, OURS: 120e6, TC: 700e6},
        }
    ],
}


class TestReport:
    def test_times_side_by_side(self) -> None:
        text = _report.times_table(_report.Results(DATA))
        assert "| GradCAM | resnet18 | layer4 | 1 | 1.04 (1.03–1.05) | 1.10 (once) | 3.10 (3.05–3.15) |" in text
        assert "| 1.06 × | 2.98 × |" in text
        assert "| AblationCAM, all channels | resnet18 | layer4 | 1 | 2.00 (once) | – | not run | – | – |" in text

    def test_other_contenders_have_a_table_of_their_own(self) -> None:
        found = times(ours=[1.0], **{f"{OURS}, 8 at a time": [0.8]})
        text = _report.times_table(_report.Results({"times": [a_row("ScoreCAM", found)]}))
        assert "| ScoreCAM: 8 at a time | resnet18 | layer4 | 1 | 1.60 (once) |" in text

    def test_overhead_side_by_side(self) -> None:
        found = times(ours=[0.5003, 0.5005], tc=[0.5002], gc=[0.502])  # 300 and 500, 200 and 2000 µs beside a forward
        results = _report.Results({"overhead": [a_row("LayerCAM", found, model=SMALL, layer="2")]})
        text = _report.overhead_table(results)
        assert (
            "| LayerCAM | small | 2 | 500,000 | 400 (350–450) | – | 200 (once) | 2,000 (once) | 2.00 | 0.20 |" in text
        )
        assert f"### Host time beside the forward pass\n\n{text}" in _report.write_report(results)
        assert results.overhead(TC) == pytest.approx(2.0)
        assert results.overhead(TC, case="GradCAM") is None

    def test_memory_side_by_side(self) -> None:
        text = _report.memory_table(_report.Results(DATA))
        assert "| GradCAM | resnet50 | layer4 | 8 | 100 | 120 | 700 | – |" in text

    def test_targets(self) -> None:
        found = {target.what: target for target in _report.targets(_report.Results(DATA))}
        assert len(found) == len(_report.targets(_report.Results(DATA)))
        gradcam = found["GradCAM resnet18, batch 1 [F]"]
        assert (gradcam.value, gradcam.verdict) == (pytest.approx(1.04), "PASS")
        eigen = found["EigenCAM [F]"]  # the worst of its cases
        assert (eigen.value, eigen.verdict) == (pytest.approx(1.2), "FAIL")
        memory = found["GradCAM resnet50, batch 8: peak memory / plain inference's"]
        assert (memory.value, memory.verdict) == (pytest.approx(1.2), "PASS")
        peer = found["GradCAM resnet50, batch 8: TorchCAM's peak memory / ours"]
        assert (peer.value, peer.verdict) == (pytest.approx(700 / 120), "PASS")
        assert found["FullGrad [F]"].verdict == "not measured"

    def test_targets_of_a_complete_measurement(self) -> None:
        """Every target finds its number, so that none can stay unmeasured by a slip of the pen."""
        peers = Peers(Path("nowhere"))
        data: dict[str, Any] = {"times": [], "overhead": [], "memory": []}
        for case in _contenders.cases(peers, every=True):
            for model in case.models:
                for batch in case.batches:
                    layer = case.layer or _contenders.LAYERS[model]
                    row = a_row(case.name, times(**{name: [1.0] for name in case.contenders}), model=model, layer=layer)
                    agreements = [{"contender": GC, "difference": 0.0, "tolerance": 1.0, "reason": "", "good": True}]
                    data["times"].append({**row, "batch": batch, "agreements": agreements})
        for case in _contenders.overhead_cases(peers):
            found = times(**{name: [0.75] for name in case.contenders})
            data["overhead"] += [a_row(case.name, found, model=model) for model in case.models]
        for case in _contenders.memory_cases(peers, every=True):
            for model in case.models:
                for batch in case.batches:
                    row = {"case": case.name, "model": model, "layer": case.layer, "batch": batch, "note": ""}
                    data["memory"].append({**row, "bytes": dict.fromkeys(case.contenders, 5.0)})
        data["imports"] = {"torch": [1.0], "torchcam.methods": [1.05]}
        data["stream"] = {"early": 100, "end": 101}
        found = _report.targets(_report.Results(data))
        assert [target.what for target in found if target.verdict == "not measured"] == []
        values = {target.what: target.value for target in found}
        assert values["`import torchcam.methods` / `import torch`"] == pytest.approx(1.05)
        assert values["2,000 images through a stream: memory at the end / after 100"] == pytest.approx(1.01)
        assert values["100 classes of one image at layer3 / 100 single calls"] == pytest.approx(0.01)
        assert values["ScoreCAM: host time beside the forward of a small model / TorchCAM's"] == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("target", "verdict", "cells"),
        [
            (_report.Target("a", 1.05, 1.05), "PASS", ["a", "≤ 1.05", "1.05", "PASS"]),
            (_report.Target("a", 1.05, 1.06), "FAIL", ["a", "≤ 1.05", "1.06", "FAIL"]),
            (_report.Target("a", 200, 199.9, least=True), "FAIL", ["a", "≥ 200", "200", "FAIL"]),
            (_report.Target("a", 1e-5, 3e-6), "PASS", ["a", "≤ 1e-05", "3.0e-06", "PASS"]),
            (_report.Target("a", 4, None), "not measured", ["a", "≤ 4", "–", "not measured"]),
        ],
    )
    def test_verdicts(self, target: _report.Target, verdict: str, cells: list[str]) -> None:
        assert target.verdict == verdict
        assert target.cells == cells

    def test_report_has_what_was_measured(self, tmp_path: Path) -> None:
        text = _report.write_report(_report.Results(DATA), {"Peak memory": tmp_path / "memory.png"})
        assert "cpu a fast one, cores 2" in text
        assert "![Peak memory](images/memory.png)" in text
        assert "### How costs grow" not in text
        assert text.count("### Targets") == 1

    def test_summary_is_a_table(self) -> None:
        lines = _report.summary_table(_report.Results(DATA)).splitlines()
        assert lines[0].count("|") == lines[1].count("|")
        assert "| AblationCAM, all channels, resnet18 layer4 | 2.00 F | – | – |" in lines
        assert "| GradCAM, resnet50, batch of 8, peak memory | 120 MB | 700 MB | – |" in lines

    def test_pictures(self, tmp_path: Path) -> None:
        from PIL import Image

        growth = [
            {"method": "GradCAM", "axis": "classes", "value": value, "times": times(ours=[0.5 * value, 0.6 * value])}
            for value in (1, 10)
        ]
        results = _report.Results({**DATA, "growth": growth})
        pictures = _report.draw(results, tmp_path / "new")
        assert set(pictures) == {"How costs grow", "Peak memory"}
        for path in pictures.values():
            with Image.open(path) as picture:
                assert min(picture.size) > 150
                assert len(picture.convert("RGB").getcolors(2**24)) > 10
        assert "1.10 F at 1 → 11.0 F at 10" in _report.growth_table(results)

    def test_nothing_measured(self) -> None:
        text = _report.write_report(_report.Results({}))
        assert "PASS" not in text
        assert "FAIL" not in text


class TestJoining:
    def test_later_rows_win_and_others_stay(self) -> None:
        earlier = {"times": [a_row("A", times(ours=[1.0])), a_row("B", times(ours=[1.0]))], "imports": {"torch": [1.0]}}
        later = {"times": [a_row("A", times(ours=[2.0]))]}
        joined = _report.Results(later).joined(earlier)
        found = {row["case"]: row["times"][OURS]["seconds"] for row in joined["times"]}
        assert found == {"A": [2.0], "B": [1.0]}
        assert joined["imports"] == {"torch": [1.0]}

    def test_cases_and_models_are_in_their_order(self) -> None:
        earlier = {"times": [a_row("AblationCAM", {}), a_row("GradCAM", {}, model="vit_b_16")]}
        joined = _report.Results({"times": [a_row("ROAD", {}), a_row("GradCAM", {})]}).joined(earlier)
        found = [(row["case"], row["model"]) for row in joined["times"]]
        assert found == [
            ("GradCAM", "resnet18"),
            ("GradCAM", "vit_b_16"),
            ("ROAD", "resnet18"),
            ("AblationCAM", "resnet18"),
        ]

    def test_overhead_is_joined_as_well(self) -> None:
        row = a_row("GradCAM", times(ours=[1.0]), model=SMALL)
        joined = _report.Results({"overhead": [a_row("LayerCAM", {})]}).joined({"overhead": [row]})
        assert [found["case"] for found in joined["overhead"]] == ["GradCAM", "LayerCAM"]

    def test_another_batch_is_another_row(self) -> None:
        joined = _report.Results({"times": [a_row("A", times(ours=[2.0]), batch=8)]}).joined(
            {"times": [a_row("A", times(ours=[1.0]))]}
        )
        assert [row["batch"] for row in joined["times"]] == [1, 8]


class TestBlocks:
    def test_replaced(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("above\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nbelow\n", encoding="utf-8")
        for content in ("new", "newer – with ×"):
            _report.replace_block(page, "speed", content)
        text = page.read_text(encoding="utf-8")
        assert text == "above\n<!-- speed:begin -->\n\nnewer – with ×\n\n<!-- speed:end -->\nbelow\n"

    @pytest.mark.parametrize(
        "text",
        [
            "no markers",
            "<!-- speed:begin -->",
            "<!-- speed:end --><!-- speed:begin -->",
            "<!-- speed:begin --><!-- speed:begin --><!-- speed:end -->",
        ],
    )
    def test_markers_must_be_there(self, tmp_path: Path, text: str) -> None:
        page = tmp_path / "page.md"
        page.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="needs one <!-- speed:begin --> and, after it, one <!-- speed:end -->"):
            _report.replace_block(page, "speed", "new")
        assert page.read_text(encoding="utf-8") == text

    def test_the_page_has_them(self) -> None:
        page = benchmark_speed.ROOT / "docs" / "performance.md"
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- benchmark:begin -->") == text.count("<!-- benchmark:end -->") == 1


class TestMemory:
    @LINUX
    def test_high_water_is_that_of_the_call(self) -> None:
        before = _memory_case.resident()
        _memory_case.reset_high_water()
        held = torch.ones(2**24)  # 64 MiB, written to
        del held
        grown = _memory_case.high_water() - before
        assert abs(grown - 2**26) < SLACK
        _memory_case.resident()
        _memory_case.reset_high_water()
        assert _memory_case.high_water() - before < 2**25

    @LINUX
    def test_a_case_in_a_process(self) -> None:
        """In one of its own: this one has held and freed other memory, and may run other threads."""
        names = [PLAIN, "greedy"]
        environment = {**os.environ, **_memory_case.ALLOCATOR, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", GREEDY, *names]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
        sizes = {name: numbers["peak"] - numbers["before"] for name, numbers in found.items()}
        assert abs(sizes["greedy"] - 2**26) < SLACK
        assert sizes[PLAIN] < SLACK

    def test_images_of_a_stream(self) -> None:
        images = _memory_case.Images(10, 4, 8, "cpu")
        first, again = list(images), list(images)
        assert [len(batch) for batch in first] == [4, 4, 2]
        assert first[0].shape[1:] == (3, 8, 8)
        for batch, same in zip(first, again, strict=True):
            torch.testing.assert_close(batch, same)

    def test_memory_after_some_of_a_stream_and_at_the_end(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[int] = []
        handle = setting.model.register_forward_pre_hook(lambda _model, args: passes.append(len(args[0])))
        monkeypatch.setattr(_memory_case, "in_use", lambda _device: sum(passes))
        images = _memory_case.Images(20, 3, 12, "cpu")
        held = _memory_case.follow_stream(setting.model, "1", images, early=7)
        handle.remove()
        assert held == {"early": 9, "end": 20}


class TestCommand:
    def test_quick(self) -> None:
        options = benchmark_speed.parse(["--quick"])
        assert (options.models, options.batch_sizes, options.repeats) == (["resnet18"], [1], 2)
        assert options.sections == ["times", "imports"]

    def test_unknown_case(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            benchmark_speed.parse(["--cases", "GradCAM", "NoCAM"])
        assert "unknown --cases ['NoCAM']; there are ['100 classes', 'AblationCAM'" in capsys.readouterr().err

    def test_the_default_folder_is_ignored_by_git(self) -> None:
        folder = benchmark_speed.parse([]).peers.relative_to(benchmark_speed.ROOT)
        assert f"{folder.parts[0]}/" in (benchmark_speed.ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()

    def test_tasks(self) -> None:
        options = benchmark_speed.parse(["--models", "resnet18", "vit_b_16", "--batch-sizes", "1", "8", "2"])
        cases = [
            Case("A", ["resnet18", "vit_b_16"], [1, 8], {}),
            Case("B", ["resnet50"], [1], {}),
            Case("C", ["vit_b_16"], [1, 4], {}),
        ]
        assert benchmark_speed.count_tasks(cases, options) == 5

    def test_clocks(self) -> None:
        assert isinstance(benchmark_speed.make_clock(benchmark_speed.parse(["--device", "cuda"])), _timing.CudaClock)
        clock = benchmark_speed.make_clock(benchmark_speed.parse(["--cpu-time"]))
        assert clock.now.__self__._read.__name__ == "process_time"  # type: ignore[attr-defined]

    def test_the_machine_is_not_named(self) -> None:
        import platform

        text = json.dumps(benchmark_speed.machine("cpu"))
        assert platform.node() not in text
        assert str(Path.home()) not in text
        assert torch.__version__ in text

    @pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
    def test_exit_code_is_that_of_the_agreement(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], good: bool, code: int
    ) -> None:
        agreement = {"contender": TC, "difference": 0.5, "tolerance": 1e-4, "reason": "", "good": good}
        data = {**DATA, "times": [a_row("GradCAM", times(ours=[9.0]), agreements=[agreement])]}
        path = tmp_path / "found.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        assert benchmark_speed.main(["--render", str(path)]) == code
        printed = capsys.readouterr().out
        assert ("DISAGREES: GradCAM resnet18 layer4 batch 1: TorchCAM 0.5 by 5.0e-01" in printed) is not good
        assert "| GradCAM resnet18, batch 1 [F] | ≤ 1.05 | 18 | FAIL |" in printed  # which does not count

    def test_several_measurements_are_rendered_together(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [tmp_path / "one.json", tmp_path / "two.json"]
        paths[0].write_text(json.dumps({**DATA, "machine": {}}), encoding="utf-8")
        paths[1].write_text(json.dumps({"times": [a_row("EigenCAM", times(ours=[0.5]))]}), encoding="utf-8")
        assert benchmark_speed.main(["--render", *map(str, paths)]) == 0
        printed = capsys.readouterr().out
        assert "| EigenCAM [F] | ≤ 1.1 | 1 | PASS |" in printed  # 1.2 F was replaced
        assert "| GradCAM | resnet18 | layer4 | 1 | 1.04" in printed

    @pytest.mark.benchmark
    def test_quick_run_with_the_peers(self, tmp_path: Path) -> None:
        """The whole way, downloads of the peers included."""
        path = tmp_path / "found.json"
        assert benchmark_speed.main(["--quick", "--cases", "GradCAM", "EigenCAM", "--json", str(path)]) == 0
        found = json.loads(path.read_text(encoding="utf-8"))
        assert [row["case"] for row in found["times"]] == ["GradCAM", "EigenCAM"]
        assert set(found["times"][0]["times"]) == {OURS, TC, GC}
        assert all(a["good"] and a["difference"] < 1e-3 for row in found["times"] for a in row["agreements"])
