"""Each thing that can be wrong with a map is found in a model built to have it, and nothing else is found there."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods_under_test import METHODS, READS_ATTENTION, make_input, make_model
from tests.models import NUM_CLASSES, shuffled, tiny_vit
from tests.test_promises import KEEPS_A_GRAPH, SITUATIONS, Snapshot, count_hooks, raising
from torchcam import methods
from torchcam.methods import CAM, GradCAM, LayerCAM, MeanActivation
from torchcam.methods._diagnose import CODES, Diagnosis, Finding
from torchcam.targets import ClassLogit, ClassProbability


def images(batch_size: int = 2, size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn((batch_size, channels, size, size), generator=torch.Generator().manual_seed(2))


class Plain(nn.Module):
    """A healthy net, `between` two stages and `after` the pooling of which a fault can be built in."""

    def __init__(self, between: nn.Module | None = None, after: nn.Module | None = None, seed: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.between = between or nn.Identity()
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, NUM_CLASSES)
        self.after = after or nn.Identity()
        shuffled(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.between(self.stage1(self.stem(x).relu())))
        return self.after(self.fc(x.mean((2, 3))))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def look(
    model: nn.Module,
    layer: Any = "stage2",
    *,
    method: Callable[..., Any] = GradCAM,
    x: Tensor | None = None,
    grad: bool = False,
    class_idx: Any = None,
    targets: Any = None,
    **options: Any,
) -> Diagnosis:
    """Make an extractor, run the model, and diagnose."""
    with method(model, layer, **options) as extractor, torch.set_grad_enabled(grad):
        model(images() if x is None else x)
        return extractor.diagnose(class_idx, targets=targets)


FAULTS: dict[str, Callable[[], Diagnosis]] = {}


def fault(function: Callable[[], Diagnosis]) -> Callable[[], Diagnosis]:
    """Register a function, named for a code, that diagnoses something that has this fault and no other."""
    FAULTS[function.__name__] = function
    return function


@fault
def nothing_recorded() -> Diagnosis:
    return GradCAM(Plain(), "stage2").diagnose()


@fault
def hooks_disabled() -> Diagnosis:
    extractor = GradCAM(model := Plain(), "stage2")
    extractor.disable_hooks()
    model(images())
    return extractor.diagnose()


@fault
def hooks_removed() -> Diagnosis:
    with GradCAM(model := Plain(), "stage2") as extractor:
        model(images())
    return extractor.diagnose()


@fault
def compiled() -> Diagnosis:
    model = Plain()
    model.compile(backend="eager")
    with GradCAM(model, "stage2") as extractor:
        model(images())
        return extractor.diagnose()


@fault
def layer_not_reached() -> Diagnosis:
    model = Plain()
    model.unused = nn.Conv2d(3, 3, 1)
    return look(model, "unused")


@fault
def input_modified() -> Diagnosis:
    x = images()
    with GradCAM(model := Plain(), "stage2") as extractor, torch.no_grad():
        model(x)
        x.mul_(2)
        return extractor.diagnose()


@fault
def input_not_finite() -> Diagnosis:
    x = images(3)
    x[1, 0, 4, 4] = torch.nan
    return look(Plain(), x=x)


@fault
def activation_not_finite() -> Diagnosis:
    model = Plain()
    model.stage1[0].bias.data[3] = torch.inf
    return look(model)


@fault
def score_not_finite() -> Diagnosis:
    return look(Plain(after=Apply(lambda logits: (logits - 100).log())), class_idx=1)


@fault
def gradient_not_finite() -> Diagnosis:
    # Channels that are 0 make a norm of zeros, whose gradient is NaN.
    return look(Plain(between=Apply(lambda x: x + 0 * (0 * x).square().sum().sqrt())), "stage1")


@fault
def method_failed() -> Diagnosis:
    return look(Plain(), "stem", method=CAM, fc_layer="fc")


@fault
def no_positions() -> Diagnosis:
    return look(Plain(), "fc")


@fault
def one_position() -> Diagnosis:
    model = Plain()
    model.stage2 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU())
    return look(shuffled(model))


class ChannelsLast(nn.Module):
    """Its stage returns as many channels as there are positions a side, the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stage = nn.Linear(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).movedim(1, -1)
        return self.fc(self.stage(x).relu().square().mean((1, 2)))


