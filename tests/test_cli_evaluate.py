"""`torchcam evaluate`: folders and their classes, what it writes, interruptions, several processes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import ToTensor

from torchcam import cli, evaluate
from torchcam.cli._folder import match_classes
from torchcam.cli._messages import UserError
from torchcam.cli._models import Classifier
from torchcam.demo import CLASS_NAMES, load_model, make_scenes
from torchcam.methods import GradCAM, RandomCAM

MODELS = """
import torch
from torch import nn
from torchvision.transforms import ToTensor
from torchcam.demo import CLASS_NAMES, load_model

def named(): return load_model(), ToTensor(), list(CLASS_NAMES)
def unnamed(): return load_model(), ToTensor()

def grey():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return net, ToTensor(), list(CLASS_NAMES)
"""
QUICK = ["--methods", "GradCAM,RandomCAM", "--metrics", "classification", "--batch-size", "2"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models, and a folder of pictures with a subfolder for each digit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"models_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    scenes = make_scenes(5, num_digits=1, seed=3)
    for index, (image, label) in enumerate(zip(scenes.images, scenes.labels[:, 0].tolist(), strict=True)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        folder = tmp_path / "data" / CLASS_NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


@pytest.fixture
def mine(place: Path) -> str:
    return next(place.glob("models_*.py")).stem


def values(text: str) -> Any:
    """All numbers of a result but the times."""
    found = json.loads(text)
    for entry in found["methods"].values():
        del entry["seconds_per_map"]
    del found["settings"]
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return values(captured.out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("torchcam: error: ")
    assert message.count("\n") == 1
    return message


class TestDemo:
    def test_table_and_files(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        outputs = [option for name in ("csv", "md", "json", "txt") for option in ("--output", f"out/table.{name}")]
        outputs += outputs[:2]  # named twice is not written twice
        assert cli.main(["evaluate", "--demo", "--limit", "4", *QUICK, "--metrics", "Localization", *outputs]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.startswith("demo model on 4 pictures of two digits each, one of which is explained\n")
        assert "\x1b" not in captured.out
        assert sorted(path.name for path in Path("out").iterdir()) == [
            f"table.{s}" for s in ("csv", "json", "md", "txt")
        ]

        scenes = make_scenes(4, num_digits=2)
        batches = [
            (scenes.images[i : i + 2], scenes.labels[i : i + 2, 0], {"masks": scenes.masks[i : i + 2, 0]})
            for i in (0, 2)
        ]
        metrics = ["ClassificationMetric", "Localization"]
        expected = evaluate(load_model(), batches, [GradCAM, RandomCAM], metrics, logits_fn=torch.sigmoid)
        assert values(Path("out/table.json").read_text()) == values(expected.to_json())
        first, second = csv.DictReader(io.StringIO(Path("out/table.csv").read_text()))
        assert float(first["energy"]) == expected["GradCAM", "energy"]
        assert float(second["avg_drop"]) == expected["RandomCAM", "avg_drop"]
        for text in (captured.out, Path("out/table.txt").read_text(), Path("out/table.md").read_text()):
            assert f"{expected['GradCAM', 'energy']:.4f}" in text
            assert expected.summary in text
        assert captured.out.endswith("-> out/table.txt\n")
        assert not list(place.rglob("*.partial"))

    def test_json_is_all_that_is_printed(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = printed(capsys, "--demo", "--limit", "2", *QUICK)
        assert (found["num_samples"], list(found["methods"])) == (2, ["GradCAM", "RandomCAM"])

    @pytest.mark.parametrize("plain", [False, True])
    def test_colour_on_a_terminal(
        self, plain: bool, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        if plain:
            monkeypatch.setenv("NO_COLOR", "1")
        assert cli.main(["evaluate", "--demo", "--limit", "2", *QUICK]) == 0
        captured = capsys.readouterr()
        assert ("\x1b[1;32m" in captured.out) is not plain
        assert "batch 1 of 1, GradCAM" in captured.err

    def test_without_the_handwriting(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from torchcam.demo import data

        data._load_handwriting.cache_clear()
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        assert 'pip install -e ".[' in fails(capsys, "--demo", *QUICK)


class TestFolders:
    def test_numbers(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        named = printed(capsys, "data", "--model-factory", f"{mine}:named", *QUICK)
        files = sorted(place.glob("data/*/*.png"))
        images = torch.stack([ToTensor()(Image.open(path)) for path in files])
        labels = torch.tensor([int(path.parent.name) for path in files])
        batches = [(images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]

        def softmax(scores: torch.Tensor) -> torch.Tensor:
            return scores.softmax(1)

        expected = evaluate(load_model(), batches, [GradCAM, RandomCAM], ["classification"], logits_fn=softmax)
        assert named == values(expected.to_json())
        assert named["agreement"] >= 0.6
        options = ["--model-factory", f"{mine}:unnamed", *QUICK, "--workers", "1", "--chunk-size", "3"]
        assert printed(capsys, "data", *options) == named, "by the folders' numbers"

    def test_of_a_model_of_grey_images(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        told = printed(capsys, "data", "--model-factory", f"{mine}:grey", *QUICK)
        assert told["num_samples"] == 5

    def test_predicted_and_limit(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        for path in place.glob("data/*/*.png"):
            path.rename(place / "data" / path.name)
        (place / "data" / "notes.txt").write_text("no image")
        options = ["data", "--model-factory", f"{mine}:named", *QUICK, "--class-source", "predicted"]
        found = printed(capsys, *options)
        assert (found["num_samples"], found["agreement"]) == (5, 1.0)
        assert printed(capsys, *options, "--limit", "2")["num_samples"] == 2

    def test_class_map(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["data", "--model-factory", f"{mine}:named", *QUICK]
        expected = printed(capsys, *options)
        (place / "map.json").write_text(json.dumps({f"the {name}": int(name) for name in CLASS_NAMES}))
        for folder in sorted(place.glob("data/*")):
            folder.rename(folder.with_name(f"the {folder.name}"))
        assert printed(capsys, *options, "--class-map", "map.json") == expected
        assert "the folder 'the " in fails(capsys, *options)
        (place / "map.json").write_text("[1]")
        assert "--class-map 'map.json' must hold the numbers" in fails(capsys, *options, "--class-map", "map.json")
        (place / "map.json").write_text("{")
        assert "cannot be read as JSON" in fails(capsys, *options, "--class-map", "map.json")
        (place / "map.json").write_text("{}")
        assert "does not name the class of the folder 'the " in fails(capsys, *options, "--class-map", "map.json")

    def test_a_file_that_is_no_image(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        first = min(place.glob("data/*/*.png"))
        (first.parent / "zzz.png").write_text("no image")
        for workers in ("0", "1"):
            message = fails(capsys, "data", "--model-factory", f"{mine}:named", *QUICK, "--workers", workers)
            assert message.startswith(f"torchcam: error: IMAGE: 'data/{first.parent.name}/zzz.png' is not an image")

    def test_a_subfolder_without_images(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        (place / "data" / "zero").mkdir()
        (place / "map.json").write_text(json.dumps({path.name: 0 for path in place.glob("data/*")}))
        message = fails(capsys, "data", "--model-factory", f"{mine}:named", *QUICK, "--class-map", "map.json")
        assert "DIR 'data': the subfolder 'zero' holds no images" in message

    def test_subfolders_may_be_links(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--model-factory", f"{mine}:named", *QUICK]
        expected = printed(capsys, "data", *options)
        (place / "links").mkdir()
        for folder in place.glob("data/*"):
            (place / "links" / folder.name).symlink_to(folder, target_is_directory=True)
        assert printed(capsys, "links", *options) == expected


def classifier(names: Sequence[str] | None, outputs: int = 3) -> Classifier:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))
    model(torch.zeros(1, 3, 2, 2))
    return Classifier(model, "net", lambda _: torch.zeros(3, 2, 2), names)


class TestClasses:
    @pytest.mark.parametrize(
        ("folders", "names", "expected", "how"),
        [
            (["Golden_Retriever", "cat"], ["cat", "dog", "golden retriever"], [2, 0], "names"),
            (["0", "02"], ["cat", "dog", "cow"], [0, 2], "numbers"),
            (["1", "0"], ["1", "0", "2"], [0, 1], "names"),
            (["n00000001", "n00000005", "n00000009"], ["cat", "dog", "cow"], [0, 1, 2], "WordNet"),
            (["a", "b", "c"], None, [0, 1, 2], "order of the folders' names"),
            (["2", "1"], None, [2, 1], "numbers"),
        ],
    )
    def test_found(self, folders: list[str], names: list[str] | None, expected: list[int], how: str) -> None:
        found, said = match_classes(folders, classifier(names))
        assert [found[folder] for folder in folders] == expected
        assert how in said

    @pytest.mark.parametrize(
        ("folders", "names", "message"),
        [
            (
                ["cat", "cows", "sheep"],
                ["cat", "dog", "cow"],
                "'cows' is not the name of one of the 3 classes of net",
            ),
            (["crane"], ["crane", "crane", "cow"], "'crane' is the name of several of the 3 classes of net"),
            (["n00000001"], ["cat", "dog", "cow"], "'n00000001' is not the name"),
            (["3"], ["cat", "dog", "cow"], "'3' is not the name"),
            (["a", "b"], None, "'a' is not the name of one of the 3 classes of net, whose names are not known"),
        ],
    )
    def test_not_found(self, folders: list[str], names: list[str] | None, message: str) -> None:
        with pytest.raises(UserError, match=f"{message}.*--class-map FILE.*--class-source predicted"):
            match_classes(folders, classifier(names))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name either a folder of images or --demo"),
            (["data", "--demo"], "name either a folder of images or --demo"),
            (["--demo", "--arch", "resnet18"], "--demo has a model and classes of its own: leave out --arch"),
            (
                ["--demo", "--methods", "GardCAM"],
                "'GardCAM' is not a method of torchcam; did you mean 'GradCAM'",
            ),
            (
                ["--demo", "--metrics", "ROAR"],
                "--metrics names 'ROAR', which is not in torchcam.metrics; did you mean 'ROAD'",
            ),
            (["--demo", "--methods", "LeGrad"], "--target-layer must name the transformer block(s) that LeGrad reads"),
            (["--demo", "--target-layer", "layer9"], "--target-layer 'layer9' is not a module of DemoNet"),
            (["--demo", "--limit", "0"], "--limit must be at least 1, got 0"),
            (["--demo", "--batch-size", "0"], "--batch-size must be at least 1"),
            (["--demo", "--timeout", "0"], "--timeout must be positive, got 0"),
            (["--demo", "--device", "tpu"], "--device 'tpu' cannot be used here"),
            (["--demo", "--output", "x.png"], "--output 'x.png' must end in .json, .csv, .md, .txt"),
            (["--demo", "--output", "there.csv"], "'there.csv' exists: pass --overwrite"),
            (["--demo", "--scores", "log"], "argument --scores: invalid choice: 'log'"),
            (["--demo", "--checkpoint", "there.csv"], "--checkpoint 'there.csv' is not a folder"),
            (["nowhere"], "DIR 'nowhere' is not a folder"),
            (["there.csv"], "DIR 'there.csv' is not a folder"),
            (
                ["empty", "--arch", "resnet18", "--weights", "none"],
                "has no subfolder for each class: pass",
            ),
            (["empty", "--class-source", "predicted", "--arch", "resnet18", "--weights", "none"], "holds no images"),
        ],
    )
    def test_one_line(
        self, arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "there.csv").write_text("mine")
        (place / "empty").mkdir()
        before = sorted(place.rglob("*"))
        assert message in fails(capsys, *arguments)
        assert sorted(place.rglob("*")) == before
        assert (place / "there.csv").read_text() == "mine"

    def test_what_the_library_says_names_the_method(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = fails(capsys, "--demo", "--methods", "LeGrad", "--target-layer", "layer4", "--limit", "2")
        assert "(this came up in the method LeGrad" in message

    def test_masks_that_a_folder_has_not(self, place: Path, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
        message = fails(capsys, "data", "--model-factory", f"{mine}:named", "--metrics", "Localization")
        assert "`masks`" in message
        assert "the metric Localization of the method GradCAM, batch 1" in message


class TestInterruptions:
    def test_ctrl_c(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--demo", "--limit", "4", "--batch-size", "1", "--methods", "GradCAM", "--metrics"]
        arguments += ["deletion-insertion,road", "--output", "table.json"]
        code = (  # the second batch takes for ever, and says so; a background job would inherit an ignored Ctrl-C
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "import pathlib, runpy, time; from torchcam.methods import GradCAM\n"
            "take, taken = GradCAM.compute_cams, []\n"
            "def stuck(*args, **kwargs):\n"
            "    taken.append(1)\n"
            "    if len(taken) == 2: pathlib.Path('stuck').touch(); time.sleep(300)\n"
            "    return take(*args, **kwargs)\n"
            "GradCAM.compute_cams = stuck; runpy.run_module('torchcam', run_name='__main__')\n"
        )
        command = [sys.executable, "-c", code, "evaluate", *arguments]
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        state, stuck = place / "table.json.partial" / "process-0-of-1.pt", place / "stuck"
        deadline = time.monotonic() + 600
        while not stuck.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=100)
        assert process.returncode == 130
        found = re.fullmatch(
            r"torchcam: interrupted; (\d+) of 4 batches were finished, and are kept in 'table.json.partial'; the same "
            r"command goes on from there \(--restart begins anew\)\n",
            message,
        )
        assert found is not None, message
        _, _, payload = state.read_bytes().partition(b"\n")  # after a line with the checksum
        assert torch.load(io.BytesIO(payload), weights_only=True)["finished"] == int(found[1]) == 1
        assert not (place / "table.json").exists()

        other = fails(capsys, *arguments, "--limit", "3")
        assert "settings.demo was 4, is 3" in other
        assert "pass --restart to begin anew" in other
        assert cli.main(["evaluate", *arguments]) == 0
        assert not state.parent.exists()
        whole = printed(capsys, *arguments[:-2])
        assert values((place / "table.json").read_text()) == whole

    def test_restart(self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        taken: list[int] = []
        take = GradCAM.compute_cams

        def interrupted(*arguments: Any, **options: Any) -> Any:
            taken.append(1)
            if len(taken) == 2:
                raise KeyboardInterrupt
            return take(*arguments, **options)

        monkeypatch.setattr(GradCAM, "compute_cams", interrupted)
        arguments = ["evaluate", "--demo", "--limit", "6", *QUICK]
        assert cli.main(arguments) == 130
        assert "1 of 3 batches were finished, and are kept in 'torchcam-evaluate.partial'" in capsys.readouterr().err
        assert cli.main([*arguments, "--restart"]) == 0
        assert len(taken) == 2 + 3
        assert not (place / "torchcam-evaluate.partial").exists()


class TestProcesses:
    def test_torchrun(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--demo", "--limit", "5", *QUICK]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "torchcam", "evaluate", *arguments, "--json", "--output", "table.csv"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr
        shared, alone = values(done.stdout), printed(capsys, *arguments)
        assert (shared["num_samples"], shared["agreement"]) == (5, alone["agreement"])
        for name, entry in alone["methods"].items():
            assert shared["methods"][name]["measured"] == {"ClassificationMetric": 5}
            for metric, numbers in entry["values"].items():
                assert shared["methods"][name]["values"][metric] == pytest.approx(numbers, abs=1e-6)
        assert (place / "table.csv").read_text().count("\n") == 3
        assert not list(place.rglob("*.partial"))
