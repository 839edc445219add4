"""Nothing of the user's is disturbed: hooks, attributes, outputs, aliases, fast paths, training, copies."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods_under_test import METHODS, READS_ATTENTION, Net, Transformer
from tests.models import shuffled
from tests.snapshots import MODES, attributes, check_unchanged, modes
from torchcam import methods

CLASSES = [0, 2]
REPLAYED = ["ScoreCAM", "AblationCAM", "ReciproCAM", "SmoothGradCAMpp", "AugmentedCAM"]
RUN_AGAIN = [*REPLAYED, "GuidedBackprop", "FullGrad"]

every_mode = pytest.mark.parametrize("mode", MODES)
of_every_method = pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "no_grad") for name in METHODS if name not in READS_ATTENTION),
        *((name, mode) for name in ("GradCAM", *RUN_AGAIN) for mode in ("grad", "inference")),
    ],
)
without_gradients = pytest.mark.parametrize("mode", ["no_grad", "inference"])


def image(seed: int, batch_size: int = 2, size: int = 12) -> Tensor:
    return torch.rand((batch_size, 3, size, size), generator=torch.Generator().manual_seed(seed))


X1, X2 = image(1), image(2)


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for cam, other in zip(found, expected, strict=True):
        torch.testing.assert_close(cam, other, rtol=10 * tolerance, atol=tolerance)


def weighted(model: nn.Module) -> nn.Module:
    """Set the weights of a model by its structure alone, positive ones, so that no map is empty."""
    shuffled(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    return model


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return weighted(kind())


def same_output(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad
    assert found.dtype == expected.dtype


# Hooks that change what flows -----------------------------------------------------------------------------------------


class Steered(Net):
    """Does itself what hooks do to a `Net`: the names of the layers are the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def steer(self, x: Tensor) -> Tensor:
        return x + 0.7 if self.how == "shift" else x * 1.5 if self.how == "scale" else x

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input":
            x = x * 2.0 + 0.25
        x = self.steer(self.relu(self.bn(self.stem(x))))
        x = self.relu(self.block1(x))
        x = self.relu(self.block2(x))
        scores = self.fc(self.steer(self.dropout(x.mean((2, 3)))))
        return scores / 3.0 if self.how == "output" else scores


def steered_by_hooks(how: str) -> nn.Module:
    model = made(Net)
    if how in {"shift", "scale"}:
        change = (lambda x: x + 0.7) if how == "shift" else (lambda x: x * 1.5)
        model.block1.register_forward_pre_hook(lambda _module, args: (change(args[0]),))
        model.dropout.register_forward_hook(lambda _module, _args, output: change(output))
    if how == "input":
        model.register_forward_pre_hook(lambda _model, args: (args[0] * 2.0 + 0.25,))
    if how == "output":
        model.register_forward_hook(lambda _model, _args, output: output / 3.0)
    return model


@pytest.mark.parametrize("name", RUN_AGAIN)
@pytest.mark.parametrize(("how", "mode"), [("shift", "no_grad"), ("scale", "grad"), ("output", "inference")])
def test_hooks_that_change_what_flows_take_part(how: str, name: str, mode: str) -> None:
    if (how, name) == ("shift", "FullGrad"):
        pytest.skip("a constant is a bias: FullGrad attributes it to the module it belongs to")
    model, baked = steered_by_hooks(how), made(partial(Steered, how))
    with METHODS[name](model) as extractor, METHODS[name](baked) as reference, MODES[mode]():
        same_output(model(X1), baked(X1))
        close(extractor(CLASSES), reference(CLASSES))
        same_output(model(X2), baked(X2))


