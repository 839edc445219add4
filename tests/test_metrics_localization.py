"""Localization: by hand, and against a slow reference position by position."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics_under_test import SHAPES, SOFTMAX, Given, Line, cnn, images
from torchcam.methods import GradCAM
from torchcam.metrics import Localization


def measured(maps: Any, evidence: Any, region: Any = None, **options: Any) -> dict[str, float]:
    """The six numbers of one map."""
    m, mask = torch.tensor(maps, dtype=torch.float64), torch.tensor(evidence, dtype=torch.bool)
    metric = Localization(**options)
    region = None if region is None else torch.tensor(region).unsqueeze(0)
    metric.update(torch.zeros(1, 1, *m.shape), maps=m.unsqueeze(0), masks=mask.unsqueeze(0), region=region)
    return metric.summary()


def test_by_hand(device: torch.device) -> None:
    maps = torch.tensor([[[0.1, 0.8, 0.3], [0.2, 1.0, 0.6]]], device=device)
    masks = torch.tensor([[[0, 1, 1], [0, 0, 1]]], device=device)
    metric = Localization()
    metric.update(torch.zeros(1, 3, 2, 3, device=device), maps=maps, masks=masks)
    assert metric.summary() == pytest.approx(
        {
            "pointing_game": 0.0,  # the 1 is outside
            "average_precision": (1 / 2 + 2 / 3 + 3 / 4) / 3,  # 1 (outside), 0.8, 0.6, 0.3
            "energy": (0.8 + 0.3 + 0.6) / 3,
            "rank_accuracy": 2 / 3,  # of 1, 0.8 and 0.6
            "iou": 2 / 4,  # at least 0.5: two inside, one outside
            "best_iou": 3 / 4,  # at least 0.3
        }
    )


@pytest.mark.parametrize(
    ("tolerance", "hit"),
    [(0, 0.0), (0.99, 0.0), (1, 1.0), (1.4, 1.0)],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tolerance_is_a_distance(tolerance: float, hit: float, axis: int) -> None:
    for dims in range(axis + 1, 4):
        m, mask = torch.zeros([5] * dims), torch.zeros([5] * dims, dtype=torch.bool)
        m[(2,) * dims] = 1.0
        mask[tuple(3 if each == axis else 2 for each in range(dims))] = True
        found = measured(m.tolist(), mask.tolist(), tolerance=tolerance)
        assert found["pointing_game"] == hit
        assert found["iou"] == 0.0  # the tolerance is for pointing only


@pytest.mark.parametrize(("tolerance", "hit"), [(1, 0.0), (1.41, 0.0), (1.42, 1.0), (2, 1.0)])
def test_tolerance_is_a_circle(tolerance: float, hit: float) -> None:
    found = measured([[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]], tolerance=tolerance)
    assert found["pointing_game"] == hit


def test_equals() -> None:
    found = measured([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1, 0, 1, 1, 1, 0])
    assert found["pointing_game"] == pytest.approx(2 / 3)
    assert found["average_precision"] == pytest.approx((2 * (2 / 3) + 2 * (4 / 6)) / 4)  # two steps: 1, then 0
    # The four highest are the three 1s, of which two count, and one of three 0s, of which two do.
    assert found["rank_accuracy"] == pytest.approx((2 + 2 / 3) / 4)
    assert found["iou"] == 2 / 5
    assert found["best_iou"] == 4 / 6  # all: of equals, none is taken alone


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_map_is_chance(value: float) -> None:
    found = measured([[value] * 5] * 4, [[1, 1, 0, 0, 0]] * 4)
    assert found == pytest.approx(dict.fromkeys(found, 0.4))


def test_the_mask_itself_is_perfect() -> None:
    mask = [[1, 0, 0], [1, 1, 0]]
    found = measured(mask, mask)
    assert found == dict.fromkeys(found, 1.0)
    wrong = measured([[0, 1, 1], [0, 0, 1]], mask)
    assert wrong == dict.fromkeys(wrong, 0.0) | {"average_precision": 0.5, "best_iou": 0.5}  # all of the input


def test_negative_values_do_not_count() -> None:
    found = measured([2.0, 1.0, -5.0, -1.0], [1, 0, 1, 0])
    assert found["energy"] == pytest.approx(2 / 3)
    assert found["rank_accuracy"] == pytest.approx(1 / 2)
    assert found["best_iou"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(("threshold", "iou"), [(0.0, 2 / 4), (0.25, 2 / 3), (0.26, 1 / 2), (1.0, 1 / 2)])
def test_threshold_is_a_share_of_the_peak(threshold: float, iou: float) -> None:
    for scale in (1.0, 0.01, 30.0):
        found = measured([4 * scale, scale, scale, 0.5 * scale], [1, 1, 0, 0], threshold=threshold)
        assert found["iou"] == pytest.approx(iou)


def test_a_power_moves_energy_and_overlap_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand((5, 9, 7), generator=generator, dtype=torch.float64) - 0.1
    maps[0].round_(decimals=1)  # with equals
    masks = torch.rand((5, 9, 7), generator=generator) < 0.3
    metric, sharpened = Localization(), Localization()
    metric.update(torch.zeros(5, 1, 9, 7), maps=maps, masks=masks)
    sharpened.update(torch.zeros(5, 1, 9, 7), maps=maps.relu() ** 8, masks=masks)
    before, after = metric.summary(), sharpened.summary()
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {"energy", "iou"}


@pytest.mark.parametrize("digits", [1, 2, 9])
@pytest.mark.parametrize("within", [False, True])
def test_average_precision_is_that_of_scikit_learn(digits: int, within: bool, device: torch.device) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    generator = torch.Generator().manual_seed(digits)
    maps = torch.rand((8, 13, 11), generator=generator, dtype=torch.float64).round(decimals=digits)
    masks = torch.rand((8, 13, 11), generator=generator) < 0.2
    region = torch.rand((8, 13, 11), generator=generator) < (0.5 if within else 1.1)
    expected = [
        metrics.average_precision_score(mask[counts].numpy(), m[counts].numpy())
        for m, mask, counts in zip(maps, masks, region, strict=True)
    ]
    for row, wanted in enumerate(expected):
        metric = Localization()
        one = slice(row, row + 1)
        counts = region[one].to(device) if within else None
        metric.update(torch.zeros(1, 1, 13, 11, device=device), maps=maps[one], masks=masks[one], region=counts)
        assert metric.summary()["average_precision"] == pytest.approx(wanted, rel=1e-12)


# A region.


def test_a_region_is_all_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand((6, 8, 8), generator=generator, dtype=torch.float64) - 0.2
    maps[0] = 0.3
    maps[1, :, :5] = -1.0  # nothing positive in the region
    maps[2].round_(decimals=1)
    masks = torch.rand((6, 8, 8), generator=generator) < 0.4
    region = torch.zeros(6, 8, 8, dtype=torch.bool)
    region[:, 2:7, :5] = True
    metric, cut = Localization(threshold=0.3), Localization(threshold=0.3)
    metric.update(torch.zeros(6, 1, 8, 8), maps=maps, masks=masks, region=region)
    cut.update(torch.zeros(6, 1, 5, 5), maps=maps[:, 2:7, :5], masks=masks[:, 2:7, :5])
    assert metric.summary() == pytest.approx(cut.summary(), rel=1e-12)


def test_which_of_two_objects() -> None:
    maps, mask, region = [9.0, 3.0, 2.0, 1.0], [0, 1, 0, 1], [0, 1, 1, 1]
    assert measured(maps, mask, region) == pytest.approx(
        {
            "pointing_game": 1.0,
            "average_precision": (1 + 2 / 3) / 2,
            "energy": 4 / 6,
            "rank_accuracy": 1 / 2,
            "iou": 1 / 3,
            "best_iou": 2 / 3,
        }
    )
    chance = measured([9.0, 0.0, 0.0, 0.0], mask, region)
    assert chance == pytest.approx(dict.fromkeys(chance, 2 / 3))


def test_a_sample_without_evidence_in_its_region() -> None:
    metric = Localization()
    masks, region = torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.tensor([[0, 1, 1], [0, 1, 0]])
    metric.update(torch.zeros(2, 1, 3), maps=torch.rand(2, 3), masks=masks, region=region)
    assert (int(metric.total), int(metric.empty_count)) == (1, 1)
    assert metric.summary()["average_precision"] == 1.0
    metric.update(torch.zeros(2, 1, 3), maps=torch.rand(2, 3), masks=masks, region=torch.zeros(2, 3).int())
    assert (int(metric.total), int(metric.empty_count)) == (1, 3)


# Boxes.


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((0, 0, 2, 1), [(0, 0), (0, 1)]),
        ((1, 0, 2, 2), [(0, 1), (1, 1)]),
        ((0.4, 0.5, 1.5, 1.6), [(0, 0), (1, 0)]),  # centres are at 0.5, 1.5, ...; the far side is not inside
        ((0.51, 0.51, 2.4, 1.5), []),
        ((-9, -9, 99, 1), [(0, 0), (0, 1), (0, 2)]),
    ],
)
def test_boxes(box: tuple[float, ...], inside: list[tuple[int, int]], device: torch.device) -> None:
    x, maps = torch.zeros(1, 3, 2, 3, device=device), torch.rand(1, 2, 3, device=device)
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    for place in inside:
        mask[(0, *place)] = True
    for boxes in (torch.tensor([box]), [torch.tensor([box])], [[box]], [torch.tensor(box)], torch.tensor([[box]])):
        metric, expected = Localization(), Localization()
        metric.update(x, boxes=boxes, maps=maps)
        expected.update(x, masks=mask, maps=maps)
        assert (int(metric.total), int(metric.empty_count)) == ((1, 0) if inside else (0, 1))
        assert torch.equal(metric.energy, expected.energy)


def test_several_boxes() -> None:
    x, maps = torch.zeros(3, 3, 6, 6), torch.rand(3, 6, 6)
    mask = torch.zeros(3, 6, 6, dtype=torch.bool)
    mask[0, :2, :3] = mask[0, 1:5, 2:4] = mask[2, 5, 5] = True
    boxes = [torch.tensor([[0, 0, 3, 2], [2, 1, 4, 5]]), torch.zeros(0, 4), torch.tensor([[5.0, 5.0, 6.0, 6.0]])]
    metric, expected = Localization(), Localization()
    metric.update(x, boxes=boxes, maps=maps)
    expected.update(x, masks=mask, maps=maps)
    assert metric.summary() == expected.summary()
    assert (int(metric.total), int(metric.nan_count), int(metric.empty_count)) == (2, 0, 1)


def test_samples_without_evidence() -> None:
    x, maps = torch.zeros(4, 1, 2, 2), torch.rand(4, 2, 2)
    masks = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]])
    maps[3, 0, 0] = torch.nan
    metric, some = Localization(), Localization()
    metric.update(x, maps=maps, masks=masks)
    some.update(x[[0, 2]], maps=maps[[0, 2]], masks=masks[[0, 2]])
    assert (int(metric.total), int(metric.empty_count), int(metric.nan_count)) == (2, 1, 1)
    assert metric.summary() == some.summary()
    metric.reset()
    assert int(metric.empty_count) == 0


# Against a reference.


def reference(m: np.ndarray, mask: np.ndarray, tolerance: float, threshold: float) -> dict[str, float]:
    """The numbers of one map, from the definitions."""
    m = np.maximum(m, 0)
    peaks, evidence = np.argwhere(m == m.max()), np.argwhere(mask)
    hits = [min(math.dist(peak, place) for place in evidence) <= tolerance for peak in peaks]
    order = sorted(np.ndindex(m.shape), key=lambda place: -m[place])
    overlaps = [np.sum((m >= level) & mask) / np.sum((m >= level) | mask) for level in np.unique(m)]
    shown = m >= threshold * m.max()
    steps = [(np.mean(mask[m >= level]), np.mean(m[mask] == level)) for level in np.unique(m[mask])]
    return {
        "pointing_game": float(np.mean(hits)),
        "average_precision": float(sum(precision * gain for precision, gain in steps)),
        "energy": m[mask].sum() / m.sum(),
        "rank_accuracy": float(np.mean([mask[place] for place in order[: mask.sum()]])),
        "iou": np.sum(shown & mask) / np.sum(shown | mask),
        "best_iou": max(overlaps),
    }


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("tolerance", [0, 1.5])
def test_against_the_definitions(dim: int, tolerance: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(dim)
    shape = SHAPES[dim]
    maps = torch.rand((6, *shape), generator=generator, dtype=torch.float64) - 0.3
    masks = torch.rand((6, *shape), generator=generator) < 0.3
    metric = Localization(tolerance=tolerance, threshold=0.7)
    metric.update(torch.zeros(6, 1, *shape, device=device), maps=maps, masks=masks)
    slow = [reference(m.numpy(), mask.numpy(), tolerance, 0.7) for m, mask in zip(maps, masks, strict=True)]
    expected = {key: np.mean([each[key] for each in slow]) for key in slow[0]}
    assert metric.summary() == pytest.approx(expected, rel=1e-12)


def test_maps_of_the_extractor() -> None:
    x, classes = images(), [2, 0, 1]
    masks = x[:, 0] > 0
    with GradCAM(cnn(), "4") as extractor:
        metric, given = Localization(extractor, SOFTMAX), Localization()
        metric.update(x, classes, masks=masks)
        whole = torch.nn.Sequential(*cnn(), torch.nn.Softmax(-1)).eval()
        with GradCAM(whole, "4") as outer:
            whole(x)
            (maps,) = outer(classes)
        given.update(x, maps=maps, masks=masks)
        assert metric.summary() == pytest.approx(given.summary(), rel=1e-9)
        metric.update(x, targets=lambda p: p[1], masks=masks)
    assert int(metric.total) == 6


def test_the_model_is_not_called_for_given_maps() -> None:
    class Never(Line):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("there was no need")

    x, maps, masks = torch.zeros(1, 1, 3), torch.rand(1, 3), torch.tensor([[1, 0, 0]])
    found = []
    for source in (None, Never(), Given(Never())):
        metric = Localization(source)
        metric.update(x, 7, maps=maps, masks=masks)
        found.append(metric.summary())
    assert found[0] == found[1] == found[2]
    with pytest.raises(RuntimeError, match="was made without an extractor: give `maps`"):
        Localization().update(x, masks=masks)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of `masks` and `boxes`, got neither"),
        ({"masks": torch.ones(2, 3, 4).bool(), "boxes": torch.ones(2, 4)}, ValueError, "got both"),
        ({"masks": torch.ones(2, 3, 4)}, TypeError, r"`masks` must hold booleans or integers.*float32.*masks > 0\.5"),
        ({"masks": torch.ones(2, 4, 3).bool()}, ValueError, r"`masks`.*\(2, 3, 4\), got \(2, 4, 3\)"),
        ({"masks": torch.ones(1, 3, 4).bool()}, ValueError, r"`masks`.*got \(1, 3, 4\)"),
        (
            {"masks": torch.ones(2, 3, 4).bool(), "region": torch.ones(2, 3, 4)},
            TypeError,
            "`region` must hold booleans",
        ),
        ({"masks": torch.ones(2, 3, 4).bool(), "region": torch.ones(3, 4).int()}, ValueError, r"`region`.*\(3, 4\)"),
        ({"masks": [[1]]}, TypeError, "`masks` must be a tensor or an array.*list"),
        ({"boxes": torch.ones(3, 4)}, ValueError, "`boxes`.*for each of 2 samples, got 3"),
        ({"boxes": torch.ones(2, 5)}, ValueError, r"`boxes`.*\(2, 1, 5\)"),
        ({"boxes": [torch.ones(4), torch.ones(2, 3)]}, ValueError, r"`boxes`.*\(1, 4\), \(2, 3\)"),
        ({"boxes": 3}, TypeError, r"`boxes` must be a tensor \(N, 4\), or boxes \(k, 4\) for each sample, got 3"),
        ({"boxes": torch.tensor(3)}, TypeError, r"`boxes` must be a tensor \(N, 4\).*tensor\(3\)"),
        ({"boxes": [[0, 0, 1, 1], None]}, TypeError, r"`boxes` must hold numbers.*got None for sample 1"),
        ({"boxes": [[[0, 0, 1, 1], [2]], [0, 0, 1, 1]]}, TypeError, r"`boxes` must hold numbers.*\[2\]\] for sample 0"),
    ],
)
def test_bad_evidence(kwargs: Any, error: Any, message: str) -> None:
    metric = Localization()
    with pytest.raises(error, match=message):
        metric.update(torch.zeros(2, 1, 3, 4), maps=torch.ones(2, 3, 4), **kwargs)
    assert (int(metric.total), int(metric.empty_count)) == (0, 0)


@pytest.mark.parametrize("first", [[[0, 0, 2, 2]], torch.tensor([[0, 0, 2, 2]], dtype=torch.uint8), torch.zeros(0, 4)])
def test_boxes_of_several_types(first: Any) -> None:
    maps = torch.zeros(2, 4, 4)
    maps[:, 3, 3] = 1
    metric = Localization()
    metric.update(torch.zeros(2, 1, 4, 4), maps=maps, boxes=[first, [[2.6, 2.6, 3.9, 3.9]]])
    # Of the second sample, only the pixel with the centre (3.5, 3.5) is inside: from 2 on, there would be four.
    assert metric.iou.item() == 1.0


def test_boxes_are_for_images() -> None:
    with pytest.raises(ValueError, match=r"`boxes` are for images.*\(1, 1, 5\): give `masks`"):
        Localization().update(torch.zeros(1, 1, 5), maps=torch.ones(1, 5), boxes=torch.ones(1, 4))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"tolerance": -1}, ValueError, "`tolerance`.*-1"),
        ({"tolerance": math.inf}, ValueError, "`tolerance`.*inf"),
        ({"tolerance": "a"}, TypeError, "`tolerance` must be a number, got 'a' of type str"),
        ({"threshold": 1.5}, ValueError, "`threshold`.*1.5"),
        ({"threshold": math.nan}, ValueError, "`threshold`.*nan"),
        ({"threshold": "a"}, TypeError, "`threshold` must be a number, got 'a' of type str"),
    ],
)
def test_bad_options(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Localization(**kwargs)
