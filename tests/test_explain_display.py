"""How an explanation shows itself: figures, notebooks, overlays."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import cbook, colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from tests.browsers import chromium
from tests.methods_under_test import LAYERS, make_input, make_model
from tests.oracles import faded, looks_like
from torchcam.explain import Explanations, PredictionExplanation, explain
from torchcam.utils import colormap_of, overlay_map

CPU = torch.device("cpu")
NAMES = ["a", "<script>alert('x')</script> & \"co\"", "a name of a class that is so long that it needs to be wrapped"]
BYTES = 1_000_000  # more than that, no output of a cell shall add to a notebook


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = make_model("GradCAM", CPU)
    with torch.no_grad():
        model.fc.weight[1] *= -1  # no evidence for it
    return model


@pytest.fixture(scope="module")
def plain(model: nn.Module) -> PredictionExplanation:
    return explain(model, make_input(CPU, 1), target_layer="block2", class_names=NAMES, class_idx=[0])


@pytest.fixture(scope="module")
def grid(model: nn.Module) -> PredictionExplanation:
    methods = ["GradCAM", "LayerCAM", "EigenCAM"]
    layers = {"GradCAM": "block2", "LayerCAM": LAYERS, "EigenCAM": "block1"}
    return explain(
        model, make_input(CPU, 1), method=methods, target_layer=layers, class_names=NAMES, class_idx=[0, 1, 2]
    )


@pytest.fixture(scope="module")
def mixed(model: nn.Module) -> PredictionExplanation:
    """A signed map and one that is not."""
    return explain(
        model,
        make_input(CPU, 1),
        method=["GradCAM", "LayerCAM"],
        target_layer="block2",
        method_kwargs={"GradCAM": {"relu": False}},
        class_idx=[1, 2],
    )


@pytest.fixture(scope="module")
def batch(model: nn.Module) -> Explanations:
    return explain(model, make_input(CPU, 10), target_layer="block2", class_names=NAMES, class_idx=[[0, 2]] * 10)


@pytest.fixture(scope="module")
def hopper() -> PredictionExplanation:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return explain(
        model, path, weights=ResNet18_Weights.DEFAULT, method=["GradCAM", "EigenCAM"], target_layer="layer4", top_k=2
    )


def texts(figure: Figure) -> list[Any]:
    """The texts of a figure that is drawn."""
    figure.draw_without_rendering()
    of_axes = [[axes.title, axes.xaxis.label, *axes.get_xticklabels()] for axes in figure.axes if axes.axison]
    found = [*figure.texts, *itertools.chain(*of_axes)]
    return [text for text in found if text.get_text().strip()]


def bars(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() == "colour bar"]


def pictures(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in texts(figure)).split())


class TestOverlay:
    def test_is_the_map_over_the_image(self, hopper: PredictionExplanation) -> None:
        below = hopper.image.resize((672, 672), Image.Resampling.BICUBIC)
        assert looks_like(hopper.overlay(), faded(below, hopper.cams[hopper.predicted_class_idx][0]))
        second = list(hopper.cams)[1]
        drawn = hopper.overlay(second, "EigenCAM", colormap="magma", alpha=0.2, grey=True)
        assert looks_like(drawn, faded(below.convert("L"), hopper.maps["EigenCAM"][second][0], "magma", 0.2))

    def test_of_signed_maps_zero_is_transparent(self, mixed: PredictionExplanation) -> None:
        black = Image.new("RGB", (60, 60))
        against = np.asarray(mixed.overlay(1, image=black, alpha=0), dtype=int)
        assert mixed.cams[1][0].max() <= 0
        assert (against[..., 2] >= against[..., 0]).all()  # blue
        assert against[..., 2].max() > 150
        assert np.array_equal(np.asarray(overlay_map(black, np.zeros((2, 2)), alpha=0, signed=True)), np.asarray(black))

    def test_of_a_batch(self, batch: Explanations) -> None:
        drawn = batch.overlay(2, alpha=0.3)
        assert len(drawn) == len(batch)
        for picture, one in zip(drawn, batch, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(one.overlay(2, alpha=0.3)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"class_idx": 7}, r"`class_idx` 7 was not explained; there are maps of \[0\]"),
            ({"method": "GradCam"}, "`method` 'GradCam' made no maps here; did you mean 'GradCAM'"),
            ({"alpha": 1}, "`alpha` must be a number"),
            ({"colormap": "no"}, "'no' is not a matplotlib colormap"),
        ],
    )
    def test_errors(self, options: dict[str, Any], message: str, plain: PredictionExplanation) -> None:
        with pytest.raises(ValueError, match=message):
            plain.overlay(**options)


class TestPlot:
    def test_says_what_is_to_be_seen(self, grid: PredictionExplanation) -> None:
        shown = words(grid.plot())
        for name, value in ((grid.name_of(key), grid.value_of(key)) for key in grid.cams):
            assert "".join(name.split()) in shown.replace(" ", "")  # wrapped
            assert value in shown
        for name in ("GradCAM block2", "LayerCAM block1, block2", "EigenCAM block1", "input", "relevance", "0.5"):
            assert name in shown
        assert "Net predicts" in shown
        assert "blank: nothing above 0" in shown  # the class without evidence

    @pytest.mark.parametrize("name", ["plain", "grid", "mixed", "hopper", "batch"])
    @pytest.mark.parametrize("dark", [False, True])
    def test_no_text_lies_on_another_or_leaves_the_figure(
        self, name: str, dark: bool, request: pytest.FixtureRequest
    ) -> None:
        figure = request.getfixturevalue(name).plot(dark=dark)
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        assert len(boxes) >= 4
        for (first, one), (second, other) in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), f"{first!r} lies on {second!r}"
        width, height = figure.canvas.get_width_height()
        for text, box in boxes:
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= width + 1, text
            assert box.y1 <= height + 1, text

    @pytest.mark.parametrize("dark", [False, True])
    def test_ink_stands_out_from_paper(self, dark: bool, grid: PredictionExplanation) -> None:
        def luminance(color: Any) -> float:
            linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(color)]
            return float(np.dot([0.2126, 0.7152, 0.0722], linear))

        figure = grid.plot(dark=dark)
        paper = luminance(figure.get_facecolor())
        assert (paper < 0.05) == dark
        for text in texts(figure):
            light, low = sorted([luminance(text.get_color()), paper], reverse=True)
            assert (light + 0.05) / (low + 0.05) > 7, text.get_text()  # the contrast that WCAG asks for, level AAA

    def test_follows_what_matplotlib_is_set_to(self, plain: PredictionExplanation) -> None:
        with matplotlib.rc_context({"figure.facecolor": "#123456", "text.color": "#fedcba"}):
            figure = plain.plot()
        assert to_rgb(figure.get_facecolor()) == to_rgb("#123456")
        assert {text.get_color() for text in texts(figure)} == {"#fedcba"}
        with matplotlib.rc_context({"figure.facecolor": "none", "text.color": "white"}):
            assert sum(to_rgb(plain.plot().get_facecolor())) < 0.5  # who knows what is behind: text must be readable

    def test_all_maps_share_a_scale_for_each_kind(self, mixed: PredictionExplanation) -> None:
        assert sorted(axes.get_xlim() for axes in bars(mixed.plot())) == [(-1, 1), (0, 1)]
        assert len(pictures(mixed.plot())) == 1 + 4

    @pytest.mark.parametrize(("name", "columns", "rows"), [("grid", 3, 3), ("plain", 1, 1), ("batch", 1, 20)])
    def test_methods_in_columns_and_questions_in_rows(
        self, name: str, columns: int, rows: int, request: pytest.FixtureRequest
    ) -> None:
        """The untouched pictures come first, each beside the first map of its input."""
        found = request.getfixturevalue(name)
        figure = found.plot()
        figure.draw_without_rendering()
        items = list(found) if isinstance(found, Explanations) else [found]
        boxes = [axes.get_window_extent() for axes in pictures(figure)]
        assert len(boxes) == columns * rows + len(items)
        lefts = sorted({round(box.x0) for box in boxes})
        tops = sorted({round(box.y0) for box in boxes}, reverse=True)
        assert (len(lefts), len(tops)) == (columns + 1, rows)
        drawn = {
            (tops.index(round(box.y0)), lefts.index(round(box.x0))): axes.images[0].get_array()
            for axes, box in zip(pictures(figure), boxes, strict=True)
        }
        line = 0
        for item in items:
            sheet = item._sheet()
            assert np.array_equal(drawn[line, 0], np.asarray(sheet.image))
            for key in item.cams:
                for column, method in enumerate(item.methods, 1):
                    over = item.overlay(key, method, image=sheet.image)
                    assert np.array_equal(drawn[line, column], np.asarray(over))
                line += 1

    def test_pyplot_does_not_hear_of_it(self) -> None:
        code = (
            "import sys, torch, matplotlib\n"
            "from torchcam.explain import explain\n"
            "before = dict(matplotlib.rcParams)\n"
            "net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
            "result = explain(net, torch.rand(1, 3, 9, 9), target_layer='0')\n"
            "result.plot(dark=True)._repr_png_(), result._repr_png_(), result._repr_html_(), result.to_html()\n"
            "print('matplotlib.pyplot' in sys.modules, dict(matplotlib.rcParams) == before)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert done.stdout.split() == ["False", "True"], done.stderr

    def test_a_figure_shows_itself(self, plain: PredictionExplanation) -> None:
        with Image.open(io.BytesIO(plain.plot()._repr_png_())) as picture:
            assert picture.width > 300

    def test_colormap_is_used(self, hopper: PredictionExplanation) -> None:
        plots = [hopper.plot(colormap=colormap) for colormap in (None, "jet")]
        names = [bars(plot)[0]._colorbar.cmap.name for plot in plots]
        assert names == ["viridis", "jet"]

    def test_maps_that_are_not_pictures(self) -> None:
        net = nn.Sequential(nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        result = explain(net, torch.rand(1, 2, 9), target_layer="0", class_names=NAMES)
        for show in (result.plot, result.overlay, result.to_html):
            with pytest.raises(ValueError, match=r"only maps \(height, width\) can be drawn .* \[\(7,\)\]"):
                show()
        assert result._repr_png_() is None
        assert result.value_of(result.predicted_class_idx) in result._repr_html_()
        both = explain(net, torch.rand(2, 2, 9), target_layer="0")
        assert both._repr_png_() is None
        assert both._repr_html_().count("<ul>") == 2

    def test_nothing_to_show(self) -> None:
        empty = Explanations([])
        assert empty._repr_png_() is None
        assert "0 inputs" in empty._repr_html_()
        for show in (empty.plot, empty.to_html):
            with pytest.raises(ValueError, match="nothing to draw"):
                show()


class TestNotebook:
    def test_html_holds_pictures_names_probabilities_and_a_colour_bar(self, grid: PredictionExplanation) -> None:
        page = grid._repr_html_()
        found = re.findall(r'<img src="data:image/(png|jpeg);base64,([^"]+)" alt="([^"]*)"', page)
        assert len(found) == 1 + 9
        assert found[0][2] == "input"
        assert found[-1][2] == f"EigenCAM map of {NAMES[2]} (2)"
        for _, data, _ in found:
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                assert max(picture.size) <= 512
        for key in grid.cams:
            assert f"{grid.name_of(key)} · {grid.value_of(key)}" in html.unescape(page)
        assert re.search(r"linear-gradient\(to right,#ffffff,[^)]*,#fde725\)", page)  # viridis, from nothing on
        assert "<script" not in page
        assert f"{NAMES[1]} (1)" in html.unescape(page)
        assert not re.search(r"(src|href)=\"(?!data:)", page)

    def test_a_picture_of_the_html_is_the_overlay(self, plain: PredictionExplanation) -> None:
        _, data = re.findall(r"base64,([^\"]+)", plain._repr_html_())
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            drawn = np.asarray(picture.convert("RGB"), dtype=int)
        whole = plain.overlay().resize(drawn.shape[1::-1], Image.Resampling.LANCZOS)
        assert np.abs(drawn - np.asarray(whole)).mean() < 3  # a JPEG

    def test_signed_maps_have_a_bar_of_their_own(self, mixed: PredictionExplanation) -> None:
        page = mixed._repr_html_()
        assert page.count("linear-gradient") == 2
        assert "evidence against (−) and for (+)" in page
        assert ",#ffffff," in page  # the transparent middle

    def test_png(self, grid: PredictionExplanation) -> None:
        with Image.open(io.BytesIO(grid._repr_png_())) as picture:
            assert 200_000 < picture.width * picture.height <= 650_000

    def test_names_in_any_script(self, model: nn.Module) -> None:
        names = ["猫", "$x_1$", "Ζεύς_" * 20]
        result = explain(model, make_input(CPU, 1), target_layer="block2", class_names=names, class_idx=[0, 1, 2])
        assert result._repr_png_() is not None  # and no warning
        assert all(name in result._repr_html_() for name in names)

    def test_what_a_notebook_keeps_is_bounded(self, model: nn.Module) -> None:
        """Noise is what compresses worst."""
        noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
        x = make_input(CPU, 1)
        for classes in ([0], [0, 1, 2]):
            result = explain(
                model,
                x,
                image=noise,
                method=["GradCAM", "LayerCAM", "EigenCAM"][: len(classes)],
                target_layer="block2",
                class_idx=classes,
            )
            assert result.image.size == (2000, 2000)
            assert len(result._repr_html_()) < 2 * BYTES
            assert len(result._repr_png_()) < 2 * BYTES
            assert len(repr(result)) < 300

    def test_a_photo_takes_little(self, hopper: PredictionExplanation) -> None:
        assert len(hopper._repr_html_()) < 200_000
        assert len(hopper._repr_png_()) < BYTES

    def test_a_batch_that_is_cut_short_ends_between_inputs(
        self, batch: Explanations, grid: PredictionExplanation
    ) -> None:
        whole = batch._repr_html_()
        assert whole.count("<img") == 10 * 3
        assert "more" not in whole
        assert len(whole) < BYTES
        assert len(batch._repr_png_()) < BYTES
        several = Explanations([*batch, *batch])
        assert several._repr_html_().count("<img") == 12 * 3
        assert "… 8 more inputs: <code>" in several._repr_html_()
        assert Explanations([grid] * 4)._repr_html_().count("<img") == 3 * 10
        assert "… 1 more input: <code>" in Explanations([grid] * 4)._repr_html_()
        assert batch[:1]._repr_html_().count("<img") == 3

    def test_of_many_maps_only_the_first_are_shown(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 50))
        result = explain(net, make_input(CPU, 1), target_layer="0", method=["GradCAM", "EigenCAM"], top_k=50)
        page = result._repr_html_()
        assert page.count("<img") == 1 + 2 * 17  # no row is cut in two
        assert "66 more maps" in page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture(scope="module")
def wide(model: nn.Module) -> PredictionExplanation:
    methods = {f"{name} of a method": name for name in ("GradCAM", "LayerCAM", "EigenCAM", "HiResCAM", "XGradCAM")}
    return explain(
        model, make_input(CPU, 1), method=methods, target_layer="block2", class_names=NAMES, class_idx=[0, 1, 2]
    )


class TestGridInABrowser:
    """The notebook's representation in a page 900 pixels wide."""

    def test_scrolls_and_keeps_the_picture_and_the_heads_in_sight(
        self, browser: Any, wide: PredictionExplanation
    ) -> None:
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.set_content(f'<body style="margin:0"><div style="max-width:700px">{wide._repr_html_()}</div>')
        region = page.get_by_role("region")
        inside, outside = region.evaluate("one => [one.scrollWidth, one.clientWidth]")
        assert (inside, outside) == (6 * 168 + 5 * 10, 700)
        assert page.evaluate("document.documentElement.scrollWidth") == 900
        table = [[cell.get_attribute("alt") for cell in row.get_by_role("img").all()] for row in self.rows(page)]
        names = [wide.name_of(key) for key in wide.cams]
        assert table[1][0] == "input"
        assert [row[-5:] for row in table[1:]] == [
            [f"{method} map of {name}" for method in wide.methods] for name in names
        ]
        heads = page.get_by_role("columnheader")
        before = heads.nth(4).bounding_box()
        region.evaluate("one => one.scrollTo(200, 150)")
        assert page.get_by_alt_text("input", exact=True).bounding_box()["x"] == 0
        assert heads.nth(4).bounding_box() == {**before, "x": before["x"] - 200}
        page.close()

    @staticmethod
    def rows(page: Any) -> list[Any]:
        found: list[Any] = page.get_by_role("row").all()
        return found


