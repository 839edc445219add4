"""The imputation of removed positions against a sparse direct solve, equation by equation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics_under_test import direct_imputation
from torchcam.metrics import _imputation
from torchcam.metrics._imputation import impute


def hole(kind: str, shape: tuple[int, ...], count: int) -> Tensor:
    """The positions that are removed: blobs, single ones at random, one hole in the middle, all but a corner."""
    generator = torch.Generator().manual_seed(sum(shape))
    if kind == "smooth":
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
        coarse = torch.rand(1, 1, *(min(side, 5) for side in shape), generator=generator)
        order = torch.nn.functional.interpolate(coarse, shape, mode=mode)[0, 0]
    elif kind == "scattered":
        order = torch.rand(shape, generator=generator)
    else:
        middle = 0.5 if kind == "middle" else 0.0
        axes = torch.meshgrid(*(torch.linspace(-middle, 1 - middle, side) for side in shape), indexing="ij")
        order = sum(axis**2 for axis in axes) * (-1 if kind == "middle" else 1)
    first = torch.as_tensor(order).flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(order.numel(), dtype=torch.bool).index_fill_(0, first, value=True).reshape(shape)


SHAPES = [(2,), (7,), (200,), (2, 2), (1, 9), (6, 1), (7, 5), (33, 31), (64, 40), (3, 3, 3), (9, 8, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "scattered", "middle", "corner"])
def test_against_a_direct_solve(shape: tuple[int, ...], kind: str, device: torch.device) -> None:
    size = int(np.prod(shape))
    counts = sorted({min(max(size * percent // 100, 1), size - 1) for percent in (20, 80, 98, 100)})
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((len(counts), 3, *shape), generator=generator, dtype=torch.float64)
    removed = torch.stack([hole(kind, shape, count) for count in counts])
    expected = torch.stack([direct_imputation(*pair) for pair in zip(image, removed, strict=True)])
    found = impute(image.to(device), removed.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-8)
    found = impute(image.float().to(device), removed.to(device))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("percent", [20, 80])
def test_size_of_photographs(percent: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 3, 224, 224), generator=generator)
    removed = torch.stack([hole(kind, (224, 224), 224 * 224 * percent // 100) for kind in ("smooth", "middle")])
    expected = torch.stack([direct_imputation(*pair) for pair in zip(image, removed, strict=True)])
    found = impute(image.to(device), removed.to(device)).cpu().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_by_hand(device: torch.device) -> None:
    # The middle of 3 x 3: a sixth of each direct neighbour, a twelfth of each diagonal one.
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 99.0, 5.0], [6.0, 7.0, 8.0]]]], device=device)
    removed = torch.zeros(1, 3, 3, dtype=torch.bool, device=device)
    removed[0, 1, 1] = True
    filled = impute(image, removed)
    assert filled[0, 0, 1, 1].item() == pytest.approx((2 + 4 + 5 + 7) / 6 + (1 + 3 + 6 + 8) / 12)
    assert torch.equal(filled[~removed.unsqueeze(1)], image[~removed.unsqueeze(1)])
    # A corner has two direct neighbours and one diagonal one, of weight 2/6 + 1/12 = 5/12 in all.
    image[0, 0, 1, 1], removed[0, 1, 1], removed[0, 0, 0] = 10.0, False, True
    assert impute(image, removed)[0, 0, 0, 0].item() == pytest.approx((2 * 2 + 2 * 4 + 10) / 5)


def test_what_is_left_stays_and_what_was_removed_does_not_matter(device: torch.device) -> None:
    image = torch.randn(2, 3, 20, 18, device=device)
    removed = torch.stack([hole("smooth", (20, 18), count) for count in (100, 300)]).to(device)
    filled = impute(image, removed)
    gone = removed.unsqueeze(1).expand_as(image)
    assert torch.equal(filled[~gone], image[~gone])
    for other in (1e30, torch.nan, torch.inf):
        assert torch.equal(impute(torch.where(gone, other, image), removed), filled)
    # A weighted mean lies between what it is of.
    highest = image.masked_fill(gone, -torch.inf).amax((2, 3), keepdim=True)
    lowest = image.masked_fill(gone, torch.inf).amin((2, 3), keepdim=True)
    assert ((filled <= highest + 1e-5) & (filled >= lowest - 1e-5)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_linear_in_the_input(scale: float, offset: float) -> None:
    image = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    removed = hole("smooth", (24, 24), 400).unsqueeze(0)
    expected = (impute(image, removed) + offset) * scale
    found = impute(((image + offset) * scale).float(), removed)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7 if offset else 1e-4, atol=1e-5 * scale)


def test_constant_inputs_are_filled_exactly() -> None:
    image = torch.full((1, 1, 50, 50), 0.1)
    for kind in ("smooth", "middle", "corner"):
        filled = impute(image, hole(kind, (50, 50), 2499).unsqueeze(0))
        torch.testing.assert_close(filled, image, rtol=2e-7, atol=0)


def test_nothing_removed_and_nothing_left() -> None:
    image = torch.randn(3, 2, 6, 6)
    removed = torch.stack([torch.zeros(6, 6), torch.ones(6, 6), torch.eye(6)]).bool()
    filled = impute(image, removed)
    assert torch.equal(filled[0], image[0])
    assert filled[1].isnan().all()
    assert torch.equal(filled[2], impute(image[2:], removed[2:])[0])


def test_broken_channels_break_no_others() -> None:
    image = torch.randn(2, 2, 16, 16)
    removed = torch.stack([hole("smooth", (16, 16), 120)] * 2)
    expected = impute(image, removed)
    place = tuple((~removed[0]).nonzero()[0].tolist())
    for bad in (torch.nan, -torch.inf):
        broken = image.clone()
        broken[(0, 1, *place)] = bad
        filled = impute(broken, removed)
        assert filled[0, 1][removed[0]].isnan().all()
        for sample, channel in ((0, 0), (1, 0), (1, 1)):
            torch.testing.assert_close(filled[sample, channel], expected[sample, channel], rtol=0, atol=1e-5)


def test_batch_is_its_samples() -> None:
    image = torch.randn(4, 3, 30, 21, dtype=torch.float64)
    removed = torch.stack([hole(kind, (30, 21), 400) for kind in ("smooth", "scattered", "middle", "corner")])
    together = impute(image, removed)
    alone = torch.cat([impute(*pair) for pair in zip(image.split(1), removed.split(1), strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_single(dtype: torch.dtype) -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    removed = hole("smooth", (32, 32), 700).unsqueeze(0)
    found = impute(image, removed)
    assert found.dtype == dtype
    assert torch.equal(found, impute(image.float(), removed).to(dtype))


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["smooth", "scattered", "middle"])
def test_iterations_do_not_grow_with_the_size(size: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight iterations do for an error of 1e-4 of what holes of four fifths of any size hold."""
    monkeypatch.setattr(_imputation, "_LAST", 8)
    monkeypatch.setattr(_imputation, "_FIRST_LOOK", 99)
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(size))
    removed = hole(kind, (size, size), size * size * 4 // 5).unsqueeze(0)
    eight = impute(image, removed)
    monkeypatch.setattr(_imputation, "_LAST", 100)
    exact = impute(image.double(), removed)
    assert (eight - exact).abs().amax() < 1e-4
