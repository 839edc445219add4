"""The command line: what it writes, what it prints, and how it says no."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn

import torchcam
import torchcam.explain
from torchcam import cli, methods
from torchcam.cli._images import read_image
from torchcam.cli._models import Classifier, load_classifier
from torchcam.cli._options import find_method
from torchcam.demo import load_model, sample_images

COMMANDS = {"app", "compare", "demo", "diagnose", "evaluate", "explain", "export", "layers", "trust"}
RESULT = "photo-mobilenet_v3_small-random-features-GradCAM-class3.png"
SMALL = ["--arch", "mobilenet_v3_small", "--weights", "none"]
FAMILIES = [
    "resnet18",
    "vgg11",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "resnext50_32x4d",
    "alexnet",
]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchcam", *map(str, arguments)]
    environment = {**os.environ, "PYTHONWARNINGS": "error", "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def hopper() -> Path:
    return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with torch's downloads inside another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def photo(place: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = place / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every download fail; what was asked for is in the list."""
    asked: list[str] = []

    def fail(request: Any, *_: Any, **__: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    return asked


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must be refused, and give its message."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("torchcam: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


class TestTopLevel:
    def test_alone_prints_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        printed = capsys.readouterr().out
        assert "torchcam demo" in printed
        assert set(re.findall(r"^    (\w+)  ", printed, re.MULTILINE)) == COMMANDS

    @pytest.mark.parametrize("command", [[], *([command] for command in sorted(COMMANDS))])
    def test_help(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 120
        assert all(word in printed for word in command)

    def test_help_names_methods_and_examples_that_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        named = set(re.findall(r"\b\w*CAM\w*\b", str(cli.explain.__doc__))) - {"CAM"}
        assert {"GradCAM", "LayerCAM"} <= named
        assert named <= set(methods.__all__)
        parser = cli.make_parser()
        texts = [str(module.__doc__) for module in (cli, *cli.COMMANDS)]
        examples = re.findall(r"^  torchcam (.*)$", "".join(texts).replace("\\\n", ""), flags=re.MULTILINE)
        assert len(examples) >= 15
        for example in examples:
            assert parser.parse_args(example.split()).run is not None

    def test_version_and_help_do_not_load_torch(self, tmp_path: Path) -> None:
        code = "import sys; from torchcam.cli import main; main([]); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.endswith("False\n")
        done = run("--version", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"torchcam {torchcam.__version__}\n", "")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["demmo"], "invalid choice: 'demmo'; did you mean 'demo'?"),
            (["demo", "--outptu", "x"], "unrecognized arguments: --outptu x; did you mean '--output'?"),
            (["explain", "a.png", "--topk=3"], "unrecognized arguments: --topk=3; did you mean '--top-k'"),
            (["evaluate", "--demo", "--scores", "sigmiod"], "invalid choice: 'sigmiod'; did you mean 'sigmoid'?"),
            (["explain"], "required: IMAGE"),
            (["explain", "a.png", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
            (["explain", "a.png", "--alpha", "x"], "argument --alpha: invalid float value: 'x'"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        printed = fails(capsys, *arguments)
        assert message in printed
        assert "--help` explains" in printed

    def test_interrupt(
        self, photo: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def half_a_picture(_figure: Any, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", half_a_picture)
        assert cli.main(["explain", str(photo), *SMALL, "--output", "new/maps"]) == 130
        assert capsys.readouterr().err == "torchcam: interrupted\n"
        assert files(place) == {"photo.png"}

    def test_warnings_are_lines(
        self, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def warn(_arguments: Any) -> None:
            warnings.simplefilter("always")
            warnings.warn("two\nlines", RuntimeWarning, stacklevel=1)

        monkeypatch.setattr(cli.demo, "run", warn)
        before = warnings.showwarning
        assert cli.main(["demo"]) == 0
        assert capsys.readouterr().err == "torchcam: warning: two lines\n"
        assert warnings.showwarning is before


class TestDemo:
    def test_in_a_process_of_its_own(self, place: Path) -> None:
        done = run("demo", "--output", "new/folder", cwd=place)
        assert (done.returncode, done.stderr) == (0, "")
        assert files(place) == {"new", "new/folder", "new/folder/torchcam-demo.png"}
        sample = sample_images()[0]
        first, second = sample.labels
        assert f"holds a {first} and a {second}" in done.stdout
        assert "new/folder/torchcam-demo.png" in done.stdout
        with Image.open(place / "new/folder/torchcam-demo.png") as picture:
            assert picture.size > (1200, 500)

        rows = re.findall(r"^  (\(flat map\)|\w+) .* (\d) +([\d.]+)% +([\d.]+)% +([\d.]+)%$", done.stdout, re.MULTILINE)
        assert len(rows) == 2 * (len(cli.demo.METHODS) + 1)
        chance = {digit: float(own) for method, digit, own, _, _ in rows if method == "(flat map)"}
        for method, digit, own, other, neither in rows:
            assert float(own) + float(other) + float(neither) == pytest.approx(100, abs=0.2)
            if method != "(flat map)":
                assert float(own) > 1.5 * float(other)
                assert float(own) > 2 * chance[digit]

    def test_shares_are_those_of_the_maps(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["demo"]) == 0
        printed = capsys.readouterr().out
        sample, model = sample_images()[0], load_model()
        with methods.GradCAM(model, "layer4") as extractor:
            (cam,) = extractor(sample.labels[1], model(sample.to_tensor()))
        cam = nn.functional.interpolate(cam[None], size=sample.masks.shape[1:], mode="bilinear")[0, 0]
        own = float(cam[sample.masks[1]].sum() / cam.sum())
        assert re.search(rf"GradCAM +layer4 +{sample.labels[1]} +{own:.1%}", printed)

    def test_picture_that_is_there(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = place / "torchcam-demo.png"
        path.write_bytes(b"mine")
        assert "'torchcam-demo.png' exists: pass --overwrite" in fails(capsys, "demo")
        assert path.read_bytes() == b"mine"
        assert cli.main(["demo", "--overwrite"]) == 0
        assert path.read_bytes() != b"mine"
        assert files(place) == {"torchcam-demo.png"}


class TestExplain:
    def test_in_a_process_of_its_own(self, hopper: Path, place: Path) -> None:
        arguments = ["--arch", "resnet18", "--weights", "none", "--method", "LayerCAM", "--target-layer", "layer4"]
        done = run("explain", hopper, *arguments, "--class-idx", 207, "--top-k", 3, "--output", "maps", cwd=place)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        (name,) = (path.name for path in (place / "maps").iterdir())
        first = re.findall(r"\d+", lines[2])[-1]
        shape = rf"grace_hopper-resnet18-random-layer4-LayerCAM-class{first}\+3more-[0-9a-f]{{6}}\.png"
        assert re.fullmatch(shape, name)
        assert lines[0] == "resnet18, random weights (seed 0): LayerCAM of layer4"
        assert lines[1].endswith(f"grace_hopper.jpg -> {Path('maps', name)}")
        assert len(lines) == 2 + 4 + 3
        assert re.fullmatch(r"Explained 1 image in [\d.]+ s: 1 picture in maps\.", lines[-2])
        assert re.fullmatch(r" +[\d.<]+%  golden retriever \(207\)", lines[5])
        assert "random" in lines[-1]
        assert (place / "maps" / name).stat().st_mode & 0o777 == 0o666 & ~_umask()

    @pytest.mark.zoo
    @pytest.mark.parametrize("arch", FAMILIES)
    def test_families(self, arch: str, hopper: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["explain", str(hopper), "--arch", arch, "--weights", "none", "--top-k", "2"]) == 0
        assert capsys.readouterr().err == ""
        (path,) = place.glob("grace_hopper-*-GradCAM-*.png")
        with Image.open(path) as picture:
            assert picture.size > (700, 700)

    @pytest.mark.zoo
    @pytest.mark.parametrize("arch", ["vit_b_16", "swin_t", "maxvit_t"])
    def test_transformers_give_a_picture_or_one_line(
        self, arch: str, hopper: Path, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = cli.main(["explain", str(hopper), "--arch", arch, "--weights", "none"])
        assert code in {0, 2}
        assert capsys.readouterr().err.count("\n") == (code == 2)
        assert len(files(place)) == (code == 0)

    def test_random_weights_are_the_same_each_time(
        self, photo: Path, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = torch.get_rng_state()
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            assert cli.main(["explain", str(photo), *SMALL, "--top-k", "2", "--overwrite"]) == 0
            (path,) = place.glob("photo-*.png")
            outputs.append((*capsys.readouterr().out.splitlines()[:-2], path.read_bytes()))
        torch.set_rng_state(state)
        assert outputs[0] == outputs[1]

    def test_several_images_of_every_kind(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
        kinds = {
            "grey.png": rgb.convert("L"),
            "alpha.png": rgb.convert("RGBA"),
            "palette.gif": rgb.convert("P"),
            "bits.png": Image.fromarray(np.full((40, 40), 30000, dtype=np.uint16)),
            "cmyk.jpg": rgb.convert("CMYK"),
        }
        for name, image in kinds.items():
            image.save(place / name)
        clear = rgb.convert("P")
        clear.save(place / "clear.png", transparency=bytes(range(256)))
        names = [*kinds, "clear.png"]
        assert cli.main(["explain", *names, *SMALL, "--output", "out", "--class-idx", "3"]) == 0
        rest = "mobilenet_v3_small-random-features-GradCAM-class3.png"
        assert files(place / "out") == {f"{Path(name).stem}-{rest}" for name in names}
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.count(" -> ") == len(names)
        assert read_image(place / "bits.png").getpixel((0, 0)) == (117, 117, 117)

    def test_upright_as_the_camera_says(self, place: Path) -> None:
        image = Image.new("RGB", (20, 10), "red")
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(place / "turned.jpg", exif=exif)
        assert read_image(place / "turned.jpg").size == (10, 20)

    def test_maps_are_those_of_the_library(self, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[Any] = []
        plot = torchcam.explain.PredictionExplanation.plot

        def record(explanation: Any, **options: Any) -> Any:
            drawn.append((explanation, options))
            return plot(explanation, **options)

        monkeypatch.setattr(torchcam.explain.PredictionExplanation, "plot", record)
        arguments = [
            "--method",
            "layer-cam",
            "--target-layer",
            "features.3,features.8",
            "--target-layer",
            "features.11",
        ]
        assert cli.main(["explain", str(photo), *SMALL, *arguments, "--class-idx", "3,5", "--class-idx", "1"]) == 0
        ((explanation, options),) = drawn
        assert (options["alpha"], options["colormap"]) == (0.25, None)
        assert "LayerCAM of features.3, features.8, features.11" in options["title"]

        classifier = load_classifier("mobilenet_v3_small", "none")
        batch = classifier.preprocess(Image.open(photo)).unsqueeze(0)
        layers = ["features.3", "features.8", "features.11"]
        with torch.no_grad(), methods.LayerCAM(classifier.model, layers) as extractor:
            logits = classifier.model(batch)
            for (key, cam), index in zip(explanation.results["LayerCAM"].fused.items(), [3, 5, 1], strict=True):
                expected = extractor.fuse_cams(extractor(index, logits, retain_graph=True))[0]
                assert torch.allclose(cam, expected, atol=1e-5)
                assert f"({index})" in explanation.name_of(key)
        # The picture is what the model saw, up to rounding.
        seen = batch[0] * torch.tensor(classifier.preprocess.std)[:, None, None]
        seen = 255 * (seen + torch.tensor(classifier.preprocess.mean)[:, None, None])
        assert np.abs(np.array(explanation.image) - seen.permute(1, 2, 0).numpy()).max() <= 1

    def test_alpha_and_colormap_are_used(self, photo: Path, place: Path) -> None:
        pictures = []
        for options in ([], ["--alpha", "0.9"], ["--colormap", "magma"]):
            assert cli.main(["explain", str(photo), *SMALL, *options, "--output", "cam.png", "--overwrite"]) == 0
            pictures.append((place / "cam.png").read_bytes())
        assert len(set(pictures)) == 3

    @pytest.mark.parametrize("name", ["Grad-CAM++", "gradcampp", "GradCAMpp"])
    def test_methods_as_papers_write_them(self, name: str) -> None:
        assert find_method(name) is methods.GradCAMpp

    @pytest.mark.parametrize(
        "options",
        [
            ["--method", "CAM", "--arch", "resnet18"],
            ["--method", "FinerCAM"],
            ["--method", "RefineCAM", "--target-layer", "features.3,features.8"],
        ],
    )
    def test_other_methods(
        self, options: list[str], photo: Path, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["explain", str(photo), *SMALL, *options]) == 0
        assert capsys.readouterr().err == ""
        assert len(files(place)) == 2
        assert len(list(place.glob(f"photo-*-{options[1]}-class*.png"))) == 1

    def test_legrad(self, photo: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import VisionTransformer, vit_b_16

        small = VisionTransformer(
            image_size=224, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12
        ).eval()
        preset = load_classifier("mobilenet_v3_small", "none").preprocess
        classifier = Classifier(small, vit_b_16.__name__, preset, [str(index) for index in range(1000)])
        monkeypatch.setattr(cli._images, "load_model", lambda *_: classifier)
        layers = "encoder.layers.encoder_layer_0,encoder.layers.encoder_layer_1"
        arguments = ["--method", "LeGrad", "--target-layer", layers]
        assert cli.main(["explain", str(photo), "--arch", "vit_b_16", *arguments]) == 0
        assert len(list(place.glob("photo-vit_b_16-encoder*-LeGrad-class*.png"))) == 1

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_device(self, photo: Path, place: Path) -> None:
        assert cli.main(["explain", str(photo), *SMALL, "--device", "cuda"]) == 0
        assert len(files(place)) == 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["missing.png"], "IMAGE: there is no file 'missing.png' to read an image from"),
            (["empty"], "IMAGE 'empty' is a folder that holds no images"),
            (["*.jpg"], "IMAGE '*.jpg' matches no images"),
            (["https://some.where/dog.jpg"], "nothing is fetched: download it first, and name the file"),
            (["n" * 5000], "nnn' to read an image from"),
            (["text.png"], "IMAGE: 'text.png' is not an image that Pillow can read (UnidentifiedImageError"),
            (["cut.png"], "IMAGE: 'cut.png' is not an image that Pillow can read"),
            (["float.tiff"], "IMAGE: an image as an array of floats must lie in [0, 1], got [2, 2]"),
            (["photo.png", "missing.png"], "IMAGE: there is no file 'missing.png' to read an image from"),
            (
                ["photo.png", "--arch", "resnet19"],
                "--arch 'resnet19' is not a classification model of torchvision; did you mean 'resnet1",
            ),
            (["photo.png", "--arch", "zzz"], "there are resnet50, mobilenet_v3_large, convnext_tiny, and more"),
            (["photo.png", "--method", "GardCAM"], "'GardCAM' is not a method of torchcam; did you mean 'GradCAM'"),
            (["photo.png", "--method", "zzz"], "there are CAM, "),
            (["photo.png", "--method", "OutputTarget"], "--methods 'OutputTarget' is not a method"),
            (
                ["photo.png", "--target-layer", "feature"],
                "--target-layer 'feature' is not a module of MobileNetV3; did you mean 'features'",
            ),
            (
                ["photo.png", "--target-layer", "classifier"],
                "no spatial extent: name another --target-layer\n",
            ),
            (
                ["photo.png", "--arch", "inception_v3", "--target-layer", "AuxLogits"],
                "does not run every layer of --target-layer AuxLogits",
            ),
            (["photo.png", "--class-idx", "1000"], "--class-idx must lie between 0 and 999 for the 1000 classes"),
            (["photo.png", "--class-idx", "-1"], "--class-idx must lie between 0 and 999"),
            (["photo.png", "--class-idx", "dog"], "--class-idx is 'dog', and no class has that name"),
            (["photo.png", "--top-k", "0"], "--top-k must be at least 1 without --class-idx, got 0"),
            (["photo.png", "--top-k", "1001"], "--top-k must lie between 1 and 1000"),
            (
                ["photo.png", "--method", "LeGrad"],
                "--target-layer must name the transformer block(s) that LeGrad reads",
            ),
            (["photo.png", "--method", "LeGrad", "--target-layer", "features"], "MobileNetV3 is not read out as"),
            (
                ["photo.png", "--method", "RefineCAM", "--target-layer", "features"],
                "--target-layer must list two layers or more",
            ),
            (
                ["photo.png", "--method", "CAM", "--target-layer", "features.0,features.1"],
                "--target-layer of CAM must be one layer",
            ),
            (["photo.png", "--alpha", "1"], "--alpha must be a number in [0, 1), got 1.0"),
            (
                ["photo.png", "--colormap", "virids"],
                "--colormap 'virids' is not a matplotlib colormap; did you mean 'viridis'",
            ),
            (["photo.png", "--device", "tpu"], "--device 'tpu' cannot be used here"),
            (["photo.png", "--device", "meta"], "--device 'meta' cannot be used here"),
            (
                ["photo.png", "--output", "text.png"],
                "'text.png' exists: pass --overwrite",
            ),
            (["photo.png", "--output", "text.png/maps"], "'text.png' is not a directory"),
            (["photo.png", "taken/photo.png"], "several images are called 'photo.png'"),
            (["photo.png", "--output", "taken", "--class-idx", "3"], f"{RESULT}' exists: pass --overwrite"),
            (["photo.png", "--output", "photo.png", "--overwrite"], "photo.png' is in the way"),
            (["photo.png", "--weights", "missing.pth"], "--weights 'missing.pth' is not a file, nor "),
            (["photo.png", "--weights", "text.png"], "--weights 'text.png' must hold a state dict"),
            (["photo.png", "--weights", "list.pth"], "--weights 'list.pth' must hold a state dict"),
            (
                ["photo.png", "--weights", "other.pth"],
                "--weights 'other.pth' does not fit mobilenet_v3_small: Missing key(s)",
            ),
            (
                ["photo.png", "--weights", "object.pth"],
                "PATH) (UnpicklingError)",
            ),
        ],
    )
    def test_one_line_and_nothing_written(
        self, arguments: list[str], message: str, place: Path, photo: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "text.png").write_text("no image")
        (place / "cut.png").write_bytes(photo.read_bytes()[:500])
        Image.new("F", (4, 4), 2).save(place / "float.tiff")
        (place / "taken").mkdir()
        (place / "empty").mkdir()
        for name in (RESULT, "photo.png"):
            Image.new("RGB", (4, 4)).save(place / "taken" / name)
        torch.save([torch.zeros(1)], place / "list.pth")
        torch.save(nn.Linear(2, 2).state_dict(), place / "other.pth")
        torch.save(Path("x"), place / "object.pth")
        before = {name: (place / name).stat().st_mtime_ns for name in files(place)}
        defaults = [] if "--arch" in arguments else SMALL[:2]
        defaults += [] if "--weights" in arguments else SMALL[2:]
        assert message in fails(capsys, "explain", *arguments, *defaults)
        assert {name: (place / name).stat().st_mtime_ns for name in files(place)} == before

    def test_in_a_process_of_its_own(self, place: Path) -> None:
        done = run("explain", "missing.png", "--output", "maps", cwd=place)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "torchcam: error: IMAGE: there is no file 'missing.png' to read an image from\n"
        assert files(place) == set()

    def test_folder_that_cannot_be_written(
        self, photo: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
        printed = fails(capsys, "explain", photo, *SMALL, "--output", "new")
        assert re.search(r"cannot write 'new/photo-\S+-GradCAM-class\d+\.png': No space left on device", printed)
        assert files(place) == {"photo.png"}

    def test_maps_that_are_no_pictures(
        self, photo: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def signals(_self: Any, class_idx: Any = None, **_: Any) -> list[torch.Tensor]:
            return [torch.zeros(1, 5)]

        monkeypatch.setattr(methods.GradCAM, "__call__", signals)
        printed = fails(capsys, "explain", photo, *SMALL)
        assert "only maps (height, width) can be drawn over an image, these have shapes [(5,)]" in printed
        assert files(place) == {"photo.png"}

    def test_bugs_are_not_hidden(self, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torchcam.explain, "explain", lambda: None)
        with pytest.raises(TypeError):
            cli.main(["explain", str(photo), *SMALL])


class TestWeights:
    def test_without_network(
        self, photo: Path, place: Path, no_network: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        printed = fails(capsys, "explain", photo, "--arch", "mobilenet_v3_small")
        assert "mobilenet_v3_small could not be downloaded" in printed
        assert "no route to host" in printed
        assert f"fetch {no_network[0]} where" in printed
        assert "--weights PATH" in printed
        assert "--weights none" in printed
        assert len(no_network) == 1
        assert files(place) == {"photo.png"}
        assert not any(path.is_file() for path in (place.parent / "torch").rglob("*"))

    @pytest.mark.parametrize("name", ["DEFAULT", "imagenet1k_v1"])
    def test_download(
        self, name: str, photo: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = mobilenet_v3_small().eval()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        asked = []

        def download(url: str, path: str, checksum: str, progress: bool) -> None:
            asked.append((url, checksum, progress))
            Path(path).write_bytes(buffer.getvalue())

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        url = MobileNet_V3_Small_Weights.DEFAULT.url
        for _ in range(2):  # the second time it is there
            assert cli.main(["explain", str(photo), *SMALL[:2], "--weights", name, "--overwrite"]) == 0
        assert asked == [(url, url[-12:-4], False)]
        assert (place.parent / "torch" / "hub" / "checkpoints" / Path(url).name).is_file()

        printed = capsys.readouterr()
        assert printed.err == ""
        assert "mobilenet_v3_small, weights IMAGENET1K_V1: GradCAM of features" in printed.out
        batch = MobileNet_V3_Small_Weights.DEFAULT.transforms()(Image.open(photo)).unsqueeze(0)
        with torch.no_grad():
            best = int(model(batch).argmax())
        assert f"({best})" in printed.out

    # The last two are set up differently by torchvision when it loads weights.
    @pytest.mark.parametrize("arch", ["mobilenet_v3_small", "mnasnet0_5", "googlenet"])
    def test_file(self, arch: str, photo: Path, place: Path) -> None:
        state = load_classifier(arch, "none").model.state_dict()
        path = place / "my weights.pth"
        torch.save(state, path)
        loaded = load_classifier(arch, str(path))
        assert loaded.name == f"{arch}, weights my weights.pth"
        assert not loaded.model.training
        assert all(torch.equal(state[key], value) for key, value in loaded.model.state_dict().items())
        assert cli.main(["explain", str(photo), "--arch", arch, "--weights", str(path)]) == 0

    def test_file_with_other_classes(self, photo: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from torchvision.models import mobilenet_v3_small

        torch.save(mobilenet_v3_small(num_classes=10).state_dict(), place / "ten.pth")
        printed = fails(capsys, "explain", photo, *SMALL[:2], "--weights", "ten.pth")
        assert "does not fit mobilenet_v3_small: size mismatch for classifier.3.weight" in printed
        assert "; and " not in printed

    def test_names_of_older_files_are_understood(self, place: Path) -> None:
        from torchvision.models import densenet121

        state = densenet121().state_dict()
        old = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked")
        }
        assert old.keys() != state.keys()
        torch.save(old, place / "densenet.pth")
        loaded = load_classifier("densenet121", "densenet.pth").model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


class TestLayers:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["layers", "--arch", "resnet18", "--size", "64x96"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        title, head, _, *rows = captured.out.splitlines()
        assert title == "resnet18, images of 64 x 96"
        assert head.split() == ["layer", "type", "grid", "channels", "influence", "calls"]
        (default,) = (row for row in rows if "<- default" in row)
        assert rows[-1] == "Maps are made from layer4 by default."
        assert default.split() == ["layer4", "Sequential", "2", "x", "3", "512", "100%", "1", "<-", "default"]
        assert any(row.split()[:5] == ["layer1.0", "BasicBlock", "16", "x", "24"] for row in rows)

    def test_a_model_of_another_size_than_it_takes_by_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["layers", "--arch", "mobilenet_v3_small"]) == 0
        assert capsys.readouterr().out.startswith("mobilenet_v3_small, images of 224 x 224\n")

    def test_all_layers(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In the last block of a vision transformer only the class token counts: its layers are listed on request."""
        printed = []
        for options in ([], ["--all"]):
            assert cli.main(["layers", "--arch", "vit_b_32", *options]) == 0
            printed.append(capsys.readouterr().out)
        few, every = printed
        assert "encoder_layer_11.ln_2 " not in few
        (unread,) = (
            line.split() for line in every.splitlines() if line.startswith("encoder.layers.encoder_layer_11.ln_2 ")
        )
        assert unread[5:] == ["768", "0%", "1"]
        assert all(line in every for line in few.splitlines() if line.startswith("encoder.") and "default" not in line)
        for table in printed:
            (default,) = (line for line in table.splitlines() if "<- default" in line)
            assert default.startswith("encoder.layers.encoder_layer_11.ln_1 ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--arch", "resnet19"], "is not a classification model of torchvision; did you mean 'resnet18'"),
            (["--arch", "resnet18", "--size", "big"], "--size must be height and width as in 224x320, got 'big'"),
            (["--arch", "vit_b_32", "--size", "64x64"], "--size 64x64 is not taken by vit_b_32: Wrong image height!"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert message in fails(capsys, "layers", *arguments)


class TestFilesAndNames:
    def test_the_file_of_one_picture(self, photo: Path, place: Path) -> None:
        assert cli.main(["explain", str(photo), *SMALL, "--output", "maps/cam.png"]) == 0
        with Image.open(place / "maps" / "cam.png") as picture:
            assert picture.format == "PNG"
        assert [path.name for path in (place / "maps").iterdir()] == ["cam.png"]

    @pytest.mark.parametrize(
        ("images", "output", "message"),
        [
            (["photo.png", "second.png"], "cam.png", "--output 'cam.png' is one file for 2 images: name a folder"),
            (["photo.png"], "cam.jpg", "--output 'cam.jpg': pictures are written as .png"),
        ],
    )
    def test_files_that_cannot_be(
        self, images: list[str], output: str, message: str, photo: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["explain", *images, *SMALL, "--output", output]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("wrong", [["--model-factory", "nope:x"], ["--arch", "resnet19"]])
    def test_a_file_that_is_there_hides_no_error(
        self, wrong: list[str], photo: Path, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "cam.png").write_bytes(b"")
        assert cli.main(["explain", str(photo), *wrong, "--output", "cam.png"]) == 2
        assert wrong[1].split(":")[0] in (error := capsys.readouterr().err)
        assert "exists" not in error

    def test_classes_by_name(self, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["explain", str(photo), *SMALL, "--class-idx", "Tench,3", "--json"]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert [entry["class_idx"] for entry in image["classes"]] == [0, 3]
        assert cli.main(["explain", str(photo), *SMALL, "--class-idx", "tensch", "--overwrite"]) == 2
        assert "--class-idx is 'tensch', and no class has that name; did you mean 'tench'" in capsys.readouterr().err

    def test_names_of_files_do_not_move_the_cursor(self, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
        strange = photo.rename(photo.with_name("a\x1b[2Jb.png"))
        assert cli.main(["explain", str(strange), *SMALL]) == 0
        assert cli.main(["explain", str(strange) + "\x1b[2J", *SMALL]) == 2
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        assert "\\x1b[2Jb.png" in printed.out


@pytest.mark.parametrize("command", ["", "explain", "compare", "diagnose", "trust", "evaluate", "layers", "demo"])
def test_help_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 79
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert "".join("".join(lines).split()) == "".join(capsys.readouterr().out.split())  # no word is broken or lost
