"""An exception of any type, at any place and in any mode, leaves no trace on the model, on torch or on later passes.

Everything is checked while the exception and its traceback are still referenced: no destructor has run yet.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.lines import at_each_line
from tests.models import shuffled
from tests.snapshots import MODES, attributes, check_unchanged, hook_counts, modes, random_state
from torchcam import methods

CLASSES = [0, 2]


def _sound_an_alarm() -> None:
    """Let the handler of a signal raise, as a limit on the time does."""

    def handler(*_: Any) -> None:
        raise TimeoutError("the time is over")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)


ERRORS: dict[str, type[BaseException]] = {
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "alarm": TimeoutError,
}
SOME_ERRORS = ["RuntimeError", "KeyboardInterrupt"]
OTHER_ERRORS = [error for error in ERRORS if error not in SOME_ERRORS]

every_error = pytest.mark.parametrize("error", ERRORS)
some_errors = pytest.mark.parametrize("error", SOME_ERRORS)
every_mode = pytest.mark.parametrize("mode", MODES)


class Trap:
    """Raises where it is set, from the visit of that place with a number on."""

    def __init__(self) -> None:
        self.place: str | None = None

    @contextmanager
    def at(self, place: str, error: str, visit: int = 1) -> Iterator[None]:
        self.place, self.error, self.visits_left = place, error, visit
        try:
            yield
        finally:
            self.place = None

    def visit(self, place: str) -> None:
        if place != self.place:
            return
        self.visits_left -= 1
        if self.visits_left > 0:
            return
        if self.error == "alarm":
            _sound_an_alarm()
        raise ERRORS[self.error]("raised on purpose")


TRAP = Trap()


class Stop(nn.Module):
    """A place in a model where the trap may be set."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        TRAP.visit(self.place)
        return x * 1.0


class Net(nn.Module):
    """A small CNN with a module in training mode, a buffer, attributes and random numbers that every pass changes."""

    target = "layer"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), Stop("before the layer"))
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), Stop("in the layer"), nn.Softplus())
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), Stop("behind the layer"), nn.ReLU())
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.sizes: list[int] = []
        shuffled(self)
        self.dropout.train()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        torch.rand(1)
        return self.fc(self.dropout(self.tail(self.layer(self.stem(x))).mean((2, 3))))


class UsersMode(TorchFunctionMode):
    """A mode of the user's, which is to stay."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Fused self-attention with places before, between and behind its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        TRAP.visit("before attention")
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        TRAP.visit("within attention")
        mixed = F.scaled_dot_product_attention(q, k, v)
        TRAP.visit("behind attention")
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A small vision transformer in the form that timm has made common."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.fc_norm = nn.Identity()
        self.head = nn.Linear(width, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": lambda model: methods.GradCAM(model, "layer"),
    "ShapleyCAM": lambda model: methods.ShapleyCAM(model, "layer"),
    "EigenCAM": lambda model: methods.EigenCAM(model, "layer"),
    "ScoreCAM": lambda model: methods.ScoreCAM(model, "layer", batch_size=3),
    "AblationCAM": lambda model: methods.AblationCAM(model, "layer", batch_size=3),
    "ReciproCAM": lambda model: methods.ReciproCAM(model, "layer", batch_size=16),
    "SmoothGradCAMpp": lambda model: methods.SmoothGradCAMpp(model, "layer", num_samples=2, batch_size=3),
    "AugmentedCAM": lambda model: methods.AugmentedCAM(model, "layer", batch_size=3),
    "GuidedBackprop": methods.GuidedBackprop,
    "FullGrad": methods.FullGrad,
    "LeGrad": lambda model: methods.LeGrad(model, list(model.blocks)),
    "AttentionRollout": lambda model: methods.AttentionRollout(model, list(model.blocks)),
    "TransformerAttribution": methods.TransformerAttribution,
}
READS_ATTENTION = ["LeGrad", "AttentionRollout", "TransformerAttribution"]


def make_model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        return Transformer() if name in READS_ATTENTION else Net()


def image(seed: int) -> Tensor:
    return torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


X1, X2, X3 = image(1), image(2), image(3)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for cam, other in zip(found, expected, strict=True):
        torch.testing.assert_close(cam, other, rtol=1e-5, atol=1e-6)


def run(name: str, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the maps of a fresh extractor."""
    with METHODS[name](model) as extractor:
        scores = model(x)
        return scores, extractor(CLASSES)


