"""Methods that factorise activations: against oracles, scikit-learn and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
from methods_under_test import Net
from models import HandNet, SplitNet, image, split_net
from sklearn.decomposition import NMF, KernelPCA
from test_methods_numbers import CLASSES, TARGETS, ask, class_scores, close, halves
from test_promises import SITUATIONS, Snapshot, count_hooks, raising
from torch import Tensor, nn

from torchcam.methods import (
    KPCACAM,
    DeepFeatureFactorization,
    EigenCAM,
    EigenGradCAM,
    EigenSmoothedCAM,
    GradCAM,
    HiResCAM,
    LayerCAM,
    SegEigenCAM,
)
from torchcam.methods.decomposition import first_component

LAYERS = list(SplitNet.layers)


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[SplitNet, Tensor]:
    """A net and a batch of three inputs, in float64."""
    return split_net(request.param).to(device), image(request.param, len(CLASSES)).to(device)


def hand_net(dim: int = 2, channels: int = 2) -> HandNet:
    return HandNet(lambda a: a.flatten(2).sum(2), channels, dim).double()


def values(rows: list[Any]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


# Against the oracles ------------------------------------------------------------------------------------------------


def test_eigen_cam_agrees_with_a_singular_value_decomposition(case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    raw = ask(EigenCAM(net, LAYERS), x, normalized=False)
    scaled = ask(EigenCAM(net, LAYERS), x)
    for layer, cam, other in zip(LAYERS, raw, scaled, strict=True):
        expected = oracles.eigen_cam(x, halves(net, layer)[0])
        assert expected.amax() > 0.1
        close(cam, expected)
        close(other, oracles.normalized(expected))


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
@pytest.mark.parametrize("gamma", [None, 0.7])
def test_kpca_cam_agrees_with_kernel_pca(kernel: str, gamma: float | None, device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2, 2).to(device)
    cams = ask(KPCACAM(net, LAYERS, kernel=kernel, gamma=gamma), x, normalized=False)

    def by_scikit_learn(features: Tensor) -> Tensor:
        points = features.flatten(1).T.cpu().numpy()
        pca = KernelPCA(1, kernel=kernel, gamma=gamma, eigen_solver="dense")
        projection = pca.fit_transform(points - points.mean(0))[:, 0]
        return torch.from_numpy(projection).to(features).reshape(features.shape[1:])

    for layer, cam in zip(LAYERS, cams, strict=True):
        body, _ = halves(net, layer)
        width = (1 / len(body(x)[0])) if gamma is None else gamma
        close(cam, oracles.eigen_cam(x, body, lambda a, width=width: oracles.kernel_projected(a, kernel, width)))
        close(cam, oracles.eigen_cam(x, body, by_scikit_learn))


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (EigenGradCAM, oracles.eigen_grad_cam),
        (SegEigenCAM, oracles.seg_eigen_cam),
        (EigenSmoothedCAM, oracles.eigen_smoothed_grad_cam),
    ],
)
@pytest.mark.parametrize("by", ["classes", "targets"])
def test_gradient_weighted_components_agree_with_the_oracle(
    method: Any, oracle: Any, by: str, case: tuple[SplitNet, Tensor]
) -> None:
    net, x = case
    scores, asked = (
        (class_scores(CLASSES), {"class_idx": CLASSES}) if by == "classes" else (TARGETS, {"targets": TARGETS})
    )
    for layer, cam in zip(LAYERS, ask(method(net, LAYERS), x, normalized=False, **asked), strict=True):
        expected = oracle(x, *halves(net, layer), scores)
        assert expected.amax() > 0
        close(cam, expected)


def test_element_wise_weights_can_be_smoothed_as_well(case: tuple[SplitNet, Tensor]) -> None:
    """With HiRes-CAM's weights, the gradient, it is Eigen-Grad-CAM."""
    net, x = case
    smoothed = ask(EigenSmoothedCAM(net, LAYERS, base_method=HiResCAM), x, CLASSES, normalized=False)
    for cam, expected in zip(smoothed, ask(EigenGradCAM(net, LAYERS), x, CLASSES, normalized=False), strict=True):
        close(cam, expected)


# Numbers worked out by hand, and signs ------------------------------------------------------------------------------


def test_eigen_cam_by_hand() -> None:
    # Both channels are multiples of (1, 3, 5, 7) - 4 = (-3, -1, 1, 3): the component is their length along (3, 4) / 5.
    steps = torch.tensor([1.0, 3, 5, 7], dtype=torch.float64)
    x = torch.stack([3 * steps, 4 * steps + 100]).reshape(1, 2, 2, 2)
    (cam,) = ask(EigenCAM(hand_net(), "features"), x, normalized=False)
    close(cam, [[[0, 0], [5, 15]]])
    (cam,) = ask(EigenCAM(hand_net(), "features"), x)
    close(cam, [[[0, 0], [1 / 3, 1]]])


