"""Every method, ready to be put on a small net: the list that the tests of the promises go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcam import methods

LAYERS = ["block1", "block2"]


class Net(nn.Module):
    """A small CNN with what tends to leave traces: batch norm, dropout, operations in place, a buffer that counts."""

    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(channels, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.block1(x))
        x = self.relu(self.block2(x))
        torch.rand(1)  # some models draw numbers in evaluation mode as well
        return self.fc(self.dropout(x.mean((2, 3))))


class Block(nn.Module):
    """A transformer block of torchvision's make."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        attended, _ = self.self_attention(y, y, y, need_weights=False)
        return x + F.gelu(attended)


class Transformer(nn.Module):
    """A small vision transformer that is read out as torchvision's is."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.block1 = Block(width)
        self.block2 = Block(width)
        self.encoder = nn.Module()
        self.encoder.ln = nn.LayerNorm(width)
        self.heads = nn.Linear(width, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.block2(self.block1(x))
        torch.rand(1)
        return self.heads(self.encoder.ln(x)[:, 0])


def _on(layers: Any, method: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: method(model, layers, **options)


# How each method is made on a net of the kind that MODELS gives for it (`Net` where it gives none).
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "CAM": _on("block2", methods.CAM, fc_layer="fc"),
    "ScoreCAM": _on(LAYERS, methods.ScoreCAM, batch_size=3),
    "SSCAM": _on(LAYERS, methods.SSCAM, batch_size=3, num_samples=2),
    "ISCAM": _on(LAYERS, methods.ISCAM, batch_size=3, num_samples=2),
    "AblationCAM": _on(LAYERS, methods.AblationCAM, batch_size=3),
    "ReciproCAM": _on(LAYERS, methods.ReciproCAM, batch_size=3),
    "GroupCAM": _on(LAYERS, methods.GroupCAM, batch_size=3, groups=2),
    "FEM": _on(LAYERS, methods.FEM, n_sigma=0.5),
    "MeanActivation": _on(LAYERS, methods.MeanActivation),
    "RandomCAM": _on(LAYERS, methods.RandomCAM),
    "GradCAM": _on(LAYERS, methods.GradCAM),
    "GradCAMpp": _on(LAYERS, methods.GradCAMpp),
    "SmoothGradCAMpp": _on(LAYERS, methods.SmoothGradCAMpp, num_samples=2, batch_size=3),
    "XGradCAM": _on(LAYERS, methods.XGradCAM),
    "LayerCAM": _on(LAYERS, methods.LayerCAM),
    "HiResCAM": _on(LAYERS, methods.HiResCAM),
    "GradCAMElementWise": _on(LAYERS, methods.GradCAMElementWise),
    "ShapleyCAM": _on(LAYERS, methods.ShapleyCAM),
    "FinerCAM": _on(LAYERS, methods.FinerCAM),
    "FinerCAM-ScoreCAM": _on(LAYERS, methods.FinerCAM, base_method=methods.ScoreCAM, batch_size=3),
    "RefineCAM": _on(LAYERS, methods.RefineCAM),
    "EigenCAM": _on(LAYERS, methods.EigenCAM),
    "KPCACAM": _on(LAYERS, methods.KPCACAM),
    "EigenGradCAM": _on(LAYERS, methods.EigenGradCAM),
    "SegEigenCAM": _on(LAYERS, methods.SegEigenCAM),
    "EigenSmoothedCAM": _on(LAYERS, methods.EigenSmoothedCAM),
    "AugmentedCAM": _on(LAYERS, methods.AugmentedCAM, batch_size=3),
    "SESS": _on(LAYERS, methods.SESS, window_size=12, scales=2, batch_size=3),
    "GuidedBackprop": methods.GuidedBackprop,
    "GuidedGradCAM": _on(LAYERS, methods.GuidedGradCAM),
    "FullGrad": methods.FullGrad,
    "LeGrad": _on(LAYERS, methods.LeGrad),
    "AttentionRollout": _on(LAYERS, methods.AttentionRollout),
    "TransformerAttribution": methods.TransformerAttribution,
}
_TOKENS = ["patches", "block1"]
# How each method that takes balanced gradients is made with them, on a `Transformer`, behind whose layers are norms,
# attention and a GELU.
BALANCED: dict[str, Callable[[nn.Module], Any]] = {
    name: _on(_TOKENS, getattr(methods, name), gradients="balanced", **options)
    for name, options in {
        **{name: {} for name in ("GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "HiResCAM", "GradCAMElementWise")},
        **{name: {} for name in ("ShapleyCAM", "EigenGradCAM", "SegEigenCAM", "EigenSmoothedCAM", "FinerCAM")},
        **{name: {} for name in ("RefineCAM", "GuidedGradCAM")},
        "SmoothGradCAMpp": {"num_samples": 2, "batch_size": 3},
        "GroupCAM": {"groups": 2, "batch_size": 3},
        "AugmentedCAM": {"batch_size": 3},
        "SESS": {"window_size": 12, "scales": 2, "batch_size": 3},
    }.items()
}
READS_ATTENTION = {"LeGrad", "AttentionRollout", "TransformerAttribution"}
MODELS: dict[str, type[nn.Module]] = dict.fromkeys(READS_ATTENTION, Transformer)


def make_model(name: str, device: torch.device) -> nn.Module:
    """Make the net for a method, in evaluation mode, with fixed weights; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS.get(name, Net)()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data.abs_()  # with evidence for every class, no ReLU leaves a map empty
    return model.to(device).eval()


def make_input(device: torch.device, batch_size: int = 2) -> Tensor:
    """Make a batch of small images."""
    return torch.rand((batch_size, 3, 12, 12), generator=torch.Generator().manual_seed(1)).to(device)
