"""`explain` beyond one class of one tensor: several methods, batches, targets, signed maps; what is kept and saved."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.methods_under_test import LAYERS, METHODS, READS_ATTENTION, make_input, make_model
from tests.oracles import faded, looks_like
from torchcam import methods
from torchcam.explain import Explanations, MethodMaps, PredictionExplanation, explain
from torchcam.methods import CAM, EigenCAM, FinerCAM, GradCAM, LayerCAM, RefineCAM, ScoreCAM
from torchcam.targets import BoxScores, ClassLogit, ClassProbability, RawScore, Segmentation, Similarity
from torchcam.trust import trust

CPU = torch.device("cpu")
SEVERAL = {"GradCAM": "block2", "LayerCAM": LAYERS, "EigenCAM": "block1", "RefineCAM": LAYERS}


@pytest.fixture
def x() -> Tensor:
    return make_input(CPU, batch_size=1)


@pytest.fixture
def batch() -> Tensor:
    return make_input(CPU, batch_size=3)


@pytest.fixture
def model() -> nn.Module:
    return make_model("GradCAM", CPU)


def count_passes(model: nn.Module) -> list[int]:
    """A list that grows by the number of samples of each forward pass."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: passes.append(len(args[0])))
    return passes


def same_maps(first: PredictionExplanation, second: PredictionExplanation, tolerance: float = 1e-5) -> bool:
    assert first.methods == second.methods
    for name, classes in first.maps.items():
        assert list(classes) == list(second.maps[name])
        for key, maps in classes.items():
            others = second.maps[name][key]
            assert len(maps) == len(others)
            if not all(torch.allclose(a, b, atol=tolerance) for a, b in zip(maps, others, strict=True)):
                return False
    return True


