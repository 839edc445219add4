"""The page of `to_html`: what is in the file, and, in a browser, what it does."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torchvision import transforms

from tests.browsers import chromium
from torchcam._page import _fitted_map
from torchcam.demo import DemoNet, load_model, sample_images
from torchcam.explain import Explanations, MethodMaps, PredictionExplanation, explain
from torchcam.utils import resize_map

EVIL = "</script><script>document.title = 'gone'</script><!-- & \"x\" 'y'"
SIDE = 576  # of the pictures in the page: 96 pixels, enlarged
NAMES = [f"digit {index}" for index in range(9)] + [EVIL]


@pytest.fixture(scope="module")
def model() -> DemoNet:
    return load_model()


@pytest.fixture(scope="module")
def result(model: DemoNet) -> PredictionExplanation:
    """Three methods, one of them signed, on three classes; the name of one is an attack."""
    return explain(
        model,
        sample_images()[0].to_tensor(),
        method=["GradCAM", "LayerCAM", "EigenCAM"],
        target_layer={"GradCAM": "layer4", "LayerCAM": ["layer2", "layer3"], "EigenCAM": "layer4"},
        method_kwargs={"GradCAM": {"relu": False}},
        class_names=NAMES,
        class_idx=[6, 2, 9],
        expected_class_idx=2,
        to_probabilities=torch.sigmoid,
    )


@pytest.fixture(scope="module")
def batch() -> Explanations:
    return explain(
        load_model(),
        torch.cat([sample.to_tensor() for sample in sample_images()[:3]]),
        target_layer="layer4",
        class_names=NAMES,
        class_idx=[[6, 2], [4], [6, 2, 3]],
    )


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


class TestFile:
    def test_is_one_file_without_addresses(self, result: PredictionExplanation, tmp_path: Path) -> None:
        page = result.to_html(tmp_path / "new" / "page.html")
        assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page
        assert "http:" not in page
        assert "https:" not in page
        assert not re.search(r"(src|href|action)=\"(?!data:)", page)
        assert "default-src 'none'" in page
        assert len(page) < 100_000
        result.to_html(tmp_path / "new" / "page.html", title="again")
        assert "<title>again</title>" in (tmp_path / "new" / "page.html").read_text()

    def test_names_stay_names(self, result: PredictionExplanation) -> None:
        page = result.to_html(title=EVIL)
        assert page.count("<script") == page.count("</script") == 2
        assert "<!--" not in page
        assert data_of(page)["items"][0]["classes"][2]["name"] == f"{EVIL} (9)"

    def test_holds_the_maps(self, result: PredictionExplanation) -> None:
        (item,) = data_of(result.to_html())["items"]
        assert [entry["name"] for entry in item["classes"]] == [result.name_of(key) for key in result.cams]
        assert [entry["value"] for entry in item["classes"]] == [result.value_of(key) for key in result.cams]
        assert [entry["share"] for entry in item["classes"]] == pytest.approx(
            [float(result.probabilities[0, key]) for key in result.cams]
        )
        assert [entry["tags"] for entry in item["classes"]] == [["predicted"], ["expected"], []]
        with Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2]))) as image:
            assert np.array_equal(np.asarray(image), np.asarray(result.image))
        for method, maps in zip(item["methods"], result.results.values(), strict=True):
            assert method["signed"] is maps.signed
            for entry, key in zip(method["maps"], result.cams, strict=True):
                levels = np.frombuffer(base64.b64decode(entry["values"]), dtype="<u2").reshape(entry["shape"])
                share = (maps.values(key) + 1) / 2 if maps.signed else maps.values(key)
                assert np.abs(levels / 65534 - share).max() <= 0.5 / 65534 + 1e-7

    def test_colormaps(self, result: PredictionExplanation) -> None:
        data = data_of(result.to_html())
        assert data["colormaps"][0]["name"] == "viridis"
        assert "jet" in [entry["name"] for entry in data["colormaps"]]
        only = data_of(result.to_html(colormap="jet", alpha=0.25))
        assert [entry["name"] for entry in only["colormaps"]] == ["jet"]
        assert only["signed"] is None
        assert only["opacity"] == 75
        table = np.frombuffer(base64.b64decode(only["colormaps"][0]["table"]), dtype=np.uint8).reshape(-1, 4)
        shares = np.linspace(0, 1, 255)
        assert np.array_equal(table[:, :3], colormaps["jet"](shares, bytes=True)[:, :3])
        assert np.abs(table[:, 3] - 255 * np.minimum(1, 1.5 * shares)).max() <= 1  # nothing at 0

    def test_what_is_undefined_stays_so_in_a_large_map(self) -> None:
        values = np.full((1000, 1000), 0.5, np.float32)
        values[:, :500] = np.nan
        small = _fitted_map(values)
        assert small.shape == (768, 768)
        assert np.isnan(small[:, :380]).all()
        np.testing.assert_allclose(small[:, 390:], 0.5, atol=1e-6)
        assert np.isnan(_fitted_map(np.full((1000, 1000), np.nan, np.float32))).all()

    def test_large_pictures_and_maps_are_fitted_map(self) -> None:
        fine = torch.rand(900, 1200)
        maps = MethodMaps("GradCAM", ("x",), {}, {0: (fine,)}, {0: fine})
        image = Image.new("RGB", (3000, 2000), "teal")
        result = PredictionExplanation(
            torch.zeros(1, 2),
            0,
            None,
            maps.cams,
            "GradCAM",
            ("x",),
            "m.M",
            (1, 3, 900, 1200),
            {},
            results={"a": maps},
            image=image,
        )
        (item,) = data_of(result.to_html())["items"]
        assert item["size"] == [512, 768]
        assert item["methods"][0]["maps"][0]["shape"] == [576, 768]

    def test_names_of_inputs(self, batch: Explanations) -> None:
        assert [item["name"] for item in data_of(batch.to_html(names=["a", "b", EVIL]))["items"]] == ["a", "b", EVIL]
        with pytest.raises(ValueError, match="`names` must hold one name for each of the 3 inputs, got 1"):
            batch.to_html(names=["a"])

    def test_the_verdict_of_trust_is_there_once_it_was_asked_for(self, result: PredictionExplanation) -> None:
        asked = replace(result)  # reports of its own
        assert data_of(asked.to_html())["items"][0]["classes"][0]["trust"] is None
        report = asked.trust(2)
        told = [entry["trust"] for entry in data_of(asked.to_html())["items"][0]["classes"]]
        assert told[0] is told[2] is None
        assert told[1] == {"verdict": report.verdict, "headline": report.headline, "reasons": list(report[0].reasons)}
        asked.trust(6, methods=["LayerCAM"])  # a verdict on another map than that of the first method
        assert data_of(asked.to_html())["items"][0]["classes"][0]["trust"] is None

    @pytest.mark.parametrize("alpha", [1, -0.1, True, "0.5"])
    def test_alpha_out_of_range(self, alpha: Any, result: PredictionExplanation) -> None:
        with pytest.raises(ValueError, match="`alpha` must be a number"):
            result.to_html(alpha=alpha)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, started once."""
    yield from chromium()


