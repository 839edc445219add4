import re

import numpy as np
import pytest
import torch
from matplotlib.colors import ListedColormap
from PIL import Image

from tests.oracles import faded, looks_like
from torchcam.utils import colormap_of, overlay_map, overlay_mask

# Matplotlib's jet at its ends and in the middle (entry 128 of 256).
COLD, MIDDLE, HOT = (0, 0, 128), (125, 255, 122), (128, 0, 0)
NAN = float("nan")


def picture(values: list[list[float]], dtype: str) -> Image.Image:
    """An image of the mode that Pillow gives to a dtype: `u1` is L, `<u2` I;16, `>u2` I;16B, `i4` I, `f4` F."""
    return Image.fromarray(np.array(values, dtype=dtype))


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    """The pixels of an RGB image, row by row."""
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def overlay_row(mask: Image.Image, **kwargs: object) -> list[tuple[int, ...]]:
    """The first row of a mask drawn alone, over nothing."""
    return pixels(overlay_mask(Image.new("RGB", mask.size), mask, **{"alpha": 0, **kwargs}))[0]


class TestMask:
    @pytest.mark.parametrize(
        ("dtype", "mode", "row"),
        [
            ("u1", "L", [0, 128, 255]),
            ("f4", "F", [0, 0.5, 1]),
            ("<u2", "I;16", [0, 32896, 65535]),
            (">u2", "I;16B", [0, 32896, 65535]),
        ],
    )
    def test_full_range_of_the_mode_spans_the_colormap(self, dtype: str, mode: str, row: list[float]) -> None:
        mask = picture([row], dtype)
        assert mask.mode == mode
        assert overlay_row(mask) == [COLD, MIDDLE, HOT]

    def test_binary_mask(self) -> None:
        mask = picture([[0, 255]], "u1").convert("1")
        assert mask.mode == "1"
        assert overlay_row(mask) == [COLD, HOT]

    def test_every_level_of_an_8_bit_mask_is_one_entry_of_the_colormap(self) -> None:
        row = overlay_row(picture([list(range(256))], "u1"), colormap="gray")
        assert row == [(level, level, level) for level in range(256)]

    def test_float_values_beyond_the_range_take_the_nearest_end(self) -> None:
        assert overlay_row(picture([[-3.0, 7.0]], "f4")) == [COLD, HOT]

    def test_resized_with_the_bicubic_kernel_and_clipped(self) -> None:
        # Upsampling (0, 1) to four pixels: the outer two overshoot to -0.088 and 1.088. The second pixel is at distance
        # 1/4 and 3/4 of the sources, where the kernel (a = -1/2) is 0.8671875 and 0.2265625: 0.2265625 / 1.09375 =
        # 0.2071 is entry 53 of 256; by symmetry the third is 0.7929, entry 202.
        result = overlay_mask(Image.new("L", (4, 1)), picture([[0, 1]], "f4"), colormap="gray", alpha=0)
        assert [pixel[0] for pixel in pixels(result)[0]] == [0, 53, 202, 255]

    def test_constant_mask_stays_constant_when_resized(self) -> None:
        result = overlay_mask(Image.new("L", (7, 5)), picture([[255]], "u1"), alpha=0)
        assert result.size == (7, 5)
        assert pixels(result) == [[HOT] * 7] * 5

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I", "CMYK"])
    def test_other_modes_are_refused_by_name(self, mode: str) -> None:
        with pytest.raises(ValueError, match=f"`mask` has mode '{mode}'"):
            overlay_mask(Image.new("RGB", (2, 2)), Image.new(mode, (2, 2)))


class TestUndefinedMask:
    @pytest.mark.parametrize("undefined", [NAN, float("inf"), -float("inf")])
    def test_image_shows_through_unchanged(self, undefined: float) -> None:
        result = overlay_mask(picture([[40, 40, 40]], "u1"), picture([[1, undefined, 0]], "f4"), alpha=0.5)
        # (40 + 127.5) / 2 = 83.75.
        assert pixels(result) == [[(84, 20, 20), (40, 40, 40), (20, 20, 84)]]

    def test_all_undefined_gives_the_image(self) -> None:
        image = picture([[0, 100, 200, 255]], "u1")
        assert overlay_mask(image, picture([[NAN, NAN]], "f4")).tobytes() == image.convert("RGB").tobytes()

    def test_does_not_spread_when_resized(self) -> None:
        mask = picture([[0.5, 0.5, NAN, 0.5]], "f4")
        result = overlay_mask(Image.new("L", (8, 1)), mask, alpha=0)
        assert pixels(result) == [[MIDDLE] * 4 + [(0, 0, 0)] * 2 + [MIDDLE] * 2]

    def test_colour_for_bad_values(self) -> None:
        colormap = ListedColormap(["black", "white"]).with_extremes(bad="red")
        assert overlay_row(picture([[0, NAN, 1]], "f4"), colormap=colormap) == [(0, 0, 0), (255, 0, 0), (255, 255, 255)]


