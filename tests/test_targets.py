"""What is explained: the ready-made targets, several classes at once, signed maps, maps in a training loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods_under_test import METHODS, make_input, make_model
from tests.models import HandNet, split_net
from tests.test_promises import CLASS_AGNOSTIC, KEEPS_A_GRAPH, count_hooks
from torchcam import methods, targets
from torchcam.metrics import ClassificationMetric
from torchcam.targets import read_logits

# The activation is the input: two channels of one row of two positions, with the means 2 and 1.
ACTIVATION = [[4.0, 0.0], [0.0, 2.0]]
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # logits (2, 1, 1)
E = math.e

Activation = list[list[float]]


def logits(features: Tensor) -> Tensor:
    return features.mean((2, 3)) @ WEIGHT.T


def single(features: Tensor) -> Tensor:
    return features.mean((2, 3)) @ WEIGHT[2]


def embedding(features: Tensor) -> dict[str, Tensor]:
    return {"image_embeds": features.mean((2, 3)), "logits": logits(features)}


def dense(features: Tensor) -> dict[str, Tensor]:
    return {"out": features * features.new_tensor([1, 3]).reshape(2, 1, 1), "aux": features}


def detections(features: Tensor) -> list[dict[str, Tensor]]:
    boxes = features.new_tensor([[0, 0, 2, 2], [0, 0, 2, 3], [5, 5, 9, 9]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.cat([means, means[:1]])}
        for means in features.mean((2, 3))
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def probability(a: Activation) -> float:
    y0, y1 = mean(a[0]), mean(a[1])
    return math.exp(y0) / (math.exp(y0) + math.exp(y1) + math.exp(y0 - y1))


def cosine(a: Activation) -> float:
    x, y = mean(a[0]), mean(a[1])
    return x / math.hypot(x, y)


@dataclass
class Case:
    """A target, the score it gives an activation, and the signed Grad-CAM of the activation above."""

    head: Callable[[Tensor], Any]
    target: Callable[[Any], Tensor]
    score: Callable[[Activation], float]
    grad_cam: tuple[float, float]


P0, P1 = E / (E + 2), 1 / (E + 2)
CASES = {
    "ClassLogit": Case(logits, targets.ClassLogit(2), lambda a: mean(a[0]) - mean(a[1]), (2, -1)),
    "ClassLogit, dense": Case(dense, targets.ClassLogit(1), lambda a: 3 * sum(a[1]), (0, 6)),
    "ClassProbability": Case(logits, targets.ClassProbability(0), probability, (2 * P0 * P1, 0)),
    "ReST": Case(logits, targets.ReST(0), lambda a: mean(a[0]) + math.log(probability(a)), (2 * (2 - P0 - P1), 0)),
    "BinaryLogit": Case(single, targets.BinaryLogit(), lambda a: mean(a[0]) - mean(a[1]), (2, -1)),
    "BinaryLogit, negative": Case(
        single, targets.BinaryLogit(positive=False), lambda a: mean(a[1]) - mean(a[0]), (-2, 1)
    ),
    "RawScore": Case(single, targets.RawScore(), lambda a: mean(a[0]) - mean(a[1]), (2, -1)),
    "Contrast": Case(
        logits,
        targets.Contrast(0, [1, 2], 0.5),
        lambda a: mean(a[0]) - 0.25 * (mean(a[1]) + mean(a[0]) - mean(a[1])),
        (1.5, 0),
    ),
    "Segmentation": Case(dense, targets.Segmentation(1), lambda a: 3 * sum(a[1]), (0, 6)),
    "Segmentation, mask": Case(
        dense, targets.Segmentation(0, torch.tensor([[True, False]])), lambda a: a[0][0], (2, 0)
    ),
    "Segmentation, weights": Case(
        dense, targets.Segmentation(1, torch.tensor([[0.25, 0.5]])), lambda a: 0.75 * a[1][0] + 1.5 * a[1][1], (0, 2.25)
    ),
    # The first box fits the wanted one to 4/6, the second has the wrong label.
    "BoxScores": Case(detections, targets.BoxScores([1], [[0, 0, 2, 3]]), lambda a: 2 / 3 + mean(a[0]), (2, 0)),
    "BoxScores, two": Case(
        detections,
        targets.BoxScores(torch.tensor([1, 2]), torch.tensor([[0, 0, 2, 3], [0, 0, 2, 3]])),
        lambda a: 2 / 3 + mean(a[0]) + 1 + mean(a[1]),
        (2, 1),
    ),
    "BoxScores, one missed": Case(
        detections,
        targets.BoxScores([2, 1], [[0, 0, 2, 3], [1, 1, 3, 3]]),
        lambda a: 1 + mean(a[1]),
        (0, 1),
    ),
    "Similarity": Case(embedding, targets.Similarity(torch.tensor([3.0, 0.0])), cosine, (0.4 / 5**0.5, -0.4 / 5**0.5)),
    "Difference": Case(
        embedding, targets.Difference(torch.tensor([3.0, 0.0])), lambda a: 1 - cosine(a), (-0.4 / 5**0.5, 0.4 / 5**0.5)
    ),
    "a function": Case(logits, lambda y: y[0] * y[1], lambda a: mean(a[0]) * mean(a[1]), (2, 2)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def hand_net(head: Callable[[Tensor], Any]) -> HandNet:
    return HandNet(head).double().eval()


def example(*activations: Activation) -> Tensor:
    return torch.tensor(activations or [ACTIVATION], dtype=torch.float64).unsqueeze(2)


@every_case
def test_the_score(case: Case) -> None:
    other = [[1.0, 3.0], [0.5, 1.0]]
    with torch.no_grad():
        output = hand_net(case.head)(example(ACTIVATION, other))
    for row, activation in enumerate([ACTIVATION, other]):
        score = case.target(targets.sample_of(output, row, 2))
        assert score.shape == ()
        assert score.item() == pytest.approx(case.score(activation), rel=1e-6)


@every_case
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_in_a_gradient_method(case: Case, mode: Callable[[], Any]) -> None:
    model = hand_net(case.head)
    with methods.GradCAM(model, "features") as extractor, mode():
        output = model(example())
        (cam,) = extractor(scores=output, targets=case.target, relu=False, normalized=False, retain_graph=True)
        torch.testing.assert_close(cam, torch.tensor([[case.grad_cam]], dtype=torch.float64))
        (against,) = extractor(targets=[case.target], relu="negative", normalized=False)
        torch.testing.assert_close(against, torch.tensor([[case.grad_cam]], dtype=torch.float64).neg().relu())


@every_case
def test_in_a_method_that_masks_the_input(case: Case) -> None:
    model = hand_net(case.head)
    with methods.ScoreCAM(model, "features") as extractor, torch.no_grad():
        model(example())
        (cam,) = extractor(targets=case.target, normalized=False)
    # The mask of a channel keeps the one position where it is active, and with it that channel.
    first, second = case.score([[4, 0], [0, 0]]), case.score([[0, 0], [0, 2]])
    weight = 1 / (1 + math.exp(second - first))
    torch.testing.assert_close(cam, torch.tensor([[[4 * weight, 2 * (1 - weight)]]], dtype=torch.float64))


class Fixed:
    """An extractor that always gives the same map."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [torch.tensor([[[1.0, 0.5]]])]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]


