"""Models of timm and transformers on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torchcam import cli


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


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
        assert "--weights 'nowhere.pt' is neither a file nor one of DEFAULT, none" in fails(capsys, *asked)


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
