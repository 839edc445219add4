"""What models and their callers do that is seldom, and that an extractor must neither change nor misread."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.methods_under_test import METHODS, READS_ATTENTION, Net
from tests.models import shuffled
from tests.snapshots import MODES
from torchcam import methods

RUN_AGAIN = ["ScoreCAM", "AblationCAM", "ReciproCAM", "SmoothGradCAMpp", "AugmentedCAM", "GuidedBackprop", "FullGrad"]
AT_A_LAYER = ["GuidedGradCAM", "SmoothGradCAMpp", "AugmentedCAM", "SESS"]
REPEATED = ["GuidedBackprop", "FullGrad", *AT_A_LAYER]
X = torch.rand((2, 3, 12, 12), generator=torch.Generator().manual_seed(3))

every_mode = pytest.mark.parametrize("mode", MODES)
without_gradients = pytest.mark.parametrize("mode", ["no_grad", "inference"])


def made(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    model = kind().eval()
    shuffled(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # no map is empty
    return model


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for cam, other in zip(found, expected, strict=True):
        torch.testing.assert_close(cam, other, rtol=1e-4, atol=1e-5)


# What models hold -----------------------------------------------------------------------------------------------------


def patched(model: Any) -> Any:
    """Give the model and two modules of it a `forward` that holds modules by their names, as many recipes do."""
    first = model.block1.forward

    def block1(x: Tensor) -> Tensor:
        return first(x)

    def closed(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor, *, scale: float = 1.0) -> Tensor:
            return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding) * scale

        return forward

    def whole(x: Tensor) -> Tensor:
        return type(model).forward(model, x)

    model.block1.forward, model.block2.forward, model.forward = block1, closed(model.block2), whole
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RUN_AGAIN)
def test_a_forward_that_holds_modules_runs_those_of_the_replica(name: str, training: bool) -> None:
    model, plain = patched(made()), made()
    for net in (model, plain):
        net.bn.train(training)
    with METHODS[name](model) as extractor, METHODS[name](plain) as reference, torch.no_grad():
        assert torch.equal(model(X), plain(X))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        close(extractor([0, 2]), reference([0, 2]))
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert torch.equal(model(X), plain(X))


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.histogram = np.zeros(3)
        self.kinds: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.histogram += 1
        self.kinds["calls"] += 1
        return super().forward(x)


@pytest.mark.parametrize("name", RUN_AGAIN)
def test_arrays_and_counters_of_modules_are_left_alone(name: str) -> None:
    model = made(Counting)
    with METHODS[name](model) as extractor, torch.no_grad():
        model(X)
        extractor([0, 2])
    assert model.histogram.tolist() == [1, 1, 1]
    assert model.kinds == {"calls": 1}


class Logging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, log: list[Tensor] | None = None) -> Tensor:
        scores = super().forward(x)
        self.seen.append(scores)
        if log is not None:
            log.append(scores)
            scores = scores * len(log)
        return scores


@without_gradients
def test_a_list_of_a_module_stays_the_same_object(mode: str) -> None:
    model = made(Logging)
    seen = model.seen
    with methods.GradCAM(model, "block2"), MODES[mode]():
        scores = model(X)
    assert model.seen is seen
    assert torch.equal(seen[0], scores)
    assert not seen[0].requires_grad


@every_mode
@pytest.mark.parametrize("name", ["GradCAM", *RUN_AGAIN])
def test_a_list_of_the_caller_s_gets_what_the_model_adds(name: str, mode: str) -> None:
    """Passes that are repeated get the list as it was, and add nothing to that of the caller."""
    model, plain = made(Logging), made()
    log: list[Tensor] = []
    with METHODS[name](model) as extractor, METHODS[name](plain) as reference, MODES[mode]():
        assert torch.equal(model(X, log), plain(X))
        assert len(log) == 1
        assert log[0].requires_grad is (mode == "grad")
        close(extractor([0, 2]), reference([0, 2]))
    assert len(log) == 1


@without_gradients
def test_tensors_in_a_list_of_the_caller_s_keep_their_graph(mode: str) -> None:
    first = 2 * X.clone().requires_grad_()
    log = [first]
    model = made(Logging)
    with methods.GradCAM(model, "block2"), MODES[mode]():
        model(X, log)
    assert log[0] is first
    assert first.requires_grad
    assert not log[1].requires_grad


# Ways around a layer's output -----------------------------------------------------------------------------------------


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Layer(nn.Module):
    """Returns what it is given, by a keyword or in an object; a view of it; or several tensors of one computation."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, given: Any = None, *, held: Any = None) -> Any:
        if self.way == "a keyword":
            return held.relu_()
        if self.way == "an object":
            return given.value
        if self.way == "an earlier use":
            return given
        if self.way == "a view":
            return given[:, :]
        output = given.tanh()
        if self.way == "a second tensor":
            return output, 2 * output.mean((2, 3))
        return (output, output.flatten(2)) if self.way == "a second view" else {"first": output, "same": output}


