"""Which layer: found by looking at real architectures, not by their names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import resnet, shuffled, tiny_vit
from tests.test_promises import Snapshot, count_hooks
from torchcam.layers import automatic_layer, candidates, layer_name, layer_names
from torchcam.layout import find_layout, first_tensor
from torchcam.methods import CAM, GradCAM, LayerCAM


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a model with fixed random weights; the global random state is kept."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of their own initialisation
        torch.manual_seed(0)
        return build(*args, **kwargs).eval()


def image(height: int = 64, width: int = 64, batch_size: int = 1) -> Tensor:
    return torch.randn((batch_size, 3, height, width), generator=torch.Generator().manual_seed(0))


def small_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 1, 2], [1, 2, 2], [4, 4], num_classes=5)


def small_timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options})


def fresh_vit() -> nn.Module:
    """A vision transformer as torchvision makes it: the head is all zero."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
    assert not model.heads.head.weight.any()
    return model


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v3_large

    return mobilenet_v3_large(num_classes=5)


DEFAULTS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet18": (resnet, 64, "layer4"),
    "mobilenet_v3_large": (mobilenet, 64, "features"),
    # Of the last block's output only the class token is read; the positions count up to its attention's input.
    "torchvision ViT": (fresh_vit, 32, "encoder.layers.encoder_layer_2.ln_1"),
    "Swin": (small_swin, 64, "permute"),
    "timm ViT, class token": (small_timm_vit, 32, "blocks.2.norm1"),
    "timm ViT, average": (lambda: small_timm_vit(class_token=False, global_pool="avg", fc_norm=False), 32, "norm"),
    "timm ViT, average of all but the class token": (lambda: small_timm_vit(global_pool="avg"), 32, "norm"),
    "timm ViT, registers": (lambda: small_timm_vit(reg_tokens=4), 32, "blocks.2.norm1"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_layer(name: str) -> None:
    build, side, expected = DEFAULTS[name]
    model = seeded(build)
    assert automatic_layer(model, (3, side, side)) == expected
    with GradCAM(model, input_shape=(3, side, side)) as extractor, torch.inference_mode():
        assert extractor.target_names == [expected]
        model(image(side, side))
        (cam,) = extractor(0, relu=False)
    assert cam.isfinite().all()
    assert cam.shape[1] == cam.shape[2] > 1
    # A zero head lets no gradient through: the map is rightly empty, though the layer is rightly chosen.
    assert cam.abs().max() == (0 if name == "torchvision ViT" else 1)


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()

    def forward(self, *, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(pixel_values)}


class TwoInputs(nn.Module):
    """One layer on each of two images; the second one's scores count twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.fc = nn.Linear(4, 5)
        shuffled(self)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.fc(self.left(left).relu().mean((2, 3)) + 2 * self.right(right).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "args", "kwargs", "expected"),
    [
        (KeywordOnly, (), {"pixel_values": image(64, 96)}, "net.layer4"),
        # The layer has the positions of the input that is meant: the first.
        (TwoInputs, (image(16, 16), image(16, 16)), {}, "left"),
        (TwoInputs, (), {"right": image(16, 16), "left": image(16, 16)}, "right"),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_choice_waits_for_the_first_input(
    make: Callable[[], nn.Module],
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    expected: str,
    mode: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded(make)
    with GradCAM(model, expected) as extractor:
        model(*args, **kwargs)
        (known,) = extractor(1)
    with caplog.at_level(logging.WARNING, "torchcam.methods.core"), GradCAM(model) as extractor, mode():
        assert extractor.target_names == []
        assert not caplog.records
        with pytest.raises(AssertionError, match="no forward pass"):
            extractor(0)
        model(*args, **kwargs)
        assert extractor.target_names == [expected]
        assert caplog.messages == [f"no value was provided for `target_layer`, thus set to '{expected}'."]
        torch.testing.assert_close(extractor(1)[0], known)
        model(*args, **kwargs)
        torch.testing.assert_close(extractor(1)[0], known)
        assert len(caplog.records) == 1
    assert known.max() == 1
    assert count_hooks(model) == 0
    assert torch.is_grad_enabled()


def test_the_choice_stays_where_one_position_is_left() -> None:
    model = resnet()
    with LayerCAM(model) as extractor:
        assert extractor.target_names == ["layer4"]
        with pytest.warns(UserWarning, match=r"'layer4' has a single position .* \(3, 32, 32\).* such as 'layer3'"):
            model(image(32, 32))
        assert extractor.target_names == ["layer4"]
        assert extractor(0, retain_graph=True)[0].tolist() == [[[0.0]]]
        assert extractor(0, normalized=False, relu=False)[0].abs().sum() > 0
        model(image(64, 64))  # the choice is made once
        assert extractor.target_names == ["layer4"]
        assert extractor(0)[0].shape == (1, 2, 2)
    assert count_hooks(model) == 0
    with LayerCAM(model) as extractor:
        model(image(64, 96))
        assert extractor.target_names == ["layer4"]
        assert extractor(0)[0].shape == (1, 2, 3)


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 32, 32)])
def test_cam_looks_before_the_pooling_though_one_position_is_left(
    shape: tuple[int, ...], recwarn: pytest.WarningsRecorder
) -> None:
    model = resnet()
    with CAM(model, input_shape=shape) as extractor, torch.no_grad():
        model(image(32, 32))
        assert extractor.target_names == ["layer4"]
        assert extractor(0)[0].tolist() == [[[0.0]]]
        expected = (model.fc.weight[0] * extractor.hook_a[0].flatten()).sum()
        torch.testing.assert_close(extractor(0, normalized=False)[0].flatten()[0], expected)
    (warning,) = recwarn
    assert "'layer4' has a single position for an input of shape (3, 32, 32)" in str(warning.message)
    assert "such as 'layer3'" in str(warning.message)


class SizeDecides(nn.Module):
    """Small inputs take another way: the layer that large ones go through last does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        features = self.late(features) if x.shape[-1] > 16 else features
        return self.fc(features.relu().mean((2, 3)))


def test_the_first_input_corrects_the_choice() -> None:
    model = seeded(SizeDecides)
    with LayerCAM(model, input_shape=(3, 24, 24)) as extractor:
        assert extractor.target_names == ["late"]
        model(image(12, 12))
        assert extractor.target_names == ["stem"]
        assert extractor(0)[0].shape == (1, 12, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_type_of_number(dtype: torch.dtype, frozen: bool) -> None:
    model = resnet(dtype=dtype).requires_grad_(not frozen)
    x = image(64, 64).to(dtype)
    with GradCAM(model, input_shape=(3, 64, 64)) as extractor, torch.no_grad():
        assert extractor.target_names == ["layer4"]
        model(x)
        (cam,) = extractor(3, relu=False)
    assert cam.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with GradCAM(model.double(), "layer4") as extractor, torch.no_grad():
        model(x.double())
        (exact,) = extractor(3, relu=False)
    torch.testing.assert_close(cam.double(), exact, rtol=0, atol=0.1)
    assert all(parameter.requires_grad != frozen for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_looking_leaves_no_trace(frozen: bool, training: bool, mode: Callable[[], Any]) -> None:
    from tests.methods_under_test import Net

    model = seeded(Net).train(training).requires_grad_(not frozen)
    nn.init.zeros_(model.fc.weight)
    model.fc.bias.grad = torch.ones(3)
    x = image(12, 12)
    with mode():
        before, version = Snapshot(model), None if x.is_inference() else x._version
        found = candidates(model, x)
        assert found.choice == "relu"
        before.check(hooks=False)
        assert x.grad is None
        assert not x.requires_grad
        assert version == (None if x.is_inference() else x._version)
        before = Snapshot(model)
        GradCAM(model, input_shape=(3, 12, 12)).remove_hooks()
        before.check(hooks=False)


def test_a_probe_that_fails_leaves_no_trace() -> None:
    model = seeded(TwoInputs).train()
    before = Snapshot(model)
    extractor = GradCAM(model)
    before.check(hooks=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model(image())
    assert extractor.target_names == []
    extractor.remove_hooks()
    before.check(hooks=False)


class Table(HTMLParser):
    """Reads the cells of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


class Strange(nn.Module):
    """Layers that are called twice, do not matter, or have a name that HTML would take amiss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = type("A<b>&", (nn.Conv2d,), {})(4, 4, 3, padding=1)
        self.unused = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(4, 5)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)))
        self.unused(x)
        return self.fc(x.mean((2, 3)))


def test_the_table() -> None:
    found = candidates(seeded(Strange), image(8, 12))
    assert [(c.name, c.type, c.grid, c.channels, c.influence, c.calls) for c in found] == [
        ("stem", "Conv2d", (8, 12), 4, 1.0, 1),
        ("block", "A<b>&", (8, 12), 4, 1.0, 2),
        ("unused", "Conv2d", (8, 12), 2, 0.0, 1),
    ]
    assert [c.depends for c in found] == [True, True, False]
    assert found.choice == "block"
    assert repr(found).splitlines() == [
        "layer   type    grid    channels  influence  calls",
        "-" * 58,
        "stem    Conv2d  8 x 12  4         100%       1",
        "block   A<b>&   8 x 12  4         100%       2  <- default",
        "unused  Conv2d  8 x 12  2         0%         1",
    ]
    html = Table()
    html.feed(found._repr_html_())
    assert html.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert html.rows == [
        ["layer", "type", "grid", "channels", "influence", "calls"],
        ["stem", "Conv2d", "8 x 12", "4", "100%", "1"],
        ["block", "A<b>&", "8 x 12", "4", "100%", "2  <- default"],
        ["unused", "Conv2d", "8 x 12", "2", "0%", "1"],
    ]


def test_candidates_are_a_sequence() -> None:
    found = candidates(seeded(Strange), image(8, 12))
    assert len(found) == 3
    assert found[-1].name == "unused"
    assert [c.name for c in found[:2]] == ["stem", "block"]
    assert type(found[:2]) is type(found)
    assert found[:1].choice == "stem"
    assert found[2:].choice is None
    assert "<- default" not in repr(found[2:])
    assert len(found[:0]) == 0
    assert repr(found[:0]).startswith("layer  type")


def test_only_the_class_token_counts_after_the_last_attention() -> None:
    """The table says what the choice rests on."""
    model = tiny_vit(torch.float32)
    found = {c.name: c for c in candidates(model, image(16, 16))}
    last = "encoder.layers.encoder_layer_2"
    assert found[f"{last}.ln_1"].influence == 1
    assert found[f"{last}.mlp"].influence == 0
    assert not found[last].depends
    assert found["encoder.layers.encoder_layer_1"].depends
    assert found[last].grid == (4, 4)
    assert found[last].layout.prefix == 1


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
        nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()),
    ],
)
def test_no_layer_with_positions(model: nn.Module) -> None:
    message = r"no layer of Sequential has positions .* \(3, 8, 8\).* name a `target_layer`"
    with pytest.raises(ValueError, match=message):
        GradCAM(model, input_shape=(3, 8, 8))
    assert count_hooks(model) == 0


