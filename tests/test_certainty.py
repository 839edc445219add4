"""What is certain of a layout, what an experiment proves, and what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import shuffled
from torchcam.layers import candidates
from torchcam.layout import AmbiguousLayoutError, Layout
from torchcam.methods import (
    AblationCAM,
    AttentionRollout,
    EigenCAM,
    GradCAM,
    GuidedBackprop,
    HiResCAM,
    LeGrad,
    MeanActivation,
    ReciproCAM,
    TransformerAttribution,
    XGradCAM,
)
from torchcam.targets import BoxScores, ClassLogit, read_logits


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def rows_counted(model: nn.Module) -> Iterator[list[int]]:
    """The numbers of rows of the passes of a model, replicas included: they share the attributes' objects."""
    counts: list[int] = []

    def count(_module: nn.Module, args: Any) -> None:
        counts.append(len(args[0]))

    handle = model.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


class Block(nn.Module):
    """A block of a type that nobody knows, which returns maps with channels first."""

    def __init__(self, inside: int, outside: int, dim: int = 2) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d)[dim - 1](inside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()


class Classifier(nn.Module):
    def __init__(self, dim: int = 2, channels: int = 6) -> None:
        super().__init__()
        self.stem = (nn.Conv1d, nn.Conv2d)[dim - 1](3, 8, 4, 4)
        self.stage = Block(8, channels, dim)
        self.fc = nn.Linear(channels, 5)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).flatten(2).mean(2))


def test_a_classifier_pays_nothing() -> None:
    model = Classifier(channels=16)
    with rows_counted(model) as counts:
        with GradCAM(model, input_shape=(3, 32, 48)) as extractor, torch.no_grad():
            assert counts == [1]  # the probe
            model(noise(2, 3, 32, 48))
            assert extractor(1)[0].shape == (2, 8, 12)
        assert counts == [1, 2]
        counts.clear()
        with GradCAM(model, "stage") as extractor, torch.no_grad():
            model(noise(2, 3, 32, 48))
            extractor(1)
        assert counts == [2]


def test_a_doubt_costs_one_pass_for_a_layer() -> None:
    """As many channels as positions a side: channels first and channels last fit alike."""
    model = Classifier(channels=8)
    with rows_counted(model) as counts:
        with GradCAM(model, "stage") as extractor, torch.no_grad():
            for size in (32, 32, 64):
                model(noise(2, 3, size, size))
                extractor(1)
        # A row of noise and four strips of each axis, once: 64 pixels make another grid, which is read alike.
        assert counts == [2, 9, 2, 2]
        counts.clear()
        with GradCAM(model, "stage", reshape_transform=lambda t: t) as extractor, torch.no_grad():
            model(noise(2, 3, 32, 32))
            extractor(1)
        assert counts == [2]
    with MeanActivation(model, "stage") as extractor, torch.no_grad():
        model(x := noise(2, 3, 32, 32))
        torch.testing.assert_close(extractor.hook_a[0], model.stage(model.stem(x)))


class Queries(nn.Module):
    """A detector of a kind: nine queries, as many as make a square, ask a map for its content."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.queries = nn.Parameter(torch.zeros(9, 8))
        self.decoder = Identity3()
        self.fc = nn.Linear(8, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x).flatten(2).mT
        found = (self.queries @ tokens.mT).softmax(-1) @ tokens
        return self.fc(self.decoder(found)).mean(1)


class Identity3(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def test_queries_are_no_picture() -> None:
    model = Queries()
    x = noise(1, 3, 32, 32)
    assert candidates(model, x).choice == "backbone"
    assert [c.is_proven for c in candidates(model, x) if c.name == "decoder"] == [False]
    with GradCAM(model, "decoder") as extractor:
        model(x)
        with pytest.warns(UserWarning, match=r"'decoder', of shape \(1, 9, 8\), is read as \(N, positions 3 \* 3, C\)"):
            assert extractor(0)[0].shape == (1, 3, 3)


class Spectrogram(nn.Module):
    """Patches of a spectrogram (N, time, frequency), frequency first, after a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unsqueeze(1).mT).flatten(2).mT  # (N, F * T, 8)
        tokens = self.norm(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1))
        return self.fc(tokens[:, 1:].tanh().mean(1))


