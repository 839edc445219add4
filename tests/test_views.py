"""Maps are drawn where the model saw them, on originals that were scaled, cropped, padded or mirrored."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

import torchcam
from torchcam._views import find_view
from torchcam.layout import Cells
from torchcam.utils import on_picture

SIZES = {"wide": (300, 120), "tall": (90, 280), "square": (150, 150), "tiny": (20, 14)}


def letterbox(image: Image.Image) -> Tensor:
    """Fit a picture into 96 × 96, centred on grey."""
    scale = 96 / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    paper = Image.new("RGB", (96, 96), (114, 114, 114))
    paper.paste(image.resize((width, height)), ((96 - width) // 2, (96 - height) // 2))
    return T.functional.to_tensor(paper)


def processor(**options: Any) -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 64, "width": 64}, **options)


def clip_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "Resize": lambda: T.Compose([T.Resize((64, 80)), T.ToTensor()]),
    "Resize and CenterCrop": lambda: T.Compose([T.Resize(80), T.CenterCrop(64), T.ToTensor()]),
    "v2": lambda: v2.Compose([v2.Resize(80), v2.CenterCrop(64), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "CenterCrop beyond the picture": lambda: T.Compose([T.Resize(40), T.CenterCrop((40, 200)), T.ToTensor()]),
    "Pad": lambda: T.Compose([T.Pad((30, 10, 5, 20)), T.Resize((64, 64)), T.ToTensor()]),
    "mirrored": lambda: T.Compose([T.RandomHorizontalFlip(1.0), T.Resize(80), T.CenterCrop(64), T.ToTensor()]),
    "preset": ResNet18_Weights.DEFAULT.transforms,
    "timm": lambda: timm.data.create_transform((3, 64, 64), crop_pct=0.8, is_training=False),
    "letterbox": lambda: letterbox,
    "ViTImageProcessor": processor,
    "CLIPImageProcessor": clip_processor,
}


class Bright(nn.Module):
    """Its first class's map is where the input is brighter than its darkest pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        grey = pixel_values.mean(1, keepdim=True)
        grey = self.layer(grey - grey.amin((2, 3), keepdim=True))
        return torch.cat([grey, -grey], 1).mean((2, 3))


def dotted(size: tuple[int, int], place: tuple[float, float]) -> Image.Image:
    """A black picture with a white dot whose centre is at some share of its width and height."""
    x, y = np.arange(size[0])[None], np.arange(size[1])[:, None]
    radius = max(1.5, min(size) / 12)
    inside = (x + 0.5 - place[0] * size[0]) ** 2 + (y + 0.5 - place[1] * size[1]) ** 2 <= radius**2
    return Image.fromarray(np.uint8(255 * inside)).convert("RGB")