class TestBlend:
    def test_default_is_jet_under_seventy_percent_of_the_image(self) -> None:
        # 0.7 * (10, 20, 30) + 0.3 * (127.5, 0, 0) = (45.25, 14, 21); over white, red is 216.75.
        image = Image.fromarray(np.array([[[10, 20, 30], [255, 255, 255]]], dtype=np.uint8))
        result = pixels(overlay_mask(image, picture([[255, 255]], "u1")))
        assert result[0][0] == (45, 14, 21)
        assert result[0][1][0] == 217

    def test_alpha_zero_is_the_colormap_alone(self) -> None:
        assert pixels(overlay_mask(Image.new("RGB", (1, 1), (9, 8, 7)), Image.new("L", (1, 1), 255), alpha=0)) == [
            [HOT]
        ]

    def test_alpha_of_numpy(self) -> None:
        white, black = Image.new("RGB", (1, 1), "white"), Image.new("L", (1, 1), 0)
        assert pixels(overlay_mask(white, black, "gray", np.float32(0.25))) == [[(64, 64, 64)]]

    def test_transparent_part_of_a_colormap_shows_the_image(self) -> None:
        colormap = ListedColormap([(1, 0, 0, 0), (1, 0, 0, 1)])
        result = overlay_mask(Image.new("RGB", (2, 1), (0, 200, 0)), picture([[0, 1]], "f4"), colormap, alpha=0.5)
        assert pixels(result) == [[(0, 200, 0), (128, 100, 0)]]

    def test_inputs_are_left_alone(self) -> None:
        image, mask = picture([[1, 2]], "u1"), picture([[0.25, 1]], "f4")
        overlay_mask(image, mask)
        assert np.asarray(image).tolist() == [[1, 2]]
        assert np.asarray(mask).tolist() == [[0.25, 1]]


