"""Every method, in every situation and on every exit path, leaves the model as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods_under_test import BALANCED, METHODS, READS_ATTENTION, make_input, make_model
from torchcam import methods

SITUATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
WITHOUT_GRADIENT = {"CAM", "ScoreCAM", "SSCAM", "ISCAM", "FinerCAM-ScoreCAM", "AblationCAM", "ReciproCAM"}
ONCE_AGAIN = {"GuidedBackprop", "GuidedGradCAM", "FullGrad"}
USES_THE_MODEL_AGAIN = (
    (WITHOUT_GRADIENT - {"CAM"}) | {"SmoothGradCAMpp", "GroupCAM", "AugmentedCAM", "SESS"} | ONCE_AGAIN
)
CLASS_AGNOSTIC = {name for name in METHODS if getattr(getattr(methods, name, None), "class_agnostic", False)}
KEEPS_A_GRAPH = set(METHODS) - WITHOUT_GRADIENT - CLASS_AGNOSTIC - {"GuidedBackprop", "FullGrad"}

# Variants of each sample whose activation is edited, at each layer: the channels, or the positions
EDITED_ROWS = {"AblationCAM": [4, 4], "ReciproCAM": [12 * 12, 6 * 6]}

every_method = pytest.mark.parametrize("name", METHODS)
every_situation = pytest.mark.parametrize("situation", SITUATIONS)


def test_the_list_is_complete() -> None:
    classes = {name for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    assert classes - {"DeepFeatureFactorization"} == {name.split("-")[0] for name in METHODS}


class Snapshot:
    """Everything about a model, and the global state, that a call must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {
            name: (id(tensor), tensor.detach().clone(), tensor.requires_grad, tensor.grad)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        self.buffers = {name: sorted(module._buffers) for name, module in model.named_modules()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.attributes = {  # but for the wrapper of an extractor, which `count_hooks` counts
            name: sorted(vars(module).keys() - {"_compiled_call_impl"}) for name, module in model.named_modules()
        }
        self.rng = torch.get_rng_state()
        self.cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.modes = _modes()

    def check(self, *, hooks: bool) -> None:
        """Compare with what is there now; ``hooks`` says whether the extractor's are still expected."""
        now = Snapshot(self.model)
        assert now.tensors.keys() == self.tensors.keys()
        for name, (identity, value, requires_grad, grad) in self.tensors.items():
            assert now.tensors[name][0] == identity, name
            assert torch.equal(now.tensors[name][1], value), name
            assert now.tensors[name][2] == requires_grad, name
            assert now.tensors[name][3] is grad, name
        assert now.buffers == self.buffers
        assert now.training == self.training
        assert now.attributes == self.attributes
        assert torch.equal(now.rng, self.rng)
        assert all(torch.equal(a, b) for a, b in zip(now.cuda_rng, self.cuda_rng, strict=True))
        assert now.modes == self.modes
        assert (count_hooks(self.model) > 0) == hooks


def _modes() -> tuple[bool, bool, bool, bool]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def count_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    extra = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    # The wrapper of an extractor around a module's call; without one, it may stay while other threads live.
    wrappers = sum(bool(getattr(module._compiled_call_impl, "members", ())) for module in model.modules())
    return wrappers + sum(len(getattr(module, kind)) for module in model.modules() for kind in (*kinds, *extra))


@contextmanager
def raising(module: nn.Module, after: int = 0) -> Iterator[None]:
    """Let a module raise, from its call number ``after`` on."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ZeroDivisionError("raised on purpose")

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _mixed_training(model: nn.Module) -> nn.Module:
    """Put part of a model in train mode, as someone who fine-tunes with frozen batch norm does."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@every_method
@every_situation
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["eval", "mixed"])
def test_a_call_leaves_no_trace(name: str, situation: str, frozen: bool, mode: str, device: torch.device) -> None:
    model = make_model(name, device).requires_grad_(not frozen)
    if mode == "mixed" and name not in READS_ATTENTION:
        _mixed_training(model)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    torch.manual_seed(0)  # dropout
    with METHODS[name](model) as extractor, SITUATIONS[situation]():
        model(make_input(device))
        before = Snapshot(model)
        for cam in extractor([0, 2]):
            assert cam.flatten(1).amax(1).tolist() == [1, 1] or name == "FinerCAM", "an empty map proves little"
            assert not cam.requires_grad
            assert cam.device == make_input(device).device
        before.check(hooks=True)
    before.modes = _modes()
    before.check(hooks=False)


@every_method
def test_all_situations_give_the_same_maps(name: str, device: torch.device) -> None:
    model = make_model(name, device)
    maps = []
    atol = 1e-5 if name in READS_ATTENTION else 1e-6  # a difference of gradients: rounding shows
    for situation in SITUATIONS.values():
        for frozen in (False, True):
            model.requires_grad_(not frozen)
            with METHODS[name](model) as extractor, situation():
                scores = model(make_input(device))
                maps.append(extractor([0, 2], scores))
                if situation is not torch.enable_grad:
                    assert not scores.requires_grad
    for others in maps[1:]:
        for cam, other in zip(maps[0], others, strict=True):
            torch.testing.assert_close(other, cam, rtol=1e-5, atol=atol)


@every_method
@every_situation
def test_a_bad_argument_leaves_no_trace(name: str, situation: str, device: torch.device) -> None:
    model = make_model(name, device)
    extractor = METHODS[name](model)
    with SITUATIONS[situation]():
        model(make_input(device))
        before = Snapshot(model)
        for error, arguments in [
            (ValueError, {"class_idx": 3}),
            (ValueError, {"class_idx": -1}),
            (ValueError, {"class_idx": [0]}),
            (TypeError, {"class_idx": True}),
            (TypeError, {"class_idx": 1.0}),
            (TypeError, {"class_idx": "cat"}),
            (ValueError, {}),
        ]:
            with nullcontext() if name in CLASS_AGNOSTIC else pytest.raises(error):
                extractor(**arguments)
            before.check(hooks=True)
        with pytest.raises(TypeError, match="no_such_option"):
            extractor(0, no_such_option=1)
        before.check(hooks=True)


@every_method
@every_situation
def test_a_forward_pass_that_raises_leaves_no_trace(name: str, situation: str, device: torch.device) -> None:
    model = make_model(name, device)
    extractor = METHODS[name](model)
    inputs = make_input(device)
    with SITUATIONS[situation]():
        model(inputs)
        modes = _modes()
        with raising(model.get_submodule("block1")), pytest.raises(ZeroDivisionError):
            model(inputs)
        assert _modes() == modes
        with pytest.raises(AssertionError, match=r"no forward pass has reached|did not run .* or was cut short"):
            extractor(0)
        with raising(model), pytest.raises(ZeroDivisionError):
            model(inputs)
        assert _modes() == modes
        assert not model(inputs).isnan().any()
        assert all(cam.isfinite().all() for cam in extractor(0))
    extractor.remove_hooks()
    extractor.remove_hooks()
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "after"), [(n, after) for n in sorted(USES_THE_MODEL_AGAIN) for after in (0, 1)[: 2 - (n in ONCE_AGAIN)]]
)
@every_situation
def test_a_replay_that_raises_leaves_no_trace(name: str, situation: str, after: int, device: torch.device) -> None:
    model = _mixed_training(make_model(name, device))
    extractor = METHODS[name](model)
    with SITUATIONS[situation]():
        model(make_input(device))
        before = Snapshot(model)
        options = {"retain_graph": True} if name in KEEPS_A_GRAPH else {}
        with raising(model.get_submodule("block2"), after), pytest.raises(ZeroDivisionError):
            extractor(0, **options)
        before.check(hooks=True)
        assert all(cam.isfinite().all() for cam in extractor(0))