class Opened:
    """A page in the browser, and what it did besides."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = path.as_uri()
        self.page.goto(f"{self.address}#{fragment}")
        self.settle()

    def check(self) -> None:
        fetched = [url.partition("#")[0] for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert fetched == [self.address]
        assert self.complaints == []
        self.context.close()

    def settle(self) -> None:
        """Wait until all is drawn, and the address holds what is shown."""
        self.page.wait_for_timeout(250)

    def pixels(self, pane: int = 0, what: str = ".map") -> np.ndarray[Any, Any]:
        """What a canvas of a pane holds, (height, width, 3)."""
        return self.canvas(self.page.locator(".pane").nth(pane).locator(f".stages {what} canvas"))

    def canvas(self, locator: Any) -> np.ndarray[Any, Any]:
        self.settle()
        data = locator.evaluate("canvas => canvas.toDataURL()")
        return as_array(base64.b64decode(data.partition(",")[2]))

    def png(self) -> np.ndarray[Any, Any]:
        """The picture that a click on the button downloads."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Download PNG").click()
        assert download.value.suggested_filename.endswith(".png")
        return as_array(Path(download.value.path()).read_bytes())

    def tool(self, label: str) -> Any:
        return self.page.get_by_label(label, exact=True)

    def choose(self, kind: str, name: str, pane: int = 0) -> None:
        group = self.page.locator(".pane").nth(pane).locator("fieldset").nth(["Class", "Method"].index(kind))
        group.get_by_role("radio", name=name).check()

    def caption(self, pane: int = 0) -> str:
        return str(self.page.locator(".pane").nth(pane).locator("figcaption").inner_text())

    def point(self, x: float, y: float, pane: int = 0) -> str:
        """Move the pointer to a place of what is in sight, as shares, and return what the page says of it."""
        box = self.page.locator(".map").nth(pane).bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return str(self.page.locator(".probe").nth(pane).inner_text())