@every_case
def test_in_a_metric(case: Case) -> None:
    metric = ClassificationMetric(Fixed(hand_net(case.head)))
    metric.update(example(), targets=case.target)
    full, masked = case.score(ACTIVATION), case.score([[4, 0], [0, 1]])
    rest = case.score([[0, 0], [0, 1]])
    found = {key: float(value) for key, value in metric.compute().items()}
    assert found["avg_drop"] == pytest.approx(max(full - masked, 0) / abs(full), abs=1e-6)
    assert found["conf_increase"] == (masked > full + 1e-9)
    assert found["deletion_drop"] == pytest.approx(max(full - rest, 0) / abs(full), abs=1e-6)


def test_a_box_that_nothing_fits_is_no_evidence() -> None:
    model = hand_net(detections)
    for target in (targets.BoxScores([1], [[20, 20, 30, 30]]), targets.BoxScores([7], [[0, 0, 2, 2]])):
        with methods.GradCAM(model, "features") as extractor:
            (cam,) = extractor(scores=model(example()), targets=target, normalized=False)
        assert not cam.any()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    assert targets.BoxScores([1], [[0, 0, 2, 2]])(empty) == 0


@pytest.mark.parametrize(
    ("target", "head", "message"),
    [
        (targets.ClassLogit(3), logits, r"`class_idx` must lie between 0 and 2, got 3"),
        (targets.ClassProbability(-1), logits, r"`class_idx` must lie between 0 and 2, got -1"),
        (targets.RawScore(), logits, r"has 3 scores for each sample"),
        (targets.BinaryLogit(), logits, r"has 3 scores for each sample"),
        (targets.Segmentation(0, torch.ones(2, 2)), dense, r"`mask` has shape \(2, 2\), .* have \(1, 2\)"),
        (targets.Similarity(torch.ones(3)), embedding, r"`embedding` has 3 dimensions, but the model's has 2"),
        (lambda y: y, logits, r"`targets` must return one scalar tensor per sample, got \(3,\)"),
        (lambda y: 1.0, logits, r"`targets` must return one scalar tensor per sample, got float"),
        ([[targets.ClassLogit(0)], [targets.ClassLogit(0)]], logits, "got 2 for a batch of 1"),
        ([targets.ClassLogit(0)] * 2, logits, "got 2 for a batch of 1"),
    ],
)
def test_errors_of_targets(target: Any, head: Callable[[Tensor], Any], message: str) -> None:
    model = hand_net(head)
    for method in (methods.GradCAM, methods.ScoreCAM):
        with method(model, "features") as extractor, pytest.raises(ValueError, match=message):
            extractor(scores=model(example()), targets=target)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("kind", "class_idx", "target", "message"),
    [
        (TypeError, None, [3], "`targets` must be callable, got 3"),
        (TypeError, None, [[3]], "`targets` must be callable, got 3"),
        (ValueError, 0, targets.ClassLogit(0), "exactly one of class_idx or targets, got both"),
        (ValueError, None, None, "exactly one of class_idx or targets, got neither"),
        (TypeError, True, None, "got True of type bool"),
        (TypeError, [[0, True]], None, "got True of type bool"),
        (TypeError, torch.tensor([[0.5]]), None, "must hold integers, got a tensor of torch.float32"),
        (TypeError, "0", None, "must be an integer, got '0'"),
        (ValueError, [[0, 3]], None, "must lie between 0 and 2"),
        (ValueError, [[0, -1]], None, "must lie between 0 and 2"),
        (ValueError, torch.tensor([[0, 5]]), None, "must lie between 0 and 2"),
        (ValueError, [[0], [1]], None, r"got shape \(2, 1\) for a batch of 1"),
        (ValueError, torch.zeros(1, 1, 1, dtype=torch.long), None, "one per sample"),
    ],
)
def test_errors_of_choices(kind: type[Exception], class_idx: Any, target: Any, message: str) -> None:
    model = hand_net(logits)
    with methods.GradCAM(model, "features") as extractor, pytest.raises(kind, match=message):
        extractor(class_idx, model(example()), targets=target)