def test_the_sign_follows_the_mean_activation() -> None:
    x = image(2, 4)[:, :2]
    for flipped in (x, -x):
        (cam,) = ask(EigenCAM(hand_net(), "features"), flipped, normalized=False)
        for found, projection, activation in zip(cam, first_component(flipped), flipped, strict=True):
            agrees = (projection * activation.mean(0)).sum() > 0
            close(found, (projection if agrees else -projection).relu())
            assert (found * activation.mean(0)).sum() > 0


@pytest.mark.parametrize("method", [EigenCAM, KPCACAM])
def test_the_sign_of_normed_channels_does_not_hang_on_rounding(method: Any) -> None:
    """Behind a norm over channels, their mean is that of the biases at each position, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    normed = nn.functional.layer_norm(torch.randn(50, 4, 4, 64, generator=generator, dtype=torch.float64), (64,))
    exact = (normed + 0.02 * torch.randn(64, generator=generator, dtype=torch.float64)).permute(0, 3, 1, 2)
    with method(split_net(), "second") as extractor:
        single, double = extractor.map(exact.float()), extractor.map(exact)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


def test_eigen_grad_cam_by_hand() -> None:
    # Y_1 is channel 0 less twice channel 1: the gradient is (1, -2) everywhere.
    net = hand_net()
    net.head = lambda a: torch.stack([a.sum((1, 2, 3)), (a[:, 0] - 2 * a[:, 1]).sum((1, 2))], 1)
    steps = torch.tensor([-3.0, -1, 1, 3], dtype=torch.float64).reshape(2, 2)
    x = torch.stack([3 * steps, 2 * steps]).unsqueeze(0)  # G * A = (3, -4) steps, whose sum is -steps
    (cam,) = ask(EigenGradCAM(net, "features"), x, 1, normalized=False)
    close(cam, [[[15, 5], [0, 0]]])
    (cam,) = ask(SegEigenCAM(net, "features"), x + 1, 1, normalized=False)  # |G| * A = (3, 4) steps: +-5 steps, a tie
    assert sorted(cam.flatten().tolist()) == pytest.approx([0, 0, 5, 15])


def test_seg_eigen_cam_shows_the_side_that_is_further_out() -> None:
    peak = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    peak[0, :, 1, 1] = 1
    for x in (peak, -peak):
        (cam,) = ask(SegEigenCAM(hand_net(), "features"), x, 0)
        close(cam, (peak[:, 0] > 0).double())


# Invariances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [EigenCAM, KPCACAM, EigenGradCAM, SegEigenCAM, EigenSmoothedCAM])
def test_a_batch_gives_the_maps_of_single_calls(method: Any, case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    together = ask(method(net, LAYERS), x, CLASSES)
    for n, c in enumerate(CLASSES):
        for cam, alone in zip(together, ask(method(net, LAYERS), x[n : n + 1], c), strict=True):
            close(cam[n], alone[0])


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (3, 40, 5, 6), (2, 30, 30), (2, 7, 3, 4, 2)])
def test_both_gram_matrices_give_the_component(shape: tuple[int, ...], device: torch.device) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    for n, found in enumerate(first_component(features)):
        expected = oracles.projected(features[n])
        close(found if (found * expected).sum() > 0 else -found, expected)
    in_float32 = first_component(features.float())
    assert in_float32.dtype == torch.float32
    for found, expected in zip(in_float32, first_component(features), strict=True):
        close(found if (found * expected).sum() > 0 else -found, expected.float(), 1e-5)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_the_scale_of_the_activation_does_not_matter(scale: float) -> None:
    x = image(2, 2)[:, :2]
    (expected,) = ask(EigenCAM(hand_net(), "features"), x)
    (cam,) = ask(EigenCAM(hand_net(), "features"), scale * x)
    close(cam, expected)


@pytest.mark.parametrize("method", [EigenCAM, KPCACAM, EigenGradCAM, SegEigenCAM, EigenSmoothedCAM])
@pytest.mark.parametrize("level", [0.0, 0.1, -1234.567, 1e20])
@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_activations_give_zeros(method: Any, level: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for normalized in (True, False):
        x = torch.full(shape, level, dtype=dtype)
        (cam,) = ask(method(hand_net().to(dtype), "features"), x, 0, normalized=normalized)
        assert cam.tolist() == torch.zeros(shape[0], *shape[2:]).tolist()


def test_one_channel_that_varies_is_the_component() -> None:
    x = values([[[1, 2], [3, 6]], [[0.1, 0.1], [0.1, 0.1]]])
    (cam,) = ask(EigenCAM(hand_net(), "features"), x, normalized=False)
    close(cam, [[[0, 0], [0, 3]]])
    for kernel in ("sigmoid", "rbf"):
        (cam,) = ask(KPCACAM(hand_net(), "features", kernel=kernel), x)
        assert cam.flatten().argmax() == 3


def test_class_agnostic_methods_ignore_the_class() -> None:
    net, x = split_net(2), image(2)
    for method in (EigenCAM, KPCACAM):
        (expected,) = ask(method(net, "first"), x)
        for asked in ({"class_idx": 1}, {"class_idx": [1, 2]}, {"targets": lambda y: y[0]}):
            (cam,) = ask(method(net, "first"), x, **asked)
            assert torch.equal(cam, expected)


def test_methods_without_weights_cannot_be_smoothed_by_a_component() -> None:
    with pytest.raises(NotImplementedError, match="EigenCAM does not define its weights"):
        ask(EigenSmoothedCAM(split_net(2), "first", base_method=EigenCAM), image(2), 0)


def test_arguments_of_kpca_cam() -> None:
    net = split_net(2)
    assert repr(KPCACAM(net, "first", gamma=0.5)) == "KPCACAM(target_layer=['first'], kernel=sigmoid, gamma=0.5)"
    with pytest.raises(ValueError, match="`kernel` must be 'sigmoid' or 'rbf', got 'linear'"):
        KPCACAM(net, "first", kernel="linear")
    for gamma in (-1.0, math.nan):
        with pytest.raises(ValueError, match="`gamma`"):
            KPCACAM(net, "first", gamma=gamma)
    assert count_hooks(net) == 0


# Deep feature factorisation -----------------------------------------------------------------------------------------


def factorize(net: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    with DeepFeatureFactorization(net, *args, **kwargs) as extractor, torch.inference_mode():
        net(x)
        return extractor()


def mixture(device: torch.device, channels: int = 24, positions: tuple[int, ...] = (5, 6), rank: int = 4) -> Tensor:
    """Non-negative activations of three images: a product of rank 4 and noise."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.rand(channels, rank, generator=generator, dtype=torch.float64) ** 3
    strengths = torch.rand(3, rank, *positions, generator=generator, dtype=torch.float64) ** 3
    noise = 0.05 * torch.rand(3, channels, *positions, generator=generator, dtype=torch.float64)
    return (torch.einsum("ck,nk...->nc...", concepts, strengths) + noise).to(device)


