"""`torchcam export`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from torchcam import cli

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FACTORY = """
from torchvision import transforms
from torchcam.demo import CLASS_NAMES, load_model

def load():
    return load_model(), transforms.Compose([transforms.Resize((32, 40)), transforms.ToTensor()]), CLASS_NAMES
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("exported_digits.py").write_text(FACTORY)
    return tmp_path


def test_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["export", "--model-factory", "exported_digits:load", "--target-layer", "layer3", "--output", "out/m.onnx"]
    assert cli.main([*asked, "--method", "layer-cam", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == "out/m.onnx"
    assert told["error"] <= 1e-5
    about = told["metadata"]
    assert about["method"] == "LayerCAM"
    assert about["target_layers"] == ["layer3"]
    assert about["class_names"][:2] == ["0", "1"]
    assert about["preprocessing"]["resize"] == [32, 40]
    session = onnxruntime.InferenceSession("out/m.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((3, 3, 32, 40), dtype=np.float32)
    _, cam = session.run(None, {"images": images, "classes": np.array([1, 2, 3])})
    assert cam.shape == (3, 4, 5)

    assert cli.main(asked) == 2
    assert "'out/m.onnx' exists: pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "m.txt"], "--output 'm.txt' must end in .onnx, .pt2, .aoti.pt2, .html"),
        (["--output", "m.html"], "a page needs --runtime"),
        (["--output", "m.onnx", "--method", "ScoreCAM"], "ScoreCAM cannot be exported"),
        (["--output", "m.onnx", "--target-layer", "layer9"], "--target-layer 'layer9' is not a module"),
        (["--output", "m.html", "--runtime", "nowhere", "--target-layer", "layer4"], "has no ort.wasm.bundle.min.mjs"),
    ],
)
def test_refusals(place: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["export", "--model-factory", "exported_digits:load", *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert sorted(entry.name for entry in place.iterdir() if entry.name != "__pycache__") == ["exported_digits.py"]
