"""`explain`: the numbers are those of the extractor, the bundle says what was done, the model keeps no trace."""

from __future__ import annotations

import copy
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchcam
from tests.methods_under_test import LAYERS, make_input, make_model
from tests.oracles import faded, looks_like
from torchcam import methods
from torchcam.explain import explain, explain_classes, written_whole
from torchcam.methods import FinerCAM, GradCAM, LayerCAM, LeGrad, RefineCAM, ScoreCAM
from torchcam.targets import RawScore

# The arguments that each method needs on the nets of `methods_under_test`.
ARGUMENTS: dict[str, dict[str, Any]] = {
    name: {"target_layer": LAYERS, "method_kwargs": {}}
    for name in methods.__all__
    if isinstance(getattr(methods, name), type)
}
ARGUMENTS["CAM"] = {"target_layer": "block2", "method_kwargs": {"fc_layer": "fc"}}
ARGUMENTS["SESS"]["method_kwargs"] = {"window_size": 12, "scales": 2}
ARGUMENTS.pop("DeepFeatureFactorization", None)  # does not explain a class
for takes_none in {"FullGrad", "GuidedBackprop"} & set(ARGUMENTS):
    ARGUMENTS[takes_none]["target_layer"] = None
CPU = torch.device("cpu")


@pytest.fixture
def x() -> Tensor:
    return make_input(CPU, batch_size=1)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def by_hand(name: str, model: nn.Module, x: Tensor, class_idx: int, **arguments: Any) -> list[Tensor]:
    with getattr(methods, name)(model, arguments["target_layer"], **arguments["method_kwargs"]) as extractor:
        return extractor(class_idx, model(x))