def error(x: Tensor, concepts: Tensor, maps: Tensor) -> float:
    return (x - torch.einsum("ck,nk...->nc...", concepts, maps)).norm().item()


def as_scikit_learn(x: Tensor, rank: int) -> float:
    reference = NMF(rank, init="random", random_state=0, max_iter=200, tol=0)
    reference.fit(x.transpose(0, 1).flatten(1).cpu().numpy())
    return float(reference.reconstruction_err_)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_factors_are_as_good_as_those_of_scikit_learn(rank: int, device: torch.device) -> None:
    x = mixture(device)
    concepts, maps, scores = factorize(hand_net(channels=24).to(device), x, "features", rank)
    assert (concepts.shape, maps.shape, scores) == ((24, rank), (3, rank, 5, 6), None)
    assert concepts.min() >= 0
    assert maps.min() >= 0
    close(maps.amax((0, 2, 3)), [1.0] * rank)
    shares = concepts.sum(0) * maps.sum((0, 2, 3))
    assert (shares.diff() <= 0).all()
    assert error(x, concepts, maps) <= 1.01 * as_scikit_learn(x, rank)


def test_more_factors_than_there_is_structure_are_as_good_too(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 7, 7, generator=generator, dtype=torch.float64).relu().to(device)
    for rank in (8, 16):
        concepts, maps, _ = factorize(hand_net(channels=64).to(device), x, "features", rank)
        assert error(x, concepts, maps) <= 1.02 * as_scikit_learn(x, rank)


def test_the_error_never_increases(device: torch.device) -> None:
    x = mixture(device)
    net = hand_net(channels=24).to(device)
    errors = []
    for rounds in (*range(1, 12), 50, 200):
        concepts, maps, _ = factorize(net, x, "features", 4, num_iterations=rounds)
        errors.append(error(x, concepts, maps))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.3 * errors[0]