@cache
def clean_maps(name: str, mode: str, x: Tensor) -> list[Tensor]:
    """Return the maps of a model that nothing has ever happened to."""
    with torch.inference_mode(False), MODES[mode](), torch.random.fork_rng(devices=[]):  # the model draws numbers
        _, maps = run(name, make_model(name), x)
    return maps


@cache
def clean_gradients(name: str) -> list[Tensor]:
    return gradients_of(make_model(name))


def gradients_of(model: nn.Module) -> list[Tensor]:
    with torch.enable_grad():
        return list(torch.autograd.grad(model(X3).square().sum(), list(model.parameters())))


class Scene:
    """A model with an extractor, a copy of the model that none was ever on, and what was there before."""

    def __init__(self, name: str, mode: str, prepare: Callable[[nn.Module], None] | None = None) -> None:
        self.name = name
        self.mode = mode
        self.model = make_model(name)
        self.twin = make_model(name)
        if prepare is not None:
            prepare(self.model)
            prepare(self.twin)
        self.extractor = METHODS[name](self.model)

    def remember(self) -> None:
        self.modes = modes()
        self.random = random_state()
        self.attributes = attributes(self.model, identity=True)
        self.hooks = hook_counts(self.model)

    def check_untouched(self) -> None:
        """The call of an extractor changes nothing at all."""
        check_unchanged(modes(), self.modes)
        assert random_state() == self.random
        check_unchanged(hook_counts(self.model), self.hooks)
        check_unchanged(attributes(self.model, identity=True), self.attributes)

    def check_as_the_twin(self, random: int) -> None:
        """A forward pass of the user's that was cut short changes what it does without an extractor."""
        check_unchanged(modes(), self.modes)
        assert random_state() == random
        check_unchanged(hook_counts(self.model), self.hooks)
        check_unchanged(attributes(self.model, identity=False), attributes(self.twin, identity=False))

    def run(self, x: Tensor) -> Tensor:
        """A whole pass, on the twin as well: the output is that of the twin, bit for bit."""
        scores = self.model(x)
        expected = self.twin(x)
        assert torch.equal(scores, expected)
        assert scores.requires_grad == expected.requires_grad
        return scores

    def check_later_passes(self) -> None:
        """A fresh extractor, plain calls and training steps know nothing of what has happened."""
        for mode in dict.fromkeys([self.mode, "grad"]):
            with MODES[mode]():
                before = modes()
                scores, found = run(self.name, self.model, X3)
                expected = self.twin(X3)
                assert torch.equal(scores, expected)
                assert scores.requires_grad == expected.requires_grad
                close(found, clean_maps(self.name, mode, X3))
                check_unchanged(modes(), before)
        if torch.is_inference_mode_enabled():
            return
        for gradient, expected in zip(gradients_of(self.model), clean_gradients(self.name), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)

    def check_this_extractor(self, complete: Tensor | None) -> None:
        """The extractor has the last complete pass, on ``complete``, or says that it has none; never a mix."""
        if complete is None:
            with pytest.raises(AssertionError):
                self.extractor(CLASSES)
            return
        try:
            found = self.extractor(CLASSES)
        except (AssertionError, RuntimeError):
            return
        close(found, clean_maps(self.name, self.mode, complete))


def interrupt_a_forward_pass(scene: Scene, place: str, error: str, complete: bool) -> None:
    outside = modes()
    with MODES[scene.mode]():
        if complete:
            scene.run(X1)
        start = torch.get_rng_state()
        with TRAP.at(place, error), pytest.raises(ERRORS[error]):
            scene.twin(X2)
        random = random_state()
        torch.set_rng_state(start)
        scene.remember()
        with TRAP.at(place, error), pytest.raises(ERRORS[error]) as caught:
            scene.model(X2)
        scene.check_as_the_twin(random)
        scene.check_this_extractor(X1 if complete else None)
        check_unchanged(modes(), scene.modes)
        scene.check_later_passes()
        check_unchanged(hook_counts(scene.model), scene.hooks)
        del caught
        check_unchanged(modes(), scene.modes)
        scene.run(X3)
        close(scene.extractor(CLASSES), clean_maps(scene.name, scene.mode, X3))
    check_unchanged(modes(), outside)
    scene.extractor.remove_hooks()
    assert torch.equal(scene.model(X1), scene.twin(X1))