@fault
def wrong_layout() -> Diagnosis:
    return look(ChannelsLast(), "stage", x=images(size=32), reshape_transform=lambda t: t)


@fault
def layout_ambiguous() -> Diagnosis:
    class Everywhere(ChannelsLast):
        """Every position sees all of the input alike."""

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.rand((8, 8, 8), generator=torch.Generator().manual_seed(0))
            x = self.between(self.stem(x).square().mean((1, 2, 3), keepdim=True) * weights)
            return self.fc(x.square().mean((1, 2)))

    model = Everywhere()
    model.between = nn.Identity()
    model.fc.weight.data.abs_()
    return look(model, "between", x=images(size=32))


@fault
def no_gradient() -> Diagnosis:
    return look(Plain(between=Apply(Tensor.detach)), "stage1", grad=True)


@fault
def zero_gradient() -> Diagnosis:
    return look(Plain(between=Apply(lambda x: (x - 1000).relu() + 1)), "stage1")


@fault
def activation_constant() -> Diagnosis:
    flat = Apply(lambda x: x.mean((2, 3), keepdim=True).expand_as(x))
    return look(Plain(between=nn.Sequential(flat, nn.AvgPool2d(1))), "between.1")


@fault
def all_negative() -> Diagnosis:
    model = Plain()
    model.fc.weight.data[2] = -model.fc.weight.data[2].abs()
    return look(model, class_idx=2)


@fault
def map_constant() -> Diagnosis:
    model = Plain()
    model.fc.weight.data[2] = 0
    return look(model, method=CAM, class_idx=2, fc_layer="fc")


@fault
def score_saturated() -> Diagnosis:
    return look(Plain(after=nn.Sequential(Apply(lambda logits: 20 * logits), nn.Softmax(1))))


@fault
def same_for_every_class() -> Diagnosis:
    model = Plain()
    model.fc.weight.data[:] = torch.arange(1.0, 6.0)[:, None] * model.fc.weight.data[0].abs()
    return look(model)


class Falling(nn.Module):
    """The score rises with brightness up to 1 and falls steeply beyond, but the mean gradient is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 1, 1, bias=False)
        self.features.weight.data.fill_(1)
        self.fc = nn.Linear(1, 2, bias=False)
        self.fc.weight.data[:] = torch.tensor([[1.0], [-1.0]])

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc((x - 12 * (x - 1).relu()).mean((2, 3)))


def spotted() -> Tensor:
    """Dim noise with a small bright spot."""
    x = 0.8 * torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    x[..., 3:6, 9:12] = 3
    return x


@fault
def inverted() -> Diagnosis:
    return look(Falling().eval(), "features", x=spotted(), class_idx=0)


@fault
def coarse_grid() -> Diagnosis:
    model = Plain()
    model.stage2[0].stride = (8, 8)
    return look(model)


class Normalised(Plain):
    """With batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(8), nn.Dropout(0.2))

    def trained_on(self, x: Tensor) -> Normalised:
        with torch.no_grad():
            self.train()
            for _ in range(100):
                self(x)
        return self.eval()


@fault
def train_mode() -> Diagnosis:
    return look(Normalised().trained_on(images()).train())


@fault
def not_repeatable() -> Diagnosis:
    class Moody(Plain):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x * self.calls)

    return look(Moody())


@fault
def input_range() -> Diagnosis:
    return look(Plain(), x=128 + 30 * images().clamp(-4, 4))


@fault
def called_repeatedly() -> Diagnosis:
    class Twice(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stage2(self.stage2(self.stage1(self.stem(x)))).mean((2, 3)))

    return look(Twice())


@fault
def score_squashed() -> Diagnosis:
    return look(Plain(after=nn.Sigmoid()))


@fault
def class_agnostic() -> Diagnosis:
    return look(Plain(), method=MeanActivation)


@fault
def inplace_after_layer() -> Diagnosis:
    model = Plain()
    model.stage1[1] = nn.ReLU(inplace=True)
    return look(model, "stage1.0")


@fault
def both_signs() -> Diagnosis:
    model = Plain()
    model.stage2[1] = nn.Tanh()
    return look(model, method=partial(methods.XGradCAM, gradients="plain"))


@fault
def unbalanced() -> Diagnosis:
    return look(Plain(nn.Softplus()), "stage1", method=partial(methods.HiResCAM, gradients="balanced"))


