"""ROAD, ADCC and ARCC: by hand, and against their definitions sample by sample."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.metrics_under_test import SOFTMAX, Given, Line, cnn, direct_imputation, images, states
from torchcam.methods import GradCAM
from torchcam.metrics import ADCC, ARCC, ROAD

ROW = torch.tensor([[[1.0, 5.0, 2.0, 4.0, 9.0]]])  # a score of 21


def test_road_by_hand(device: torch.device) -> None:
    # In a line each position becomes the mean of its two neighbours, at an end its only one.
    maps = torch.tensor([[0.1, 0.9, 0.0, 0.5, 0.2]])
    metric = ROAD(Line(), percentiles=(20, 40), noise=0)
    metric.update(ROW.to(device), maps=maps)
    # The 5 becomes 1.5; the 4 as well, 5.5. Then the 2 becomes 4.5; the 1 as well: both are 5.
    morf = ((1.5 - 5) + (1.5 - 5 + 5.5 - 4)) / 2
    lerf = ((4.5 - 2) + (4.5 - 2 + 4)) / 2
    lerf_of_ends = ((4.5 - 2) + (4.5 + 5 - 2 - 1)) / 2
    assert lerf == lerf_of_ends
    assert metric.summary() == pytest.approx({"morf": morf, "lerf": lerf, "road": (lerf - morf) / 2})


def test_equal_values_are_removed_in_their_order() -> None:
    metric = ROAD(Line(), percentiles=(40,), noise=0)
    metric.update(ROW, maps=torch.ones(1, 5))
    # The first two positions, 1 and 5, become 2. The last two, 4 and 9, as well.
    assert metric.morf.item() == pytest.approx(2 + 2 - 1 - 5)
    assert metric.lerf.item() == pytest.approx(2 + 2 - 4 - 9)


@pytest.mark.parametrize("ties", [1, 2, 5, 1000])
@pytest.mark.parametrize("percentiles", [(20, 40, 60, 80), (0.5, 33.4, 99.9), (50,)])
def test_exactly_the_stated_share_is_removed(ties: int, percentiles: tuple[float, ...]) -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.flatten(1).sum(1, keepdim=True)

    x = torch.rand(2, 3, 13, 11)
    maps = torch.rand(2, 13, 11).mul(ties).ceil() / ties  # that many values
    metric = ROAD(Watching(), percentiles=percentiles, noise=1.0, batch_size=3)
    metric.update(x, maps=maps)
    variants = torch.cat(seen[1:]).unflatten(0, (2, -1))
    removed = (variants != x.unsqueeze(1)).all(2)  # the noise changes whatever was removed
    counts = [math.floor(percentile * 143 / 100 + 1e-9) for percentile in percentiles]
    assert removed.sum((2, 3)).tolist() == [counts + counts] * 2
    kept = maps.unsqueeze(1).expand(-1, len(counts), -1, -1)
    most, least = removed.split(len(counts), 1)
    for gone, sign in ((most, 1), (least, -1)):
        outside = (sign * kept).masked_fill(gone, -math.inf).flatten(2).amax(2)
        inside = (sign * kept).masked_fill(~gone, math.inf).flatten(2).amin(2)
        assert (inside >= outside).all()


def test_noise() -> None:
    seen: list[Tensor] = []

    class Watching(Line):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    x, maps = torch.zeros(2, 3, 60, 60), torch.rand(2, 60, 60)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        ROAD(Watching(), noise=0.25, seed=seed).update(x, maps=maps)
    assert torch.equal(before, torch.get_rng_state())
    _, first, _, same, _, other = seen
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    drawn = first[first != 0]
    assert len(drawn) == 2 * 3 * 2 * 3600 * 2  # 20 + 40 + 60 + 80 percent, twice
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.25, rel=0.02)
    fields = first.unflatten(0, (2, 8))
    both = (fields[0] != 0) & (fields[1] != 0)
    assert torch.equal(fields[0][both], fields[1][both])  # the same for every sample
    assert not torch.equal(fields[0, 3][fields[0, 3] != 0], fields[0, 7][fields[0, 7] != 0])


# Against the definitions, in float64.


def score(model: nn.Module, image: Tensor, class_idx: int) -> float:
    with torch.no_grad():
        return float(model(image.unsqueeze(0))[0, class_idx])


def road_of(model: nn.Module, image: Tensor, m: Tensor, class_idx: int, percentiles: Any) -> tuple[float, float]:
    """The changes of one sample's score, most and least relevant first, without noise."""
    highest_first = sorted(range(m.numel()), key=lambda i: (-float(m.flatten()[i]), i))
    changes = []
    for order in (highest_first, highest_first[::-1]):
        scores = []
        for percentile in percentiles:
            removed = torch.zeros(m.numel(), dtype=torch.bool)
            removed[order[: m.numel() * percentile // 100]] = True
            filled = direct_imputation(image, removed.reshape(m.shape))
            scores.append(score(model, filled, class_idx))
        changes.append(float(np.mean(scores)) - score(model, image, class_idx))
    return changes[0], changes[1]


def maps_of(method: Any, model: nn.Module, x: Tensor, classes: list[int]) -> Tensor:
    with method(model, "4") as extractor:
        model(x)
        (cams,) = extractor(classes)
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return nn.functional.interpolate(cams.unsqueeze(1), x.shape[2:], mode=mode, align_corners=False).squeeze(1)


def correlation(a: Tensor, b: Tensor) -> float:
    if a.amin() == a.amax() or b.amin() == b.amax():
        return 0.0  # nothing correlates with a constant
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_against_the_definition(dim: int, device: torch.device) -> None:
    x, classes, percentiles = images(3, dim), [2, 0, 3], (20, 50, 80)
    model = nn.Sequential(*cnn(dim), nn.Softmax(-1)).eval()
    maps = maps_of(GradCAM, model, x, classes)
    again = maps_of(GradCAM, model, x * maps.unsqueeze(1), classes)
    expected: dict[str, list[float]] = {key: [] for key in ("morf", "lerf", "road", "coherency", "complexity", "drop")}
    for image, m, other, c in zip(x, maps, again, classes, strict=True):
        morf, lerf = road_of(model, image, m, c, percentiles)
        p, kept = score(model, image, c), score(model, image * m, c)
        parts = morf, lerf, (lerf - morf) / 2, (correlation(other, m) + 1) / 2, float(m.mean()), max(0, p - kept) / p
        for key, part in zip(expected, parts, strict=True):
            expected[key].append(part)
    coherency, complexity = np.array(expected["coherency"]), np.array(expected["complexity"])
    drop, gain = np.array(expected["drop"]), np.clip(2 * np.array(expected["road"]), 0, 1)

    def harmonic(*values: Any) -> Any:
        values = np.array(values)
        return np.where(values.min(0) <= 0, 0, 3 / (1 / np.where(values > 0, values, 1)).sum(0))[()]

    means = {key: np.mean(values) for key, values in expected.items()}
    with GradCAM(cnn(dim, device), "4") as extractor:
        road = ROAD(extractor, SOFTMAX, percentiles=percentiles, noise=0, batch_size=4)
        adcc = ADCC(extractor, SOFTMAX, batch_size=2)
        arcc = ARCC(extractor, SOFTMAX, percentiles=percentiles, noise=0, batch_size=4)
        for metric in (road, adcc, arcc):
            metric.update(x.to(device), classes)
    assert road.summary() == pytest.approx({key: means[key] for key in ("morf", "lerf", "road")}, rel=1e-7, abs=1e-10)
    shared = {key: means[key] for key in ("coherency", "complexity")}
    assert adcc.summary() == pytest.approx(
        {
            "adcc": harmonic(coherency, 1 - complexity, 1 - drop).mean(),
            "adcc_of_means": harmonic(means["coherency"], 1 - means["complexity"], 1 - means["drop"]),
            **shared,
            "avg_drop": means["drop"],
        },
        rel=1e-9,
    )
    assert arcc.summary() == pytest.approx(
        {
            "arcc": harmonic(coherency, 1 - complexity, gain).mean(),
            "arcc_of_means": harmonic(means["coherency"], 1 - means["complexity"], np.clip(2 * means["road"], 0, 1)),
            **shared,
            "road": means["road"],
        },
        rel=1e-7,
        abs=1e-10,
    )


# ADCC and ARCC by hand.


class Turning(Given):
    """Gives one map for the first pass it watches, and another for those that follow."""

    def __init__(self, model: nn.Module, first: Tensor, then: Tensor) -> None:
        super().__init__(model, first)
        self.then = then

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        maps, self.maps = self.maps, [self.then]
        return maps


@pytest.mark.parametrize(
    ("again", "coherency"),
    [
        ([1.0, 0.5, 0.0, 0.5], 1.0),
        ([0.0, 0.5, 1.0, 0.5], 0.0),
        ([0.5, 1.0, 0.5, 0.0], 0.5),
        ([0.3, 0.3, 0.3, 0.3], 0.5),
    ],
)
def test_adcc_by_hand(again: list[float], coherency: float, device: torch.device) -> None:
    x = torch.tensor([[[4.0, 2.0, 1.0, 1.0]]], device=device)  # scores 8, and 5.5 with the map: a drop of 5/16
    m = torch.tensor([[1.0, 0.5, 0.0, 0.5]], device=device)
    metric = ADCC(Turning(Line(), m, torch.tensor([again], device=device)))
    metric.update(x)
    harmonic = 3 / (1 / coherency + 1 / 0.5 + 1 / (11 / 16)) if coherency else 0.0
    expected = {"adcc": harmonic, "adcc_of_means": harmonic, "coherency": coherency, "complexity": 0.5}
    assert metric.summary() == pytest.approx({**expected, "avg_drop": 5 / 16})


def test_means_of_images_and_of_means_differ() -> None:
    x = torch.tensor([[[4.0, 4.0]], [[6.0, 2.0]]])
    m = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # drops 1/2 and 1/4, complexity 1/2
    metric = ADCC(Turning(Line(), m, torch.tensor([[1.0, 0.0], [0.0, 0.0]])))  # coherencies 1 and 1/2
    metric.update(x)
    assert metric.summary() == pytest.approx(
        {
            "adcc": (3 / (1 + 2 + 2) + 3 / (2 + 2 + 4 / 3)) / 2,
            "adcc_of_means": 3 / (4 / 3 + 2 + 8 / 5),
            "coherency": 0.75,
            "complexity": 0.5,
            "avg_drop": 3 / 8,
        }
    )


def test_a_drop_of_more_than_all() -> None:
    metric = ADCC(Turning(Line(-2.0), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])))
    metric.update(torch.tensor([[[3.0, 0.0]]]))  # from 1 to -2
    values = metric.summary()
    assert values["avg_drop"] == 3
    assert values["adcc"] == values["adcc_of_means"] == 0


