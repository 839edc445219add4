"""What the commands print for other programs, the commands about one map, and models of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from torchcam import cli
from torchcam.cli._messages import UserError
from torchcam.cli._models import Classifier, load_own
from torchcam.demo import load_model, sample_images
from torchcam.layers import candidates

FACTORY = """
from torch import nn
from torchvision import transforms
from torchcam.demo import CLASS_NAMES, load_model

def model(): return load_model()
def preset(): return load_model(), transforms.Compose([transforms.Resize((96, 96)), transforms.ToTensor()])
def named(): return *preset(), list(CLASS_NAMES)
def odd(): return 3
def bad_transform(): return load_model(), 3
def bad_names(): return *preset(), [1, 2]
def shifted(): return load_model(), transforms.Compose([preset()[1], transforms.Normalize([0.5] * 3, [0.25] * 3)])
number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models, named after it, and a picture of two digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    sample_images()[0].image.save(tmp_path / "digits.png")
    return tmp_path


@pytest.fixture
def mine(place: Path) -> str:
    return next(place.glob("mine_*.py")).stem


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """Run a command with --json, and give what it printed."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return strict(captured.out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torchcam: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


class TestJson:
    def test_demo(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = printed(capsys, "demo")
        sample = sample_images()[0]
        assert found["digits"] == list(sample.labels)
        with torch.no_grad():
            expected = load_model()(sample.to_tensor())[0].sigmoid().tolist()
        assert found["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert len(found["maps"]) == 2 * len(cli.demo.METHODS)
        for entry in [*found["maps"], *found["flat_map"]]:
            assert entry["on_it"] + entry["on_the_other"] + entry["on_neither"] == pytest.approx(1)
        assert Path(found["picture"]).is_file()

    def test_explain(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["explain", "digits.png", "--model-factory", f"{mine}:named", "--target-layer", "layer4"]
        found = printed(capsys, *arguments, "--top-k", 2, "--class-idx", 0)
        assert (found["model"], found["method"], found["target_layers"]) == (f"{mine}:named", "GradCAM", ["layer4"])
        (image,) = found["images"]
        named = "+".join(f"class{entry['class_idx']}" for entry in image["classes"])
        assert (image["image"], image["picture"]) == ("digits.png", f"digits-{mine}.named-layer4-GradCAM-{named}.png")
        assert found["methods"] == [{"method": "GradCAM", "target_layers": ["layer4"]}]
        assert (found["left_out"], found["page"], image["maps"]) == ([], None, [])
        assert (place / image["picture"]).is_file()
        with torch.no_grad():
            logits = load_model()(sample_images()[0].to_tensor())[0]
        assert [entry["class_idx"] for entry in image["classes"]] == [*logits.topk(2).indices.tolist(), 0]
        for entry in image["classes"]:
            index = entry["class_idx"]
            assert entry["class_name"] == str(index)
            assert entry["logit"] == pytest.approx(float(logits[index]), abs=1e-4)
            assert entry["probability"] == pytest.approx(float(logits.softmax(0)[index]), abs=1e-4)

    def test_layers(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = printed(capsys, "layers", "--model-factory", f"{mine}:preset", "--all")
        expected = candidates(load_model(), torch.rand(1, 3, 96, 96))
        assert found["size"] == [96, 96]
        assert [entry["name"] for entry in found["layers"]] == [c.name for c in expected]
        assert [entry["name"] for entry in found["layers"] if entry["default"]] == [found["default"]] == ["layer4"]
        assert found["layers"][0]["grid"] == list(expected[0].grid)

    def test_diagnose(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["diagnose", "digits.png", "--model-factory", f"{mine}:named", "--target-layer", "layer4"]
        (fine,) = printed(capsys, *arguments)["diagnoses"]
        assert (fine["image"], fine["findings"]) == ("digits.png", [])
        (agnostic,) = printed(capsys, *arguments, "--method", "EigenCAM", "--class-idx", 3)["diagnoses"]
        assert "class_agnostic" in [finding["code"] for finding in agnostic["findings"]]
        assert agnostic["class_idx"] == [3]

    def test_compare(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["compare", "digits.png", "--model-factory", f"{mine}:named", "--target-layer", "layer4"]
        found = printed(capsys, *arguments, "--methods", "GradCAM,hirescam,Grad-CAM,RandomCAM", "--class-idx", 7)
        assert [entry["method"] for entry in found["methods"]] == ["GradCAM", "HiResCAM", "RandomCAM"]
        picture = f"digits-{mine}.named-layer4-GradCAM+HiResCAM+RandomCAM-class7.png"
        assert (found["class_idx"], found["class_name"], found["picture"]) == (7, "7", picture)
        grad, hires, random = (entry["correlations"] for entry in found["methods"])
        # With global pooling and a linear head the two are the same method.
        assert grad["HiResCAM"] == hires["GradCAM"] == pytest.approx(1, abs=1e-3)
        assert grad["GradCAM"] == pytest.approx(1)
        assert random["GradCAM"] < 0.99
        assert found["methods"][2]["likeness"] == pytest.approx((random["GradCAM"] + random["HiResCAM"]) / 2)
        with Image.open(place / picture) as drawn:
            assert drawn.width > 1000

    def test_trust(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        from torchcam.trust import trust

        arguments = ["trust", "digits.png", "--model-factory", f"{mine}:named", "--target-layer", "layer4"]
        found = printed(capsys, *arguments, "--methods", "GradCAM,LayerCAM", "--output", "report.html")
        image = sample_images()[0].to_tensor()
        expected = trust(load_model(), image, methods=["GradCAM", "LayerCAM"], target_layer="layer4")
        assert (found["verdict"], found["headline"]) == (expected.verdict, expected.headline)
        (item,) = found["predictions"]
        assert [check["outcome"] for check in item["checks"]] == [check.outcome for check in expected[0].checks]
        assert found["images"] == ["digits.png"]
        assert (place / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


class TestText:
    def test_compare(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        drawn = ["--methods", "GradCAM,HiResCAM", "--colormap", "viridis"]
        assert cli.main(["compare", "digits.png", "--model-factory", f"{mine}:named", *drawn]) == 0
        text = capsys.readouterr().out
        assert re.search(rf"^{mine}:named: evidence for \d, [\d.]+%$", text, re.MULTILINE)
        assert re.search(r"^  GradCAM +1\.00  layer4$", text, re.MULTILINE)
        *_, arrow, conclusion = text.splitlines()
        assert re.fullmatch(rf"digits.png -> digits-{mine}.named-layer4-GradCAM\+HiResCAM-class\d.png", arrow)
        assert conclusion == "The two maps agree to 1.00."

    def test_diagnose_in_a_process_of_its_own(self, place: Path, mine: str) -> None:
        arguments = ["diagnose", "digits.png", "--model-factory", f"{mine}:named", "--method", "EigenCAM"]
        command = [sys.executable, "-m", "torchcam", *arguments]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert "digits.png: EigenCAM" in done.stdout
        assert "class_agnostic" in done.stdout


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compare", "no.png"], "IMAGE: there is no file 'no.png'"),
            (["compare", "digits.png", "--methods", "GradCAM,LeGard"], "--methods 'LeGard' is not a method"),
            (["compare", "digits.png", "--methods", "GradCAM,LeGrad"], "transformer block(s) that LeGrad reads"),
            (["compare", "digits.png", "--methods", ","], "--methods names none"),
            (
                ["compare", "digits.png", "--class-idx", "10"],
                "must lie between 0 and 9 for the 10 classes of",
            ),
            (["compare", "digits.png", "--class-idx", "1,2"], "--class-idx is '1,2', and no class has that name"),
            (["compare", "digits.png", "--output", "digits.png"], "exists: pass --overwrite"),
            (["diagnose", "no.png"], "IMAGE: there is no file 'no.png'"),
            (["diagnose", "digits.png", "--target-layer", "layer5"], "--target-layer 'layer5' is not a module"),
            (["diagnose", "digits.png", "--class-idx", "10"], "--class-idx must lie between 0 and 9"),
            (["trust", "no.png"], "IMAGE: there is no file 'no.png'"),
            (["trust", "digits.png", "--output", "report.pdf"], "--output 'report.pdf' must end in .html, .json, .txt"),
            (["trust", "digits.png", "--class-idx", "1,2"], "--class-idx must name one class, or one for each of 1"),
            (["trust", "digits.png", "--chunk-size", "0"], "--chunk-size must be at least 1, got 0"),
            (["trust", "digits.png", "--class-idx", "10"], "between 0 and 9"),
        ],
    )
    def test_one_line(
        self, arguments: list[str], message: str, place: Path, mine: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in fails(capsys, *arguments, "--model-factory", f"{mine}:named")
        assert not [path for path in place.iterdir() if path.suffix in {".html", ".pdf"}]
        assert not list(place.glob("digits-*.png"))


class TestFactories:
    def test_forms(self, mine: str) -> None:
        for name in ("model", "preset", "named"):
            classifier = load_own(f"{mine}:{name}")
            assert not classifier.model.training
            assert classifier.name == f"{mine}:{name}"
        assert classifier.blank.shape == (3, 96, 96)
        assert list(classifier.categories or ()) == list("0123456789")
        assert load_own(f"{mine}:model").blank.shape == (3, 224, 224)

    def test_weights_of_ones_own(self, place: Path, mine: str) -> None:
        state = {key: value * 2 for key, value in load_model().state_dict().items()}
        torch.save(state, place / "twice.pt")
        classifier = load_own(f"{mine}:model", "twice.pt")
        assert torch.equal(classifier.model.state_dict()["fc.weight"], state["fc.weight"])
        assert classifier.name.endswith("weights twice.pt")
        torch.save(nn.Linear(2, 2).state_dict(), place / "other.pt")
        with pytest.raises(UserError, match=r"--weights 'other.pt' does not fit .*: Missing key"):
            load_own(f"{mine}:model", "other.pt")

    @pytest.mark.parametrize("name", ["preset", "shifted"])
    def test_pictures_are_what_the_model_saw(self, name: str, mine: str) -> None:
        image = sample_images()[0].image
        classifier = load_own(f"{mine}:{name}")
        (picture,) = classifier.read([image]).pictures
        assert picture is not None
        assert picture.tobytes() == image.tobytes()

    def test_pictures_of_an_unknown_range(self) -> None:
        classifier = Classifier(nn.Identity(), "", lambda image: torch.tensor([[[-3.0, 1.0], [5.0, 1.0]]]))
        (picture,) = classifier.read([Image.new("RGB", (2, 2))]).pictures
        assert picture is not None
        assert [picture.getpixel((0, 0)), picture.getpixel((0, 1)), picture.getpixel((1, 0))] == [
            (0, 0, 0),
            (255, 255, 255),
            (128, 128, 128),
        ]

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("nothing", "'nothing' cannot be found: No module named 'nothing'; name it as in package.module:function"),
            ("{mine}:", "is not a function: module"),
            ("nowhere:f", "No module named 'nowhere'"),
            ("torchcam.nowhere:f", "No module named 'torchcam.nowhere'"),
            ("broken:f", "'broken:f' cannot be found: No module named 'nowhere_at_all'"),
            ("{mine}:f", "has no attribute 'f'"),
            ("{mine}:number", "is not a function: int"),
            ("{mine}:odd", "must return a torch.nn.Module, or with it a transform"),
            (
                "{mine}:bad_transform",
                "transform (a function) and the class names (a list of strings), got DemoNet, int",
            ),
            ("{mine}:bad_names", "class names (a list of strings), got "),
        ],
    )
    def test_refusals(self, factory: str, message: str, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert message in fails(capsys, "explain", "digits.png", "--model-factory", factory.format(mine=mine))

    def test_options_that_do_not_go_together(self, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        base = ["explain", "digits.png", "--model-factory", f"{mine}:named"]
        assert "give --arch or --model-factory, not both" in fails(capsys, *base, "--arch", "resnet18")
        assert "--weights 'none' is not a file" in fails(capsys, *base, "--weights", "none")