@pytest.mark.parametrize("code", CODES)
def test_a_fault_is_found_and_no_other(code: str) -> None:
    diagnosis = FAULTS[code]()
    assert diagnosis.codes == (code,), str(diagnosis)
    (finding,) = diagnosis
    assert finding.severity == CODES[code]
    assert finding.message.endswith(".")
    assert finding.advice.endswith(".")
    assert code in str(diagnosis)


def test_every_code_has_its_fault() -> None:
    assert set(FAULTS) == set(CODES)


class TestHealthy:
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("method", [GradCAM, LayerCAM, methods.HiResCAM, methods.ReciproCAM])
    def test_nothing_is_found_in_a_small_net(self, method: Any, grad: bool) -> None:
        diagnosis = look(Plain(), method=method, grad=grad)
        assert diagnosis.codes == (), str(diagnosis)
        assert not diagnosis
        assert str(diagnosis).endswith(": nothing wrong found")

    @pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "convnext_tiny"])
    def test_nothing_is_found_in_real_architectures(self, name: str) -> None:
        from torchvision import models

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"image_size": 64} if name == "vit_b_16" else {}
            model = getattr(models, name)(num_classes=20, **options).eval()
            if name == "vit_b_16":  # its head starts as zeros, which is a fault of its own
                nn.init.normal_(model.heads.head.weight)
            x = torch.randn(2, 3, *([64, 64] if options else [128, 160]))
        diagnosis = look(model, None, x=x, input_shape=tuple(x.shape[1:]))
        assert diagnosis.codes == (), str(diagnosis)

    @pytest.mark.parametrize("method", [GradCAM, LayerCAM, methods.AblationCAM, methods.FinerCAM])
    def test_nothing_is_found_in_the_demo(self, method: Any) -> None:
        from torchcam.demo import load_model, sample_images

        x = torch.cat([sample.to_tensor() for sample in sample_images()])
        diagnosis = look(load_model(), "layer4", x=x, method=method)
        assert diagnosis.codes == (), str(diagnosis)

    @pytest.mark.parametrize("dim", [1, 3])
    def test_signals_and_volumes(self, dim: int) -> None:
        from tests.models import image, split_net

        diagnosis = look(split_net(dim), "first", x=image(dim))
        assert diagnosis.codes == (), str(diagnosis)

    def test_half_precision_with_autocast(self) -> None:
        with GradCAM(model := Plain(), "stage2") as extractor, torch.autocast("cpu", dtype=torch.bfloat16):
            model(images())
            diagnosis = extractor.diagnose()
        assert diagnosis.codes == (), str(diagnosis)


EXPECTED = {"inplace_after_layer", "class_agnostic", "same_for_every_class"}
"""What the nets that all methods are tested on have: a ReLU in place, and weights that are all positive."""


class TestEveryMethod:
    @pytest.mark.parametrize("name", METHODS)
    def test_runs_and_leaves_no_trace(self, name: str, device: torch.device) -> None:
        model = make_model(name, device)
        x = make_input(device)
        keep = {"retain_graph": True} if name in KEEPS_A_GRAPH else {}
        with METHODS[name](model) as extractor:
            for situation in SITUATIONS.values():
                with situation():
                    model(x)
                    expected = extractor([0, 2], **keep)
                    before = Snapshot(model)
                    diagnosis = extractor.diagnose([0, 2])
                    before.check(hooks=True)
                    # The mean of two layers' maps points elsewhere in one sample: no weights were trained.
                    found = {"inverted"} if name == "HiResCAM" else set()
                    assert set(diagnosis.codes) <= EXPECTED | found, str(diagnosis)
                    json.dumps(diagnosis.to_dict())
                    for cam, again in zip(expected, extractor([0, 2]), strict=True):
                        torch.testing.assert_close(again, cam, rtol=1e-5, atol=1e-5)
        assert count_hooks(model) == 0

    @pytest.mark.parametrize("name", METHODS)
    def test_a_model_that_raises_leaves_no_trace(self, name: str, device: torch.device) -> None:
        model = make_model(name, device)
        if name not in READS_ATTENTION:
            model.dropout.train()
        with METHODS[name](model) as extractor:
            model(make_input(device))
            before = Snapshot(model)
            for after in (0, 1):
                with raising(model.block2, after), pytest.raises(ZeroDivisionError, match="on purpose"):
                    extractor.diagnose([0, 2])
                before.check(hooks=True)
            assert extractor([0, 2])[0].isfinite().all()

    @pytest.mark.parametrize("name", METHODS)
    def test_broken_activations_are_found_whatever_the_method(self, name: str, device: torch.device) -> None:
        model = make_model(name, device)
        first = "patches" if name in READS_ATTENTION else "stem"
        model.get_submodule(first).bias.data[0] = torch.nan
        with METHODS[name](model) as extractor:
            model(make_input(device))
            diagnosis = extractor.diagnose(0)
        wanted = "score_not_finite" if name in {"GuidedBackprop", "FullGrad"} else "activation_not_finite"
        assert wanted in diagnosis.codes, str(diagnosis)
        assert f"'{first}' (Conv2d), whose 'bias' is not finite" in diagnosis[0].message