def test_a_spectrogram_is_read_in_the_order_of_its_axes() -> None:
    model = Spectrogram()
    x = noise(2, 40, 24)  # 10 x 6 patches
    (norm,) = [c for c in candidates(model, x) if c.name == "norm"]
    assert norm.layout == Layout((10, 6), 0, 2, (1,), prefix=1, fold=(1, 0))
    with MeanActivation(model, "norm") as extractor, torch.no_grad():
        model(x)
        tokens = model.embed(x.unsqueeze(1).mT)  # (N, 8, F, T)
        torch.testing.assert_close(extractor.hook_a[0], model.norm(tokens.movedim(1, -1)).movedim(-1, 1).mT)


@pytest.mark.parametrize("features", [6, 24])
def test_sequences_have_their_features_last(features: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(features, features, batch_first=True)
            self.fc = nn.Linear(features, 3)
            shuffled(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0].mean(1))

    model, x = Net(), noise(2, 24, features)
    with GradCAM(model) as extractor:
        model(x)
        assert extractor.target_names == ["lstm"]
        torch.testing.assert_close(extractor.hook_a[0], model.lstm(x)[0].mT)


def test_tokens_of_text_are_read_along_the_text() -> None:
    model = nn.Sequential(nn.Embedding(10, 12), nn.LayerNorm(12), nn.Linear(12, 3))
    with MeanActivation(model, "1") as extractor, torch.no_grad():
        model(ids := torch.arange(14).reshape(2, 7) % 10)
        torch.testing.assert_close(extractor.hook_a[0], model[1](model[0](ids)).mT)


def test_what_nothing_tells_is_an_error_that_names_the_readings() -> None:
    class Everywhere(nn.Module):
        """Every position sees all of the input."""

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3), keepdim=True) * noise(8, 8, 8)

    model = nn.Sequential(Everywhere())
    model.add_module("1", Identity3())
    with MeanActivation(model, "1") as extractor:
        model(noise(2, 3, 32, 32))
        with pytest.raises(AmbiguousLayoutError, match="several ways") as caught:
            extractor()
    text = str(caught.value)
    assert "as (N, C, 8, 8): `reshape_transform=lambda t: t`" in text
    assert "as (N, 8, 8, C): `reshape_transform=lambda t: t.permute(0, 3, 1, 2)`" in text


@pytest.mark.parametrize(
    "layout",
    [
        Layout((3, 4), 0, 3, (1, 2)),
        Layout((3, 4), 1, 2, (0,), prefix=2),
        Layout((3, 4), 0, 1, (2,), prefix=1, fold=(1, 0)),
        Layout((2, 3, 4), 0, 2, (1,), fold=(1, 2, 0)),
    ],
)
def test_the_source_of_a_layout_is_what_it_does(layout: Layout) -> None:
    sizes = {layout.batch: 2, layout.channels: 5, layout.positions[0]: layout.prefix + 24}
    if len(layout.positions) == 1:
        count = 12 if len(layout.grid) == 2 else 24
        sizes[layout.positions[0]] = layout.prefix + count
    else:
        sizes |= dict(zip(layout.positions, layout.grid, strict=True))
    tensor = noise(*(sizes[dimension] for dimension in range(len(sizes))))
    function = eval(layout.source)
    assert torch.equal(function(tensor), layout.to_grid(tensor))
    assert torch.equal(layout.from_grid(layout.to_grid(tensor), tensor), tensor)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
        shuffled(self)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net(a).mean((2, 3)) * self.net(b).mean((2, 3))).sum(1, keepdim=True)


def test_the_last_call_of_a_shared_layer_is_not_taken_for_the_first_input() -> None:
    model, a, b = Siamese(), noise(1, 3, 16, 16), noise(1, 3, 16, 16).flip(-1)
    with GradCAM(model, "net") as extractor:
        model(a, b)
        with pytest.warns(UserWarning, match="may not be those of the input"):
            extractor(0)
    with GradCAM(model, "net", input_index=1) as extractor:  # warnings are errors
        model(a, b)
        extractor(0)


