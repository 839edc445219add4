"""The benchmark of explanations: its pictures, its scores, what it shows, and its tables."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from torchcam.demo import data as demo_data
from torchcam.demo import load_model, make_scenes
from torchcam.methods import GradCAM, HiResCAM
from torchcam.metrics import ADCC, ARCC, ClassificationMetric, DeletionInsertionMetric, Localization

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts import each other as a script does
import _quality_contest as contest  # noqa: E402
import _quality_layers as layers  # noqa: E402
import _quality_models as models  # noqa: E402
import _quality_page as page_of  # noqa: E402
import _quality_scenes as scenes  # noqa: E402
import _quality_scores as scored  # noqa: E402
import _quality_stats as stats  # noqa: E402
import benchmark_quality as bench  # noqa: E402

sys.path.remove(str(SCRIPTS))

MAKERS = (scenes.one_digit, scenes.two_digits, scenes.shortcut, scenes.grids)


def one(name: str, model: nn.Module, method: str) -> contest.Contestant:
    (found,) = contest.contestants(name, model, [method])
    return found


@pytest.fixture(scope="module")
def pairs() -> scenes.Task:
    return scenes.two_digits(6, 5)


@pytest.fixture(scope="module")
def four() -> scenes.Task:
    return scenes.grids(8, 5)


class TestPictures:
    @pytest.mark.parametrize("make", MAKERS)
    def test_same_seed_same_pictures(self, make: Any) -> None:
        first, second, other = make(5, 3), make(5, 3), make(5, 4)
        for field in fields(first):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name))
        assert not torch.equal(first.images, other.images)
        assert first.images.shape[1:] == (3, 96, 96)
        assert first.truth.flatten(1).any(1).all()
        assert not (first.truth & ~first.masks).any()

    def test_handwriting_of_the_test_split_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        load = demo_data._load_handwriting

        def spy(split: str) -> Any:
            asked.append(split)
            return load(split)

        monkeypatch.setattr(demo_data, "_load_handwriting", spy)
        for make in MAKERS:
            make(2, 0)
        assert set(asked) == {"test"}
        assert len(asked) == len(MAKERS)
        asked.clear()
        for name in ("vgg", "shortcut"):
            stage, rng = models._Stage(2, 1, 0.1), np.random.default_rng(0)
            models._training_set(name, models.ShortcutNet(), stage, rng, torch.Generator())
        assert set(asked) == {"train"}

    def test_two_digits_are_asked_about_in_turn(self, pairs: scenes.Task) -> None:
        assert pairs.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert torch.equal(pairs.images[0::2], pairs.images[1::2])
        assert torch.equal(pairs.masks[0::2], pairs.others[1::2])
        assert torch.equal(pairs.masks[1::2], pairs.others[0::2])
        assert (pairs.classes[0::2] != pairs.classes[1::2]).all()

    def test_grids(self, four: scenes.Task) -> None:
        corner = {tuple(mask.nonzero()[0].tolist()) for mask in four.masks}
        assert corner == {(0, 0), (0, 48), (48, 0), (48, 48)}
        assert (four.masks.sum((1, 2)) == 48 * 48).all()
        erased = make_scenes(128, num_digits=1, size=48, digit_size=(28.0, 36.0), seed=np.random.default_rng(5))
        for image, mask, class_idx in zip(four.images, four.masks, four.classes, strict=True):
            cell = image[:, mask].reshape(3, 48, 48)
            (index,) = (erased.images == cell).flatten(1).all(1).nonzero().flatten().tolist()
            assert erased.labels[index, 0] == class_idx

    @pytest.mark.parametrize("corners", [True, False])
    def test_cues(self, corners: bool) -> None:
        plain = make_scenes(40, num_digits=1, seed=1)
        images, cues = scenes.add_cues(plain, plain.labels[:, 0], 1, corners=corners)
        assert (cues.sum((1, 2)) == 16 * 16).all()
        assert not (cues & plain.masks[:, 0]).any()
        assert torch.equal((images != plain.images).any(1) & ~cues, torch.zeros_like(cues))
        for image, cue, label in zip(images, cues, plain.labels[:, 0], strict=True):
            torch.testing.assert_close(image[:, cue].mean(1), scenes.CUE_COLORS[label], atol=0.02, rtol=0)
        places = {tuple(cue.nonzero()[0].tolist()) for cue in cues}
        assert (places <= {(4, 4), (4, 76), (76, 4), (76, 76)}) is corners
        assert len(places) >= 4

    def test_found_by(self, pairs: scenes.Task) -> None:
        logits = torch.ones(12, 10)
        logits[3, pairs.classes[3]] = -1  # the second digit of the second picture is missed
        assert pairs.found_by(logits, 3).groups.tolist() == [0, 0, 2, 2, 3, 3]


class TestScores:
    def test_grid_pointing(self, four: scenes.Task) -> None:
        even = torch.ones(8, 96, 96)
        assert scored.locate(even, four, "d")["d energy"].tolist() == pytest.approx([0.25] * 8)
        right = scored.locate(four.masks.float(), four, "d")
        assert right["d energy"].tolist() == right["d pointing"].tolist() == [1.0] * 8
        wrong = scored.locate(four.others.float(), four, "d")
        assert wrong["d energy"].tolist() == wrong["d pointing"].tolist() == [0.0] * 8
        mixed = four.masks * 3.0 + four.others * 1.0
        assert scored.locate(mixed, four, "d")["d energy"].tolist() == pytest.approx([0.5] * 8)

    def test_two_digits(self, pairs: scenes.Task) -> None:
        own, other = pairs.masks.float(), pairs.others.float()
        nowhere = 1 - own - other
        areas = own.sum((1, 2)), other.sum((1, 2))
        found = scored.locate(own, pairs, "b")
        assert found.keys() == {"b ap", "b pointing", "b energy"}
        assert all(value.tolist() == [1.0] * 12 for value in found.values())
        found = scored.locate(other, pairs, "b")
        assert found["b energy"].tolist() == found["b pointing"].tolist() == [0.0] * 12
        chance = areas[0] / (areas[0] + areas[1])
        for maps in (0 * own, nowhere):  # no preference
            for value in scored.locate(maps, pairs, "b").values():
                torch.testing.assert_close(value.float(), chance)
        found = scored.locate(0.8 * own + 0.4 * other + nowhere, pairs, "b")
        expected = 0.8 * areas[0] / (0.8 * areas[0] + 0.4 * areas[1])
        torch.testing.assert_close(found["b energy"].float(), expected)
        assert found["b pointing"].tolist() == [1.0] * 12

    def test_a_map_that_ignores_the_class_is_exactly_at_chance(self, pairs: scenes.Task) -> None:
        maps = torch.rand(6, 96, 96, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
        found = scored.locate(maps, pairs, "b")
        for values in (found["b energy"], found["b pointing"]):
            of_pictures = stats.group_means(values.numpy(), pairs.groups.numpy())
            assert of_pictures == pytest.approx(np.full(6, 0.5))

    def test_precision_of_a_map_that_prefers_one_digit_is_above_chance(self, pairs: scenes.Task) -> None:
        """The page says so: all of one digit first is 1 for one question, and about 1 - log 2 for the other."""
        maps = (2.0 * pairs.masks[0::2] + pairs.masks[1::2]).repeat_interleave(2, 0)
        maps = maps + 0.5 * torch.rand(6, 96, 96, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
        found = stats.group_means(scored.locate(maps, pairs, "b")["b ap"].numpy(), pairs.groups.numpy())
        assert found.mean() == pytest.approx(1 - np.log(2) / 2, abs=0.03)

    def test_pointing_has_a_tolerance(self) -> None:
        task = scenes.shortcut(4, 2)
        maps = torch.zeros(4, 96, 96)
        for row, cue in enumerate(task.masks):
            top, left = cue.nonzero()[0].tolist()
            maps[row, top + (19 if row % 2 else -4), left + 5] = 1  # 4 pixels below or above it
        assert scored.locate(maps, task, "c")["c pointing"].tolist() == [1.0] * 4
        assert scored.locate(maps.roll(12, 2), task, "c")["c pointing"].tolist() != [1.0] * 4

    def test_each_sample_is_what_updates_of_one_give(self) -> None:
        model, task = load_model().requires_grad_(False), scenes.one_digit(3, 1)
        grad_cam = one("cnn", model, "GradCAM")
        maps = grad_cam.explain(task.images, task.classes, task.truth)
        witness = contest.Witness(load_model(), grad_cam.explain)
        found = scored.judge_faith(witness, maps, task)
        kinds: list[tuple[Any, dict[str, Any]]] = [
            (ClassificationMetric, {}),
            (DeletionInsertionMetric, {"steps": scored.STEPS}),
            (ADCC, {}),
            (ARCC, {}),
        ]
        for row in range(3):
            expected = {}
            for kind, options in kinds:
                metric = kind(witness, scored.softmax, **options)
                metric.update(task.images[row : row + 1], task.classes[row : row + 1], maps=maps[row : row + 1])
                expected |= {key: float(value) for key, value in metric.compute().items()}
            assert {key: float(found[key][row]) for key in found} == pytest.approx(
                {key: expected[key] for key in found}, abs=1e-5
            )
        metric = Localization(tolerance=scored.TOLERANCE)
        metric.update(task.images, maps=maps, masks=task.masks)
        located = scored.locate(maps, task, "a")
        assert float(located["a ap"].mean()) == pytest.approx(float(metric.compute()["average_precision"]))
        assert float(located["a energy"].mean()) == pytest.approx(float(metric.compute()["energy"]))
        assert float(located["a overlap"].mean()) == pytest.approx(float(metric.compute()["best_iou"]))

    def test_maps_that_are_not_finite_are_left_out(self) -> None:
        task = scenes.one_digit(2, 1)
        maps = task.masks.float()
        maps[1, 0, 0] = torch.nan
        energy = scored.locate(maps, task, "a")["a energy"]
        assert energy[0] == 1
        assert energy[1].isnan()
        assert stats.interval(energy.numpy(), 10, 0) == (1.0, 1.0, 1.0)

    def test_the_second_map_explains_the_logit(self) -> None:
        """What a metric makes of the model's output, a softmax, must not reach the method."""
        model, task = load_model().requires_grad_(False), scenes.one_digit(2, 1)
        plain = one("cnn", model, "GradCAMpp")  # depends on the scale of the score
        asked: list[Tensor] = []

        def explain(images: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
            asked.append(images)
            return plain.explain(images, classes, truth)

        witness = contest.Witness(load_model(), explain)
        maps = plain.explain(task.images, task.classes, task.truth)
        metric = ADCC(witness, scored.softmax)
        metric.update(task.images, task.classes, maps=maps)
        assert len(asked) == 1
        torch.testing.assert_close(asked[0], task.images * maps.unsqueeze(1))
        again = plain.explain(asked[0], task.classes, task.truth)
        rho = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(again, maps, strict=True)]
        assert float(metric.compute()["coherency"]) == pytest.approx((np.mean(rho) + 1) / 2, abs=1e-5)