class TestRecording:
    def test_disabled_hooks_after_a_pass_are_a_warning(self) -> None:
        with GradCAM(model := Plain(), "stage2") as extractor:
            model(images())
            extractor.disable_hooks()
            (finding,) = extractor.diagnose()
            assert (finding.code, finding.severity) == ("hooks_disabled", "warning")
            assert not extractor.hooks_enabled

    def test_a_part_of_the_model(self) -> None:
        with GradCAM(model := Plain(), "stage2") as extractor:
            model.stage2(torch.rand(2, 8, 16, 16))
            (finding,) = extractor.diagnose()
        assert finding.code == "nothing_recorded"
        assert "and its parts called one by one run no hooks" in finding.advice

    def test_the_layer_that_was_not_reached_gets_a_substitute(self) -> None:
        (finding,) = layer_not_reached()
        assert "'unused'" in finding.message
        assert "such as 'stage2'" in finding.advice

    def test_data_parallel(self) -> None:
        (finding,) = GradCAM(nn.DataParallel(Plain()), "module.stage2").diagnose()
        assert "`model.module`" in finding.advice

    def test_compiled_copies_are_named_as_a_reason(self) -> None:
        (finding,) = nothing_recorded()
        assert "torch.compile" in finding.advice

    def test_a_raising_model_says_who_called(self) -> None:
        with GradCAM(model := Plain(), "stage2") as extractor:
            model(images())
            with raising(model.fc), pytest.raises(ZeroDivisionError) as caught:
                extractor.diagnose()
        assert "while `diagnose` repeated" in caught.value.__notes__[0]


class TestNotFinite:
    def test_input_says_which_samples(self) -> None:
        (finding,) = input_not_finite()
        assert finding.samples == (1,)
        assert finding.message.startswith("1 of 3 samples (1):")

    def test_the_first_module_with_a_broken_weight(self) -> None:
        (finding,) = activation_not_finite()
        assert "They first appear in 'stage1.0' (Conv2d), whose 'bias' is not finite." in finding.message
        assert finding.layer == "stage2"

    def test_code_between_modules(self) -> None:
        class Between(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.stage2(self.stage1(self.stem(x)).sub(1e3).log()).mean((2, 3)))

        (finding,) = look(Between())
        assert "in the `forward` of the model itself, before 'stage2' is called" in finding.message

    def test_code_at_the_end_of_a_module(self) -> None:
        class Stage(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) / 0

        model = Plain()
        model.stage1 = Stage(*model.stage1)
        (finding,) = look(model)
        assert "in the `forward` of 'stage1' (Stage), after its modules have run" in finding.message

    def test_overflow_of_half_precision(self) -> None:
        model = Plain().half()
        model.stage1[0].weight.data *= 1e4
        with GradCAM(model, "stage2") as extractor, torch.no_grad():
            model(1e2 * images().half())
            (finding,) = extractor.diagnose()
        assert "They first appear in 'stage1.0' (Conv2d)." in finding.message
        assert "float32" in finding.advice

    def test_score(self) -> None:
        (finding,) = score_not_finite()
        assert finding.message == "the explained score is nan. They first appear in 'after' (Apply)."

    def test_gradient(self) -> None:
        (finding,) = gradient_not_finite()
        assert "Going back from the score, it first is so for the output of 'stage1'." in finding.message