class Around(nn.Module):
    """Uses the output of its layer, and what else leads to it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.layer = nn.Conv2d(3, 4, 3, padding=1), Layer(way)
        self.conv, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        early = h.sigmoid().mean((2, 3))
        given = {"held": h} if self.way == "a keyword" else None
        y = self.layer(**given) if given else self.layer(Holder(h) if self.way == "an object" else h)
        if isinstance(y, Tensor):
            return self.read(y, early if self.way == "an earlier use" else h)
        y, other = y.values() if isinstance(y, dict) else y
        return self.read(y, other.unflatten(2, y.shape[2:]) if other.ndim == 3 else other)

    def read(self, y: Tensor, other: Tensor) -> Tensor:
        other = other if other.ndim == 2 else other.sigmoid().mean((2, 3))
        return self.fc(self.conv(y).square().mean((2, 3)) + other)

    def by_hand(self, x: Tensor) -> Tensor:
        """HiResCAM without its ReLU, of class 1, in a rewrite where the layer's output is a leaf."""
        with torch.inference_mode(False), torch.enable_grad():
            h = self.stem(x).detach()
            given = {"an object", "a view", "an earlier use"}
            a = h.relu() if self.way == "a keyword" else h if self.way in given else h.tanh()
            a = a.clone().requires_grad_()
            other = h if self.way == "a view" else 2 * a.mean((2, 3)) if self.way == "a second tensor" else a
            (gradient,) = torch.autograd.grad(self.read(a, other)[:, 1].sum(), a)
            return (gradient * a).sum(1).detach()


