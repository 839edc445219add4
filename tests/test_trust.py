"""The report says in words whether to believe a map, and is right about models whose answer is known."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_promises import Snapshot, count_hooks
from torchcam.demo import CLASS_NAMES, DemoNet, load_model, sample_images
from torchcam.methods import DeepFeatureFactorization, EigenCAM, GradCAM, GuidedBackprop, LayerCAM, RandomCAM
from torchcam.methods._diagnose import Finding
from torchcam.trust import THRESHOLDS, Check, PredictionTrust, TrustReport, _verdicts, trust


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


QUICK: dict[str, Any] = {"num_random": 5, "steps": 6}


@pytest.fixture(scope="module")
def shortcut() -> TrustReport:
    images, _, masks = scenes(4, True, 7)
    return trust(trained(cue=True), images, target_layer="5", masks=masks, **QUICK)


@pytest.fixture(scope="module")
def honest_model() -> nn.Sequential:
    return trained(cue=False)


@pytest.fixture(scope="module")
def honest(honest_model: nn.Sequential) -> TrustReport:
    images, _, masks = scenes(4, False, 7)
    return trust(honest_model, images, target_layer="5", masks=masks, **QUICK)


@pytest.fixture(scope="module")
def demo_report() -> TrustReport:
    samples = sample_images()[:2]
    images = torch.cat([sample.to_tensor() for sample in samples])
    return trust(
        load_model(), images, target_layer="layer4", class_names=CLASS_NAMES, to_probabilities=torch.sigmoid, **QUICK
    )


def check_of(item: PredictionTrust, name: str) -> Check:
    return next(check for check in item.checks if check.name == name)


class TestVerdicts:
    def test_the_demo_is_to_be_believed(self, demo_report: TrustReport) -> None:
        assert demo_report.verdict == "believe", str(demo_report)
        assert [item.verdict for item in demo_report] == ["believe", "believe"]
        assert demo_report.headline == "Believe these pictures. All 2 can be believed."
        assert [item.class_name for item in demo_report] == [CLASS_NAMES[item.class_idx] for item in demo_report]
        assert [check.name for check in demo_report[0].checks] == ["diagnosis", *THRESHOLDS]

    @pytest.mark.parametrize("seed", range(2))
    def test_a_model_that_was_not_trained_is_not(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DemoNet().eval()
        image = sample_images()[0].to_tensor()[..., :48, :48]
        report = trust(model, image, target_layer="layer4", methods=["GradCAM"], **QUICK)
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

    def test_a_class_agnostic_map_is_taken_with_care(self) -> None:
        image = sample_images()[1].to_tensor()
        report = trust(
            load_model(), image, target_layer="layer4", methods=[EigenCAM], to_probabilities=torch.sigmoid, **QUICK
        )
        assert report.verdict == "with care", str(report)
        found = check_of(report[0], "class")
        assert (found.outcome, found.values["class_overlap"]) == ("failed", pytest.approx(1))

    def test_a_random_map_is_not_believed(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(4, False, 7)
        report = trust(honest_model, images, target_layer="5", methods=[RandomCAM, GradCAM], **QUICK)
        assert report.verdict != "believe", str(report)
        assert any(item.verdict == "do not believe" for item in report)

    def test_a_blank_map_is_not_believed(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(2, False, 7)
        model = copy.deepcopy(honest_model)
        model[-1].weight.data[0] = -model[-1].weight.data[0].abs()
        report = trust(model, images, 0, target_layer="5", methods=["GradCAM", "LayerCAM"], **QUICK)
        for item in report:
            assert item.verdict == "do not believe"
            assert "all_negative" in check_of(item, "diagnosis").message
            assert [check.name for check in item.checks] == ["diagnosis", "evidence", "agreement"]


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
        ]
        values = check_of(item, "evidence").values
        assert values["probability"] == pytest.approx(probability(image), abs=1e-5)
        assert values["without"] == pytest.approx(min(lost), abs=1e-5)
        assert item.probability == values["probability"]

    def test_the_metrics_are_the_librarys(self, demo_report: TrustReport) -> None:
        from torchcam.metrics import ROAD, SanityCheck

        model, image = load_model(), sample_images()[0].to_tensor()
        item = demo_report[0]
        with GradCAM(model, "layer4") as extractor:
            sanity = SanityCheck(extractor)
            sanity.update(image, item.class_idx)
            road = ROAD(extractor, lambda output: output.sigmoid())
            road.update(image, item.class_idx, maps=item.cam.unsqueeze(0))
        weights = check_of(item, "weights").values
        assert weights["rank_correlation"] == pytest.approx(abs(sanity.summary()["rank_correlation"]), abs=1e-4)
        assert check_of(item, "class").values["class_overlap"] == pytest.approx(
            sanity.summary()["class_overlap"], abs=1e-4
        )
        assert check_of(item, "removal").values["map"] == pytest.approx(road.summary()["road"], abs=1e-4)

    def test_agreement_is_a_rank_correlation(self, demo_report: TrustReport) -> None:
        from scipy.stats import spearmanr

        from torchcam.methods import LayerCAM

        model, image = load_model(), sample_images()[0].to_tensor()
        with LayerCAM(model, "layer4") as extractor:
            model(image)
            (other,) = extractor(demo_report[0].class_idx)
        expected = spearmanr(demo_report[0].cam.flatten(), other.flatten()).statistic
        assert check_of(demo_report[0], "agreement").values["LayerCAM"] == pytest.approx(expected, abs=1e-3)

    def test_the_map_is_that_of_the_method(self, demo_report: TrustReport) -> None:
        model = load_model()
        with GradCAM(model, "layer4") as extractor:
            model(sample_images()[1].to_tensor())
            (cam,) = extractor(demo_report[1].class_idx)
        torch.testing.assert_close(demo_report[1].cam, cam[0])

    def test_repeats_give_the_same(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        first, second = (trust(honest_model, images, target_layer="5", **QUICK).to_dict() for _ in range(2))
        assert first == second

    def test_a_sample_is_judged_by_itself(self, honest: TrustReport, honest_model: nn.Sequential) -> None:
        images, _, masks = scenes(4, False, 7)
        alone = trust(honest_model, images[2:3], target_layer="5", masks=masks[2:3], **QUICK)[0]
        for check, other in zip(alone.checks, honest[2].checks, strict=True):
            assert check.outcome == other.outcome
            assert check.values == pytest.approx(dict(other.values), abs=1e-4)


def item_with(**outcomes: Any) -> PredictionTrust:
    """A prediction whose checks have these outcomes, all others passed."""
    names = ["diagnosis", *THRESHOLDS]
    checks = [Check(name, outcomes.get(name.replace(" ", "_"), "passed"), f"{name} said.") for name in names]
    return PredictionTrust(3, "cat", 0.5, tuple(checks), (), torch.eye(2))


class TestRules:
    @pytest.mark.parametrize("name", ["diagnosis", "evidence", "weights"])
    def test_one_failure_decides(self, name: str) -> None:
        item = item_with(**{name: "failed"})
        assert item.verdict == "do not believe"
        assert item.reasons == (f"{name} said.",)

    @pytest.mark.parametrize("name", ["class", "deletion_and_insertion", "removal", "agreement"])
    def test_one_failure_is_a_reason_for_care(self, name: str) -> None:
        assert item_with(**{name: "failed"}).verdict == "with care"

    def test_both_tests_of_faithfulness_decide(self) -> None:
        assert item_with(deletion_and_insertion="failed", removal="failed").verdict == "do not believe"

    def test_doubts(self) -> None:
        names = ["diagnosis", *(name.replace(" ", "_") for name in THRESHOLDS)]
        for name in names:
            assert item_with(**{name: "doubtful"}).verdict == "believe"
        for first, second in itertools.combinations(names, 2):
            assert item_with(**{first: "doubtful", second: "doubtful"}).verdict == "with care"
        assert item_with(agreement="left out", removal="left out").verdict == "believe"

    def test_of_several(self) -> None:
        good, doubtful, bad = item_with(), item_with(removal="failed"), item_with(weights="failed")

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
            (_verdicts.check_evidence(math.nan, 0.5), "failed"),
            (_verdicts.check_weights(0.5, 0.1, 3), "passed"),
            (_verdicts.check_weights(-0.7, 0.1, 3), "doubtful"),
            (_verdicts.check_weights(-0.71, 0.1, 3), "failed"),
            (_verdicts.check_weights(math.nan, math.nan, 3), "left out"),
            (_verdicts.check_class(0.8), "passed"),
            (_verdicts.check_class(0.95), "doubtful"),
            (_verdicts.check_class(0.96), "failed"),
            (_verdicts.check_class(math.nan), "left out"),
            (_verdicts.check_class(math.nan, finite=False), "left out"),
            (_verdicts.check_agreement({"LayerCAM": 0.5}), "passed"),
            (_verdicts.check_agreement({"LayerCAM": 0.75, "ReciproCAM": -0.25}), "doubtful"),
            (_verdicts.check_agreement({"LayerCAM": 0.0}), "failed"),
            (_verdicts.check_agreement({}), "left out"),
        ],
    )
    def test_outcomes(self, check: Check, expected: str) -> None:
        assert check.outcome == expected, check

    def test_evidence(self) -> None:
        check = _verdicts.check_evidence(0.75, 0.5)
        assert check.values == {"probability": 0.75, "without": 0.5, "fall": 0.25}
        assert check.message.endswith("the probability falls from 0.750 to 0.500.")

    def test_weights(self) -> None:
        check = _verdicts.check_weights(-0.25, 0.125, 4)
        assert check.values == {"rank_correlation": 0.25, "ssim": 0.125}
        assert "rank correlation 0.25 over 4 stages" in check.message

    def test_class(self) -> None:
        assert _verdicts.check_class(0.25).values == {"class_overlap": 0.25}
        assert _verdicts.check_class(math.nan).message == "There is only one class."
        assert "not finite" in _verdicts.check_class(math.nan, finite=False).message
        assert "not finite" in _verdicts.check_weights(math.nan, math.nan, 1).message

    @pytest.mark.parametrize("name", ["deletion and insertion", "removal"])
    def test_faithfulness(self, name: str) -> None:
        random = [0.0, 0.25, 0.5, 0.25]
        better = _verdicts.check_faithfulness(name, 0.75, random)
        assert better.outcome == "passed"
        assert better.values == {"map": 0.75, "random_mean": 0.25, "random_best": 0.5, "beaten": 1.0}
        assert "more than any random one" in better.message
        half = _verdicts.check_faithfulness(name, 0.51, random)
        assert (half.outcome, half.values["beaten"]) == ("doubtful", 0.75)  # 0.01 is too small an effect
        assert _verdicts.check_faithfulness(name, 0.25, random).outcome == "failed"

    @pytest.mark.parametrize(
        ("active", "outcome", "note"),
        [(0.5, "passed", ""), (0.72, "passed", "does as well (0.720)."), (0.9, "doubtful", "does better (0.900).")],
    )
    def test_faithfulness_beside_the_mean_activation(self, active: float, outcome: str, note: str) -> None:
        check = _verdicts.check_faithfulness("removal", 0.75, [0.0], active)
        assert check.outcome == outcome
        assert check.values["mean_activation"] == active
        assert check.message.endswith(note)
        assert ("merely active" in check.message) == bool(note)
        assert _verdicts.check_faithfulness("removal", 0.0, [0.0], active).outcome == "failed"

    def test_agreement(self) -> None:
        check = _verdicts.check_agreement({"LayerCAM": 0.75, "ReciproCAM": 0.5}, ["that of LeGrad is blank"])
        assert check.values == {"LayerCAM": 0.75, "ReciproCAM": 0.5}
        assert check.message.endswith(
            "(rank correlation: LayerCAM 0.75, ReciproCAM 0.50). Left out: that of LeGrad is blank."
        )

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
            Check("class", outcome, f"{outcome}.") for outcome in ("passed", "doubtful", "failed")
        )
        broken = Check("weights", "failed", "broken.")
        for checks, verdict, reasons in [
            ([], "believe", ()),
            ([doubtful, passed], "believe", ("passed.",)),
            ([doubtful, passed, doubtful], "with care", ("doubtful.", "doubtful.")),
            ([doubtful, passed, failed], "with care", ("failed.", "doubtful.")),
            ([doubtful, passed, broken], "do not believe", ("broken.",)),
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


def test_the_page_on_troubleshooting_has_the_thresholds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        if line.startswith("| ") and line.count("|") == 5:
            name, _, passed, failed = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = [float(number) for cell in (passed, failed) for number in re.findall(r"[0-9.]+$", cell)]
    assert {name: tuple(rows[name]) for name in THRESHOLDS} == dict(THRESHOLDS)


class TestNoTrace:
    def test_the_model_is_left_as_it_was(self, device: torch.device) -> None:
        images, _, _ = scenes(1, False, 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DemoNet().to(device).train()
        x = images.expand(-1, 3, -1, -1).to(device)
        before = Snapshot(model)
        trust(model, x, target_layer="layer2", num_random=2, steps=3)
        before.check(hooks=False)

    @pytest.mark.parametrize("method", ["GradCAM", "GuidedBackprop", "AblationCAM"])
    def test_nothing_changes_meanwhile(self, method: str) -> None:
        """What other threads see of the model while trust runs: its modes, parameters, hooks and forwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DemoNet().train()
        image = sample_images()[0].to_tensor()[..., :48, :48]

        def state() -> list[Any]:
            modules = [(module, module.training, sorted(vars(module))) for module in model.modules()]
            tensors = [*model.parameters(), *model.buffers()]
            return [modules, [(id(tensor), tensor._version) for tensor in tensors], count_hooks(model)]

        seen = []
        model.layer1.register_forward_hook(lambda *_: seen.append(state()))
        before = state()
        layer = {} if method == "GuidedBackprop" else {"target_layer": "layer2"}
        trust(model, image, methods=[method], num_random=1, steps=2, **layer)
        assert len(seen) > 20
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
            (ValueError, "closest: .*GradCAM", {"methods": ["GradCam2"]}),
            (ValueError, "DeepFeatureFactorization", {"methods": ["DeepFeatureFactorization"]}),
            (TypeError, "must be a CAM class", {"methods": [DeepFeatureFactorization]}),
            (ValueError, "`target_layer`.*'LayerCAm2'; closest: LayerCAM", {"target_layer": {"LayerCAm2": "5"}}),
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
            (ValueError, "num_random", {"num_random": 0}),
            (TypeError, "steps", {"steps": 1.5}),
            (TypeError, "to_probabilities", {"to_probabilities": "softmax"}),
            (ValueError, "not a module", {"target_layer": "layer9"}),
        ]:
            with pytest.raises(error, match=match):
                trust(honest_model, images, **options)
        with pytest.raises(TypeError, match="`model`"):
            trust("resnet", images)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="input_tensor"):
            trust(honest_model, "image")  # type: ignore[arg-type]

    def test_a_method_that_does_not_fit_is_left_out(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        methods = ["GradCAM", "LeGrad", "LayerCAM"]
        found = check_of(trust(honest_model, images, target_layer="5", methods=methods, **QUICK)[0], "agreement")
        assert list(found.values) == ["LayerCAM"]
        assert "Left out: LeGrad has none" in found.message

    def test_layers_and_options_by_method(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        report = trust(
            honest_model,
            images,
            methods=["SmoothGradCAMpp", "LayerCAM"],
            target_layer={"SmoothGradCAMpp": "2", "LayerCAM": "5"},
            method_kwargs={"SmoothGradCAMpp": {"std": 0.1}},
            **QUICK,
        )
        assert report.method == "SmoothGradCAMpp(target_layer=['2'], num_samples=4, std=0.1)"
        assert report[0].cam.shape == (24, 24)
        assert report.others == ("LayerCAM",)

    def test_names_of_papers_and_repeats(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        options = {"Grad-CAM++": {"create_graph": False}}
        methods = ["Grad-CAM++", "GradCAMpp", LayerCAM, "layercam"]
        report = trust(honest_model, images, methods=methods, target_layer={"Grad-CAM++": "5", LayerCAM: "5"}, **QUICK)
        assert report.method == "GradCAMpp(target_layer=['5'])"
        assert report.others == ("LayerCAM",)
        alone = trust(honest_model, images, methods=["GradCAM", "GradCAM"], target_layer="5", **QUICK)
        assert check_of(alone[0], "agreement").outcome == "left out"
        with pytest.raises(ValueError, match="holds 'create_graph'"):
            trust(honest_model, images, methods=methods, call_kwargs=options)

    def test_masks_may_be_an_array(self, shortcut: TrustReport) -> None:
        images, _, masks = scenes(4, True, 7)
        model = trained(cue=True)
        found = trust(model, images, target_layer="5", masks=masks.numpy(), methods=["GradCAM"], **QUICK)
        assert [item.remarks for item in found] == [item.remarks for item in shortcut]

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_no_pass_is_larger_than_a_batch(self, honest_model: nn.Sequential, batch_size: int) -> None:
        images, _, _ = scenes(4, False, 7)
        model = copy.deepcopy(honest_model)
        model[-1].weight.data[0] = -model[-1].weight.data[0].abs()
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
        options = {"target_layer": "5", "methods": ["GradCAM"], **QUICK}
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
        report = trust(honest_model, images, target_layer="5", call_kwargs=asked, methods=["GradCAM"], **QUICK)
        with GradCAM(honest_model, "5") as extractor:
            scores = honest_model(images)
            (cam,) = extractor(report[0].class_idx, scores, relu=False)
        assert cam.min() < 0
        torch.testing.assert_close(report[0].cam, cam[0])
        plain = trust(honest_model, images, target_layer="5", methods=["GradCAM"], **QUICK)
        weights = [check_of(one[0], "weights").values["rank_correlation"] for one in (report, plain)]
        assert weights[0] != weights[1]  # the metric asks in the same way
        assert "data:image/" in report.to_html()

    def test_a_map_of_every_channel(self) -> None:
        from torchcam.explain import explain

        model, image = load_model(), sample_images()[0].to_tensor()[..., :48, :48]
        shown = explain(model, image, method=GuidedBackprop)
        report = shown.trust(methods=["GuidedBackprop"], num_random=2, steps=2)
        fused = next(iter(shown.results["GuidedBackprop"].fused.values()))
        assert fused.shape == (48, 48)
        torch.testing.assert_close(report[0].cam, fused)

    def test_layers_may_be_modules(self, honest_model: nn.Sequential) -> None:
        images, _, _ = scenes(1, False, 3)
        options: dict[str, Any] = {"methods": ["CAM", "LayerCAM"], **QUICK}
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
        report = explain(vit, image, method=method, target_layer=layers).trust(methods=[method], **QUICK)
        assert report.method.startswith(method)
        assert report[0].cam.shape == (4, 4)
        assert "weights" in [check.name for check in report[0].checks]

    def test_a_single_score(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
        images, _, _ = scenes(1, False, 3)
        report = trust(model.eval(), images, target_layer="1", methods=["LayerCAM"], **QUICK)
        assert report[0].probability == pytest.approx(model(images).sigmoid().item())
        assert check_of(report[0], "class").outcome in {"left out"} or report[0].verdict == "do not believe"

    def test_signals(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
        x = torch.randn((2, 2, 40), generator=torch.Generator().manual_seed(0))
        report = trust(model.eval(), x, target_layer="1", methods=["HiResCAM"], **QUICK)
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
        assert report["thresholds"]["class"] == {"passed": 0.8, "failed": 0.95}
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
