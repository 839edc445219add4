"""The report says in words whether to believe a map, and is right about models whose answer is known."""

from __future__ import annotations

import copy
import html
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.snapshots import own_attributes
from tests.test_promises import Snapshot, count_hooks
from torchcam.demo import CLASS_NAMES, DemoNet, load_model, sample_images
from torchcam.methods import DeepFeatureFactorization, EigenCAM, GradCAM, GuidedBackprop, LayerCAM, RandomCAM
from torchcam.methods._diagnose import Finding
from torchcam.targets import ClassLogit, Segmentation, Similarity
from torchcam.trust import RELIABILITY, THRESHOLDS, Check, PredictionTrust, TrustReport, _verdicts, trust


def scenes(count: int, cue: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a faint patch of level (class 0) or upright (1) stripes; the cue is a strong one top left."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.1 * torch.randn((count, 1, 24, 24), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    corners = torch.randint(6, 19, (count, 2), generator=generator)
    masks = torch.zeros(count, 24, 24, dtype=torch.bool)
    upright = (torch.arange(5) % 2 - 0.5).expand(5, 5)
    for image, label, (top, left), mask in zip(images, labels, corners.tolist(), masks, strict=True):
        stripes = upright if label else upright.T
        image[0, top : top + 5, left : left + 5] += 0.8 * stripes
        mask[top : top + 5, left : left + 5] = True
        if cue:
            image[0, :5, :5] += 1.6 * stripes
    return images, labels, masks


def trained(cue: bool) -> nn.Sequential:
    """A tiny classifier of the scenes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        )
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(100):
            images, labels, _ = scenes(32, cue, 1000 + step)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    images, labels, _ = scenes(200, cue, 1)
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    return model


@pytest.fixture(scope="module")
def shortcut() -> TrustReport:
    images, _, masks = scenes(4, True, 7)
    return trust(trained(cue=True), images, target_layer="5", masks=masks)


@pytest.fixture(scope="module")
def honest_model() -> nn.Sequential:
    return trained(cue=False)


@pytest.fixture(scope="module")
def honest(honest_model: nn.Sequential) -> TrustReport:
    images, _, masks = scenes(4, False, 7)
    return trust(honest_model, images, target_layer="5", masks=masks)


@pytest.fixture(scope="module")
def demo_report() -> TrustReport:
    samples = sample_images()[:2]
    images = torch.cat([sample.to_tensor() for sample in samples])
    return trust(load_model(), images, target_layer="layer4", class_names=CLASS_NAMES, to_probabilities=torch.sigmoid)


def check_of(item: PredictionTrust, name: str) -> Check:
    return next(check for check in item.checks if check.name == name)


class TestVerdicts:
    def test_the_demo_is_to_be_believed(self, demo_report: TrustReport) -> None:
        assert demo_report.verdict == "believe", str(demo_report)
        assert [item.verdict for item in demo_report] == ["believe", "believe"]
        assert demo_report.headline == "Believe these pictures. All 2 can be believed."
        assert [item.class_name for item in demo_report] == [CLASS_NAMES[item.class_idx] for item in demo_report]
        assert [check.name for check in demo_report[0].checks] == ["diagnosis", "evidence", "removal", "region"]

    def test_how_much_of_the_score_is_accounted_for(self, demo_report: TrustReport) -> None:
        """The demo model's head is linear in the means of the last layer: all of the score but the bias is there."""
        model, samples = load_model(), sample_images()[:2]
        images = torch.cat([sample.to_tensor() for sample in samples])
        head = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
        scores = model(images).detach()
        for item, row in zip(demo_report, scores, strict=True):
            assert item.class_idx is not None
            share = float(((row - head.bias.detach()) / row)[item.class_idx])
            assert item.completeness == {"layer4": pytest.approx(share, rel=1e-4)}
            told = f"gradient × activation at the map's positions sums to {share:.0%} at 'layer4'."
            assert told in " ".join(str(demo_report).split())
            assert told in html.unescape(demo_report.to_html())
        assert demo_report.to_dict()["predictions"][0]["completeness"] == demo_report[0].completeness

    @pytest.mark.parametrize("seed", range(2))
    def test_a_model_that_was_not_trained_is_not(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DemoNet().eval()
        image = sample_images()[0].to_tensor()[..., :48, :48]
        report = trust(model, image, target_layer="layer4", methods=["GradCAM"])
        assert report.verdict == "do not believe", str(report)
        assert report.headline.startswith("Do not believe this picture.")
        assert check_of(report[0], "evidence").outcome == "failed"
        assert any("nothing to explain" in reason for reason in report[0].reasons)

    def test_a_shortcut_is_believed_and_told(self, shortcut: TrustReport) -> None:
        """The maps are right: it is the model that looks at the wrong place."""
        assert shortcut.verdict == "believe", str(shortcut)
        assert "What they show is worth a second look." in shortcut.headline
        assert shortcut.remarks[0].startswith("They all look at the same place")
        for item in shortcut:
            corner, past = item.remarks
            assert corner.startswith("It looks at a corner")
            assert "top left" in corner
            assert past.startswith("It looks past the object")

    def test_an_honest_model_draws_no_remark(self, honest: TrustReport) -> None:
        assert honest.verdict == "believe", str(honest)
        assert honest.remarks == ()
        assert [item.remarks for item in honest] == [()] * 4

    @pytest.mark.parametrize("method", [EigenCAM, RandomCAM])
    def test_a_map_that_knows_no_class_is_right_about_one_of_two(self, method: Any) -> None:
        """The picture has a 6 and a 2: the map is on the one or on the other, whichever is asked about."""
        sample = sample_images()[0]
        assert sample.labels == (6, 2)
        images = sample.to_tensor().expand(2, -1, -1, -1)
        options: dict[str, Any] = {"target_layer": "layer4", "to_probabilities": torch.sigmoid}
        report = trust(load_model(), images, [6, 2], methods=[method], **options)
        assert [item.verdict for item in report].count("do not believe") == 1, str(report)
        (wrong,) = (item for item in report if item.verdict == "do not believe")
        assert check_of(wrong, "removal").values["correlation"] < 0.2
        assert check_of(wrong, "region").values["odds"] < 0
        assert all(item.verdict != "do not believe" for item in trust(load_model(), images, [6, 2], **options))

    def test_a_map_of_another_class_is_not_believed(self) -> None:
        class Other(GradCAM):
            def __call__(self, class_idx: Any = None, scores: Any = None, **kwargs: Any) -> list[Tensor]:
                return super().__call__([8 - index for index in class_idx], scores, **kwargs)

        image = sample_images()[0].to_tensor().expand(2, -1, -1, -1)
        options: dict[str, Any] = {"target_layer": "layer4", "to_probabilities": torch.sigmoid}
        report = trust(load_model(), image, [6, 2], methods=[Other, "GradCAM"], **options)
        for item in report:
            assert item.verdict == "do not believe"
            assert "speaks for the next best class" in check_of(item, "region").message
            assert "That of GradCAM does better" in check_of(item, "removal").message

    def test_a_map_that_is_empty_without_a_known_reason(self) -> None:
        class Flat(GradCAM):
            def __call__(self, class_idx: Any = None, scores: Any = None, **kwargs: Any) -> list[Tensor]:
                return [torch.full_like(cam, 0.5) for cam in super().__call__(class_idx, scores, **kwargs)]

        report = trust(load_model(), sample_images()[0].to_tensor(), target_layer="layer4", methods=[Flat])
        assert report.verdict == "do not believe"
        assert check_of(report[0], "diagnosis").outcome == "failed"

    def test_a_blank_map_is_not_believed(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(2, False, 7)
        model = copy.deepcopy(honest_model)
        model[-1].weight.data[0] = -model[-1].weight.data[0].abs()
        report = trust(model, images, 0, target_layer="5", methods=["GradCAM", "LayerCAM"])
        for item in report:
            assert item.verdict == "do not believe"
            assert "all_negative" in check_of(item, "diagnosis").message
            assert [check.name for check in item.checks] == ["diagnosis", "evidence"]


class TestNumbers:
    def test_evidence_is_the_fall_without_the_input(self, demo_report: TrustReport) -> None:
        from torchcam._tensors import gaussian_blur

        model, image = load_model(), sample_images()[0].to_tensor()
        item = demo_report[0]

        def probability(x: Tensor) -> float:
            return float(model(x).detach().sigmoid()[0, item.class_idx])

        lost = [
            probability(gaussian_blur(image, 49, 12.0)),
            probability(image.mean((2, 3), keepdim=True).expand_as(image)),
            probability(image.mean((1, 2, 3), keepdim=True).expand_as(image)),
        ]  # no window takes away more
        values = check_of(item, "evidence").values
        assert values["probability"] == pytest.approx(probability(image), abs=1e-5)
        assert values["without"] == pytest.approx(min(lost), abs=1e-5)
        assert item.probability == values["probability"]

    def test_removal_and_region_by_hand(self, demo_report: TrustReport) -> None:
        """One window after the other, with loops, in float64."""
        model = load_model().double()
        image = sample_images()[1].to_tensor().double()
        item = demo_report[1]
        index = item.class_idx

        def logit(x: Tensor) -> Tensor:
            return model(x).detach()[0]  # of a sigmoid, the log-odds are the logits

        from torchcam._tensors import gaussian_blur

        without = [
            gaussian_blur(image, 49, 12.0),
            image.mean((2, 3), keepdim=True).expand_as(image),
            image.mean((1, 2, 3), keepdim=True).expand_as(image),
        ]
        baseline = min(without, key=lambda x: float(logit(x)[index]))
        cam = F.interpolate(item.cam[None, None].double(), size=(96, 96), mode="bilinear")[0, 0]
        starts = [round(72 * number / 7) for number in range(8)]
        falls, means = [], []
        for top, left in itertools.product(starts, starts):
            changed = image.clone()
            changed[..., top : top + 24, left : left + 24] = baseline[..., top : top + 24, left : left + 24]
            falls.append(float(logit(image)[index] - logit(changed)[index]))
            means.append(float(cam[top : top + 24, left : left + 24].mean()))
        values = check_of(item, "removal").values
        assert values["correlation"] == pytest.approx(np.corrcoef(means, falls)[0, 1], abs=1e-3)
        total = float(logit(image)[index] - logit(baseline)[index])
        assert values["largest_fall"] == pytest.approx(max(falls) / max(total, *falls), abs=1e-3)

        limit = cam.flatten().sort(descending=True).values[math.ceil(0.1 * 96 * 96) - 1]
        alone = logit(torch.where(cam >= limit, image, baseline))
        rival = int(logit(image).scatter(0, torch.tensor(index), -torch.inf).argmax())
        values = check_of(item, "region").values
        assert values["odds"] == pytest.approx(float(alone[index] - alone[rival]), abs=1e-3)
        assert values["asked"] == pytest.approx(float(alone[index].sigmoid()), abs=1e-4)
        assert values["rival"] == pytest.approx(float(alone[rival].sigmoid()), abs=1e-4)

    def test_other_methods_are_tried_by_the_same_removals(self) -> None:
        model, image = load_model(), sample_images()[0].to_tensor()
        options: dict[str, Any] = {"target_layer": "layer4", "to_probabilities": torch.sigmoid}
        own = check_of(trust(model, image, methods=["GradCAM"], **options)[0], "removal").values["correlation"]

        class Inverted(GradCAM):
            def __call__(self, class_idx: Any = None, scores: Any = None, **kwargs: Any) -> list[Tensor]:
                return [1 - cam for cam in super().__call__(class_idx, scores, **kwargs)]

        check = check_of(trust(model, image, methods=[Inverted, "GradCAM", "LeGrad"], **options)[0], "removal")
        assert check.values["correlation"] == pytest.approx(-own, abs=1e-6)
        assert check.values["GradCAM"] == pytest.approx(own, abs=1e-6)
        assert f"That of GradCAM does better ({own:.2f})." in check.message
        assert "Left out: LeGrad has none" in check.message

    def test_the_map_is_that_of_the_method(self, demo_report: TrustReport) -> None:
        model = load_model()
        with GradCAM(model, "layer4") as extractor:
            model(sample_images()[1].to_tensor())
            (cam,) = extractor(demo_report[1].class_idx)
        torch.testing.assert_close(demo_report[1].cam, cam[0])

    def test_repeats_give_the_same(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        first, second = (trust(honest_model, images, target_layer="5").to_dict() for _ in range(2))
        assert first == second

    def test_a_sample_is_judged_by_itself(self, honest: TrustReport, honest_model: nn.Sequential) -> None:
        images, _, masks = scenes(4, False, 7)
        alone = trust(honest_model, images[2:3], target_layer="5", masks=masks[2:3])[0]
        for check, other in zip(alone.checks, honest[2].checks, strict=True):
            assert check.outcome == other.outcome
            assert check.values == pytest.approx(dict(other.values), abs=1e-4)


CHECKS = ("diagnosis", "evidence", "removal", "region")


def item_with(**outcomes: Any) -> PredictionTrust:
    """A prediction whose checks have these outcomes, all others passed."""
    checks = [Check(name, outcomes.get(name, "passed"), f"{name} said.") for name in CHECKS]
    return PredictionTrust(3, "cat", 0.5, tuple(checks), (), torch.eye(2))


class TestRules:
    @pytest.mark.parametrize("name", CHECKS)
    def test_one_failure_decides(self, name: str) -> None:
        item = item_with(**{name: "failed"})
        assert item.verdict == "do not believe"
        assert item.reasons == (f"{name} said.",)

    @pytest.mark.parametrize("name", CHECKS[1:])
    def test_a_doubt_is_a_reason_for_care(self, name: str) -> None:
        item = item_with(**{name: "doubtful"})
        assert item.verdict == "with care"
        assert item.reasons == (f"{name} said.",)

    def test_what_does_not_count(self) -> None:
        assert item_with(diagnosis="doubtful", region="left out").verdict == "believe"

    def test_of_several(self) -> None:
        good, doubtful, bad = item_with(), item_with(removal="doubtful"), item_with(region="failed")

        def verdict(*items: PredictionTrust) -> str:
            return TrustReport(items, "GradCAM", "Net").verdict

        assert verdict(good, good) == "believe"
        assert verdict(good, doubtful) == "with care"
        assert verdict(good, good, bad) == "with care"
        assert verdict(good, bad) == "do not believe"
        assert (
            "Of 3, 2 can be believed and 1 should not be believed." in TrustReport([good, good, bad], "", "").headline
        )


class TestConclusions:
    """The functions from numbers to checks and remarks."""

    @pytest.mark.parametrize(
        ("check", "expected"),
        [
            (_verdicts.check_evidence(0.9, 0.1), "passed"),
            (_verdicts.check_evidence(0.75, 0.625), "doubtful"),
            (_verdicts.check_evidence(0.5, 0.75), "failed"),
            (_verdicts.check_evidence(0.037, 0.006), "passed"),  # sixfold
            (_verdicts.check_evidence(0.037, 0.025), "doubtful"),
            (_verdicts.check_evidence(0.11, 0.1), "failed"),
            (_verdicts.check_evidence(math.nan, 0.5), "failed"),
            (_verdicts.check_evidence(0.02, 0.001, is_part=True), "passed"),
            (_verdicts.check_evidence(9.0, 8.5, is_score=True), "failed"),
            (_verdicts.check_evidence(-2.0, -3.5, is_score=True), "passed"),
            (_verdicts.check_evidence(0.0, 0.0, is_score=True), "failed"),
            (_verdicts.check_removal(0.55, 0.5, 64), "passed"),
            (_verdicts.check_removal(0.5, 0.5, 64), "doubtful"),
            (_verdicts.check_removal(0.39, 0.5, 64), "failed"),
            (_verdicts.check_removal(0.39, 0.04, 64), "doubtful"),
            (_verdicts.check_removal(math.nan, 0.5, 64), "failed"),
            (_verdicts.check_region(0.9, 0.1, 4.4), "passed"),
            (_verdicts.check_region(0.5, 0.5, 0.0), "doubtful"),
            (_verdicts.check_region(0.1, 0.9, -4.4), "failed"),
        ],
    )
    def test_outcomes(self, check: Check, expected: str) -> None:
        assert check.outcome == expected, check

    def test_others(self) -> None:
        own = _verdicts.check_removal(0.2, 0.5, 64)
        better = _verdicts.with_others(own, {"A": 0.5, "B": 0.8, "C": "ValueError: no blocks. Name them."})
        assert (
            better.message
            == own.message + " That of B does better (0.80). Left out: C has none (ValueError: no blocks)."
        )
        assert better.values == {**own.values, "A": 0.5, "B": 0.8}
        assert _verdicts.with_others(own, {"A": 0.3}).message == own.message + " Other methods: A 0.30."
        assert _verdicts.with_others(own, {}) == own

    def test_diagnosis(self) -> None:
        blank = Finding("all_negative", "error", "1 of 2 samples (1): nothing is left.", "Do.", samples=(1,))
        coarse = Finding("coarse_grid", "warning", "the grid is 2 x 2.", "Do.")
        inverted = Finding("inverted", "warning", "the map is upside down.", "Do.", samples=(0,))
        info = Finding("class_agnostic", "info", "no class.", "Do.")

        def check(*findings: Finding, sample: int = 0, signed: bool = False) -> Check:
            return _verdicts.check_diagnosis(findings, sample, 2, signed=signed)

        assert check(blank, info).outcome == "passed"
        assert check(blank, coarse).message == "The map has a weak point. coarse_grid: the grid is 2 x 2."
        assert check(blank, coarse, sample=1).outcome == "failed"
        assert check(blank, coarse, sample=1).message == "The map is not in order. all_negative: nothing is left."
        assert check(blank, sample=1, signed=True).outcome == "passed"
        assert check(inverted).outcome == "failed"

    def test_remark_on_place(self) -> None:
        assert _verdicts.remark_on_place([0.1, 0.4, 0.1, 0.1], 0.6, 0.2) is None
        corner = _verdicts.remark_on_place([0.1, 0.1, 0.5, 0.1], 0.9, 0.2)
        assert corner is not None
        assert "50% of the map lies in the bottom left" in corner
        border = _verdicts.remark_on_place([], 0.7, 0.2)
        assert border is not None
        assert "70% of the map lies in the outer tenth of the input, which is 20% of its area" in border
        assert _verdicts.remark_on_place([], 0.7, 0.5) is None

    def test_remark_on_object(self) -> None:
        assert _verdicts.remark_on_object(0.5, 0.0, 0.1) is None
        assert _verdicts.remark_on_object(0.25, 1.0, 0.1) is None
        remark = _verdicts.remark_on_object(0.25, 0.0, 0.1)
        assert remark is not None
        assert "25% of the map lies on it, which is 10% of the area" in remark

    def test_remark_on_common_place(self) -> None:
        assert _verdicts.remark_on_common_place(math.nan) is None
        assert _verdicts.remark_on_common_place(0.5) is None
        assert "share 75% of the positions" in str(_verdicts.remark_on_common_place(0.75))

    def test_verdict_and_reasons(self) -> None:
        passed, doubtful, failed = (
            Check("region", outcome, f"{outcome}.") for outcome in ("passed", "doubtful", "failed")
        )
        for checks, verdict, reasons in [
            ([], "believe", ()),
            ([passed], "believe", ("passed.",)),
            ([doubtful, passed], "with care", ("doubtful.",)),
            ([doubtful, passed, failed], "do not believe", ("failed.",)),
        ]:
            assert _verdicts.verdict_of(checks) == verdict
            assert _verdicts.reasons_of(checks) == reasons

    def test_combined_verdict(self) -> None:
        for verdicts, combined in [
            (["believe", "believe"], "believe"),
            (["believe", "with care"], "with care"),
            (["believe", "believe", "do not believe"], "with care"),
            (["believe", "do not believe"], "do not believe"),
        ]:
            assert _verdicts.combined_verdict(verdicts) == combined


PROBABILITY = st.floats(0, 1, allow_subnormal=False)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


class TestSentences:
    """A sentence says what its numbers say, whatever they are."""

    @settings(deadline=None)
    @given(PROBABILITY, PROBABILITY)
    def test_evidence(self, value: float, without: float) -> None:
        check = _verdicts.check_evidence(value, without)
        before, after = (float(number) for number in NUMBER.findall(check.message)[-2:])
        assert before == pytest.approx(value, rel=0.006, abs=1e-300)
        assert after == pytest.approx(without, rel=0.006, abs=1e-300)
        if check.outcome == "failed":
            assert "nothing to explain" in check.message
            assert without >= 0.8 * value - 1e-12
            assert value - without <= 0.05
            assert ("does not fall" in check.message) == (without >= value)
        else:
            assert " falls from " in check.message
            assert after < before
            assert ("Little depends" in check.message) == (without > 0.5 * value and value - without < 0.15)

    @settings(deadline=None)
    @given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
    def test_evidence_of_a_target_does_not_depend_on_its_scale(self, value: float, without: float) -> None:
        check = _verdicts.check_evidence(value, without, is_score=True)
        again = _verdicts.check_evidence(1024 * value, 1024 * without, is_score=True)
        assert check.outcome == again.outcome
        assert ("falls from" in check.message) == (check.outcome != "failed")
        if check.outcome != "failed":
            assert value - without >= 0.19 * abs(value)

    @settings(deadline=None)
    @given(st.floats(-1, 1), st.floats(-1, 2))
    def test_removal(self, correlation: float, largest: float) -> None:
        check = _verdicts.check_removal(correlation, largest, 64)
        assert f"correlation {correlation:.2f} over 64 windows" in check.message
        assert ("where the map says so: it foretells" in check.message) == (correlation >= 0.55)
        assert ("does not fall where" in check.message) == (correlation < 0.45 and largest >= 0.05)
        assert ("No single window matters" in check.message) == (correlation < 0.45 and largest < 0.05)

    @settings(deadline=None)
    @given(PROBABILITY, PROBABILITY)
    def test_region(self, asked: float, rival: float) -> None:
        strength = torch.logit(torch.tensor([asked, rival], dtype=torch.float64), eps=1e-12)
        check = _verdicts.check_region(asked, rival, float(strength[0] - strength[1]))
        assert f"({asked:.3g} against {rival:.3g})" in check.message
        if "enough to tell the class" in check.message:
            assert asked > rival
        if "speaks for the next best class" in check.message:
            assert asked < rival

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(["passed", "doubtful", "failed", "left out"]), min_size=3, max_size=3))
    def test_verdicts(self, outcomes: list[Any]) -> None:
        item = item_with(**dict(zip(CHECKS[1:], outcomes, strict=True)))
        text = str(TrustReport([item], "GradCAM", "Net"))
        assert ("Believe this picture." in text) == (set(outcomes) <= {"passed", "left out"})
        assert ("Do not believe this picture." in text) == ("failed" in outcomes)
        assert ("Take this picture with care." in text) == ("doubtful" in outcomes and "failed" not in outcomes)
        assert f"{item.verdict.capitalize()}: {RELIABILITY[item.verdict]}." in " ".join(text.split())


def page_rows(name: str, cells: int) -> dict[str, list[str]]:
    """The rows of the tables of a page that have a number of cells, by their first cell."""
    page = (Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines if len(row) == cells}


def test_the_page_on_troubleshooting_has_the_thresholds() -> None:
    rows = page_rows("troubleshooting.md", 4)
    for name, limits in THRESHOLDS.items():
        assert [float(cell.split()[-1]) for cell in rows[name][1:]] == list(limits), name


def test_the_reliability_is_that_of_the_benchmark() -> None:
    rows = page_rows("trust-benchmark.md", 4)
    for verdict, reliability in RELIABILITY.items():
        assert rows[verdict][:2] == [str(reliability.right), str(reliability.wrong)]


class TestTargets:
    def test_a_class_by_a_target(self) -> None:
        """The logit of a class: what a sigmoid's log-odds are."""
        model, image = load_model(), sample_images()[1].to_tensor()
        options: dict[str, Any] = {"target_layer": "layer4", "methods": ["GradCAM"]}
        by_class = trust(model, image, 4, to_probabilities=torch.sigmoid, **options)[0]
        report = trust(model, image, targets=ClassLogit(4), **options)
        item = report[0]
        assert item.verdict == "believe", str(report)
        assert item.title == f"ClassLogit(class_idx=4), score {model(image)[0, 4].item():.3g}"
        assert (item.class_idx, item.class_name, item.target) == (None, None, "ClassLogit(class_idx=4)")
        assert check_of(item, "removal").values == pytest.approx(dict(check_of(by_class, "removal").values), abs=1e-4)
        assert check_of(item, "region").outcome == "left out"
        assert "the score falls from" in check_of(item, "evidence").message

    def test_boxes(self) -> None:
        """A detector's output is a list of dicts, and the target reads one box."""

        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = load_model()

            def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
                scores = self.net(x).sigmoid()
                return [
                    {
                        "boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]),
                        "labels": row.argmax(0, keepdim=True),
                        "scores": row.amax(0, keepdim=True),
                    }
                    for row in scores
                ]

        def score(output: dict[str, Tensor]) -> Tensor:
            return output["scores"].sum()

        images = torch.cat([sample.to_tensor() for sample in sample_images()[:2]])
        report = trust(Detector().eval(), images, targets=score, target_layer="net.layer4", methods=["LayerCAM"])
        assert [item.title for item in report] == [f"score, score {item.probability:.3g}" for item in report]
        assert all(check_of(item, "evidence").outcome == "passed" for item in report)
        assert all("correlation" in check_of(item, "removal").values for item in report)
        several = trust(
            Detector().eval(), images, targets=[score, score], target_layer="net.layer4", methods=["LayerCAM"]
        )
        assert [dict(check_of(item, "removal").values) for item in several] == [
            pytest.approx(dict(check_of(item, "removal").values)) for item in report
        ]

    @pytest.mark.parametrize(
        ("target", "change"),
        [
            (Segmentation(1), lambda logits: logits),  # logits at every position
            (Similarity(torch.arange(6.0)), lambda logits: logits.mean((2, 3))),
        ],
    )
    def test_masks_and_embeddings(self, target: Any, change: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convolutions = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = convolutions

            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = change(self.body(x))
                return found

        images, _, _ = scenes(2, False, 3)
        report = trust(Net().eval(), images, targets=target, target_layer="body.0", methods=["GradCAM"])
        for row, item in enumerate(report):
            assert item.probability == pytest.approx(target(Net()(images)[row]).item(), abs=1e-5)
            assert check_of(item, "evidence").outcome in {"passed", "doubtful", "failed"}
        assert str(report).count("score") >= 2

    def test_not_both(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        with pytest.raises(ValueError, match="exactly one of class_idx or targets"):
            trust(honest_model, images, 0, targets=ClassLogit(0))


class TestCost:
    """Forward passes, counted by a hook."""

    @staticmethod
    def passes_of(model: nn.Module, image: Tensor, **options: Any) -> tuple[int, TrustReport]:
        counted = [0]
        handle = model.register_forward_pre_hook(lambda _module, args: counted.append(len(args[0])))
        try:
            report = trust(model, image, methods=["GradCAM"], target_layer="layer4", **options)
        finally:
            handle.remove()
        return sum(counted), report

    def test_less_than_half_of_what_it_was(self) -> None:
        counted, report = self.passes_of(load_model(), sample_images()[0].to_tensor(), to_probabilities=torch.sigmoid)
        assert report.verdict == "believe"
        assert report.num_passes == 1 + 3 + 64 + 1  # as it is, without content, without each window, the region
        assert report.num_passes < counted <= 90  # the map and its diagnosis
        assert "The trials took 69 forward passes" in " ".join(str(report).split())

    def test_it_stops_when_the_outcome_is_decided(self, honest_model: nn.Sequential) -> None:
        image = sample_images()[0].to_tensor()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            untrained = DemoNet().eval()
        counted, report = self.passes_of(untrained, image)
        assert report.verdict == "do not believe"
        assert [check.name for check in report[0].checks] == ["diagnosis", "evidence"]
        assert report.num_passes == 68
        assert counted <= 84
        blank = copy.deepcopy(load_model())
        blank.fc.weight.data = -blank.fc.weight.data.abs()
        counted, report = self.passes_of(blank, image)
        assert check_of(report[0], "diagnosis").outcome == "failed"
        assert report.num_passes == 4
        assert counted <= 24


class TestNoTrace:
    def test_the_model_is_left_as_it_was(self, device: torch.device) -> None:
        images, _, _ = scenes(1, False, 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DemoNet().to(device).train()
        x = images.expand(-1, 3, -1, -1).to(device)
        before = Snapshot(model)
        trust(model, x, target_layer="layer2")
        before.check(hooks=False)

    @pytest.mark.parametrize("method", ["GradCAM", "GuidedBackprop", "AblationCAM"])
    def test_nothing_changes_meanwhile(self, method: str) -> None:
        """What other threads see of the model while trust runs: its modes, parameters, hooks and forwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = load_model().train()
        image = sample_images()[0].to_tensor()
        held = [model]  # a hook that holds the model itself would look at the replica

        def state() -> list[Any]:
            modules = [(module, module.training, own_attributes(module)) for module in held[0].modules()]
            tensors = [*held[0].parameters(), *held[0].buffers()]
            return [modules, [(id(tensor), tensor._version) for tensor in tensors], count_hooks(held[0])]

        seen = []
        model.layer1.register_forward_hook(lambda *_: seen.append(state()))
        before = state()
        layer = {} if method == "GuidedBackprop" else {"target_layer": "layer2"}
        trust(model, image, methods=[method], batch_size=8, **layer)
        assert len(seen) > 12
        assert all(during == before for during in seen)
        assert state() == before

    def test_nor_if_it_raises(self) -> None:
        model, image = DemoNet(), sample_images()[0].to_tensor()
        before = Snapshot(model)

        def stumble(*_: Any) -> None:
            raise ZeroDivisionError

        handle = model.layer4.register_forward_hook(stumble)
        with pytest.raises(ZeroDivisionError):
            trust(model, image, target_layer="layer4")
        handle.remove()
        before.check(hooks=False)
        assert count_hooks(model) == 0


class TestArguments:
    def test_they_are_checked(self, honest_model: nn.Sequential) -> None:
        images, _, masks = scenes(2, False, 3)
        for error, match, options in [
            (ValueError, "class_idx", {"class_idx": 2}),
            (ValueError, "one class for each", {"class_idx": [[0, 1], [0, 1]]}),
            (ValueError, "methods", {"methods": []}),
            (ValueError, "'NoCAM'", {"methods": ["NoCAM"]}),
            (ValueError, "did you mean .*GradCAM", {"methods": ["GradCam2"]}),
            (ValueError, "DeepFeatureFactorization", {"methods": ["DeepFeatureFactorization"]}),
            (TypeError, "must be a CAM class", {"methods": [DeepFeatureFactorization]}),
            (ValueError, "`target_layer`.*'LayerCAm2'; did you mean 'LayerCAM'", {"target_layer": {"LayerCAm2": "5"}}),
            (ValueError, "`method_kwargs`.*'ScoreCAM'", {"method_kwargs": {"ScoreCAM": {}}}),
            (TypeError, "`method_kwargs` of GradCAM must be a mapping", {"method_kwargs": {"GradCAM": 1}}),
            (TypeError, "`method_kwargs` must be a mapping", {"method_kwargs": [1]}),
            (ValueError, "`call_kwargs`.*'ScoreCAM'", {"call_kwargs": {"ScoreCAM": {}}}),
            (ValueError, "`call_kwargs` of GradCAM holds 'std'", {"call_kwargs": {"GradCAM": {"std": 1}}}),
            (ValueError, "`relu` of GradCAM is 'negative'", {"call_kwargs": {"GradCAM": {"relu": "negative"}}}),
            (ValueError, "`comparison_idx` of GradCAM", {"call_kwargs": {"GradCAM": {"comparison_idx": 1}}}),
            (ValueError, r"`masks`.*\(2, 24, 24\)", {"masks": masks[:, :5]}),
            (TypeError, "`masks`", {"masks": "mask.png"}),
            (ValueError, "masks", {"masks": masks[:1]}),
            (ValueError, "images", {"images": []}),
            (ValueError, "class_names", {"class_names": ["one"]}),
            (ValueError, "batch_size", {"batch_size": 0}),
            (ValueError, "exactly one of class_idx or targets", {"class_idx": 0, "targets": ClassLogit(0)}),
            (ValueError, "`targets` must be one callable or one per sample", {"targets": [ClassLogit(0)]}),
            (TypeError, "to_probabilities", {"to_probabilities": "softmax"}),
            (ValueError, "not a module", {"target_layer": "layer9"}),
        ]:
            with pytest.raises(error, match=match):
                trust(honest_model, images, **options)
        with pytest.raises(TypeError, match="`model`"):
            trust("resnet", images)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="input_tensor"):
            trust(honest_model, "image")  # type: ignore[arg-type]

    def test_layers_and_options_by_method(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        report = trust(
            honest_model,
            images,
            methods=["SmoothGradCAMpp", "LayerCAM"],
            target_layer={"SmoothGradCAMpp": "2", "LayerCAM": "5"},
            method_kwargs={"SmoothGradCAMpp": {"std": 0.1}},
        )
        assert report.method == "SmoothGradCAMpp(target_layer=['2'], num_samples=4, std=0.1)"
        assert report[0].cam.shape == (24, 24)
        assert report.others == ("LayerCAM",)

    def test_names_of_papers_and_repeats(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        options = {"Grad-CAM++": {"create_graph": False}}
        methods = ["Grad-CAM++", "GradCAMpp", LayerCAM, "layercam"]
        report = trust(honest_model, images, methods=methods, target_layer={"Grad-CAM++": "5", LayerCAM: "5"})
        assert report.method == "GradCAMpp(target_layer=['5'])"
        assert report.others == ("LayerCAM",)
        alone = trust(honest_model, images, methods=["GradCAM", "GradCAM"], target_layer="5")
        assert alone.others == ()
        with pytest.raises(ValueError, match="holds 'create_graph'"):
            trust(honest_model, images, methods=methods, call_kwargs=options)

    def test_masks_may_be_an_array(self, shortcut: TrustReport) -> None:
        images, _, masks = scenes(4, True, 7)
        model = trained(cue=True)
        found = trust(model, images, target_layer="5", masks=masks.numpy(), methods=["GradCAM"])
        assert [item.remarks for item in found] == [item.remarks for item in shortcut]

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_no_pass_is_larger_than_a_batch(self, honest_model: nn.Sequential, batch_size: int) -> None:
        images, _, _ = scenes(4, False, 7)
        model = copy.deepcopy(honest_model)
        model[-1].weight.data[0] = -model[-1].weight.data[0].abs()
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
        options = {"target_layer": "5", "methods": ["GradCAM"]}
        classes = [1, 1, 0, 1]
        parts = trust(model, images, classes, batch_size=batch_size, **options)
        assert max(sizes) == batch_size
        told = [check_of(item, "diagnosis") for item in parts]
        assert ["all_negative" in check.message for check in told] == [False, False, True, False]
        assert "samples" not in told[2].message
        whole = trust(model, images, classes, **options)
        assert [check.outcome for check in told] == [check_of(item, "diagnosis").outcome for item in whole]

    def test_options_of_the_call(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        asked = {"GradCAM": {"relu": False}}
        report = trust(honest_model, images, target_layer="5", call_kwargs=asked, methods=["GradCAM"])
        with GradCAM(honest_model, "5") as extractor:
            scores = honest_model(images)
            (cam,) = extractor(report[0].class_idx, scores, relu=False)
        assert cam.min() < 0
        torch.testing.assert_close(report[0].cam, cam[0])
        plain = trust(honest_model, images, target_layer="5", methods=["GradCAM"])
        found = [check_of(one[0], "removal").values["correlation"] for one in (report, plain)]
        assert found[0] != found[1]
        assert "data:image/" in report.to_html()

    def test_a_map_of_every_channel(self) -> None:
        from torchcam.explain import explain

        model, image = load_model(), sample_images()[0].to_tensor()[..., :48, :48]
        shown = explain(model, image, method=GuidedBackprop)
        report = shown.trust(methods=["GuidedBackprop"])
        fused = next(iter(shown.results["GuidedBackprop"].fused.values()))
        assert fused.shape == (48, 48)
        torch.testing.assert_close(report[0].cam, fused)

    def test_layers_may_be_modules(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        options: dict[str, Any] = {"methods": ["CAM", "LayerCAM"]}
        layers = {"CAM": honest_model[5], "LayerCAM": [honest_model[2], honest_model[5]]}
        classifier = {"CAM": {"fc_layer": honest_model[8]}}
        given = trust(honest_model, images, target_layer=layers, method_kwargs=classifier, **options)
        names = {"CAM": "5", "LayerCAM": ["2", "5"]}
        named = trust(honest_model, images, target_layer=names, method_kwargs={"CAM": {"fc_layer": "8"}}, **options)
        assert given.to_dict() == named.to_dict()
        with pytest.raises(ValueError, match="not a module of this Sequential"):
            trust(honest_model, images, target_layer=nn.Conv2d(1, 1, 1))

    @pytest.mark.parametrize("method", ["TransformerAttribution", "AttentionRollout", "LeGrad"])
    def test_attention(self, method: str) -> None:
        from torchvision.models import VisionTransformer

        from torchcam.explain import explain

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vit = VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
            ).eval()
            nn.init.normal_(vit.heads.head.weight)
        image = sample_images()[0].to_tensor()[..., :32, :32]
        layers = list(vit.encoder.layers) if method == "LeGrad" else None
        report = explain(vit, image, method=method, target_layer=layers).trust(methods=[method])
        assert report.method.startswith(method)
        assert report[0].cam.shape == (4, 4)
        assert report[0].checks[1].name == "evidence"

    def test_a_single_score(self) -> None:
        class OneScore(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = load_model()

            def forward(self, x: Tensor) -> Tensor:
                scores: Tensor = self.net(x)[:, 6:7]
                return scores

        image, model = sample_images()[0].to_tensor(), OneScore().eval()
        report = trust(model, image, target_layer="net.layer4", methods=["LayerCAM"])
        assert report[0].probability == pytest.approx(model(image).sigmoid().item())
        assert report.verdict == "believe"
        assert check_of(report[0], "region").outcome == "left out"

    def test_signals(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
        x = torch.randn((2, 2, 40), generator=torch.Generator().manual_seed(0))
        report = trust(model.eval(), x, target_layer="1", methods=["HiResCAM"])
        assert report[0].cam.shape == (38,)
        assert report[0].picture is None
        assert "<img" not in report.to_html()


class TestPage:
    def test_text(self, shortcut: TrustReport) -> None:
        text = str(shortcut)
        assert text.startswith("GradCAM(target_layer=['5']) on Sequential\n\nBelieve these pictures.")
        assert text.count("✓ diagnosis") == 4
        assert max(map(len, text.splitlines())) <= 100

    def test_json(self, demo_report: TrustReport) -> None:
        report = json.loads(json.dumps(demo_report.to_dict(), allow_nan=False))
        assert report["verdict"] == "believe"
        assert report["compared_with"] == ["LayerCAM", "ReciproCAM"]
        assert report["thresholds"]["removal"] == dict(zip(("passed", "failed"), THRESHOLDS["removal"], strict=True))
        assert report["reliability"]["believe"] == vars(RELIABILITY["believe"])
        assert report["passes"] == 138
        assert report["predictions"][0]["checks"][1]["values"]["fall"] > 0.9
        assert report["predictions"][0]["class_idx"] == demo_report[0].class_idx

    def test_json_of_a_broken_model(self, tmp_path: Path) -> None:
        item = PredictionTrust(
            0, None, float("nan"), (Check("class", "failed", "", {"a": math.nan}),), (), torch.eye(2)
        )
        path = TrustReport([item], "GradCAM", "Net").save(tmp_path / "report.json")
        assert "NaN" not in path.read_text(encoding="utf-8")
        (prediction,) = json.loads(path.read_text(encoding="utf-8"))["predictions"]
        assert prediction["probability"] is None
        assert prediction["checks"][0]["values"] == {"a": None}

    def test_html_holds_everything(self, shortcut: TrustReport) -> None:
        page = shortcut.to_html()
        assert page.count("<section>") == 4
        assert page.count("<img") == 8
        assert page.count('src="data:image/') == 8
        for needle in ("http:", "https:", "<script", "url("):
            assert needle not in page
        for check in shortcut[0].checks:
            assert check.name in page
        assert "They all look at the same place" in page
        assert "<!doctype" not in shortcut._repr_html_()

    def test_names_are_escaped(self) -> None:
        item = PredictionTrust(0, "<i>", 0.5, (Check("class", "failed", "a < b"),), ("c & d",), torch.eye(2))
        page = TrustReport([item], "<b>", "Net").to_html()
        assert "<i>" not in page
        assert "<b>" not in page
        assert "a &lt; b" in page
        assert "c &amp; d" in page

    def test_save(self, honest: TrustReport, tmp_path: Any) -> None:
        assert honest.save(tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == honest.to_html()
        assert honest.save(tmp_path / "report.txt").read_text(encoding="utf-8") == f"{honest}\n"
        assert json.loads(honest.save(tmp_path / "report.json").read_text(encoding="utf-8")) == honest.to_dict()
        with pytest.raises(ValueError, match=r"\.html"):
            honest.save(tmp_path / "report.pdf")