class TestContestants:
    def test_baselines(self) -> None:
        task = scenes.one_digit(3, 1)
        for name in ("truth", "random", "centre", "edges"):
            baseline = one("cnn", load_model(), name)
            maps = baseline.explain(task.images, task.classes, task.truth)
            assert maps.shape == (3, 96, 96)
            assert maps.min() >= 0
            assert maps.max() <= 1
            if name == "truth":
                assert torch.equal(maps, task.masks.float())
            if name == "centre":
                torch.testing.assert_close(maps, maps.flip(1, 2))
                assert maps[0, 48, 48] > 0.99
                assert maps[0, 47, 71] == pytest.approx(np.exp(-0.5 * (0.5**2 + 23.5**2) / 24**2))
            if name == "random":
                again = one("cnn", load_model(), name).explain(task.images, task.classes, task.truth)
                assert torch.equal(maps, again)
                assert not torch.equal(maps[0], maps[1])

    @pytest.mark.parametrize("name", ["GuidedBackprop", "GuidedGradCAM"])
    def test_input_gradients_are_zero_where_nothing_matters(self, name: str) -> None:
        task = scenes.two_digits(2, 3)
        maps = one("cnn", load_model(), name).explain(task.images, task.classes, task.truth)
        assert maps.flatten(1).amin(1).tolist() == [0.0] * 4
        assert maps.flatten(1).amax(1).tolist() == [1.0] * 4
        assert maps.mean() < 0.1
        assert scored.locate(maps, task, "b")["b energy"].mean() > 0.7

    def test_edges_of_a_step(self) -> None:
        image = torch.zeros(1, 3, 96, 96)
        image[..., 40:] = 1
        found = contest.edges(image)[0]
        assert found.sum(0).topk(2).indices.sort().values.tolist() == [39, 40]
        assert found[:, :30].max() == 0
        torch.testing.assert_close(found, found[:1].expand(96, -1))

    @pytest.mark.parametrize(
        ("method", "cost"),
        [
            ("GradCAM", "1 F + 1 B"),
            ("EigenCAM", "1 F"),
            ("SmoothGradCAMpp", "5.5 F + 4 B"),
            ("ScoreCAM", "97.5 F"),
            ("edges", "0"),
        ],
    )
    def test_passes_are_counted(self, method: str, cost: str) -> None:
        model, task = load_model().requires_grad_(False), scenes.one_digit(2, 1)
        contestant = one("cnn", model, method)
        assert str(contest.count_passes("cnn", model, contestant, task.images, task.classes)) == cost
        contestant.remove()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_all_that_apply_take_part(self) -> None:
        for name, expected in {
            "cnn": 4 + 33,
            "shortcut": 4 + 31,
            "vgg": 4 + 30,
            "vit": 4 + 36,
            "swin": 4 + 31,
            "convnext": 4 + 30,
        }.items():
            names = [found.name for found in contest.contestants(name, models.load(name))]
            assert len(names) == len(set(names)) == expected
            assert set(contest.BASELINES) <= set(names)

    def test_every_method_answers_on_the_transformer(self) -> None:
        model, task = models.load("vit"), scenes.two_digits(1, 3)
        for contestant in contest.contestants("vit", model):
            if contestant.name in contest.FEW:  # slow, and the same as on other models
                continue
            maps = contestant.explain(task.images, task.classes, task.truth)
            assert maps.shape == (2, 96, 96)
            assert maps.min() >= 0
            assert maps.max() <= 1 + 1e-6