def test_no_layer_with_positions_in_the_first_input() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)))
    with GradCAM(model) as extractor:  # does not take the probe
        assert extractor.target_names == []
        with pytest.raises(ValueError, match=r"shape \(3, 8, 8\): name a `target_layer`"):
            model(image(8, 8))
    assert torch.is_grad_enabled()
    assert count_hooks(model) == 0


def test_names_and_modules() -> None:
    model = resnet()
    assert layer_names(model, model.layer4) == ["layer4"]
    assert layer_names(model, ["layer1", model.layer2[0].conv1]) == ["layer1", "layer2.0.conv1"]
    assert layer_name(model, "layer3") == "layer3"
    with pytest.raises(ValueError, match="`target_layer` 'layer5' is not a module of ResNet; did you mean 'layer4'"):
        layer_name(model, "layer5")
    with pytest.raises(ValueError, match="there are conv1, bn1"):
        layer_name(model, "!?")
    with pytest.raises(ValueError, match=r"`target_layer` Conv2d\(...\) is not a module of this ResNet"):
        layer_name(model, nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="must be a module or its name, got 4"):
        layer_names(model, [4])
    with pytest.raises(ValueError, match="empty list"):
        layer_names(model, [])


def early_block_of_a_vit() -> tuple[nn.Module, str]:
    return small_timm_vit(img_size=(32, 48), reg_tokens=1), "blocks.0"


