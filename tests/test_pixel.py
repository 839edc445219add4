"""Methods of input resolution: against oracles, identities and numbers worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from models import CONVOLUTIONS, IMAGE_SHAPES, image, resnet, shuffled, split_net
from test_methods_numbers import CLASSES, TARGETS, ask, class_scores, close
from test_promises import SITUATIONS, Snapshot
from torch import Tensor, nn

from torchcam.methods import FullGrad, GradCAM, GuidedBackprop, GuidedGradCAM
from torchcam.methods._request import Request
from torchcam.methods.pixel import _clipped_at_rectifiers
from torchcam.metrics import ClassificationMetric
from torchcam.targets import Selector


class PoolMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def layers(dim: int, activation: nn.Module) -> nn.Sequential:
    """A chain of everything that has a bias, in float64."""
    convolution = CONVOLUTIONS[dim]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dim]
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dim]
    chain = nn.Sequential(
        convolution(IMAGE_SHAPES[dim][0], 4, 3, padding=1),
        norm(4),
        activation,
        convolution(4, 6, 3, stride=2, padding=1, bias=False),
        norm(6, affine=False),
        copy.deepcopy(activation),
        transposed(6, 5, 2, stride=2),
        copy.deepcopy(activation),
        pool(2),
        PoolMean(),
        nn.Linear(5, 5),
    )
    return shuffled(chain.double(), scale=4)


ACTIVATIONS = {2, 5, 7}


def biases_of(chain: nn.Sequential) -> dict[int, list[float]]:
    biases = {}
    for i, layer in enumerate(chain):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            gamma, beta = (layer.weight, layer.bias) if layer.affine else (torch.ones(6), torch.zeros(6))
            means, deviations = layer.running_mean, (layer.running_var + layer.eps).sqrt()
            biases[i] = [beta[k].item() - (gamma[k] * means[k] / deviations[k]).item() for k in range(len(means))]
        elif getattr(layer, "bias", None) is not None:
            biases[i] = layer.bias.tolist()
    return biases


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def dim(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# Guided backpropagation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish])
@pytest.mark.parametrize("by", ["classes", "targets"])
def test_guided_backprop_agrees_with_the_oracle(
    activation: type[nn.Module], by: str, dim: int, device: torch.device
) -> None:
    chain, x = layers(dim, activation()).to(device), image(dim, 3).to(device)
    scores = class_scores(CLASSES) if by == "classes" else TARGETS
    asked = {"class_idx": CLASSES} if by == "classes" else {"targets": TARGETS}
    expected = oracles.guided_backprop(x, list(chain), ACTIVATIONS, scores)
    assert expected.abs().amax() > 1e-4
    (raw,) = ask(GuidedBackprop(chain), x, normalized=False, **asked)
    (scaled,) = ask(GuidedBackprop(chain), x, **asked)
    assert raw.shape == x.shape
    close(raw, expected)
    close(scaled, oracles.normalized(expected))


class Rectified(nn.Module):
    """Y_0 = -2 a_0 + 3 a_1 with a = relu(x_0 - x_1, x_1), applied in one way or another."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(2).unbind(1)
        a = self.relu(torch.stack([first - second, second], 1))
        return (3 * a[:, 1] - 2 * a[:, 0]).sum(1, keepdim=True)


@pytest.mark.parametrize(
    "relu",
    [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, Tensor.relu, lambda z: F.relu(z, inplace=True)],
)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_negative_gradients_stop_at_a_relu_whoever_applies_it(relu: Any, situation: str) -> None:
    # At x = (3, 1): both ReLUs are open. The gradient is (-2, 2 + 3); guided, the path through a_0 is cut: (0, 3).
    # At x = (1, 3): a_0 is shut, and x = (3, -1) shuts a_1, whose weight is the positive one.
    x = torch.tensor([[[3.0, 1, 3], [1, 3, -1]]])
    net = Rectified(relu)
    with GuidedBackprop(net) as extractor, SITUATIONS[situation]():
        net(x.clone())
        (guided,) = extractor(0, normalized=False)
    assert guided.tolist() == [[[0, 0, 0], [3, 3, 0]]]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    assert gradient.tolist() == [[[-2, 0, -2], [5, 3, 2]]], "nothing is left of the clipping"