class TestGradient:
    def test_class_token_read_out_names_an_earlier_layer(self) -> None:
        model = tiny_vit(torch.float32)
        last = "encoder.layers.encoder_layer_2"
        diagnosis = look(model, last, x=torch.randn(2, 3, 16, 16))
        assert diagnosis.codes == ("no_gradient",), str(diagnosis)
        assert "0 at all 16 positions" in diagnosis[0].message
        assert "class token" in diagnosis[0].message
        assert "'encoder.layers.encoder_layer_2.ln_1'" in diagnosis[0].advice
        advised = look(model, "encoder.layers.encoder_layer_2.ln_1", x=torch.randn(2, 3, 16, 16))
        assert "no_gradient" not in advised.codes

    def test_methods_that_smooth_the_gradient_see_it_too(self) -> None:
        layer = "encoder.layers.encoder_layer_2"
        diagnosis = look(tiny_vit(torch.float32), layer, method=methods.SmoothGradCAMpp, x=torch.randn(2, 3, 16, 16))
        assert diagnosis.codes == ("no_gradient", "both_signs"), str(diagnosis)

    def test_a_cut_graph_names_a_layer_behind_the_cut(self) -> None:
        (finding,) = no_gradient()
        assert "the output of 'stage1'" in finding.message
        assert ".detach()" in finding.message
        assert "'stage2'" in finding.advice

    def test_frozen_parameters_are_no_fault(self) -> None:
        diagnosis = look(Plain().requires_grad_(False), grad=True)
        assert diagnosis.codes == (), str(diagnosis)

    def test_a_head_of_zeros_is_named(self) -> None:
        model = Plain()
        nn.init.zeros_(model.fc.weight)
        diagnosis = look(model)
        assert diagnosis.codes == ("zero_gradient",), str(diagnosis)
        assert "The parameters 'fc.weight' are all 0." in diagnosis[0].message

    def test_saturation_is_told_from_a_dead_head(self) -> None:
        assert zero_gradient().codes == ("zero_gradient",)
        after = nn.Sequential(Apply(lambda logits: 1e4 * logits), nn.Softmax(1))
        diagnosis = look(Plain(after=after))
        assert diagnosis.codes == ("score_saturated",), str(diagnosis)
        assert diagnosis[0].severity == "error"


class TestScore:
    def test_saturated_says_by_what_and_how_much(self) -> None:
        (finding,) = score_saturated()
        assert "made by a softmax" in finding.message
        assert "torch.nn.Identity()" in finding.advice

    @pytest.mark.parametrize(
        ("function", "name"),
        [(nn.Sigmoid(), "sigmoid"), (nn.LogSoftmax(1), "log-softmax"), (nn.Softmax(1), "softmax")],
    )
    def test_probabilities_by_the_graph(self, function: nn.Module, name: str) -> None:
        diagnosis = look(Plain(after=function))
        assert diagnosis.codes == ("score_squashed",), str(diagnosis)
        assert f"made by a {name} (" in diagnosis[0].message

    def test_probabilities_without_a_graph(self) -> None:
        diagnosis = look(Plain(after=nn.Sigmoid()), method=methods.AblationCAM)
        assert "made by a Sigmoid" in diagnosis[-1].message
        diagnosis = look(Plain(after=Apply(lambda logits: logits.softmax(1))), method=methods.AblationCAM)
        assert "made by a softmax" in diagnosis[-1].message

    def test_targets_are_looked_at_themselves(self) -> None:
        assert look(Plain(), targets=ClassLogit(0)).codes == ()
        assert look(Plain(), targets=ClassProbability(0)).codes == ("score_squashed",)
        assert look(Plain(after=nn.Sigmoid()), targets=lambda out: out[0].logit()).codes == ()


