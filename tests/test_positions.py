"""Inputs whose positions are not behind their channels: series (N, T, C), spectrograms (N, T, F), films (N, T, C, ...).

The oracle is the same net for an input (N, C, *positions).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchcam
from tests.models import shuffled
from torchcam.methods import (
    ISCAM,
    SSCAM,
    GradCAM,
    GroupCAM,
    ScoreCAM,
    SmoothGradCAMpp,
)
from torchcam.metrics import DeletionInsertionMetric
from torchcam.trust import trust

MASKED = {
    "ScoreCAM": ScoreCAM,
    "SSCAM": partial(SSCAM, num_samples=2),
    "ISCAM": partial(ISCAM, num_samples=2),
    "GroupCAM": partial(GroupCAM, groups=3),
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions over 1, 2 or 3 dimensions of an input that is brought to (N, C, *positions)."""

    def __init__(self, dim: int, channels: int, order: tuple[int, ...] | None = None, kernel: int = 3) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.body = nn.Sequential(
            conv(channels, 6, kernel, padding=kernel // 2), nn.Tanh(), conv(6, 6, 2, 2), nn.Tanh()
        )
        self.fc = nn.Linear(6, 4)
        self.order = order
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == ():
            x = x.unsqueeze(1)
        elif self.order is not None:
            x = x.permute(self.order)
        return self.fc(self.body(x).flatten(2).mean(2))


# dimensions, channels, the order of the input, the usual input, and the same as the net takes it
CASES: dict[str, tuple[int, int, tuple[int, ...], Tensor, Tensor]] = {
    "series (N, T, C)": (1, 6, (0, 2, 1), noise(2, 6, 24), noise(2, 6, 24).mT.contiguous()),
    "series of as many channels as times": (1, 12, (0, 2, 1), noise(2, 12, 12), noise(2, 12, 12).mT.contiguous()),
    "spectrogram (N, T, F)": (2, 1, (), noise(2, 1, 20, 12), noise(2, 20, 12)),
    "film (N, T, C, H, W)": (
        3,
        3,
        (0, 2, 1, 3, 4),
        noise(2, 3, 8, 12, 16),
        noise(2, 3, 8, 12, 16).transpose(1, 2).contiguous(),
    ),
}


@pytest.mark.parametrize("layer", ["body", None])
@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("case", CASES)
def test_masks_lie_along_the_positions(case: str, method: str, layer: str | None) -> None:
    dim, channels, order, usual, given = CASES[case]
    maps = []
    for x, one in ((usual, None), (given, order)):
        model = Net(dim, channels, one).eval()
        with MASKED[method](model, layer, input_shape=tuple(x.shape[1:])) as extractor, torch.no_grad():
            model(x)
            assert extractor.target_names == ["body"]
            maps.append(extractor(1)[0])
    assert maps[0].shape == (2, *(side // 2 for side in usual.shape[2:]))
    assert maps[0].max() == 1
    torch.testing.assert_close(maps[1], maps[0])


def test_masks_with_a_reshape_transform_lie_along_the_positions_that_fit_its_grid() -> None:
    dim, channels, order, usual, given = CASES["film (N, T, C, H, W)"]
    maps = []
    for x, one in ((usual, None), (given, order)):
        model = Net(dim, channels, one).eval()
        with ScoreCAM(model, "body", reshape_transform=lambda t: t) as extractor, torch.no_grad():
            model(x)
            maps.append(extractor(1)[0])
    torch.testing.assert_close(maps[1], maps[0])


def test_what_changes_parts_of_the_input_refuses_other_orders() -> None:
    """A map of (T,) over an input (N, T, C) would be taken for one of its features."""
    dim, channels, order, _, x = CASES["series (N, T, C)"]
    model = Net(dim, channels, order).eval()
    expected = r"positions of the model's input of shape \(2, 24, 6\) lie along its dimensions \(1,\)"
    with GradCAM(model, "body") as extractor:
        metric = DeletionInsertionMetric(extractor)
        with pytest.raises(ValueError, match=expected):
            metric.update(x, 1)
    with pytest.raises(ValueError, match=expected):
        trust(model, x, 1, target_layer="body", methods=["GradCAM"])
    with GradCAM(model, "body") as extractor:
        model(x)
        assert "inverted" not in [finding.code for finding in extractor.diagnose(1)]


def test_powers_of_small_gradients() -> None:
    """The third power of a gradient of 1e-25 is 0 in float32: by hand in float64."""
    maps: list[Any] = []
    for scale in (1.0, 2.0**83):
        model = Net(2, 3).eval()
        model.body.register_forward_hook(lambda _m, _i, output, scale=scale: output.abs() * scale)
        with torch.no_grad():
            model.fc.weight /= scale
        with SmoothGradCAMpp(model, "body") as extractor, torch.no_grad():
            model(noise(2, 3, 12, 12))
            maps.append(extractor(1)[0])
    torch.testing.assert_close(*maps)


def test_an_input_that_is_no_picture_over_one_of_another_shape() -> None:
    """Nothing tells where it lies: the map covers all of the picture, with a warning."""
    from PIL import Image

    result = torchcam.explain(Net(2, 1, ()).eval(), noise(1, 32, 32), target_layer="body", class_idx=1)
    assert result.image is None
    same = result.overlay(image=Image.new("RGB", (64, 64)))  # warnings are errors
    assert same.size[0] == same.size[1]
    with pytest.warns(UserWarning, match="`image` of 64 × 32 is not known .* so the map is drawn over all of it"):
        drawn = result.overlay(image=Image.new("RGB", (64, 32)))
    assert drawn.width == 2 * drawn.height