class TestSeveralMethods:
    def test_each_gives_what_it_gives_alone(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, method=list(SEVERAL), target_layer=SEVERAL, top_k=2)
        assert result.methods == tuple(SEVERAL)
        for name, layers in SEVERAL.items():
            alone = explain(model, x, method=name, target_layer=layers, top_k=2)
            assert list(result.maps[name]) == list(alone.cams)
            for index, maps in alone.cams.items():
                assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(result.maps[name][index], maps, strict=True))
                assert any(cam.max() > 0 for cam in maps)
            assert result.results[name].target_layers == alone.target_layers

    def test_the_first_is_what_the_old_fields_hold(self, model: nn.Module, x: Tensor) -> None:
        kwargs = {"LayerCAM": {"input_shape": (3, 12, 12)}}
        result = explain(model, x, method=[LayerCAM, GradCAM], target_layer="block2", method_kwargs=kwargs)
        assert (result.method, result.target_layers) == ("LayerCAM", ("block2",))
        assert result.method_kwargs == {"input_shape": [3, 12, 12]}
        assert result.cams is result.maps["LayerCAM"]
        assert result.results["GradCAM"].method_kwargs == {}

    def test_they_share_one_forward_pass(self, model: nn.Module, x: Tensor) -> None:
        passes = count_passes(model)
        explain(
            model,
            x,
            method=[GradCAM, LayerCAM, CAM, EigenCAM, RefineCAM, FinerCAM],
            target_layer={"CAM": "block2", "RefineCAM": LAYERS}
            | dict.fromkeys([GradCAM, LayerCAM], "block1")
            | dict.fromkeys([EigenCAM, FinerCAM], "block2"),
            method_kwargs={CAM: {"fc_layer": "fc"}},
            top_k=3,
        )
        assert passes == [1]

    @pytest.mark.parametrize("name", ["grad-cam++", "GRADCAMPP", "Grad-CAM++", "GradCAMpp"])
    def test_names_in_any_case(self, name: str, model: nn.Module, x: Tensor) -> None:
        assert explain(model, x, method=name, target_layer="block2").method == "GradCAMpp"

    def test_one_method_in_several_ways(self, model: nn.Module, x: Tensor) -> None:
        result = explain(
            model,
            x,
            method={"early": GradCAM, "late": "GradCAM"},
            target_layer={"early": "block1", "late": "block2"},
            class_idx=1,
        )
        assert result.methods == ("early", "late")
        assert result.method == "GradCAM"
        assert [cam.shape for cam in (result.maps["early"][1][0], result.maps["late"][1][0])] == [(12, 12), (6, 6)]

    def test_options_of_the_call(self, model: nn.Module, x: Tensor) -> None:
        options = {"FinerCAM": {"gamma": 1.0, "comparison_idx": [0]}, "GradCAM": {"relu": "negative"}}
        result = explain(
            model, x, method=["FinerCAM", "GradCAM"], target_layer="block2", method_kwargs=options, class_idx=2
        )
        with FinerCAM(model, "block2", gamma=1.0) as extractor:
            (contrast,) = extractor(2, model(x), comparison_idx=[0])
        with GradCAM(model, "block2") as extractor:
            (against,) = extractor(2, model(x), relu="negative")
        assert torch.allclose(result.maps["FinerCAM"][2][0], contrast[0], atol=1e-6)
        assert torch.allclose(result.maps["GradCAM"][2][0], against[0], atol=1e-6)
        assert result.results["FinerCAM"].method_kwargs == {"gamma": 1.0, "comparison_idx": [0]}

    def test_an_error_says_which_method_it_is_from(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(TypeError, match="list of two layers") as caught:
            explain(model, x, method=["GradCAM", "RefineCAM"], target_layer="block2")
        assert caught.value.__notes__ == ["This was RefineCAM, one of the methods GradCAM, RefineCAM."]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_all_methods_at_once_leave_no_trace(self, batch: Tensor) -> None:
        model = make_model("GradCAM", CPU).train()
        names = [name for name in METHODS if name not in READS_ATTENTION and hasattr(methods, name)]
        layers = dict.fromkeys(names, LAYERS) | {"CAM": "block2", "GuidedBackprop": None, "FullGrad": None}
        options = {"CAM": {"fc_layer": "fc"}, "SESS": {"window_size": 12, "scales": 2}, "GroupCAM": {"groups": 2}}
        options |= {"SSCAM": {"num_samples": 2}, "ISCAM": {"num_samples": 2}}
        quiet = copy.deepcopy(model).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        random_state = torch.get_rng_state()
        with torch.inference_mode():
            results = explain(model, batch.clone(), method=names, target_layer=layers, method_kwargs=options, top_k=2)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random_state)
        for name in names:
            alone = explain(
                quiet, batch, method=name, target_layer=layers[name], method_kwargs=options.get(name), top_k=2
            )
            for result, other in zip(results, alone, strict=True):
                for index, maps in other.cams.items():
                    for cam, expected in zip(result.maps[name][index], maps, strict=True):
                        assert torch.allclose(cam, expected, atol=1e-5), name

    def test_methods_that_read_attention_share_the_pass(self, x: Tensor) -> None:
        model = make_model("LeGrad", CPU)
        passes = count_passes(model)
        names = ["LeGrad", "AttentionRollout", "TransformerAttribution", "GradCAM"]
        layers = {"LeGrad": LAYERS, "AttentionRollout": LAYERS, "GradCAM": "block1.norm"}
        result = explain(model, x, method=names, target_layer=layers, class_idx=[0, 2])
        assert passes == [1]
        for name in names:
            alone = explain(model, x, method=name, target_layer=layers.get(name), class_idx=[0, 2])
            for index, (cam,) in alone.cams.items():
                assert torch.allclose(result.maps[name][index][0], cam, atol=1e-5)


