"""The page of `to_html`: what is in the file, and, in a browser, what it does."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from tests.browsers import chromium
from torchcam._page import _fitted_map
from torchcam.demo import load_model, sample_images
from torchcam.explain import Explanations, MethodMaps, PredictionExplanation, explain
from torchcam.utils import colormap_of, resize_map

EVIL = "</script><script>document.title = 'gone'</script><!-- & \"x\" 'y'"
NAMES = [f"digit {index}" for index in range(9)] + [EVIL]


@pytest.fixture(scope="module")
def result() -> PredictionExplanation:
    """Three methods, one of them signed, on three classes; the name of one is an attack."""
    return explain(
        load_model(),
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
                levels = np.frombuffer(base64.b64decode(entry["values"]), dtype=np.uint8).reshape(entry["shape"])
                share = (maps.values(key) + 1) / 2 if maps.signed else maps.values(key)
                assert np.abs(levels / 254 - share).max() <= 0.5 / 254 + 1e-6

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
        maps = MethodMaps("GradCAM", ("x",), {}, {0: (fine,)}, MappingProxyType({0: fine}))
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

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = path.as_uri()
        self.page.goto(self.address)

    def check(self) -> None:
        fetched = [url for url in self.requests if not url.startswith("data:")]
        assert fetched == [self.address]
        assert self.complaints == []
        self.context.close()

    def canvas(self, pane: int = 0) -> Any:
        return self.page.locator(".pane").nth(pane).locator(".stage canvas")

    def pixels(self, pane: int = 0) -> np.ndarray[Any, Any]:
        """What the map's canvas holds, (height, width, 4)."""
        data = self.canvas(pane).evaluate("canvas => canvas.toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
            return np.asarray(image.convert("RGBA"), dtype=int)

    def opacity(self) -> float:
        return float(self.canvas().evaluate("canvas => getComputedStyle(canvas).opacity"))

    def choose(self, kind: str, name: str, pane: int = 0) -> None:
        group = self.page.locator(".pane").nth(pane).locator("fieldset").nth(["Class", "Method"].index(kind))
        group.get_by_role("radio", name=name).check()

    def caption(self, pane: int = 0) -> str:
        return str(self.page.locator(".pane").nth(pane).locator("figcaption").inner_text())


@pytest.fixture
def opened(browser: Any, result: PredictionExplanation, tmp_path: Path) -> Iterator[Opened]:
    result.to_html(tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    yield page
    page.check()


def expected_pixels(
    result: PredictionExplanation, key: int, method: str, size: tuple[int, int], colormap: str | None = None
) -> np.ndarray[Any, Any]:
    """What the page shall show of a map: its bytes, resized as Pillow does it, in the colours of matplotlib."""
    maps = result.results[method]
    share = (maps.values(key) + 1) / 2 if maps.signed else maps.values(key)
    values = np.clip(resize_map((np.rint(254 * share) / 254).astype(np.float32), size), 0, 1)
    colors: np.ndarray[Any, Any] = colormap_of(None if maps.signed else colormap, maps.signed)(values, bytes=True)
    return colors.astype(int)


def assert_same_picture(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.shape == expected.shape
    seen = expected[..., 3] > 64  # a canvas keeps colours multiplied by their opacity, and loses faint ones
    difference = np.abs(found - expected).max(-1)
    assert np.mean(difference[seen] <= 4) > 0.99
    assert np.abs(found[..., 3] - expected[..., 3]).max() <= 8


class TestBrowser:
    def test_the_first_map_is_shown(self, opened: Opened, result: PredictionExplanation) -> None:
        assert opened.page.title() == result.title
        assert opened.caption().startswith("GradCAM of digit 6 (6) · 99.5%")
        height, width = opened.pixels().shape[:2]
        assert (height, width) == (288, 288)
        assert_same_picture(opened.pixels(), expected_pixels(result, 6, "GradCAM", (width, height)))

    def test_the_slider_changes_the_opacity(self, opened: Opened) -> None:
        slider = opened.page.get_by_label("Map opacity")
        assert opened.opacity() == 0.75
        for value in ("0", "25", "100"):
            slider.fill(value)
            assert opened.opacity() == int(value) / 100
            assert opened.page.locator("#percent").inner_text() == f"{value}%"
        assert opened.canvas().screenshot() != self.without_map(opened)

    @staticmethod
    def without_map(opened: Opened) -> bytes:
        opened.page.get_by_label("Map opacity").fill("0")
        picture: bytes = opened.canvas().screenshot()
        return picture

    def test_the_switches_change_the_picture(self, opened: Opened, result: PredictionExplanation) -> None:
        labels = {6: "digit 6", 2: "digit 2", 9: EVIL}
        for method in ("LayerCAM", "EigenCAM", "GradCAM"):
            opened.choose("Method", method)
            for key, label in labels.items():
                opened.choose("Class", label)
                pixels = opened.pixels()
                assert_same_picture(pixels, expected_pixels(result, key, method, pixels.shape[1::-1]))
                assert opened.caption().startswith(f"{method} of {result.name_of(key)}")
                assert opened.canvas().get_attribute("aria-label") == f"{method} map of {result.name_of(key)}"
        opened.choose("Method", "LayerCAM")
        opened.page.get_by_label("Colours").select_option("jet")
        pixels = opened.pixels()
        assert_same_picture(pixels, expected_pixels(result, 9, "LayerCAM", pixels.shape[1::-1], "jet"))

    def test_two_maps_side_by_side(self, opened: Opened, result: PredictionExplanation) -> None:
        assert opened.page.locator(".pane:visible").count() == 1
        opened.page.get_by_label("Side by side").check()
        assert opened.page.locator(".pane:visible").count() == 2
        assert opened.caption(0).startswith("GradCAM of digit 6")
        assert opened.caption(1).startswith("LayerCAM of digit 6")
        opened.choose("Class", "digit 2", pane=1)
        assert opened.caption(0).startswith("GradCAM of digit 6")
        assert opened.caption(1).startswith("LayerCAM of digit 2")
        pixels = opened.pixels(1)
        assert_same_picture(pixels, expected_pixels(result, 2, "LayerCAM", pixels.shape[1::-1]))
        first, second = (opened.page.locator(".stage").nth(pane).bounding_box() for pane in (0, 1))
        assert first["y"] == second["y"]
        assert first["x"] + first["width"] < second["x"]

    def test_the_keyboard_does_it_all(self, opened: Opened) -> None:
        focused = "document.activeElement.id || document.activeElement.name"
        box = "(document.activeElement.closest('.choice') ?? document.activeElement)"
        outline = f"getComputedStyle({box}).outlineWidth"
        reached = []
        for _ in range(7):
            opened.page.keyboard.press("Tab")
            reached.append(opened.page.evaluate(focused))
            assert opened.page.evaluate(outline) == "3px"
        assert reached[:6] == ["opacity", "colormap", "grey", "compare", "class-0", "method-0"]
        opened.page.locator("#opacity").focus()
        opened.page.keyboard.press("ArrowRight")
        assert opened.opacity() == 0.76
        opened.page.keyboard.press("Home")
        assert opened.opacity() == 0
        opened.page.locator("[name=class-0]").first.focus()
        opened.page.keyboard.press("ArrowDown")
        assert opened.caption().startswith("GradCAM of digit 2")
        opened.page.keyboard.press("Tab")
        opened.page.keyboard.press("ArrowDown")
        assert opened.caption().startswith("LayerCAM of digit 2")
        opened.page.locator("#compare").focus()
        opened.page.keyboard.press("Space")
        assert opened.page.locator(".pane:visible").count() == 2

    def test_names_are_shown_and_not_run(self, opened: Opened, result: PredictionExplanation) -> None:
        assert EVIL in opened.page.locator(".choices").first.inner_text()
        assert opened.page.title() == result.title

    def test_every_control_has_a_name(self, opened: Opened) -> None:
        opened.page.get_by_label("Side by side").check()
        tree = opened.page.locator("body").aria_snapshot()
        controls = re.findall(r"- (slider|combobox|checkbox|radio|img|group|region)([^\n]*)", tree)
        assert len(controls) > 15
        unnamed = [line for line in controls if '"' not in line[1]]
        assert unnamed == [("group", ": How these maps were made")]  # its summary

    def test_the_picture_is_in_grey_unless_asked_otherwise(self, opened: Opened) -> None:
        style = "image => getComputedStyle(image).filter"
        image = opened.page.locator(".stage img").first
        assert image.evaluate(style) == "grayscale(1)"
        opened.page.get_by_label("Image in grey").uncheck()
        assert image.evaluate(style) == "none"

    def test_how_it_was_made(self, opened: Opened) -> None:
        opened.page.locator("summary").click()
        text = opened.page.locator("#about").inner_text()
        for part in ("torchcam.demo.model.DemoNet", "1 × 3 × 96 × 96", "LayerCAM() of layer2, layer3", "relu=False"):
            assert part in text

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize(("width", "height"), [(1100, 900), (360, 740)], ids=["desktop", "phone"])
    def test_fits_the_screen_and_its_colours(
        self, scheme: str, width: int, height: int, browser: Any, result: PredictionExplanation, tmp_path: Path
    ) -> None:
        result.to_html(tmp_path / "page.html")
        opened = Opened(
            browser, tmp_path / "page.html", viewport={"width": width, "height": height}, color_scheme=scheme
        )
        for compare in (False, True):
            opened.page.get_by_label("Side by side").set_checked(compare)
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            for stage in opened.page.locator(".stage:visible").all():
                assert stage.bounding_box()["width"] > (width / 2 - 30 if compare else min(width - 30, 500))
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
        opened.page.get_by_label("Input", exact=True).select_option("1")
        assert opened.page.locator(".pane").first.get_by_role("radio").count() == 1
        assert opened.caption().startswith("GradCAM of digit 4")
        pixels = opened.pixels()
        assert_same_picture(pixels, expected_pixels(batch[1], 4, "GradCAM", pixels.shape[1::-1]))
        opened.page.get_by_label("Input", exact=True).select_option("2")
        assert opened.page.locator(".pane").first.get_by_role("radio").count() == 3
        opened.check()

    def test_maps_that_are_undefined_or_blank(
        self, browser: Any, result: PredictionExplanation, tmp_path: Path
    ) -> None:
        half = torch.full((4, 4), torch.nan)
        half[:, :2] = 1.0
        maps = MethodMaps(
            "GradCAM",
            ("x",),
            {},
            {0: (half,), 1: (torch.zeros(4, 4),)},
            MappingProxyType({0: half, 1: torch.zeros(4, 4)}),
        )
        broken = replace(result, cams=maps.cams, results={"GradCAM": maps}, expected_class_idx=None)
        broken.to_html(tmp_path / "page.html")
        opened = Opened(browser, tmp_path / "page.html")
        assert "undefined (NaN)" in opened.caption()
        pixels = opened.pixels()
        assert (pixels[:, :140, 3] == 255).all()
        assert (pixels[:, 148:, 3] == 0).all()
        assert_same_picture(pixels[:, :140], np.broadcast_to([253, 231, 36, 255], (288, 140, 4)))
        opened.choose("Class", "digit 1")
        assert "blank: nothing above 0" in opened.caption()
        opened.check()