def test_as_many_for_each_sample() -> None:
    model = hand_net(logits)
    with methods.GradCAM(model, "features") as extractor:
        scores = model(example(ACTIVATION, ACTIVATION))
        with pytest.raises(ValueError, match="`class_idx` must name as many for each sample"):
            extractor([[0, 1], [2]], scores)
        with pytest.raises(ValueError, match="`targets` must name as many for each sample"):
            extractor(scores=scores, targets=[[targets.ClassLogit(0)], targets.ClassLogit(0)])


def test_reading_the_logits() -> None:
    a, b, whole = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    assert read_logits(a) is a
    assert read_logits((whole, a, b)) is a
    assert read_logits({"loss": b, "logits": a}) is a
    assert read_logits({"logits_per_image": a, "logits_per_text": b}) is a
    assert read_logits({"aux": b, "out": a}) is a
    assert read_logits({"anything": whole, "else": [b]}) is b
    with pytest.raises(TypeError, match="no class scores found in an output of type dict"):
        read_logits({"labels": whole})


# Several classes at once.

CLASSES = [[0, 2], [1, 0]]
explains_classes = pytest.mark.parametrize("name", METHODS)


@explains_classes
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_several_classes_are_as_many_calls(name: str, mode: Callable[[], Any], device: torch.device) -> None:
    model, x = make_model(name, device), make_input(device)
    options = {"retain_graph": True} if name in KEEPS_A_GRAPH else {}
    with METHODS[name](model) as extractor, mode():
        model(x)
        alone = [extractor(column, **options) for column in ([0, 1], [2, 0])]
        several = [extractor(CLASSES, **options), extractor(torch.tensor(CLASSES), **options)]
        if name not in CLASS_AGNOSTIC | {"CAM", "FinerCAM", "FinerCAM-ScoreCAM", "SESS"}:
            wanted = [[targets.ClassLogit(c) for c in row] for row in CLASSES]
            several.append(extractor(targets=wanted))
    for maps in several:
        assert len(maps) == len(alone[0])
        for layer, found in enumerate(maps):
            expected = torch.stack([cams[layer] for cams in alone], 1)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            if name not in CLASS_AGNOSTIC:
                assert not torch.equal(found[:, 0], found[:, 1]), "the same map for any class proves little"


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "HiResCAM"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_five_classes_take_one_forward_and_one_backward_pass(
    name: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = split_net()
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forwards: list[int] = []
    backwards: list[int] = []
    through_the_head: list[int] = []
    real = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        backwards.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    extractor = getattr(methods, name)(model, ["first", "second"])
    model.fc.register_forward_hook(
        lambda _m, _a, out: out.grad_fn.register_prehook(lambda _g: through_the_head.append(1)) and None
    )
    with extractor, mode():
        model(x)
        maps = extractor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
        assert [cam.shape for cam in maps] == [(2, 5, 9, 11), (2, 5, 5, 6)]
        assert [len(gradient) for gradient in extractor.hook_g] == [10, 10]
    assert (len(forwards), len(backwards), len(through_the_head)) == (1, 1, 1)


# Evidence for, against, and both.


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "HiResCAM"])
def test_signed_maps(name: str) -> None:
    model = split_net()
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with getattr(methods, name)(model, ["first", "second"]) as extractor:
        scores = model(x)
        raw = extractor(1, scores, normalized=False, relu=False, retain_graph=True)
        for cam, weight, activation in zip(
            raw, extractor._get_weights(1, scores, retain_graph=True), extractor.hook_a, strict=True
        ):
            weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
            torch.testing.assert_close(cam, (weight * activation).sum(1))
        assert any((cam < 0).any() and (cam > 0).any() for cam in raw)
        signed = extractor(1, scores, relu=False, retain_graph=True)
        for found, cam in zip(signed, raw, strict=True):
            torch.testing.assert_close(found, cam / cam.abs().amax((1, 2), keepdim=True))
            assert found.abs().amax((1, 2)).tolist() == pytest.approx([1, 1])
        for found, cam in zip(extractor(1, scores, normalized=False, retain_graph=True), raw, strict=True):
            torch.testing.assert_close(found, cam.relu())
        explicit = extractor(1, scores, relu=True, retain_graph=True)
        for found, plain in zip(explicit, extractor(1, scores), strict=True):
            assert torch.equal(found, plain)