def test_guided_backprop_of_a_net_without_rectifiers_is_its_gradient(dim: int) -> None:
    net = shuffled(nn.Sequential(CONVOLUTIONS[dim](IMAGE_SHAPES[dim][0], 3, 3), nn.Tanh(), PoolMean()).double())
    x = image(dim)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    (guided,) = ask(GuidedBackprop(net), x, 1, normalized=False)
    close(guided, gradient)


def test_the_map_of_a_single_layer_is_what_is_fused(dim: int) -> None:
    net, x = split_net(dim), image(dim)
    with GuidedBackprop(net) as extractor:
        (cam,) = extractor(1, net(x))  # (N, C, *spatial)
        assert torch.equal(extractor.fuse_cams([cam]), cam)
        metric = ClassificationMetric(extractor)
        metric.update(x, 1)
    assert int(metric.total) == len(x)


def test_clipping_ends_with_the_block() -> None:
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    score = -2 * leaf.relu()
    with _clipped_at_rectifiers(score):
        assert torch.autograd.grad(score.sum(), leaf, retain_graph=True)[0].tolist() == [0, 0]
    with pytest.raises(ZeroDivisionError), _clipped_at_rectifiers(score):
        raise ZeroDivisionError
    assert torch.autograd.grad(score.sum(), leaf)[0].tolist() == [-2, -2]


# Guided Grad-CAM ----------------------------------------------------------------------------------------------------


def test_guided_grad_cam_is_a_product(dim: int, device: torch.device) -> None:
    chain, x = layers(dim, nn.ReLU()).to(device), image(dim, 3).to(device)
    found = ask(GuidedGradCAM(chain, ["2", "5"]), x, CLASSES, normalized=False)
    guided = oracles.guided_backprop(x, list(chain), ACTIVATIONS, class_scores(CLASSES))
    for layer, cam in zip((2, 5), found, strict=True):
        maps = oracles.grad_cam(x, chain[: layer + 1], chain[layer + 1 :], class_scores(CLASSES))
        weights = torch.stack([oracles.upsampled(map_, x.shape[2:]) for map_ in maps])
        close(cam, weights.unsqueeze(1) * guided)
        close(cam.amax(), (weights.unsqueeze(1) * guided).amax())
    assert found[0].abs().amax() > 0


# FullGrad -----------------------------------------------------------------------------------------------------------


def test_full_grad_agrees_with_the_oracle(dim: int, device: torch.device) -> None:
    chain, x = layers(dim, nn.ReLU(inplace=True)).to(device), image(dim, 3).to(device)
    expected = oracles.full_grad(x, list(layers(dim, nn.ReLU()).to(device)), biases_of(chain), class_scores(CLASSES))
    assert expected.amax() > 1
    (raw,) = ask(FullGrad(chain), x, CLASSES, normalized=False)
    (scaled,) = ask(FullGrad(chain), x, CLASSES)
    assert raw.shape == (3, *x.shape[2:])
    close(raw, expected)
    close(scaled, oracles.normalized(expected))


def shares(model: nn.Module, x: Tensor, select: Selector) -> tuple[list[Tensor], Tensor]:
    """The terms that FullGrad sees in a score, and the score itself."""
    with FullGrad(model) as extractor, torch.no_grad():
        score = select(model(x))
        terms: list[Tensor] = []
        extractor._each_term(Request(extractor._recorder.find(), targets=select), terms.append)
        return [terms[-1], *terms[-2::-1]], score  # the input's first, then in the order of the layers


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_the_terms_sum_up_to_the_score(activation: type[nn.Module], dim: int, device: torch.device) -> None:
    chain, x = layers(dim, activation()).to(device), image(dim, 3).to(device)
    terms, score = shares(chain, x, Selector(CLASSES, None, 3))
    assert [term.shape[1] for term in terms] == [x.shape[1], 4, 4, 6, 5, 5]
    close(sum(term.flatten(1).sum(1) for term in terms), score, 1e-13)
    for n, c in enumerate(CLASSES):
        single = oracles.full_grad_terms(x[n : n + 1], list(chain), biases_of(chain), class_scores([c])[0])
        for (_, expected), term in zip(sorted(single, key=lambda pair: pair[0]), terms, strict=True):
            close(term[n], expected)


def test_the_terms_of_a_residual_net_sum_up_to_the_score(device: torch.device) -> None:
    """resnet18: connections around layers, batch normalisation, operations in place, max-pooling."""
    model = shuffled(resnet(dtype=torch.float64)).to(device)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    terms, score = shares(model, x, Selector([3, 7], None, 2))
    assert len(terms) == 1 + 20 + 1  # the input, the batch normalisations, the head
    close(sum(term.flatten(1).sum(1) for term in terms) / score, [1.0, 1.0], 1e-10)


