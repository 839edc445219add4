"""Extractors that run another extractor on many inputs: AugmentedCAM and SESS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from methods_under_test import make_input, make_model
from models import HandNet, SplitNet, image, split_net
from test_methods_numbers import CLASSES, ask, class_scores, close, halves
from test_promises import count_hooks
from torch import Tensor, nn

from torchcam.methods import (
    CAM,
    SESS,
    AugmentedCAM,
    EigenCAM,
    EigenSmoothedCAM,
    FinerCAM,
    GradCAM,
    LayerCAM,
    RefineCAM,
    ScoreCAM,
    SmoothGradCAMpp,
)
from torchcam.targets import ClassLogit

LAYERS = list(SplitNet.layers)


def same(tensor: Tensor) -> Tensor:
    return tensor


def flip(tensor: Tensor) -> Tensor:
    return tensor.flip(-1)


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[SplitNet, Tensor]:
    """A net and a batch of three inputs, in float64."""
    return split_net(request.param).to(device), image(request.param, len(CLASSES)).to(device)


# AugmentedCAM -------------------------------------------------------------------------------------------------------


def test_augmented_cam_agrees_with_the_oracle(case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    raw = ask(AugmentedCAM(net, LAYERS), x, CLASSES, normalized=False)
    scaled = ask(AugmentedCAM(net, LAYERS), x, CLASSES)
    for layer, cam, other in zip(LAYERS, raw, scaled, strict=True):
        body, head = halves(net, layer)
        expected = oracles.augmented(
            x, class_scores(CLASSES), lambda batch, scores, b=body, h=head: oracles.grad_cam(batch, b, h, scores)
        )
        assert expected.amax() > 0.3
        close(cam, expected)
        close(other, oracles.normalized(expected))


@pytest.mark.parametrize(
    ("method", "options", "asked"),
    [
        (GradCAM, {}, {"class_idx": CLASSES}),
        (GradCAM, {}, {"targets": [lambda y: y[0] * y[1], lambda y: y[2], lambda y: -y[3]]}),
        (LayerCAM, {}, {"class_idx": CLASSES}),
        (EigenCAM, {}, {}),
        (EigenCAM, {}, {"class_idx": 0}),
        (ScoreCAM, {}, {"class_idx": CLASSES}),
        (SmoothGradCAMpp, {"num_samples": 2}, {"class_idx": CLASSES}),
    ],
)
def test_without_a_transform_the_map_is_that_of_the_base_method(
    method: Any, options: dict[str, Any], asked: dict[str, Any], case: tuple[SplitNet, Tensor]
) -> None:
    net, x = case
    extractor = AugmentedCAM(net, LAYERS, base_method=method, transforms=[(same, same)], **options)
    expected = ask(method(net, LAYERS, **options), x, **asked)
    for cam, other in zip(ask(extractor, x, **asked), expected, strict=True):
        close(cam, other)


def test_the_classifier_weights_can_be_augmented() -> None:
    """CAM takes classes, not targets: each transformed row must be asked for its sample's class."""
    net, x = split_net(2, nonlinear_head=False), image(2, 3)
    extractor = AugmentedCAM(net, "second", base_method=CAM, fc_layer="fc", batch_size=2)
    (cam,) = ask(extractor, x, CLASSES, normalized=False)
    expected = oracles.augmented(
        x,
        class_scores(CLASSES),
        lambda batch, _scores: oracles.cam(batch, halves(net, "second")[0], net.fc.weight, CLASSES),
    )
    close(cam, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_the_batch_size_changes_no_augmented_map(batch_size: int) -> None:
    net, x = split_net(2), image(2, 3)
    passes: list[int] = []
    with AugmentedCAM(net, LAYERS, batch_size=batch_size) as extractor:
        scores = net(x)
        net.register_forward_pre_hook(lambda _net, args: passes.append(len(args[0])))
        cams = extractor(CLASSES, scores)
    assert (sum(passes), max(passes)) == (18 + 1, min(batch_size, 18))  # and the first sample as it is
    for cam, expected in zip(cams, ask(AugmentedCAM(net, LAYERS), x, CLASSES), strict=True):
        close(cam, expected)


def test_maps_are_transformed_back() -> None:
    # The map of HandNet's input a is relu(a_0 + a_1), scaled.
    net = HandNet(lambda a: a.flatten(2).sum(2)[:, :1] + a.flatten(2).sum(2)[:, 1:])
    x = torch.zeros(1, 2, 1, 4)
    x[0, 0, 0, 0] = 1
    for transforms, expected in [
        ([(same, same), (flip, flip)], [1, 0, 0, 0]),
        ([(same, same), (flip, same)], [0.5, 0, 0, 0.5]),
        ([(same, same), (same, same), (same, same), (same, flip)], [0.75, 0, 0, 0.25]),
    ]:
        (cam,) = ask(AugmentedCAM(net, "features", transforms=transforms), x, 0, normalized=False)
        assert cam.tolist() == [[expected]]


def test_by_default_a_flip_of_the_input_flips_the_map(case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    cams = ask(AugmentedCAM(net, LAYERS), x, CLASSES)
    flipped = ask(AugmentedCAM(net, LAYERS), flip(x), CLASSES)
    for cam, other, alone in zip(cams, flipped, ask(GradCAM(net, LAYERS), x, CLASSES), strict=True):
        close(flip(other), cam)
        assert not torch.allclose(cam, alone, atol=1e-3)


# SESS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("theta", "dropped"), [(0.0, 0.0), (0.2, 0.5)])
def test_sess_agrees_with_the_oracle(pool: str, theta: float, dropped: float, case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    scales = 3 if x.ndim < 5 else 2
    window = 5 if x.ndim == 5 else 8
    options = {"scales": scales, "window_size": window, "theta": theta, "pre_filter_ratio": dropped, "pool": pool}
    found = ask(SESS(net, LAYERS, smooth=False, batch_size=7, **options), x, CLASSES, normalized=False)
    for layer, cam in zip(LAYERS, found, strict=True):
        body, head = halves(net, layer)
        expected = oracles.sess(
            x,
            net,
            lambda batch, scores, b=body, h=head: oracles.grad_cam(batch, b, h, scores),
            CLASSES,
            window,
            scales,
            theta,
            dropped,
            pool,
        )
        assert expected.amax() > 0.3
        close(cam, expected)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_result_is_smoothed(dim: int) -> None:
    net, x = split_net(dim), image(dim, 3)
    options = {"scales": 1, "window_size": 9}
    plain = ask(SESS(net, LAYERS, smooth=False, **options), x, CLASSES, normalized=False)
    smooth = ask(SESS(net, LAYERS, **options), x, CLASSES, normalized=False)
    for before, after in zip(plain, smooth, strict=True):
        close(after, torch.stack([oracles.blurred(map_, 11, 5.0) for map_ in before]))


def test_one_window_gives_the_upsampled_map_of_the_base_method(device: torch.device) -> None:
    net, x = split_net(2).to(device), image(2, 3)[..., :9].to(device)
    cams = ask(SESS(net, LAYERS, scales=1, window_size=9, smooth=False), x, CLASSES, normalized=False)
    for cam, expected in zip(cams, ask(GradCAM(net, LAYERS), x, CLASSES), strict=True):
        close(cam, torch.stack([oracles.upsampled(map_, (9, 9)) for map_ in expected]))


def test_sess_by_hand() -> None:
    # The map of HandNet's input is relu(a_0). An input of two positions and windows of two: at the first scale one
    # window, the input; at the second, 2 * 9/7 = 2.57, so 3 positions: (1, 3/4... ) read at -1/6, 1/2 and 7/6.
    net = HandNet(lambda a: torch.stack([a[:, 0].sum(1), torch.zeros(len(a))], 1), channels=1, dim=1)
    x = torch.tensor([[[3.0, 0.0]]])
    large = [3.0, 1.5, 0.0]
    windows = [[3.0, 0.0], large[:2], large[1:]]
    probabilities = [1 / (1 + math.exp(-sum(window))) for window in windows]
    weights = [p / max(probabilities) for p in probabilities]
    # Each map scales to (1, 0). In an enlarged input that is (1, 0, 0) or (0, 1, 0), read at 1/4 and 7/4.
    maps = [[weights[0], 0], [0.75 * weights[1], 0], [0.25 * weights[2], 0.25 * weights[2]]]
    for pool, expected in [
        ("max", [max(column) for column in zip(*maps, strict=True)]),
        ("mean", [sum(map_[0] for map_ in maps) / 3, maps[2][1]]),
    ]:
        options = {"scales": 2, "window_size": 2, "smooth": False, "pool": pool}
        (cam,) = ask(SESS(net, "features", **options), x, 0, normalized=False)
        close(cam, [expected], 1e-6)


def test_windows_of_equal_scores_count_alike() -> None:
    """Targets are no probabilities; where none is above 0, no window is preferred."""
    net, x = split_net(2), image(2, 2)
    options = {"scales": 2, "window_size": 9, "batch_size": 100}
    (below,) = ask(SESS(net, "first", **options), x, targets=lambda y: y[0] - 1e6)
    (equal,) = ask(SESS(net, "first", **options), x, targets=lambda y: y[0] + 1e9)
    torch.testing.assert_close(below, equal, rtol=1e-5, atol=1e-5)
    (above,) = ask(SESS(net, "first", **options), x, targets=lambda y: y[0] ** 2)
    assert not torch.allclose(above, equal, atol=1e-3)


def test_a_single_score_is_read_as_a_binary_classifier() -> None:
    net = HandNet(lambda a: a[:, 0].sum(1), channels=1, dim=1)
    two = HandNet(lambda a: torch.stack([a[:, 0].sum(1), torch.zeros(len(a))], 1), channels=1, dim=1)
    x = torch.tensor([[[3.0, 0, 1, -1]], [[-1.0, 2, 0, 0]]])
    options = {"scales": 3, "window_size": 3}
    (cam,) = ask(SESS(net, "features", **options), x, 0)
    (expected,) = ask(SESS(two, "features", **options), x, 0)
    torch.testing.assert_close(cam, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("dropped", [0.0, 0.6])
def test_the_batch_size_changes_no_map_of_windows(batch_size: int, dropped: float) -> None:
    net, x = split_net(2), image(2, 3)
    options = {"scales": 3, "window_size": 8, "pre_filter_ratio": dropped}
    passes: list[int] = []
    with SESS(net, LAYERS, batch_size=batch_size, **options) as extractor:
        scores = net(x)
        net.register_forward_pre_hook(lambda _net, args: passes.append(tuple(args[0].shape)))
        cams = extractor(CLASSES, scores)
    # 9 x 11 is enlarged to 8 x 10, 10 x 12 and 13 x 16: 1 x 2, 2 x 2 and 2 x 2 windows.
    windows = 2 + 4 + 4
    kept = windows - int(dropped * windows)
    assert sum(shape[0] for shape in passes) == 3 * (windows + kept) + 1  # the first sample as it is
    assert max(shape[0] for shape in passes) <= batch_size
    assert {shape[1:] for shape in passes} == {(3, 8, 8), x.shape[1:]}
    for cam, expected in zip(cams, ask(SESS(net, LAYERS, **options), x, CLASSES), strict=True):
        close(cam, expected)


def test_twelve_scales_make_122_windows() -> None:
    from torchcam.methods.augmented import _Windows

    windows = _Windows(torch.zeros(1, 1, 100, 100), 224, 12)
    assert len(windows) == 122
    assert windows.sizes[:, 0].unique().tolist() == [224 + 64 * i for i in range(12)]
    for (row, column), (height, width) in zip(windows.corners.tolist(), windows.sizes.tolist(), strict=True):
        assert 0 <= row <= height - 224
        assert 0 <= column <= width - 224


def test_the_windows_of_an_image_as_large_as_they_are_cut_it_out() -> None:
    from torchcam.methods.augmented import _Windows

    x = image(2, 2)  # 9 x 11
    windows = _Windows(x, 9, 1)
    assert windows.corners.tolist() == [[0, 0], [0, 2]]
    for number, part in enumerate([x[..., :9], x[..., 2:]]):
        close(windows.cut(x, torch.full((2,), number)), part)
        ones = windows.paste(torch.ones(2, 4, 4, dtype=torch.float64), torch.full((2,), number))
        assert ones.sum((1, 2)).tolist() == [81, 81]
        assert ones[0, 0, 0 if number == 0 else -1] == 1


# Both ---------------------------------------------------------------------------------------------------------------

MAKE = {
    "AugmentedCAM": AugmentedCAM,
    "SESS": lambda net, layers: SESS(net, layers, scales=2, window_size=7 if isinstance(net, SplitNet) else 4),
    "EigenSmoothedCAM": EigenSmoothedCAM,
}
every_method = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@every_method
def test_a_batch_gives_the_maps_of_single_calls(make: Any, case: tuple[SplitNet, Tensor]) -> None:
    net, x = case
    together = ask(make(net, LAYERS), x, CLASSES)
    for n, c in enumerate(CLASSES):
        for cam, alone in zip(together, ask(make(net, LAYERS), x[n : n + 1], c), strict=True):
            close(cam[n], alone[0])


@every_method
def test_a_target_gives_the_map_of_its_class(make: Any) -> None:
    net, x = split_net(2), image(2, 2)
    cams = ask(make(net, LAYERS), x, [3, 1])
    others = ask(make(net, LAYERS), x, targets=[ClassLogit(3), ClassLogit(1)])
    for cam, other in zip(cams, others, strict=True):
        assert torch.allclose(cam, other) == (make is not MAKE["SESS"])  # which weighs windows by their probability


@every_method
def test_several_classes_at_once(make: Any) -> None:
    net, x = split_net(2), image(2, 2)
    together = ask(make(net, LAYERS), x, [[0, 1, 2], [3, 4, 0]])
    for k, classes in enumerate([[0, 3], [1, 4], [2, 0]]):
        for cam, alone in zip(together, ask(make(net, LAYERS), x, classes), strict=True):
            close(cam[:, k], alone)


@every_method
def test_evidence_against_a_class(make: Any) -> None:
    net, x = split_net(2), image(2, 2)
    against = ask(make(net, LAYERS), x, 1, relu="negative")
    plain = ask(make(net, LAYERS), x, 1)
    for cam, other in zip(against, plain, strict=True):
        assert cam.amin() >= 0
        assert cam.amax() == 1
        assert (cam - other).abs().amax() > 0.2
    if make is AugmentedCAM:
        for cam, other in zip(against, ask(make(net, LAYERS), x, targets=lambda y: -y[1]), strict=True):
            close(cam, other)


@every_method
def test_maps_are_fused_as_those_of_the_base_method(make: Any) -> None:
    net, x = split_net(2), image(2, 2)
    extractor = make(net, LAYERS)
    cams = ask(extractor, x, 0)
    close(extractor.fuse_cams(cams), GradCAM.fuse_cams(cams))
    assert extractor.fuse_cams(cams, (5, 4)).shape == (2, 5, 4)


def test_constant_maps_stay_empty() -> None:
    net = HandNet(lambda a: a.flatten(2).sum(2))
    for make, level in itertools.product(MAKE.values(), (0.0, 1.0)):
        (cam,) = ask(make(net, "features"), torch.full((2, 2, 6, 6), level), 0)
        assert cam.abs().amax() == 0


def test_arguments() -> None:
    net = split_net(2)

    def refused(error: type[Exception], message: str, method: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            method(net, "first", **options)
        assert count_hooks(net) == 0

    for method in (AugmentedCAM, SESS, EigenSmoothedCAM):
        refused(
            TypeError,
            "`base_method` must be a CAM method such as GradCAM, got 'GradCAM'",
            method,
            base_method="GradCAM",
        )
        refused(TypeError, "no_such_option", method, no_such_option=1)
    refused(ValueError, "`transforms` is empty", AugmentedCAM, transforms=[])
    for transforms in ([same], [(same,)], [(same, None)]):
        refused(TypeError, "`transforms` must be pairs of functions", AugmentedCAM, transforms=transforms)
    for method in (AugmentedCAM, SESS):
        refused(ValueError, "`batch_size` must be at least 1, got 0", method, batch_size=0)
    refused(ValueError, "`pool` must be 'mean' or 'max', got 'sum'", SESS, pool="sum")
    refused(ValueError, "`scales` must be at least 1, got 0", SESS, scales=0)
    refused(ValueError, "`window_size` must be at least 1, got 0", SESS, window_size=0)
    refused(ValueError, "`theta` must be a finite number, 0 or more, got -1", SESS, theta=-1)
    for ratio in (-0.1, 1.0, math.nan):
        refused(ValueError, r"`pre_filter_ratio` must be in \[0, 1\)", SESS, pre_filter_ratio=ratio)

    cropped: Sequence[Any] = [(lambda x: x[..., 1:], same)]
    with pytest.raises(ValueError, match="`transforms` must keep the input's shape"):
        ask(AugmentedCAM(net, "first", transforms=cropped), image(2), 0)


def test_representations() -> None:
    net = split_net(2)
    assert repr(AugmentedCAM(net, "first")) == "AugmentedCAM(base_method=GradCAM, target_layer=['first'])"
    assert repr(SESS(net, "first", base_method=LayerCAM, scales=3)) == (
        "SESS(base_method=LayerCAM, target_layer=['first'], scales=3, window_size=224, pool=mean)"
    )
    assert repr(EigenSmoothedCAM(net, LAYERS)) == (
        "EigenSmoothedCAM(base_method=GradCAM, target_layer=['first', 'second'])"
    )


# Wrappers of wrappers


NESTED: dict[str, Callable[[nn.Module], Any]] = {
    "AugmentedCAM of EigenSmoothedCAM": lambda model: AugmentedCAM(model, "block2", base_method=EigenSmoothedCAM),
    "AugmentedCAM of EigenSmoothedCAM of LayerCAM": lambda model: AugmentedCAM(
        model, "block2", base_method=partial(EigenSmoothedCAM, base_method=LayerCAM)
    ),
    "EigenSmoothedCAM of FinerCAM": lambda model: EigenSmoothedCAM(model, "block2", base_method=FinerCAM),
    "FinerCAM of AugmentedCAM": lambda model: FinerCAM(model, "block2", base_method=AugmentedCAM),
    "RefineCAM of AugmentedCAM": lambda model: RefineCAM(model, ["block1", "block2"], base_method=AugmentedCAM),
    "SESS of RefineCAM": lambda model: SESS(
        model, ["block1", "block2"], base_method=RefineCAM, scales=1, window_size=12
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_wrappers_compose(name: str, device: torch.device) -> None:
    """A batch gives what its samples give alone, and with nothing to augment the mean is the base method's map."""
    model, x = make_model("GradCAM", device), make_input(device)
    with NESTED[name](model) as extractor, torch.no_grad():
        model(x)
        (together,) = extractor([0, 2])
        alone = []
        for n, class_idx in enumerate([0, 2]):
            model(x[n : n + 1])
            alone.append(extractor(class_idx)[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together.amax() == 1


def test_augmenting_by_nothing_gives_the_nested_method(device: torch.device) -> None:
    model, x = make_model("GradCAM", device), make_input(device)
    nothing = [(torch.clone, torch.clone)]
    with (
        AugmentedCAM(model, "block2", base_method=EigenSmoothedCAM, transforms=nothing) as augmented,
        EigenSmoothedCAM(model, "block2") as plain,
        torch.no_grad(),
    ):
        model(x)
        torch.testing.assert_close(augmented([0, 2])[0], plain([0, 2])[0], rtol=1e-5, atol=1e-6)


def test_a_method_that_a_user_wrote_for_torchcam(device: torch.device) -> None:
    class Own(GradCAM):
        def _get_weights(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[Tensor]:
            self._backprop(scores, class_idx, **kwargs)
            return [gradient.flatten(2).mean(-1) for gradient in self.hook_g if gradient is not None]

    model, x = make_model("GradCAM", device), make_input(device)
    for own, ours in ((Own, GradCAM), (partial(EigenSmoothedCAM, base_method=Own), EigenSmoothedCAM)):
        with own(model, "block2") as extractor, ours(model, "block2") as expected, torch.no_grad():
            scores = model(x)
            torch.testing.assert_close(
                extractor([0, 2], scores, retain_graph=True), expected([0, 2], scores), rtol=1e-6, atol=1e-7
            )
            scores = model(x)
            asked = {"relu": "negative", "normalized": False}
            torch.testing.assert_close(
                extractor([0, 2], scores, retain_graph=True, **asked),
                expected([0, 2], scores, **asked),
                rtol=1e-6,
                atol=1e-7,
            )