@every_method
@every_situation
def test_an_exception_inside_the_block_removes_the_hooks(name: str, situation: str, device: torch.device) -> None:
    model = make_model(name, device)

    def stumble() -> None:
        with METHODS[name](model):
            model(make_input(device))
            raise ZeroDivisionError

    with SITUATIONS[situation](), pytest.raises(ZeroDivisionError):
        stumble()
    assert count_hooks(model) == 0
    assert _modes()[:2] == (True, False)


@every_method
@every_situation
@pytest.mark.parametrize("called", [False, True])
def test_a_dropped_extractor_frees_everything(name: str, situation: str, called: bool, device: torch.device) -> None:
    model = make_model(name, device)
    inputs = make_input(device)
    activations = weakrefs_to_outputs(model)
    gc.collect()
    gc.disable()  # reference counts alone must do it
    try:
        with SITUATIONS[situation]():
            extractor = METHODS[name](model)
            scores = model(inputs)
            if called:
                extractor(0, scores)
        references = [weakref.ref(extractor), weakref.ref(inputs), *activations]
        del extractor, inputs, scores
        assert [reference() for reference in references if reference() is not None] == []
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def weakrefs_to_outputs(model: nn.Module, *layers: str) -> list[weakref.ref[Tensor]]:
    """Collect weak references to what the target layers return from now on."""
    references: list[weakref.ref[Tensor]] = []
    for layer in layers or ("block1", "block2"):
        model.get_submodule(layer).register_forward_hook(lambda *a: references.append(weakref.ref(a[-1])))
    return references


