"""What counts as a forward pass: the last complete, outermost call of the model; nothing else changes the maps."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.methods_under_test import METHODS, READS_ATTENTION, Net, Transformer
from tests.models import shuffled
from tests.snapshots import MODES
from torchcam import methods

CLASSES = [0, 2]

SOME_METHODS = ["GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "SmoothGradCAMpp", "FullGrad", "LeGrad", "CAM"]
every_method = pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "no_grad") for name in METHODS),
        *((name, mode) for name in SOME_METHODS for mode in ("grad", "inference")),
    ],
)
every_mode = pytest.mark.parametrize("mode", MODES)


def image(seed: int, size: int = 12) -> Tensor:
    return torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(seed))


X1, X2 = image(1), image(2)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for cam, other in zip(found, expected, strict=True):
        torch.testing.assert_close(cam, other, rtol=1e-4, atol=1e-5)


def maps_or_refusal(extractor: Any, expected: list[Tensor], reason: re.Pattern[str], **arguments: Any) -> None:
    """The maps are those expected, or an error gives the reason."""
    try:
        found = extractor(CLASSES, **arguments)
    except (AssertionError, RuntimeError) as error:
        if not reason.search(str(error)):
            raise
        return
    close(found, expected)


def weighted(model: nn.Module) -> nn.Module:
    """Set the weights of a model by its structure alone, positive ones, so that no map is empty."""
    model = shuffled(model)
    for parameter in model.parameters():
        parameter.data.abs_()
    return model


def plain_model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return weighted(Transformer() if name in READS_ATTENTION else Net())


@cache
def plain_maps(name: str, mode: str, x: Tensor) -> list[Tensor]:
    """Return the maps of a pass that nothing came between."""
    with torch.inference_mode(False):
        model = plain_model(name)
    with METHODS[name](model) as extractor, MODES[mode]():
        model(x)
        return extractor(CLASSES)


# Parts of a model -----------------------------------------------------------------------------------------------------


@every_method
def test_calls_of_a_part_change_nothing(name: str, mode: str) -> None:
    model, twin = plain_model(name), plain_model(name)
    tokens = torch.rand(2, 10, 8) if name in READS_ATTENTION else torch.rand(2, 4, 12, 12)
    with METHODS[name](model) as extractor, MODES[mode]():
        for part in ("forward", "block1", "block2"):  # of no pass yet
            arguments = (X2 if part == "forward" else tokens,)
            output, expected = getattr(model, part)(*arguments), getattr(twin, part)(*arguments)
            assert torch.equal(output, expected)
            assert output.requires_grad == expected.requires_grad
            with pytest.raises(AssertionError):
                extractor(CLASSES)
        model(X1)
        for part in ("block2", "block1", "forward"):  # the last one runs both layers
            arguments = (X2 if part == "forward" else tokens,)
            output, expected = getattr(model, part)(*arguments), getattr(twin, part)(*arguments)
            assert torch.equal(output, expected)
            assert output.requires_grad == expected.requires_grad
        close(extractor(CLASSES), plain_maps(name, mode, X1))
        model(X2)
        close(extractor(CLASSES), plain_maps(name, mode, X2))


class WithFeatures(nn.Module):
    """The two halves that torchvision's and timm's models can be called by."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
        self.fc = nn.Linear(4, 3)
        weighted(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@every_mode
@pytest.mark.parametrize("layer", ["features", "features.0", "features.2"])
@pytest.mark.parametrize("method", [methods.GradCAM, methods.EigenCAM, methods.ScoreCAM, methods.AblationCAM])
def test_a_model_that_is_called_by_halves(method: Any, layer: str, mode: str) -> None:
    model, twin = WithFeatures(), WithFeatures()
    with method(twin, layer) as other, MODES[mode]():
        twin(X1)
        expected = other(CLASSES)
        for part in (model.features, model.forward_features, lambda x: model.forward_head(model.features(x))):
            with method(model, layer) as extractor:
                scores = model(X1)
                found = part(X2)
                assert torch.equal(found, (twin.features if found.ndim == 4 else twin)(X2))
                assert found.requires_grad == (mode == "grad")
                close(extractor(CLASSES), expected)
                model(X1)
                part(X2[:1])  # another batch size
                part(image(3, 10))  # another size of the grid
                close(extractor(CLASSES, scores.detach()), expected)


# A model that calls itself --------------------------------------------------------------------------------------------


class Recursive(Net):
    """Calls itself on a smaller image; in each call all layers run."""

    unrolled = False

    def again(self, x: Tensor, depth: int) -> Tensor:
        return (self.forward if self.unrolled else self)(x, depth)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        before = self.again(x.flip(-1) * 0.5, depth - 1).mean(1).reshape(-1, 1, 1, 1) if depth else 0.0
        scores = super().forward(x + before)
        return scores + self.again(x.flip(-2), depth - 1) * 0.1 if depth > 1 else scores


class InnerLayer(Recursive):
    """Only the innermost call reaches the target layers; the outer one continues from its logits."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if not depth:
            return Net.forward(self, x)
        return self.again(x * 0.5, depth - 1).square() + 0.1 * x.mean((2, 3))


class OuterLayer(Recursive):
    """The inner call ends before the target layers; the outer one runs them."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if not depth:
            return self.stem(x).tanh()
        return Net.forward(self, x + self.again(x.flip(-1), depth - 1).mean(1, keepdim=True))


class Recovering(Recursive):
    """The inner call raises in the middle, and the outer one takes note and runs."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if not depth:
            self.block1(self.stem(x))
            raise ValueError("raised on purpose")
        shift = 0.0
        try:
            self.again(x * 0.5, depth - 1)
        except ValueError:
            shift = 0.1
        return Net.forward(self, x + shift)


def recursive(kind: type[Recursive], unrolled: bool = False) -> Recursive:
    with torch.random.fork_rng(devices=[]):
        model = weighted(kind())
    model.unrolled = unrolled
    return model


@pytest.mark.parametrize(
    ("kind", "name", "mode"),
    [
        *((Recursive, name, "no_grad") for name in METHODS if name not in READS_ATTENTION),
        *(
            (kind, name, mode)
            for kind in (Recursive, InnerLayer, OuterLayer, Recovering)
            for name in ("GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "FullGrad")
            for mode in MODES
            if (kind, mode) != (Recursive, "no_grad")
        ),
    ],
)
def test_a_model_that_calls_itself_is_one_pass(kind: type[Recursive], name: str, mode: str) -> None:
    """The maps are those of a model with the same modules that does not call itself."""
    model, unrolled = recursive(kind), recursive(kind, unrolled=True)
    with METHODS[name](model) as extractor, METHODS[name](unrolled) as reference, MODES[mode]():
        for x in (X1, X2):
            scores = model(x)
            expected = unrolled(x)
            assert torch.equal(scores, expected)
            assert scores.requires_grad == (mode == "grad")
            close(extractor(CLASSES), reference(CLASSES))
        assert torch.is_grad_enabled() == (mode == "grad")


@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM"])
@every_mode
def test_a_model_that_calls_itself_many_times(name: str, mode: str) -> None:
    model, unrolled = recursive(Recursive), recursive(Recursive, unrolled=True)
    with METHODS[name](model) as extractor, METHODS[name](unrolled) as reference, MODES[mode]():
        assert torch.equal(model(X1, 3), unrolled(X1, 3))
        close(extractor(CLASSES), reference(CLASSES))


# Nested models --------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).tanh()))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = Inner()
        self.last = nn.Conv2d(4, 4, 3, stride=2)
        self.fc = nn.Linear(4, 3)
        weighted(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.inner(self.stem(x).relu())).relu().mean((2, 3)))


def score_of_channel(output: Tensor) -> Tensor:
    return output[1].square().mean()


NESTED: dict[str, Callable[[nn.Module, str], Any]] = {
    "GradCAM": methods.GradCAM,
    "EigenCAM": methods.EigenCAM,
    "ScoreCAM": methods.ScoreCAM,
    "AblationCAM": methods.AblationCAM,
}


@cache
def nested_maps(name: str, mode: str, layer: str, which: str, x: Tensor) -> list[Tensor]:
    """Return the maps of an extractor that is alone; ``which`` says of the inner or the outer model."""
    with torch.inference_mode(False):
        outer = Outer()
    model = outer.inner if which == "inner" else outer
    keep = {"retain_graph": True} if name == "GradCAM" else {}
    with NESTED[name](model, layer) as extractor, MODES[mode]():
        model(x)
        asked = {"targets": score_of_channel} if which == "inner" else {"class_idx": CLASSES}
        return extractor(**asked, **keep)


H1, H2 = (torch.rand((2, 4, 9, 9), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))


@every_mode
@pytest.mark.parametrize("layer", ["stem", "inner.second", "inner", "last"])
@pytest.mark.parametrize(("name", "outer_first"), [*((name, True) for name in NESTED), ("GradCAM", False)])
def test_nested_models_with_an_extractor_each(name: str, layer: str, outer_first: bool, mode: str) -> None:
    twin, outer = Outer(), Outer()
    if outer_first:
        of_outer = NESTED[name](outer, layer)
        of_inner = NESTED[name](outer.inner, "second")
    else:
        of_inner = NESTED[name](outer.inner, "second")
        of_outer = NESTED[name](outer, layer)
    keep = {"retain_graph": True} if name == "GradCAM" else {}
    with of_outer, of_inner, MODES[mode]():
        scores = outer(X1)
        assert torch.equal(scores, twin(X1))
        assert scores.requires_grad == (mode == "grad")
        between = twin.stem(X1).relu().detach()
        close(of_outer(CLASSES, **keep), nested_maps(name, mode, layer, "outer", X1))
        close(of_inner(targets=score_of_channel, **keep), nested_maps(name, mode, "second", "inner", between))

        output = outer.inner(H1)  # a pass of the inner model, a part of the outer one
        assert torch.equal(output, twin.inner(H1))
        assert output.requires_grad == (mode == "grad")
        close(of_outer(CLASSES, **keep), nested_maps(name, mode, layer, "outer", X1))
        close(of_inner(targets=score_of_channel, **keep), nested_maps(name, mode, "second", "inner", H1))

        outer(X2)
        outer.inner(H2)
        close(of_inner(targets=score_of_channel, **keep), nested_maps(name, mode, "second", "inner", H2))
        close(of_outer(CLASSES, **keep), nested_maps(name, mode, layer, "outer", X2))


# Passes that were cut short -------------------------------------------------------------------------------------------


@every_method
def test_a_pass_that_was_cut_short_is_no_pass(name: str, mode: str) -> None:
    """The maps are those of the last complete pass, or an error says that there is none."""
    error = KeyboardInterrupt if mode == "no_grad" else ZeroDivisionError

    def stumble(*_: Any) -> None:
        raise error

    model = plain_model(name)
    parts = ["block2", "heads" if name in READS_ATTENTION else "fc", ""]
    with METHODS[name](model) as extractor, MODES[mode]():
        for part in parts:
            model(X1)
            handle = model.get_submodule(part).register_forward_hook(stumble)
            with pytest.raises(error):
                model(X2)
            handle.remove()
            maps_or_refusal(extractor, plain_maps(name, mode, X1), re.compile("pass"))
        model(X2)
        close(extractor(CLASSES), plain_maps(name, mode, X2))


# Activation checkpointing ---------------------------------------------------------------------------------------------

SAYS_SO = re.compile("checkpoint|reentrant|gradients? .*(off|disabled)|no_grad|modified|second time", re.IGNORECASE)


class Checkpointed(nn.Module):
    """The middle of the model runs again during a backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.inside = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)
        weighted(self)

    def middle(self, x: Tensor) -> Tensor:
        return self.inside(self.block(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.fc(self.last(x).square().mean((2, 3)))


def loss_of(scores: Tensor) -> Tensor:
    return scores.square().sum()


@cache
def checkpointed_maps(name: str, layer: str, training: bool) -> list[Tensor]:
    model = Checkpointed(None).train(training)
    with getattr(methods, name)(model, layer) as extractor:
        model(X1)
        return extractor(CLASSES)


@cache
def checkpointed_gradients(training: bool) -> list[Tensor]:
    model = Checkpointed(None).train(training)
    loss_of(model(X1)).backward()
    return [parameter.grad for parameter in model.parameters()]


def check_gradients(model: nn.Module, training: bool) -> None:
    for parameter, expected in zip(model.parameters(), checkpointed_gradients(training), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", ["stem", "block", "inside", "last"])
@pytest.mark.filterwarnings("ignore:behind the `target_layer`")  # samples are mixed in training mode
@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM"])
def test_checkpointing(name: str, layer: str, training: bool, reentrant: bool) -> None:
    """The user's own backward pass runs layers again, before the call of the extractor or after it."""
    expected = checkpointed_maps(name, layer, training)
    keep = {} if name == "EigenCAM" else {"retain_graph": True}

    model = Checkpointed(reentrant).train(training)
    with getattr(methods, name)(model, layer) as extractor:
        scores = model(X1)
        loss_of(scores).backward(retain_graph=True)
        check_gradients(model, training)
        maps_or_refusal(extractor, expected, SAYS_SO, scores=scores)
        maps_or_refusal(extractor, expected, SAYS_SO)

    model = Checkpointed(reentrant).train(training)
    with getattr(methods, name)(model, layer) as extractor:
        scores = model(X1)
        maps_or_refusal(extractor, expected, SAYS_SO, scores=scores, **keep)
        loss_of(scores).backward()
        check_gradients(model, training)
        if name == "EigenCAM":
            close(extractor(CLASSES), expected)
        else:
            maps_or_refusal(extractor, expected, SAYS_SO)
        model.zero_grad()
        model(X2)  # leaves a graph of its own


@pytest.mark.parametrize("layer", ["stem", "block", "inside", "last"])
@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM"])
def test_checkpointing_without_reentry_gives_maps(name: str, layer: str) -> None:
    """Where torch can differentiate the pass, a refusal is no answer."""
    model = Checkpointed(reentrant=False).eval()
    with getattr(methods, name)(model, layer) as extractor:
        scores = model(X1)
        loss_of(scores).backward(retain_graph=True)
        close(extractor(CLASSES, scores), checkpointed_maps(name, layer, False))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch says so of every such pass
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["stem", "inside", "last"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("GradCAM", "inference"), *((name, "no_grad") for name in ("GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM"))],
)
def test_checkpointing_without_gradients(name: str, layer: str, mode: str, reentrant: bool) -> None:
    with getattr(methods, name)(Checkpointed(None), layer) as reference:
        reference.model(X1)
        expected = reference(CLASSES)
    model = Checkpointed(reentrant)
    with getattr(methods, name)(model, layer) as extractor, MODES[mode]():
        scores = model(X1)
        assert torch.equal(scores, Checkpointed(None)(X1))
        assert not scores.requires_grad
        maps_or_refusal(extractor, expected, SAYS_SO)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