class Functional(nn.Module):
    """Biases that no module of their own adds, a layer that runs twice, and channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(3))
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.mix = nn.Linear(3, 4)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("running_mean", torch.empty(3))
        self.register_buffer("running_var", torch.empty(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(F.conv2d(x, self.weight, bias=self.bias, padding=1))
        x = F.batch_norm(x, self.running_mean, self.running_var, eps=1e-3)
        x = self.twice(self.twice(x).relu_()).relu_()
        x = self.mix(x.permute(0, 2, 3, 1)).relu_()
        return self.fc(x.mean((1, 2)))


def test_biases_of_functions_are_seen(device: torch.device) -> None:
    model, x = shuffled(Functional().double()).to(device), image(2, 3).to(device)
    terms, score = shares(model, x, Selector(CLASSES, None, 3))
    assert [term.shape[1:] for term in terms] == [(3, 9, 11)] * 5 + [(4, 9, 11), (5,)]
    close(sum(term.flatten(1).sum(1) for term in terms), score, 1e-13)
    (cam,) = ask(FullGrad(model), x, CLASSES, normalized=False)
    maps = [oracles.normalized(term.abs()).sum(1) for term in terms[:-1]]
    close(cam, sum(maps))


def test_a_norm_without_statistics_has_its_own_bias_only() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    model = shuffled(nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.ReLU(), PoolMean()).double())
    x = image(2, 2)
    terms, _ = shares(model, x, Selector(0, None, 2))
    leaf = model[0](x).detach()
    z = norm(leaf).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[2:](z)[:, 0].sum(), z)
    close(terms[2], gradient * norm.bias.detach().reshape(-1, 1, 1))


def test_full_grad_by_hand() -> None:
    # z = 2 x + 1 where x is (1, -1, 3); Y = 3 relu(z) summed: z = (3, -1, 7), dY/dz = (3, 0, 3), dY/dx = (6, 0, 6).
    # x * dY/dx = (6, 0, 18) scales to (1/3, 0, 1); b * dY/dz = (3, 0, 3) scales to (1, 0, 1).
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(2)
        model[0].bias.fill_(1)
    x = torch.tensor([[[1.0, -1, 3]]])
    (cam,) = ask(FullGrad(model), x, targets=lambda y: 3 * y.sum(), normalized=False)
    close(cam, [[4 / 3, 0, 2]], 1e-6)
    terms, _ = shares(model, x, Selector(None, lambda y: 3 * y.sum(), 1))
    assert [term.tolist() for term in terms] == [[[[6, 0, 18]]], [[[3, 0, 3]]]]  # 30 = 3 * (3 + 7)


# All of them --------------------------------------------------------------------------------------------------------

PIXEL: dict[str, Callable[[nn.Module], Any]] = {
    "GuidedBackprop": GuidedBackprop,
    "GuidedGradCAM": lambda chain: GuidedGradCAM(chain, "2"),
    "FullGrad": FullGrad,
}
every_method = pytest.mark.parametrize("make", PIXEL.values(), ids=PIXEL)


@every_method
def test_a_batch_gives_the_maps_of_single_calls(make: Any, dim: int, device: torch.device) -> None:
    chain, x = layers(dim, nn.ReLU()).to(device), image(dim, 3).to(device)
    (together,) = ask(make(chain), x, CLASSES)
    for n, c in enumerate(CLASSES):
        (alone,) = ask(make(chain), x[n : n + 1], c)
        close(together[n], alone[0])


@every_method
@pytest.mark.parametrize("situation", SITUATIONS)
def test_cost_is_another_pass_each_way(make: Any, situation: str) -> None:
    chain, x = layers(2, nn.ReLU()), image(2)
    forward, backward = [], []
    # The first convolution is differentiated for its input once: whatever looks at a layer behind stops there.
    chain[0].register_forward_hook(lambda *_: forward.append(1))
    with make(chain) as extractor, SITUATIONS[situation]():
        chain(x)

        def watch(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _gradient: backward.append(1))

        chain[0].register_forward_hook(watch)
        extractor(0)
    assert (len(forward), len(backward)) == (2, 1)


@every_method
def test_the_input_need_not_be_the_first_argument(make: Any) -> None:
    class Named(nn.Sequential):
        def forward(self, *, number: int, pixels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": number * super().forward(pixels)}

    chain, x = layers(2, nn.ReLU()), image(2)
    named = Named(*chain)
    expected = ask(make(chain), x, 1)
    with make(named) as extractor, torch.inference_mode():
        named(number=1, pixels=x)
        for cam, other in zip(extractor(1), expected, strict=True):
            close(cam, other)


@every_method
def test_half_precision(make: Any) -> None:
    chain, x = layers(2, nn.ReLU()).bfloat16(), image(2).bfloat16()
    (cam,) = ask(make(chain), x, 0)
    assert cam.dtype == torch.float32
    assert cam.isfinite().all()


@pytest.mark.parametrize("method", [GuidedBackprop, FullGrad])
def test_a_constant_score_has_no_map(method: Any) -> None:
    chain, x = layers(2, nn.ReLU()), image(2)
    with pytest.raises(RuntimeError, match="not connected to every target layer: it does not depend on the input"):
        ask(method(chain), x, targets=lambda y: y.detach().sum())
    with pytest.raises(RuntimeError, match="not connected to every target layer: it does not depend on the input"):
        ask(method(chain), x, targets=lambda y: chain[-1].bias.sum())


@pytest.mark.parametrize("method", [GuidedBackprop, FullGrad])
def test_the_input_and_its_gradient_can_be_read(method: Any) -> None:
    chain, x = layers(2, nn.ReLU()), image(2)
    with method(chain) as extractor:
        chain(x)
        assert extractor.hook_g == [None]
        extractor(0)
        assert torch.equal(extractor.hook_a[0], x)
        assert extractor.hook_g[0].shape == x.shape
        assert extractor.target_names == [""]  # the model itself: its input
    assert repr(extractor) == f"{method.__name__}()"
    with pytest.raises(ValueError, match="looks at the input, not at a `target_layer`: got '0'"):
        method(chain, "0")


@every_method
def test_evidence_against_a_class(make: Any) -> None:
    chain, x = layers(2, nn.ReLU()), image(2)
    (against,) = ask(make(chain), x, 1, relu="negative")
    (of_negative,) = ask(make(chain), x, targets=lambda y: -y[1], relu=True)
    close(against, of_negative)


@every_method
def test_several_classes_at_once(make: Any) -> None:
    chain, x = layers(2, nn.ReLU()), image(2)
    (together,) = ask(make(chain), x, [[0, 1, 2], [3, 4, 0]])
    for k, classes in enumerate([[0, 3], [1, 4], [2, 0]]):
        (alone,) = ask(make(chain), x, classes)
        close(together[:, k], alone)


def test_a_model_that_changes_its_input_in_place_leaves_no_trace() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_().flatten(1)

    model, x = InPlace(), torch.tensor([[[1.0, -1, 2]]])
    with GuidedBackprop(model) as extractor:
        model(x)
        with pytest.raises(RuntimeError, match="modified in place"):
            extractor(0)
        before = Snapshot(model)
        with pytest.raises(RuntimeError, match="modified in place"):
            extractor(0)
        before.check(hooks=True)


def test_grad_cam_is_what_guides_guided_grad_cam() -> None:
    """Where Grad-CAM is 0, so is Guided Grad-CAM; elsewhere its sign is that of guided backpropagation."""
    net, x = split_net(2), image(2)
    (cam,) = ask(GradCAM(net, "first"), x, 0, normalized=False)
    (product,) = ask(GuidedGradCAM(net, "first"), x, 0, normalized=False)
    (guided,) = ask(GuidedBackprop(net), x, 0, normalized=False)
    assert (cam == 0).any()
    close(product, cam.unsqueeze(1) * guided)


def test_full_grad_counts_the_biases_of_frozen_batch_norm() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    generator = torch.Generator().manual_seed(0)
    norm, frozen = nn.BatchNorm2d(4).eval(), FrozenBatchNorm2d(4)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = torch.rand(4, generator=generator) + 0.2
        getattr(norm, name).data.copy_(value)
        getattr(frozen, name).copy_(value)
    conv, head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
    maps = []
    for middle in (norm, frozen):
        model = nn.Sequential(conv, middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
        with FullGrad(model) as extractor, torch.no_grad():
            model(torch.randn((2, 3, 8, 10), generator=torch.Generator().manual_seed(1)))
            maps += extractor(1, normalized=False)
    torch.testing.assert_close(maps[1], maps[0])