class TestColormaps:
    def test_the_default_is_uniform_also_in_grey(self) -> None:
        colors = colormap_of(None, signed=False)(np.linspace(0, 1, 64))[:, :3] ** 2.2
        lightness = np.cbrt(colors @ [0.2126, 0.7152, 0.0722])
        steps = np.diff(lightness)
        assert (steps > 0).all()
        assert steps.max() < 2 * steps.mean()
        jet = np.cbrt(colormaps["jet"](np.linspace(0, 1, 64))[:, :3] ** 2.2 @ [0.2126, 0.7152, 0.0722])
        assert (np.diff(jet) < 0).any()

    def test_the_signed_one_is_centred(self) -> None:
        colors = colormap_of(None, signed=True)(np.linspace(0, 1, 255))
        assert colors[127, 3] == 0
        assert np.allclose(colors[:, 3], colors[::-1, 3])
        assert (np.diff(colors[127:, 3]) >= 0).all()
        assert (
            colors[0, 2] > 2 * colors[0, 0]
        )  # blue against red, also for those who see no difference of red and green
        assert colors[-1, 0] > 2 * colors[-1, 2]


def test_tensors_of_other_types_are_drawn(model: nn.Module) -> None:
    result = explain(make_model("GradCAM", CPU).double(), make_input(CPU, 1).double(), target_layer="block2")
    (cam,) = result.cams[result.predicted_class_idx]
    assert cam.dtype == torch.float64
    drawn: Tensor = torch.from_numpy(np.array(result.overlay()))
    assert drawn.shape == (516, 516, 3)