def test_arcc_by_hand() -> None:
    m = torch.tensor([[0.0, 1.0, 0.0, 0.6, 0.0]])
    # Scores are a tenth of the sums. Most relevant first, the 5 becomes 1.5; least relevant first, the 9 becomes 4.
    metric = ARCC(Turning(Line(), m, m), lambda y: y / 10, percentiles=(20,), noise=0)
    metric.update(ROW)
    road = (-0.5 + 0.35) / 2
    values = {"arcc": 0.0, "arcc_of_means": 0.0, "coherency": 1.0, "complexity": 0.32, "road": road}
    assert metric.summary() == pytest.approx(values)
    # With the 2 in the 9's place as the last, and the other way round, the score goes up by 2 and down by 3.5.
    x = torch.tensor([[[1.0, 5.0, 2.0, 4.0, 2.0]]])
    metric = ARCC(Turning(Line(), m, m), lambda y: y / 10, percentiles=(20,), noise=0)
    metric.update(x)
    road = (0.2 + 0.35) / 2
    arcc = 3 / (1 + 1 / 0.68 + 1 / (2 * road))
    assert metric.summary()["arcc"] == pytest.approx(arcc)
    assert metric.summary()["arcc_of_means"] == pytest.approx(arcc)
    metric = ARCC(Turning(Line(), m, m), percentiles=(20,), noise=0)  # scores ten times as high
    metric.update(x)
    assert metric.summary()["arcc"] == pytest.approx(3 / (1 + 1 / 0.68 + 1))