def with_weight_norm(model: nn.Module) -> nn.Module:
    """Put the old weight norm, whose hook computes the weight in each forward pass, on two layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has a newer one; the old one is what models use
        for name in ("stem", "block2"):
            nn.utils.weight_norm(model.get_submodule(name))
    with torch.no_grad():
        for name in ("stem", "block2"):
            model.get_submodule(name).weight_g.mul_(1.5)  # `weight` is not up to date until the next pass
    return model


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("name", ["GradCAM", *RUN_AGAIN])
def test_weight_norm_takes_part(name: str, mode: str) -> None:
    model, baked = with_weight_norm(made(Net)), made(Net)
    with torch.no_grad():
        for part in ("stem", "block2"):
            layer = model.get_submodule(part)
            baked.get_submodule(part).weight.copy_(torch._weight_norm(layer.weight_v, layer.weight_g, 0))
    with METHODS[name](model) as extractor, METHODS[name](baked) as reference, MODES[mode]():
        same_output(model(X1), baked(X1))
        found = extractor(CLASSES)
        close(found, reference(CLASSES))
        with torch.inference_mode(False), torch.no_grad():  # the weight changes, as in training
            model.stem.weight_g.mul_(0.5)
            baked.stem.weight.mul_(0.5)
        scores = model(X2)
        torch.testing.assert_close(scores, baked(X2))
        close(extractor(CLASSES), reference(CLASSES))
    loss = model(X1).square().sum()
    loss.backward()
    assert model.stem.weight_g.grad is not None
    assert model.block2.weight_v.grad is not None


# Hooks that look on ---------------------------------------------------------------------------------------------------


class Smooth(Net):
    """No value is zero by itself: a blank row is one that somebody has made."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Softplus()


def rows_that_stand_for_nothing(tensor: Tensor) -> list[int]:
    rows = tensor.detach().flatten(1)
    blank = ~rows.isfinite().all(1) | (rows.amax(1) == rows.amin(1))
    return blank.nonzero().flatten().tolist()


@of_every_method
def test_hooks_see_no_placeholders(name: str, mode: str) -> None:
    model = made(Smooth)
    total = torch.zeros(())
    seen: list[str] = []

    def look(part: str, values: tuple[Any, ...], *, add: bool) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.ndim > 1 and rows_that_stand_for_nothing(value):
                seen.append(part)
            if isinstance(value, Tensor) and add:
                total.add_(value.detach().mean())

    for part, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, args, part=part: look(f"into '{part}'", args, add=False))
        module.register_forward_hook(
            lambda _module, _args, output, part=part: look(f"out of '{part}'", (output,), add=True)
        )
    with METHODS[name](model) as extractor, MODES[mode]():
        model(X1)
        extractor(CLASSES)
    assert seen == []
    assert total.isfinite()