class Remembers(nn.Module):
    """Keeps the shape of its input, a list and an object, which decide what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shape: tuple[int, ...] | None = None
        self.seen: list[int] = []
        self.fc = nn.Linear(4, 3)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape is None:
            self.shape = tuple(x.shape)
        self.seen.append(len(x))
        return self.fc(self.conv(x).tanh().mean((2, 3))) + self.shape[-1] + len(self.seen)


def test_a_model_that_remembers_its_input_behaves_as_before() -> None:
    model, twin = Remembers(), Remembers()
    candidates(model, noise(1, 3, 16, 16))
    GradCAM(model, input_shape=(3, 24, 24)).remove_hooks()
    assert model.shape is None
    assert model.seen == []
    for size in (12, 20):
        assert torch.equal(model(noise(1, 3, size, size)), twin(noise(1, 3, size, size)))


class Pooled(nn.Module):
    """Its scores are those of all positions; a target may read the class token, which comes out of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.ones(1, 1, 8))
        self.mix = Mix()
        self.norm = nn.LayerNorm(8)
        shuffled(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
        tokens = self.norm(self.mix(tokens))
        return tokens.mean(1), tokens[:, 0]


class Mix(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.tanh().mean(1, keepdim=True)


def test_the_default_layer_must_count_for_the_target() -> None:
    model = Pooled()
    with GradCAM(model, input_shape=(3, 32, 32)) as extractor:
        model(noise(1, 3, 32, 32))
        (default,) = extractor.target_names
        assert default == "norm"
        assert extractor(0, retain_graph=True)[0].shape == (1, 8, 8)
        model(noise(1, 3, 32, 32))
    with GradCAM(model, input_shape=(3, 32, 32)) as extractor:
        model(noise(1, 3, 32, 32))
        with pytest.raises(ValueError, match=r"default layer 'norm', but on those of 'embed': name that"):
            extractor(targets=lambda output: output[1][2])


def test_a_loss_is_no_score() -> None:
    loss, logits = torch.tensor(3.0), torch.tensor([[1.0, 2.0]])
    assert read_logits((loss, logits)) is logits
    assert ClassLogit(1)((loss, logits[0])) == 2
    assert read_logits((loss,)) is loss


def test_the_sign_of_a_component_is_not_decided_by_rounding() -> None:
    """Channels that cancel have a mean of rounding noise: the larger deviations are shown, in any order of channels."""
    pattern = torch.zeros(1, 1, 6, 6)
    pattern[..., 1, 4] = 3.0
    activation = torch.cat([pattern, -pattern, 0.1 * pattern, -0.1 * pattern], 1) + 0.3
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [1, 0, 3, 2]):
        cam = EigenCAM.map(EigenCAM.__new__(EigenCAM), activation[:, order])
        assert cam.flatten().argmax() == 10


@pytest.mark.parametrize("reference", ["model", "autocast"])
@pytest.mark.parametrize("method", [ReciproCAM, AblationCAM])
def test_scores_in_bfloat16_do_not_round_variants_away(method: Any, reference: str) -> None:
    model, x = Classifier(channels=16), noise(2, 3, 32, 32)
    with torch.no_grad():
        model.fc.bias += 40  # logits in bfloat16 are multiples of 0.25
    with method(model, "stage") as extractor, torch.no_grad():
        model(x)
        (expected,) = extractor(1)
    kept = [parameter.clone() for parameter in model.parameters()]
    if reference == "model":
        model, x = model.bfloat16(), x.bfloat16()
        kept = [parameter.bfloat16() for parameter in kept]
    with method(model, "stage") as extractor, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=reference == "autocast"):
            model(x)
        (cam,) = extractor(1)
    torch.testing.assert_close(cam, expected, atol=0.1, rtol=0)
    assert all(map(torch.equal, kept, model.parameters()))


@pytest.mark.parametrize("method", [GradCAM, EigenCAM, HiResCAM, ReciproCAM, XGradCAM])
def test_activations_of_1e25_are_explained_as_those_of_1(method: Any) -> None:
    """The planted check and the sign of a component multiply activations with each other."""
    maps = []
    for scale in (1.0, 2.0**83):
        model = Classifier(channels=8)  # as many channels as positions a side: the layout is tried out
        model.stage.register_forward_hook(lambda _m, _i, output, scale=scale: output * scale)
        with torch.no_grad():
            model.fc.weight /= scale
        with method(model, "stage") as extractor, torch.no_grad():
            model(noise(2, 3, 32, 32))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'stage' has activations of both signs")
                maps.append(extractor(1)[0])
    torch.testing.assert_close(*maps)


class Packed(Tensor):
    """A tensor of a subclass that knows what layers need, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.any:
            raise NotImplementedError
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func is Tensor.detach else found


def test_weights_that_cannot_tell_whether_they_are_zero_are_not() -> None:
    model = Classifier(channels=16)
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(Packed))
    assert candidates(model, noise(1, 3, 32, 48)).choice == "stage"


class Sides(nn.Module):
    """Four numbers of each of many boxes, (N, 4, boxes): as many as an input of 64 has patches of 32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (4, -1)).softmax(2)


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 4, 4))
        self.stage = nn.Conv2d(8, 32, 2, 2)
        self.sides = Sides()
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        return (self.sides(self.stage(self.stem(x))) * torch.arange(32.0)).sum(2)