def peak(heat: np.ndarray) -> tuple[float, float]:
    """The centre of what is hot, as shares of width and height."""
    weights = np.where(heat > 0.5 * heat.max(), heat, 0)
    rows, columns = np.indices(heat.shape) + 0.5
    return (
        float((weights * columns).sum() / weights.sum() / heat.shape[1]),
        float((weights * rows).sum() / weights.sum() / heat.shape[0]),
    )


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_dot_is_hot_on_the_original(name: str, size: tuple[int, int]) -> None:
    place = (0.56, 0.45)
    picture = dotted(size, place)
    result = torchcam.explain(
        Bright(), picture, transform=TRANSFORMS[name](), target_layer="layer", class_idx=0, image=picture
    )
    assert result.image.size == size
    sizes = [size] if size[0] == size[1] else [size, (900, 900 * size[1] // size[0])]
    for shown in sizes:
        x, y = peak(np.asarray(result.overlay(image=Image.new("RGB", shown), alpha=0), dtype=float).sum(-1))
        assert abs(x - place[0]) * size[0] < 1 + 0.02 * size[0]
        assert abs(y - place[1]) * size[1] < 1 + 0.02 * size[1]


def test_what_the_model_did_not_see_is_left_alone() -> None:
    """Of 300 × 120 pixels the middle 120 × 120 are seen, of which the map is hot everywhere but at a corner."""
    picture = Image.new("RGB", (300, 120), (200, 100, 50))
    values = torch.rand(1, 3, 60, 60) + 1
    values[..., :2, :2] = 0
    transform = T.Compose([T.Resize(60), T.CenterCrop(60), T.ToTensor()])
    result = torchcam.explain(Bright(), values, transform=transform, target_layer="layer", class_idx=0, image=picture)
    assert result.view == pytest.approx((0, 0.3, 1, 0.7), abs=0.002)
    drawn = np.asarray(result.overlay(), dtype=int)
    changed = (drawn != np.asarray(picture)).any(-1)
    assert not changed[:, :90].any()
    assert not changed[:, 210:].any()
    assert changed[10:, 95:205].all()


@pytest.mark.parametrize(
    "transform",
    [
        T.Compose([T.RandomResizedCrop(32), T.ToTensor()]),
        T.Compose([T.Lambda(lambda image: image.rotate(10)), T.Resize((40, 40)), T.ToTensor()]),
        T.Compose([T.Lambda(lambda image: image.transpose(Image.Transpose.TRANSPOSE)), T.ToTensor()]),
        T.Compose([T.FiveCrop(30), T.Lambda(lambda crops: torch.stack([T.ToTensor()(crop) for crop in crops]))]),
        T.Compose([T.Grayscale(), T.ToTensor(), T.Lambda(torch.zeros_like)]),
        lambda image: 1 / 0,
    ],
    ids=["random", "turned", "transposed", "five", "blank", "fails"],
)
def test_other_transforms_are_not_followed_and_draw_no_random_numbers(transform: Any) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002 - transforms draw from it
    assert find_view(transform, (60, 40)) is None
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_what_cannot_be_followed_is_drawn_over_the_models_view(tmp_path: Path) -> None:
    picture = dotted((300, 120), (0.5, 0.5))
    transform = T.Compose([T.RandomCrop(100), T.ToTensor()])
    with pytest.warns(UserWarning, match="its transform cannot be followed"):
        result = torchcam.explain(
            Bright(), picture, transform=transform, target_layer="layer", class_idx=0, image=picture
        )
    assert result.image.size == (100, 100)
    x = torch.rand(1, 3, 40, 40)
    with pytest.warns(UserWarning, match="300 × 120 is not known .pass the `transform` that made it."):
        plain = torchcam.explain(Bright(), x, target_layer="layer", class_idx=0, image=picture)
    assert plain.image.size == (40, 40)
    with pytest.warns(UserWarning, match="so the map is drawn over the model's view"):
        drawn = plain.overlay(image=picture)
    assert np.array_equal(np.asarray(drawn), np.asarray(plain.overlay()))
    with pytest.warns(UserWarning, match="so the map is drawn over the model's view"):
        folder = plain.save(tmp_path / "bundle", picture)
    with Image.open(folder / "image.png") as kept:
        assert kept.size == (40, 40)


def test_an_image_of_the_models_shape_is_covered_and_a_pickle_knows_no_transform() -> None:
    x = torch.rand(1, 3, 40, 60)
    transform = T.Compose([T.Resize(60), T.CenterCrop((40, 60)), T.ToTensor()])
    picture = Image.new("RGB", (300, 240))
    result = torchcam.explain(Bright(), picture, transform=transform, target_layer="layer", class_idx=0)
    assert result.view == (0, 0, 1, 1)
    assert torchcam.explain(
        Bright(), x, target_layer="layer", class_idx=0, image=Image.new("RGB", (600, 400))
    ).view == (0, 0, 1, 1)
    again = pickle.loads(pickle.dumps(result._views))
    assert again.on((300, 240)) is None
    assert again.on((600, 400)) == (0, 0, 1, 1)


def test_a_picture_that_may_be_the_original_or_the_view_is_neither() -> None:
    transform = T.Compose([T.Resize(60), T.CenterCrop(40), T.ToTensor()])
    picture = Image.new("RGB", (150, 150))
    result = torchcam.explain(Bright(), picture, transform=transform, target_layer="layer", class_idx=0, image=picture)
    assert result.view == pytest.approx((1 / 6, 1 / 6, 5 / 6, 5 / 6), abs=0.003)
    with pytest.warns(UserWarning, match="it has the shape of the original as well as of the model's view"):
        result.overlay(image=Image.new("RGB", (300, 300)))


def test_a_page_draws_the_map_in_its_place() -> None:
    picture = Image.new("RGB", (300, 120))
    transform = T.Compose([T.Resize(60), T.CenterCrop(60), T.ToTensor()])
    result = torchcam.explain(
        Bright(), dotted((300, 120), (0.5, 0.5)), transform=transform, target_layer="layer", class_idx=0, image=picture
    )
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', result.to_html(), re.DOTALL)
    (entry,) = json.loads(text)["items"][0]["methods"][0]["maps"]
    assert entry["shape"] == [120, 300]
    undefined = np.frombuffer(base64.b64decode(entry["values"]), dtype="<u2").reshape(120, 300) == 65535
    assert undefined[:, :85].all()
    assert undefined[:, 215:].all()
    assert not undefined[:, 95:205].any()


class TestCells:
    def test_places_of_any_kind(self) -> None:
        """Two tiles beside each other and one below them; the last token has no place."""
        nan = float("nan")
        boxes = [[0, 0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5, 1], [0, 0.5, 0, 1, 1], [nan] * 5, [1, 0, 0, 1, 1]]
        cells = Cells(torch.tensor(boxes))
        values = [1.0, 2.0, 3.0, 9.0, 5.0]
        assert on_picture(values, cells, (4, 2)).tolist() == [[1, 1, 2, 2], [3, 3, 3, 3]]
        assert on_picture(values, cells, (2, 1), picture=1).tolist() == [[5, 5]]

    def test_cells_that_lie_over_each_other_are_averaged(self) -> None:
        cells = Cells(torch.tensor([[0, 0, 0, 1, 1.0], [0, 0, 0, 1, 0.5]]))
        assert on_picture([2.0, 4.0], cells, (4, 1)).tolist() == [[3, 3, 2, 2]]

    def test_a_grid_is_the_cells_of_its_positions(self) -> None:
        cells = Cells.of_grid((2, 3), (0.1, -0.2, 0.9, 1.0))
        expected = [
            [0, 0.1 + 0.4 * r, -0.2 + 0.4 * c, 0.5 + 0.4 * r, 0.2 + 0.4 * c] for r in range(2) for c in range(3)
        ]
        assert torch.allclose(cells.boxes, torch.tensor(expected, dtype=torch.float64))

    def test_a_mirrored_grid(self) -> None:
        there = on_picture([[1.0, 2.0], [3.0, 4.0]], Cells.of_grid((2, 2)), (8, 6))
        back = on_picture([[1.0, 2.0], [3.0, 4.0]], Cells.of_grid((2, 2), (1, 1, 0, 0)), (8, 6))
        assert np.array_equal(there, back[::-1, ::-1])

    def test_values_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"of shape \(1, 4\) do not fit 4 cells of the grid \(2, 2\)"):
            on_picture(np.zeros((1, 4)), Cells.of_grid((2, 2)), (8, 8))
