"""Conversion of inputs and arrays to pictures."""

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchcam._pictures import data_uri, enlarged, fitted, from_unit_range, to_picture


def pixels(picture: Image.Image) -> np.ndarray[Any, Any]:
    assert picture.mode == "RGB"
    return np.asarray(picture, dtype=int)


class TestToPicture:
    def test_three_channels_in_the_unit_range_are_colours(self) -> None:
        sample = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0]).reshape(3, 1, 2)
        found = pixels(to_picture(sample))
        assert found.tolist() == [[[0, 128, 230], [51, 178, 255]]]

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_other_channels_are_averaged_to_grey(self, channels: int) -> None:
        sample = torch.linspace(0, 1, channels * 6).reshape(channels, 2, 3)
        expected = np.rint(255 * sample.mean(0).numpy())
        assert np.array_equal(pixels(to_picture(sample)), np.stack([expected] * 3, axis=-1))

    def test_other_ranges_are_stretched(self) -> None:
        found = pixels(to_picture(torch.tensor([[[-2.0, 0.0, 2.0]]])))
        assert found[0, :, 0].tolist() == [0, 128, 255]

    def test_rounding_out_of_the_range_is_clipped(self) -> None:
        found = pixels(to_picture(torch.tensor([[[-0.01, 0.5, 1.015]]])))
        assert found[0, :, 0].tolist() == [0, 128, 255]

    def test_constant_and_undefined_values(self) -> None:
        assert (pixels(to_picture(torch.full((3, 2, 2), 7.0))) == 0).all()
        found = pixels(to_picture(torch.tensor([[[math.nan, 0.5, math.inf, 1.0]]])))
        assert found[0, :, 0].tolist() == [0, 128, 0, 255]

    def test_a_normalisation_is_undone(self) -> None:
        image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
        normalised = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert np.array_equal(pixels(to_picture(normalised, (mean, std))), pixels(to_picture(image)))
        assert np.array_equal(pixels(to_picture(2 * image - 1, ([0.5], [0.5]))), pixels(to_picture(image)))

    def test_the_wrong_normalisation_is_not_undone(self) -> None:
        image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
        for numbers in (([5.0] * 3, [1.0] * 3), ([0.5] * 4, [0.5] * 4)):
            assert np.array_equal(pixels(to_picture(image, numbers)), pixels(to_picture(image)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8])
    def test_types(self, dtype: torch.dtype) -> None:
        sample = torch.tensor([[[0.0, 1.0]]]).to(dtype)
        assert pixels(to_picture(sample))[0, :, 0].tolist() == [0, 255]

    def test_signals_and_volumes(self) -> None:
        band = pixels(to_picture(torch.linspace(0, 1, 9).reshape(1, 9)))
        assert band.shape == (3, 9, 3)
        assert (band == band[:1]).all()
        volume = torch.zeros(1, 2, 2, 2)
        volume[0, 1, 0, 1] = 1
        assert pixels(to_picture(volume))[..., 0].tolist() == [[0, 255], [0, 0]]


def test_arrays_are_rounded_and_clipped() -> None:
    found = from_unit_range([[-1.0, 0.5, 2.0, math.nan]])
    assert found.mode == "L"
    assert np.asarray(found).tolist() == [[0, 128, 255, 0]]
    assert from_unit_range(np.zeros((2, 3, 4))).mode == "RGBA"


def test_sizes() -> None:
    image = Image.new("RGB", (30, 10))
    assert fitted(image, 30) is image
    assert fitted(image, 15).size == (15, 5)
    assert fitted(Image.new("L", (1000, 1)), 10).size == (10, 1)
    assert enlarged(Image.new("RGB", (256, 10))).size == (256, 10)
    assert enlarged(Image.new("RGB", (255, 85))).size == (765, 255)


@pytest.mark.parametrize(("size", "kind"), [((128, 128), "PNG"), ((129, 128), "JPEG")])
def test_data_uri(size: tuple[int, int], kind: str) -> None:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    head, _, text = data_uri(image).partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as read:
        assert read.format == kind
        assert np.abs(pixels(read) - pixels(image)).max() <= (0 if kind == "PNG" else 8)
