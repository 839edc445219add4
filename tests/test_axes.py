"""Inputs whose positions are not the dimensions from the third on: films, spectrograms, signals, channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcam import methods
from torchcam.explain import explain as _explain
from torchcam.metrics import ClassificationMetric
from torchcam.trust import trust

explain: Any = _explain
LAYER = "net.2"


class Rearranged(nn.Module):
    """A net behind a function that brings inputs into the form that it takes."""

    def __init__(self, net: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.net(self.change(x))


def net_of(dimensions: int, channels: int) -> nn.Module:
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions]
    stride = (1, 2, 2)[-dimensions:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [conv(channels, 4, 3, stride=stride, padding=1), nn.ReLU(), conv(4, 5, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(5, 3)).eval()


CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # the input of the net, to that of the model, and back
    "film": ((2, 3, 8, 12, 10), lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
    "channels last": ((2, 3, 12, 10), lambda x: x.movedim(1, 3), lambda x: x.movedim(3, 1)),
    "spectrogram": ((2, 1, 24, 20), lambda x: x.squeeze(1), lambda x: x.unsqueeze(1)),
    "signal": ((2, 1, 64), lambda x: x.squeeze(1), lambda x: x.unsqueeze(1)),
}
METHODS = [
    *("ScoreCAM", "SSCAM", "ISCAM", "GroupCAM", "AblationCAM", "ReciproCAM", "AugmentedCAM", "SmoothGradCAMpp"),
    *("GradCAM", "GuidedGradCAM", "GuidedBackprop", "FullGrad"),
]


@pytest.mark.parametrize(
    ("case", "name"),
    # Without a layer nothing tells a spectrogram from a signal of many channels.
    [(c, m) for c in CASES for m in METHODS if c != "spectrogram" or m not in {"GuidedBackprop", "FullGrad"}],
)
@pytest.mark.filterwarnings("ignore:.*has activations of both signs")
def test_maps_are_those_of_the_net_itself(name: str, case: str) -> None:
    """The oracle is the same net on its input in the usual form."""
    shape, to_model, to_net = CASES[case]
    net = net_of(len(shape) - 2, shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    method, has_layer = getattr(methods, name), name not in {"GuidedBackprop", "FullGrad"}
    with method(net, *(["2"] if has_layer else [])) as extractor, torch.no_grad():
        net(x)
        (expected,) = extractor([0, 2])
    model = Rearranged(net, to_net)
    given = to_model(x)
    with method(model, *([LAYER] if has_layer else [])) as extractor, torch.no_grad():
        model(given)
        (cam,) = extractor([0, 2])
    assert expected.abs().max() == 1
    torch.testing.assert_close(cam, expected, rtol=0, atol=1e-5)
    assert torch.equal(given, to_model(x))


@pytest.mark.parametrize("case", ["film", "signal", "spectrogram"])
def test_explain(case: str) -> None:
    shape, to_model, to_net = CASES[case]
    net = net_of(len(shape) - 2, shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if case == "spectrogram":  # which a convolution of pictures alone would not tell from an image without a batch
        x = torch.cat([x] * 3)
    expected = explain(net, x, method="ScoreCAM", target_layer="2")
    results = explain(Rearranged(net, to_net), to_model(x), method="ScoreCAM", target_layer=LAYER)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits)
        index = one.predicted_class_idx
        torch.testing.assert_close(one.cams[index][0], other.cams[index][0], rtol=0, atol=1e-5)
        assert one.results["ScoreCAM"].fused[index].shape == one.cams[index][0].shape


def test_a_film_of_transformers_under_masks() -> None:
    """Score-CAM by hand: a mask goes over time, height and width, and is the same for all colours."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VideoMAEConfig(**sizes, image_size=64, patch_size=16, num_frames=8, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.VideoMAEForVideoClassification(config).double().eval()
        nn.init.normal_(model.classifier.weight)
    x = torch.randn((1, 8, 3, 64, 64), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = "videomae.encoder.layer.0"
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _a, out: kept.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    for given in (x, {"pixel_values": x}):
        result = explain(model, given, method="ScoreCAM", target_layer=layer, class_idx=1)
        (cam,) = result.cams[1]
        with torch.no_grad():
            activation = kept[0][0].T.reshape(32, 1, 4, 4, 4)
            masks = F.interpolate(activation, size=(8, 64, 64), mode="trilinear", align_corners=False)
            lowest, highest = masks.amin((1, 2, 3, 4), keepdim=True), masks.amax((1, 2, 3, 4), keepdim=True)
            masked = x * ((masks - lowest) / (highest - lowest)).transpose(1, 2)  # (32, T, 1, H, W)
            weights = model(masked).logits[:, 1].softmax(0)
        expected = (weights.reshape(-1, 1, 1, 1) * activation[:, 0]).sum(0).relu()
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(cam.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 3, 12, 10), (1, 24, 20, 3)])
def test_metrics_and_trust_say_what_they_hide_parts_of(shape: tuple[int, ...]) -> None:
    dimensions = len(shape) - 2
    to_net = CASES["film" if dimensions == 3 else "channels last"][2]
    model = Rearranged(net_of(dimensions, 3), to_net)
    with pytest.raises(ValueError, match=r"has its channels behind positions.*permutes it for the model"):
        trust(model, torch.rand(shape), target_layer=LAYER)
    metric = ClassificationMetric(methods.GradCAM(model, LAYER))
    with pytest.raises(ValueError, match="has its channels behind positions"):
        metric.update(torch.rand(shape), 1)


def test_speech_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 2,
        "conv_dim": [8, 8],
        "conv_stride": [5, 4],
        "conv_kernel": [10, 8],
        "num_labels": 3,
        "vocab_size": 8,
    }
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**sizes)).double().eval()
    sound = torch.randn((2, 1200), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    named = explain(model, {"input_values": sound}, class_idx=1)
    for method in ("GradCAM", "ScoreCAM", "GuidedBackprop"):
        both = explain(model, sound, method=method, class_idx=1)
        for row, result in enumerate(both):
            alone = explain(model, sound[row : row + 1], method=method, class_idx=1)
            torch.testing.assert_close(result.cams[1][0], alone.cams[1][0], rtol=0, atol=1e-4)
            shape = (1, 1200) if method == "GuidedBackprop" else (58,)
            assert result.cams[1][0].shape == shape
            if method == "GradCAM":
                torch.testing.assert_close(named[row].cams[1][0], result.cams[1][0])
    torch.testing.assert_close(both[0].logits[0], model(sound).logits[0].detach(), rtol=0, atol=1e-5)