def test_the_sides_of_boxes_are_no_picture() -> None:
    """Two positions a side prove nothing: a layer that is certain comes first."""
    found = candidates(Boxes().eval(), noise(1, 3, 64, 64))
    assert {one.name for one in found} >= {"stage", "sides"}
    assert found.choice == "stage"


def test_a_scripted_layer_inside_takes_no_hook() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation: people still have such layers
        scripted = torch.jit.trace(nn.ReLU(), noise(1, 4, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), scripted, Pool()).eval()
    with GradCAM(model, input_shape=(3, 10, 10)) as extractor, torch.no_grad():
        (cam,) = extractor(0, model(noise(1, 3, 10, 10)))
    assert extractor.target_names == ["0"]
    assert cam.shape == (1, 8, 8)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("method", [AblationCAM, ReciproCAM])
def test_the_default_layer_must_count_for_the_target_of_edited_activations(method: Any) -> None:
    model = Pooled()
    with method(model, input_shape=(3, 32, 32)) as extractor, torch.no_grad():
        model(noise(1, 3, 32, 32))
        assert extractor.target_names == ["norm"]
        with pytest.raises(ValueError, match=r"default layer 'norm', but on those of 'embed': name that"):
            extractor(targets=lambda output: output[1][2])
        assert extractor(0)[0].shape == (1, 8, 8)


class Decoder(nn.Module):
    """Tokens of a picture look at themselves, then at ten others."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.block = CrossBlock(explicit)
        self.fc = nn.Linear(8, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.embed(x).flatten(2).mT).mean(1))


class CrossBlock(nn.Module):
    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.explicit = explicit

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens.unsqueeze(1)
        own, others = nn.functional.scaled_dot_product_attention(own, own, own), own[:, :, :10]
        if self.explicit:
            return ((own @ others.mT).softmax(-1) @ others).squeeze(1)
        return nn.functional.scaled_dot_product_attention(own, others, others).squeeze(1)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("method", [LeGrad, AttentionRollout, TransformerAttribution])
def test_blocks_of_cross_attention_are_refused(method: Any, explicit: bool) -> None:
    model = Decoder(explicit)
    options = {"score_projection": lambda tokens: model.fc(tokens.mean(1))} if method is LeGrad else {}
    with method(model, "block", prefix_tokens=0, **options) as extractor:
        model(noise(1, 3, 32, 32))
        with pytest.raises(ValueError, match=r"'block' computes cross-attention, of shapes \[\(1, 1, 64, 10\)\]"):
            extractor(0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads it
def test_rectifiers_in_compiled_parts_are_not_passed_over() -> None:
    compiled = torch.compile(lambda t: t.relu(), backend="aot_eager")

    class Net(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(compiled(self.stage(self.stem(x))).flatten(2).mean(2))

    model = Net(channels=16)
    with GuidedBackprop(model) as extractor:
        model(noise(1, 3, 16, 16))
        with pytest.raises(ValueError, match=r"compiled by `torch.compile`"):
            extractor(0)


def test_channels_of_a_detector_are_ablated_for_its_boxes() -> None:
    """Proposals and suppression differ from variant to variant; by hand, the whole detector runs for each."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Tanh())
    backbone.out_channels = 6
    model = FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 2),
        box_score_thresh=0.0,
        rpn_post_nms_top_n_test=12,
        box_detections_per_img=8,
    )
    shuffled(model)
    model.eval()
    images = [noise(3, 64, 64).sigmoid()]
    with torch.no_grad():
        (found,) = model(images)
        target = BoxScores(found["labels"][:2], found["boxes"][:2])
        drops = []
        for channel in range(6):

            def without(_module: nn.Module, _args: Any, output: Tensor, channel: int = channel) -> Tensor:
                return output.index_fill(1, torch.tensor([channel]), 0)

            handle = backbone.register_forward_hook(without)
            drops.append(target(found) - target(model(images)[0]))
            handle.remove()
        weights = torch.stack(drops) / target(found).abs()
        assert weights.abs().max() > 1e-3
        with AblationCAM(model, "backbone") as extractor:
            model(images)
            (cam,) = extractor(targets=target, normalized=False)
            activation = backbone(model.transform(images)[0].tensors)
    torch.testing.assert_close(cam, torch.einsum("c,nchw->nhw", weights, activation).relu(), atol=1e-5, rtol=1e-4)
