"""The page of an exported model: what is in the file, and, in a browser, what it computes."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tests.browsers import chromium
from torchcam.demo import load_model, sample_images
from torchcam.demo.data import CLASS_NAMES
from torchcam.export import Exported, export
from torchcam.export._preprocessing import read_preprocessing
from torchcam.methods import GradCAM

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EVIL = "</script><script>document.title = 'gone'</script>"
SIDE = 96


@pytest.fixture(scope="module")
def exported() -> Exported:
    example = sample_images()[0].to_tensor()
    return export(load_model(), "GradCAM", "layer4", example=example, class_names=[*CLASS_NAMES[:9], EVIL])


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A folder that looks like the package."""
    folder = tmp_path / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    script = "var a=1;/* </script> */export{a as env,a as Tensor};\n//# sourceMappingURL=a.map\n"
    (folder / "ort.wasm.bundle.min.mjs").write_text(script)
    (folder / "ort-wasm-simd-threaded.wasm").write_bytes(b"wasm")
    return folder.parent


def part(page: str, name: str) -> bytes:
    (text,) = re.findall(rf'<script type="application/octet-stream" id="{name}">(.*?)</script>', page, re.DOTALL)
    return gzip.decompress(base64.b64decode(text))


class TestFile:
    def test_one_file_without_addresses(self, exported: Exported, pretended: Path, tmp_path: Path) -> None:
        page = exported.save(tmp_path / "page.html", runtime=pretended).read_text(encoding="utf-8")
        assert part(page, "wasm") == b"wasm"
        assert part(page, "model") == exported.save(tmp_path / "model.onnx").read_bytes()
        assert "globalThis.torchcamRuntime = {env: a, Tensor: a};" in page
        assert page.count("<script") == page.count("</script") == 5
        assert "default-src 'none'" in page
        assert not re.search(r"https?:|sourceMappingURL|@@|(src|href|action)=\"(?!data:)", page)
        (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        assert json.loads(text)["about"] == exported.metadata
        assert exported.save(tmp_path / "again.html", runtime=pretended).read_text(encoding="utf-8") == page

    def test_refusals(self, exported: Exported, pretended: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="a page needs `runtime`"):
            exported.save(tmp_path / "page.html")
        with pytest.raises(FileNotFoundError, match=r"has no ort\.wasm\.bundle\.min\.mjs: name the folder of the npm"):
            exported.save(tmp_path / "page.html", runtime=tmp_path)
        (pretended / "dist" / "ort.wasm.bundle.min.mjs").write_text("var a=1;")
        with pytest.raises(ValueError, match="is not a script of onnxruntime-web that is known"):
            exported.save(tmp_path / "page.html", runtime=pretended)
        unknown = export(
            load_model(), example=sample_images()[0].to_tensor(), target_layer="layer4", transform=lambda image: image
        )
        with pytest.raises(ValueError, match="`transform` has a step"):
            unknown.save(tmp_path / "page.html", runtime=pretended)
        assert not list(tmp_path.glob("*.html"))


class TestPreprocessing:
    def test_transforms(self) -> None:
        from torchvision import transforms
        from torchvision.transforms._presets import ImageClassification

        plain = read_preprocessing(None, (3, 96, 64))
        assert plain == {"resize": [96, 64], "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}
        preset = read_preprocessing(ImageClassification(crop_size=224, resize_size=232), (3, 224, 224))
        assert preset["resize"] == 232
        assert preset["mean"] == [0.485, 0.456, 0.406]
        composed = transforms.Compose(
            [
                transforms.Resize((40, 50), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(32),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )
        wanted = {"resize": [40, 50], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3}
        assert read_preprocessing(composed, (3, 32, 32)) == wanted
        with pytest.raises(ValueError, match="a step RandomRotation that other runtimes cannot follow"):
            read_preprocessing(transforms.RandomRotation(3), (3, 32, 32))
        with pytest.raises(ValueError, match="resizes by 'nearest'"):
            read_preprocessing(transforms.Resize(9, transforms.InterpolationMode.NEAREST), (3, 32, 32))


@pytest.fixture(scope="module")
def runtime() -> Path:
    folder = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web"))
    if not folder.is_dir():
        pytest.skip("onnxruntime-web is not there: unpack `npm pack onnxruntime-web`, and set ONNXRUNTIME_WEB to it")
    return folder


class Page:
    """The page in a browser, and what it has sent for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.goto(file.as_uri())
        self.wait("globalThis.torchcam?.ready")

    def wait(self, condition: str) -> None:
        """Wait for a condition; the page's policy allows no function that Playwright would poll with."""
        for _ in range(600):
            if self.page.evaluate(f"Boolean({condition})"):
                return
            self.page.wait_for_timeout(100)
        pytest.fail(f"{condition} did not become true: {self.page.inner_text('#status')}")

    def found(self, runs: int) -> tuple[Tensor, int, Tensor, Tensor]:
        """The input, the class, the scores and the map, after more runs than there were."""
        self.wait(f"torchcam.runs > {runs} && !torchcam.busy")
        state = (
            "({input: Array.from(torchcam.input), shown: torchcam.shown, scores: torchcam.scores, map: torchcam.map})"
        )
        data = self.page.evaluate(state)
        side = round(len(data["map"]) ** 0.5)
        pixels = round((len(data["input"]) / 3) ** 0.5)
        images = torch.tensor(data["input"]).reshape(1, 3, pixels, pixels)
        return images, data["shown"], torch.tensor(data["scores"]), torch.tensor(data["map"]).reshape(1, side, side)

    @property
    def runs(self) -> int:
        return int(self.page.evaluate("torchcam.runs || 0"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture(scope="module")
def page_file(exported: Exported, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.save(tmp_path_factory.mktemp("page") / "page.html", runtime=runtime)


def check_map(model: torch.nn.Module, layer: str, images: Tensor, shown: int, scores: Tensor, cam: Tensor) -> None:
    with GradCAM(model, layer) as extractor, torch.inference_mode():
        wanted_scores = model(images)
        (wanted,) = extractor(shown, wanted_scores)
    torch.testing.assert_close(scores, wanted_scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cam, wanted, rtol=0, atol=1e-4)
    assert wanted.amax() == 1


class TestInTheBrowser:
    def test_upload_draw_and_keyboard(self, browser: Any, page_file: Path, tmp_path: Path) -> None:
        page = Page(browser, page_file, viewport={"width": 1280, "height": 900})
        model = load_model()
        sample = sample_images()[0]
        enlarged = sample.image.resize((311, 240), Image.Resampling.BICUBIC)
        enlarged.save(tmp_path / "picture.png")

        runs = page.runs
        page.page.set_input_files("#file", tmp_path / "picture.png")
        images, shown, scores, cam = page.found(runs)
        pixels = np.asarray(enlarged.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        assert np.abs(images[0].permute(1, 2, 0).numpy() - pixels).max() <= 1 / 255 + 1e-6
        assert shown == int(scores.argmax())
        check_map(model, "layer4", images, shown, scores, cam)

        runs = page.runs
        page.page.focus("#choices input:checked")
        page.page.keyboard.press("ArrowDown")
        images, second, scores, cam = page.found(runs)
        assert second == int(scores.argsort(descending=True)[1])
        assert page.page.evaluate("document.activeElement.value") == str(second)
        check_map(model, "layer4", images, second, scores, cam)

        page.page.click("#clear")
        box = page.page.locator("#pad").bounding_box()
        runs = page.runs
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
        page.page.mouse.move(*at(0.35, 0.3))
        page.page.mouse.down()
        for place in ((0.6, 0.3), (0.5, 0.5), (0.45, 0.7)):
            page.page.mouse.move(*at(*place), steps=8)
        page.page.mouse.up()
        images, shown, scores, cam = page.found(runs)
        assert images.amax() == 1
        check_map(model, "layer4", images, shown, scores, cam)
        fetched = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
        assert fetched == [page_file.as_uri()]
        assert not page.problems

    def test_phone(self, browser: Any, page_file: Path) -> None:
        page = Page(browser, page_file, viewport={"width": 390, "height": 800})
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        rights = (
            "[...document.querySelectorAll('button, select, input')].map((one) => one.getBoundingClientRect().right)"
        )
        assert max(page.page.evaluate(rights)) <= 390

    def test_file_that_is_no_picture(self, browser: Any, page_file: Path, tmp_path: Path) -> None:
        page = Page(browser, page_file)
        (tmp_path / "text.png").write_text("no picture")
        page.page.set_input_files("#file", tmp_path / "text.png")
        page.wait("document.querySelector('#status').textContent.includes('not a picture')")
        assert page.page.title() == "GradCAM of DemoNet"

    def test_resize_and_crop_of_a_preset(self, browser: Any, runtime: Path, tmp_path: Path) -> None:
        """A network as those of torchvision take their images: shorter side, centre crop, normalisation."""
        from torchvision.transforms._presets import ImageClassification

        transform = ImageClassification(crop_size=64, resize_size=75)
        picture = Image.new("RGB", (180, 131), (200, 90, 40))
        ImageDraw.Draw(picture).ellipse((40, 20, 130, 110), fill=(20, 120, 220))
        picture.save(tmp_path / "picture.png")
        images = transform(picture).unsqueeze(0)
        file = export(load_model(), "GradCAM", "layer4", example=images, transform=transform).save(
            tmp_path / "page.html", runtime=runtime
        )
        page = Page(browser, file)
        runs = page.runs
        page.page.set_input_files("#file", tmp_path / "picture.png")
        found, shown, scores, cam = page.found(runs)
        assert float((found - images).abs().max()) <= 1 / 255 / 0.224 + 1e-5
        check_map(load_model(), "layer4", found, shown, scores, cam)

    def test_resnet18(self, browser: Any, runtime: Path, tmp_path: Path) -> None:
        """A network of a usual size, with the transform that its weights come with."""
        from torchvision.models import ResNet18_Weights, resnet18

        torch.manual_seed(0)
        model, transform = resnet18(weights=None).eval(), ResNet18_Weights.DEFAULT.transforms()
        sample_images()[1].image.resize((320, 250), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as picture:
            images = transform(picture).unsqueeze(0)
        file = export(model, "GradCAM", "layer4", example=images, transform=transform).save(
            tmp_path / "resnet18.html", runtime=runtime
        )
        page = Page(browser, file, viewport={"width": 390, "height": 800})
        runs = page.runs
        page.page.set_input_files("#file", tmp_path / "picture.png")
        found, shown, scores, cam = page.found(runs)
        assert float((found - images).abs().max()) <= 1 / 255 / 0.224 + 1e-5
        check_map(model, "layer4", found, shown, scores, cam)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        fetched = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
        assert fetched == [file.as_uri()]
        assert not page.problems
        end = "document.querySelector('#scale').getContext('2d').getImageData(254, 0, 1, 1).data"
        assert page.page.evaluate(f"Array.from({end})") == [253, 231, 36, 255]  # the last colour of viridis