def test_evidence_against_is_the_negative_of_grad_cam() -> None:
    model = split_net()
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for class_idx in (1, [0, 2], [[0, 2], [1, 3]]):
        with methods.GradCAM(model, ["first", "second"]) as extractor:
            scores = model(x)
            raw = extractor(class_idx, scores, normalized=False, relu=False, retain_graph=True)
            against = extractor(class_idx, scores, normalized=False, relu="negative")
        for found, cam in zip(against, raw, strict=True):
            torch.testing.assert_close(found, cam.neg().relu())
            assert found.any()


def test_evidence_against_in_a_method_that_masks_the_input() -> None:
    model = hand_net(logits)
    with methods.ScoreCAM(model, "features") as extractor, torch.no_grad():
        model(example())
        (against,) = extractor(2, relu="negative", normalized=False)
        (negative,) = extractor(targets=lambda y: -y[2], normalized=False)
    assert torch.equal(against, negative)
    weight = 1 / (1 + math.exp(2 + 1))  # the masked scores are 2 and -1
    torch.testing.assert_close(against, torch.tensor([[[4 * weight, 2 * (1 - weight)]]], dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(CLASS_AGNOSTIC))
def test_no_evidence_against_nothing(name: str, device: torch.device) -> None:
    model = make_model(name, device)
    with METHODS[name](model) as extractor, torch.no_grad():
        model(make_input(device))
        with pytest.raises(ValueError, match=f"{name} explains no score"):
            extractor(relu="negative")


def test_an_empty_signed_map_stays_empty() -> None:
    model = hand_net(lambda features: features.mean((2, 3)) * 0)
    with methods.GradCAM(model, "features") as extractor:
        (cam,) = extractor(0, model(example()), relu=False)
    assert cam.tolist() == [[[0, 0]]]


@pytest.mark.parametrize("relu", ["positive", "Negative", 2, -1])
def test_bad_values_of_relu(relu: Any) -> None:
    model = hand_net(logits)
    with methods.GradCAM(model, "features") as extractor:
        scores = model(example())
        with pytest.raises(ValueError, match=f"`relu` must be None, True, False or 'negative', got {relu!r}"):
            extractor(0, scores, relu=relu)


# Maps in a training loss.

DIFFERENTIABLE: dict[str, Callable[[nn.Module], Any]] = {
    **{
        name: lambda model, name=name: getattr(methods, name)(model, ["first", "second"])
        for name in (
            "GradCAM",
            "GradCAMpp",
            "XGradCAM",
            "LayerCAM",
            "HiResCAM",
            "GradCAMElementWise",
            "ShapleyCAM",
            "FinerCAM",
            "RefineCAM",
        )
    }
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{"relu": False}, {"normalized": False}, {}])
def test_the_gradient_of_a_map(name: str, options: dict[str, Any]) -> None:
    if name == "RefineCAM" and "relu" in options:
        pytest.skip("the product is one of maps in [0, 1]")
    model = split_net(channels=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 3, 5, 7), generator=generator, dtype=torch.float64)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 5, 7), (1, 3, 4))]

    def loss(graph: bool) -> Tensor:
        with DIFFERENTIABLE[name](model) as extractor:
            maps = extractor(1, model(x), create_graph=graph, **({} if graph else {"retain_graph": True}), **options)
        assert all(cam.requires_grad == graph for cam in maps)
        return torch.stack([(cam * w).sum() for cam, w in zip(maps, weights, strict=False)]).sum()

    parameters = [model.first[0].weight, model.second[0].bias, model.mix.weight, model.fc.weight]
    gradients = torch.autograd.grad(loss(True), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss(False)
            parameter -= 2 * step * direction
            below = loss(False)
            parameter += step * direction
        expected = (above - below) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)
        assert gradient.any()


