"""Compare the maps of every method with those of TorchCAM 0.5.0, which is installed into a folder of its own.

Both packages answer for the same models, weights, inputs and classes, in float32 on the CPU. Where a method is known
to differ, the table says why (the numbers are those of the list of differences in the documentation), and the script
computes the map once more in TorchCAM's way: if that agrees, the listed difference is the only one.

The exit code is 1 if a method differs by more than the tolerance for no listed reason, or by more than its reason
explains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _peers import Maps, Peer, run
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PEER = Peer(["torchcam==0.5.0"], "torchcam", __file__)
CLASSES = [3, 250]
LayerMaps = list[Tensor]
Imitation = Callable[["Setting", "Case"], LayerMaps]


@dataclass(frozen=True)
class Setting:
    """A model with an input."""

    title: str
    model: nn.Module
    x: Tensor


@dataclass(frozen=True)
class Case:
    """One extractor to compare.

    Attributes:
        method: the name of its class
        setting: the name of the model and input
        layers: the target layers
        options: arguments of the extractor; `base_method` as a name
        why: what makes TorchCAM's maps differ, "" for nothing
        imitation: computes the raw maps in TorchCAM's way
    """

    method: str
    setting: str
    layers: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    imitation: Imitation | None = None


# TorchCAM's way, for the methods that differ


@contextmanager
def outputs_of(model: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the outputs of layers, in the order of the layers."""
    outputs = [torch.empty(0) for _ in layers]

    def collect(index: int) -> RemovableHandle:
        return model.get_submodule(layers[index]).register_forward_hook(
            lambda _module, _args, output: outputs.__setitem__(index, output)
        )

    handles = [collect(index) for index in range(len(layers))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def differentiate(setting: Setting, layers: Sequence[str], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers' activations, and the gradients of the classes' scores."""
    with outputs_of(setting.model, layers) as activations:
        scores = setting.model(x)
    gradients = torch.autograd.grad(scores[range(len(x)), CLASSES].sum(), activations)
    return [activation.detach() for activation in activations], list(gradients)


def weighted_sums(weights: Sequence[Tensor], activations: Sequence[Tensor]) -> LayerMaps:
    """Sum the weighted channels, rectified."""
    return [
        (weight[..., None, None] * activation).sum(1).relu()
        for weight, activation in zip(weights, activations, strict=True)
    ]


def undivided_grad_cam_pp(setting: Setting, case: Case) -> LayerMaps:
    """Grad-CAM++ whose alpha is its numerator alone."""
    activations, gradients = differentiate(setting, case.layers, setting.x)
    return weighted_sums([(g**2 * g.relu()).sum((2, 3)) for g in gradients], activations)


def noisy_smooth_grad_cam_pp(setting: Setting, case: Case) -> LayerMaps:
    """Smooth Grad-CAM++ on noise of the global stream, with the last activation and the last gradient's ReLU."""
    torch.manual_seed(0)
    clean, _ = differentiate(setting, case.layers, setting.x)
    passes = [
        differentiate(setting, case.layers, setting.x + case.options["std"] * torch.randn(setting.x.shape))
        for _ in range(case.options["num_samples"])
    ]
    weights = []
    for index, activation in enumerate(clean):
        second, third = (torch.stack([gradients[index] ** p for _, gradients in passes]).mean(0) for p in (2, 3))
        alpha = second / (2 * second + (third * activation).sum((2, 3), keepdim=True) + 1e-8)
        weights.append((alpha * passes[-1][1][index].relu()).sum((2, 3)))
    return weighted_sums(weights, passes[-1][0])


@torch.no_grad()
def early_scaled_score_cam(setting: Setting, case: Case) -> LayerMaps:
    """Score-CAM and its relatives with masks that are scaled before the upsampling, and noise of the global stream."""
    torch.manual_seed(0)
    with outputs_of(setting.model, case.layers) as activations:
        setting.model(setting.x)
    num_samples = case.options.get("num_samples", 1)
    weights = []
    for activation in activations:
        low, high = activation.amin((2, 3), keepdim=True), activation.amax((2, 3), keepdim=True)
        masks = (activation - low) / (high - low + 1e-8)
        masks = F.interpolate(masks, setting.x.shape[2:], mode="bilinear", align_corners=False)
        total = torch.zeros(activation.shape[:2])
        strength = 0.0 if case.method == "ISCAM" else 1.0
        for sample in range(num_samples):
            noise = torch.zeros(())
            if case.method == "SSCAM":
                noise = case.options["std"] * torch.randn(masks.shape)
            if case.method == "ISCAM":
                strength += (sample + 1) / num_samples
            for n, class_idx in enumerate(CLASSES):
                variants = strength * (masks + noise)[n].unsqueeze(1) * setting.x[n]
                scores = torch.cat(
                    [setting.model(variants[start : start + 32]) for start in range(0, len(variants), 32)]
                )
                total[n] += scores[:, class_idx]
        weights.append((total / num_samples).softmax(1))
    return weighted_sums(weights, activations)


# What is compared

ALPHA = "1 (alpha is never divided)"
NOISY = "2 (last noisy activation and gradient), 18 (global noise)"
SCALE = "6 (absolute eps in the scaling of small maps)"
EARLY = "15 (masks scaled before upsampling)"
SMALL: dict[str, Any] = {"setting": "small"}
CASES = [
    Case("CAM", "full", ["layer4"], {"fc_layer": "fc"}),
    Case("GradCAM", "full", ["layer4", "layer3", "layer2"]),
    Case("GradCAMpp", "full", ["layer4", "layer3", "layer2"], {}, ALPHA, undivided_grad_cam_pp),
    Case(
        "SmoothGradCAMpp", "full", ["layer4", "layer3"], {"num_samples": 4, "std": 0.3}, NOISY, noisy_smooth_grad_cam_pp
    ),
    Case("XGradCAM", "full", ["layer4", "layer3", "layer2"]),
    Case("LayerCAM", "full", ["layer4", "layer3", "layer2"]),
    Case("FinerCAM", "full", ["layer4", "layer3"], {"base_method": "GradCAM"}),
    Case("FinerCAM", "full", ["layer4", "layer3"], {"base_method": "LayerCAM", "gamma": 0.3, "num_references": 5}),
    Case("RefineCAM", "full", ["layer2", "layer3", "layer4"], {"base_method": "GradCAM"}),
    Case("RefineCAM", "full", ["layer3", "layer4"], {"base_method": "LayerCAM"}),
    Case("ScoreCAM", "small", ["layer2", "layer1"], {}, EARLY, early_scaled_score_cam),
    Case(
        "SSCAM", "small", ["layer2"], {"num_samples": 3, "std": 2.0}, f"{EARLY}, 18 (global noise)",
        early_scaled_score_cam,
    ),
    Case("ISCAM", "small", ["layer2"], {"num_samples": 3}, EARLY, early_scaled_score_cam),
    Case("LeGrad", "transformer", ["encoder.layers.encoder_layer_3"]),
    Case("LeGrad", "transformer", [f"encoder.layers.encoder_layer_{block}" for block in range(4)]),
]  # fmt: skip


def make_settings() -> dict[str, Setting]:
    """Build the models and inputs, the same in both processes."""
    from torchvision.models import VisionTransformer, resnet18

    torch.manual_seed(0)
    resnet = resnet18().eval()
    transformer = VisionTransformer(
        image_size=224, patch_size=16, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128
    ).eval()
    nn.init.normal_(transformer.heads.head.weight)  # torchvision starts it at 0
    large, small = torch.rand(2, 3, 224, 224), torch.rand(2, 3, 64, 64)
    return {
        "full": Setting("resnet18, 2 x 3 x 224 x 224", resnet, large),
        "small": Setting("resnet18, 2 x 3 x 64 x 64", resnet, small),
        "transformer": Setting("VisionTransformer of 4 blocks, 64 channels, 2 x 3 x 224 x 224", transformer, large),
    }


def maps_of_package(settings: Mapping[str, Setting]) -> Maps:
    """Compute all maps with the `torchcam` that is imported in this process, by case, layer and normalisation."""
    import torchcam.methods as methods

    maps = {}
    for number, case in enumerate(CASES):
        setting = settings[case.setting]
        options = dict(case.options)
        if "base_method" in options:
            options["base_method"] = getattr(methods, options["base_method"])
        layers = list(case.layers)
        for kind in ("normalised", "raw"):
            torch.manual_seed(0)
            with getattr(methods, case.method)(setting.model, layers, **options) as extractor:
                scores = setting.model(setting.x)
                for layer, cam in enumerate(extractor(CLASSES, scores, normalized=kind == "normalised")):
                    maps[f"{number}.{layer}.{kind}"] = cam.detach().numpy()
    return maps


def scaled_with_eps(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1] as TorchCAM does."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-8)


def difference(one: np.ndarray[Any, Any] | Tensor, other: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference, NaN if the shapes differ."""
    array = np.asarray(one)
    return float(np.abs(array - other).max()) if array.shape == other.shape else float("nan")


def compare(peer: Maps, tolerance: float) -> bool:
    """Print the table; return whether all differences are as they should be."""
    settings = make_settings()
    ours = maps_of_package(settings)
    package = PEER.requirements[0]
    print(f"{package} and this package: largest absolute difference of the maps in [0, 1], float32, batch of 2")
    print(f"models with random weights, classes {CLASSES}; tolerance {tolerance:g}")
    print("'in its way': what is left when the listed difference is undone here; '-' where there is none to undo\n")
    header = f"{'method':<28}{'layer':<18}{'map':<9}{'difference':>11}{'in its way':>12}  why"
    good = True
    for name, setting in settings.items():
        if name != "full":
            print()
        note = " (small, as the method runs the model once per channel)" if name == "small" else ""
        print(f"{setting.title}{note}\n{header}\n{'-' * len(header)}")
        for number, case in enumerate(CASES):
            if case.setting != name:
                continue
            imitated = None if case.imitation is None else case.imitation(setting, case)
            base = case.options.get("base_method")
            title = f"{case.method}({base})" if base else case.method
            single = case.method in {"RefineCAM", "LeGrad"}
            for layer in range(1 if single else len(case.layers)):
                key = f"{number}.{layer}.normalised"
                found = difference(ours[key], peer[key])
                in_its_way, why = "-", ""
                fine = found <= tolerance
                if imitated is not None or not fine:
                    # The absolute eps of its scaling is to be seen where raw maps are small.
                    raw = torch.from_numpy(ours[f"{number}.{layer}.raw"]) if imitated is None else imitated[layer]
                    unexplained = difference(scaled_with_eps(raw), peer[key])
                    fine = unexplained <= tolerance
                    in_its_way = f"{unexplained:.1e}"
                    why = (case.why or SCALE) if fine else "NOT LISTED"
                good &= fine
                where = f"{len(case.layers)} together" if single else case.layers[layer]
                side = "x".join(str(length) for length in ours[key].shape[1:])
                print(f"{title:<28}{where:<18}{side:<9}{found:>11.1e}{in_its_way:>12}  {why}".rstrip())
    print("\n" + ("all as listed" if good else "FAILED: a difference that is not listed"))
    return good


if __name__ == "__main__":
    sys.exit(run(PEER, __doc__, lambda: maps_of_package(make_settings()), compare, tolerance=1e-5))
