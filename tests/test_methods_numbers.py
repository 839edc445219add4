"""The twelve methods against slow oracles, against numbers worked out by hand, and against TorchCAM's bugs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from models import NUM_CLASSES, HandNet, SplitNet, image, split_net, tiny_vit
from torch import Tensor, nn

from torchcam.methods import (
    CAM,
    ISCAM,
    SSCAM,
    FinerCAM,
    GradCAM,
    GradCAMpp,
    LayerCAM,
    LeGrad,
    RefineCAM,
    ScoreCAM,
    SmoothGradCAMpp,
    XGradCAM,
)

GradientCAM = (GradCAM, GradCAMpp, SmoothGradCAMpp, XGradCAM, LayerCAM)
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


def noise(num_samples: int, shape: Sequence[int], std: float, device: torch.device) -> Tensor:
    from torchcam._tensors import gaussian_noise

    return gaussian_noise((num_samples, *shape), torch.zeros((), dtype=torch.float64, device=device), std, SEED)


Oracle = Callable[..., Tensor]


def with_noise(oracle: Oracle, num_samples: int, std: float, channels: bool) -> Oracle:
    def run(x: Tensor, *args: Any) -> Tensor:
        shape = x.shape[1:] if channels else (1, *x.shape[2:])
        deltas = noise(num_samples, shape, std, x.device)
        return oracle(x, *args, noise=deltas if channels else deltas.squeeze(1))

    return run


def with_steps(x: Tensor, *args: Any) -> Tensor:
    return oracles.is_cam(x, *args, num_samples=3)


LAYERWISE: dict[type, tuple[dict[str, Any], Oracle]] = {
    ScoreCAM: ({"batch_size": 5}, oracles.score_cam),
    SSCAM: (
        {"num_samples": 3, "std": 0.7, "seed": SEED, "batch_size": 4},
        with_noise(oracles.ss_cam, 3, 0.7, channels=False),
    ),
    ISCAM: ({"num_samples": 3, "batch_size": 7}, with_steps),
    GradCAM: ({}, oracles.grad_cam),
    GradCAMpp: ({}, oracles.grad_cam_pp),
    SmoothGradCAMpp: (
        {"num_samples": 3, "std": 0.4, "seed": SEED, "batch_size": 4},
        with_noise(oracles.smooth_grad_cam_pp, 3, 0.4, channels=True),
    ),
    XGradCAM: ({}, oracles.x_grad_cam),
    LayerCAM: ({}, oracles.layer_cam),
}


def halves(net: SplitNet, layer: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: net.body(x, layer), lambda activation: net.head(activation, layer)


def class_scores(classes: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
    return [lambda y, c=c: y[c] for c in classes]


def expected_maps(method: type, net: SplitNet, x: Tensor, scores: Sequence[Any]) -> list[Tensor]:
    _, oracle = LAYERWISE[method]
    maps = [oracle(x, *halves(net, layer), scores) for layer in net.layers]
    for layer in maps:
        assert (layer.amax() - layer.amin()) > 1e-4, "the oracle's map is no test"
    return maps


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[SplitNet, Tensor]:
    """A net and a batch of three inputs, in float64."""
    return split_net(request.param).to(device), image(request.param, len(CLASSES)).to(device)


@pytest.mark.parametrize("layer", SplitNet.layers)
def test_oracle_gradients_agree_with_finite_differences(case: tuple[SplitNet, Tensor], layer: str) -> None:
    net, x = case
    body, head = halves(net, layer)
    with torch.no_grad():
        activation = body(x[:1])
    score = TARGETS[0]
    differences = oracles.finite_differences(head, activation, score)
    close(oracles.gradient(head, activation, score), differences, 1e-7)


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("by", ["classes", "targets"])
def test_method_agrees_with_oracle(method: type, by: str, case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    options, _ = LAYERWISE[method]
    layers = list(net.layers)
    scores = class_scores(CLASSES) if by == "classes" else TARGETS
    expected = expected_maps(method, net, x, scores)
    asked = {"class_idx": CLASSES} if by == "classes" else {"targets": TARGETS}
    raw = ask(method(net, layers, **options), x, normalized=False, **asked)
    scaled = ask(method(net, layers, **options), x, **asked)
    for layer in range(len(layers)):
        assert raw[layer].dtype == torch.float64
        close(raw[layer], expected[layer])
        close(scaled[layer], oracles.normalized(expected[layer]))


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_method_agrees_with_oracle_without_grad_mode(method: type, mode: Any, device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2, 2).to(device)
    options, _ = LAYERWISE[method]
    expected = expected_maps(method, net, x, class_scores([1, 3]))
    keep = {"retain_graph": True} if issubclass(method, GradientCAM) else {}
    with method(net, list(net.layers), **options) as extractor:
        with mode():
            net(x)
            inside = extractor([1, 3], normalized=False, **keep)
        outside = extractor([1, 3], normalized=False)
    for layer in range(2):
        close(inside[layer], expected[layer])
        close(outside[layer], expected[layer])


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("convolutional_head", [False, True])
def test_cam_agrees_with_oracle(dim: int, convolutional_head: bool, device: torch.device) -> None:
    net, x = split_net(dim, nonlinear_head=False).to(device), image(dim, len(CLASSES)).to(device)
    weight = net.fc.weight.detach()
    if convolutional_head:
        net.fc.weight = nn.Parameter(weight.reshape(*weight.shape, *[1] * dim))
    expected = oracles.cam(x, lambda image: net.body(image, "second"), weight, CLASSES)
    net.forward = lambda image: net.second(net.first(image))  # the classifier's weights are read, it need not run
    with CAM(net, "second", "fc") as extractor, torch.no_grad():
        net(x)
        raw, scaled = extractor(CLASSES, normalized=False), extractor(CLASSES)
    assert (expected < 0).any()
    close(raw[0], expected)
    close(scaled[0], oracles.normalized(expected))


FINER = [
    {"gamma": 0.6, "num_references": 3},
    {"gamma": 1.5, "num_references": 1},
    {"gamma": 0.8, "num_references": 2, "weighting": "softmax"},
    {"gamma": 0.6, "num_references": 99},
]


@pytest.mark.parametrize("options", FINER)
@pytest.mark.parametrize("base_method", [GradCAM, GradCAMpp, SmoothGradCAMpp, LayerCAM, ScoreCAM, SSCAM])
def test_finer_cam_agrees_with_oracle(base_method: type, options: dict[str, Any], device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2, len(CLASSES)).to(device)
    with torch.no_grad():
        scores = [oracles.finer_score(y, c, **options) for y, c in zip(net(x), CLASSES, strict=True)]
    expected = expected_maps(base_method, net, x, scores)
    base_options, _ = LAYERWISE[base_method]
    maps = ask(
        FinerCAM(net, list(net.layers), base_method=base_method, **base_options, **options),
        x,
        class_idx=CLASSES,
        normalized=False,
    )
    for layer in range(2):
        close(maps[layer], expected[layer])


@pytest.mark.parametrize(
    ("comparison_idx", "rows"),
    [
        (1, [[1], [1], [1]]),
        ([1, 3], [[1, 3], [1, 3], [1, 3]]),
        ([[0, 1], [4, 2], [1, 0]], [[0, 1], [4, 2], [1, 0]]),
    ],
)
def test_finer_cam_with_given_references_agrees_with_oracle(
    comparison_idx: Any, rows: list[list[int]], device: torch.device
) -> None:
    net, x = split_net(2).to(device), image(2, len(CLASSES)).to(device)
    with torch.no_grad():
        scores = [
            oracles.finer_score(y, c, 0.6, 3, references=row) for y, c, row in zip(net(x), CLASSES, rows, strict=True)
        ]
    expected = expected_maps(GradCAM, net, x, scores)
    maps = ask(FinerCAM(net, list(net.layers)), x, class_idx=CLASSES, comparison_idx=comparison_idx, normalized=False)
    for layer in range(2):
        close(maps[layer], expected[layer])


@pytest.mark.parametrize("base_method", [GradCAMpp, GradCAM, LayerCAM, ScoreCAM])
def test_refine_cam_agrees_with_oracle(base_method: type, case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    layers = list(net.layers)
    expected = oracles.refined(expected_maps(base_method, net, x, class_scores(CLASSES)))
    (raw,) = ask(RefineCAM(net, layers, base_method=base_method), x, class_idx=CLASSES, normalized=False)
    (scaled,) = ask(RefineCAM(net, layers, base_method=base_method), x, class_idx=CLASSES)
    assert raw.shape[1:] == x.shape[2:]
    close(raw, expected)
    close(scaled, oracles.normalized(expected))


def le_grad_case(device: torch.device) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tiny_vit().to(device), torch.randn((3, 3, 16, 16), generator=generator, dtype=torch.float64).to(device)


@pytest.mark.parametrize("blocks", [[2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("by", ["classes", "targets"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_le_grad_agrees_with_oracle(blocks: list[int], by: str, mode: Any, device: torch.device) -> None:
    model, x = le_grad_case(device)

    def read_out(tokens: Tensor) -> Tensor:
        return model.heads(model.encoder.ln(tokens.mean(1)))

    scores = class_scores(CLASSES) if by == "classes" else TARGETS
    asked = {"class_idx": CLASSES} if by == "classes" else {"targets": TARGETS}
    expected = oracles.le_grad(x, model, blocks, read_out, scores, (4, 4))
    with LeGrad(model, [model.encoder.layers[b] for b in blocks]) as extractor:
        with mode():
            logits = model(x)
        (raw,) = extractor(scores=logits, normalized=False, retain_graph=True, **asked)
        (scaled,) = extractor(scores=logits, **asked)
    close(raw, expected)
    close(scaled, oracles.normalized(expected))


def test_le_grad_with_score_projection_agrees_with_oracle(device: torch.device) -> None:
    model, x = le_grad_case(device)
    generator = torch.Generator().manual_seed(5)
    projection = torch.randn((8, NUM_CLASSES), generator=generator, dtype=torch.float64).to(device)

    def read_out(tokens: Tensor) -> Tensor:
        return tokens[:, 0].tanh() @ projection + tokens[:, 1:].square().mean(1) @ projection

    expected = oracles.le_grad(x, model, [0, 1], read_out, class_scores(CLASSES), (4, 4))
    layers = [model.encoder.layers[0], model.encoder.layers[1]]
    (raw,) = ask(LeGrad(model, layers, score_projection=read_out), x, class_idx=CLASSES, normalized=False)
    close(raw, expected)


# Worked out by hand -------------------------------------------------------------------------------------------------
#
# The activation A has two channels of 2 x 2, the gradient G of class 0 is the weight of a linear head:
#
#   A_0 = 1 2    A_1 = 2 1    G_0 = 1 -1    G_1 =  0 1
#         0 3          4 1          2  2          -2 0
#
# Sums: A_0 6, A_1 8, G_0 4, G_1 -1. All G are 1 for class 1.

A = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]], [[2.0, 1.0], [4.0, 1.0]]]], dtype=torch.float64)
G = torch.tensor([[[1.0, -1.0], [2.0, 2.0]], [[0.0, 1.0], [-2.0, 0.0]]], dtype=torch.float64)


def hand_net(device: torch.device) -> HandNet:
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        head[1].weight.copy_(torch.stack([G.flatten(), torch.ones(8)]))
    return HandNet(head).double().to(device).eval()


def channel_net(score: Callable[[Tensor], Tensor]) -> HandNet:
    """A net whose class 0 has a score of channel 0, (N, 2, 2)."""
    return HandNet(lambda a: torch.stack([score(a[:, 0]), a.sum((1, 2, 3))], 1)).double()


BY_HAND: dict[type, tuple[list[list[float]], list[list[float]]]] = {
    # w = 4/4, -1/4: A_0 - A_1/4 = 0.5 1.75
    #                              -1  2.75
    GradCAM: ([[0.5, 1.75], [0, 2.75]], [[2 / 11, 7 / 11], [0, 1]]),
    # alpha of G = 1, 2, 2 in channel 0: 1/(2 + 6), 1/(2 + 12) twice: w = 1/8 + 2·2/14 = 23/56
    # alpha of G = 1 in channel 1: 1/(2 + 8): w = 1/10
    GradCAMpp: (
        [[23 / 56 + 0.2, 46 / 56 + 0.1], [0.4, 69 / 56 + 0.1]],
        [[(23 / 56 - 0.2) / (69 / 56 - 0.3), (46 / 56 - 0.3) / (69 / 56 - 0.3)], [0, 1]],
    ),
    # w = (1 - 2 + 0 + 6)/6, (0 + 1 - 8 + 0)/8: 5/6·A_0 - 7/8·A_1 = -11/12 19/24
    #                                                               -7/2   39/24
    XGradCAM: ([[0, 19 / 24], [0, 39 / 24]], [[0, 19 / 39], [0, 1]]),
    # relu(G_0)·A_0 = 1 0    relu(G_1)·A_1 = 0 1
    #                 0 6                    0 0
    LayerCAM: ([[1, 1], [0, 6]], [[1 / 6, 1 / 6], [0, 1]]),
}


@pytest.mark.parametrize("method", BY_HAND)
def test_gradient_method_by_hand(method: type, device: torch.device) -> None:
    net = hand_net(device)
    raw, scaled = BY_HAND[method]
    close(ask(method(net, "features"), A.to(device), 0, normalized=False)[0], [raw])
    close(ask(method(net, "features"), A.to(device), 0)[0], [scaled])


def test_cam_by_hand(device: torch.device) -> None:
    # A_0 - 2·A_1 = -3 0
    #               -8 1    with no ReLU, so that -8 becomes 0
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    net = HandNet(head).double().to(device)
    with torch.no_grad():
        head[2].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 1.0]]))
    close(ask(CAM(net, "features", "head.2"), A.to(device), 0, normalized=False)[0], [[[-3, 0], [-8, 1]]])
    close(ask(CAM(net, "features", "head.2"), A.to(device), 0)[0], [[[5 / 9, 8 / 9], [0, 1]]])


# The masks are m_0 = A_0/3 and m_1 = (A_1 - 1)/3, and the input is A:
# Σ A_0·m_0 = (1 + 4 + 0 + 9)/3 = 14/3, Σ A_0·m_1 = (1 + 0 + 0 + 0)/3 = 1/3.
# The scores are scaled so that the softmax gives 3/4 and 1/4: 3/4·A_0 + 1/4·A_1 = 1.25 1.75
#                                                                                 1    2.5
THREE_TO_ONE = [[[1.25, 1.75], [1, 2.5]]]


def test_score_cam_by_hand(device: torch.device) -> None:
    net = channel_net(lambda a: math.log(3) * 3 / 13 * a.sum((1, 2))).to(device)
    close(ask(ScoreCAM(net, "features"), A.to(device), 0, normalized=False)[0], THREE_TO_ONE)
    close(ask(ScoreCAM(net, "features"), A.to(device), 0)[0], [[[1 / 6, 1 / 2], [0, 1]]])


def test_is_cam_by_hand(device: torch.device) -> None:
    # n = 2: a = 1/2, 3/2. A quadratic score: (1/4 + 9/4)/2 = 5/4 of (14/3)² - (1/3)² = 195/9, that is 975/36
    net = channel_net(lambda a: math.log(3) * 36 / 975 * a.sum((1, 2)) ** 2).to(device)
    close(ask(ISCAM(net, "features", num_samples=2), A.to(device), 0, normalized=False)[0], THREE_TO_ONE)


def test_ss_cam_by_hand(device: torch.device) -> None:
    # With d the mean of Σ A_0·δ_i, a quadratic score differs between the channels by 195/9 + 2·d·(14/3 - 1/3).
    deltas = noise(4, (1, 2, 2), 0.5, device).squeeze(1)
    d = sum((A[0, 0].to(device) * delta).sum().item() for delta in deltas) / 4
    odds = math.exp(0.05 * (195 / 9 + 2 * d * 13 / 3))
    assert abs(d) > 0.01
    net = channel_net(lambda a: 0.05 * a.sum((1, 2)) ** 2).to(device)
    (cam,) = ask(SSCAM(net, "features", num_samples=4, std=0.5, seed=SEED), A.to(device), 0, normalized=False)
    close(cam[0], (odds * A[0, 0] + A[0, 1]) / (odds + 1))


def test_smooth_grad_cam_pp_by_hand(device: torch.device) -> None:
    # Y = 1/2·Σ A_0² has the gradient A_0 + δ in channel 0, which is 0 in channel 1.
    deltas = noise(2, (2, 2, 2), 0.5, device)[:, 0].cpu().numpy()
    gradients = [A[0, 0].numpy() + delta for delta in deltas]
    first, second, third = (sum(g**p for g in gradients) / 2 for p in (1, 2, 3))
    alpha = second / (2 * second + third * 6)
    weight = (alpha * np.maximum(first, 0)).sum()
    net = channel_net(lambda a: (a**2).sum((1, 2)) / 2).to(device)
    extractor = SmoothGradCAMpp(net, "features", num_samples=2, std=0.5, seed=SEED)
    (cam,) = ask(extractor, A.to(device), 0, normalized=False)
    close(cam[0], weight * A[0, 0])


def test_finer_cam_by_hand(device: torch.device) -> None:
    # The means of A are 3/2 and 2, and so the logits 5, 4, 4, -1: class 0 is compared with 1 and 2.
    # w = (2, 1) - 1/2·((0, 2) + (4, -1))/2 = (1, 3/4), times 1/4 for the pooling
    weight = torch.tensor([[2.0, 1.0], [0.0, 2.0], [4.0, -1.0], [-2.0, 1.0]], dtype=torch.float64, device=device)
    net = HandNet(lambda a: a.mean((2, 3)) @ weight.T).double().to(device)
    extractor = FinerCAM(net, "features", gamma=0.5, num_references=2)
    (cam,) = ask(extractor, A.to(device), 0, normalized=False)
    close(cam, [[[2.5 / 4, 2.75 / 4], [3 / 4, 3.75 / 4]]])
    close(
        ask(extractor.__class__(net, "features", gamma=0.5, num_references=2), A.to(device), 0)[0],
        [[[0, 0.2], [0.4, 1]]],
    )


def test_refine_cam_by_hand(device: torch.device) -> None:
    # The second layer gives the means of the rows, 1.5 1.5 and 1.5 2.5; Y = 2·ΣC_0 - ΣC_1.
    # Its map is 2·C_0 - C_1 = 1.5 0.5, scaled 1 0, and resized 1 1
    #                                                        0 0
    # The first layer's gradients are half of that: A_0 - A_1/2 = 0  1.5, rectified and scaled 0 0.6
    #                                                             -2 2.5                       0 1
    net = nn.Sequential(HandNet(nn.AvgPool2d((1, 2))), nn.Flatten(), nn.Linear(4, 1, bias=False)).double().to(device)
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[2.0, 2.0, -1.0, -1.0]]))
    layers = ["0.features", "0.head"]
    (cam,) = ask(RefineCAM(net, layers, base_method=GradCAM), A.to(device), 0, normalized=False)
    close(cam, [[[0, 0.6], [0, 0]]])
    close(ask(RefineCAM(net, layers, base_method=GradCAM), A.to(device), 0)[0], [[[0, 1], [0, 0]]])


class OneBlock(nn.Module):
    """Attention with equal probabilities, whose values are the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(1, 1, batch_first=True)
        with torch.no_grad():
            self.self_attention.in_proj_weight.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
            self.self_attention.out_proj.weight.fill_(1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.self_attention(tokens, tokens, tokens, need_weights=False)[0]


def test_le_grad_by_hand(device: torch.device) -> None:
    # The score is the mean over 5 queries of Σ_k p(q, k)·v(k): its gradient for p is v/5, whatever the query.
    model = nn.Sequential(OneBlock()).double().to(device).eval()
    tokens = torch.tensor([[[7.0], [1.0], [-2.0], [3.0], [4.0]]], dtype=torch.float64, device=device)

    def scores(block_output: Tensor) -> Tensor:
        mean = block_output.mean(1)
        return torch.cat([mean, -mean], 1)

    def extractor() -> LeGrad:
        return LeGrad(model, "0", score_projection=scores, grid_shape=(2, 2))

    close(ask(extractor(), tokens, 0, normalized=False)[0], [[[0.2, 0], [0.6, 0.8]]])
    close(ask(extractor(), tokens, 0)[0], [[[0.25, 0], [0.75, 1]]])
    close(ask(extractor(), tokens, 1, normalized=False)[0], [[[0, 0.4], [0, 0]]])


def test_le_grad_reads_blocks_by_their_mean_token(device: torch.device) -> None:
    """As TorchCAM does: the mean of a block's tokens, then the model's last norm and head."""
    model, x = le_grad_case(device)
    block = model.encoder.layers[1]
    explicit = LeGrad(model, block, score_projection=lambda tokens: model.heads(model.encoder.ln(tokens.mean(1))))
    (expected,) = ask(explicit, x, CLASSES, normalized=False)
    close(ask(LeGrad(model, block), x, CLASSES, normalized=False)[0], expected)


def test_layer_cam_fusion_by_hand() -> None:
    # tanh(2·M/max M) of each sample, resized, and the larger one
    coarse = torch.tensor([[[4.0]], [[0.0]]], dtype=torch.float64)
    fine = torch.tensor([[[1.0, 2.0], [0.0, 0.5]], [[0.0, 8.0], [4.0, 0.0]]], dtype=torch.float64)
    t1, t2 = math.tanh(1), math.tanh(2)
    close(LayerCAM.fuse_cams([coarse, fine]), [[[t2, t2], [t2, t2]], [[0, t2], [t1, 0]]])
    close(LayerCAM.fuse_cams([fine[1:] / 100]), fine[1:] / 100)


def test_fusion_takes_the_largest_by_hand() -> None:
    first = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    second = torch.tensor([[[0.75], [0.25]]], dtype=torch.float64)
    close(GradCAM.fuse_cams([first, second]), [[[0.75, 1], [0.25, 1]]])
    assert torch.equal(GradCAM.fuse_cams([first]), first)


# Where TorchCAM is wrong: the numbers of the list in the documentation -----------------------------------------------


def test_bug_01_grad_cam_pp_divides_by_the_denominator(device: torch.device) -> None:
    raw, _ = BY_HAND[GradCAMpp]
    close(ask(GradCAMpp(hand_net(device), "features"), A.to(device), 0, normalized=False)[0], [raw])


def test_bug_01_grad_cam_pp_reaches_one_with_small_gradients(device: torch.device) -> None:
    net = hand_net(device)
    with torch.no_grad():
        net.head[1].weight.mul_(1e-3)
    (cam,) = ask(GradCAMpp(net, "features"), A.to(device), 0)
    assert cam.amax() == 1


def test_bug_02_smooth_grad_cam_pp_uses_the_clean_activation_and_the_mean_gradient(device: torch.device) -> None:
    # Y = A² for one channel and position: G = x + δ. With x = 1 and one of two draws positive, the other far below 0,
    # the ReLU of the mean gradient, of the last one and of each differ.
    net = HandNet(lambda a: (a**2 / 2).sum((2, 3)), channels=1).double().to(device)
    x = torch.ones((1, 1, 1, 2), dtype=torch.float64, device=device)
    deltas = noise(3, (1, 1, 2), 2.0, device)[:, 0, 0].tolist()
    weight = 0.0
    for position in range(2):
        gradients = [1 + delta[position] for delta in deltas]
        first, second, third = (sum(g**p for g in gradients) / 3 for p in (1, 2, 3))
        weight += second / (2 * second + third * 2) * max(first, 0)
        assert (gradients[-1] > 0) != (first > 0) or abs(gradients[-1] - first) > 0.1
    extractor = SmoothGradCAMpp(net, "features", num_samples=3, std=2.0, seed=SEED)
    close(ask(extractor, x, 0, normalized=False)[0], [[[max(weight, 0)] * 2]])


def test_bug_02_smooth_grad_cam_pp_leaves_batch_norm_statistics(device: torch.device) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = net.to(device).train()
    with SmoothGradCAMpp(net, "2") as extractor:
        scores = net(torch.rand(4, 3, 8, 8, device=device))
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        extractor(0, scores)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("class_idx", [True, [True, False], np.True_, torch.tensor([True, False])])
@pytest.mark.parametrize("method", [GradCAM, ScoreCAM])
def test_bug_03_a_boolean_is_no_class(method: type, class_idx: Any, device: torch.device) -> None:
    with pytest.raises(TypeError, match="class_idx"):
        ask(method(hand_net(device), "features"), A.repeat(2, 1, 1, 1).to(device), class_idx)


@pytest.mark.parametrize("method", [GradCAM, GradCAMpp, XGradCAM, ScoreCAM, SmoothGradCAMpp])
def test_bug_04_in_place_operations_do_not_change_the_activation(method: type, device: torch.device) -> None:
    def head(a: Tensor, relu: Callable[[Tensor], Tensor]) -> Tensor:
        return relu(a).flatten(1) @ torch.arange(16.0, dtype=a.dtype, device=a.device).reshape(8, 2) / 100

    x = (A - 1.5).to(device)
    expected = ask(method(HandNet(lambda a: head(a, torch.relu)).double().to(device), "features"), x, 1)
    found = ask(method(HandNet(lambda a: head(a, torch.relu_)).double().to(device), "features"), x, 1)
    close(found[0], expected[0])


def test_bug_04_in_place_by_hand(device: torch.device) -> None:
    # The activation is A - 2 = -1 0    0 -1
    #                           -2 1    2 -1
    # CAM with the weights 1 and 1 is their sum; of what the ReLU makes of it, the sum would be 0 0
    #                                                                                           2 1
    head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        head[3].weight.fill_(1.0)
    net = HandNet(head).double().to(device)
    close(ask(CAM(net, "features", "head.3"), (A - 2).to(device), 0, normalized=False)[0], [[[-1, -1], [0, 0]]])


@pytest.mark.parametrize("method", [GradCAM, GradCAMpp, SmoothGradCAMpp, XGradCAM, LayerCAM, ScoreCAM, SSCAM, ISCAM])
def test_bug_05_nan_is_not_summed_away(method: type, device: torch.device) -> None:
    x = A.repeat(2, 1, 1, 1).to(device)
    expected = ask(method(hand_net(device), "features"), x, 0)
    x[1, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="'features'") as caught:
        (cam,) = ask(method(hand_net(device), "features"), x, 0)
    assert len(caught) == 1
    assert cam[1].isnan().all()
    close(cam[0], expected[0][0])


@pytest.mark.parametrize("scale", [1e-12, 1e-30])
def test_bug_06_small_activations_reach_one(scale: float, device: torch.device) -> None:
    _, scaled = BY_HAND[GradCAM]
    net = hand_net(device).float()
    close(ask(GradCAM(net, "features"), scale * A.float().to(device), 0)[0], [scaled], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [GradCAM, LayerCAM, ScoreCAM])
def test_bug_06_constant_maps_are_zeros(method: type, dtype: torch.dtype, device: torch.device) -> None:
    net = HandNet(lambda a: a.mean((2, 3))).to(device, dtype)
    (cam,) = ask(method(net, "features"), torch.full((1, 2, 3, 3), 0.3, device=device, dtype=dtype), 0)
    assert cam.dtype == torch.float32
    close(cam, torch.zeros(1, 3, 3))


@pytest.mark.parametrize("method", [GradCAM, LayerCAM, CAM, ScoreCAM])
def test_bug_08_fusing_one_map_resizes_it(method: Any) -> None:
    fused = method.fuse_cams([torch.tensor([[[0.0, 1.0]]])], target_shape=(1, 4))
    close(fused, [[[0, 0.25, 0.75, 1]]], 1e-7)


@pytest.mark.parametrize("first", [ScoreCAM, SSCAM, ISCAM, SmoothGradCAMpp])
@pytest.mark.parametrize("second", [GradCAM, ScoreCAM, SmoothGradCAMpp, LayerCAM])
def test_bug_09_extractors_do_not_disturb_each_other(first: type, second: type, device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2).to(device)
    alone = ask(second(net, "second"), x, 1)
    with first(net, "second") as one, second(net, "second") as other:
        scores = net(x)
        one(0, scores)
        together = other(1, scores)
    close(together[0], alone[0])


def test_bug_10_cam_reads_the_head_of_the_moment(device: torch.device) -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    net = HandNet(head).double().to(device)
    with CAM(net, "features", "head.2") as extractor:
        head[2] = nn.Linear(2, 3, bias=False).double().to(device)
        with torch.no_grad():
            head[2].weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
        net(A.to(device))
        close(extractor(2, normalized=False)[0], [[[3, 3], [4, 4]]])
        net.float()(A.float().to(device))
        close(extractor(2, normalized=False)[0], [[[3, 3], [4, 4]]])


@pytest.mark.parametrize("method", [GradCAM, LayerCAM, XGradCAM, GradCAMpp, ScoreCAM])
def test_bug_11_a_layer_without_positions_is_refused(method: type, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"'head\.0'"):
        ask(method(hand_net(device), "head.0"), A.to(device), 0)


class Explodes(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("the kernel failed")


def test_bug_12_errors_of_the_backward_pass_keep_their_names(device: torch.device) -> None:
    net = HandNet(lambda a: Explodes.apply(a).mean((2, 3))).double().to(device)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        ask(GradCAM(net, "features"), A.to(device), 0)
    detached = HandNet(lambda a: a.detach().mean((2, 3)) + a[:, :, 0, 0] * 0).double().to(device)
    with pytest.raises(RuntimeError, match="not connected to every target layer"):
        ask(GradCAM(detached, "features"), A.to(device), targets=lambda y: y.detach()[0])


class Log(list[int]):
    """A list that replicas of a model share."""


class PooledNet(nn.Module):
    """Halves a sequence, and scores channel 0; counts the rows it has seen."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.features = nn.AvgPool1d(2)
        self.factor = factor
        self.rows = Log()

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.factor * self.features(x).sum(2)


def test_bug_15_masks_are_scaled_after_upsampling(device: torch.device) -> None:
    # A_0 = 0 1 0 upsampled is 0 1/4 3/4 3/4 1/4 0 and scaled 0 1/3 1 1 1/3 0: X_0 is unchanged, its pooled sum is 1.
    # A_1 = 2 0 4 upsampled is 2 3/2 1/2 1 3 4 and scaled, at the two places where X_0 is 1, 0 and 1/7: 1/14 in all.
    # Scaled before the upsampling, these would be 3/4 and (1/8 + 1/4)/2. The difference, 13/14, becomes odds of 3 to 1.
    x = torch.tensor([[[0.0, 0, 1, 1, 0, 0], [2, 2, 0, 0, 4, 4]]], dtype=torch.float64, device=device)
    net = PooledNet(math.log(3) * 14 / 13)
    close(ask(ScoreCAM(net, "features"), x, 0, normalized=False)[0], [[0.5, 0.75, 1]])


def test_bug_15_no_pass_is_spent_on_a_baseline(device: torch.device) -> None:
    x = torch.rand((2, 5, 6), device=device)
    net = PooledNet(1.0)
    ask(ScoreCAM(net, "features", batch_size=4), x, 0)
    # The user's; where a signal has its positions; and 2 samples of 5 channels, with the first sample as it is.
    assert net.rows == [2, 9, 1, 4, 4, 3]


def test_constant_channels_share_an_evaluation(device: torch.device) -> None:
    x = torch.rand((2, 5, 6), device=device, dtype=torch.float64)
    x[0, 1:4] = 0.7
    x[1, 0] = 0.0
    net = PooledNet(1.0)
    (cam,) = ask(ScoreCAM(net, "features", batch_size=100), x, 4, normalized=False)
    assert net.rows == [2, 9, 1, 8 + 1]
    expected = oracles.score_cam(x, net.features, lambda a: a.sum(2), class_scores([4, 4]))
    close(cam, expected)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ulps", [0, 2])
def test_constant_channels_stay_constant_when_upsampled(
    ulps: int, dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    """The rounding of what computed a channel, and of its interpolation, must not become a mask."""
    generator = torch.Generator().manual_seed(0)
    seen = []

    class Net(HandNet):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    net = Net(lambda a: a.flatten(2).sum(2), channels=100, dim=dim).to(device, dtype)
    net.features = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d][dim - 1](4)
    values = 1.01 + 0.9 * torch.rand((1, 100, *[1] * dim), generator=generator, dtype=dtype)
    steps = torch.randint(0, ulps + 1, (1, 100, *[3] * dim), generator=generator)
    pooled = values + steps * torch.finfo(dtype).eps
    x = pooled
    for axis in range(2, 2 + dim):
        x = x.repeat_interleave(4, axis)
    ask(ScoreCAM(net, "features"), x.to(device), 0)
    # The user's pass, the first sample as it is in evaluation mode, and a single row for all channels; of signals, an
    # experiment before that tells where their positions are.
    assert [len(x) for x in seen] == [1, *([9] if dim == 1 else []), 1, 2]
    assert not seen[-1][1:].any(), "the mask is not 0"


@pytest.mark.parametrize("method", [SSCAM, SmoothGradCAMpp])
def test_bug_18_noise_is_not_drawn_from_the_global_stream(method: type, device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        (first,) = ask(method(net, "second", num_samples=2), x, 0)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        (second,) = ask(method(net, "second", num_samples=2), x, 0)
        (other,) = ask(method(net, "second", num_samples=2, seed=1), x, 0)
    close(first, second, 1e-12)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("method", [SSCAM, SmoothGradCAMpp])
def test_bug_18_a_generator_may_be_given(method: type, device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2).to(device)
    seeded = ask(method(net, "second", num_samples=2, seed=7), x, 0)
    generator = torch.Generator(device).manual_seed(7)
    drawn = ask(method(net, "second", num_samples=2, generator=generator), x, 0)
    again = ask(method(net, "second", num_samples=2, generator=generator), x, 0)
    close(seeded[0], drawn[0], 1e-12)
    assert not torch.allclose(seeded[0], again[0])


@pytest.mark.parametrize("class_idx", [5, -1, [0, 5], torch.tensor([0, 9])])
@pytest.mark.parametrize("method", [GradCAM, ScoreCAM, SmoothGradCAMpp, FinerCAM])
def test_bug_19_classes_out_of_range(method: type, class_idx: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match="class_idx"):
        ask(method(split_net(2).to(device), "second"), image(2).to(device), class_idx)


def test_bug_19_maps_of_one_dimension_are_fused() -> None:
    maps = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0, 0.0, 0.5]])]
    close(GradCAM.fuse_cams(maps), [[0.5, 0.25, 0.75, 1]], 1e-7)