def interrupt_a_call(scene: Scene, place: str, error: str, visit: int = 1, **arguments: Any) -> None:
    """Cut a call of the extractor short; ``arguments`` name what to explain, by default classes."""
    outside = modes()
    with MODES[scene.mode]():
        scene.run(X1)
        scene.remember()
        asked = arguments or {"class_idx": CLASSES}
        with TRAP.at(place, error, visit), pytest.raises(ERRORS[error]) as caught:
            scene.extractor(**asked)
        scene.check_untouched()
        scene.check_this_extractor(X1)
        scene.check_untouched()
        scene.check_later_passes()
        del caught
        check_unchanged(modes(), scene.modes)
    check_unchanged(modes(), outside)
    scene.extractor.remove_hooks()
    assert torch.equal(scene.model(X1), scene.twin(X1))


# Forward passes of the user's -----------------------------------------------------------------------------------------


@every_error
@every_mode
@pytest.mark.parametrize("place", ["before the layer", "in the layer", "behind the layer"])
def test_in_a_module(place: str, error: str, mode: str) -> None:
    interrupt_a_forward_pass(Scene("GradCAM", mode), place, error, complete=True)


@some_errors
@every_mode
@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "GuidedBackprop", "FullGrad"])
def test_in_the_first_pass(name: str, error: str, mode: str) -> None:
    interrupt_a_forward_pass(Scene(name, mode), "behind the layer", error, complete=False)


@some_errors
@every_mode
@pytest.mark.parametrize("name", ["EigenCAM", "ScoreCAM", "AblationCAM", "SmoothGradCAMpp", "GuidedBackprop"])
def test_in_the_second_pass(name: str, error: str, mode: str) -> None:
    interrupt_a_forward_pass(Scene(name, mode), "behind the layer", error, complete=True)


def _hook_on(part: str, pre: bool) -> Callable[[nn.Module], None]:
    def register(model: nn.Module) -> None:
        module = model.get_submodule(part)
        (module.register_forward_pre_hook if pre else module.register_forward_hook)(lambda *_: TRAP.visit("hook"))

    return register


@every_mode
@pytest.mark.parametrize(
    ("part", "pre", "error"),
    [
        *(("", False, error) for error in ERRORS),
        *((part, pre, error) for part, pre in [("", True), ("layer", False), ("layer", True)] for error in SOME_ERRORS),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_in_a_hook(first: bool, part: str, pre: bool, error: str, mode: str) -> None:
    """In a hook of the user's that runs before those of the extractor, or after them."""
    register = _hook_on(part, pre)
    scene = Scene("GradCAM", mode, register if first else None)
    if not first:
        register(scene.model)
        register(scene.twin)
    interrupt_a_forward_pass(scene, "hook", error, complete=True)


@every_mode
@pytest.mark.parametrize(
    ("name", "place", "error"),
    [
        *(("LeGrad", "within attention", error) for error in ERRORS),
        *(
            (name, place, error)
            for name in READS_ATTENTION
            for place in ("before attention", "behind attention")
            for error in SOME_ERRORS
        ),
    ],
)
def test_in_an_attention_block(name: str, place: str, error: str, mode: str) -> None:
    with UsersMode():
        outside = modes()
        interrupt_a_forward_pass(Scene(name, mode), place, error, complete=place == "before attention")
        check_unchanged(modes(), outside)


@some_errors
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "LeGrad"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_under_autocast(place: str, name: str, error: str) -> None:
    places = ("before attention", "behind attention") if name == "LeGrad" else ("before the layer", "behind the layer")
    scene = Scene(name, "grad")
    outside = modes()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        scene.remember()
        with TRAP.at(places[place == "last"], error), pytest.raises(ERRORS[error]) as caught:
            scene.model(X1)
        check_unchanged(modes(), scene.modes)
        check_unchanged(hook_counts(scene.model), scene.hooks)
        assert torch.equal(scene.model(X1), scene.twin(X1))
        del caught
        check_unchanged(modes(), scene.modes)
    check_unchanged(modes(), outside)
    scene.check_later_passes()


# Calls of the extractor -----------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *(("GradCAM", error) for error in ERRORS),
        *((name, error) for name in ("ScoreCAM", "AblationCAM", "SmoothGradCAMpp", "LeGrad") for error in SOME_ERRORS),
    ],
)
def test_in_a_target(name: str, error: str, mode: str) -> None:
    def target(scores: Tensor) -> Tensor:
        TRAP.visit("target")
        return scores[0]

    interrupt_a_call(Scene(name, mode), "target", error, targets=target)