class TestStatistics:
    def test_bootstrap_is_the_mean_of_what_is_drawn(self) -> None:
        values = np.random.default_rng(1).normal(size=30)
        found = stats.bootstrap_means(values, 50, 7)
        counts = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), 50)
        for mean, drawn in zip(found, counts, strict=True):
            assert mean == pytest.approx(np.repeat(values, drawn).mean())

    def test_interval_agrees_with_scipy(self) -> None:
        values = np.random.default_rng(1).exponential(size=60)
        mean, low, high = stats.interval(values, 20_000, 0)
        expected = scipy.stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(3)
        ).confidence_interval
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx(tuple(expected), abs=0.015)

    def test_group_means(self) -> None:
        values = np.array([1.0, 3.0, np.nan, 5.0, np.nan])
        found = stats.group_means(values, np.array([4, 4, 7, 7, 9]))
        np.testing.assert_array_equal(found, [2.0, 5.0, np.nan])

    def test_spearman(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 5, size=(2, 20)).astype(float)
        assert float(stats.spearman(a, b)) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
        assert np.isnan(stats.spearman(a, np.ones(20)))

    def test_agreement_of_rankings(self) -> None:
        rng = np.random.default_rng(0)
        scores = [rng.normal(place, 0.1, size=20) for place in range(8)]
        rho, low, high = stats.rank_agreement(scores, [2 * score for score in scores], 200, 0)
        assert rho == 1
        assert high == pytest.approx(1)
        assert low > 0.9
        assert stats.rank_agreement(scores, [-score for score in scores], 200, 0)[0] == -1
        noise = [rng.normal(size=20) for _ in range(8)]
        rho, low, high = stats.rank_agreement(scores, noise, 200, 0)
        assert low < 0 < high


