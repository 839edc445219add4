"""Methods beyond TorchCAM's: against slow oracles, against numbers worked out by hand, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from models import CalledTwice, GapNet, HandNet, SplitNet, UNet, image, shuffled, split_net
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcam._tensors import gaussian_blur
from torchcam.methods import (
    CAM,
    FEM,
    AblationCAM,
    GradCAM,
    GradCAMElementWise,
    GroupCAM,
    HiResCAM,
    LayerCAM,
    MeanActivation,
    RandomCAM,
    ReciproCAM,
    ShapleyCAM,
)

CLASSES = [4, 0, 2]
TARGETS = [lambda y: y[1] * y[2] - y[0], lambda y: y.softmax(0)[3], lambda y: y[0] - y[4]]
SEED = 3


def close(found: Tensor, expected: Tensor | Sequence[Any], tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype, device=found.device)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def ask(extractor: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Let an extractor watch a pass of its model and explain it."""
    with extractor:
        scores = extractor.model(x)
        return extractor(*args, scores=scores, **kwargs)


# Against the oracles ------------------------------------------------------------------------------------------------


def random_weights(num_channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return list(torch.rand(num_channels, generator=generator, dtype=torch.float64) * 2 - 1)


def mean_weights(num_channels: int) -> list[Tensor]:
    return [torch.tensor(1 / num_channels, dtype=torch.float64)] * num_channels


Oracle = Callable[..., Tensor]
CASES: dict[str, tuple[type, dict[str, Any], Oracle]] = {
    "AblationCAM": (AblationCAM, {"batch_size": 3}, oracles.ablation_cam),
    "AblationCAM-baseline": (AblationCAM, {"baseline": -0.3}, partial(oracles.ablation_cam, baseline=-0.3)),
    "ReciproCAM": (ReciproCAM, {"batch_size": 50}, oracles.recipro_cam),
    "ReciproCAM-1": (ReciproCAM, {"window": 1}, partial(oracles.recipro_cam, profile=[1])),
    "ReciproCAM-5": (
        ReciproCAM, {"window": 5}, partial(oracles.recipro_cam, profile=[1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])
    ),
    "GroupCAM": (GroupCAM, {"groups": 2, "batch_size": 4}, oracles.group_cam),
    "GroupCAM-all": (
        GroupCAM, {"groups": 3, "percentile": 0}, partial(oracles.group_cam, groups=3, percentile=0)
    ),
    "FEM": (FEM, {"n_sigma": 0.7}, partial(oracles.fem, n_sigma=0.7)),
    "MeanActivation": (MeanActivation, {}, partial(oracles.combined, weights=mean_weights)),
    "RandomCAM": (RandomCAM, {"seed": SEED}, partial(oracles.combined, weights=random_weights)),
    "HiResCAM": (HiResCAM, {}, oracles.hi_res_cam),
    "GradCAMElementWise": (GradCAMElementWise, {}, oracles.grad_cam_element_wise),
    "ShapleyCAM": (ShapleyCAM, {}, oracles.shapley_cam),
}  # fmt: skip
GRADIENT = ("GroupCAM", "GroupCAM-all", "HiResCAM", "GradCAMElementWise", "ShapleyCAM")
every_case = pytest.mark.parametrize("name", CASES)


def expected_maps(name: str, net: SplitNet, x: Tensor, scores: Sequence[Any]) -> list[Tensor]:
    _, _, oracle = CASES[name]
    maps = [
        oracle(x, partial(net.body, layer=layer), partial(net.head, layer=layer), scores).to(x) for layer in net.layers
    ]
    assert any(layer.amax() - layer.amin() > 1e-4 for layer in maps), "the oracle's maps are no test"
    return maps


def make(name: str, net: nn.Module, layers: Any = SplitNet.layers, **options: Any) -> Any:
    method, defaults, _ = CASES[name]
    return method(net, list(layers) if isinstance(layers, tuple) else layers, **{**defaults, **options})


@every_case
@pytest.mark.parametrize("by", ["classes", "targets"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_method_agrees_with_oracle(name: str, by: str, dim: int, device: torch.device) -> None:
    if name.endswith("-5") and (dim, by) != (2, "classes"):
        pytest.skip("the oracle is slow, and this window is one among many")
    net, x = split_net(dim, seed=12).to(device), image(dim, len(CLASSES)).to(device)
    by_class = by == "classes"
    scores = [lambda y, c=c: y[c] for c in CLASSES] if by_class else TARGETS
    expected = expected_maps(name, net, x, scores)
    asked = {"class_idx": CLASSES} if by_class else {"targets": TARGETS}
    raw = ask(make(name, net), x, normalized=False, **asked)
    scaled = ask(make(name, net), x, **asked)
    for layer in range(2):
        assert raw[layer].dtype == torch.float64
        close(raw[layer], expected[layer])
        close(scaled[layer], oracles.normalized(expected[layer]))


@every_case
def test_a_batch_is_its_samples(name: str, device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)
    batch = ask(make(name, net), x, CLASSES, normalized=False)
    singles = [ask(make(name, net), x[n : n + 1], c, normalized=False) for n, c in enumerate(CLASSES)]
    for layer, cam in enumerate(batch):
        close(cam, torch.cat([single[layer] for single in singles]))


@every_case
def test_layers_together_are_layers_alone(name: str, device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)
    together = ask(make(name, net, ("second", "first")), x, CLASSES)
    for cam, layer in zip(together, ("second", "first"), strict=True):
        close(cam, ask(make(name, net, layer), x, CLASSES)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", ["AblationCAM", "ReciproCAM", "GroupCAM"])
def test_the_size_of_chunks_does_not_matter(name: str, batch_size: int, device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)
    rows: list[int] = []
    with make(name, net, batch_size=batch_size) as extractor:
        scores = net(x)
        net.fc.register_forward_pre_hook(lambda _layer, args: rows.append(len(args[0])))
        found = extractor(CLASSES, scores, normalized=False)
    positions = 9 * 11
    most = len(CLASSES) * {"AblationCAM": 5, "ReciproCAM": positions, "GroupCAM": 2}[name]
    most += name != "GroupCAM"  # the first sample as it is, which GroupCAM has among its blurred inputs
    assert max(rows) == min(batch_size, most)
    for cam, other in zip(found, ask(make(name, net), x, CLASSES, normalized=False), strict=True):
        close(cam, other)


@every_case
def test_backward_passes_are_counted(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, backward_passes: list[int]
) -> None:
    """One to the target layers, and for ShapleyCAM one more from each; no other method has any."""
    net, x = split_net().to(device), image(2).to(device)
    monkeypatch.setattr(torch.autograd, "backward", None)
    ask(make(name, net), x, [0, 1])
    assert len(backward_passes) == (3 if name == "ShapleyCAM" else int(name in GRADIENT))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_maps(name: str, dtype: torch.dtype, device: torch.device) -> None:
    net, x = split_net(seed=5, dtype=dtype).to(device), image(2).to(device, dtype)
    cams = ask(make(name, net), x, [0, 1])
    for cam in cams:
        assert cam.dtype == torch.float32
        assert cam.isfinite().all()
        assert cam.amin() >= 0
    assert max(cam.amax() for cam in cams) == 1


# Worked out by hand -------------------------------------------------------------------------------------------------
#
#   A_0 = 1 2    A_1 = 2 1    G_0 = 1 -1    G_1 =  0 1    G ⊙ A, summed = 1 -1
#         0 3          4 1          2  2          -2 0                   -8  6

A = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]], [[2.0, 1.0], [4.0, 1.0]]]], dtype=torch.float64)
A_0, A_1 = A[0]
G = torch.tensor([[[1.0, -1.0], [2.0, 2.0]], [[0.0, 1.0], [-2.0, 0.0]]], dtype=torch.float64)