def early_stage_of_a_swin() -> tuple[nn.Module, str]:
    return small_swin(), "features.2"


def last_stage_of_a_cnn() -> tuple[nn.Module, str]:
    convolutions = [nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)), "2"


@pytest.mark.parametrize("make", [early_block_of_a_vit, early_stage_of_a_swin, last_stage_of_a_cnn])
def test_the_grid_changes_most_where_the_input_does(make: Callable[[], tuple[nn.Module, str]]) -> None:
    names: list[str] = []

    def build() -> nn.Module:
        model, name = make()
        names.append(name)
        return model

    model = seeded(build)
    outputs: list[Tensor] = []
    model.get_submodule(names[0]).register_forward_hook(lambda *a: outputs.append(first_tensor(a[-1])))
    x = image(32, 48)
    with torch.no_grad():
        model(x)
        layout = find_layout(tuple(outputs[-1].shape), (1, 3, 32, 48), names[0])
        rows, columns = layout.grid
        assert (rows, columns) == (4, 6)
        before, hits, transposed = layout.to_grid(outputs[-1]), 0, 0
        for row in range(rows):
            for column in range(columns):
                changed = x.repeat(8, 1, 1, 1)
                patch = changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                patch += 3 * torch.randn(patch.shape, generator=torch.Generator().manual_seed(1))
                model(changed)
                change = (layout.to_grid(outputs[-1]) - before).norm(dim=1).mean(0)
                hits += divmod(int(change.argmax()), columns) == (row, column)
                # What a grid of 6 x 4 would say of the same tokens, but for the first and the last
                transposed += divmod(int(change.argmax()), rows)[::-1] == (row, column)
    assert hits == rows * columns
    assert transposed == 2
