"""Sensitivity: by hand, and against captum with the same perturbations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from tests.metrics_under_test import Given, Line, cnn, images
from torchcam._tensors import resize
from torchcam.methods import GradCAM
from torchcam.metrics import Sensitivity


def drawn(image: Tensor, scale: float, seed: int = 0) -> Tensor:
    """The same noise for the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(image.shape, generator=generator, dtype=torch.float64).to(image)


def only(inputs: Any) -> Tensor:
    """The input: captum hands over a tensor, or a tuple of one."""
    return inputs[0] if isinstance(inputs, tuple) else inputs


def explain(model: nn.Module, x: Tensor, classes: Any) -> Tensor:
    """Grad-CAM maps of the input's size, (N, *spatial)."""
    with GradCAM(model, "4") as extractor:
        model(x)
        (cams,) = extractor(classes)
    return resize(cams.unsqueeze(1), x.shape[2:]).squeeze(1)


# captum is another implementation of the paper. It calls a perturbing function with all perturbed inputs at once, in
# the order of ours, so that a function that draws the same noise at every call gives both the same perturbations.


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_max_sensitivity_is_that_of_captum(dim: int, device: torch.device) -> None:
    x, classes = images(3, dim, device), torch.tensor([2, 0, 1], device=device)
    model = cnn(dim, device).eval()
    expected = sensitivity_max(
        lambda inputs, target: (explain(model, only(inputs), target),),
        x,
        perturb_func=lambda inputs, radius: only(inputs) + drawn(only(inputs), radius),
        perturb_radius=0.3,
        n_perturb_samples=4,
        target=classes,
    )
    with GradCAM(model, "4") as extractor:
        metric = Sensitivity(extractor, num_samples=4, perturb=lambda inputs: inputs + drawn(inputs, 0.3))
        metric.update(x, classes)
    assert metric.summary()["max_sensitivity"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert (expected > 0.05).all()


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_is_that_of_captum(dim: int, normalize: bool, device: torch.device) -> None:
    x, classes = images(3, dim, device), torch.tensor([2, 0, 1], device=device)
    model = cnn(dim, device).eval()

    def perturbed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        taken = drawn(inputs, 0.5) * inputs.sign()
        return taken, inputs - taken

    attributions = explain(model, x, classes).unsqueeze(1).expand_as(x)
    expected = infidelity(model, perturbed, x, attributions, target=classes, n_perturb_samples=6, normalize=normalize)
    with GradCAM(model, "4") as extractor:
        metric = Sensitivity(
            extractor,
            num_samples=1,
            removal=lambda inputs: perturbed(inputs)[0],
            num_perturbations=6,
            normalize=normalize,
        )
        metric.update(x, classes)
    assert metric.summary()["infidelity"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert (expected > 1e-3).all()


# By hand.


class Itself(Given):
    """An extractor whose map is what the model has seen last, of one channel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.register_forward_hook(lambda _m, args, _output: setattr(self, "maps", [args[0][:, 0]]))


def test_max_sensitivity_by_hand(device: torch.device) -> None:
    steps = iter([[0.0, 3.0], [1.0, -1.0], [0.0, -1.0], [0.0, 0.0]])

    def perturb(inputs: Tensor) -> Tensor:
        return inputs + torch.tensor([next(steps) for _ in inputs], device=inputs.device).unsqueeze(1)

    metric = Sensitivity(Itself(Line()), perturb=perturb, num_samples=2, num_perturbations=1)
    metric.update(torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]], device=device))
    assert metric.summary()["max_sensitivity"] == pytest.approx((3 / 5 + 1 / 2) / 2)


@pytest.mark.parametrize(("normalize", "expected"), [(False, (4 + 16) / 2), (True, 8 - 144 / 20)])
def test_infidelity_by_hand(normalize: bool, expected: float) -> None:
    # The score of x² falls by 8 without the 2 twice; the map 1, 0 foretells 2·1, and then 4·1 for both.
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x**2).flatten(1).sum(1, keepdim=True)

    taken = torch.tensor([[[2.0, 0.0]], [[4.0, 0.0]]])
    x = torch.tensor([[[2.0, 1.0]]])
    # x - I = 0 and -2 in the first place: the score falls by 4, then by 0.
    falls, foretold = np.array([4.0, 0.0]), np.array([2.0, 4.0])
    if normalize:
        foretold = foretold * (falls @ foretold) / (foretold @ foretold)
    metric = Sensitivity(
        Given(Squares(), torch.tensor([[1.0, 0.0]])),
        perturb=lambda inputs: inputs,
        removal=lambda _inputs: taken,
        num_samples=1,
        num_perturbations=2,
        normalize=normalize,
    )
    metric.update(x)
    assert metric.summary() == pytest.approx({"max_sensitivity": 0.0, "infidelity": ((foretold - falls) ** 2).mean()})
    assert metric.summary()["infidelity"] == pytest.approx({False: (4 + 16) / 2, True: 8 - 32 / 20}[normalize])


def test_a_linear_model_is_foretold_by_its_weights() -> None:
    class Weighted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * weights).flatten(1).sum(1, keepdim=True)

    weights = torch.rand(4, 6, dtype=torch.float64)
    for removal in ("square", "gaussian"):
        for scale, normalize, expected in ((1.0, False, 0.0), (0.1, True, 0.0)):
            metric = Sensitivity(
                Given(Weighted(), (scale * weights).expand(2, -1, -1)),
                perturb=lambda inputs: inputs,
                num_samples=1,
                removal=removal,
                normalize=normalize,
            )
            metric.update(torch.randn(2, 3, 4, 6, dtype=torch.float64))
            assert metric.summary()["infidelity"] == pytest.approx(expected, abs=1e-20)


# What is drawn.


def watched(**options: Any) -> list[Tensor]:
    """The inputs (V, 2, 1, 12, 8) that a metric makes of a batch of two: perturbed, and with something removed."""
    seen: list[Tensor] = []

    class Watching(Line):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    metric = Sensitivity(Given(Watching(), torch.ones(2, 12, 8)), num_samples=1, batch_size=10_000, **options)
    metric.update(X)
    return [x.unflatten(0, (2, -1)) for x in seen[1:]]


X = torch.rand(2, 1, 12, 8, generator=torch.Generator().manual_seed(0)) + 1


def test_squares() -> None:
    before = torch.get_rng_state()
    _, left = watched(num_perturbations=200)
    gone = left == 0
    assert torch.equal(left[~gone], X.unsqueeze(1).expand_as(left)[~gone])
    assert gone.sum((2, 3, 4)).eq(3 * 2).all()  # a quarter of each side
    rows, columns = gone.any(4)[0, :, 0], gone.any(3)[0, :, 0]
    assert rows.sum(1).eq(3).all()
    assert columns.sum(1).eq(2).all()
    assert torch.equal(gone[0], gone[1])  # the same for every sample
    corners = {(int(row.int().argmax()), int(column.int().argmax())) for row, column in zip(rows, columns, strict=True)}
    assert {row for row, _ in corners} == set(range(10))
    assert {column for _, column in corners} == set(range(7))
    assert torch.equal(before, torch.get_rng_state())
    _, whole = watched(num_perturbations=1, square_size=1.0)
    assert not whole.any()
    _, one = watched(num_perturbations=1, square_size=0.01)
    assert (one == 0).sum() == 2


def test_noise() -> None:
    perturbed, left = watched(num_perturbations=500, removal="gaussian", std=0.3, radius=0.7)
    step = perturbed - X.unsqueeze(1)
    assert step.abs().amax() <= 0.7 + 1e-6
    assert step.std().item() == pytest.approx(0.7 / math.sqrt(3), rel=0.1)
    torch.testing.assert_close(step[0], step[1], rtol=0, atol=1e-6)
    taken = X.unsqueeze(1) - left
    assert taken.std().item() == pytest.approx(0.3, rel=0.02)
    torch.testing.assert_close(taken[0], taken[1], rtol=0, atol=1e-6)
    same, other = (watched(num_perturbations=2, removal="gaussian", seed=seed) for seed in (0, 1))
    again = watched(num_perturbations=2, removal="gaussian", seed=0)
    assert all(map(torch.equal, same, again))
    assert not any(map(torch.equal, same, other))


def test_functions_that_draw_leave_the_global_stream_alone() -> None:
    seen = []

    def noise(inputs: Tensor) -> Tensor:
        seen.append(torch.randn_like(inputs))
        return seen[-1]

    with GradCAM(cnn(), "4") as extractor:
        before = torch.get_rng_state()
        metric = Sensitivity(extractor, perturb=noise, removal=noise, num_samples=2, num_perturbations=2, batch_size=3)
        metric.update(images())
    assert torch.equal(before, torch.get_rng_state())
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])


def test_a_map_of_zeros() -> None:
    x = torch.rand(2, 1, 3)
    metric = Sensitivity(Given(Line(), torch.zeros(2, 3)), num_samples=1, num_perturbations=2)
    metric.update(x)  # stays zero: not sensitive
    assert (int(metric.total), int(metric.nan_count)) == (2, 0)
    metric.update(x, maps=torch.zeros(2, 3))
    metric.cam_extractor.maps = [torch.ones(2, 3)]
    metric.update(x, maps=torch.zeros(2, 3))  # appears from nothing
    assert (int(metric.total), int(metric.nan_count)) == (4, 2)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"radius": -1}, ValueError, "`radius`.*-1"),
        ({"std": math.nan}, ValueError, "`std`.*nan"),
        ({"num_samples": 0}, ValueError, "`num_samples`.*0"),
        ({"num_perturbations": 2.5}, TypeError, r"`num_perturbations`.*2\.5"),
        ({"square_size": 0}, ValueError, "`square_size`.*0"),
        ({"square_size": 1.5}, ValueError, r"`square_size`.*1\.5"),
        ({"removal": "circle"}, ValueError, "`removal` must be 'square', 'gaussian' or a callable, got 'circle'"),
        ({"perturb": 0.1}, TypeError, r"`perturb` must be callable or None, got 0\.1"),
        ({"square_size": "a"}, TypeError, "`square_size` must be a number, got 'a' of type str"),
        ({"normalize": "no"}, TypeError, "`normalize` must be True or False, got 'no'"),
        ({"seed": -(2**64)}, ValueError, "`seed` must be from"),
        ({"seed": True}, TypeError, "`seed` must be an integer, got True"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
    ],
)
def test_bad_options(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Sensitivity(Given(Line()), **kwargs)


@pytest.mark.parametrize("name", ["perturb", "removal"])
@pytest.mark.parametrize(("bad", "found"), [(lambda x: x[:1], r"\(1, 1, 2\)"), (lambda x: 0, "int")])
def test_functions_that_return_something_else(name: str, bad: Any, found: str) -> None:
    metric = Sensitivity(Given(Line(), torch.ones(2, 2)), num_samples=1, num_perturbations=1, **{name: bad})
    with pytest.raises(ValueError, match=rf"`{name}` must return a tensor shaped like .*\(2, 1, 2\), got {found}"):
        metric.update(torch.ones(2, 1, 2))