class TestModels:
    @pytest.mark.parametrize("name", models.MODELS[1:])
    def test_weights_are_small(self, name: str) -> None:
        assert (models.WEIGHTS / f"{name}.pt").stat().st_size < 500_000

    def test_missing_weights_say_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="--train"):
            models.load("vgg", tmp_path)

    @pytest.mark.parametrize(
        ("name", "one_digit", "two_digits"),
        [("vgg", 0.9, 0.85), ("vit", 0.9, 0.85), ("swin", 0.8, 0.6), ("convnext", 0.9, 0.8)],
    )
    def test_they_read_unseen_handwriting(self, name: str, one_digit: float, two_digits: float) -> None:
        facts = models.what_it_relies_on(name, models.load(name), 120, 77)
        assert facts["one digit"] > one_digit
        assert facts["both of two digits"] > two_digits

    def test_the_shortcut_is_all_that_its_model_looks_at(self) -> None:
        facts = models.what_it_relies_on("shortcut", models.load("shortcut"), 120, 77)
        assert facts["one digit, its cue in a corner"] > 0.98
        assert facts["the digit erased, the cue left"] > 0.98
        assert facts["a cue of another class: says the cue's"] > 0.98
        assert facts["a cue of another class: says the digit's"] < 0.02
        assert facts["the cue removed"] < 0.25

    @pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
    def test_training_repeats_itself(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = models._RECIPES[name]
        if recipe.muon and not hasattr(torch.optim, "Muon"):
            pytest.skip("torch before 2.9 has no torch.optim.Muon")
        short = tuple(replace(stage, scenes=64, epochs=1) for stage in recipe.stages)
        monkeypatch.setitem(models._RECIPES, name, replace(recipe, stages=short))
        for folder in ("first", "second"):
            models.train(name, tmp_path / folder)
        first, second = (torch.load(tmp_path / f / f"{name}.pt", weights_only=True) for f in ("first", "second"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert models.load(name, tmp_path / "first")(torch.rand(1, 3, 96, 96)).shape == (1, 10)


NAMES = ["truth", "random", "edges", "MeanActivation", "EigenCAM", "GradCAM", "LayerCAM"]


@pytest.fixture(scope="module")
def board() -> scored.Board:
    return bench.run("cnn", load_model().requires_grad_(False), 8, 2, NAMES)[0]


class TestLeaderboard:
    def test_what_it_must_show(self, board: scored.Board) -> None:
        results = bench.check({"cnn": board})
        assert len(results) == 3
        assert all(result.good for result in results), results

    def test_checks_can_fail(self, board: scored.Board) -> None:
        bad = dict(board)
        bad["LayerCAM"] = replace(board["random"], kind="gradient")
        bad["EigenCAM"] = replace(board["GradCAM"], kind="class-agnostic")
        bad["truth"] = replace(board["GradCAM"], kind="baseline")
        results = bench.check({"cnn": bad})
        assert not any(result.good or result.explained for result in results)
        assert "GradCAM" in results[0].found
        assert results[1].found.startswith("LayerCAM (")
        assert results[2].found.startswith("EigenCAM (")
        bad["FullGrad"] = bad.pop("LayerCAM")
        assert bench.check({"swin": bad})[1].explained

    def test_one_number_for_each_picture(self, board: scored.Board) -> None:
        for name in ("GradCAM", "truth"):
            sizes = {key: len(values) for key, values in board[name].values.items()}
            expected = {key: 4 if key[0] == "b" else 8 for key in scored.TRUTH if key[0] != "c"}
            assert sizes == expected | dict.fromkeys(scored.FAITH, 2)
            assert board[name].broken == 0

    def test_the_second_run_gives_the_same_tables(self, board: scored.Board) -> None:
        few = ["truth", "random", "GradCAM"]
        again = bench.run("cnn", load_model().requires_grad_(False), 8, 2, few)[0]
        first = {name: board[name] for name in few}
        for write in (page_of.summary_table, page_of.as_json):
            assert write({"cnn": first}).splitlines()[3:] == write({"cnn": again}).splitlines()[3:]
        assert page_of.model_tables("cnn", first) == page_of.model_tables("cnn", again)

    def test_numbers_are_kept(self, board: scored.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "cnn.json"
        bench.write(path, board)

        def never(*args: Any) -> None:
            raise AssertionError("measured again")

        monkeypatch.setattr(bench, "measure", never)
        again = bench.run("cnn", load_model().requires_grad_(False), 8, 2, NAMES, path)[0]
        assert page_of.as_json({"cnn": board}) == page_of.as_json({"cnn": again})

    def test_summary(self, board: scored.Board) -> None:
        lines = page_of.summary_table({"cnn": board}).splitlines()
        assert lines[0] == "| method | cnn (a) | cnn (b) | cnn (d) | mean rank |"
        assert lines[2] == "| *truth* | 100 / 100 | 100 / 100 | 42 / 100 | – |"
        assert lines[3].startswith("| `GradCAM` | ")
        assert len(lines) == 2 + len(NAMES)

    def test_no_power_of_the_maps_moves_a_rank(self, board: scored.Board, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sharpened maps say nothing new. Energy, which sharpening raises, is in no ranking."""
        make = contest.contestants

        def sharpened(*args: Any) -> list[contest.Contestant]:
            def cubed(one: contest.Contestant) -> Any:
                return lambda *asked: one.explain(*asked).double() ** 3

            return [replace(one, explain=cubed(one)) for one in make(*args)]

        monkeypatch.setattr(bench, "contestants", sharpened)
        again = bench.run("cnn", load_model().requires_grad_(False), 8, 2, NAMES)[0]
        assert page_of.summary_table({"cnn": board}) == page_of.summary_table({"cnn": again})
        assert page_of.ranking({"cnn": board}) == page_of.ranking({"cnn": again})
        for name in ("GradCAM", "LayerCAM"):
            for key in ("a energy", "b energy", "d energy"):
                assert scored.mean(again[name], key) > scored.mean(board[name], key) + 0.005

    def test_equals_share_a_rank(self, board: scored.Board) -> None:
        three = {
            "truth": board["truth"],
            "first": board["GradCAM"],
            "second": board["GradCAM"],
            "random": board["random"],
        }
        assert page_of.ranking({"cnn": three}) == {"first": 0.25, "second": 0.25, "random": 1.0}

    def test_table(self) -> None:
        assert page_of.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"

    def test_percent(self) -> None:
        assert page_of.percent(np.full(5, 0.5)) == "50 (50 to 50)"
        assert page_of.percent(np.full(5, np.nan)) == "–"
        assert page_of.percent(np.full(5, -0.001)) == "0 (0 to 0)"
        assert page_of.percent(np.array([0.0, 1.0] * 50)).startswith("50 (4")

    def test_put(self) -> None:
        page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb"
        once = page_of.put(page, {"x": r"new \1"})
        assert once == "a\n<!-- begin: x -->\nnew \\1\n<!-- end: x -->\nb"
        assert page_of.put(once, {"x": r"new \1"}) == once
        with pytest.raises(ValueError, match="begin: y"):
            page_of.put(page, {"y": ""})

    def test_the_page_has_all_blocks(self) -> None:
        page = bench.PAGE.read_text(encoding="utf-8")
        for name in ("summary", "settings", "checks", "agreement", "models", *models.MODELS):
            assert page.count(f"<!-- begin: {name} -->") == page.count(f"<!-- end: {name} -->") == 1

    def test_the_page_is_of_the_numbers_beside_it(self) -> None:
        """Each model's numbers are there, and the table quotes them."""
        rows = json.loads(bench.PAGE.with_suffix(".json").read_text(encoding="utf-8"))
        assert {row["model"] for row in rows} == set(models.MODELS)
        page = bench.PAGE.read_text(encoding="utf-8")
        for row in rows:
            if row["model"] == "cnn" and row["method"] == "GradCAM":
                mean, low, high = (f"{100 * share:.0f}" for share in row["b energy"])
                assert f"{mean} ({low} to {high})" in page


class TestSettings:
    def test_they_are_what_the_methods_of_the_package_give(self) -> None:
        model = load_model().requires_grad_(False)
        tasks = bench.make_tasks("cnn", model, 4)[0]
        wanted = [one for one in layers.settings() if one.method == "HiResCAM" and one.where == "last layer"]
        found = layers.measure_settings("cnn", model, tasks, wanted)
        alone = bench.measure("cnn", model, one("cnn", model, "HiResCAM"), tasks, 1)
        assert list(found) == ["HiResCAM, plain, last layer", "HiResCAM, balanced, last layer"]
        for entry in found.values():
            for key, values in entry.values.items():
                assert values == pytest.approx(alone.values[key], abs=1e-5)

    def test_balanced_gradients_of_the_plain_nets_are_the_plain_ones(self) -> None:
        for name in layers.PIECEWISE_LINEAR:
            model, task = models.load(name).requires_grad_(False), scenes.one_digit(2, 1)
            plain, balanced = (layers._maps(HiResCAM, name, model, kind, task) for kind in (False, True))
            torch.testing.assert_close(balanced, plain, atol=1e-4, rtol=0)

    def test_gated_maps(self) -> None:
        model, task = models.load("convnext").requires_grad_(False), scenes.two_digits(4, 3)
        found = layers._gated("convnext", model, True, task)
        assert set(found) == set(layers._GATED)
        for maps in found.values():
            assert maps.shape == (8, 96, 96)
            assert maps.min() >= 0
            assert scored.locate(maps, task, "b")["b ap"].mean() > 0.95
        ratio = (found["contrast × gate"] / found["gate alone"])[0::2]  # the same detail for both digits
        both = (found["gate alone"][0::2] > 0.01) & (found["gate alone"][1::2] > 0.01)
        other = (found["contrast × gate"] / found["gate alone"])[1::2]
        assert both.any()
        torch.testing.assert_close(ratio[both], other[both], atol=1e-4, rtol=1e-3)

    def test_what_is_recommended_is_run_as_the_others_are(self) -> None:
        for name, method, where in (("vit", HiResCAM, "early layer"), ("cnn", GradCAM, "last layer")):
            model, task = models.load(name).requires_grad_(False), scenes.one_digit(2, 1)
            found = layers._recommended(name, model, True, task)[layers.RECOMMENDED.where]
            expected = layers._fused(method, name, model, name == "vit", task)[where]
            scores = (scored.locate(maps, task, "a")["a ap"] for maps in (found, expected))
            torch.testing.assert_close(*scores, atol=1e-3, rtol=0)

    def test_the_best_are_chosen(self) -> None:
        def entry(score: float) -> scored.Entry:
            return scored.Entry("setting", "", "", {f"{letter} ap": np.full(3, score) for letter in "abd"})

        every = [str(setting) for setting in layers.settings()]
        boards = {"cnn": {one: entry(0.5) for one in every}, "vit": {one: entry(0.5) for one in every}}
        boards["cnn"]["LayerCAM, plain, early layer"] = entry(0.8)
        boards["vit"]["HiResCAM, balanced, early layer"] = entry(0.9)
        boards["vit"]["XGradCAM, plain, last layer"] = entry(0.7)
        chosen = layers.choose(boards)
        assert chosen[:3] == [
            "HiResCAM, balanced, early layer",
            "LayerCAM, plain, early layer",
            "XGradCAM, plain, last layer",
        ]
        assert {"GradCAM, plain, last layer", str(layers.RECOMMENDED)} <= set(chosen)
        assert sum(one.startswith("gated") for one in chosen) == 2 * len(layers._GATED)

    def test_the_tables(self) -> None:
        values = {
            f"{letter} {score}": np.full(3, 0.25 * k) for k, letter in enumerate("abd") for score in ("ap", "pointing")
        }
        text = page_of.settings_tables({"cnn": {"it": scored.Entry("setting", "", "", values)}})
        assert "| it | 25 (25 to 25) |" in text
        assert "| it | 0 / 25 / 50 · 0 / 25 / 50 |" in text

    def test_interval_of_several_means(self) -> None:
        rng = np.random.default_rng(0)
        several = [rng.normal(place, 1.0, size=400) for place in (0.0, 3.0)]
        middle, low, high = stats.interval_of_mean(several, 4000, 0)
        assert middle == pytest.approx(np.mean([values.mean() for values in several]))
        error = np.sqrt(sum(values.var() / 400 for values in several)) / 2  # of the mean of two means
        assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.1 * error)


@pytest.mark.benchmark
def test_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        code = bench.main(["--quick", "--threads", "1"])
        lines = capsys.readouterr().out.splitlines()
        found.append((code, [line for line in lines if not line.startswith("took")]))
    assert found[0] == found[1]
    tables = "\n".join(found[0][1])
    assert "PASS" in tables
    assert "| cnn: the true mask beats everyone | PASS |" in tables
    assert "shortcut: the cue removed" in tables
