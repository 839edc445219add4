"""`torchcam explain` as a person uses it: folders, patterns, several methods, pages, and a second run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchcam import cli
from torchcam.cli import _completion
from torchcam.cli._images import find_sources, result_path
from torchcam.explain import explain

FACTORY = """
import torch
from torch import nn
from torchvision import transforms

class Net(nn.Sequential):
    def __init__(self):
        first, second = (nn.Sequential(nn.Conv2d(*sizes, 3, 2, 1), nn.ReLU()) for sizes in ((3, 6), (6, 8)))
        super().__init__(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def load():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    return net, transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]), ["cat", "dog", "fish"]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, and a folder of 12 pictures, two of them in a folder within."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"own{abs(hash(tmp_path))}.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(12):
        folder = "photos/more" if number > 9 else "photos"
        pixels = rng.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / f"p{number:02}.{'png' if number % 2 else 'jpg'}")
    return tmp_path


@pytest.fixture
def own(place: Path) -> list[str]:
    (file,) = place.glob("own*.py")
    return ["--model-factory", f"{file.stem}:load"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


class TestFolder:
    def test_pictures_with_several_methods_a_page_and_maps(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [
            "explain",
            "photos",
            *own,
            "--methods",
            "GradCAM,LayerCAM",
            "--class-idx",
            "dog,0",
            "--output",
            "out",
        ]
        told = run(capsys, *arguments, "--html", "--save-maps")
        model = own[1].replace(":", ".")
        stem = f"{model}-1-GradCAM+LayerCAM-class1+class0"
        out = {path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*") if path.is_file()}
        images = [path.relative_to(place / "photos").with_suffix("") for path in sorted((place / "photos").rglob("p*"))]
        pictures = {f"{image.as_posix()}-{stem}.png" for image in images}
        arrays = {
            f"{image.as_posix()}-{model}-1-{method}-class{index}.npy"
            for image in images
            for method in ("GradCAM", "LayerCAM")
            for index in (0, 1)
        }
        page = f"12-images-{model}-1-GradCAM+LayerCAM-class1+class0.html"
        assert out == {*pictures, *arrays, page}
        assert told.count(" -> ") == 12
        assert re.search(
            r"^Explained 12 images in [\d.]+ s: 12 pictures, 48 arrays and a page in out\.", told, re.MULTILINE
        )
        assert f"Open out/{page} in a browser." in told
        shown = json.loads(re.findall(r'id="data">(.*?)</script>', (place / "out" / page).read_text(), re.DOTALL)[0])
        assert [item["name"] for item in shown["items"]] == [image.as_posix() for image in images]

        from importlib import import_module

        net, transform, _ = import_module(own[1].partition(":")[0]).load()
        with Image.open(place / "photos" / "p00.jpg") as image:
            expected = explain(net, image, transform=transform, method=["GradCAM", "LayerCAM"], class_idx=[1, 0])
        found = np.load(place / "out" / f"p00-{own[1].replace(':', '.')}-1-LayerCAM-class0.npy")
        np.testing.assert_allclose(found, expected.maps["LayerCAM"][0][0].numpy(), atol=1e-6)

    def test_a_second_run_with_another_option_is_no_clash(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for count, options in enumerate(
            [[], ["--method", "HiResCAM"], ["--target-layer", "0"], ["--class-idx", "0,2"], ["--top-k", "3"]], 1
        ):
            run(capsys, "explain", "photos/p01.png", *own, *options, "--output", "out")
            assert len(list((place / "out").iterdir())) == count
        assert cli.main(["explain", "photos/p01.png", *own, "--output", "out"]) == 2
        assert "exists: pass --overwrite, or another --output" in capsys.readouterr().err

    def test_results_are_not_taken_for_images(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in range(2):
            told = run(capsys, "explain", "photos/more", *own, "--output", "photos/more", "--overwrite")
            assert "Explained 2 images" in told
        assert len(list((place / "photos" / "more").iterdir())) == 4

    def test_what_cannot_be_read_is_left_out_of_a_folder(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "photos" / "more" / "broken.jpg").write_bytes(b"no image")
        assert cli.main(["explain", "photos/more", *own]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("torchcam: warning: IMAGE: 'photos/more/broken.jpg' is not an image")
        assert captured.err.endswith(": it is left out\n")
        assert "1 image could not be read." in captured.out
        found = json.loads(run_json(capsys, "explain", "photos/more", *own, "--overwrite"))
        assert found["left_out"] == ["photos/more/broken.jpg"]
        (place / "bad").mkdir()
        (place / "bad" / "broken.jpg").write_bytes(b"no image")
        assert cli.main(["explain", "bad", *own]) == 2
        assert "none of the 1 image can be read" in capsys.readouterr().err

    def test_json_alone_is_printed(self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(
            run_json(capsys, "explain", "photos/p0[0-4].*", *own, "--save-maps", "--html", "--output", "o")
        )
        assert [image["image"] for image in found["images"]] == [
            f"photos/p0{n}.{'png' if n % 2 else 'jpg'}" for n in range(5)
        ]
        assert Path(found["page"]).is_file()
        for image in found["images"]:
            ((entry,), (kind,)) = image["maps"], image["classes"]
            assert (entry["method"], entry["class_idx"]) == ("GradCAM", kind["class_idx"])
            assert np.load(entry["file"]).shape == (8, 8)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    return capsys.readouterr().out


class TestNames:
    def test_sources(self, place: Path) -> None:
        names = [source.name for source in find_sources(["photos"])]
        assert names == ["more/p10", "more/p11", *(f"p{number:02}" for number in range(10))]
        assert [source.name for source in find_sources(["photos/p01.png", "photos/p0?.png", "photos/p03.png"])] == [
            "p01",
            "p03",
            "p05",
            "p07",
            "p09",
        ]
        assert len(find_sources(["photos/**/*.jpg"])) == 6
        (place / "photos" / "p01.jpg").write_bytes((place / "photos" / "p00.jpg").read_bytes())
        assert [source.name for source in find_sources(["photos/p01.*"])] == ["p01.jpg", "p01.png"]
        (place / "photos" / "[x].png").write_bytes((place / "photos" / "p01.png").read_bytes())
        assert [source.is_named for source in find_sources(["photos/[x].png"])] == [True]

    def test_files(self) -> None:
        path = result_path(Path("out"), "a/b", [["m"], ["x", "y"], ["G"], ["class1"]], ".png")
        assert path == Path("out/a/b-m-x+y-G-class1.png")
        many = [result_path(Path(), "i", [[f"layer{n}" for n in range(count)]], ".png").name for count in (12, 13)]
        assert many[0].startswith("i-layer0+11more-")
        assert many[0][16:] != many[1][16:]
        assert result_path(Path(), "i", [["a b/c", "é*?"]], "").name == "i-a_b_c+é"
        assert len(result_path(Path(), "n" * 300, [], ".png").name) < 200


class TestModels:
    def test_timm(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("timm")
        arguments = ["explain", "photos/more", "--timm", "resnet18.a1_in1k", "--weights", "none", "--output", "out"]
        told = run(capsys, *arguments, "--class-idx", "goldfish")
        assert told.startswith("resnet18.a1_in1k, random weights (seed 0): GradCAM of layer4\n")
        assert "goldfish (1)" in told
        names = {path.name for path in (place / "out").iterdir()}
        assert names == {f"p{n}-resnet18.a1_in1k-random-layer4-GradCAM-class1.png" for n in (10, 11)}
        assert cli.main(["explain", "photos", "--timm", "resnet18.a1_in1kk"]) == 2
        assert "is not a model of timm; did you mean 'resnet18.a1_in1k'" in capsys.readouterr().err

    def test_transformers(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        transformers = pytest.importorskip("transformers")
        labels = {0: "cat", 1: "dog"}
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels,
            label2id={"cat": 0, "dog": 1},
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config).eval()
        model.save_pretrained("checkpoint")
        processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64})
        processor.save_pretrained("checkpoint")
        capsys.readouterr()
        assert cli.main(["explain", "photos/more", "--hf", "checkpoint", "--class-idx", "Dog", "--save-maps"]) == 0
        assert "dog (1)" in capsys.readouterr().out
        (file,) = place.glob("p11-checkpoint-*-GradCAM-class1.npy")
        expected = explain(model, place / "photos/more/p11.png", transform=processor, class_idx=1)
        np.testing.assert_allclose(np.load(file), expected.cams[1][0].numpy(), atol=1e-5)


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed goes to a terminal of 100 columns that has colours."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


class TestTerminal:
    def test_progress_over_a_folder(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_terminal(monkeypatch)
        assert cli.main(["explain", "photos", *own, "--output", "out"]) == 0
        screen = capsys.readouterr()
        assert re.search(r"\d+/12 \[", screen.err)
        assert screen.out.count(" -> ") == 12
        assert "Explained 12 images" in screen.out

    def test_the_best_and_verdicts_are_marked(
        self, place: Path, own: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_terminal(monkeypatch)
        assert cli.main(["compare", "photos/p01.png", *own, "--methods", "GradCAM,EigenCAM,RandomCAM"]) == 0
        screen = capsys.readouterr().out
        assert len(re.findall(r"\x1b\[1;32m *-?[01]\.\d\d\x1b\[0m", screen)) == 1
        assert re.search(r"\w+ is most like the others \(-?\d\.\d\d\), \w+ least", screen)
        assert cli.main(["layers", *own]) == 0
        assert re.search(r"\x1b\[1;32m1  .*<- default\x1b\[0m", capsys.readouterr().out)
        assert cli.main(["trust", "photos/p01.png", *own, "--methods", "GradCAM"]) == 0
        assert re.search(r"\x1b\[1;3[123]m *(Believe|Take|Do not believe)", capsys.readouterr().out)


class TestCompletion:
    def completed(self, line: str, cwd: Path) -> set[str]:
        """What a shell is offered for a command line."""
        pytest.importorskip("argcomplete")
        environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
                       "_ARGCOMPLETE_STDOUT_FILENAME": str(cwd / "answer"), "COMP_TYPE": "9"}  # fmt: skip
        command = [sys.executable, "-c", "import sys; sys.argv = ['torchcam']; from torchcam.cli import main; main()"]
        (cwd / "answer").write_text("")
        subprocess.run(command, cwd=cwd, env=environment, check=True, timeout=120, capture_output=True)
        return {word.strip() for word in re.split(r"[\013\n]", (cwd / "answer").read_text()) if word.strip()}

    @pytest.mark.parametrize(
        ("line", "some", "none"),
        [
            ("torchcam ex", {"explain", "export"}, {"demo"}),
            ("torchcam explain --sa", {"--save-maps"}, {"--json"}),
            ("torchcam explain --method Layer", {"LayerCAM"}, {"GradCAM"}),
            ("torchcam explain --methods GradCAM,Eigen", {"GradCAM,EigenCAM"}, {"LayerCAM"}),
            ("torchcam layers --arch resnet1", {"resnet18", "resnet101"}, {"resnet34"}),
            (
                "torchcam explain --arch alexnet --target-layer features.1",
                {"features.1", "features.10"},
                {"features.2"},
            ),
            ("torchcam evaluate --scores so", {"softmax"}, {"sigmoid"}),
        ],
    )
    def test_offers(self, line: str, some: set[str], none: set[str], tmp_path: Path) -> None:
        offered = self.completed(line, tmp_path)
        assert some <= offered
        assert not none & offered

    def test_models_and_layers(self) -> None:
        assert {"resnet18", "vit_b_16"} <= set(_completion.architectures())
        named = argparse.Namespace(arch="alexnet", timm=None, hf=None, model_factory=None)
        assert {"x,features.1", "x,features"} <= set(_completion.layers("x,feat", named))


TRANSFORMER = """
import torch
from torchvision import transforms
from torchvision.models import VisionTransformer

def load():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=16, num_classes=3
        )
        torch.nn.init.normal_(net.heads.head.weight)
    return net, transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]), ["cat", "dog", "fish"]
"""
DEFAULT = "encoder.layers.encoder_layer_1.ln_1"


class TestTransformers:
    """Without a method and a layer, what the leaderboard found best for the kind of model."""

    @pytest.fixture
    def arguments(self, place: Path) -> list[str]:
        (place / f"vit{abs(hash(place))}.py").write_text(TRANSFORMER)
        (file,) = place.glob("vit*.py")
        return ["photos/p01.png", "--model-factory", f"{file.stem}:load"]

    def test_explain(self, place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["explain", *arguments, "--class-idx", "dog", "--save-maps", "--output", "maps"]) == 0
        printed = capsys.readouterr().out
        assert "HiResCAM of conv_proj" in printed
        assert "With balanced gradients, best for a transformer with a class token" in printed
        (file,) = (place / "maps").glob("*-conv_proj-HiResCAM-class1.npy")
        net, transform, _ = _load(arguments[2])
        wanted = explain(
            net,
            Image.open("photos/p01.png"),
            method="HiResCAM",
            target_layer="conv_proj",
            method_kwargs={"gradients": "balanced"},
            class_idx=1,
            transform=transform,
        )
        np.testing.assert_allclose(np.load(file), wanted.results["HiResCAM"].fused[1].numpy(), atol=1e-5)

    @pytest.mark.parametrize(
        "named", [["--methods", "GradCAM"], ["--target-layer", "encoder.layers.encoder_layer_1.ln_1"]]
    )
    def test_who_names_something_gets_exactly_that(
        self, named: list[str], arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["explain", *arguments, *named, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["method"], found["target_layers"]) == ("GradCAM", [DEFAULT])

    def test_trust(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["trust", *arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["method"] == "HiResCAM(target_layer=['conv_proj'], gradients=balanced)"
        assert found["compared_with"] == ["GradCAM", "LayerCAM", "ReciproCAM"]


def _load(factory: str) -> tuple[torch.nn.Module, Any, list[str]]:
    module, function = factory.split(":")
    found: tuple[torch.nn.Module, Any, list[str]] = getattr(importlib.import_module(module), function)()
    return found