@every_method
@every_situation
def test_the_end_of_the_block_frees_everything(name: str, situation: str, device: torch.device) -> None:
    model = make_model(name, device)
    inputs = make_input(device)
    activations = weakrefs_to_outputs(model)
    gc.collect()
    gc.disable()
    try:
        with METHODS[name](model) as extractor:
            with SITUATIONS[situation]():
                scores = model(inputs)
                extractor(0, scores)
            output = weakref.ref(scores)
            inputs_reference = weakref.ref(inputs)
            del inputs, scores
        assert activations
        assert output() is None
        assert inputs_reference() is None
        assert [reference() for reference in activations if reference() is not None] == []
        with pytest.raises(AssertionError, match="no forward pass"):
            extractor(0)
    finally:
        gc.enable()


@every_method
@every_situation
def test_forward_passes_are_counted(name: str, situation: str, device: torch.device) -> None:
    """A method that neither masks nor perturbs inputs costs the user's own forward pass, whatever the grad mode."""
    model = make_model(name, device)
    passes: list[int] = []
    with METHODS[name](model) as extractor, SITUATIONS[situation]():
        model.register_forward_pre_hook(lambda _model, args: passes.append(len(args[0])))
        model(make_input(device))
        extractor([0, 2])
    channels, batch, layers, noises = 4, 2, 2, 2
    masked = {"ScoreCAM": 1, "SSCAM": noises, "ISCAM": noises, "FinerCAM-ScoreCAM": 1}.get(name, 0)
    rows = batch + masked * channels * batch * layers
    rows += bool(masked)  # the first sample as it is, which proves the replay
    if name == "SmoothGradCAMpp":
        rows += noises * batch + 1  # the first sample as it is
    if name == "GroupCAM":
        rows += batch + 2 * batch * layers + 1  # the blurred inputs, two groups, and the first sample as it is
    if name in ONCE_AGAIN:
        rows += batch
    if name == "AugmentedCAM":
        rows += 6 * batch + 1
    if name == "SESS":
        rows += 2 * (1 + 4) * batch + 1  # a window at the first scale, four at the second: their scores, their maps
    if name in EDITED_ROWS:  # the hook must see real rows alone: the whole model runs, without an edit and with each
        rows += sum(batch + batch * count + 1 for count in EDITED_ROWS[name])  # and the first as it is
    assert sum(passes) == rows
    assert max(passes) <= 3