def as_array(png: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


@pytest.fixture
def opened(browser: Any, result: PredictionExplanation, tmp_path: Path) -> Iterator[Opened]:
    result.to_html(tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    yield page
    page.check()


def assert_same_picture(found: np.ndarray[Any, Any], expected: Any, most: float = 0.9999) -> None:
    """Check that pixels differ by no more than rounding; one in a thousand may be in the next step of a colormap."""
    expected = np.asarray(expected, dtype=int)
    assert found.shape == expected.shape
    assert np.mean(np.abs(found - expected).max(-1) <= 4) >= most


def picture_of(result: PredictionExplanation) -> np.ndarray[Any, Any]:
    assert result.image is not None
    return np.asarray(result.image.resize((SIDE, SIDE), Image.Resampling.NEAREST), dtype=int)


def numbers_of(result: PredictionExplanation, key: int, method: str) -> np.ndarray[Any, Any]:
    """The map as it is drawn."""
    return np.clip(resize_map(result.results[method].values(key), (SIDE, SIDE)), -1, 1)


class TestPictures:
    """What the page draws is what `overlay` draws."""

    def test_every_map_in_every_look(self, opened: Opened, result: PredictionExplanation) -> None:
        assert opened.page.title() == result.title
        assert opened.caption().startswith("GradCAM of digit 6 (6) · 99.5%")
        assert_same_picture(opened.pixels(), result.overlay())
        labels = {6: "digit 6", 2: "digit 2", 9: EVIL}
        for method in ("LayerCAM", "EigenCAM", "GradCAM"):
            opened.choose("Method", method)
            for key, label in labels.items():
                opened.choose("Class", label)
                assert_same_picture(opened.pixels(), result.overlay(key, method))
                assert opened.caption().startswith(f"{method} of {result.name_of(key)}")
                canvas = opened.page.locator(".map canvas").first
                assert canvas.get_attribute("aria-label") == f"{method} map of {result.name_of(key)}"
        opened.choose("Method", "LayerCAM")
        opened.tool("Colours").select_option("jet")
        assert_same_picture(opened.pixels(), result.overlay(9, "LayerCAM", colormap="jet"))
        opened.tool("Picture in grey").check()
        assert_same_picture(opened.pixels(), result.overlay(9, "LayerCAM", colormap="jet", grey=True))
        for value in (0, 25, 100):
            opened.tool("Map opacity").fill(str(value))
            assert opened.page.locator("output[for=opacity]").inner_text() == f"{value}%"
            alpha = 1 - value / 100 - 1e-9 * (value == 0)
            assert_same_picture(opened.pixels(), result.overlay(9, "LayerCAM", colormap="jet", grey=True, alpha=alpha))

    def test_photos_are_enlarged_and_views_are_placed_alike(self, browser: Any, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        pixels = np.kron(rng.integers(0, 256, (10, 20, 3)), np.ones((9, 9, 1))).astype(np.uint8)  # 180 × 90
        crop = transforms.Compose([transforms.CenterCrop(90), transforms.ToTensor()])
        photo = Image.fromarray(pixels)
        found = explain(load_model(), photo, transform=crop, image=photo, target_layer="layer4")
        found.to_html(tmp_path / "page.html")
        opened = Opened(browser, tmp_path / "page.html")
        assert opened.pixels().shape == (270, 540, 3)
        assert_same_picture(opened.pixels(), found.overlay(), most=0.98)  # a JPEG
        assert "undefined" in opened.point(0.05, 0.5)
        opened.check()

    def test_two_maps_side_by_side(self, opened: Opened, result: PredictionExplanation) -> None:
        assert opened.page.locator(".pane:visible").count() == 1
        opened.tool("Show").select_option("two maps")
        assert opened.page.locator(".pane:visible").count() == 2
        assert opened.caption(1).startswith("LayerCAM of digit 6")
        opened.choose("Class", "digit 2", pane=1)
        assert opened.caption(0).startswith("GradCAM of digit 6")
        assert_same_picture(opened.pixels(1), result.overlay(2, "LayerCAM"))
        first, second = (opened.page.locator(".map").nth(pane).bounding_box() for pane in (0, 1))
        assert first["y"] == second["y"]
        assert first["x"] + first["width"] < second["x"]
        png = opened.png()
        assert png.shape == (SIDE, 2 * SIDE + 10, 3)
        assert np.array_equal(png[:, :SIDE], opened.pixels(0))
        assert np.array_equal(png[:, SIDE + 10 :], opened.pixels(1))

    def test_all_maps_in_a_grid(self, opened: Opened, result: PredictionExplanation) -> None:
        opened.tool("Show").select_option("all maps")
        table = opened.page.get_by_role("table")
        heads = table.get_by_role("columnheader").all_inner_texts()
        assert [head.split()[0] for head in heads] == list(result.methods)
        drawn = table.locator("canvas")
        assert drawn.count() == 1 + 9
        small = result.image.resize((256, 256), Image.Resampling.NEAREST)
        assert_same_picture(opened.canvas(drawn.first), small, most=0.95)
        expected = [result.overlay(key, method, image=small) for key in result.cams for method in result.methods]
        for place in range(9):
            found = opened.canvas(table.get_by_role("button").nth(place).locator("canvas"))
            shown = np.asarray(expected[place].resize((256, 256), Image.Resampling.BICUBIC), dtype=int)
            assert np.abs(found - shown).mean() < 3
            others = [np.abs(found - np.asarray(one.resize((256, 256)), dtype=int)).mean() for one in expected]
            assert np.argmin(others) == place or min(others) > others[place] - 0.05
        png = opened.png()
        assert png.shape[1] == 4 * 256 + 3 * 10
        corner = opened.canvas(drawn.first)
        assert np.array_equal(png[66 : 66 + 256, :256], corner)
        table.get_by_role("button", name=f"LayerCAM map of {result.name_of(2)}").click()
        assert opened.caption().startswith("LayerCAM of digit 2")
        assert_same_picture(opened.pixels(), result.overlay(2, "LayerCAM"))


class TestTools:
    def test_the_untouched_picture_beside_and_under_the_map(
        self, opened: Opened, result: PredictionExplanation
    ) -> None:
        picture, drawn = picture_of(result), opened.pixels()
        opened.tool("Untouched picture").select_option("beside")
        assert np.array_equal(opened.pixels(what="> :first-child"), picture)
        assert np.array_equal(opened.pixels(), drawn)
        assert opened.png().shape == (SIDE, 2 * SIDE + 10, 3)
        opened.tool("Untouched picture").select_option("swipe")
        for value in (0, 40, 100):
            opened.tool("Swipe").fill(str(value))
            cut, found = round(SIDE * value / 100), opened.pixels()
            assert np.array_equal(found[:, :cut], picture[:, :cut])
            assert np.array_equal(found[:, cut + 1 :], drawn[:, cut + 1 :])
        opened.tool("Untouched picture").select_option("hidden")
        assert np.array_equal(opened.pixels(), drawn)

    @pytest.mark.parametrize(("key", "method"), [(6, "GradCAM"), (2, "LayerCAM")])
    def test_the_threshold(self, key: int, method: str, opened: Opened, result: PredictionExplanation) -> None:
        opened.choose("Method", method)
        opened.choose("Class", f"digit {key}")
        drawn, picture = opened.pixels(), picture_of(result)
        opened.tool("Threshold").fill("0.4")
        beyond = np.abs(numbers_of(result, key, method)) >= 0.4
        assert f"{100 * beyond.mean():.1f}% of the picture at 0.4 or beyond" in opened.caption()
        padded = np.pad(beyond, 1, mode="edge")
        beside = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
        edge = np.any([one != beyond for one in beside], axis=0)
        found = opened.pixels()
        assert np.mean(found[edge & beyond] == 255) > 0.99  # the contour, white inside and black outside
        assert np.mean(found[edge & ~beyond] == 0) > 0.99
        for inside, expected in ((beyond, drawn), (~beyond, picture)):
            same = (found == expected).all(-1)[inside & ~edge]
            assert np.mean(same) > 0.999  # but for rounding at the edge
        assert np.array_equal(opened.png(), found)

    @pytest.mark.parametrize(("key", "method"), [(6, "GradCAM"), (2, "LayerCAM")])
    def test_the_value_under_the_pointer(
        self, key: int, method: str, opened: Opened, result: PredictionExplanation
    ) -> None:
        opened.choose("Method", method)
        opened.choose("Class", f"digit {key}")
        numbers, own = numbers_of(result, key, method), result.results[method].values(key)
        for x, y in ((0.503, 0.251), (0.71, 0.3), (0.3, 0.79), (0.02, 0.98)):
            self.compare(opened.point(x, y), x, y, numbers, own)
        opened.page.mouse.move(5, 5)
        assert opened.page.locator(".probe").first.inner_text() == ""

    @staticmethod
    def compare(told: str, x: float, y: float, numbers: np.ndarray[Any, Any], own: np.ndarray[Any, Any]) -> None:
        match = re.fullmatch(r"value (-?[\d.]+), in row (\d+) and column (\d+) of (\d+) × (\d+): (-?[\d.]+)", told)
        assert match is not None, told
        rows, columns = own.shape
        assert (int(match[4]), int(match[5])) == (rows, columns)
        row, column = int(y * rows), int(x * columns)
        assert (int(match[2]), int(match[3])) == (row + 1, column + 1)
        assert float(match[6]) == pytest.approx(own[row, column], abs=6e-4)
        near = numbers[max(int(y * SIDE) - 1, 0) : int(y * SIDE) + 2, max(int(x * SIDE) - 1, 0) : int(x * SIDE) + 2]
        assert near.min() - 1e-3 <= float(match[1]) <= near.max() + 1e-3

    def test_zoom(self, opened: Opened, result: PredictionExplanation) -> None:
        whole = opened.pixels()
        opened.tool("Zoom").fill("4")
        opened.settle()
        assert opened.page.locator("output[for=zoom]").inner_text() == "4×"
        numbers, own = numbers_of(result, 6, "GradCAM"), result.results["GradCAM"].values(6)
        for x, y in ((0.1, 0.2), (0.8, 0.45)):  # of the part in sight, from 3/8 to 5/8
            self.compare(opened.point(x, y), 0.375 + x / 4, 0.375 + y / 4, numbers, own)
        png, part = opened.png(), whole[216:360, 216:360]
        assert png.shape == whole.shape
        assert np.abs(png[2::4, 2::4] - part).mean() < 6
        box = opened.page.locator(".map").first.bounding_box()
        centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        opened.page.mouse.move(*centre)
        opened.page.mouse.down()
        opened.page.mouse.move(centre[0] + box["width"] / 2, centre[1], steps=4)
        opened.page.mouse.up()
        self.compare(opened.point(0.5, 0.5), 0.375, 0.5, numbers, own)
        opened.page.mouse.dblclick(*centre)
        assert opened.page.locator("output[for=zoom]").inner_text() == "1×"
        opened.page.mouse.dblclick(*centre)
        assert opened.page.locator("output[for=zoom]").inner_text() == "3×"

    def test_the_address_holds_what_is_shown(
        self, opened: Opened, browser: Any, tmp_path: Path, result: PredictionExplanation
    ) -> None:
        assert "#" not in opened.page.url.removesuffix("#")
        opened.choose("Method", "EigenCAM")
        opened.choose("Class", "digit 2")
        opened.tool("Threshold").fill("0.25")
        opened.tool("Map opacity").fill("60")
        opened.tool("Colours").select_option("inferno")
        opened.tool("Untouched picture").select_option("swipe")
        opened.tool("Swipe").fill("30")
        opened.tool("Zoom").fill("2.5")
        shown = opened.pixels()
        fragment = opened.page.url.partition("#")[2]
        again = Opened(browser, tmp_path / "page.html", fragment)
        assert np.array_equal(again.pixels(), shown)
        assert again.caption() == opened.caption()
        values = [again.tool(name).input_value() for name in ("Threshold", "Map opacity", "Swipe", "Zoom")]
        assert values == ["0.25", "60", "30", "2.5"]
        assert np.array_equal(again.png(), opened.png())
        again.page.evaluate("location.hash = 'view=two&b=2.1'")
        again.settle()
        assert again.caption(1).startswith(f"LayerCAM of {result.name_of(9)}")
        again.check()
        odd = Opened(browser, tmp_path / "page.html", "view=none&zoom=NaN&opacity=1e9&a=99.99&x&input=-7&b=__proto__")
        assert odd.caption().startswith(f"EigenCAM of {result.name_of(9)}")  # the last of each
        assert odd.tool("Map opacity").input_value() == "100"
        odd.check()

    def test_the_verdict(self, browser: Any, result: PredictionExplanation, tmp_path: Path) -> None:
        asked = replace(result)
        report = asked.trust(2)
        asked.to_html(tmp_path / "page.html")
        opened = Opened(browser, tmp_path / "page.html")
        verdict = opened.page.locator(".trust:visible")
        assert verdict.count() == 0
        opened.choose("Class", "digit 2")
        told = list(filter(None, verdict.inner_text().splitlines()))
        assert told == [report.headline, *report[0].reasons]
        opened.choose("Method", "LayerCAM")
        assert verdict.count() == 0
        opened.check()


class TestBrowser:
    def test_the_keyboard_does_it_all(self, opened: Opened, result: PredictionExplanation) -> None:
        focused = "document.activeElement.id || document.activeElement.name || document.activeElement.className"
        box = "(document.activeElement.closest('.choice') ?? document.activeElement)"
        outline = f"getComputedStyle({box}).outlineWidth"
        reached = []
        for _ in range(11):
            opened.page.keyboard.press("Tab")
            reached.append(opened.page.evaluate(focused))
            assert opened.page.evaluate(outline) == "3px"
        tools = ["view", "picture", "opacity", "threshold", "zoom", "colormap", "grey", "download"]
        assert reached == [*tools, "stage map", "class-0", "method-0"]
        opened.page.locator("#opacity").focus()
        opened.page.keyboard.press("ArrowRight")
        assert opened.tool("Map opacity").input_value() == "76"
        opened.page.locator(".map").first.focus()
        numbers, own = numbers_of(result, 6, "GradCAM"), result.results["GradCAM"].values(6)
        for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp", "Shift+ArrowRight"):
            opened.page.keyboard.press(key)
        told = opened.page.locator(".probe").first.inner_text()
        TestTools.compare(told, 0.61, 0.39, numbers, own)
        cross, stage = (opened.page.locator(one).first.bounding_box() for one in (".cross", ".map"))
        assert (cross["x"] + cross["width"] / 2 - stage["x"]) / stage["width"] == pytest.approx(0.61, abs=0.005)
        opened.page.keyboard.press("+")
        assert opened.page.locator("output[for=zoom]").inner_text() == "1.5×"
        opened.page.keyboard.press("0")
        assert opened.page.locator("output[for=zoom]").inner_text() == "1×"
        opened.page.locator("[name=class-0]").first.focus()
        opened.page.keyboard.press("ArrowDown")
        assert opened.caption().startswith("GradCAM of digit 2")
        opened.page.keyboard.press("Tab")
        opened.page.keyboard.press("ArrowDown")
        assert opened.caption().startswith("LayerCAM of digit 2")

    def test_names_are_shown_and_not_run(self, opened: Opened, result: PredictionExplanation) -> None:
        assert EVIL in opened.page.locator(".choices").first.inner_text()
        opened.tool("Show").select_option("all maps")
        assert EVIL in opened.page.get_by_role("table").inner_text()
        assert opened.page.title() == result.title

    @pytest.mark.parametrize("view", ["two", "all"])
    def test_every_control_has_a_name(self, view: str, opened: Opened) -> None:
        opened.tool("Show").select_option(view)
        opened.settle()
        tree = opened.page.locator("body").aria_snapshot()
        controls = re.findall(r"- (slider|combobox|checkbox|radio|img|group|region|button|application)([^\n]*)", tree)
        assert len(controls) > 15
        unnamed = [line for line in controls if '"' not in line[1]]
        assert unnamed == [("group", ": How these maps were made")]  # its summary

    def test_how_it_was_made(self, opened: Opened) -> None:
        opened.page.locator("summary").click()
        text = opened.page.locator("#about").inner_text()
        for part in ("torchcam.demo.model.DemoNet", "1 × 3 × 96 × 96", "LayerCAM() of layer2, layer3", "relu=False"):
            assert part in text

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 740)], ids=["desktop", "phone"])
    def test_fits_the_screen_and_its_colours(
        self, scheme: str, width: int, height: int, browser: Any, result: PredictionExplanation, tmp_path: Path
    ) -> None:
        result.to_html(tmp_path / "page.html")
        size = {"width": width, "height": height}
        opened = Opened(browser, tmp_path / "page.html", viewport=size, color_scheme=scheme)
        for view in ("one", "two", "all"):
            opened.tool("Show").select_option(view)
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            for picture in ("hidden", "beside", "swipe") if view != "all" else ():
                opened.tool("Untouched picture").select_option(picture)
                assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
                for stage in opened.page.locator(".stage:visible").all():
                    parts = 1 + (view == "two" or picture == "beside")
                    assert stage.bounding_box()["width"] > min(width / parts - 30, 390)
        colors = [
            opened.page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        ]
        paper, ink = (sum(map(int, re.findall(r"\d+", color))) for color in colors)
        assert (paper < ink) == (scheme == "dark")
        assert abs(paper - ink) > 500
        opened.check()

    def test_several_inputs(self, browser: Any, batch: Explanations, tmp_path: Path) -> None:
        batch.to_html(tmp_path / "batch.html")
        opened = Opened(browser, tmp_path / "batch.html")
        assert opened.caption().startswith("GradCAM of digit 6")
        assert opened.page.locator("#input option").count() == 3
        opened.choose("Class", "digit 2")
        opened.tool("Input").select_option("1")
        assert opened.page.locator(".pane").first.get_by_role("radio").count() == 1
        assert opened.caption().startswith("GradCAM of digit 4")
        assert_same_picture(opened.pixels(), batch[1].overlay())
        opened.tool("Input").select_option("2")
        assert opened.page.locator(".pane").first.get_by_role("radio").count() == 3
        opened.tool("Show").select_option("all maps")
        assert opened.page.get_by_role("table").locator("canvas").count() == 3 + 6
        assert opened.page.get_by_role("rowheader").all_inner_texts()[-3:] == [
            batch[2].name_of(key) + " · " + batch[2].value_of(key) for key in (6, 2, 3)
        ]
        opened.check()

    def test_maps_that_are_undefined_or_blank(
        self, browser: Any, result: PredictionExplanation, tmp_path: Path
    ) -> None:
        half = torch.full((4, 4), torch.nan)
        half[:, :2] = 1.0
        blank = torch.zeros(4, 4)
        maps = MethodMaps("GradCAM", ("x",), {}, {0: (half,), 1: (blank,)}, {0: half, 1: blank})
        broken = replace(result, cams=maps.cams, results={"GradCAM": maps}, expected_class_idx=None)
        broken.to_html(tmp_path / "page.html")
        opened = Opened(browser, tmp_path / "page.html")
        assert "undefined (NaN)" in opened.caption()
        assert_same_picture(opened.pixels(), broken.overlay())
        assert opened.point(0.9, 0.5) == "value undefined, in row 3 and column 4 of 4 × 4: undefined"
        opened.choose("Class", "digit 1")
        assert "blank: nothing above 0" in opened.caption()
        assert np.array_equal(opened.pixels(), picture_of(result))
        opened.check()