# What modules keep ----------------------------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Keeps things of every kind in attributes, and computes with some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale = 1.0
        self.last_shape: tuple[int, ...] | None = None
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: set[int] = set()
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.statistics: dict[str, Any] = {"peaks": [], "largest": {"size": 0}}
        self.ema = torch.ones(())
        self._private: list[int] = []
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("unset", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale *= 0.99
        self.shapes.append(tuple(x.shape))
        self.sizes.add(len(x))
        self._private.append(len(x))
        self.statistics["peaks"].append(float(x.detach().amax()))
        self.statistics["largest"]["size"] = max(self.statistics["largest"]["size"], x.numel())
        self.count += 1
        if self.unset is None:
            self.unset = torch.zeros(())
        self.ema = 0.9 * self.ema + 0.1 * x.detach().mean()
        if tuple(x.shape) not in self.masks:  # the first input of this shape decides
            self.masks[tuple(x.shape)] = x.detach().mean() + len(self.masks)
        self.last_shape = tuple(x.shape)
        return x + self.masks[tuple(x.shape)] * self.scale + self.ema


class Stateful(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Keeping(), Keeping()
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append({"shape": tuple(x.shape)})
        x = self.first(self.relu(self.bn(self.stem(x))))
        x = self.relu(self.block1(x))
        x = self.second(self.relu(self.block2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


@of_every_method
@pytest.mark.filterwarnings("ignore:.* runs again")  # what the net keeps changes its scores
def test_what_modules_keep_is_as_before(name: str, mode: str) -> None:
    model, twin = made(Stateful), made(Stateful)
    with METHODS[name](model) as extractor, MODES[mode]():
        twin(X1)
        model(X1)
        check_unchanged(attributes(model, identity=False), attributes(twin, identity=False))
        before = attributes(model, identity=True)
        extractor(CLASSES)
        check_unchanged(attributes(model, identity=True), before)
        for x in (image(3, 3), image(4, 1, 9), image(5, 2, 12), image(6, 5, 16)):
            same_output(model(x), twin(x))
        check_unchanged(attributes(model, identity=False), attributes(twin, identity=False))
    same_output(model(X2), twin(X2))


class Ema(nn.Module):
    """Updates a buffer and attributes from what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(()))
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.ema.mul_(0.9).add_(0.1 * x.mean())
        self.last = x
        self.seen.append(x)
        self.by_size[len(x)] = x.mean((1, 2, 3))
        return x * 1.0


class Watching(Net):
    def __init__(self) -> None:
        super().__init__()
        self.watch = Ema()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.block1(self.relu(self.bn(self.stem(x)))))
        return self.fc(self.watch(self.relu(self.block2(x))).mean((2, 3)))


@without_gradients
@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "GuidedBackprop", "FullGrad", "SmoothGradCAMpp", "ScoreCAM"])
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_updated_behind_the_layer_holds_no_graph(name: str, asked: bool, mode: str) -> None:
    model, twin = made(Watching), made(Watching)
    with METHODS[name](model) as extractor:
        for x in (X1, X2):
            with MODES[mode]():
                same_output(model(x), twin(x))
                if asked:
                    extractor(CLASSES)
            watch, other = model.watch, twin.watch
            kept = [watch.ema, watch.last, *watch.seen, *watch.by_size.values()]
            expected = [other.ema, other.last, *other.seen, *other.by_size.values()]
            for tensor, value in zip(kept, expected, strict=True):
                assert torch.equal(tensor, value)
                assert not tensor.requires_grad
                assert tensor.grad_fn is None
    if mode == "no_grad":
        gradients = [torch.autograd.grad(m(X1).sum(), list(m.block2.parameters())) for m in (model, twin)]
        close(list(gradients[0]), list(gradients[1]))


# A layer that returns its input ---------------------------------------------------------------------------------------

BATCH, CHANNELS, SIDE = 2, 4, 6
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": partial(nn.ReLU, inplace=True),
    "Identity": nn.Identity,
    "Dropout": lambda: nn.Dropout(0.5).eval(),
}


def _use_twice(net: Aliased, h: Tensor, y: Tensor) -> Tensor:
    return net.conv(y) + h


def _change_input_afterwards(net: Aliased, h: Tensor, y: Tensor) -> Tensor:
    z = y.roll(1, -1) * net.gate
    h.add_(0.5)
    return z + h * net.gate.flip(0)


def _change_input_before_use(net: Aliased, h: Tensor, y: Tensor) -> Tensor:
    h.mul_(net.gate)
    return net.conv(y) + h


def _add_to_output(net: Aliased, h: Tensor, y: Tensor) -> Tensor:
    y += 0.5
    return y.roll(1, -1) * net.gate + h


def _use_input_only(net: Aliased, h: Tensor, y: Tensor) -> Tensor:
    return net.conv(h)


# What follows the layer, and the same without operations in place: a function of the layer's output alone
USES: dict[str, tuple[Callable[[Aliased, Tensor, Tensor], Tensor], Callable[[Aliased, Tensor], Tensor]]] = {
    "used twice": (_use_twice, lambda net, a: net.conv(a) + a),
    "changed afterwards": (
        _change_input_afterwards,
        lambda net, a: a.roll(1, -1) * net.gate + (a + 0.5) * net.gate.flip(0),
    ),
    "changed before use": (_change_input_before_use, lambda net, a: net.conv(a * net.gate) + a * net.gate),
    "added to": (_add_to_output, lambda net, a: (a + 0.5).roll(1, -1) * net.gate + (a + 0.5)),
    "output not used": (_use_input_only, lambda net, a: net.conv(a)),
}
CHANGES_INPUT = {"changed afterwards", "changed before use", "added to"}


class Aliased(nn.Module):
    def __init__(self, layer: str, uses: str, of_input: bool = False) -> None:
        super().__init__()
        self.stem = nn.Identity() if of_input else nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layer = LAYERS[layer]()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.fc = nn.Linear(CHANNELS, 3)
        self.uses = uses
        shuffled(self)
        generator = torch.Generator().manual_seed(9)
        self.register_buffer("gate", torch.randn((CHANNELS, 1, SIDE), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        y = self.layer(h)
        return self.fc(USES[self.uses][0](self, h, y).square().mean((2, 3)))

    def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and the gradient of the scores of `CLASSES`, in a rewrite that shares nothing."""
        with torch.inference_mode(False), torch.enable_grad():
            h = self.stem(x)
            a = (h.relu() if isinstance(self.layer, nn.ReLU) else h.clone()).detach().requires_grad_()
            scores = self.fc(USES[self.uses][1](self, a).square().mean((2, 3)))
            score = scores[range(BATCH), CLASSES].sum()
            return a.detach(), torch.autograd.grad(score, a)[0]


SMALL = torch.randn((BATCH, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(7))
GRIDS = torch.randn((BATCH, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(8))


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g.mean((2, 3), keepdim=True) * a).sum(1).relu()


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g.relu() * a).sum(1).relu()


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("method", "formula", "mode"),
    [*((methods.GradCAM, grad_cam, mode) for mode in MODES), (methods.LayerCAM, layer_cam, "no_grad")],
)
def test_a_layer_that_returns_its_input(method: Any, formula: Any, layer: str, uses: str, mode: str) -> None:
    """The object that the layer returned counts, wherever it is used and by whatever name."""
    model, twin = Aliased(layer, uses), Aliased(layer, uses)
    x = SMALL.clone()
    with method(model, "layer") as extractor, MODES[mode]():
        same_output(model(x), twin(x))
        activation, gradient = twin.by_hand(x)
        (found,) = extractor(CLASSES, normalized=False)
        torch.testing.assert_close(found, formula(activation, gradient), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(extractor.hook_a[0], activation)
        assert torch.equal(x, SMALL)


@every_mode
@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_returns_the_model_s_input(layer: str, uses: str, mode: str) -> None:
    """The user's own tensor is the layer's output: it is what it is without an extractor.

    Where the model changes that tensor in place, an error that says so is an answer as well.
    """
    model, twin = Aliased(layer, uses, of_input=True), Aliased(layer, uses, of_input=True)
    x, y = GRIDS.clone(), GRIDS.clone()
    with methods.GradCAM(model, "layer") as extractor, MODES[mode]():
        expected = twin(y)
        same_output(model(x), expected)
        assert torch.equal(x, y)
        assert not x.requires_grad
        assert x.is_leaf
        activation, gradient = twin.by_hand(GRIDS)
        try:
            (found,) = extractor(CLASSES, normalized=False)
        except RuntimeError as error:
            if (uses not in CHANGES_INPUT and layer != "ReLU") or "in place" not in str(error):
                raise
        else:
            torch.testing.assert_close(found, grad_cam(activation, gradient), rtol=1e-4, atol=1e-6)
        assert torch.equal(x, y)
        assert not x.requires_grad
        assert x.grad is None


@pytest.mark.filterwarnings("ignore:the score of an input as it is")  # edits of AblationCAM do not reach the alias
@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("layer", ["ReLU", "Identity"])
@pytest.mark.parametrize(
    ("name", "mode"), [("EigenCAM", "inference"), ("ScoreCAM", "grad"), ("AblationCAM", "no_grad")]
)
def test_outputs_of_models_with_an_alias(name: str, layer: str, uses: str, mode: str) -> None:
    model, twin = Aliased(layer, uses), Aliased(layer, uses)
    with getattr(methods, name)(model, "layer") as extractor, MODES[mode]():
        same_output(model(SMALL), twin(SMALL))
        assert all(cam.isfinite().all() for cam in extractor(CLASSES))
        same_output(model(-SMALL), twin(-SMALL))
    for parameter in model.parameters():
        assert parameter.grad is None


class AddedTo(nn.Module):
    """The layer's output is changed in place right behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.fc = nn.Linear(CHANNELS, 3)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += 0.5
        y *= 2.0
        return self.fc(y.square().mean((2, 3)))


@every_mode
def test_the_output_is_changed_in_place_right_behind_the_layer(mode: str) -> None:
    model, twin = AddedTo(), AddedTo()
    with methods.GradCAM(model, "layer") as extractor, MODES[mode]():
        same_output(model(SMALL), twin(SMALL))
        (found,) = extractor(CLASSES, normalized=False)
        with torch.inference_mode(False), torch.enable_grad():
            a = twin.layer(SMALL).detach().requires_grad_()
            scores = twin.fc(((a + 0.5) * 2).square().mean((2, 3)))
            (gradient,) = torch.autograd.grad(scores[range(BATCH), CLASSES].sum(), a)
        torch.testing.assert_close(found, grad_cam(a.detach(), gradient), rtol=1e-4, atol=1e-6)


class Remembering(nn.Conv2d):
    """A layer that keeps what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


class Flat(nn.Conv2d):
    """A layer that returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(1, 0).movedim(0, 1)


class Collecting(nn.Module):
    """A later layer reads the output of `layer` from who has kept it: a hook, as in many libraries, or the layer."""

    def __init__(self, keeper: str, uses: str, returns: str = "a tensor") -> None:
        super().__init__()
        kind = Remembering if keeper == "attribute" else Flat if returns == "a view" else nn.Conv2d
        inner = kind(3, CHANNELS, 3, padding=1)
        self.layer = nn.Sequential(nn.Identity(), inner)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.fc = nn.Linear(2 * CHANNELS, 3)
        self.uses = uses
        shuffled(self)
        self.found: dict[str, Tensor] = {}
        self.seen: dict[str, Any] = {}
        if keeper == "hook":
            self.layer.register_forward_hook(self.keep)
        if keeper == "inner hook":
            inner.register_forward_hook(self.keep)

    def keep(self, _layer: nn.Module, _args: Any, output: Tensor) -> None:
        self.found["kept"] = output
        self.seen["in the hook"] = output.sum().item()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.uses == "changed behind the layer":
            y += 0.5
        kept = self.layer[1].kept if isinstance(self.layer[1], Remembering) else self.found["kept"]
        if self.uses == "added to":
            kept += 0.5
        return self.fc(torch.cat([self.conv(y).square().mean((2, 3)), kept.sigmoid().mean((2, 3))], 1))

    def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and the gradient of the scores of `CLASSES`, in a rewrite that shares nothing."""
        with torch.inference_mode(False), torch.enable_grad():
            a = self.layer[1](x).detach().requires_grad_()
            y = a if self.uses == "read" else a + 0.5
            read = torch.cat([self.conv(y).square().mean((2, 3)), y.sigmoid().mean((2, 3))], 1)
            return a.detach(), torch.autograd.grad(self.fc(read)[range(BATCH), CLASSES].sum(), a)[0]


@pytest.mark.parametrize("mode", [*MODES, "frozen"])
@pytest.mark.parametrize(
    ("uses", "returns"),
    [("read", "a tensor"), ("changed behind the layer", "a tensor"), ("added to", "a tensor"), ("read", "a view")],
)
@pytest.mark.parametrize("keeper", ["hook", "inner hook", "attribute"])
@pytest.mark.parametrize("number", [1, 2])
def test_who_keeps_the_output_for_a_later_layer_uses_it_with_the_graph(
    keeper: str, uses: str, returns: str, mode: str, number: int
) -> None:
    model, twin = Collecting(keeper, uses, returns), Collecting(keeper, uses, returns)
    model.requires_grad_(mode != "frozen")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    batches = SMALL, -SMALL
    with contextlib.ExitStack() as stack:
        extractors = [stack.enter_context(methods.GradCAM(model, "layer")) for _ in range(number)]
        stack.enter_context(MODES.get(mode, torch.enable_grad)())
        for x in batches:
            same_output(model(x), twin(x))
            for name, kept in model.found.items():
                assert torch.equal(kept, twin.found[name])
            assert model.seen == twin.seen
            if mode in {"no_grad", "inference"}:  # what is kept can be read as without an extractor
                assert not any(kept.requires_grad for kept in (*model.found.values(), *attributes_kept(model)))
            activation, gradient = twin.by_hand(x)
            for extractor in extractors:
                (found,) = extractor(CLASSES, normalized=False, retain_graph=True)
                torch.testing.assert_close(found, grad_cam(activation, gradient), rtol=1e-4, atol=1e-6)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def attributes_kept(model: Collecting) -> list[Tensor]:
    return [model.layer[1].kept] if isinstance(model.layer[1], Remembering) else []


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMpp", "LayerCAM", "XGradCAM", "ShapleyCAM", "EigenGradCAM"])
def test_a_kept_output_counts_for_every_gradient_method(name: str) -> None:
    """The maps are those of a pass with gradients, where nothing is handed on in another's place."""
    maps = {}
    for mode in ("grad", "no_grad"):
        model = Collecting("hook", "changed behind the layer")
        with getattr(methods, name)(model, "layer") as extractor, MODES[mode]():
            model(SMALL)
            maps[mode] = extractor(CLASSES, normalized=False)
    close(maps["no_grad"], maps["grad"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_a_layer_returns_stays_one(mode: str, frozen: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.rand(BATCH, CHANNELS, SIDE, SIDE), requires_grad=not frozen)
            self.register_buffer("shift", torch.rand(BATCH, CHANNELS, SIDE, SIDE))
            self.conv, self.fc = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 3)
            self.drop, self.keep = nn.Dropout(), nn.Identity()
            self.requires_grad_(not frozen).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) * self.drop(self.gate) + self.keep(self.shift)).mean((2, 3)))

    model = Gated()
    gate, shift = model.gate, model.shift
    with methods.GradCAM(model, ["drop", "keep"], reshape_transform=lambda t: t) as extractor, MODES[mode]():
        model(SMALL)
        assert all(cam.isfinite().all() for cam in extractor(CLASSES, retain_graph=True))
    assert model.gate is gate
    assert model.shift is shift
    assert gate.is_leaf
    assert gate.requires_grad is not frozen
    assert not shift.requires_grad


# Torch's fast paths of attention --------------------------------------------------------------------------------------

WIDTH = 16


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` between two layers with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.behind = nn.Linear(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.behind(x + attended).tanh().mean(1))


class Encoder(nn.Module):
    """torch's encoder layers between two layers with positions."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, activation="gelu", batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.behind = nn.Linear(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.patches(x).flatten(2).mT)
        return self.fc(self.behind(x).tanh().mean(1))


WITH_ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": PlainAttention,
    "TransformerEncoder": Encoder,
    "norm first": partial(Encoder, norm_first=True),
}
LAYERS_OF = {
    "MultiheadAttention": ["patches", "attention", "behind"],
    "TransformerEncoder": ["patches", "encoder.layers.0", "encoder.layers.1.norm1", "encoder", "behind"],
    "norm first": ["patches", "encoder.layers.1.linear2", "encoder.layers.1"],
}


def attending(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return shuffled(WITH_ATTENTION[kind]())


def output_in_another_thread(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    found: list[Tensor] = []

    def call() -> None:
        with MODES[mode]():
            found.append(model(x))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def check_attention(make: Callable[[nn.Module], Any], kind: str, mode: str) -> None:
    model, twin, other = (attending(kind) for _ in range(3))
    x = image(3, 2, 16)
    with torch.no_grad():
        expected = twin(x)
    assert not torch.equal(expected, twin(x)), "without its own path, this model shows nothing"
    with make(other) as reference:
        other(x)
        maps = reference(CLASSES)
    with make(model) as extractor:
        with MODES[mode]():
            same_output(model(x), expected)
            close(extractor(CLASSES), maps, 1e-4)
            same_output(model(x), expected)
        same_output(output_in_another_thread(model, x, mode), expected)
    with MODES[mode]():
        same_output(model(x), expected)


@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, layers in LAYERS_OF.items() for layer in layers])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("GradCAM", "no_grad"), ("GradCAM", "inference"), ("EigenCAM", "inference"), ("AblationCAM", "no_grad")],
)
def test_fast_paths_of_attention(name: str, kind: str, layer: str, mode: str) -> None:
    check_attention(lambda model: getattr(methods, name)(model, layer), kind, mode)


@without_gradients
@pytest.mark.parametrize("name", ["LeGrad", "AttentionRollout"])
@pytest.mark.parametrize("kind", ["TransformerEncoder", "norm first"])
def test_fast_paths_of_attention_that_is_read(kind: str, name: str, mode: str) -> None:
    options = {"prefix_tokens": 0, "score_projection": lambda tokens: tokens.mean(1)} if name == "LeGrad" else {}
    blocks = ["encoder.layers.0", "encoder.layers.1"]
    if name == "AttentionRollout":
        options = {"prefix_tokens": 0}
    check_attention(lambda model: getattr(methods, name)(model, blocks, **options), kind, mode)


# Scores that are not the recorded output ------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda scores: scores.softmax(1),
    "a difference": lambda scores: scores - scores.flip(1),
    "a multiple": lambda scores: -2.0 * scores,
    "classes in another order": lambda scores: scores[:, [2, 0, 1]],
    "a slice of the classes": lambda scores: scores[:, 1:],
    "a slice of the samples": lambda scores: scores[:1],
    "samples in another order": lambda scores: scores.flip(0),
    "a clone": lambda scores: scores.clone(),
    "detached": lambda scores: scores.detach(),
    "detached probabilities": lambda scores: scores.detach().softmax(1),
    "another type": lambda scores: scores.double(),
}


class Changed(Net):
    """A net whose output is what a function makes of that of `Net`."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = CHANGES[change]

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))


@cache
def maps_of_changed(name: str, change: str) -> list[Tensor] | None:
    """Return the maps of the scores as they were given; None where there is not one score for each sample."""
    if change == "a slice of the samples":
        return None
    of_output = change in {"detached", "samples in another order"}  # the scores of a class are the same ones
    model = made(Net) if of_output else made(partial(Changed, change.removeprefix("detached ")))
    with METHODS[name](model) as extractor:
        model(X1)
        return extractor(1)


@every_mode
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM"])
def test_scores_that_are_not_the_output_are_honoured_or_refused(name: str, change: str, mode: str) -> None:
    with METHODS[name](made(Net)) as extractor, MODES[mode]():
        scores = CHANGES[change](extractor.model(X1))
        expected = maps_of_changed(name, change)
        try:
            found = extractor(1, scores)
        except (RuntimeError, ValueError) as error:
            if "scores" not in str(error):
                raise
            return
        assert expected is not None, "explained, though the samples are not those of the pass"
        close(found, expected)


@every_mode
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "SmoothGradCAMpp", "LeGrad"])
@pytest.mark.parametrize("source", ["an earlier pass", "a part of the model", "another model"])
def test_scores_of_something_else(source: str, name: str, mode: str) -> None:
    kind = Transformer if name in READS_ATTENTION else Net
    model, other = made(kind), made(kind)
    with METHODS[name](made(kind)) as reference:
        reference.model(X1)
        expected = reference(1)
    with METHODS[name](model) as extractor, MODES[mode]():
        scores = model(X1)
        if source == "an earlier pass":
            model(X2)
        else:
            model(X2)
            scores = (model.forward if source == "a part of the model" else other)(X1)
        try:
            found = extractor(1, scores)
        except (RuntimeError, ValueError) as error:
            if "scores" not in str(error):
                raise
            return
        close(found, expected)  # those of X2 are no answer to a question about X1


@every_mode
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM"])
def test_the_output_itself_is_taken(name: str, mode: str) -> None:
    """As it came, under another name, detached, or moved through a container."""
    with METHODS[name](made(Net)) as extractor, MODES[mode]():
        scores = extractor.model(X1)
        keep = {"retain_graph": True} if name == "GradCAM" else {}
        expected = extractor(1, **keep)
        for given in (scores, scores.detach(), [scores][0]):
            close(extractor(1, given, **keep), expected)


# Distributed training -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@without_gradients
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM"])
def test_maps_between_two_steps_of_distributed_training(name: str, whole: bool, mode: str) -> None:
    """``whole``: whether the extractor is on the wrapped model or on the one inside."""

    def train(watch: bool) -> dict[str, Tensor]:
        model = nn.parallel.DistributedDataParallel(made(Net))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched = model if whole else model.module
        layer = "module.block2" if whole else "block2"
        extractor = getattr(methods, name)(watched, layer) if watch else None
        torch.manual_seed(0)
        for step in range(3):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(X1), torch.tensor([0, 1])).backward()
            optimizer.step()
            model.eval()
            with MODES[mode]():
                scores = (watched if step == 1 else model)(X2)
                if extractor is not None:
                    assert all(cam.isfinite().all() for cam in extractor(CLASSES, scores))
                assert not scores.requires_grad
        return copy.deepcopy(model.state_dict())

    plain, watched = train(False), train(True)
    assert plain.keys() == watched.keys()
    for key, value in plain.items():
        assert torch.equal(watched[key], value), key


# Copies of a model that is being explained ----------------------------------------------------------------------------


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [deep_copied, pickled, saved]


@pytest.mark.parametrize(
    ("name", "mode", "copied_by"),
    [
        *((name, mode, by) for name in METHODS for mode, by in [("grad", deep_copied), ("no_grad", pickled)]),
        *((name, "no_grad", saved) for name in ("GradCAM", "ScoreCAM", "AblationCAM", "LeGrad")),
        ("GradCAM", "inference", deep_copied),
    ],
)
def test_a_copy_of_a_model_with_a_live_extractor(name: str, mode: str, copied_by: Any) -> None:
    kind = Transformer if name in READS_ATTENTION else Net
    model, twin = made(kind), made(kind)
    extractor = METHODS[name](model)
    with MODES[mode]():
        model(X1)
    copied = copied_by(model)
    with MODES[mode]():
        same_output(copied(X2), twin(X2))
        found = extractor(CLASSES)  # still those of the pass on X1
        with METHODS[name](twin) as reference:
            twin(X1)
            expected = reference(CLASSES)
        close(found, expected)
        with METHODS[name](copied) as another:
            same_output(copied(X1), twin(X1))
            close(another(CLASSES), expected)
    again = weakref.ref(extractor)
    del extractor
    assert again() is None, "the copy holds the extractor"
    same_output(copied(X2), twin(X2))
    assert modes()["grad"]


@pytest.mark.parametrize("copied_by", COPIES)
def test_a_copy_is_made_while_no_extractor_lives(copied_by: Any) -> None:
    """Copies of copies, of a model whose extractor is long gone."""
    model, twin = made(Net), made(Net)
    extractor = METHODS["GradCAM"](model)
    model(X1)
    copied = copied_by(model)
    del extractor, model
    same_output(copied_by(copied)(X2), twin(X2))


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_takes_no_recorded_tensors_along(name: str) -> None:
    kind = Transformer if name in READS_ATTENTION else Net
    model = made(kind)
    size = len(pickle.dumps(model))
    extractor = METHODS[name](model)
    model(image(1, 1, 24))  # the input alone has 6,912 bytes, what a layer of a `Net` returns has 9,216
    extractor(0)
    assert len(pickle.dumps(model)) - size < 4000


def build_sequential() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return weighted(model)


SEQUENTIAL: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": lambda model: methods.GradCAM(model, "2"),
    "CAM": lambda model: methods.CAM(model, "2", fc_layer="6"),
    "EigenCAM": lambda model: methods.EigenCAM(model, "2"),
    "ScoreCAM": lambda model: methods.ScoreCAM(model, "2"),
    "AblationCAM": lambda model: methods.AblationCAM(model, "2"),
    "ReciproCAM": lambda model: methods.ReciproCAM(model, "2"),
    "AugmentedCAM": lambda model: methods.AugmentedCAM(model, "2"),
    "GuidedBackprop": methods.GuidedBackprop,
    "FullGrad": methods.FullGrad,
}


def test_copies_load_where_torchcam_is_not_installed(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        expected = build_sequential()(X1).detach()
        extractors = []
        for name, make in SEQUENTIAL.items():
            model = build_sequential()
            extractors.append(make(model))
            model(X1)
            torch.save(model, tmp_path / f"{name}.saved")
            (tmp_path / f"{name}.pickled").write_bytes(pickle.dumps(model))
        vit_extractors, vit_expected = save_transformers(tmp_path)
    torch.save({"input": X1, "output": expected, "vit": vit_expected}, tmp_path / "expected")
    script = """
        import pickle, sys
        from pathlib import Path
        sys.modules["torchcam"] = None  # no import of it succeeds
        import torch
        folder = Path(sys.argv[1])
        expected = torch.load(folder / "expected")
        count = 0
        for path in sorted(folder.iterdir()):
            if path.name == "expected":
                continue
            try:
                if path.suffix == ".saved":
                    model = torch.load(path, weights_only=False)
                else:
                    model = pickle.loads(path.read_bytes())
                vit = path.name.startswith("vit")  # whose fused kernels give another output without gradients
                right = expected["vit" if vit else "output"]
                for mode in (torch.enable_grad, *(() if vit else (torch.no_grad, torch.inference_mode))):
                    with mode():
                        assert torch.equal(model(expected["input"]), right), "another output"
            except Exception as error:
                print(path.name, type(error).__name__, error)
            count += 1
        assert "torchcam" not in [name for name, module in sys.modules.items() if module is not None]
        print("loaded", count)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    count = 2 * len(extractors) + len(vit_extractors)
    assert (done.returncode, done.stdout) == (0, f"loaded {count}\n"), done.stdout + done.stderr


def save_transformers(folder: Path) -> tuple[list[Any], Tensor]:
    """Save torchvision's vision transformer with extractors that read its attention."""
    from torchvision.models import VisionTransformer

    def build() -> nn.Module:
        return shuffled(VisionTransformer(12, 4, 2, 2, 8, 12, num_classes=3))

    extractors: list[Any] = []
    for name in sorted(READS_ATTENTION):
        model = build()
        layers = [] if name == "TransformerAttribution" else [list(model.encoder.layers)]
        extractors.append(getattr(methods, name)(model, *layers))
        model(X1)
        torch.save(model, folder / f"vit {name}.saved")
    return extractors, build()(X1).detach()