@every_method
def test_training_goes_on_as_if_nothing_had_been_looked_at(name: str, device: torch.device) -> None:
    """Same weights, bit for bit, after steps with and without maps between forward and backward."""

    def train(watch: bool) -> dict[str, Tensor]:
        model = make_model(name, device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        extractor = METHODS[name](model) if watch else None
        for _ in range(3):
            scores = model(make_input(device))
            if extractor is not None:
                options = {"retain_graph": True} if name in KEEPS_A_GRAPH else {}
                extractor([0, 2], scores, **options)
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, torch.tensor([0, 1], device=device)).backward()
            optimizer.step()
        return copy.deepcopy(model.state_dict())

    plain, watched = train(False), train(True)
    for key, value in plain.items():
        assert torch.equal(watched[key], value) or name in READS_ATTENTION, key
        torch.testing.assert_close(watched[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BALANCED)
@every_situation
@pytest.mark.filterwarnings("ignore:.*both signs")
def test_balanced_gradients_keep_the_promises(name: str, situation: str, device: torch.device) -> None:
    """No trace on the model or its graph, no disturbance of its output, and nothing kept."""
    model, inputs = make_model("LeGrad", device), make_input(device)
    with SITUATIONS[situation]():
        expected = model(inputs).detach()
    activations = weakrefs_to_outputs(model, "patches", "block1")
    gc.collect()
    gc.disable()  # reference counts alone must do it
    try:
        with BALANCED[name](model) as extractor, SITUATIONS[situation]():
            scores = model(inputs)
            assert torch.equal(scores, expected)
            before, own = Snapshot(model), gradients_of(scores, model)
            for cam in extractor([0, 2], scores, retain_graph=True, relu=False):
                assert cam.flatten(1).any(1).all() or name in {"GuidedGradCAM", "SESS"}  # whose ReLU is inside
                assert cam.isfinite().all()
                assert not cam.requires_grad
            before.check(hooks=True)
            assert all(map(torch.equal, gradients_of(scores, model), own))
        del scores, cam
        assert activations
        assert [reference() for reference in activations if reference() is not None] == []
    finally:
        gc.enable()


def gradients_of(scores: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    """Differentiate the sum of scores for the parameters; the graph is kept."""
    return torch.autograd.grad(scores.sum(), list(model.parameters()), retain_graph=True) if scores.grad_fn else ()


@every_method
def test_a_modified_input_is_an_error_not_a_wrong_map(name: str, device: torch.device) -> None:
    model = make_model(name, device)
    inputs = make_input(device)
    with METHODS[name](model) as extractor, torch.no_grad():
        model(inputs)
        inputs.zero_()
        if name in USES_THE_MODEL_AGAIN:
            with pytest.raises(RuntimeError, match="modified in place"):
                extractor(0)
        else:
            assert all(cam.isfinite().all() for cam in extractor(0))


@every_method
@every_situation
def test_two_extractors_do_not_disturb_each_other(name: str, situation: str, device: torch.device) -> None:
    model = make_model(name, device)
    inputs = make_input(device)
    other = "LeGrad" if name in READS_ATTENTION else "GradCAM"
    options = {each: {"retain_graph": True} if each in KEEPS_A_GRAPH else {} for each in (name, other)}
    alone = {}
    for each in {name, other}:
        with METHODS[each](model) as extractor, SITUATIONS[situation]():
            alone[each] = extractor([0, 2], model(inputs), **options[each])
    for order in ([name, other], [other, name]):
        first, second = METHODS[order[0]](model), METHODS[order[1]](model)
        with first, second, SITUATIONS[situation]():
            model(inputs)
            for each, extractor in zip(order, (first, second), strict=True):
                for cam, expected in zip(extractor([0, 2], **options[each]), alone[each], strict=True):
                    torch.testing.assert_close(cam, expected, rtol=1e-5, atol=1e-6)


@every_method
def test_broken_samples_get_nan_maps_and_one_warning(name: str, device: torch.device) -> None:
    model = make_model(name, device)
    inputs = make_input(device)
    inputs[1, 0, 3, 3] = torch.inf
    with METHODS[name](model) as extractor:
        scores = model(inputs)
        with pytest.warns(RuntimeWarning, match="block|input|attention") as warned:
            cams = extractor([0, 2], scores)
    assert len(warned) <= 2  # one a layer
    for cam in cams:
        assert cam[0].isfinite().all()
        assert cam[1].isnan().all()


def test_a_keyboard_interrupt_does_not_leave_inference_mode_behind(device: torch.device) -> None:
    model = make_model("GradCAM", device)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    extractor = METHODS["GradCAM"](model)
    handle = model.fc.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        model(make_input(device))
    handle.remove()
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (True, False)
    with torch.inference_mode():
        expected = model(make_input(device))
        assert extractor(0)[0].isfinite().all()
    del extractor
    gc.collect()
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (True, False)
    assert torch.equal(model(make_input(device)), expected)


def test_a_constructor_that_raises_leaves_no_hooks(device: torch.device) -> None:
    model = make_model("GradCAM", device)
    for make in (
        lambda: methods.GradCAM(model, ["block1", "no_such_layer"]),
        lambda: methods.GradCAM(model, ["block1", 3]),
        lambda: methods.ScoreCAM(model, "block1", batch_size=0),
        lambda: methods.SmoothGradCAMpp(model, "block1", num_samples=0),
        lambda: methods.FinerCAM(model, "block1", gamma=float("nan")),
        lambda: methods.LeGrad(model, ["block1"], score_projection=lambda tokens: tokens[:, 0]),
        lambda: methods.GradCAM(model, "block1", no_such_option=1),
    ):
        with pytest.raises((TypeError, ValueError)):
            make()
        assert count_hooks(model) == 0


def test_disabled_hooks_record_nothing(device: torch.device) -> None:
    for name in METHODS:
        model = make_model(name, device)
        with METHODS[name](model) as extractor:
            extractor.disable_hooks()
            model(make_input(device))
            with pytest.raises(AssertionError, match="no forward pass"):
                extractor(0)
            extractor.enable_hooks()
            model(make_input(device))
            assert extractor(0)


def test_a_copied_model_is_none_of_the_extractors_business(device: torch.device) -> None:
    model = make_model("GradCAM", device)
    with METHODS["GradCAM"](model) as extractor:
        scores = model(make_input(device))
        expected = extractor(0, scores, retain_graph=True)[0]
        copied = copy.deepcopy(model)
        assert copied(torch.zeros_like(make_input(device))).grad_fn is not None
        assert torch.equal(extractor(0, scores)[0], expected)


class Cached(nn.Module):
    """Keeps in evaluation mode what it has computed from a parameter, until it is told to train, as some of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        self.cache.clear()
        return super().train(mode)

    def scaled(self) -> Tensor:
        if self.training:
            return self.scale.exp()
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        return self.cache["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).relu() * self.scaled().reshape(-1, 1, 1)).mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_what_models_keep_in_evaluation_mode_is_not_kept_for_them(training: bool, device: torch.device) -> None:
    model, x = Cached().to(device).train(training), torch.rand(2, 3, 8, 8).to(device)
    with methods.ScoreCAM(model, "conv") as extractor:
        model(x)
        before = dict(model.cache)
        extractor(1)
        next(extractor.stream([x]))
        assert model.cache == before
        with torch.no_grad():
            model.scale.zero_()
        model.train()
        (found,) = extractor.stream([x], 1, normalized=False)
    model.eval()
    with methods.ScoreCAM(model, "conv") as extractor:
        model(x)
        torch.testing.assert_close(found, extractor(1, normalized=False))


def test_randomised_weights_are_not_hidden_by_what_a_model_keeps(device: torch.device) -> None:
    from torchcam.metrics.sanity import _parameters_replaced

    model, x = Cached().to(device).eval(), torch.rand(2, 3, 8, 8).to(device)
    with torch.no_grad():
        expected = model(x)
        kept = model.cache["scale"]
        with _parameters_replaced(model) as replace:
            replace(model, torch.Generator(device).manual_seed(0))
            assert (model(x) - expected).abs().amax() > 0.01
            scale = model.scale.exp()
            torch.testing.assert_close(model.scaled(), scale)
        assert model.cache["scale"] is kept
        torch.testing.assert_close(model(x), expected)