def linear_net(weight: Tensor, device: torch.device) -> HandNet:
    """A net whose class 0 has the score `weight` · A, and class 1 the sum of A."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        head[1].weight.copy_(torch.stack([weight.flatten(), torch.ones(8)]))
    return HandNet(head).double().to(device).eval()


def scored_net(score: Callable[[Tensor], Tensor], device: torch.device) -> HandNet:
    """A net whose one class has any score of A, (N, 2, 2, 2)."""
    return HandNet(lambda a: score(a).unsqueeze(1)).double().to(device)


BY_HAND: dict[str, tuple[Any, Any]] = {
    "HiResCAM": (partial(HiResCAM), [[1, 0], [0, 6]]),
    # relu(G_0 ⊙ A_0) = 1 0    relu(G_1 ⊙ A_1) = 0 1
    #                   0 6                      0 0
    "GradCAMElementWise": (partial(GradCAMElementWise), [[1, 1], [0, 6]]),
    "MeanActivation": (partial(MeanActivation), [[1.5, 1.5], [2, 2]]),
    # Means 1.5 and 2, variances 1.25 and 1.5, so that the thresholds are 2.62 and 3.22.
    "FEM, one sigma": (partial(FEM, n_sigma=1), [[0, 0], [2, 1.5]]),
    "FEM, two sigma": (partial(FEM), [[0, 0], [0, 0]]),
    # f = 5 - 7 = -2, f_0 = -7, f_1 = 5: w = 5/2, -7/2. The score is negative, and channel 0 is still what raises it.
    "AblationCAM": (partial(AblationCAM), [[0, 1.5], [0, 4]]),
    # f_0 = 4 - 7 = -3, f_1 = 5 - 1 = 4: w = 1/2, -3
    "AblationCAM, baseline 1": (partial(AblationCAM, baseline=1.0), [[0, 0], [0, 0]]),
    # A single position scores what it adds.
    "ReciproCAM, window 1": (partial(ReciproCAM, window=1), [[1, 0], [0, 6]]),
    # At (0, 1): -1/4 + 1/8 + 6/8 - 8/16; at (1, 1): 6/4 - 1/8 - 8/8 + 1/16
    "ReciproCAM": (partial(ReciproCAM), [[0, 0.125], [0, 0.4375]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_method_by_hand(name: str, device: torch.device) -> None:
    method, expected = BY_HAND[name]
    close(ask(method(linear_net(G, device), "features"), A.to(device), 0, normalized=False)[0], [expected])


def test_ablation_cam_is_not_divided_where_the_score_vanishes(device: torch.device) -> None:
    # f = 4·6 - 3·8 = 0, f_0 = -24, f_1 = 24: w = 24, -24
    net = linear_net(torch.tensor([4.0, -3.0]).reshape(2, 1, 1).expand(2, 2, 2), device)
    (cam,) = ask(AblationCAM(net, "features"), A.to(device), 0, normalized=False)
    close(cam[0], [[0, 24], [0, 48]])


def test_group_cam_by_hand(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before a black image in place of the blurred one, and with all but the lowest values kept, for Y = 2·ΣA_0 + ΣA_1:
    # m_0 = A_0/3, m_1 = 1/2 0    f(X ⊙ m_0) = 2·14/3 + (2 + 2 + 3)/3 = 35/3
    #                    1   0    f(X ⊙ m_1) = 2·1/2 + 1 + 4 = 6
    monkeypatch.setattr("torchcam.methods.masked.gaussian_blur", lambda images, *_: torch.zeros_like(images))
    net = scored_net(lambda a: 2 * a[:, 0].sum((1, 2)) + a[:, 1].sum((1, 2)), device)
    (cam,) = ask(GroupCAM(net, "features", percentile=0), A.to(device), 0, normalized=False)
    close(cam[0], [[35 / 9 + 3, 70 / 9], [6, 35 / 3]])


def test_group_cam_keeps_what_is_above_the_percentile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 0 1 2 3, 60 % lie at or below 1.8. In one group of both, A_0 counts for all: m = 0   2/3, f(X ⊙ m) = 13/3
    #                                                                                      0   1
    monkeypatch.setattr("torchcam.methods.masked.gaussian_blur", lambda images, *_: torch.zeros_like(images))
    net = scored_net(lambda a: a[:, 0].sum((1, 2)), device)
    (cam,) = ask(GroupCAM(net, "features", groups=1, percentile=60), A.to(device), 0, normalized=False)
    close(cam[0], [[0, 26 / 9], [0, 13 / 3]])


HESSIANS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    # G = A_0, H·A = A_0: w_0 = mean(A_0)/2
    "square": (lambda a: (a[:, 0] ** 2).sum((1, 2)) / 2, 0.75 * A_0),
    # G = A_0², H·A = 2·A_0²: nothing is left
    "cube": (lambda a: (a[:, 0] ** 3).sum((1, 2)) / 3, 0 * A_0),
    # G_0 = H·A of channel 0 = A_1, and the other way round: w = mean(A_1)/2, mean(A_0)/2
    "product of channels": (lambda a: (a[:, 0] * a[:, 1]).sum((1, 2)), A_0 + 0.75 * A_1),
    # G = ΣA_0 everywhere, and so is H·A
    "square of the sum": (lambda a: a[:, 0].sum((1, 2)) ** 2 / 2, 3 * A_0),
    # G = 1 has no graph
    "sum": (lambda a: a[:, 0].sum((1, 2)), A_0),
    # ∂²/∂x² (x·log x) = 1/x, times x is 1: w = mean(log A_1 + 1 - 1/2) = 3/4·log 2 + 1/2
    "logarithm": (lambda a: (a[:, 1] * a[:, 1].log()).sum((1, 2)), (0.75 * math.log(2) + 0.5) * A_1),
}


@pytest.mark.parametrize("name", HESSIANS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_shapley_cam_with_known_hessian(name: str, mode: Any, device: torch.device) -> None:
    score, expected = HESSIANS[name]
    net, x = scored_net(score, device), A.to(device)
    with ShapleyCAM(net, "features") as extractor, mode():
        net(x)
        (cam,) = extractor(0, normalized=False)
    close(cam[0], expected)


def test_random_cam_draws_as_asked(device: torch.device) -> None:
    net, x = split_net().to(device), image(2).to(device)
    with RandomCAM(net, "second") as extractor:
        net(x)
        first, again = extractor(), extractor()
    close(first[0], again[0])
    other = ask(RandomCAM(net, "second", seed=1), x)
    assert (first[0] - other[0]).abs().amax() > 0.01
    generator = torch.Generator(device).manual_seed(SEED)
    with RandomCAM(net, "second", generator=generator) as extractor:
        net(x)
        drawn, drawn_again = extractor(), extractor()
    close(drawn[0], ask(RandomCAM(net, "second", seed=SEED), x)[0])
    assert (drawn[0] - drawn_again[0]).abs().amax() > 0.01


# Identities ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gap_case(device: torch.device) -> tuple[GapNet, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((3, 3, 8, 12), generator=generator, dtype=torch.float64)
    return GapNet(relu=False).double().to(device), x.to(device)


def test_hi_res_cam_is_grad_cam_is_cam_behind_global_average_pooling(gap_case: tuple[GapNet, Tensor]) -> None:
    net, x = gap_case
    (cam,) = ask(CAM(net, "features", "fc"), x, CLASSES, normalized=False)
    expected = cam.relu() / cam[0].numel()
    assert (expected > 0).any(dim=1).any()
    for method in (HiResCAM, GradCAM, ShapleyCAM):
        close(ask(method(net, "features"), x, CLASSES, normalized=False)[0], expected)


def test_ablation_cam_weighs_by_what_a_channel_adds_to_a_linear_head(gap_case: tuple[GapNet, Tensor]) -> None:
    net, x = gap_case
    with torch.no_grad():
        net.fc.bias.zero_()
        activation, scores = net.features(x), net(x)
    chosen = scores[range(3), CLASSES]
    assert (chosen < 0).any()
    assert (chosen > 0).any()
    weight = net.fc.weight.detach()[CLASSES] * activation.mean((2, 3)) / chosen.abs().unsqueeze(1)
    expected = torch.einsum("nc,nchw->nhw", weight, activation).relu()
    close(ask(AblationCAM(net, "features"), x, CLASSES, normalized=False)[0], expected)


def test_recipro_cam_of_single_positions_is_cam_behind_global_average_pooling(gap_case: tuple[GapNet, Tensor]) -> None:
    net, x = gap_case
    (cam,) = ask(CAM(net, "features", "fc"), x, CLASSES, normalized=False)
    expected = (cam / cam[0].numel() + net.fc.bias.detach()[CLASSES].reshape(3, 1, 1)).relu()
    close(ask(ReciproCAM(net, "features", window=1), x, CLASSES, normalized=False)[0], expected)


def test_element_wise_grad_cam_is_layer_cam_where_activations_are_positive(device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)  # `second` ends in a softplus, `first` in a tanh
    first, second = (
        [ask(method(net, layer), x, CLASSES, normalized=False)[0] for method in (GradCAMElementWise, LayerCAM)]
        for layer in net.layers
    )
    close(*second)
    assert (first[0] - first[1]).abs().amax() > 1e-3


class PiecewiseLinear(GapNet):
    """ReLU and maximum behind the features."""

    def __init__(self) -> None:
        super().__init__(relu=False)
        self.mix = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.mix(self.features(x)).relu(), 2).amax((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_shapley_cam_is_grad_cam_before_a_piecewise_linear_head(
    frozen: bool, gap_case: tuple[GapNet, Tensor], device: torch.device
) -> None:
    _, x = gap_case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PiecewiseLinear().double().to(device).requires_grad_(not frozen)
    expected = ask(GradCAM(net, "features"), x, CLASSES, normalized=False)
    assert expected[0].amax() > 0
    close(ask(ShapleyCAM(net, "features"), x, CLASSES, normalized=False)[0], expected[0])


def test_shapley_cam_is_not_grad_cam_before_a_curved_head(device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)
    one, other = (ask(method(net, "second"), x, CLASSES)[0] for method in (ShapleyCAM, GradCAM))
    assert (one - other).abs().amax() > 1e-3


# Edited activations -------------------------------------------------------------------------------------------------

NETS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "a connection is added": (lambda: UNet("add"), "middle", 1),
    "a connection is concatenated": (lambda: UNet("cat"), "middle", 1),
    "the layer runs twice": (CalledTwice, "block", 2),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", [AblationCAM, ReciproCAM])
def test_edited_activations_give_the_maps_of_full_passes(method: type, name: str, device: torch.device) -> None:
    make_net, layer, last_call = NETS[name]
    net = make_net().double().eval().to(device)
    x = torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    classes = [1, 3]

    @torch.no_grad()
    def scores(edit: Callable[[Tensor], Tensor]) -> Tensor:
        calls = 0

        def hook(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return edit(output) if calls == last_call else output

        handle = net.get_submodule(layer).register_forward_hook(hook)
        try:
            return net(x)[range(2), classes]
        finally:
            handle.remove()

    seen: list[Tensor] = []
    whole = scores(lambda output: seen.append(output) or output)
    (activation,) = seen
    if method is AblationCAM:
        without = []
        for k in range(activation.shape[1]):
            kept = (torch.arange(activation.shape[1], device=device) != k).reshape(-1, 1, 1)
            without.append(scores(lambda output, kept=kept: output * kept))
        weights = (whole - torch.stack(without)) / whole.abs()
        expected = torch.einsum("cn,nchw->nhw", weights, activation).relu()
    else:
        height, width = activation.shape[2:]
        expected = torch.empty_like(activation[:, 0])
        for i in range(height):
            for j in range(width):
                lone = torch.zeros((1, 1, height, width), dtype=torch.float64, device=device)
                lone[..., i, j] = 1
                kernel = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64, device=device)
                window = F.conv2d(lone, torch.outer(kernel, kernel)[None, None] / 16, padding=1)
                expected[:, i, j] = scores(lambda output, window=window: output * window).relu()
    close(ask(method(net, layer), x, classes, normalized=False)[0], expected)


class ChannelsLast(nn.Module):
    """A split net whose first stage has its channels last, behind a token that does not belong to any position."""

    def __init__(self, net: SplitNet, prefix: int) -> None:
        super().__init__()
        self.net = net
        self.prefix = prefix
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activation = self.net.first(x)
        tokens = activation.flatten(2).mT
        first = tokens.mean(1, keepdim=True).expand(-1, self.prefix, -1)
        tokens = self.layer(torch.cat([first, tokens], 1))
        bias = tokens[:, : self.prefix].sum((1, 2))
        logits = self.net.head(tokens[:, self.prefix :].mT.reshape(activation.shape), "first")
        return logits + bias.unsqueeze(1)


@pytest.mark.parametrize("method", [AblationCAM, ReciproCAM])
def test_edits_find_their_way_back_through_a_reshape_transform(method: type, device: torch.device) -> None:
    net, x = split_net().to(device), image(2, len(CLASSES)).to(device)

    def on_grid(tokens: Tensor, prefix: int) -> Tensor:
        return tokens[:, prefix:].mT.reshape(len(tokens), -1, *x.shape[2:])

    plain = method(ChannelsLast(net, 0), "layer", reshape_transform=partial(on_grid, prefix=0))
    expected = ask(method(net, "first"), x, CLASSES, normalized=False)[0]
    close(ask(plain, x, CLASSES, normalized=False)[0], expected)
    # What the other token adds to the logits is a constant: ReciproCAM keeps it, with Ablation-CAM it cancels.
    with torch.no_grad():
        bias = net.first(x).mean((2, 3)).sum(1)
        chosen = net(x)[range(len(x)), CLASSES]
    prefixed = partial(method, ChannelsLast(net, 1), "layer", reshape_transform=partial(on_grid, prefix=1))
    if method is AblationCAM:
        (found,) = ask(prefixed(), x, CLASSES, normalized=False)
        close(found, expected * (chosen / (chosen + bias)).abs().reshape(-1, 1, 1))
    else:
        unrectified = ask(method(net, "first"), x, normalized=False, targets=lambda y: y[4] + 100)[0] - 100
        (shifted,) = ask(prefixed(), x, normalized=False, targets=lambda y: y[4] + 100)
        close(shifted - 100, unrectified + bias.reshape(-1, 1, 1))


def test_a_reshape_transform_that_computes_has_no_way_back(device: torch.device) -> None:
    net, x = split_net().to(device), image(2).to(device)
    for transform in (lambda t: 2 * t, lambda t: F.avg_pool2d(t, 3), torch.relu):
        with pytest.raises(ValueError, match=r"AblationCAM.*`reshape_transform`.*no way back"):
            ask(AblationCAM(net, "first", reshape_transform=transform), x, 0)


# What goes wrong ----------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention among the positions of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).mT.unsqueeze(1).contiguous()
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2))


def test_shapley_cam_says_what_to_do_about_fused_attention(device: torch.device) -> None:
    net = Attending().to(device)
    x = torch.rand((2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(device)
    fused = SDPBackend.FLASH_ATTENTION if device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(fused), pytest.raises(RuntimeError, match=r"fused attention.*SDPBackend\.MATH"):
        ask(ShapleyCAM(net, "features"), x, 0)
    with sdpa_kernel(SDPBackend.MATH):
        maps = [
            torch.stack([ask(method(net, "features"), x, c, normalized=False)[0] for c in range(4)])
            for method in (ShapleyCAM, GradCAM)
        ]
    assert maps[0].isfinite().all()
    assert (maps[0] - maps[1]).abs().amax() > 1e-4


def test_shapley_cam_tells_its_own_errors_from_others(device: torch.device) -> None:
    net, x = split_net().to(device), image(2).to(device)
    with ShapleyCAM(net, "second") as extractor:
        scores = net(x)
        extractor(0, scores, retain_graph=True)
        extractor(0, scores)
        with pytest.raises(RuntimeError, match="second time"):
            extractor(0, scores)
        with pytest.raises(RuntimeError, match="not connected to every target layer"):
            extractor(scores=net(x), targets=lambda y: y.detach().sum().requires_grad_())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (AblationCAM, {"batch_size": 0}, "`batch_size`.*0"),
        (AblationCAM, {"baseline": math.nan}, "`baseline`.*nan"),
        (ReciproCAM, {"window": 0}, "`window`.*0"),
        (ReciproCAM, {"window": 4}, "`window` must be odd.*4"),
        (GroupCAM, {"groups": 0}, "`groups`.*0"),
        (GroupCAM, {"percentile": 100}, "`percentile`.*100"),
        (GroupCAM, {"percentile": -1}, "`percentile`.*-1"),
        (FEM, {"n_sigma": math.inf}, "`n_sigma`.*inf"),
    ],
)
def test_bad_options(method: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(split_net(), "second", **options)


def test_repr() -> None:
    net = split_net()
    assert repr(AblationCAM(net, "second")) == "AblationCAM(batch_size=64, baseline=0.0)"
    assert repr(ReciproCAM(net, "second")) == "ReciproCAM(batch_size=64, window=3)"
    assert repr(GroupCAM(net, "second")) == "GroupCAM(batch_size=32, groups=32, percentile=70.0)"
    assert repr(FEM(net, "second")) == "FEM(target_layer=['second'], n_sigma=2.0)"
    assert repr(HiResCAM(net, "second")) == "HiResCAM(target_layer=['second'])"


@pytest.mark.parametrize("method", [FEM, MeanActivation, RandomCAM])
def test_class_agnostic_methods_need_no_class(method: type, device: torch.device) -> None:
    net, x = split_net().to(device), image(2).to(device)
    assert method.class_agnostic
    with method(net, "first") as extractor, torch.no_grad():
        scores = net(x)
        expected = extractor()
        for given in ({"class_idx": 1}, {"scores": scores}, {"targets": lambda y: y[0]}):
            close(extractor(**given)[0], expected[0])


# The blur -----------------------------------------------------------------------------------------------------------


def test_gaussian_blur_agrees_with_torchvision(device: torch.device) -> None:
    from torchvision.transforms.functional import gaussian_blur as blur_of_torchvision

    x = torch.rand((2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    for size, sigma in ((51, 50.0), (11, 5.0), (1, 1.0)):
        close(gaussian_blur(x, size, sigma), blur_of_torchvision(x, [size, size], [sigma, sigma]), 1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_gaussian_blur_of_small_inputs(dim: int, device: torch.device) -> None:
    x = image(dim).to(device)
    close(gaussian_blur(x, 51, 50.0), torch.cat([oracles.mirrored_blur(x[n : n + 1], 51, 50.0) for n in range(2)]))
    close(gaussian_blur(torch.ones_like(x), 51, 50.0), torch.ones_like(x))
    lone = x[(..., *[slice(1)] * dim)]
    close(gaussian_blur(lone, 51, 50.0), lone)