def test_arcc_has_the_road_of_road() -> None:
    with GradCAM(cnn(), "4") as extractor:
        arcc, road, adcc = ARCC(extractor, SOFTMAX), ROAD(extractor, SOFTMAX), ADCC(extractor, SOFTMAX)
        for metric in (arcc, road, adcc):
            metric.update(images())
    assert states(arcc)["road"] == pytest.approx(states(road)["lerf"] / 2 - states(road)["morf"] / 2, rel=1e-9)
    assert states(arcc)["coherency"] == states(adcc)["coherency"]
    assert states(arcc)["complexity"] == states(adcc)["complexity"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"percentiles": ()}, ValueError, r"`percentiles` must be shares above 0 and below 100 percent.*got \(\)"),
        ({"percentiles": (20, 100)}, ValueError, r"`percentiles`.*something must be left.*100\)"),
        ({"percentiles": (0,)}, ValueError, "`percentiles`"),
        ({"percentiles": (math.nan,)}, ValueError, "`percentiles`"),
        ({"percentiles": 20}, TypeError, "`percentiles` must be a sequence of numbers.*, got 20"),
        ({"percentiles": "20"}, TypeError, r"`percentiles` must be a sequence of numbers, such as .*got '20'"),
        ({"percentiles": ["a"]}, TypeError, "`percentiles` must be a number, got 'a' of type str"),
        ({"noise": "a"}, TypeError, "`noise` must be a number, got 'a' of type str"),
        ({"seed": 2**70}, ValueError, r"`seed` must be from -2\*\*63 to 2\*\*64 - 1, got 1180591620717411303424"),
        ({"noise": -0.1}, ValueError, "`noise`.*-0.1"),
        ({"noise": math.inf}, ValueError, "`noise`"),
        ({"seed": 1.5}, TypeError, "`seed` must be an integer, got 1.5"),
        ({"batch_size": 0}, ValueError, "`batch_size`.*0"),
        ({"logits_fn": "softmax"}, TypeError, "`logits_fn`"),
        ({"steps": 3}, ValueError, "Unexpected keyword arguments: `steps`"),
    ],
)
@pytest.mark.parametrize("new", [ROAD, ARCC])
def test_bad_options(new: Any, kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        new(Given(Line()), **kwargs)


@pytest.mark.parametrize("new", [ROAD, ARCC])
def test_options_are_plain_values_that_count(new: Any) -> None:
    metric = new(Given(Line()), percentiles=torch.tensor([20, 40]), noise=np.float32(0.5), seed=3)
    assert (metric.percentiles, metric.noise, metric.seed) == ((20, 40), 0.5, 3)
    assert [type(value) for value in (*metric.percentiles, metric.noise)] == [int, int, float]


def test_options_of_adcc() -> None:
    with pytest.raises(TypeError, match=r"`batch_size`.*True"):
        ADCC(Given(Line()), batch_size=True)


def test_one_batched_solve_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchcam.metrics import faithfulness

    solved: list[torch.Size] = []

    def spy(image: Tensor, removed: Tensor) -> Tensor:
        solved.append(image.shape)
        return image

    monkeypatch.setattr(faithfulness, "impute", spy)
    metric = ROAD(Line(), percentiles=(20, 40, 60, 80), batch_size=10)
    metric.update(torch.rand(3, 2, 6, 6), maps=torch.rand(3, 6, 6))
    assert solved == [(10, 2, 6, 6), (10, 2, 6, 6), (4, 2, 6, 6)]


def test_tiny_inputs() -> None:
    """Of two positions a fifth is none: the score does not change. Four fifths are one."""
    metric = ROAD(Line(), percentiles=(20,), noise=0)
    x = torch.tensor([[[[3.0, 1.0]]]])
    metric.update(x, maps=torch.tensor([[[1.0, 0.0]]]))
    assert metric.summary() == {"morf": 0.0, "lerf": 0.0, "road": 0.0}
    metric = partial(ROAD, Line(), percentiles=(80,), noise=0)()
    metric.update(x, maps=torch.tensor([[[1.0, 0.0]]]))
    assert metric.summary() == pytest.approx({"morf": -2.0, "lerf": 2.0, "road": 2.0})
