"""SanityCheck: by hand, against SciPy, and that the model gets back what is its own."""

from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image
from scipy.stats import spearmanr
from torch import Tensor, nn

from tests.metrics_under_test import SOFTMAX, Given, Line, assert_same, cnn, images, snapshot, states
from torchcam._tensors import resize
from torchcam.methods import CAM, EigenCAM, GradCAM
from torchcam.metrics import SanityCheck
from torchcam.metrics._statistics import cosine, pearson, spearman, structural_similarity


class Affine(nn.Module):
    """Scores (N, 2): of the input's mean, by weights in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Conv2d(1, 3, 3, padding=1)
        self.above = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x).flatten(2).mean(2))


class Sum(Given):
    """Maps that are those parameters' sum in the corner, whatever the input: what is randomised can be read off."""

    def __call__(self, class_idx: Any = None, scores: Any = None, *, targets: Any = None) -> list[Tensor]:
        sums = [sum(p.detach().sum() for p in layer.parameters()) for layer in (self.model.above, self.model.below)]
        maps = torch.zeros(len(scores), 2, 2)
        maps[:, 0, 0], maps[:, 1, 1] = sums
        self.maps.append(maps)
        return [maps.sigmoid()]


def test_layers_are_randomised_from_the_top_on() -> None:
    model = Affine()
    extractor = Sum(model)
    metric = SanityCheck(extractor)
    assert metric.layers == ("above", "below")
    drawn = []
    for _ in range(2):
        extractor.maps.clear()
        metric.update(torch.rand(1, 1, 4, 4))
        own, first, second, top, both = (maps[0].flatten()[[0, 3]].tolist() for maps in extractor.maps)
        assert own == first == second  # the explained pass, and those of the two best classes
        assert top[0] != own[0]
        assert top[1] == own[1]
        assert both[0] == top[0]  # stays as it was randomised
        assert both[1] != own[1]
        drawn.append((top, both))
    assert drawn[0] == drawn[1]  # the same for every batch
    for seed, same in ((0, True), (1, False)):
        extractor.maps.clear()
        SanityCheck(extractor, seed=seed).update(torch.rand(1, 1, 4, 4))
        assert (extractor.maps[3][0].flatten()[[0, 3]].tolist() == drawn[0][0]) is same


def test_random_parameters_have_the_scale_of_the_old_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 200, 5, padding=2), nn.Conv2d(200, 2, 1))
    with torch.no_grad():
        model[0].weight.mul_(3).add_(7)
        model[0].bias.fill_(0.5)
    seen = []

    class Spy(Given):
        def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            seen.append([p.detach().clone() for p in model.parameters()])
            return [torch.rand(1, 4, 4)]

    SanityCheck(Spy(model), layers="0").update(torch.rand(1, 1, 4, 4))
    (weight, bias, *rest), (new, same, *others) = seen[0], seen[-1]
    assert not torch.equal(weight, new)
    assert new.mean().item() == pytest.approx(weight.mean().item(), abs=0.1)
    assert new.std().item() == pytest.approx(weight.std().item(), rel=0.05)
    assert abs(np.corrcoef(weight.flatten(), new.flatten())[0, 1]) < 0.1
    assert torch.equal(bias, same)  # all alike, and so they stay
    assert all(map(torch.equal, rest, others))


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Affine(), ("above", "below")),
        (nn.Sequential(nn.ReLU(), Affine()), ("1.above", "1.below")),  # inside the only one
        (nn.Linear(3, 2), ("",)),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 2))), ("0.0",)),
    ],
)
def test_default_layers(model: nn.Module, layers: tuple[str, ...]) -> None:
    assert SanityCheck(Given(model)).layers == layers


def test_bad_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with pytest.raises(ValueError, match="`layers` '2' is not a module"):
        SanityCheck(Given(model), layers=["2"])
    with pytest.raises(ValueError, match=r"`layers` must be modules with parameters, got \['1'\]"):
        SanityCheck(Given(model), layers=["0", model[1]])
    with pytest.raises(ValueError, match="`layers` is an empty list: name at least one"):
        SanityCheck(Given(model), layers=[])
    with pytest.raises(ValueError, match="Line has no parameters that could be randomised"):
        SanityCheck(Given(Line()))
    with pytest.raises(TypeError, match="`seed` must be an integer, got '0'"):
        SanityCheck(Given(model), seed="0")
    with pytest.raises(ValueError, match="`batch_size`"):
        SanityCheck(Given(model), batch_size=0)


