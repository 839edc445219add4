"""What must hold whatever the numbers are: identities between methods, and what does not change a map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GapNet, HandNet, image, split_net, tiny_vit
from torch import Tensor, nn

from torchcam.methods import (
    CAM,
    FEM,
    ISCAM,
    SSCAM,
    AblationCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMpp,
    GroupCAM,
    HiResCAM,
    LayerCAM,
    LeGrad,
    MeanActivation,
    RandomCAM,
    ReciproCAM,
    RefineCAM,
    ScoreCAM,
    ShapleyCAM,
    SmoothGradCAMpp,
    XGradCAM,
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the convolutions of CUDA devices from rounding their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


Make = Callable[[nn.Module], Any]

# On nets with `features` and `fc`
MAKE: dict[str, Make] = {
    "CAM": lambda net: CAM(net, "features", "fc"),
    "ScoreCAM": lambda net: ScoreCAM(net, "features"),
    "SSCAM": lambda net: SSCAM(net, "features", num_samples=3),
    "ISCAM": lambda net: ISCAM(net, "features", num_samples=3),
    "GradCAM": lambda net: GradCAM(net, "features"),
    "GradCAMpp": lambda net: GradCAMpp(net, "features"),
    "SmoothGradCAMpp": lambda net: SmoothGradCAMpp(net, "features", num_samples=3),
    "XGradCAM": lambda net: XGradCAM(net, "features"),
    "LayerCAM": lambda net: LayerCAM(net, "features"),
    "HiResCAM": lambda net: HiResCAM(net, "features"),
    "GradCAMElementWise": lambda net: GradCAMElementWise(net, "features"),
    "ShapleyCAM": lambda net: ShapleyCAM(net, "features"),
    "AblationCAM": lambda net: AblationCAM(net, "features"),
    "ReciproCAM": lambda net: ReciproCAM(net, "features"),
    "GroupCAM": lambda net: GroupCAM(net, "features", groups=3),
    "FEM": lambda net: FEM(net, "features", n_sigma=1),
    "MeanActivation": lambda net: MeanActivation(net, "features"),
    "RandomCAM": lambda net: RandomCAM(net, "features"),
    "FinerCAM": lambda net: FinerCAM(net, "features"),
    "FinerCAM-softmax": lambda net: FinerCAM(net, "features", weighting="softmax", base_method=LayerCAM),
    "RefineCAM": lambda net: RefineCAM(net, ["features.0", "features"]),
}
every_method = pytest.mark.parametrize("method", MAKE)


def every_method_but(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", [name for name in MAKE if name not in names])


CLASSES = [1, 4, 0]


def ask(extractor: Any, x: Tensor, class_idx: Any, **options: Any) -> list[Tensor]:
    with extractor:
        return extractor(class_idx, extractor.model(x), **options)


def gap_net(device: torch.device, dtype: torch.dtype = torch.float64, **options: bool) -> GapNet:
    """With more than the pooling behind the features, so that gradients are not all alike."""
    return GapNet(**options).to(device, dtype)


class Positionwise(GapNet):
    """Averages the square of what a kernel makes of the features."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.mix = nn.Conv2d(6, 6, 1, bias=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(self.mix.weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.mix(self.features(x)).tanh() ** 2).mean((2, 3)))


def positionwise(device: torch.device, dtype: torch.dtype = torch.float64, **options: bool) -> Positionwise:
    return Positionwise(**options).to(device, dtype)


