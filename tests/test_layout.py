"""Where the positions are: grids are found in maps and sequences of tokens, and put back."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcam.layout import (
    Layout,
    find_layout,
    first_tensor,
    has_consistent_stride,
    patch_grid,
    primary_tensors,
    replace_tensors,
)


def numbered(layout: Layout, batch_size: int, channels: int) -> tuple[Tensor, Tensor]:
    """A grid of consecutive numbers, and the tensor in the layout that holds it behind tokens of -1."""
    count = batch_size * channels * math.prod(layout.grid)
    grid = torch.arange(count, dtype=torch.float64).reshape(batch_size, channels, *layout.grid)
    if len(layout.positions) == len(layout.grid) and not layout.prefix:
        order = (layout.batch, layout.channels, *layout.positions)
        return grid, grid.permute([order.index(dimension) for dimension in range(grid.ndim)])
    tokens = grid.flatten(2).mT  # (N, T, C)
    tokens = torch.cat([tokens.new_full((batch_size, layout.prefix, channels), -1), tokens], 1)
    return grid, tokens if layout.batch == 0 else tokens.transpose(0, 1)


@pytest.mark.parametrize(
    ("shape", "input_shape", "grid", "channels", "prefix"),
    [
        # Channels first
        ((2, 512, 7, 7), (2, 3, 224, 224), (7, 7), 1, 0),
        ((2, 512, 7, 10), (2, 3, 224, 320), (7, 10), 1, 0),
        ((2, 7, 7, 7), (2, 3, 224, 224), (7, 7), 1, 0),
        ((2, 64, 112, 112), (2, 3, 224, 224), (112, 112), 1, 0),
        ((1, 1, 7, 10), (1, 3, 224, 320), (7, 10), 1, 0),
        ((1, 96, 13, 17), (1, 3, 224, 288), (13, 17), 1, 0),
        ((1, 10, 1, 1), (1, 3, 224, 224), (1, 1), 1, 0),
        # Channels last
        ((2, 7, 7, 768), (2, 3, 224, 224), (7, 7), 3, 0),
        ((2, 7, 10, 768), (2, 3, 224, 320), (7, 10), 3, 0),
        ((2, 56, 80, 96), (2, 3, 224, 320), (56, 80), 3, 0),
        ((2, 14, 14, 7), (2, 3, 224, 224), (14, 14), 3, 0),
        # Pooled in one direction only
        ((1, 2, 2, 1), (1, 2, 2, 2), (2, 1), 1, 0),
        # Few channels: both readings fit, but only one leaves nothing over
        ((1, 8, 12, 16), (1, 3, 64, 96), (8, 12), 3, 0),
        ((1, 10, 12, 18), (1, 3, 64, 96), (12, 18), 1, 0),
        # Tokens of square and other images, with no, one, two or five before them
        *[
            ((2, prefix + 14 * columns, 192), (2, 3, 224, 16 * columns), (14, columns), 2, prefix)
            for prefix in (0, 1, 2, 5)
            for columns in (14, 20)
        ],
        *[
            ((2, prefix + 16 * columns, 32), (2, 3, 224, pixels), (16, columns), 2, prefix)
            for prefix in (0, 1, 2, 5)
            for columns, pixels in ((16, 224), (22, 320), (23, 322))  # patches of 14: what is left over is dropped
        ],
        ((1, 24 * 12 + 1, 8), (1, 3, 384, 192), (24, 12), 2, 1),
        ((2, 49, 768), (2, 3, 224, 224), (7, 7), 2, 0),
        # One, and three dimensions
        ((2, 16, 25), (2, 1, 100), (25,), 1, 0),
        ((2, 64, 50), (2, 12, 50), (50,), 1, 0),
        ((2, 25, 160), (2, 1, 100), (25,), 2, 0),
        ((2, 8, 4, 7, 7), (2, 3, 8, 112, 112), (4, 7, 7), 1, 0),
        ((2, 4, 7, 7, 96), (2, 3, 8, 112, 112), (4, 7, 7), 4, 0),
        ((1, 1, 5, 7, 6), (1, 1, 10, 14, 12), (5, 7, 6), 1, 0),
        ((2, 1 + 8 * 7 * 7, 96), (2, 3, 16, 224, 224), (8, 7, 7), 2, 1),
        ((2, 4 * 7 * 10, 96), (2, 3, 8, 224, 320), (4, 7, 10), 2, 0),
    ],
)
def test_the_grid_of_known_shapes(
    shape: tuple[int, ...], input_shape: tuple[int, ...], grid: tuple[int, ...], channels: int, prefix: int
) -> None:
    layout = find_layout(shape, input_shape, "layer")
    assert (layout.grid, layout.batch, layout.channels, layout.prefix) == (grid, 0, channels, prefix)
    numbers, tensor = numbered(layout, shape[0], shape[channels])
    assert tensor.shape == shape
    assert torch.equal(layout.to_grid(tensor), numbers)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_batch_may_be_second(prefix: int) -> None:
    layout = find_layout((prefix + 14 * 20, 3, 64), (3, 3, 224, 320), "layer")
    assert layout == Layout((14, 20), batch=1, channels=2, positions=(0,), prefix=prefix)
    grid, tensor = numbered(layout, 3, 64)
    assert torch.equal(layout.to_grid(tensor), grid)


def test_a_transposed_grid_is_not_taken() -> None:
    """Of an image wider than high, the grid is wider than high, whatever else has as many positions."""
    wide, high = (2, 3, 224, 320), (2, 3, 320, 224)
    assert find_layout((2, 281, 8), wide, "layer").grid == (14, 20)
    assert find_layout((2, 281, 8), high, "layer").grid == (20, 14)
    grid = torch.zeros(2, 8, 14, 20)
    grid[:, :, 3, 17] = 1
    tokens = torch.cat([torch.zeros(2, 1, 8), grid.flatten(2).mT], 1)
    assert find_layout(tokens.shape, wide, "layer").to_grid(tokens)[0, 0].nonzero().tolist() == [[3, 17]]
    # A map whose grid lies across the image has its channels elsewhere.
    assert find_layout((2, 7, 10, 7), wide, "layer").grid == (7, 10)
    assert find_layout((2, 7, 10, 7), high, "layer").grid == (10, 7)
    assert not has_consistent_stride((20, 14), (224, 320))
    assert has_consistent_stride((14, 20), (224, 320))


layouts = st.builds(
    lambda sides, tokens, prefix, second, last: (
        Layout(sides, int(second), 2, (1 - int(second),), prefix)
        if tokens
        else Layout(sides, 0, len(sides) + 1, tuple(range(1, len(sides) + 1)))
        if last
        else Layout(sides, 0, 1, tuple(range(2, len(sides) + 2)))
    ),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)


@settings(deadline=None, max_examples=100)
@given(layouts, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_there_and_back(layout: Layout, batch_size: int, channels: int, copies: int) -> None:
    grid, tensor = numbered(layout, batch_size, channels)
    assert torch.equal(layout.to_grid(tensor), grid)
    assert torch.equal(layout.from_grid(layout.to_grid(tensor), tensor), tensor)
    # Edited copies of one sample's grid take their prefix tokens from that sample, which holds -1 there.
    one = tensor.narrow(layout.batch, 0, 1)
    edited = torch.cat([grid[:1] + 1000 * copy for copy in range(1, copies + 1)])
    back = layout.from_grid(edited, one)
    assert back.shape[layout.batch] == copies
    assert torch.equal(layout.to_grid(back), edited)
    assert (back == -1).sum() == copies * channels * layout.prefix


@settings(deadline=None, max_examples=150)
@given(
    st.integers(3, 24),
    st.integers(3, 24),
    st.sampled_from([4, 7, 8, 14, 16, 32]),
    st.integers(0, 5),
)
def test_patches_of_any_size_are_found(rows: int, columns: int, patch: int, prefix: int) -> None:
    spatial = (rows * patch, columns * patch)
    layout = find_layout((2, prefix + rows * columns, 5), (2, 3, *spatial), "layer")
    assert (layout.grid, layout.prefix) == ((rows, columns), prefix)
    assert patch_grid(rows * columns, spatial) == (rows, columns)


@pytest.mark.parametrize(
    ("shape", "input_shape", "message"),
    [
        ((2, 10), (2, 3, 224, 224), "has no spatial extent"),
        ((2,), (2, 3, 224, 224), "has no spatial extent"),
        ((2, 10), None, "has no spatial extent"),
        ((2, 14 * 20 + 9, 64), (2, 3, 224, 320), "forms no grid"),
        ((50, 7, 9, 9, 3), (2, 3, 224, 224), "forms no grid"),
        ((8, 49, 96), (2, 3, 224, 224), "forms no grid"),  # windows lie in the batch
    ],
)
def test_the_error_shows_the_shape_and_the_way_out(
    shape: tuple[int, ...], input_shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_layout(shape, input_shape, "some.layer")
    text = str(caught.value)
    assert str(shape) in text
    assert "`target_layer` 'some.layer'" in text
    assert "reshape_transform" in text
    assert input_shape is None or str(input_shape) in text


def test_patches_that_form_no_grid() -> None:
    assert patch_grid(280, (224, 320)) == (14, 20)
    with pytest.raises(ValueError, match=r"281 patches form no grid on an input of \(224, 320\)"):
        patch_grid(281, (224, 320))


def test_without_an_input_channels_come_first() -> None:
    assert find_layout((2, 7, 10, 768), None, "layer").grid == (10, 768)
    assert find_layout((2, 8, 9), None, "layer").grid == (9,)


@dataclass
class Output:
    name: str
    hidden: Tensor
    other: Tensor


def test_the_tensors_meant_by_an_output() -> None:
    a, b = torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 4, 4)
    assert first_tensor((None, "x", [b, a])) is b
    assert first_tensor(Output("x", a, b)) is a
    assert first_tensor("no tensor") is None
    assert primary_tensors("no tensor") == {}
    assert primary_tensors(a) == {"": a}
    assert primary_tensors((b, a)) == {"": b}
    # All levels of a feature pyramid are meant, but not all entries of any dictionary.
    assert list(primary_tensors({"0": a, "1": a + 1, "pool": b})) == ["['0']", "['1']", "['pool']"]
    assert primary_tensors(OrderedDict([("0", a), ("pool", b)])) == {"['0']": a, "['pool']": b}
    assert primary_tensors({"out": a, "aux": a + 1}) == {"": a}
    assert primary_tensors({"map": a, "logits": b[:, :, 0, 0]}) == {"": a}


def test_replacing_keeps_everything_else() -> None:
    a, b, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    output = Output("x", a, b)
    replaced = replace_tensors((output, {"again": a}), [(a, new)])
    assert replaced[0].hidden is new
    assert replaced[0].other is b
    assert replaced[0].name == "x"
    assert replaced[1]["again"] is new
    assert output.hidden is a