class TestBackground:
    # A mask that is undefined everywhere returns the background as it was read.

    @staticmethod
    def read(image: Image.Image) -> list[tuple[int, ...]]:
        return pixels(overlay_mask(image, Image.new("F", (1, 1), NAN)))[0]

    @pytest.mark.parametrize(
        ("dtype", "mode", "row", "grey"),
        [
            ("u1", "L", [0, 100, 255], [0, 100, 255]),
            ("<u2", "I;16", [0, 25700, 65535], [0, 100, 255]),
            (">u2", "I;16B", [0, 25700, 65535], [0, 100, 255]),
            ("i4", "I", [0, 25700, 65535], [0, 100, 255]),
            ("f4", "F", [0, 0.4, 1], [0, 102, 255]),
        ],
    )
    def test_greyscale_is_scaled_from_its_full_range(
        self, dtype: str, mode: str, row: list[float], grey: list[int]
    ) -> None:
        image = picture([row], dtype)
        assert image.mode == mode
        assert self.read(image) == [(value, value, value) for value in grey]

    def test_binary(self) -> None:
        assert self.read(picture([[0, 255]], "u1").convert("1")) == [(0, 0, 0), (255, 255, 255)]

    def test_palette_is_read_as_colours_not_as_indices(self) -> None:
        image = picture([[0, 1]], "u1").convert("P")
        image.putpalette([250, 10, 20, 0, 200, 30])
        assert self.read(image) == [(250, 10, 20), (0, 200, 30)]

    @pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
    def test_palette_with_transparency_is_refused(self, transparency: int | bytes) -> None:
        image = Image.new("P", (1, 1))
        image.info["transparency"] = transparency
        with pytest.raises(ValueError, match=r'a palette with transparency: pass `img\.convert\("RGB"\)`'):
            overlay_mask(image, Image.new("L", (1, 1)))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "HSV", "YCbCr", "LAB"])
    def test_other_modes_are_refused_with_the_remedy(self, mode: str) -> None:
        with pytest.raises(ValueError, match=rf'mode \'{mode}\': pass `img\.convert\("RGB"\)`'):
            overlay_mask(Image.new(mode, (1, 1)), Image.new("L", (1, 1)))

    @pytest.mark.parametrize(
        ("dtype", "row", "message"),
        [
            ("f4", [0, 255], r"values in \[0\.0, 255\.0\]; this mode needs \[0, 1\]"),
            ("f4", [0, NAN], r"values in \[nan, nan\]; this mode needs \[0, 1\]"),
            ("i4", [-1, 5], r"values in \[-1\.0, 5\.0\]; this mode needs \[0, 65535\]"),
            ("i4", [0, 70000], r"values in \[0\.0, 70000\.0\]; this mode needs \[0, 65535\]"),
        ],
    )
    def test_values_out_of_range_are_refused(self, dtype: str, row: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            overlay_mask(picture([row], dtype), Image.new("L", (1, 1)))


class TestArguments:
    image, mask = Image.new("RGB", (1, 1)), Image.new("L", (1, 1))

    @pytest.mark.parametrize("alpha", [-0.1, 1, 1.0, 2.5, NAN, float("inf"), True, False, None, "0.5", [0.5]])
    def test_bad_alpha(self, alpha: object) -> None:
        with pytest.raises(ValueError, match=r"`alpha` must be a number in \[0, 1\), got"):
            overlay_mask(self.image, self.mask, alpha=alpha)

    def test_not_an_image(self) -> None:
        with pytest.raises(TypeError, match="`img` must be a PIL image, got ndarray"):
            overlay_mask(np.zeros((1, 1, 3), dtype=np.uint8), self.mask)
        with pytest.raises(TypeError, match="`mask` must be a PIL image, got str"):
            overlay_mask(self.image, "mask.png")

    def test_unknown_colormap_names_the_closest(self) -> None:
        with pytest.raises(
            ValueError, match=r"`colormap` 'virdis' is not a matplotlib colormap; did you mean 'viridis'"
        ):
            overlay_mask(self.image, self.mask, colormap="virdis")
        with pytest.raises(ValueError, match=r"there are those of `matplotlib\.colormaps`"):
            overlay_mask(self.image, self.mask, colormap="?")

    def test_colormap_of_a_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="`colormap` must be a name or a matplotlib Colormap, got int"):
            overlay_mask(self.image, self.mask, colormap=3)


class TestOverlayMap:
    def test_numbers_of_any_kind_are_as_opaque_as_they_are_strong(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
        values = np.random.default_rng(1).random((3, 4))
        for given in (values, values.tolist(), torch.from_numpy(values)):
            assert looks_like(overlay_map(image, given, "jet", 0.3), faded(image, values, "jet", 0.3))

    def test_signed_maps_have_their_middle_at_zero(self) -> None:
        row = pixels(overlay_map(Image.new("L", (3, 1), 9), [[-1.0, 0.0, 1.0]], "gray", 0, signed=True))[0]
        assert row == [(0, 0, 0), (9, 9, 9), (255, 255, 255)]

    def test_the_signed_default_leaves_the_image_alone_at_zero(self) -> None:
        image = Image.new("RGB", (3, 1), (10, 20, 30))
        against, nothing, for_it = pixels(overlay_map(image, [[-1.0, 0.0, 1.0]], alpha=0, signed=True))[0]
        assert nothing == (10, 20, 30)
        assert against == (59, 76, 192)  # the ends of matplotlib's coolwarm
        assert for_it == (180, 4, 38)

    def test_defaults(self) -> None:
        assert pixels(overlay_map(Image.new("L", (2, 1), 7), [[0.0, 1.0]], alpha=0))[0] == [(7, 7, 7), (253, 231, 37)]
        image = Image.new("RGB", (40, 30), "white")
        values = np.linspace(0, 1, 12).reshape(3, 4)
        assert looks_like(overlay_map(image, values), faded(image, values))
        assert colormap_of("jet", signed=True).name == "jet"

    @pytest.mark.parametrize("shape", [(3,), (1, 2, 2), (0, 2)])
    def test_what_is_no_map(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=re.escape(f"(height, width), got shape {shape}")):
            overlay_map(Image.new("L", (2, 2)), np.zeros(shape))