class TestMap:
    def test_the_numbers_before_the_relu(self) -> None:
        model = Plain()
        model.fc.weight.data[2] = -model.fc.weight.data[2].abs()
        with GradCAM(model, "stage2") as extractor:
            scores = model(images())
            (raw,) = extractor(2, scores, relu=False, normalized=False)
            (finding,) = extractor.diagnose(2)
        assert f"goes from {raw.min():.3g} to {raw.max():.3g}" in finding.message
        assert f"choice is {', '.join(str(c) for c in sorted({int(c) for c in scores.argmax(1)}))}" in finding.advice
        for way_out in ("relu=False", 'relu="negative"', "LayerCAM"):
            assert way_out in finding.advice

    def test_only_the_blank_samples_are_named(self) -> None:
        class Signed(Plain):
            def forward(self, x: Tensor) -> Tensor:
                sign = x.mean((1, 2, 3), keepdim=True).sign()
                return self.fc((sign * self.stage2(self.stage1(self.stem(x).relu()))).mean((2, 3)))

        model = Signed()
        model.fc.weight.data.abs_()
        x = torch.cat([images(1).abs(), -images(1).abs(), images(1).abs()])
        diagnosis = look(model, x=x, class_idx=0)
        assert diagnosis.codes == ("all_negative",), str(diagnosis)
        assert diagnosis[0].samples == (1,)

    def test_methods_that_leave_out_negative_gradients(self) -> None:
        model = Plain()
        model.fc.weight.data[2] = -model.fc.weight.data[2].abs()
        diagnosis = look(model, method=LayerCAM, class_idx=2)
        assert diagnosis.codes == ("all_negative",), str(diagnosis)
        assert "no position of 'stage2' has a positive gradient where it is active" in diagnosis[0].message
        assert "LayerCAM" not in diagnosis[0].advice

    def test_same_map_names_the_classes(self) -> None:
        (finding,) = same_for_every_class()
        assert "class 4 and class 3, the best one beside it" in finding.message
        assert look(Plain(), method=partial(methods.FinerCAM, gamma=0.0)).codes == ()

    def test_the_peak_is_tried_out(self) -> None:
        x = spotted()
        model = Falling().eval()
        (finding,) = inverted()
        assert f"from {model(x)[0, 0]:.3g} to" in finding.message
        turned = look(model, "features", x=x, method=MeanActivation, class_idx=1)
        assert turned.codes == ("class_agnostic",), "for the other class the spot is what counts"
        other = look(model, "features", x=x, method=MeanActivation, class_idx=0)
        assert other.codes == ("inverted", "class_agnostic")


class TestGrid:
    def test_a_finer_layer_is_named(self) -> None:
        (finding,) = coarse_grid()
        assert "the grid of 'stage2' is 2 x 2" in finding.message
        assert "'stem' has a grid of 16 x 16" in finding.advice, "later ones are seen at few of their positions"

    def test_resnet_on_small_images(self) -> None:
        from torchvision.models import resnet18

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = resnet18(num_classes=10).eval()
        diagnosis = look(model, "layer4", x=torch.randn(2, 3, 32, 32))
        assert "one_position" in diagnosis.codes
        assert "'layer2' has a grid of 4 x 4" in diagnosis[0].advice

    def test_channels_last_are_found(self) -> None:
        (finding,) = wrong_layout()
        assert "(2, 8, 8, 8)" in finding.message
        assert look(ChannelsLast(), "stage", x=images(size=32)).codes == ()

    @pytest.mark.parametrize("reshape", [lambda t: t.transpose(2, 3), lambda t: t.flip(2)])
    def test_a_wrong_reshape_transform(self, reshape: Callable[[Tensor], Tensor]) -> None:
        diagnosis = look(Plain(), reshape_transform=reshape)
        assert "wrong_layout" in diagnosis.codes, str(diagnosis)
        assert "`reshape_transform` gives" in diagnosis[0].message

    def test_no_positions_names_a_layer(self) -> None:
        (finding,) = no_positions()
        assert "has no spatial extent" in finding.message
        assert "'stage2'" in finding.advice


class TestModes:
    def test_what_train_mode_did_to_the_activations(self) -> None:
        (finding,) = train_mode()
        assert "2 modules" in finding.message
        assert "'between', 'after'" in finding.message
        assert "The recorded activations differ by up to" in finding.message
        (finding,) = look(Plain(after=nn.Dropout(0.2)).train())
        assert finding.code == "train_mode"
        assert "The recorded activations are those of evaluation mode" in finding.message

    def test_train_mode_of_modules_that_do_not_care_is_no_fault(self) -> None:
        assert look(Plain().train()).codes == ()

    def test_calls(self) -> None:
        (finding,) = called_repeatedly()
        assert "'stage2' ran 2 times" in finding.message

    @pytest.mark.parametrize("functional", [False, True])
    def test_what_changes_the_output_in_place(self, functional: bool) -> None:
        class Net(Plain):
            def forward(self, x: Tensor) -> Tensor:
                x = self.stage1[0](self.stem(x))
                x = F.relu(x, inplace=True) if functional else self.between(x)
                return self.fc(self.stage2(x).mean((2, 3)))

        (finding,) = look(Net(nn.ReLU(inplace=True)), "stage1.0")
        assert finding.code == "inplace_after_layer"
        culprit = "code that runs before 'stage2'" if functional else "'between' (ReLU)"
        assert f"by {culprit}" in finding.message