def other_class(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return int(model(x).argmin())


class Counter:
    """Count the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.handle = model.register_forward_pre_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1


class TestResult:
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_every_method_gives_the_extractors_own_maps(self, name: str, x: Tensor) -> None:
        model = make_model(name, CPU)
        expected = other_class(model, x)
        result = explain(model, x, expected_class_idx=expected, method=getattr(methods, name), **ARGUMENTS[name])

        with torch.no_grad():
            logits = model(x)
        assert torch.allclose(result.logits, logits, atol=1e-6)
        assert result.predicted_class_idx == int(logits.argmax())
        assert list(result.cams) == [result.predicted_class_idx, expected]
        for index, cams in result.cams.items():
            maps = by_hand(name, model, x, index, **ARGUMENTS[name])
            assert len(cams) == len(maps)
            assert all(
                torch.allclose(cam, expected_map[0], atol=1e-5) for cam, expected_map in zip(cams, maps, strict=True)
            )
        # On so few channels FEM finds nothing that stands out.
        assert name == "FEM" or any(cam.max() > 0 for cams in result.cams.values() for cam in cams)
        assert result.method == name

    def test_fields(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        result = explain(model, x, class_names=["a", "b", "c"], target_layer=["block2", model.block1])
        assert result.target_layers == ("block2", "block1")
        assert [tuple(cam.shape) for cam in result.cams[result.predicted_class_idx]] == [(6, 6), (12, 12)]
        assert result.model == "tests.methods_under_test.Net"
        assert result.input_shape == (1, 3, 12, 12)
        assert result.class_names == ("a", "b", "c")
        assert result.expected_class_idx is None
        assert result.versions == {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchcam": torchcam.__version__,
        }
        with pytest.raises(AttributeError):
            result.method = "CAM"  # type: ignore[misc]

    def test_expected_class_that_is_the_predicted_one_is_explained_once(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        predicted = explain(model, x, target_layer="block2").predicted_class_idx
        result = explain(model, x, target_layer="block2", expected_class_idx=torch.tensor(predicted))
        assert result.expected_class_idx == predicted
        assert list(result.cams) == [predicted]

    def test_default_layer_is_searched_at_the_shape_of_the_input(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        result = explain(model, torch.rand(1, 1, 9, 8))
        assert result.target_layers == ("0",)
        assert result.cams[result.predicted_class_idx][0].shape == (7, 6)

    @pytest.mark.parametrize("shape", [(1, 2, 20), (1, 2, 8, 8, 8)], ids=["1d", "3d"])
    def test_inputs_of_other_dimensions(self, shape: tuple[int, ...]) -> None:
        convolution = {3: nn.Conv1d, 5: nn.Conv3d}[len(shape)]
        pool = {3: nn.AdaptiveAvgPool1d, 5: nn.AdaptiveAvgPool3d}[len(shape)]
        model = nn.Sequential(convolution(2, 2, 3), pool(1), nn.Flatten(), nn.Linear(2, 3))
        result = explain(model, torch.rand(shape), target_layer="0")
        assert result.cams[result.predicted_class_idx][0].shape == tuple(side - 2 for side in shape[2:])

    def test_output_that_is_a_mapping(self, x: Tensor) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_model("GradCAM", CPU)

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"logits": self.net(x)}

        model = Wrapped()
        plain, wrapped = explain(model.net, x, target_layer="block2"), explain(model, x, target_layer="net.block2")
        index = plain.predicted_class_idx
        assert torch.equal(plain.logits, wrapped.logits)
        assert torch.equal(plain.cams[index][0], wrapped.cams[index][0])

    def test_half_precision_scores(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU).bfloat16()
        result = explain(model, x.bfloat16(), target_layer="block2")
        assert result.logits.dtype == torch.float32
        assert result.cams[result.predicted_class_idx][0].dtype == torch.float32

    def test_several_classes_at_once(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        logits, cams, extractor = explain_classes(
            model, x, lambda logits: [2, 0, 2, int(logits.argmax())], target_layer=LAYERS, method=LayerCAM
        )
        assert list(cams)[:2] == [2, 0]
        assert logits.shape == (1, 3)
        assert extractor.fuse_cams(cams[2]).shape == (1, 12, 12)


class TestModel:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "SmoothGradCAMpp", "LeGrad", "FinerCAM"])
    def test_is_left_as_it_was(self, name: str, mode: Any, x: Tensor) -> None:
        model = make_model(name, CPU).train()
        model.block1.eval()
        calm = explain(copy.deepcopy(model).eval(), x, method=getattr(methods, name), **ARGUMENTS[name])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        random_state = torch.get_rng_state()
        with mode():
            result = explain(model, x, method=getattr(methods, name), **ARGUMENTS[name])

        assert torch.equal(result.logits, calm.logits)
        index = result.predicted_class_idx
        assert all(torch.equal(a, b) for a, b in zip(result.cams[index], calm.cams[index], strict=True))
        assert not any(cam.is_inference() for cam in result.cams[index])
        assert not result.logits.is_inference()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_is_left_as_it_was_after_an_error(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU).train()
        with pytest.raises(ValueError, match="expected_class_idx"):
            explain(model, x, expected_class_idx=3, target_layer="block2")
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize(
        "name", ["CAM", "GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "FinerCAM", "RefineCAM", "LeGrad"]
    )
    def test_both_classes_cost_one_forward_pass(self, name: str, x: Tensor) -> None:
        model = make_model(name, CPU)
        expected = other_class(model, x)
        counter = Counter(model)
        result = explain(model, x, expected_class_idx=expected, method=getattr(methods, name), **ARGUMENTS[name])
        assert len(result.cams) == 2
        assert counter.count == 1

    def test_nothing_below_the_target_layer_is_differentiated(self, x: Tensor) -> None:
        graphs = []
        model = make_model("GradCAM", CPU)
        model.bn.register_forward_hook(lambda _m, _a, output: graphs.append(output.requires_grad))
        model.fc.register_forward_hook(lambda _m, _a, output: graphs.append(output.requires_grad))
        explain(model, x, target_layer="block2")
        assert graphs == [False, True]

    def test_another_extractor_on_the_model_records_nothing(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        with GradCAM(model, "block2") as extractor:
            scores = model(x)
            explain(model, torch.zeros_like(x), target_layer="block1")
            (cam,) = extractor(0, scores)
        assert torch.equal(cam, by_hand("GradCAM", model, x, 0, target_layer="block2", method_kwargs={})[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"input_tensor": torch.rand(0, 3, 12, 12)}, ValueError, r"one sample.*\(0, 3, 12, 12\)"),
            ({"input_tensor": torch.rand(3, 12, 12)}, ValueError, r"one sample.*\(3, 12, 12\).*unsqueeze\(0\)"),
            ({"input_tensor": torch.rand(12)}, ValueError, r"one sample.*\(12,\)"),
            ({"input_tensor": [[0.0]]}, TypeError, "`input_tensor` must be a tensor, a path, .* got list"),
            ({"model": len}, TypeError, "`model` must be a torch.nn.Module"),
            ({"expected_class_idx": 3}, ValueError, "between 0 and 2 for the 3 classes of the model, got 3"),
            ({"expected_class_idx": -1}, ValueError, "`expected_class_idx` must lie .* got -1"),
            ({"expected_class_idx": True}, TypeError, "`expected_class_idx` must be an integer, got True"),
            ({"expected_class_idx": 1.0}, TypeError, "`expected_class_idx` .* got 1.0 of type float"),
            ({"class_names": ["a", "b"]}, ValueError, "`class_names` has 2 names, but .* 3 classes"),
            ({"class_names": "abc"}, TypeError, "`class_names` must be a sequence of strings"),
            ({"class_names": [0, 1, 2]}, TypeError, "`class_names` must be a sequence of strings"),
            (
                {"method": "GradCAMM"},
                ValueError,
                "`method` 'GradCAMM' is not a method of torchcam; did you mean 'GradCAM'",
            ),
            ({"method": nn.Linear}, TypeError, "`method` must be a CAM class"),
            ({"method": []}, ValueError, "`method` names no method"),
            ({"method": [GradCAM, "grad-cam"]}, ValueError, "`method` names GradCAM more than once: tell them apart"),
            (
                {"method": ["GradCAM", "LayerCAM"], "target_layer": {"CAM": "block1"}},
                ValueError,
                "`target_layer` of several methods must be a mapping from 'GradCAM', 'LayerCAM', got 'CAM'",
            ),
            (
                {"method": ["GradCAM", "LayerCAM"], "method_kwargs": {"reshape_transform": None}},
                ValueError,
                "`method_kwargs` of several methods must be a mapping from .* got 'reshape_transform'",
            ),
            (
                {"method": ["GradCAM", "LayerCAM"], "method_kwargs": {"LayerCAM": 3}},
                TypeError,
                "`method_kwargs` of LayerCAM must be a mapping, got int",
            ),
            ({"method_kwargs": 3}, TypeError, "`method_kwargs` must be a mapping, got int"),
            ({"class_idx": 3}, ValueError, "`class_idx` must lie between 0 and 2 .* got 3"),
            ({"class_idx": [0, -1]}, ValueError, "`class_idx` must lie .* got -1"),
            ({"class_idx": []}, ValueError, "`class_idx` names no class"),
            ({"class_idx": [[0], [1]]}, ValueError, "`class_idx` must be one for all inputs, .* got 2"),
            ({"class_idx": "0"}, ValueError, "`class_idx` is '0', but the names of the classes are not known"),
            (
                {"expected_class_idx": [0, 1]},
                ValueError,
                "`expected_class_idx` must be one for all .* 1 inputs, got 2",
            ),
            ({"targets": 3}, TypeError, "`targets` must be callable, got 3"),
            ({"targets": []}, ValueError, "`targets` names no target"),
            ({"targets": {"a": 3}}, TypeError, "`targets` must be callable, got 3"),
            ({"targets": RawScore(), "class_idx": 0}, ValueError, "`targets` or `class_idx`, not both"),
            ({"targets": RawScore(), "top_k": 1}, ValueError, "`targets` or `top_k`, not both"),
            ({"relu": 3}, ValueError, "`relu` must be None, True, False or 'negative', got 3"),
            ({"batch_size": 0}, ValueError, "`batch_size`"),
            ({"transform": 3}, TypeError, "`transform` must be callable or None, got 3"),
            ({"weights": 3}, TypeError, "`weights` must be weights of torchvision such as .* got 3"),
            ({"to_probabilities": lambda logits: logits[0]}, ValueError, r"keep the shape \(1, 3\) of the scores, got"),
            ({"method_kwargs": {"target_layer": "block1"}}, ValueError, "pass `target_layer` itself"),
            ({"target_layer": "block3"}, ValueError, "'block3' is not a module of Net; did you mean "),
            ({"method": LeGrad, "target_layer": None}, TypeError, "`target_layer` must name the transformer block"),
            ({"method": RefineCAM, "target_layer": None}, TypeError, "`target_layer` must be a list of two layers"),
        ],
    )
    def test_argument(self, changes: dict[str, Any], error: type[Exception], message: str, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        arguments = {"model": model, "input_tensor": x, "target_layer": "block2", **changes}
        with pytest.raises(error, match=message):
            explain(**arguments)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_scores_that_are_not_finite(self, bad: float, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        with torch.no_grad():
            model.fc.bias[1] = bad
        with pytest.raises(ValueError, match="scores are NaN or infinite"):
            explain(model, x, target_layer="block2")

    def test_scores_with_positions(self, x: Tensor) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1))
        with pytest.raises(ValueError, match=r"\(1, classes\), got \(1, 3, 12, 12\)"):
            explain(model, x, target_layer="0")


class TestSave:
    @pytest.mark.parametrize("name", ["GradCAM", "RefineCAM", "CAM"])
    def test_bundle(self, name: str, x: Tensor, picture: Image.Image, tmp_path: Path) -> None:
        model = make_model(name, CPU)
        expected = other_class(model, x)
        result = explain(
            model,
            x,
            expected_class_idx=expected,
            class_names=["null", "eins", "zwölf"],
            method=getattr(methods, name),
            **ARGUMENTS[name],
        )
        folder = result.save(str(tmp_path / "new" / "bundle"), picture, alpha=0.25)
        assert folder == tmp_path / "new" / "bundle"
        assert np.array_equal(np.array(Image.open(folder / "image.png")), np.array(picture))

        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = {"manifest.json", "image.png"}
        probabilities = result.logits[0].double().softmax(0)
        for index, cams in result.cams.items():
            entry = manifest["classes"][str(index)]
            assert entry["class_idx"] == index
            assert entry["class_name"] == ["null", "eins", "zwölf"][index]
            assert entry["logit"] == pytest.approx(float(result.logits[0, index]))
            assert entry["probability"] == pytest.approx(float(probabilities[index]))
            assert len(entry["artifacts"]) == len(cams)
            named = [layer for artifact in entry["artifacts"] for layer in artifact["target_layers"]]
            assert named == list(result.target_layers)
            for artifact, cam in zip(entry["artifacts"], cams, strict=True):
                assert np.array_equal(np.load(folder / artifact["map"]), cam.numpy())
                heatmap = np.array(Image.open(folder / artifact["heatmap"]))
                assert np.abs(heatmap - 255 * cam.numpy()).max() <= 0.5
                drawn = faded(picture.resize((528, 528), Image.Resampling.NEAREST), cam, alpha=0.25)
                assert looks_like(Image.open(folder / artifact["overlay"]), drawn)
                files |= {artifact["map"], artifact["heatmap"], artifact["overlay"]}
        assert {path.name for path in folder.iterdir()} == files
        assert len(files) == 2 + 3 * sum(map(len, result.cams.values()))
        assert manifest["prediction"]["class_idx"] == result.predicted_class_idx
        assert manifest["expected"]["class_idx"] == expected
        assert manifest["logits"] == pytest.approx(result.logits[0].tolist())
        assert manifest["method"] == name
        assert manifest["target_layers"] == list(result.target_layers)
        assert manifest["model"] == result.model
        assert manifest["input_shape"] == [1, 3, 12, 12]
        assert manifest["versions"] == dict(result.versions)
        assert manifest["image_size"] == [24, 24]
        assert manifest["alpha"] == 0.25
        assert manifest["method_kwargs"] == ARGUMENTS[name]["method_kwargs"]

    def test_options_of_the_method_are_written_as_plain_values(
        self, x: Tensor, picture: Image.Image, tmp_path: Path
    ) -> None:
        options = {"base_method": LayerCAM, "gamma": float("inf"), "reshape_transform": None}
        model = make_model("GradCAM", CPU)
        with pytest.raises(ValueError, match="gamma"):
            explain(model, x, method=FinerCAM, target_layer="block2", method_kwargs=options)
        options |= {"gamma": 0.5, "input_shape": (3, 12, 12)}
        result = explain(model, x, method=FinerCAM, target_layer="block2", method_kwargs=options)
        manifest = json.loads((result.save(tmp_path / "a", picture) / "manifest.json").read_text())
        assert manifest["method_kwargs"] == {
            "base_method": "LayerCAM",
            "gamma": 0.5,
            "reshape_transform": None,
            "input_shape": [3, 12, 12],
        }
        assert manifest["expected"] is None
        assert manifest["prediction"]["class_name"] is None

    @pytest.mark.filterwarnings("ignore:the activation or gradient of layer:RuntimeWarning")
    def test_map_of_nan_and_masked_class(self, picture: Image.Image, x: Tensor, tmp_path: Path) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)
                self.side = nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                self.side(x * torch.nan)
                scores = x.mean((2, 3))
                return scores.masked_fill(torch.tensor([[True, False, False]]), -torch.inf)

        result = explain(Masked(), x, method=ScoreCAM, target_layer="side")
        (cam,) = result.cams[result.predicted_class_idx]
        assert cam.isnan().all()
        folder = result.save(tmp_path / "bundle", picture)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["logits"][0] is None
        (artifact,) = manifest["classes"][str(result.predicted_class_idx)]["artifacts"]
        whole = picture.resize((528, 528), Image.Resampling.NEAREST)
        assert np.array_equal(np.array(Image.open(folder / artifact["overlay"])), np.array(whole))

    def test_floating_point_image(self, x: Tensor, tmp_path: Path) -> None:
        image = Image.fromarray(np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24))
        folder = explain(make_model("GradCAM", CPU), x, target_layer="block2").save(tmp_path / "b", image)
        assert np.array_equal(np.array(Image.open(folder / "image.tiff")), np.array(image))

    def test_directory_that_is_taken(self, x: Tensor, picture: Image.Image, tmp_path: Path) -> None:
        result = explain(make_model("GradCAM", CPU), x, target_layer="block2")
        empty = tmp_path / "empty"
        empty.mkdir()
        result.save(empty, picture)
        kept = (empty / "manifest.json").read_bytes()
        (tmp_path / "file").touch()
        for taken in (empty, tmp_path / "file"):
            with pytest.raises(
                FileExistsError, match=f"`directory` '{taken}' exists .* name another one, or remove it"
            ):
                result.save(taken, picture)
        assert (empty / "manifest.json").read_bytes() == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]

    @pytest.mark.parametrize(
        ("image", "alpha", "error"),
        [
            (Image.new("RGBA", (4, 4)), 0.5, ValueError),
            (Image.new("RGB", (4, 4)), 1.0, ValueError),
            (np.zeros((4, 4, 3)), 0.5, TypeError),
        ],
    )
    def test_nothing_is_left_of_a_save_that_fails(
        self, image: Any, alpha: float, error: type[Exception], x: Tensor, tmp_path: Path
    ) -> None:
        result = explain(make_model("GradCAM", CPU), x, target_layer="block2")
        with pytest.raises(error):
            result.save(tmp_path / "new" / "bundle", image, alpha)
        assert list(tmp_path.iterdir()) == []

    def test_maps_that_are_not_pictures(self, picture: Image.Image, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        result = explain(model, torch.rand(1, 2, 9), target_layer="0")
        with pytest.raises(ValueError, match=r"only maps \(height, width\) can be drawn .* \[\(7,\)\]"):
            result.save(tmp_path / "bundle", picture)
        assert list(tmp_path.iterdir()) == []


class TestWrittenWhole:
    def test_an_error_in_the_block_comes_through(self, tmp_path: Path) -> None:
        def interrupted() -> None:
            with written_whole(tmp_path / "a" / "b" / "file.txt") as part:
                part.write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []

    def test_what_is_there_survives_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        path.write_text("old")

        def broken() -> None:
            with written_whole(path) as part:
                part.write_text("half")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken()
        assert path.read_text() == "old"
        with written_whole(path) as part:
            part.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    def test_two_at_once_do_not_share_a_neighbour(self, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        with written_whole(path) as outer:
            outer.write_text("outer")
            with written_whole(path) as inner:
                assert inner != outer
                inner.write_text("inner")
            assert path.read_text() == "inner"
        assert path.read_text() == "outer"
        assert list(tmp_path.iterdir()) == [path]

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"), written_whole(tmp_path / "file" / "bundle"):
            pass


class TestTopK:
    def test_the_classes_with_the_highest_scores(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        counter = Counter(model)
        result = explain(model, x, target_layer="block2", top_k=2)
        best = result.logits[0].argsort(descending=True).tolist()[:2]
        assert list(result.cams) == best
        assert result.predicted_class_idx == best[0]
        assert counter.count == 1
        for class_idx, (cam,) in result.cams.items():
            (expected,) = by_hand("GradCAM", model, x, class_idx, target_layer="block2", method_kwargs={})
            torch.testing.assert_close(cam, expected[0])

    def test_an_expected_class_comes_last(self, x: Tensor) -> None:
        model = make_model("GradCAM", CPU)
        worst = other_class(model, x)
        result = explain(model, x, target_layer="block2", top_k=2, expected_class_idx=worst)
        assert list(result.cams)[-1] == worst
        assert len(result.cams) == 3

    @pytest.mark.parametrize(
        ("top_k", "error"), [(0, ValueError), (4, ValueError), (True, TypeError), (1.0, TypeError)]
    )
    def test_wrong_numbers(self, top_k: Any, error: type[Exception], x: Tensor) -> None:
        with pytest.raises(error, match="`top_k`"):
            explain(make_model("GradCAM", CPU), x, target_layer="block2", top_k=top_k)