def test_numbers_are_those_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the maps of copies of the model with the same random parameters, one at a time."""
    model, x, classes = cnn(), images(), [1, 3, 0]
    parameters: list[dict[str, Tensor]] = []

    class Spy(GradCAM):
        def compute_cams(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            parameters.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            return super().compute_cams(*args, **kwargs)

    with Spy(model, "4") as extractor:
        metric = SanityCheck(extractor, SOFTMAX, layers=["7", "4", "0"])
        metric.update(x, classes)
    stages = parameters[-3:]
    own_values = parameters[0]
    changed = [
        {name.split(".")[0] for name in stage if not torch.equal(stage[name], own_values[name])} for stage in stages
    ]
    assert changed == [{"7"}, {"7", "4"}, {"7", "4", "0"}]

    def explain(values: dict[str, Tensor], wanted: list[int]) -> Tensor:
        copy = cnn().eval()
        copy.load_state_dict({**copy.state_dict(), **values})
        whole = nn.Sequential(*copy, nn.Softmax(-1)).eval()
        with GradCAM(whole, "4") as other:
            whole(x)
            (cams,) = other(wanted)
        return resize(cams.unsqueeze(1), x.shape[2:]).squeeze(1)

    own = explain(own_values, classes)
    by_layer = metric.by_layer()
    assert list(by_layer) == ["7", "4", "0"]
    for stage, numbers in zip(stages, by_layer.values(), strict=True):
        maps = explain(stage, classes)
        ranks = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(own, maps, strict=True)]
        assert numbers["rank_correlation"] == pytest.approx(np.mean(ranks), rel=1e-9)
        assert numbers["ssim"] == pytest.approx(structural_similarity(own, maps).mean().item(), rel=1e-9)
    best = cnn().eval()(x).topk(2).indices
    first, second = (explain(own_values, best[:, k].tolist()).flatten(1) for k in range(2))
    overlap = nn.functional.cosine_similarity(first, second).mean().item()
    summary = metric.summary()
    assert summary["class_overlap"] == pytest.approx(overlap, rel=1e-9)
    for key in ("rank_correlation", "ssim"):
        assert summary[key] == pytest.approx(np.mean([numbers[key] for numbers in by_layer.values()]))


def test_what_fails_the_checks() -> None:
    """A map that no parameter made, and one that no class did."""
    x = images()
    with EigenCAM(cnn(), "4") as agnostic:
        metric = SanityCheck(agnostic)
        metric.update(x)
        assert metric.summary()["class_overlap"] == pytest.approx(1.0)
    metric = SanityCheck(Given(cnn(), torch.rand(3, 9, 7)))
    metric.update(x)
    assert metric.summary() == pytest.approx({"rank_correlation": 1.0, "ssim": 1.0, "class_overlap": 1.0})
    with GradCAM(cnn(), "4") as extractor:
        metric = SanityCheck(extractor)
        metric.update(x)
        summary = metric.summary()
        assert summary["rank_correlation"] < 0.9
        assert summary["ssim"] < 0.9
        assert summary["class_overlap"] < 0.999


def test_a_method_that_reads_weights_reads_the_random_ones() -> None:
    with CAM(cnn(), "5", fc_layer="7") as extractor:
        metric = SanityCheck(extractor, layers="7")
        metric.update(images())
        assert metric.summary()["rank_correlation"] < 0.9


def test_one_class() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(2))

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(2)

    whole = nn.Sequential(*model, Mean())
    metric = SanityCheck(Given(whole, torch.rand(2, 4, 4)))
    metric.update(torch.rand(2, 3, 4, 4))
    values = metric.summary()
    assert np.isnan(values.pop("class_overlap"))
    assert values == pytest.approx({"rank_correlation": 1.0, "ssim": 1.0})
    assert int(metric.total) == 2


# What is the model's own.


@pytest.mark.parametrize("raises_at", [None, 1, 3, 4, 5])
def test_the_model_keeps_its_parameters(raises_at: int | None) -> None:
    """A replica is randomised: meanwhile the model's parameters are its own as well."""
    model = cnn()
    model[3].tied = nn.Linear(8, 4, dtype=torch.float64)  # the dropout does not call it
    model[3].tied.weight = model[7].weight  # in two places
    optimizer = torch.optim.Adam(model.parameters())
    model(images(1)).sum().backward()
    optimizer.step()
    before, objects = snapshot(model), dict(model.named_parameters(remove_duplicate=False))
    calls = []

    class Raising(GradCAM):
        def compute_cams(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            calls.append({name: p.detach().clone() for name, p in self.model.named_parameters(remove_duplicate=False)})
            meanwhile = dict(model.named_parameters(remove_duplicate=False))
            assert all(meanwhile[name] is objects[name] for name in objects)
            if len(calls) == raises_at:
                raise ZeroDivisionError("the extractor")
            return super().compute_cams(*args, **kwargs)

    with Raising(model, "4") as extractor:
        metric = SanityCheck(extractor, layers=["3.tied", "4"])
        if raises_at is None:
            metric.update(images())
        else:
            with pytest.raises(ZeroDivisionError, match="the extractor"):
                metric.update(images())
    if len(calls) == 5:
        assert torch.equal(calls[-1]["7.weight"], calls[-1]["3.tied.weight"])
        assert not torch.equal(calls[-1]["7.weight"], objects["7.weight"])
        assert torch.equal(calls[-1]["7.bias"], objects["7.bias"])
    assert_same(before, snapshot(model))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(objects)
    assert all(after[name] is objects[name] for name in objects)
    optimizer.step()
    assert not torch.equal(before["state"]["7.weight"], model[7].weight)


def test_recurrent_layers() -> None:
    """They keep a list of their parameters beside them."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3, padding=1)
            self.gru = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(self.conv(x).mT)[0].sum(1)

    model, x = Recurrent().eval(), torch.rand(2, 2, 12)
    expected = model(x)
    with GradCAM(model, "conv") as extractor:
        metric = SanityCheck(extractor, layers="gru")
        metric.update(x)
        assert metric.summary()["rank_correlation"] < 0.99
    assert torch.equal(model(x), expected)


# How alike maps are.


@pytest.mark.parametrize("values", [3, 10, 10**6])
def test_rank_correlation_is_that_of_scipy(values: int, device: torch.device) -> None:
    a, b = (torch.randint(values, (4, 9, 7), device=device).double() for _ in range(2))
    expected = [spearmanr(x.flatten().cpu(), y.flatten().cpu()).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_correlations_of_constant_and_broken_maps() -> None:
    maps = torch.rand(3, 5, 5)
    maps[0], maps[1, 2, 2] = 0.7, torch.nan
    for measure in (pearson, spearman):
        found = measure(maps, torch.rand(3, 5, 5))
        assert found[0] == 0
        assert found[1].isnan()
        assert 0 < abs(found[2]) < 1
        assert measure(maps[:1], maps[:1]).item() == 0


def test_structural_similarity_is_that_of_torchmetrics(device: torch.device) -> None:
    a, b = (torch.rand(2, 24, 30, device=device, dtype=torch.float64) for _ in range(2))
    reference = torchmetrics.functional.image.structural_similarity_index_measure
    _, expected = reference(a.unsqueeze(1), b.unsqueeze(1), data_range=1.0, reduction="none", return_full_image=True)
    assert structural_similarity(a, b).tolist() == pytest.approx(expected.mean((1, 2, 3)).tolist(), rel=1e-6)
    assert structural_similarity(a, a).tolist() == pytest.approx([1.0, 1.0])


def test_cosine() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [6.0, 8.0]])
    assert cosine(a, b).tolist() == pytest.approx([0.0, 1.0, 0.0, 1.0])


def test_states_are_one_for_each_layer() -> None:
    with GradCAM(cnn(), "4") as extractor:
        metric = SanityCheck(extractor)
        assert metric.layers == ("7", "4", "1", "0")
        metric.update(images())
        assert np.shape(states(metric)["rank"]) == np.shape(states(metric)["similarity"]) == (4,)