def test_maps_with_a_graph_need_one() -> None:
    model, x = make_model("GradCAM", torch.device("cpu")), make_input(torch.device("cpu"))
    for mode in (torch.no_grad, torch.inference_mode):
        with methods.GradCAM(model, "block2") as extractor, mode():
            model(x)
            with pytest.raises(ValueError, match="`create_graph` needs the forward pass to be run with gradients on"):
                extractor(0, create_graph=True)
            assert extractor(0)[0].any()
    for method in (methods.ScoreCAM, methods.SmoothGradCAMpp, methods.EigenCAM, methods.AugmentedCAM, methods.SESS):
        with method(model, "block2") as extractor:
            scores = model(x)
            with pytest.raises(ValueError, match="does not differentiate the recorded pass"):
                extractor(0, scores, create_graph=True)


def test_training_with_a_loss_on_the_maps() -> None:
    """Two blobs tell the class, one in each half; the loss on the maps asks to look at the left one."""

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (16,), generator=generator)
        images = 0.1 * torch.randn((16, 2, 12, 12), generator=generator)
        rows = torch.randint(1, 9, (16, 2), generator=generator)
        for image, label, (left, right) in zip(images, labels.tolist(), rows.tolist(), strict=True):
            image[label, left : left + 3, 1:4] += 1
            image[label, right : right + 3, 8:11] += 1
        return images, labels

    def energy_inside(attend: bool) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
                nn.Linear(8 * 144, 2),
            )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with methods.HiResCAM(model, "3") as extractor:
            for _ in range(60):
                images, labels = batch(generator)
                scores = model(images)
                loss = nn.functional.cross_entropy(scores, labels)
                if attend:
                    (cam,) = extractor(labels, scores, normalized=False, create_graph=True)
                    loss = loss + (cam[..., 6:].sum((1, 2)) / (cam.sum((1, 2)) + 1e-6)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            images, labels = batch(generator)
            with torch.no_grad():
                scores = model(images)
                (cam,) = extractor(labels, scores, normalized=False)
        accuracy = (scores.argmax(1) == labels).float().mean()
        return (cam[..., :6].sum() / cam.sum()).item(), accuracy.item()

    without, plain_accuracy = energy_inside(attend=False)
    inside, accuracy = energy_inside(attend=True)
    assert accuracy >= 0.9
    assert plain_accuracy >= 0.9
    assert without < 0.75
    assert inside > without + 0.2
