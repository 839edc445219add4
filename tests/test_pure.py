"""The mathematics of the methods: functions of tensors, called without a model and compared with values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchcam import methods
from torchcam.methods.core import _CAM

# One sample of two channels with two positions.
A = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
G = torch.tensor([[[[1.0, 0.0]], [[-1.0, 2.0]]]])


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "weights", "cam"),
    [
        (methods.GradCAM, [0.5, 0.5], [1.5, 1.5]),
        # Sums of activations: 4 and 2. alpha: 1 / (2 + 4), and for the second channel at its positive gradient 1 / 6.
        (methods.GradCAMpp, [1 / 6, 2 / 6], [1 / 6 + 4 / 6, 3 / 6]),
        (methods.XGradCAM, [1 / 4, -2 / 2], [1 / 4 - 2, 3 / 4]),
        (methods.LayerCAM, [1, 0, 0, 2], [1, 0]),
        (methods.HiResCAM, [1, 0, -1, 2], [-1, 0]),
        (methods.GradCAMElementWise, [1, 0, 0, 2], [1, 0]),
    ],
)
def test_gradients(method: type[_CAM], weights: list[float], cam: list[float]) -> None:
    close(method.weights(A, G), weights)
    close(method.map(method, A, G), cam)  # the sum of the weighted channels, before the ReLU


def test_many_samples_at_once() -> None:
    both = methods.GradCAM.weights(torch.cat([A, 2 * A]), torch.cat([G, -G]))
    assert both.tolist() == [[0.5, 0.5], [-0.5, -0.5]]


def test_smooth_gradients() -> None:
    """With one clean sample the moments are powers of the gradient, and the weights those of Grad-CAM++."""
    moments = torch.stack([G, G**2, G**3])
    torch.testing.assert_close(methods.SmoothGradCAMpp.weights(A, moments), methods.GradCAMpp.weights(A, G))


def test_curvature() -> None:
    close(methods.ShapleyCAM.weights(A, G, torch.full_like(G, 2.0)), [0.5 - 1, 0.5 - 1])


def test_class_weights() -> None:
    classifier = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert methods.CAM.weights(A, classifier, torch.tensor([2])).tolist() == [[5, 6]]


@pytest.mark.parametrize("method", [methods.ScoreCAM, methods.SSCAM, methods.ISCAM])
def test_masked_scores(method: type[_CAM]) -> None:
    close(method.weights(A, torch.tensor([[0.0, math.log(3)]])), [0.25, 0.75])


def test_scores_without_a_channel() -> None:
    weights: Callable[..., Tensor] = methods.AblationCAM.weights
    close(weights(A, torch.tensor([4.0]), torch.tensor([[3.0, 6.0]])), [0.25, -0.5])
    close(weights(A, torch.tensor([-4.0]), torch.tensor([[-5.0, -2.0]])), [0.25, -0.5])
    close(weights(A, torch.tensor([0.0]), torch.tensor([[-1.0, 2.0]])), [1, -2])


def test_scores_around_positions() -> None:
    assert methods.ReciproCAM.map(A, torch.tensor([[3.0, 5.0]])).tolist() == [[[3, 5]]]


def test_gains_of_groups() -> None:
    masks = torch.tensor([[[[1.0, 0.0]], [[0.5, 1.0]]]])
    close(methods.GroupCAM.map(A, masks, torch.tensor([[2.0, -1.0]])), [1.5, -1])


def test_activations_alone() -> None:
    close(methods.MeanActivation.weights(A), [0.5, 0.5])
    # Centred over positions the features are (-1, 1) and (1, -1): sqrt(2) times one axis.
    close(methods.EigenGradCAM.map(A, torch.ones_like(A)).abs(), [math.sqrt(2), math.sqrt(2)])
    close(methods.SegEigenCAM.map(A, -torch.ones_like(A)).abs(), [math.sqrt(2), math.sqrt(2)])
    close(methods.EigenSmoothedCAM.map(A, torch.ones(1, 2)).abs(), [math.sqrt(2), math.sqrt(2)])


def test_attention() -> None:
    attention = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]])
    gradient = torch.tensor([[[[4.0, -1.0], [2.0, 0.0]]]])
    close(methods.TransformerAttribution.step(attention, gradient), [1 + 1, 0, 1, 1])
    # Keys 0 and 1: the mean of the positive gradients of both queries.
    close(methods.LeGrad.map(A, gradient, lambda keys: keys), [3, 0])


def test_a_method_without_weights_says_so() -> None:
    with pytest.raises(NotImplementedError, match="EigenCAM does not define its weights"):
        methods.EigenCAM(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1)), "0").weights(A)


def test_scaling_leaves_a_map_as_it_is() -> None:
    held = torch.tensor([[[1.0, 3.0, 2.0]]])

    class Held(_CAM):
        class_agnostic = True

        def map(self, activation: Tensor) -> Tensor:
            return held

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    with torch.no_grad(), Held(model, "0") as extractor:
        model(torch.ones(1, 3, 1, 3))
        assert extractor()[0].tolist() == [[[0, 1, 0.5]]]
    assert held.tolist() == [[[1, 3, 2]]]