WAYS = ["a keyword", "an object", "an earlier use", "a view", "a second tensor", "a second view", "the same twice"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("mode", [*MODES, "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_from_the_output_to_the_score_counts(way: str, mode: str, number: int) -> None:
    model, twin = Around(way), Around(way)
    model.requires_grad_(mode != "frozen")
    with contextlib.ExitStack() as stack:
        extractors = [stack.enter_context(methods.HiResCAM(model, "layer")) for _ in range(number)]
        stack.enter_context(MODES.get(mode, torch.enable_grad)())
        assert torch.equal(model(X), twin(X))
        for extractor in extractors:
            (found,) = extractor(1, normalized=False, relu=False, retain_graph=True)
            torch.testing.assert_close(found, twin.by_hand(X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["GradCAMpp", "ShapleyCAM", "EigenGradCAM", "GroupCAM", "GuidedGradCAM", "FinerCAM"])
@pytest.mark.parametrize("way", ["a keyword", "a view", "a second tensor"])
@pytest.mark.filterwarnings("ignore:.*activations of both signs")
def test_every_way_counts_for_every_gradient_method(way: str, name: str) -> None:
    maps = {}
    for mode in ("grad", "no_grad"):
        with getattr(methods, name)(Around(way), "layer") as extractor, MODES[mode]():
            extractor.model(X)
            options = {"targets": Softmax()} if name == "ShapleyCAM" else {"class_idx": 1}
            maps[mode] = extractor(**options, normalized=False)
    close(maps["no_grad"], maps["grad"])


@pytest.mark.parametrize("way", ["a view", "a second tensor"])
def test_every_way_counts_for_several_classes(way: str) -> None:
    with methods.HiResCAM(Around(way), "layer") as extractor, torch.no_grad():
        extractor.model(X)
        (several,) = extractor([[0, 1], [2, 1]])
        for column, classes in enumerate(([0, 2], [1, 1])):
            extractor.model(X)
            torch.testing.assert_close(several[:, column], extractor(classes)[0], rtol=1e-4, atol=1e-5)


class Softmax:
    """A target with a curvature."""

    def __call__(self, output: Tensor) -> Tensor:
        return output.softmax(0)[1]


class Shifted(Around):
    """Changes a view of what the layer was given in place."""

    def read(self, y: Tensor, other: Tensor) -> Tensor:
        y += 0.5
        return super().read(y, other)


@pytest.mark.parametrize("mode", [*MODES, "frozen"])
def test_a_view_that_is_changed_in_place_is_no_other_tensor(mode: str) -> None:
    """A view has no gradient of its own then: that is an error with gradients, and the same without."""
    model, twin = Shifted("a view"), Shifted("a view")
    model.requires_grad_(mode != "frozen")
    with methods.GradCAM(model, "layer") as extractor, MODES.get(mode, torch.enable_grad)():
        assert torch.equal(model(X), twin(X))
        with pytest.raises(RuntimeError, match="not connected to every target layer"):
            extractor(1)


@pytest.mark.parametrize("way", ["a view", "a second tensor"])
def test_a_second_pass_that_differs_gives_no_map(way: str) -> None:
    """What it takes a second pass to explain is refused where that pass gives another score, in training mode say."""
    model = Around(way)
    model.stem = nn.Sequential(model.stem, nn.BatchNorm2d(4)).train()
    with methods.GradCAM(model, "layer") as extractor:
        with torch.no_grad():
            model(X)
            with pytest.raises(RuntimeError, match="run the forward pass with gradients on"):
                extractor(1)
        model(X.clone().requires_grad_())
        assert extractor(1)[0].isfinite().all()


class Settings(Mapping[str, Any]):
    """Can neither be changed nor copied."""

    def __init__(self, **values: Any) -> None:
        self.values_by_name = values

    def __getitem__(self, name: str) -> Any:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __copy__(self) -> NoReturn:
        raise AssertionError


class Configured(Net):
    def forward(self, x: Tensor, settings: Settings) -> Tensor:
        assert isinstance(settings, Settings)
        return super().forward(x) * settings["scale"]


@every_mode
def test_a_mapping_that_cannot_be_copied_is_handed_through(mode: str) -> None:
    model, settings = made(Configured), Settings(scale=2.0, options=torch.zeros(3))
    with methods.GradCAM(model, "block2") as extractor, MODES[mode]():
        model(X, settings)
        assert extractor(1)[0].isfinite().all()


# Who calls ------------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[nn.Module], Tensor]] = {
    "vmap": lambda model: torch.vmap(lambda x: model(x[None])[0], randomness="same")(X),
    "jvp": lambda model: torch.func.jvp(model, (X,), (X.roll(1, 3),))[1],
    "jacrev": lambda model: torch.func.jacrev(model, chunk_size=None)(X[:1]),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(X),
}


class Smooth(nn.Module):
    """No buffer is changed in place, and nothing is drawn: transforms forbid both."""

    def __init__(self) -> None:
        super().__init__()
        self.block2, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(x).sigmoid().mean((2, 3)))


@every_mode
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own
def test_transforms_of_torch_func_go_on_as_without_an_extractor(transform: str, mode: str) -> None:
    if mode == "inference" and transform != "vmap":
        pytest.skip("torch differentiates nothing in inference mode")
    model = made(Smooth)
    with MODES[mode]():
        expected = TRANSFORMS[transform](model)
        with methods.GradCAM(model, "block2") as extractor, methods.ScoreCAM(model, "block2"):
            (before,) = (extractor(1) for _ in [model(X)])
            model(X)
            assert torch.equal(TRANSFORMS[transform](model), expected)
            close(extractor(1), before)  # of the last pass


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own
def test_forward_mode_differentiation_goes_on(mode: str, frozen: bool) -> None:
    model = made(Smooth).requires_grad_(not frozen)

    def tangent() -> Tensor:
        with forward_ad.dual_level(), MODES[mode]():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.roll(1, 3)))).tangent

    expected = tangent()
    with methods.GradCAM(model, "block2"):
        assert torch.equal(tangent(), expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.fc = nn.Conv2d(3, 8, 3), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, (last, _) = self.lstm(self.conv(x).mean(3).mT)
        return self.fc(rows + last[0].unsqueeze(1)).flatten(1)


@without_gradients
def test_an_lstm_behind_the_layer_returns_what_it_returns_without_an_extractor(mode: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent().eval()
    with methods.GradCAM(model, "conv") as extractor:
        model(X)
        expected = extractor(1)
        with MODES[mode]():
            extractor.disable_hooks()
            scores = model(X)
            extractor.enable_hooks()
            assert torch.equal(model(X), scores)
            close(extractor(1), expected)


def test_a_shallow_copy_of_the_model_runs_its_own_modules() -> None:
    model = made(Smooth)
    with methods.GradCAM(model, "block2"):
        copied = object.__new__(Smooth)
        vars(copied).update(vars(model))
        copied._modules = {**model._modules, "fc": nn.Linear(4, 3)}
        expected = copied.fc(copied.block2(X).sigmoid().mean((2, 3)))
        assert torch.equal(copied(X), expected)
    assert torch.equal(copied(X), expected)


class Unfit(Smooth):
    """Cannot run with gradients."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        scores.numpy()
        return scores


def test_a_model_that_cannot_run_with_gradients_says_who_turned_them_on() -> None:
    model = made(Unfit)
    with methods.GradCAM(model, "block2") as extractor, torch.no_grad():
        with pytest.raises(RuntimeError) as caught:
            model(X)
        assert "turned gradients on" in caught.value.__notes__[0]
        extractor.disable_hooks()
        model(X)
    with pytest.raises(RuntimeError) as caught:
        model(X)
    assert not hasattr(caught.value, "__notes__")
    model.fc = nn.Linear(5, 3)  # an error of another kind is the model's own
    with methods.GradCAM(model, "block2"), torch.no_grad(), pytest.raises(RuntimeError) as caught:
        model(X)
    assert not hasattr(caught.value, "__notes__")


# Scores ---------------------------------------------------------------------------------------------------------------


@without_gradients
@pytest.mark.parametrize("name", ["GradCAM", "FinerCAM", "LayerCAM"])
def test_an_output_that_was_changed_in_place_is_refused(name: str, mode: str) -> None:
    model = made(Smooth)
    with getattr(methods, name)(model, "block2") as extractor, MODES[mode]():
        scores = model(X)
        scores.mul_(-1)
        for given in (scores, None):
            with pytest.raises(RuntimeError, match="modified in place"):
                extractor(1, given)


def test_an_output_that_was_changed_in_place_with_its_graph_is_explained() -> None:
    model = made(Smooth)
    with methods.HiResCAM(model, "block2") as extractor:
        expected = extractor(1, -model(X), normalized=False)
        scores = model(X)
        scores.mul_(-1)
        close(extractor(1, scores, normalized=False), expected)


@every_mode
@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM"])
def test_copies_of_scores_with_nan_are_those_scores(name: str, mode: str) -> None:
    model, x = made(Smooth), X.clone()
    x[0, 0, 0, 0] = torch.nan
    with getattr(methods, name)(model, "block2") as extractor, MODES[mode]():
        scores = model(x)
        with pytest.warns(RuntimeWarning, match="NaN"):
            (cam,) = extractor(1, scores.detach().clone())
    assert cam.flatten(1).isnan().all(1).tolist() == [True, False]


def test_backward_hooks_see_plain_gradients_of_several_classes() -> None:
    """One backward pass for all classes would show them tensors that cannot be read, and not be kept."""
    model, seen = made(Smooth), []
    with methods.GradCAM(model, "block2") as extractor:
        model(X)
        expected = extractor([[0, 1], [1, 2]])
        handle = model.fc.register_full_backward_hook(lambda _module, _into, out: seen.append(out[0].sum().item()))
        model(X)
        close(extractor([[0, 1], [1, 2]]), expected)
        handle.remove()
    assert seen == [2.0, 2.0]


# Training mode --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x) + F.softplus(self.conv(x))


@every_mode
@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "ShapleyCAM"])
def test_batch_normalization_that_mixes_samples_is_warned_of(name: str, mode: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4))
    model = shuffled(net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(4, 3))).train()
    make = getattr(methods, name)
    with make(model, "0") as extractor, MODES[mode]():
        model(X)
        with pytest.warns(UserWarning, match="makes the score of a sample depend on all samples"):
            extractor(1)
        model(X)
        model.eval()  # too late for that pass
        with pytest.warns(UserWarning, match="explain one sample at a time"):
            extractor(1)
        model.train()
        model(X[:1])
        extractor(1)
    for layer in ("1", "3"):  # nothing behind them mixes samples
        with make(model, layer) as extractor, MODES[mode]():
            model(X)
            extractor(1)
    bypassed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Residual(), *model[5:]).train()
    with make(bypassed, "2.conv") as extractor, MODES[mode]():
        bypassed(X)
        extractor(1)
    with make(model.eval(), "0") as extractor, MODES[mode]():
        model(X)
        extractor(1)
    model[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with make(model, "0") as extractor, MODES[mode]():
        model(X)
        with pytest.warns(UserWarning, match="statistics of the batch"):
            extractor(1)
        with pytest.raises(RuntimeError, match="second time") as caught:
            extractor(1)
        assert "retain_graph=True" in caught.value.__notes__[0]


# Passes that are repeated ---------------------------------------------------------------------------------------------


class Noisy(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("why", ["random numbers", "other weights", "functional call"])
def test_a_pass_that_does_not_come_again_is_warned_of(why: str, name: str) -> None:
    model = made(Noisy if why == "random numbers" else Smooth)
    options = {"target_layer": "block2"} if name in AT_A_LAYER else {}
    with torch.random.fork_rng(devices=[]), getattr(methods, name)(model, **options) as extractor, torch.no_grad():
        torch.manual_seed(0)
        if why == "functional call":
            torch.func.functional_call(model, {key: 2 * value for key, value in model.named_parameters()}, X)
        else:
            model(X)
        if why == "other weights":
            model.fc.weight.data.mul_(2)  # by which no graph notices it
        with pytest.warns(UserWarning, match="not those of the recorded pass"):
            extractor(1)


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM", "FullGrad"])
def test_a_head_that_is_new_since_the_pass_is_warned_of(name: str) -> None:
    """New modules are in training mode, which is no reason not to compare."""
    model = made(Smooth)
    options = {} if name == "FullGrad" else {"target_layer": "block2"}
    with getattr(methods, name)(model, **options) as extractor, torch.no_grad():
        model(X)
        model.fc = shuffled(nn.Linear(4, 3)).train()
        with pytest.warns(UserWarning, match="runs again"):
            extractor(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REPEATED)
def test_a_pass_that_comes_again_is_not(name: str, training: bool) -> None:
    """Warnings are errors; a pass in training mode is repeated in evaluation mode, as is documented."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 3)).train(training)
    with getattr(methods, name)(model, **({"target_layer": "2"} if name in AT_A_LAYER else {})) as extractor:
        model(X)
        assert extractor(1)[0].isfinite().all()


@every_mode
@pytest.mark.parametrize("name", [name for name in METHODS if name not in READS_ATTENTION])
@pytest.mark.filterwarnings("ignore:std_mean")  # of torch, of nothing
def test_an_empty_batch_gives_no_maps(name: str, mode: str) -> None:
    with METHODS[name](made()) as extractor, MODES[mode]():
        extractor.model(X[:0])
        assert all(len(cam) == 0 for cam in extractor(1))


def test_parameters_that_the_first_pass_makes() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))

    with pytest.raises(ValueError, match="run it once before, or name the `target_layer`"):
        methods.GradCAM(lazy(), input_shape=(3, 12, 12))
    model = lazy()
    with methods.GradCAM(model, "0") as extractor, torch.no_grad():
        model(X)
        assert extractor(1)[0].shape == (2, 10, 10)
    assert types.SimpleNamespace(**vars(model[0])).in_channels == 3