def images(device: torch.device, dtype: torch.dtype = torch.float64, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((count, 3, 8, 12), generator=generator, dtype=torch.float64).to(device, dtype)


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# Identities


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_is_cam_behind_global_average_pooling(relu: bool, device: torch.device) -> None:
    net, x = gap_net(device, relu=relu), images(device)
    cam = ask(MAKE["CAM"](net), x, CLASSES, normalized=False)
    expected = [m.relu() / m[0].numel() for m in cam]
    assert all((m > 0).any() for m in expected[0])
    close(ask(GradCAM(net, "features"), x, CLASSES, normalized=False), expected)
    close(ask(XGradCAM(net, "features"), x, CLASSES, normalized=False), expected)


def test_layer_cam_is_the_positive_part_of_cam_behind_global_average_pooling(device: torch.device) -> None:
    net, x = gap_net(device), images(device)
    positive = copy.deepcopy(net)
    with torch.no_grad():
        positive.fc.weight.relu_()
    expected = [m / m[0].numel() for m in ask(MAKE["CAM"](positive), x, CLASSES, normalized=False)]
    close(ask(LayerCAM(net, "features"), x, CLASSES, normalized=False), expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_smooth_grad_cam_pp_without_noise_is_grad_cam_pp(normalized: bool, device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    expected = ask(GradCAMpp(net, "features"), x, CLASSES, normalized=normalized)
    for std, tolerance in ((0.0, 1e-9), (1e-7, 1e-5)):
        close(ask(SmoothGradCAMpp(net, "features", std=std), x, CLASSES, normalized=normalized), expected, tolerance)


@pytest.mark.parametrize("normalized", [True, False])
def test_ss_cam_without_noise_is_score_cam(normalized: bool, device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    expected = ask(ScoreCAM(net, "features"), x, CLASSES, normalized=normalized)
    for std, tolerance in ((0.0, 1e-9), (1e-7, 1e-5)):
        extractor = SSCAM(net, "features", num_samples=4, std=std)
        close(ask(extractor, x, CLASSES, normalized=normalized), expected, tolerance)


def test_is_cam_of_one_sample_is_score_cam(device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    close(ask(ISCAM(net, "features", num_samples=1), x, CLASSES), ask(ScoreCAM(net, "features"), x, CLASSES))


@pytest.mark.parametrize("weighting", ["mean", "softmax"])
@pytest.mark.parametrize("base_method", [GradCAM, GradCAMpp, SmoothGradCAMpp, XGradCAM, LayerCAM, ScoreCAM, SSCAM])
def test_finer_cam_without_comparison_is_its_base(base_method: type, weighting: Any, device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    finer = FinerCAM(net, "features", base_method=base_method, gamma=0, weighting=weighting)
    expected = ask(base_method(net, "features"), x, CLASSES, normalized=False)
    close(ask(finer, x, CLASSES, normalized=False), expected)


def test_finer_cam_against_one_class_is_the_difference_of_targets(device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    with GradCAM(net, "features") as extractor:
        scores = net(x)
        expected = extractor(scores=scores, targets=lambda y: y[1] - 0.6 * y[3])
    with FinerCAM(net, "features") as extractor:
        close(extractor(1, net(x), 3), expected)


def test_refine_cam_of_a_layer_with_itself_is_its_square(device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    (cam,) = ask(GradCAMpp(net, "features"), x, CLASSES)
    close(ask(RefineCAM(net, ["features", "features.2"]), x, CLASSES), [cam**2])


@every_method_but("CAM", "FinerCAM", "FinerCAM-softmax")
def test_a_class_is_a_target(method: str, device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    targets = [lambda y: y[1], lambda y: y[4], lambda y: y[0]]
    with MAKE[method](net) as extractor:
        found = extractor(scores=net(x), targets=targets)
    close(found, ask(MAKE[method](net), x, CLASSES))


# Invariances


def make_net(method: str, device: torch.device, dtype: torch.dtype = torch.float64, **options: bool) -> GapNet:
    return (gap_net if method == "CAM" else positionwise)(device, dtype, **options)


@every_method
def test_a_batch_is_its_samples(method: str, device: torch.device) -> None:
    net, x = make_net(method, device), images(device)
    batch = ask(MAKE[method](net), x, CLASSES)
    singles = [ask(MAKE[method](net), x[n : n + 1], CLASSES[n]) for n in range(3)]
    close(batch, [torch.cat(layer) for layer in zip(*singles, strict=True)])


@every_method_but("GroupCAM", "RandomCAM")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)))
def test_the_order_of_channels_does_not_matter(method: str, order: list[int], device: torch.device) -> None:
    net, x = make_net(method, device), images(device)
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        convolution = permuted.features[0]
        convolution.weight.copy_(convolution.weight[order])
        convolution.bias.copy_(convolution.bias[order])
        behind = permuted.mix if isinstance(permuted, Positionwise) else permuted.fc
        behind.weight.copy_(behind.weight[:, order])
    close(ask(MAKE[method](permuted), x, CLASSES), ask(MAKE[method](net), x, CLASSES))


@every_method_but("FinerCAM-softmax", "ReciproCAM")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(constant=st.floats(-30, 30))
def test_a_constant_added_to_all_logits_does_not_matter(method: str, constant: float, device: torch.device) -> None:
    # Finer-CAM's softmax weighs y_c - γ·y_d, which is not free of such a constant; Recipro-CAM's map is made of scores.
    net, x = make_net(method, device), images(device)
    expected = ask(MAKE[method](net), x, CLASSES)
    with torch.no_grad():
        net.fc.bias.add_(constant)
    close(ask(MAKE[method](net), x, CLASSES), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
@pytest.mark.parametrize("method", [ScoreCAM, SSCAM, ISCAM, SmoothGradCAMpp])
def test_the_size_of_chunks_does_not_matter(method: type, batch_size: int, device: torch.device) -> None:
    net, x = positionwise(device), images(device)
    largest = 0

    def watch(_module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal largest
        largest = max(largest, len(args[0]))

    options = {"num_samples": 3} if method is not ScoreCAM else {}
    expected = ask(method(net, "features", **options), x, CLASSES, normalized=False)
    with method(net, "features", batch_size=batch_size, **options) as extractor:
        scores = net(x)
        handle = net.register_forward_pre_hook(watch)
        found = extractor(CLASSES, scores, normalized=False)
        handle.remove()
    # With one row of the first sample as it is, where inputs are masked.
    assert largest == min(batch_size, 3 * 3 if method is SmoothGradCAMpp else 3 * 6 + 1)
    close(found, expected)


@every_method_but("SSCAM", "SmoothGradCAMpp")
def test_flipping_the_image_flips_the_map(method: str, device: torch.device) -> None:
    # Noise would have to be flipped along.
    net, x = make_net(method, device, symmetric=True), images(device)
    expected = ask(MAKE[method](net), x, CLASSES)
    assert (expected[0] - expected[0].flip(-1)).abs().amax() > 1e-3
    close(ask(MAKE[method](net), x.flip(-1), CLASSES), [cam.flip(-1) for cam in expected])


@every_method_but("GradCAMpp", "SmoothGradCAMpp", "ScoreCAM", "SSCAM", "ISCAM", "RefineCAM", "FinerCAM-softmax")
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_the_scale_of_a_linear_head_does_not_matter(method: str, scale: float, device: torch.device) -> None:
    """In float32, for the methods whose map is proportional to the logits."""
    net, x = gap_net(device, torch.float32), images(device, torch.float32)
    expected = ask(MAKE[method](net), x, CLASSES)
    with torch.no_grad():
        net.fc.weight.mul_(scale)
        net.fc.bias.mul_(scale)
    found = ask(MAKE[method](net), x, CLASSES)
    close(found, expected, 1e-4)
    assert (found[0].flatten(1).amax(1) == 1).any()


@pytest.mark.parametrize("method", ["GradCAMpp", "SmoothGradCAMpp", "RefineCAM"])
def test_tiny_gradients_weigh_one_half(method: str, device: torch.device) -> None:
    """1/(2 + G·ΣA) tends to 1/2: the map is that of the summed positive gradients, whatever their scale."""
    net, x = positionwise(device, torch.float32), images(device, torch.float32)
    maps = []
    for scale in (1e-8, 1e-4):  # 1e-12 and 1e-16 times the weights, in all
        with torch.no_grad():
            net.fc.weight.mul_(scale)
        maps.append(ask(MAKE[method](net), x, CLASSES))
    close(maps[1], maps[0], 1e-4)
    assert (maps[1][0].flatten(1).amax(1) == 1).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("method", [GradCAM, XGradCAM, LayerCAM, GradCAMpp, ScoreCAM])
def test_the_scale_of_activations_does_not_matter(method: type, scale: float, device: torch.device) -> None:
    """The head undoes the scale; for Grad-CAM++ that leaves G·ΣA, and for Score-CAM the masks, as they were."""

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net = positionwise(device, torch.float32)
            self.scale = scale
            self.features = HandNet(lambda a: scale * a, channels=6).to(device)

        def forward(self, x: Tensor) -> Tensor:
            features = self.features(self.net.features(x)) / self.scale
            return self.net.fc((self.net.mix(features).tanh() ** 2).mean((2, 3)))

    x = images(device, torch.float32)
    expected = ask(method(Scaled(1.0), "features"), x, CLASSES)
    assert (expected[0].flatten(1).amax(1) == 1).any()
    close(ask(method(Scaled(scale), "features"), x, CLASSES), expected, 1e-4)


# Of the others, two are made of small differences of scores, and two of what exceeds a threshold.
@every_method_but("AblationCAM", "ReciproCAM", "GroupCAM", "FEM")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_gives_float32_maps(
    method: str, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    net, x = make_net(method, device, torch.float32), images(device, torch.float32)
    with torch.no_grad():  # so that both nets have the same parameters
        net.load_state_dict({name: value.to(dtype).float() for name, value in net.state_dict().items()})
    x = x.to(dtype)
    expected = ask(MAKE[method](net), x.float(), CLASSES)
    found = ask(MAKE[method](net.to(dtype)), x, CLASSES)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert one.amin() >= 0
        assert one.amax() <= 1
        assert (one - other).abs().amax() <= tolerance


@every_method_but("RefineCAM", "ReciproCAM")  # the latter's windows are cut off at the border
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_map_becomes_zeros(method: str, dtype: torch.dtype, device: torch.device) -> None:
    net = make_net(method, device, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.features[0] = nn.Conv2d(3, 6, 1).to(device, dtype)
    # Sums of multiples of 1/16 have no rounding.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((16 * parameter).round() / 16)
    x = torch.full((2, 3, 8, 12), 0.5, device=device, dtype=dtype)
    maps = ask(MAKE[method](net), x, [1, 4])
    close(maps, [torch.zeros_like(cam) for cam in maps])


@pytest.mark.parametrize("method", [GradCAM, GradCAMpp, XGradCAM, LayerCAM, ScoreCAM, SmoothGradCAMpp])
def test_a_model_that_does_not_look_at_the_layer_gives_zeros(method: type, device: torch.device) -> None:
    net = HandNet(lambda a: 0 * a.sum((2, 3))).double().to(device)
    x = images(device)[:, :2]
    found = ask(method(net, "features"), x.clone(), 0)
    if method is ScoreCAM:  # all channels count alike
        assert (found[0].flatten(1).amax(1) == 1).all()
    else:
        close(found, [torch.zeros_like(x[:, 0])])


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("method", [GradCAM, SmoothGradCAMpp, ScoreCAM, LayerCAM])
def test_layers_together_are_layers_alone(method: type, dim: int, device: torch.device) -> None:
    net, x = split_net(dim).to(device), image(dim).to(device)
    together = ask(method(net, ["second", "first"]), x, [0, 3])
    close(together, [ask(method(net, layer), x, [0, 3])[0] for layer in ("second", "first")])


def test_le_grad_invariances(device: torch.device) -> None:
    model = tiny_vit().to(device)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, 3, 16, 16), generator=generator, dtype=torch.float64).to(device)
    blocks = list(model.encoder.layers)

    def maps(x: Tensor, classes: Any, **options: Any) -> Tensor:
        return ask(LeGrad(model, blocks, **options), x, classes, normalized=False)[0]

    batch = maps(x, CLASSES)
    close([batch], [torch.cat([maps(x[n : n + 1], CLASSES[n]) for n in range(3)])])
    means = [ask(LeGrad(model, block), x, CLASSES, normalized=False)[0] for block in blocks]
    close([batch], [torch.stack(means).mean(0)])
    close([batch.flatten(1).unflatten(1, (2, 8))], [maps(x, CLASSES, grid_shape=(2, 8))])
    with torch.no_grad():
        model.heads.head.bias.add_(17.0)
    close([maps(x, CLASSES)], [batch])
    with torch.no_grad():
        model.heads.head.weight.mul_(1e-12)
    (scaled,) = ask(LeGrad(model, blocks), x, CLASSES)
    assert (scaled.flatten(1).amax(1) == 1).all()
