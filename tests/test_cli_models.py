"""Models of timm and transformers on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from torchcam import cli
from torchcam.cli._models import Classifier, load_classifier, load_hf, load_own, load_timm


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


def matches_its_code(classifier: Classifier) -> None:
    """Check that the code of a model makes the model, its transform and the names of its classes."""
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(classifier.code, made)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    seen = classifier.preprocess(picture)
    assert torch.equal(made["transform"](picture), seen)
    assert not made["model"].training
    with torch.inference_mode():
        assert torch.equal(made["model"](seen[None]), classifier.model(seen[None]))
    names = made.get("class_names")
    assert classifier.categories == (None if names is None else list(names))


class TestCode:
    def test_torchvision(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        path = tmp_path / "weights.pt"
        torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), path)
        matches_its_code(load_classifier("shufflenet_v2_x0_5", "none"))
        matches_its_code(load_classifier("shufflenet_v2_x0_5", str(path)))

    def test_timm(self, tmp_path: Path) -> None:
        timm = pytest.importorskip("timm")
        path = tmp_path / "weights.pt"
        torch.save(timm.create_model("test_resnet").state_dict(), path)
        matches_its_code(load_timm("test_resnet", "none"))
        matches_its_code(load_timm("test_resnet", str(path)))

    @pytest.mark.parametrize("result", ["net", "net,", "net, ToTensor()", "net, None, list('abc')"])
    def test_own(self, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        text = "import torch\nfrom torch import nn\nfrom torchvision.transforms import ToTensor\n\n\nclass Made:\n"
        text += "    @staticmethod\n    def load():\n        torch.manual_seed(0)\n"
        text += "        net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        (tmp_path / "mine.py").write_text(f"{text}        return {result}\n")
        with torch.random.fork_rng():
            matches_its_code(load_own("mine:Made.load"))


class TestTimm:
    def test_layers(self, capsys: pytest.CaptureFixture[str]) -> None:
        timm = pytest.importorskip("timm")
        assert cli.main(["layers", "--timm", "test_resnet", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["model"] == "test_resnet"
        assert told["size"] == [160, 160]
        assert told["default"] in dict(timm.create_model("test_resnet").named_modules())

    def test_refusals(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        pytest.importorskip("timm")
        assert "--timm 'resnet5o' is not a model of timm; did you mean 'resnet50" in fails(
            capsys, "layers", "--timm", "resnet5o"
        )
        told = fails(capsys, "layers", "--timm", "test_resnet", "--arch", "resnet18")
        assert "give --arch or --timm, not both: each names a model" in told
        asked = ["export", "--timm", "test_resnet", "--output", str(tmp_path / "m.onnx"), "--weights", "nowhere.pt"]
        assert "--weights 'nowhere.pt' is not a file, nor DEFAULT, nor none" in fails(capsys, *asked)


class TestTransformers:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        transformers = pytest.importorskip("transformers")
        labels = {0: "cat", 1: "dog", 2: "fish"}
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
        )
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
        return str(tmp_path / "vit")

    @pytest.mark.parametrize("weights", ["DEFAULT", "none"])
    def test_code(self, folder: str, weights: str) -> None:
        made: dict[str, Any] = {}
        classifier = load_hf(folder, weights)
        with torch.random.fork_rng():
            exec(classifier.code, made)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
        seen = classifier.read([picture]).tensor
        with torch.inference_mode():
            scores = made["model"](**made["transform"](picture, return_tensors="pt")).logits
            assert torch.equal(scores, classifier.model(seen).logits)
        assert made["class_names"] == classifier.categories == ["cat", "dog", "fish"]

    def test_evaluate(self, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
        for name, picture in zip(("cat", "fish"), pixels, strict=True):
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / "data" / name / "a.png")
        capsys.readouterr()
        asked = ["--methods", "GradCAM", "--metrics", "ADCC", "--checkpoint", str(tmp_path / "state"), "--json"]
        assert cli.main(["evaluate", str(tmp_path / "data"), "--hf", folder, *asked]) == 0
        told = json.loads(capsys.readouterr().out)
        classifier = load_hf(folder, "DEFAULT")
        with torch.inference_mode():
            predicted = classifier.model(classifier.read([*map(Image.fromarray, pixels)]).tensor).logits.argmax(1)
        assert told["agreement"] == (predicted == torch.tensor([0, 2])).double().mean()
        assert told["methods"]["GradCAM"]["measured"] == {"ADCC": 2}

    def test_export(self, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        file = tmp_path / "m.onnx"
        capsys.readouterr()
        assert cli.main(["export", "--hf", folder, "--output", str(file), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["metadata"]["class_names"] == ["cat", "dog", "fish"]
        assert told["random_weights"] is False
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
        scores, cam = session.run(None, {"images": images, "classes": np.array([0, 1, 2])})
        assert scores.shape == (3, 3)
        assert cam.shape == (3, 4, 4)

    def test_refusals(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        (tmp_path / "empty").mkdir()
        assert f"--hf '{tmp_path / 'empty'}' could not be loaded" in fails(
            capsys, "layers", "--hf", str(tmp_path / "empty")
        )


class TestBoxes:
    FACTORY = "from tests.detectors import bright_retinanet\n\n\ndef lamps():\n    return bright_retinanet()\n"

    @pytest.fixture
    def lamps(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder with a factory of a detector, and a picture with one white place."""
        from tests.detectors import bright_picture

        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "lamps", raising=False)
        (tmp_path / "lamps.py").write_text(self.FACTORY)
        bright_picture(200, 60, (136, 16, 156, 36)).save(tmp_path / "street.png")
        return tmp_path

    def test_of_a_factory(self, lamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["explain", "street.png", "--model-factory", "lamps:lamps", "--box", "0", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        (image,) = printed["images"]
        (box,) = image["classes"]
        assert printed["method"] == "HiResCAM"
        assert box["number"] == 0
        left, top, right, bottom = box["box"]
        assert left < 156
        assert right > 136
        assert top < 36
        assert bottom > 16
        assert box["class_idx"] == 1
        assert box["detection_score"] > 0.5
        assert Path(image["picture"]).is_file()
        assert "box0" in image["picture"]

    def test_all_with_a_threshold(self, lamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["explain", "street.png", "--model-factory", "lamps:lamps", "--box", "all", "--threshold", "0.9"]
        assert cli.main([*command, "--save-maps"]) == 0
        out = capsys.readouterr().out
        assert "class 1, box 0" in out
        assert "HiResCAM of backbone" in out
        assert len(list(lamps.glob("*.npy"))) == out.count("class 1, box")

    def test_of_transformers(self, lamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        from tests.detectors import detr_family

        model, processor = detr_family("Detr")
        model.save_pretrained(lamps / "checkpoint")
        processor.save_pretrained(lamps / "checkpoint")
        command = ["explain", "street.png", "--hf", "checkpoint", "--box", "0,2", "--threshold", "0"]
        assert cli.main([*command, "--json"]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert [box["number"] for box in image["classes"]] == [0, 2]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--arch", "alexnet", "--weights", "none", "--box", "0"], "--box asks about the boxes of a detector"),
            (
                ["--model-factory", "lamps:lamps", "--box", "first"],
                "--box must be the number of a box, a list of them, or 'all', got 'first'",
            ),
            (["--model-factory", "lamps:lamps", "--box", ","], "argument --box: names none, got ','"),
            (["--model-factory", "lamps:lamps", "--box", "99"], "--box must lie between 0 and "),
            (
                ["--model-factory", "lamps:lamps", "--box", "0", "--class-idx", "1"],
                "give --box or --class-idx, not both",
            ),
            (
                ["--model-factory", "lamps:lamps", "--threshold", "0.5"],
                "--threshold is the least score",
            ),
        ],
    )
    def test_bad_input(self, arguments: list[str], says: str, lamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert says in fails(capsys, "explain", "street.png", *arguments)