def test_factors_depend_on_the_seed_alone(device: torch.device) -> None:
    x = mixture(device)
    net = hand_net(channels=24).to(device)
    first, second, other = (factorize(net, x, "features", 4, num_iterations=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.concepts, second.concepts)
    assert torch.equal(first.maps, second.maps)
    assert not torch.allclose(first.maps, other.maps)


def test_one_concept_by_hand() -> None:
    # Channel 0 is 2, channel 1 is 6 times (1, 0, 0.5, 0): a product of rank 1.
    strengths = torch.tensor([1.0, 0, 0.5, 0], dtype=torch.float64).reshape(1, 1, 2, 2)
    x = torch.tensor([2.0, 6], dtype=torch.float64).reshape(1, 2, 1, 1) * strengths
    head = nn.Linear(2, 3).double()
    concepts, maps, scores = factorize(hand_net(), x, "features", 1, head)
    close(concepts, [[2], [6]])
    close(maps, strengths)
    close(scores, head(torch.tensor([[2.0, 6]], dtype=torch.float64)))
    # Shifted to be positive, the factors are the same; the classifier sees activations, which are not shifted.
    shift = torch.tensor([0.5, 4], dtype=torch.float64).reshape(1, 2, 1, 1)
    concepts, maps, scores = factorize(hand_net(), x - shift, "features", 1, head)
    close(concepts, [[2], [6]])
    close(maps, strengths)
    close(scores, head(torch.tensor([[1.5, 2]], dtype=torch.float64)))


def test_the_factorisation_of_nothing_is_nothing() -> None:
    concepts, maps, _ = factorize(hand_net(), torch.zeros(2, 2, 3, 3, dtype=torch.float64), "features", 3)
    assert concepts.tolist() == [[0] * 3] * 2
    assert maps.tolist() == torch.zeros(2, 3, 3, 3).tolist()


def test_broken_images_do_not_spoil_the_others() -> None:
    x = mixture(torch.device("cpu"))
    net = hand_net(channels=24)
    x[1, 3, 2, 2] = torch.nan
    with pytest.warns(RuntimeWarning, match="'features' holds NaN"):
        _, maps, _ = factorize(net, x, "features", 4)
    assert maps[1].isnan().all()
    assert maps[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dim", [1, 3])
def test_other_dimensions_can_be_factorised(dim: int) -> None:
    positions = (30,) if dim == 1 else (2, 3, 5)
    x = mixture(torch.device("cpu"), positions=positions)
    _, maps, _ = factorize(hand_net(dim, channels=24), x, "features", 4)
    close(maps.flatten(2), factorize(hand_net(channels=24), x.reshape(3, 24, 5, 6), "features", 4).maps.flatten(2))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_factorisation_leaves_no_trace(situation: str, device: torch.device) -> None:
    model = Net().to(device).train()
    x = torch.rand(2, 3, 12, 12, device=device)
    extractor = DeepFeatureFactorization(model, "block1", 2, nn.Sequential(model.dropout, model.fc))
    with SITUATIONS[situation]():
        with pytest.raises(AssertionError, match="no forward pass"):
            extractor()
        model(x)
        before = Snapshot(model)
        first, second = extractor(), extractor()
        assert not any(tensor.requires_grad for tensor in first)
        for found, again in zip(first, second, strict=True):
            assert torch.equal(found, again)
        before.check(hooks=True)
        with raising(model.fc), pytest.raises(ZeroDivisionError):
            extractor()
        before.check(hooks=True)
    extractor.remove_hooks()
    assert count_hooks(model) == 0


def test_arguments_of_the_factorisation() -> None:
    net = split_net(2)
    for arguments, message in [
        ((["first", "second"],), "one layer is factorised, but `target_layer` lists 2"),
        (("first", 0), "`n_components` must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DeepFeatureFactorization(net, *arguments)
    with pytest.raises(TypeError, match="`classifier` must be callable or None, got 'fc'"):
        DeepFeatureFactorization(net, "first", 3, "fc")
    assert count_hooks(net) == 0
    assert repr(DeepFeatureFactorization(net, "first", 3)) == (
        "DeepFeatureFactorization(target_layer=['first'], n_components=3)"
    )


def test_cost_is_one_forward_pass() -> None:
    net, x = split_net(2), image(2)
    passes = []
    net.register_forward_pre_hook(lambda _net, args: passes.append(len(args[0])))
    ask(EigenSmoothedCAM(net, "second", base_method=LayerCAM), x, 0)
    ask(EigenSmoothedCAM(net, "second", base_method=GradCAM), x, 0)
    factorize(net, x, "second", 2)
    assert passes == [2, 2, 2]