class TestInput:
    def test_bytes(self) -> None:
        (finding,) = input_range()
        assert "looks like bytes" in finding.message

    def test_batch_normalisation_remembers_what_it_has_seen(self) -> None:
        x = images().sigmoid()
        model = Normalised().trained_on(x)
        assert "input_range" not in look(model, x=x).codes
        finding = next(f for f in look(model, x=255 * x) if f.code == "input_range")
        assert finding.code == "input_range"
        assert "'between'" in finding.message
        as_bytes = Normalised().trained_on(255 * x)
        assert "input_range" not in look(as_bytes, x=255 * x).codes, "what it was trained on is no fault"

    def test_the_models_own_configuration(self) -> None:
        model = Plain()
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        assert look(model).codes == ()
        (finding,) = look(model, x=images().sigmoid())
        assert finding.code == "input_range"
        assert "the mean 0.5 subtracted" in finding.message
        model.pretrained_cfg["mean"] = (0, 0, 0)
        assert look(model, x=images().sigmoid()).codes == ()


class TestPyramids:
    def test_a_level_that_does_not_count_is_no_fault(self) -> None:
        class Pyramid(Plain):
            def forward(self, x: Tensor) -> Tensor:
                levels = self.between(self.stage1(self.stem(x).relu()))
                return self.fc(self.stage2(levels["fine"]).mean((2, 3)))

        model = Pyramid(Apply(lambda x: {"fine": x, "coarse": F.avg_pool2d(x, 2)}))
        diagnosis = look(model, "between")
        assert diagnosis.codes == (), str(diagnosis)
        nn.init.zeros_(model.fc.weight)
        assert look(model, "between").codes == ("zero_gradient",)


class TestWrappers:
    def test_the_contrast_is_what_is_explained(self) -> None:
        model = Plain()
        model.fc.weight.data[:] = model.fc.weight.data[0].abs()
        model.fc.weight.data[1] /= 2
        assert look(model, class_idx=1).codes == ("same_for_every_class",)
        diagnosis = look(model, class_idx=1, method=methods.FinerCAM, gamma=1.0)
        assert "all_negative" in diagnosis.codes
        assert diagnosis.subject.startswith("FinerCAM(")

    def test_several_layers_are_named_one_by_one(self) -> None:
        model = Plain()
        model.stage2[0].stride = (8, 8)
        diagnosis = look(model, ["stage1", "stage2"], method=methods.RefineCAM)
        assert diagnosis.codes == ("coarse_grid",)
        assert diagnosis[0].layer == "stage2"