REPLAYED = ["ScoreCAM", "AblationCAM", "ReciproCAM", "SmoothGradCAMpp", "AugmentedCAM"]


@every_mode
@pytest.mark.parametrize(
    ("name", "place", "error"),
    [
        *((name, "behind the layer", error) for name in REPLAYED for error in SOME_ERRORS),
        *((name, "behind the layer", error) for name in ("ScoreCAM", "AblationCAM") for error in OTHER_ERRORS),
        *(
            (name, place, error)
            for name in ("ScoreCAM", "SmoothGradCAMpp")
            for place in ("before the layer", "in the layer")
            for error in SOME_ERRORS
        ),
    ],
)
def test_in_a_replay(name: str, place: str, error: str, mode: str) -> None:
    interrupt_a_call(Scene(name, mode), place, error, visit=2)


@some_errors
@every_mode
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ScoreCAM", ""),
        ("AblationCAM", "fc"),
        ("ReciproCAM", "fc"),
        ("SmoothGradCAMpp", ""),
        ("AugmentedCAM", "tail"),
        ("GuidedBackprop", ""),
        ("FullGrad", "tail"),
    ],
)
def test_in_a_hook_during_a_replay(name: str, part: str, error: str, mode: str) -> None:
    interrupt_a_call(Scene(name, mode, _hook_on(part, pre=False)), "hook", error)


class Differentiated(torch.autograd.Function):
    """The identity, whose backward visits the trap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        TRAP.visit("backward")
        return gradient


def _last_part(model: nn.Module) -> nn.Module:
    return model.get_submodule("head" if isinstance(model, Transformer) else "tail")


def _function_in(model: nn.Module) -> None:
    _last_part(model).register_forward_hook(lambda _module, _args, output: Differentiated.apply(output))


def _backward_hook_on(model: nn.Module) -> None:
    _last_part(model).register_full_backward_hook(lambda *_: TRAP.visit("backward"))


@every_mode
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *(("GradCAM", error) for error in ERRORS),
        *(
            (name, error)
            for name in ("ShapleyCAM", "SmoothGradCAMpp", "GuidedBackprop", "FullGrad", "LeGrad")
            for error in SOME_ERRORS
        ),
    ],
)
def test_in_a_backward_pass(name: str, error: str, mode: str) -> None:
    interrupt_a_call(Scene(name, mode, _function_in), "backward", error)


@some_errors
@pytest.mark.parametrize("name", ["GradCAM", "ShapleyCAM", "LeGrad"])
def test_in_a_backward_hook(name: str, error: str) -> None:
    interrupt_a_call(Scene(name, "grad", _backward_hook_on), "backward", error)


# Lines of the package -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops those of destructors
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("GradCAM", "no_grad"),
        ("GradCAM", "inference"),
        ("AblationCAM", "grad"),
        ("LeGrad", "inference"),
    ],
)
def test_at_each_line(name: str, mode: str) -> None:
    """From the constructor of an extractor to the end of its block."""
    model, twin = make_model(name), make_model(name)
    interrupted: set[tuple[str, int]] = set()

    def interrupt(line: tuple[str, int]) -> None:
        if line not in interrupted:
            interrupted.add(line)
            raise KeyboardInterrupt

    hooks = hook_counts(model)
    with MODES[mode]():
        expected, before = twin(X3), modes()
    known = -1
    while known < len(interrupted):
        known = len(interrupted)
        with MODES[mode]():
            try:
                with at_each_line(interrupt):
                    run(name, model, X2)
            except KeyboardInterrupt:
                check_unchanged(modes(), before)
                scores, maps = run(name, model, X3)
                assert torch.equal(scores, expected)
                assert scores.requires_grad == expected.requires_grad
                close(maps, clean_maps(name, mode, X3))
                check_unchanged(modes(), before)
        check_unchanged(hook_counts(model), hooks)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert len(interrupted) > 300