class TestClasses:
    def test_class_idx_takes_the_place_of_the_predicted_class(self, model: nn.Module, x: Tensor) -> None:
        for given, expected in [(1, [1]), ([2, 0], [2, 0]), (torch.tensor([0, 1]), [0, 1]), (range(3), [0, 1, 2])]:
            result = explain(model, x, target_layer="block2", class_idx=given)
            assert list(result.cams) == expected
            assert result.predicted_class_idx == int(result.logits.argmax())

    def test_best_named_and_expected_in_this_order(self, model: nn.Module, x: Tensor) -> None:
        best, middle, worst = explain(model, x, target_layer="block2").logits[0].argsort(descending=True).tolist()
        result = explain(model, x, target_layer="block2", top_k=1, class_idx=[worst], expected_class_idx=middle)
        assert list(result.cams) == [best, worst, middle]

    def test_probabilities(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, target_layer="block2")
        assert torch.allclose(result.probabilities, result.logits.double().softmax(1))
        result = explain(model, x, target_layer="block2", to_probabilities=torch.sigmoid, class_names=["a", "b", "c"])
        assert torch.equal(result.probabilities, result.logits.sigmoid())
        share = float(result.probabilities[0, result.predicted_class_idx])
        assert result.value_of(result.predicted_class_idx) == f"{share:.1%}"
        assert f"predicts {'abc'[result.predicted_class_idx]} " in result.title

    def test_a_single_score_is_no_probability(self, x: Tensor) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
        result = explain(model, x, target_layer="0")
        assert result.probabilities is None
        assert result.value_of(0) == f"score {float(result.logits):.3g}"
        shown = explain(model, x, target_layer="0", to_probabilities=torch.sigmoid)
        assert shown.value_of(0) == f"{float(result.logits.sigmoid()):.1%}"

    def test_signed_maps(self, model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            model.fc.weight[0] = -1.0
        result = explain(model, x, target_layer="block2", class_idx=0, relu=False)
        with GradCAM(model, "block2") as extractor:
            (expected,) = extractor(0, model(x), relu=False)
        assert torch.allclose(result.cams[0][0], expected[0], atol=1e-6)
        assert result.cams[0][0].min() == -1
        assert result.results["GradCAM"].signed
        assert result.method_kwargs == {"relu": False}

    def test_maps_of_several_layers_are_fused_to_be_drawn(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, method=LayerCAM, target_layer=LAYERS, class_idx=1)
        with LayerCAM(model, LAYERS) as extractor:
            fused = extractor.fuse_cams(extractor(1, model(x)))
        assert torch.allclose(result.results["LayerCAM"].fused[1], fused[0], atol=1e-6)

    def test_maps_with_channels_are_drawn_as_their_distance_from_nothing(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, method="GuidedBackprop", class_idx=1)
        (cam,) = result.cams[1]
        assert cam.shape == (3, 12, 12)
        distance = np.abs(cam.numpy() - np.sort(cam.numpy(), axis=None)[(cam.numel() - 1) // 2]).max(0)
        np.testing.assert_allclose(result.results["GuidedBackprop"].values(1), distance / distance.max(), atol=1e-6)


class TestBatch:
    @pytest.mark.parametrize("batch_size", [1, 2, 32])
    def test_is_as_many_single_explanations(self, batch_size: int, model: nn.Module, batch: Tensor) -> None:
        options: dict[str, Any] = {"method": list(SEVERAL), "target_layer": SEVERAL, "top_k": 2}
        results = explain(model, batch, batch_size=batch_size, **options)
        assert isinstance(results, Explanations)
        assert len(results) == 3
        for sample, result in zip(batch, results, strict=True):
            single = explain(model, sample[None], **options)
            assert torch.allclose(result.logits, single.logits, atol=1e-6)
            assert result.predicted_class_idx == single.predicted_class_idx
            assert result.input_shape == (1, 3, 12, 12)
            assert same_maps(result, single)

    @pytest.mark.parametrize(("batch_size", "expected"), [(32, [3]), (2, [2, 1])])
    def test_costs_one_pass_for_so_many(
        self, batch_size: int, expected: list[int], model: nn.Module, batch: Tensor
    ) -> None:
        passes = count_passes(model)
        explain(model, batch, batch_size=batch_size, method=["GradCAM", "EigenCAM"], target_layer="block2", top_k=3)
        assert passes == expected

    def test_classes_of_each(self, model: nn.Module, batch: Tensor) -> None:
        def keys(**options: Any) -> list[list[int]]:
            return [list(result.cams) for result in explain(model, batch, target_layer="block2", **options)]

        assert keys(class_idx=1) == [[1], [1], [1]]
        assert keys(class_idx=[2, 0, 1]) == [[2], [0], [1]]
        assert keys(class_idx=torch.tensor([2, 0, 1])) == [[2], [0], [1]]
        assert keys(class_idx=[[2, 1], [0], [0, 1, 2]]) == [[2, 1], [0], [0, 1, 2]]
        assert keys(class_idx=np.array([[2, 1], [0, 1], [0, 2]])) == [[2, 1], [0, 1], [0, 2]]
        assert keys(class_idx=0, expected_class_idx=[0, 1, None]) == [[0], [0, 1], [0]]
        with pytest.raises(ValueError, match=r"`class_idx` must be one for all inputs, or .* 3 inputs, got 2"):
            keys(class_idx=[0, 1])

    def test_different_numbers_of_classes_give_the_maps_of_single_ones(self, model: nn.Module, batch: Tensor) -> None:
        results = explain(model, batch, target_layer="block2", class_idx=[[2, 1], [0], [0, 1, 2]])
        for sample, result in zip(batch, results, strict=True):
            assert same_maps(result, explain(model, sample[None], target_layer="block2", class_idx=list(result.cams)))

    def test_a_list_of_one_is_a_batch(self, model: nn.Module, x: Tensor) -> None:
        results = explain(model, [x[0]], target_layer="block2")
        assert isinstance(results, Explanations)
        assert same_maps(results[0], explain(model, x, target_layer="block2"))
        assert same_maps(results[0], explain(model, [x], target_layer="block2")[0])

    def test_is_a_sequence(self, model: nn.Module, batch: Tensor) -> None:
        results = explain(model, batch, target_layer="block2")
        assert list(results) == [results[0], results[1], results[2]]
        assert results[-1] is results[2]
        assert isinstance(results[1:], Explanations)
        assert list(results[1:]) == [results[1], results[2]]
        assert repr(results).count("<PredictionExplanation: Net predicts") == 3

    def test_one_bad_input_is_named(self, model: nn.Module, batch: Tensor) -> None:
        batch[1] = torch.nan
        with pytest.raises(ValueError, match=r"NaN or infinite for the inputs \[1\]"):
            explain(model, batch, target_layer="block2")

    def test_signals_are_no_image_without_batch_dimension(self) -> None:
        model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        assert len(explain(model, torch.rand(3, 2, 9), target_layer="0")) == 3


class Segmenter(nn.Module):
    """Scores of three classes at each position, as torchvision's models give them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.features(x).relu())}


class Detector(nn.Module):
    """A list with one dictionary for each input, as torchvision's detectors give it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = self.features(x).relu()
        boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0], [4.0, 4.0, 12.0, 12.0]])
        return [
            {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": one[:2].mean((1, 2)).sigmoid()} for one in found
        ]


class TestTargets:
    def test_segmentation(self, x: Tensor) -> None:
        torch.manual_seed(0)
        model, mask = Segmenter(), torch.rand(12, 12) > 0.5
        target = Segmentation(1, mask)
        result = explain(model, x, target_layer="features", targets={"left cat": target, "all": Segmentation(1)})
        with GradCAM(model, "features") as extractor:
            (expected,) = extractor(targets=target, scores=model(x))
        assert list(result.cams) == ["left cat", "all"]
        assert torch.allclose(result.cams["left cat"][0], expected[0], atol=1e-6)
        with torch.no_grad():
            score = model(x)["out"][0, 1][mask].sum()
        assert result.scores["left cat"] == pytest.approx(float(score), rel=1e-5)
        assert result.predicted_class_idx is None
        assert result.logits.shape == (1, 0)
        assert result.probabilities is None
        assert result.title == "Segmenter: left cat, all"
        assert result.value_of("left cat") == f"score {float(score):.3g}"
        with pytest.raises(ValueError, match="for other outputs pass `targets`"):
            explain(model, x, target_layer="features")

    def test_detection(self, batch: Tensor) -> None:
        torch.manual_seed(0)
        model = Detector()
        targets = [BoxScores([1], [[0, 0, 6, 6]]), BoxScores([2], [[4, 4, 12, 12]]), BoxScores([1], [[0, 0, 5, 6]])]
        results = explain(model, batch, target_layer="features", targets=targets, method=["GradCAM", "HiResCAM"])
        for sample, target, result in zip(batch, targets, results, strict=True):
            single = explain(
                model, sample[None], target_layer="features", targets=target, method=["GradCAM", "HiResCAM"]
            )
            assert list(single.cams) == ["BoxScores"]
            assert same_maps(result, single)
            assert result.scores["BoxScores"] == pytest.approx(single.scores["BoxScores"], rel=1e-5)
            assert result.cams["BoxScores"][0].max() == pytest.approx(1)
        assert results[0].scores["BoxScores"] > 1.3  # an overlap of 1, and the detection's score

    def test_an_embedding_is_no_prediction(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, target_layer="block2", targets=Similarity(torch.ones(3)))
        assert result.predicted_class_idx is None
        assert list(result.cams) == ["Similarity"]

    def test_a_classifier_with_named_classes_still_predicts(self, model: nn.Module, x: Tensor) -> None:
        targets = [ClassLogit(1), ClassLogit(1), ClassProbability(2)]
        result = explain(model, x, target_layer="block2", targets=targets, class_names=["a", "b", "c"])
        plain = explain(model, x, target_layer="block2", class_idx=1, class_names=["a", "b", "c"])
        assert list(result.cams) == ["ClassLogit(1) 1", "ClassLogit(1) 2", "ClassProbability(2)"]
        assert result.predicted_class_idx == plain.predicted_class_idx
        assert torch.equal(result.logits, plain.logits)
        assert torch.allclose(result.cams["ClassLogit(1) 2"][0], plain.cams[1][0], atol=1e-6)
        assert result.scores["ClassProbability(2)"] == pytest.approx(float(plain.probabilities[0, 2]), rel=1e-5)

    def test_as_many_for_each_input(self, model: nn.Module, batch: Tensor) -> None:
        nested = [[ClassLogit(0), ClassLogit(1)], [ClassLogit(2)], {"mine": lambda output: output[0]}]
        results = explain(model, batch, target_layer="block2", targets=nested)
        assert [list(result.cams) for result in results] == [
            ["ClassLogit(0)", "ClassLogit(1)"],
            ["ClassLogit(2)"],
            ["mine"],
        ]
        expected = explain(model, batch, target_layer="block2", class_idx=[[0, 1], [2], [0]])
        for result, other in zip(results, expected, strict=True):
            for (cam,), (same,) in zip(result.cams.values(), other.cams.values(), strict=True):
                assert torch.allclose(cam, same, atol=1e-5)
        with pytest.raises(ValueError, match=r"`targets` must be one for all inputs, .* 3 inputs, got 2"):
            explain(model, batch, target_layer="block2", targets=[RawScore(), RawScore()])


class TestObject:
    def test_made_by_hand_of_the_old_fields(self) -> None:
        maps = (torch.tensor([[0.0, 1.0], [0.5, 0.25]]), torch.tensor([[0.75]]))
        result = PredictionExplanation(
            torch.tensor([[1.0, 2.0]]), 1, None, {1: maps}, "GradCAM", ("a", "b"), "m.Net", (1, 3, 2, 2), {}
        )
        assert result.methods == ("GradCAM",)
        assert torch.equal(result.results["GradCAM"].fused[1], torch.tensor([[0.75, 1.0], [0.75, 0.75]]))
        assert result.overlay().size == (512, 512)
        assert result.value_of(1) == "score 2"

    def test_repr_is_short_and_says_what_is_in_it(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, target_layer="block2", class_names=["a", "b", "c"], method=["GradCAM", "EigenCAM"])
        name = "abc"[result.predicted_class_idx]
        assert repr(result).startswith(f"<PredictionExplanation: Net predicts {name} ({result.predicted_class_idx}), ")
        assert repr(result).endswith("maps of 1 by GradCAM of block2, EigenCAM of block2>")
        assert len(repr(explain(model, x, target_layer="block2"))) < 200

    def test_title_tells_the_expected_class(self, model: nn.Module, x: Tensor) -> None:
        best, *_, worst = explain(model, x, target_layer="block2").logits[0].argsort(descending=True).tolist()
        assert "; expected was class" in explain(model, x, target_layer="block2", expected_class_idx=worst).title
        assert "expected" not in explain(model, x, target_layer="block2", expected_class_idx=best).title

    def test_a_class_that_is_named_by_its_number(self, model: nn.Module, x: Tensor) -> None:
        result = explain(model, x, target_layer="block2", class_names=["0", "1", "two"], class_idx=[1, 2])
        assert [result.name_of(key) for key in result.cams] == ["1", "two (2)"]


class TestSaveSeveral:
    def test_further_methods_have_folders_of_their_own(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        result = explain(model, x, method=["GradCAM", "LayerCAM"], target_layer=LAYERS, class_idx=[0, 2], relu=False)
        folder = result.save(tmp_path / "bundle")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert list(manifest["methods"]) == ["GradCAM", "LayerCAM"]
        assert manifest["classes"] == manifest["methods"]["GradCAM"]["classes"]
        files = {"manifest.json", "image.png"}
        for name, entry in manifest["methods"].items():
            assert entry["signed"] is True
            assert list(entry["classes"]) == ["0", "2"]
            for index, one in entry["classes"].items():
                for artifact, cam in zip(one["artifacts"], result.maps[name][int(index)], strict=True):
                    assert np.array_equal(np.load(folder / artifact["map"]), cam.numpy())
                    grey = np.array(Image.open(folder / artifact["heatmap"]))
                    assert np.abs(grey - 255 * (cam.numpy() + 1) / 2).max() <= 0.51
                    below = result.image.resize((516, 516), Image.Resampling.NEAREST)
                    drawn = faded(below, cam, "coolwarm", signed=True)
                    assert looks_like(Image.open(folder / artifact["overlay"]), drawn)
                    files |= {artifact[kind] for kind in ("map", "heatmap", "overlay")}
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == files
        assert {path.parent.name for path in folder.rglob("*.npy")} == {"bundle", "method-1"}

    def test_targets_and_images_by_default(self, x: Tensor, tmp_path: Path) -> None:
        result = explain(Segmenter(), x, target_layer="features", targets={"a/b": Segmentation(0)})
        manifest = json.loads((result.save(tmp_path / "b") / "manifest.json").read_text())
        assert manifest["prediction"] is None
        assert manifest["classes"]["a/b"]["target"] == "a/b"
        assert manifest["classes"]["a/b"]["score"] == pytest.approx(result.scores["a/b"])
        assert (tmp_path / "b" / "target-0-layer-0.npy").is_file()
        assert np.array_equal(np.array(Image.open(tmp_path / "b" / "image.png")), np.array(result.image))

    def test_batch(self, model: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        results = explain(model, batch, target_layer="block2")
        folder = results.save(tmp_path / "all")
        assert sorted(path.name for path in folder.iterdir()) == ["input-0", "input-1", "input-2"]
        for number, result in enumerate(results):
            manifest = json.loads((folder / f"input-{number}" / "manifest.json").read_text())
            assert manifest["logits"] == pytest.approx(result.logits[0].tolist())
        with pytest.raises(FileExistsError, match="not an empty directory"):
            results.save(folder)
        with pytest.raises(ValueError, match="`images` must hold one image for each of the 3 inputs, got 1"):
            results.save(tmp_path / "other", [results[0].image])

    def test_several_maps_of_one_layer(self, x: Tensor, tmp_path: Path) -> None:
        class Pyramid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.levels = Levels()

            def forward(self, x: Tensor) -> Tensor:
                return sum(level.mean((2, 3)) for level in self.levels(x).values())

        class Levels(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                fine = self.conv(x)
                return {"0": fine, "1": nn.functional.avg_pool2d(fine, 2)}

        result = explain(Pyramid(), x, target_layer="levels", class_idx=0)
        assert [tuple(cam.shape) for cam in result.cams[0]] == [(12, 12), (6, 6)]
        manifest = json.loads((result.save(tmp_path / "b") / "manifest.json").read_text())
        assert [one["target_layers"] for one in manifest["classes"]["0"]["artifacts"]] == [["levels"], ["levels"]]


def test_a_result_holds_nothing_of_the_model(x: Tensor) -> None:
    model = make_model("GradCAM", CPU)
    gone: Callable[[], Any] = weakref.ref(model)
    options = {"ScoreCAM": {"reshape_transform": lambda tensor: tensor}}
    result = explain(model, x, method=[ScoreCAM, GradCAM], target_layer=model.block2, method_kwargs=options)
    del model
    gc.collect()
    assert gone() is None
    assert isinstance(result.results["ScoreCAM"], MethodMaps)
    assert "0x" not in str(result.method_kwargs)


class TestTrust:
    def test_is_the_report_of_the_same_maps(self, model: nn.Module, batch: Tensor) -> None:
        found = explain(model, batch, target_layer="block2", class_names=["a", "b", "c"])[1]
        report = found.trust()
        by_hand = trust(
            model,
            batch[1:2],
            found.predicted_class_idx,
            methods=["GradCAM", "LayerCAM", "ReciproCAM"],
            target_layer="block2",
            class_names=["a", "b", "c"],
        )
        assert report.to_dict() == by_hand.to_dict()
        assert torch.equal(report[0].cam, by_hand[0].cam)
        assert torch.allclose(report[0].cam, found.cams[found.predicted_class_idx][0], atol=1e-6)

    def test_several_methods_with_their_options(self, model: nn.Module, x: Tensor) -> None:
        options = {"ScoreCAM": {"batch_size": 2}, "LayerCAM": {"relu": False}}
        layers = {"ScoreCAM": "block1", "LayerCAM": LAYERS}
        found = explain(model, x, method=["ScoreCAM", "LayerCAM"], target_layer=layers, method_kwargs=options)
        report = found.trust(class_idx=2)
        calls = {"LayerCAM": {"relu": False}}
        made = {"ScoreCAM": {"batch_size": 2}}
        by_hand = trust(
            model,
            x,
            2,
            methods=["ScoreCAM", "LayerCAM"],
            target_layer=layers,
            method_kwargs=made,
            call_kwargs=calls,
        )
        assert report.to_dict() == by_hand.to_dict()
        assert report[0].class_idx == 2

    def test_evidence_against_a_class_is_refused(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(ValueError, match="`relu` of GradCAM is 'negative'"):
            explain(model, x, relu="negative").trust()
        signed = explain(model, x, relu=False, target_layer="block2")
        report = signed.trust()
        assert torch.allclose(report[0].cam, next(iter(signed.cams.values()))[0], atol=1e-6)

    def test_targets(self, model: nn.Module, x: Tensor) -> None:
        targets = {"one": ClassLogit(1), "two": ClassLogit(2)}
        found = explain(model, x, targets=targets, target_layer="block2")
        for name, report in (("one", found.trust()), ("two", found.trust("two"))):
            assert report[0].title.startswith(f"ClassLogit(class_idx={targets[name].class_idx}), score ")
            assert torch.allclose(report[0].cam, found.cams[name][0], atol=1e-6)
            by_hand = trust(model, x, targets=targets[name], target_layer="block2")
            assert report[0].to_dict() == by_hand[0].to_dict()
        assert found.trust(2)[0].class_idx == 2
        with pytest.raises(ValueError, match="`class_idx` names 'three', but explained were one, two"):
            found.trust("three")

    def test_without_the_model(self, x: Tensor) -> None:
        found = explain(make_model("GradCAM", CPU), x, target_layer="block2")
        gc.collect()
        with pytest.raises(RuntimeError, match="the model that was explained is gone"):
            found.trust()
        with pytest.raises(RuntimeError, match="knows no model"):
            replace(found, _try_out=None).trust()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
    def test_copies_and_pickles(self, copied: Callable[[Any], Any], model: nn.Module, batch: Tensor) -> None:
        found = explain(model, batch, method=["GradCAM", "LayerCAM"], target_layer="block2")
        again = copied(found)
        assert again.to_html() == found.to_html()
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one.logits, other.logits)
            assert [*one.results] == [*other.results]
        if copied is not copy.deepcopy:
            with pytest.raises(RuntimeError, match="comes from a pickle"):
                again[0].trust()

    def test_holds_one_input_alone(self, model: nn.Module, batch: Tensor) -> None:
        found = explain(model, batch, target_layer="block2")[1]
        kept = found._try_out.image
        assert torch.equal(kept, batch[1:2])
        assert kept.untyped_storage().nbytes() == batch[1].nbytes


class TestReplica:
    """An explanation runs on a copy of the modules, not on the model that other threads may be using."""

    def test_the_model_is_never_switched(self, model: nn.Module, x: Tensor) -> None:
        model.train()
        seen: list[bool] = []
        called: list[nn.Module] = []
        layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        layer.register_forward_hook(lambda module, _args, _output: called.append(module))
        switch = type(model).train
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "train", lambda self, mode=True: seen.append(mode) or switch(self, mode))
            explain(model, x, method=["GradCAM", "ScoreCAM"], target_layer=layer)
        assert called
        assert layer not in called
        assert seen == []
        assert all(module.training for module in model.modules())

    def test_layers_and_arguments_that_are_modules_are_those_of_the_copy(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        x = torch.rand(1, 3, 8, 8)
        found = explain(net, x, method="CAM", target_layer=[net[1]], method_kwargs={"fc_layer": net[4]}, class_idx=2)
        expected = explain(net, x, method="CAM", target_layer="1", method_kwargs={"fc_layer": "4"}, class_idx=2)
        assert found.target_layers == ("1",)
        assert torch.equal(found.cams[2][0], expected.cams[2][0])
        with pytest.raises(ValueError, match="is not a module of this Sequential"):
            explain(net, x, target_layer=nn.ReLU())


class TestTrustOfMethodsWithLayersOfTheirOwn:
    @pytest.mark.parametrize("method", ["TransformerAttribution", "GuidedBackprop"])
    def test_the_others_choose_for_themselves(self, method: str) -> None:
        from torchvision.models import VisionTransformer

        torch.manual_seed(0)
        sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16, "num_classes": 4}
        vit = VisionTransformer(image_size=32, patch_size=8, **sizes).eval()
        report = explain(vit, torch.rand(1, 3, 32, 32), method=method).trust()
        assert report.method.startswith(method)
        assert report.others == ("HiResCAM", "GradCAM", "LayerCAM", "ReciproCAM")