class TestArguments:
    def test_they_are_checked(self) -> None:
        with GradCAM(model := Plain(), "stage2") as extractor:
            model(images())
            for wrong, error in ((NUM_CLASSES, ValueError), ([0], ValueError), ([[0, 1], [0, 1]], ValueError)):
                with pytest.raises(error, match="class_idx"):
                    extractor.diagnose(wrong)
            with pytest.raises(TypeError, match="class_idx"):
                extractor.diagnose(1.5)
            with pytest.raises(ValueError, match="exactly one"):
                extractor.diagnose(1, targets=lambda out: out[0])

    def test_outputs_without_class_scores_need_a_target(self) -> None:
        class Named(Plain):
            def forward(self, x: Tensor) -> Any:
                return {"count": torch.ones(len(x), dtype=torch.long), "boxes": [super().forward(x)]}

        assert look(Named(), targets=lambda out: out["boxes"][0][0]).codes == ()

    def test_lists_of_images(self) -> None:
        class Each(Plain):
            def forward(self, images: list[Tensor]) -> list[Tensor]:
                height, width = (max(sides) for sides in zip(*(image.shape[1:] for image in images), strict=True))
                padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
                return list(super().forward(torch.stack(padded)))

        for images_ in ([*images()], [images()[0], images()[1, :, :12]]):
            with GradCAM(model := Each(), "stage2") as extractor, torch.no_grad():
                model(images_)
                diagnosis = extractor.diagnose(targets=lambda out: out[0])
                assert diagnosis.codes == (), str(diagnosis)
                images_[1].add_(1)
                assert extractor.diagnose(targets=lambda out: out[0]).codes == ("input_modified",)

    def test_the_class_of_each_sample(self) -> None:
        with LayerCAM(model := Plain(), "stage2") as extractor:
            scores = model(images())
            assert extractor.diagnose().class_idx == tuple(scores.argmax(1).tolist())
            assert extractor.diagnose(torch.tensor([1, 0])).class_idx == (1, 0)
            assert extractor.diagnose(targets=lambda out: out[0]).class_idx is None

    def test_completeness_is_in_the_report(self) -> None:
        model = Plain()
        nn.init.zeros_(model.fc.bias)
        diagnosis = look(model, class_idx=[1, 0])
        shares = diagnosis.completeness["stage2"]
        assert shares == pytest.approx([1.0, 1.0], rel=1e-4)
        assert "class 1, 0, gradient × activation at 'stage2' 100% to 100% of the score: nothing" in str(diagnosis)
        assert diagnosis.to_dict()["completeness"] == {"stage2": shares}
        assert look(model, method=MeanActivation).completeness == {}


class TestReport:
    def test_text(self) -> None:
        diagnosis = Diagnosis(
            "GradCAM(target_layer=['x'])",
            "Net",
            [
                Finding("class_agnostic", "info", "mild.", "Nothing."),
                Finding("all_negative", "error", "grave.", "Something."),
            ],
            [3, 3, 1],
        )
        assert str(diagnosis) == textwrap.dedent(
            """\
            GradCAM(target_layer=['x']) on Net, class 3, 1: 2 findings

            error: all_negative
              found  grave.
              do     Something.

            info: class_agnostic
              found  mild.
              do     Nothing."""
        )
        assert [finding.code for finding in diagnosis[:1]] == ["all_negative"]
        assert diagnosis._repr_html_().count("<tr>") == 3

    def test_json(self) -> None:
        report = json.loads(json.dumps(input_not_finite().to_dict()))
        assert report["model"] == "Plain"
        assert report["findings"][0] == {
            "code": "input_not_finite",
            "severity": "error",
            "message": "1 of 3 samples (1): the input itself holds NaN or infinite values.",
            "advice": report["findings"][0]["advice"],
            "layer": None,
            "samples": [1],
        }

    def test_html_is_escaped(self) -> None:
        finding = Finding("method_failed", "error", "<b>", "&")
        assert "&lt;b&gt;" in Diagnosis("a<b", "Net", [finding])._repr_html_()


def test_the_page_on_troubleshooting_has_every_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert [code for code in CODES if page.count(f"`{code}`") < 1] == []
    named = {word for line in page.splitlines() if line.startswith("### ") for word in line.split("`")[1::2]}
    assert named == set(CODES)


def test_questions_that_a_method_cannot_answer_are_findings() -> None:
    (finding,) = look(Plain(), method=methods.FinerCAM, targets=ClassLogit(0))
    assert finding.code == "method_failed"
    assert "FinerCAM contrasts a class with others: it takes `class_idx`, and no `targets`" in finding.message
    model = Plain()
    model.fc = nn.Linear(8, 1)
    nn.init.ones_(model.fc.weight)
    (finding,) = look(model, method=methods.FinerCAM)
    assert finding.code == "method_failed"
    assert "two classes or more, got (2, 1)" in finding.message


@pytest.mark.parametrize("method", [GradCAM, methods.AblationCAM])
def test_a_part_of_torchscript_is_passed_over(method: Any) -> None:
    model = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        model.between = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).eval())
    shuffled(model)
    assert look(model, "stage1", method=method).codes == ()
    model.after = Apply(
        lambda logits: logits + (0 * logits).square().sum(1, keepdim=True).sqrt()
    )  # its gradient is NaN
    if method is GradCAM:
        (finding,) = look(model, "stage1")
        assert finding.code == "gradient_not_finite"
        assert "first is so for the output of 'fc'" in finding.message
