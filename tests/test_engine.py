"""What makes methods fast gives the numbers of the plain way, and is used."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from methods_under_test import METHODS, make_input, make_model
from models import UNet, resnet
from torch import Tensor, nn
from torch.nn import functional as F

from torchcam import methods
from torchcam.methods import _replay, decomposition


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the convolutions of CUDA devices from rounding their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(device: torch.device, count: int = 2, side: int = 48) -> Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(device)


def weights_of(extractor: Any, x: Tensor, classes: list[int]) -> list[Tensor]:
    with extractor, torch.no_grad():
        extractor.model(x)
        return extractor._get_weights(classes, None)


# A head that runs alone


def unet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet("add").eval()


class Direct(nn.Module):
    """Hands the layer's output on, with something beside it that the input decides as well."""

    def __init__(self, beside: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(4, 5)
            self.gate = nn.Linear(3, 5)
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        gate = self.gate(pooled)
        scores = self.fc(self.features(x).relu().mean((2, 3)))
        if self.beside == "input":
            return scores * pooled.sum(1, keepdim=True)
        if self.beside == "module":
            return scores * gate
        if self.beside == "comparison":  # NaN is neither more nor less
            return torch.where(x.mean((1, 2, 3)).unsqueeze(1) > 0.5, scores, self.fc(scores[:, :4]))
        if self.beside == "branch":
            return scores if float(x.mean()) > 0.5 else scores.flip(1)
        if self.beside == "filled":
            return scores * (1 + gate).log().nan_to_num(0.5)
        return scores + scores.mean(0) if self.beside == "batch" else scores


class BatchSecond(nn.Module):
    """Sequences with the batch second."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mix = nn.Linear(3, 6)
            self.fc = nn.Linear(6, 5)
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.avg_pool2d(x, x.shape[-1] // 4).flatten(2).permute(2, 0, 1)
        scores = self.fc(self.mix(tokens).tanh().square().mean(0))
        return scores * x.mean((1, 2, 3)).unsqueeze(1) if self.beside else scores


def hooked(model: nn.Module) -> nn.Module:
    """A model whose user changes what the layer returns."""
    model.features.register_forward_hook(lambda _layer, _args, output: output * 2 + 0.3)
    return model


ALONE: dict[str, tuple[Callable[[], nn.Module], str | list[str], bool]] = {
    "layer4": (resnet, "layer4", True),
    "two layers": (resnet, ["layer3", "layer4"], True),
    "inside a block": (resnet, "layer4.0.conv1", False),  # the connection around it is the input's
    "unet": (unet, "middle", False),
    "nothing beside": (lambda: Direct("nothing"), "features", True),
    "beside: input": (lambda: Direct("input"), "features", False),
    "beside: module": (lambda: Direct("module"), "features", False),
    "beside: batch": (lambda: Direct("batch"), "features", False),
    "beside: comparison": (lambda: Direct("comparison"), "features", False),
    "beside: branch": (lambda: Direct("branch"), "features", False),
    "beside: filled": (lambda: Direct("filled"), "features", False),
    "a hook of the user's": (lambda: hooked(Direct("nothing")), "features", False),
    "batch second": (BatchSecond, "mix", True),
    "batch second, beside": (lambda: BatchSecond(beside=True), "mix", False),
}
# Where the size of the chunks could make a difference.
CHUNKED = [net for net in ALONE if net.startswith(("nothing", "beside: b", "batch second"))]


@pytest.mark.parametrize(
    "method",
    [pytest.param(partial(methods.AblationCAM, max_channels=16), id="AblationCAM"), methods.ReciproCAM],
)
@pytest.mark.parametrize(
    ("net", "batch_size"), [(net, 7) for net in ALONE] + [(net, n) for net in CHUNKED for n in (1, 2)]
)
@pytest.mark.filterwarnings("ignore:the score of an input as it is")  # where samples depend on each other
def test_a_head_that_runs_alone_gives_what_the_model_gives(
    method: Any, net: str, batch_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, layer, alone = ALONE[net]
    x = images(device, side=32 if make is resnet else 16).double()
    model = make().double().to(device).eval()
    used: list[Any] = []
    scorer = _replay.Replay._scorer

    def spying(*arguments: Any) -> Any:
        unedited, owner = scorer(*arguments)
        used.append(
            "whole" if isinstance(owner, _replay._WholeModel) else "record" if owner.recorded.known else "alone"
        )
        return unedited, owner

    monkeypatch.setattr(_replay.Replay, "_scorer", spying)
    found = raw(method(model, layer, batch_size=batch_size), x)
    alone = alone or (net == "beside: batch" and batch_size == 1)  # a batch of one decides nothing
    assert (set(used) == {"alone"}) == alone
    monkeypatch.setattr(_replay._Head, "proven", lambda _: None)
    used.clear()
    expected = raw(method(model, layer, batch_size=batch_size), x)
    assert set(used) == {"whole"}
    for one, other in zip(found, expected, strict=True):
        assert one.abs().amax() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def raw(extractor: Any, x: Tensor, classes: Any = (1, 3), **options: Any) -> list[Tensor]:
    with extractor:
        with torch.no_grad():
            extractor.model(x)
        return extractor(list(classes), normalized=False, relu=False, **options)


def test_foreign_code_gets_no_unknown_values(device: torch.device) -> None:
    """Of a deformable convolution with offsets of NaN a process may die."""
    from torchvision.ops import deform_conv2d

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.offset = nn.Conv2d(3, 18, 3, padding=1)
                self.features = nn.Conv2d(3, 4, 3, padding=1)
                self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            offset = self.offset(x)
            return deform_conv2d(self.features(x), offset, self.weight, padding=1).mean((2, 3))

    model, x = Deformed().to(device).eval(), images(device, 1, 8)
    (found,) = weights_of(methods.AblationCAM(model, "features"), x, [1])
    assert found.isfinite().all()
    assert found.abs().amax() > 0


def test_what_a_model_keeps_in_attributes_is_kept_for_it(device: torch.device) -> None:
    class Averaging(Direct):
        def __init__(self) -> None:
            super().__init__("nothing")
            self.level = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.level = 0.9 * self.level.to(x) + 0.1 * x.detach().mean()
            return super().forward(x)

    model, x = Averaging().to(device).eval(), images(device, 2, 8)
    with methods.AblationCAM(model, "features") as extractor, torch.no_grad():
        model(x)
        level = model.level
        extractor([1, 3])
        assert model.level is level


def test_a_pass_in_training_mode_is_repeated_in_evaluation_mode(device: torch.device) -> None:
    model, x = resnet().to(device).train(), images(device)
    extractor = methods.AblationCAM(model, "layer4")
    with extractor, torch.no_grad():
        model(x)
        (found,) = extractor._get_weights([1, 3], None)
    (expected,) = weights_of(methods.AblationCAM(model.eval(), "layer4"), x, [1, 3])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_modules_that_return_other_numbers_are_computed_again(device: torch.device) -> None:
    """What is not floating-point cannot be made NaN, so nobody would notice that the score depends on it."""

    class Parity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((1, 2, 3)) > 0

    class Signed(Direct):
        def __init__(self) -> None:
            super().__init__("nothing")
            self.parity = Parity()

        def forward(self, x: Tensor) -> Tensor:
            sign = self.parity(x).long() * 2 - 1
            return super().forward(x) * sign.unsqueeze(1)

    model, x = Signed().to(device).eval(), torch.stack([torch.ones(3, 8, 8), -torch.ones(3, 8, 8)]).to(device)
    (found,) = weights_of(methods.AblationCAM(model, "features"), x, [1, 1])
    for n in range(2):
        with torch.no_grad():
            score = model(x[n : n + 1])[0, 1]
            for k in range(4):
                handle = model.features.register_forward_hook(
                    lambda _layer, _args, output, k=k: output.index_fill(1, torch.tensor([k], device=device), 0)
                )
                without = model(x[n : n + 1])[0, 1]
                handle.remove()
                torch.testing.assert_close(found[n, k], (score - without) / score.abs(), rtol=1e-4, atol=1e-5)


# Channels last


@pytest.fixture
def channels_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switch the other memory format off."""
    return lambda: monkeypatch.setattr(_replay, "fast_formats", lambda _modules: {})


FORMATTED: dict[str, Callable[[nn.Module], Any]] = {
    "ScoreCAM": partial(methods.ScoreCAM, target_layer="layer4", max_channels=12, batch_size=5),
    "SSCAM": partial(methods.SSCAM, target_layer="layer4", max_channels=4, num_samples=2),
    "ISCAM": partial(methods.ISCAM, target_layer="layer4", max_channels=4, num_samples=2),
    "GroupCAM": partial(methods.GroupCAM, target_layer="layer4", groups=4),
    "SmoothGradCAMpp": partial(methods.SmoothGradCAMpp, target_layer="layer4"),
    "AblationCAM": partial(methods.AblationCAM, target_layer="layer3", max_channels=8),
    "AugmentedCAM": partial(methods.AugmentedCAM, target_layer="layer4"),
}


@pytest.mark.parametrize("name", FORMATTED)
def test_the_memory_format_does_not_matter(name: str, device: torch.device, channels_first: Callable[[], None]) -> None:
    model, x = resnet().to(device), images(device)
    formats: list[bool] = []
    layer = model.layer4 if name == "AblationCAM" else model.conv1
    layer.register_forward_pre_hook(
        lambda _layer, args: formats.append(
            len(args[0]) > 1 and args[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    with FORMATTED[name](model) as extractor:
        with torch.no_grad():
            model(x)
        found = extractor([1, 3])
    assert any(formats) == (device.type == "cpu"), "channels-last was not used"
    channels_first()
    formats.clear()
    with FORMATTED[name](model) as extractor:
        with torch.no_grad():
            model(x)
        expected = extractor([1, 3])
    assert not any(formats)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_models_that_view_what_they_get_keep_their_format(device: torch.device) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.first = nn.Conv2d(3, 4, 3)
                self.second = nn.Conv2d(4, 6, 3)
                self.fc = nn.Linear(6 * 4 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.second(self.first(x)).relu().view(len(x), -1))

    model, x = Viewing().to(device), images(device, 2, 8)
    with torch.no_grad():
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match="view"):
                model(x.contiguous(memory_format=torch.channels_last))
    with methods.ScoreCAM(model, "first") as extractor, torch.no_grad():
        scores = model(x)
        (weights,) = extractor._get_weights([1, 2], scores)
        masks = F.interpolate(extractor.hook_a[0], (8, 8), mode="bilinear", align_corners=False)
        flat = masks.flatten(2)
        low, high = flat.amin(-1)[..., None, None], flat.amax(-1)[..., None, None]
        masks = (masks - low) / (high - low)
        expected = torch.stack([model(x * masks[:, k : k + 1])[[0, 1], [1, 2]] for k in range(4)], 1).softmax(1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_an_error_of_the_model_comes_through(device: torch.device) -> None:
    model, x = resnet().to(device), images(device)
    with methods.ScoreCAM(model, "layer4") as extractor, torch.no_grad():
        model(x)

        def refuse(*_: Any) -> None:
            raise RuntimeError("no more")

        model.layer1.register_forward_pre_hook(refuse)
        with pytest.raises(RuntimeError, match="no more"):
            extractor([1, 3])


# Options


def test_channels_of_most_energy_are_evaluated() -> None:
    """Channels of energy 9, 1, 0, 4 + 4, 16 (one sample), and 1, 1, 1, 1 + 1, 0 (the other)."""
    activation = torch.zeros(2, 5, 1, 2)
    activation[0, :, 0] = torch.tensor([[3.0, 0], [0, -1], [0, 0], [2, 2], [0, 4]])
    activation[1, :, 0] = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1], [0, 0]])

    def chosen(**options: Any) -> list[list[int]]:
        extractor = methods.ScoreCAM(nn.Sequential(nn.Conv2d(3, 5, 1)), "0", **options)
        found = extractor._chosen(activation)
        return [row.nonzero().flatten().tolist() for row in found]

    assert methods.ScoreCAM(nn.Sequential(nn.Conv2d(3, 5, 1)), "0")._chosen(activation) is None
    assert chosen(max_channels=2) == [[0, 4], [0, 3]]  # of equal channels, the first
    assert chosen(max_channels=99) == [[0, 1, 2, 3, 4]] * 2
    assert chosen(energy=16 / 34) == [[4], [0, 3]]  # 2 + 1 of 5 is more than 16 / 34, 2 is less
    assert chosen(energy=0.5) == [[0, 4], [0, 3]]
    assert chosen(energy=1.0) == [[0, 1, 3, 4], [0, 1, 2, 3]]
    assert chosen(energy=1.0, max_channels=1) == [[4], [3]]


@pytest.mark.parametrize("options", [{"max_channels": 2}, {"energy": 0.6}])
@pytest.mark.parametrize("name", ["ScoreCAM", "SSCAM", "ISCAM", "AblationCAM"])
def test_channels_left_out_have_no_weight_and_cost_nothing(
    name: str, options: dict[str, Any], device: torch.device
) -> None:
    model, x = make_model(name, device), make_input(device)
    make: Any = getattr(methods, name)
    few = {"num_samples": 2} if name in {"SSCAM", "ISCAM"} else {}
    rows: list[int] = []
    (full,) = weights_of(make(model, "block2", **few), x, [0, 1])
    with make(model, "block2", **few, **options) as extractor, torch.no_grad():
        model(x)
        chosen = extractor._chosen(extractor.hook_a[0])
        model.fc.register_forward_pre_hook(lambda _layer, args: rows.append(len(args[0])))
        (found,) = extractor._get_weights([0, 1], None)
    assert 2 <= chosen.sum() < chosen.numel()
    kept = torch.where(chosen, full, 0.0)
    expected = kept if name == "AblationCAM" else kept / kept.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    extra = 3 if name == "AblationCAM" else 1  # the scores without an edit; the first sample as it is
    assert sum(rows) == extra + int(chosen.sum()) * few.get("num_samples", 1)


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM", "ReciproCAM", "GroupCAM"])
def test_repeated_passes_run_in_the_type_asked_for(name: str, device: torch.device) -> None:
    model, x = make_model(name, device), make_input(device)
    seen: list[torch.dtype] = []
    make: Any = getattr(methods, name)
    with make(model, "block2") as extractor, torch.no_grad():
        model(x)
        (expected,) = extractor([0, 2])
    with make(model, "block2", autocast=torch.bfloat16) as extractor, torch.no_grad():
        assert model(x).dtype == torch.float32
        model.fc.register_forward_hook(lambda _layer, _args, output: seen.append(output.dtype))
        (found,) = extractor([0, 2])
        assert set(seen) == {torch.bfloat16}
        assert model(x).dtype == torch.float32
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert (found - expected).abs().amax() > 0
    with pytest.raises(ValueError, match=r"`autocast` must be torch.bfloat16, torch.float16 or None, got torch.int8"):
        make(model, "block2", autocast=torch.int8)


def test_the_compiled_model_is_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_with = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(compile_with(model)) or compiled[-1])
    model, x = make_model("ScoreCAM", device), make_input(device)
    (expected,) = weights_of(methods.ScoreCAM(model, "block2"), x, [0, 1])
    with methods.ScoreCAM(model, "block2", compile=True, batch_size=4) as extractor, torch.no_grad():
        model(x)
        assert not compiled, "nothing is compiled before it is needed"
        first = extractor._get_weights([0, 1], None)
        second = extractor._get_weights([0, 1], None)
    assert len(compiled) == 2, "each call compiles a replica of the model as it is then"
    torch.testing.assert_close(first[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second[0], expected, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_options_are_checked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    with pytest.raises(TypeError, match="fold_batch_norm"):
        methods.ScoreCAM(model, "0", fold_batch_norm=True)
    for energy in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`energy` is a share, more than 0 and at most 1"):
            methods.AblationCAM(model, "0", energy=energy)
    with pytest.raises(ValueError, match="`max_channels` must be at least 1, got 0"):
        methods.SSCAM(model, "0", max_channels=0)


def test_masks_are_made_once_for_all_perturbations(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model("SSCAM", device), make_input(device)
    made: list[int] = []
    from torchcam.methods import masked

    resize = masked.resize
    monkeypatch.setattr(masked, "resize", lambda maps, shape: made.append(len(maps)) or resize(maps, shape))
    weights_of(methods.SSCAM(model, "block2", batch_size=3, num_samples=5), x, [0, 1])
    assert sum(made) == 8


# Several classes of one sample


def test_one_class_in_a_list_is_one_of_several(device: torch.device) -> None:
    model, x = resnet().to(device), images(device)
    with methods.GradCAM(model, "layer4") as extractor, torch.no_grad():
        model(x)
        (single,) = extractor([1, 3], retain_graph=True)
        (several,) = extractor([[1], [3]], retain_graph=True)
        assert extractor.hook_g[0].shape == extractor.hook_a[0].shape
        (many,) = extractor([[1, 2], [3, 4]])
    torch.testing.assert_close(several, single.unsqueeze(1))
    torch.testing.assert_close(many[:, :1], several)


def test_token_layouts_take_several_classes(device: torch.device) -> None:
    """Sequences with the batch second, whose gradients are laid out together."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.mix = nn.Linear(3, 6)
                self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(x.flatten(2).permute(2, 0, 1)).tanh().square().mean(0))

    model, x = Second().to(device), images(device, 2, 6)
    for transform in (None, lambda t: t.permute(1, 2, 0).reshape(2, 6, 6, 6)):
        with methods.GradCAM(model, "mix", reshape_transform=transform) as extractor:
            model(x)
            (together,) = extractor([[0, 1, 2], [3, 4, 0]], normalized=False, retain_graph=True)
            for k, classes in enumerate([[0, 3], [1, 4], [2, 0]]):
                (alone,) = extractor(classes, normalized=False, retain_graph=True)
                torch.testing.assert_close(together[:, k], alone)


# Streams


@pytest.mark.parametrize("name", METHODS)
def test_a_stream_gives_what_calls_give(name: str, device: torch.device) -> None:
    model, x = make_model(name, device), make_input(device, 4)
    batches = [(x[:2], "ignored"), x[2:3], [x[3:]]]
    with METHODS[name](model) as extractor:
        found = list(extractor.stream(batches))
        for maps, part in zip(found, (x[:2], x[2:3], x[3:]), strict=True):
            with torch.inference_mode():
                classes = model(part).argmax(1)
            for one, other in zip(maps, extractor(classes), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_streams_take_classes_targets_mappings_and_options(device: torch.device) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = resnet()

        def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(pixels)}

    model, x = Named().to(device).eval(), images(device)
    with methods.GradCAM(model, "inner.layer4") as extractor:
        with torch.no_grad():
            model(pixels=x)
        expected = extractor([1, 3], normalized=False)
        batches = [{"pixels": x, "labels": torch.tensor([1, 3])}]
        of_class = next(extractor.stream(batches, [1, 3], normalized=False))
        by_function = next(extractor.stream(batches, lambda _output: [1, 3], normalized=False))
        targets: list[Any] = [lambda y: y["logits"][1], lambda y: y["logits"][3]]
        by_target = next(extractor.stream(batches, targets=targets, normalized=False))
        for found in (of_class, by_function, by_target):
            torch.testing.assert_close(found, expected)
        with pytest.raises(ValueError, match="`class_idx` or `targets`, not both"):
            next(extractor.stream(batches, 1, targets=targets))
        with pytest.raises(ValueError, match="`batches` holds an empty batch"):
            next(extractor.stream([()]))


def test_a_stream_of_factorizations(device: torch.device) -> None:
    model, x = make_model("GradCAM", device), make_input(device)
    with methods.DeepFeatureFactorization(model, "block2", 2) as factorize:
        (found,) = list(factorize.stream([x]))
        with torch.no_grad():
            model(x)
        torch.testing.assert_close(found.maps, factorize().maps)


def test_a_stream_leaves_the_recorded_pass_and_the_model_alone(device: torch.device) -> None:
    model, x = resnet().to(device).train(), images(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with methods.GradCAM(model, "layer4") as extractor:
        model.eval()
        model(x)
        model.train()
        extractor.disable_hooks()
        streamed = []
        for maps in extractor.stream([x.flip(0), x]):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            streamed.append(maps[0])
        torch.testing.assert_close(streamed[0], streamed[1].flip(0), rtol=1e-4, atol=1e-5)
        assert all(module.training for module in model.modules())
        (recorded,) = extractor(1)
        assert recorded.shape == (2, 2, 2)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_stream_keeps_nothing(device: torch.device) -> None:
    model = make_model("GradCAM", device)
    alive: list[int] = []

    def batches() -> Any:
        for _ in range(6):
            gc.collect()
            alive.append(sum(type(thing) is Tensor for thing in gc.get_objects()))
            yield make_input(device)

    with METHODS["GradCAM"](model) as extractor:
        for maps in extractor.stream(batches()):
            del maps
    assert len(set(alive)) == 1, alive  # also before the first


# Large matrices


def test_large_matrices_give_the_component_of_a_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 96, 9, 11, generator=generator, dtype=torch.float64)
    smooth = F.interpolate(noise[:, :, :2, :2], (9, 11), mode="bilinear", align_corners=False)
    rank_one = noise[:, :1] * noise[:, :, :1, :1]
    for features in (noise, smooth, rank_one, torch.zeros_like(noise)):
        expected = decomposition.first_component(features)
        monkeypatch.setattr(decomposition, "_LARGE", 8)
        found = decomposition.first_component(features)
        monkeypatch.undo()
        overlap = (found.flatten(1) * expected.flatten(1)).sum(1).sign().reshape(-1, 1, 1)
        torch.testing.assert_close(found * torch.where(overlap == 0, 1.0, overlap), expected, rtol=1e-6, atol=1e-9)
