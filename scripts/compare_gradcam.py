"""Compare the maps of methods with those of pytorch-grad-cam 1.5.7, which is installed into a folder of its own.

Both packages answer for the same models, weights, inputs and classes (those of the highest logits), in float32 on the
CPU. Of either the map at the layer's resolution is taken, rectified, scaled to [0, 1] and resized by one and the same
function, so that what is compared is the method alone: by the cosine between the maps of a sample, the smallest of the
batch.

Where the peer's definition is not the paper's, the table says why, and the script computes the map once more in the
peer's way: if that agrees, the listed difference is the only one.

The exit code is 1 if a cosine is lower than 1 less the tolerance for no listed reason, or if a listed one does not
explain all of it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _peers import Maps, Peer, run
from torch import Tensor, nn

from torchcam._tensors import min_max, resize

PEER = Peer(
    ["grad-cam==1.5.7", "ttach==0.0.3", "opencv-python-headless>=4.8"],
    "pytorch_grad_cam",
    __file__,
)
Imitation = Callable[["Setting", str, list[int]], Tensor]
Answer = Callable[["Setting", str, list[Any]], Any]


@dataclass(frozen=True)
class Setting:
    """A model with an input."""

    title: str
    model: nn.Module
    x: Tensor

    def classes(self) -> list[int]:
        """Return each sample's class of the highest logit."""
        with torch.no_grad():
            logits: Tensor = self.model(self.x)
        chosen: list[int] = logits.argmax(1).tolist()
        return chosen


@dataclass(frozen=True)
class Case:
    """One method to compare.

    Attributes:
        method: the name of its class
        peer: the name of the peer's class
        layers: the target layers, by the name of the model and input
        options: arguments of our extractor
        why: what makes the peer's maps differ, "" for nothing
        imitation: computes the raw map in the peer's way
        answer: computes the peer's map, where that is not what its `get_cam_image` gives for one call
        call: options of the peer's call
    """

    method: str
    peer: str
    layers: Mapping[str, Sequence[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    imitation: Imitation | None = None
    answer: Answer | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


# The peer's way, for the methods that differ


def _hooked(setting: Setting, layer: str, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Return a layer's activation, and the gradient of the classes' scores."""
    activations: list[Tensor] = []
    handle = setting.model.get_submodule(layer).register_forward_hook(lambda _m, _a, output: activations.append(output))
    scores = setting.model(setting.x)
    handle.remove()
    (gradient,) = torch.autograd.grad(scores[range(len(classes)), classes].sum(), activations)
    return activations[0].detach(), gradient


def padded_grad_cam_pp(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """Grad-CAM++ with an absolute number added to the denominator of alpha."""
    activation, gradient = _hooked(setting, layer, classes)
    mass = activation.sum((2, 3), keepdim=True)
    alpha = gradient**2 / (2 * gradient**2 + mass * gradient**3 + 1e-6)
    weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
    return (weights * activation).sum(1)


def share_weighted_fem(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """FEM with activations weighted by the share of positions that are unusually high."""
    activation, _ = _hooked(setting, layer, classes)
    deviation, mean = torch.std_mean(activation, (2, 3), correction=0, keepdim=True)
    share = (activation > mean + 2 * deviation).float().mean((2, 3), keepdim=True)
    return (share * activation).sum(1)


@torch.no_grad()
def corner_aligned_score_cam(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """Score-CAM with masks that are upsampled with their corners aligned."""
    with torch.enable_grad():
        activation, _ = _hooked(setting, layer, classes)
    size = setting.x.shape[2:]
    masks = min_max(F.interpolate(activation, size, mode="bilinear", align_corners=True), start_dim=2)
    scores = [
        torch.cat([setting.model(mask.unsqueeze(1) * x)[:, c] for mask in sample.split(32)])
        for sample, x, c in zip(masks, setting.x, classes, strict=True)
    ]
    return torch.einsum("nc,nchw->nhw", torch.stack(scores).softmax(1), activation)


def _projected(features: Tensor) -> Tensor:
    """Project positions on their first principal component, with the sign that the decomposition happens to give."""
    matrices = features.flatten(2).mT.numpy()
    centred = [matrix - matrix.mean(0) for matrix in matrices]
    projections = [matrix @ np.linalg.svd(matrix)[2][0] for matrix in centred]
    return torch.from_numpy(np.stack(projections)).reshape(len(features), *features.shape[2:])


def unsigned_eigen_cam(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """Eigen-CAM without a sign rule."""
    return _projected(_hooked(setting, layer, classes)[0])


def unsigned_eigen_grad_cam(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """Eigen-Grad-CAM without a sign rule."""
    activation, gradient = _hooked(setting, layer, classes)
    return _projected(gradient * activation)


def unsigned_eigen_smoothed_cam(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """The first principal component of Grad-CAM's weighted channels without a sign rule."""
    activation, gradient = _hooked(setting, layer, classes)
    return _projected(gradient.mean((2, 3), keepdim=True) * activation)


def unsigned_kpca_cam(setting: Setting, layer: str, classes: list[int]) -> Tensor:
    """KPCA-CAM with scikit-learn's sign rule."""
    from sklearn.decomposition import KernelPCA

    activation, _ = _hooked(setting, layer, classes)
    matrices = activation.flatten(2).mT.numpy()
    maps = [KernelPCA(1, kernel="sigmoid").fit_transform(matrix - matrix.mean(0)) for matrix in matrices]
    return torch.from_numpy(np.stack(maps)).reshape(len(activation), *activation.shape[2:])


def channel_scaled_full_grad(setting: Setting, _layer: str, classes: list[int]) -> Tensor:
    """FullGrad with every channel scaled by itself."""
    from torchcam.methods import FullGrad
    from torchcam.methods.core import Request

    with FullGrad(setting.model) as extractor:
        setting.model(setting.x)
        terms: list[Tensor] = []
        extractor._each_term(Request(extractor._recorder.find(), classes), terms.append)
    terms = [term.abs() for term in terms if term.ndim == 4]
    shifted = [term - term.amin((2, 3), keepdim=True) for term in terms]
    channels = [term / (1e-7 + term.amax((2, 3), keepdim=True)) for term in shifted]
    return torch.stack([resize(term, setting.x.shape[2:]).sum(1) for term in channels]).sum(0)


def augmented_by_peer(setting: Setting, layer: str, targets: list[Any]) -> Any:
    """Compute an augmented Grad-CAM with the peer."""
    from pytorch_grad_cam import GradCAM

    with GradCAM(setting.model, [setting.model.get_submodule(layer)]) as extractor:
        return extractor(setting.x.clone(), targets, aug_smooth=True)


def full_grad_by_peer(setting: Setting, _layer: str, targets: list[Any]) -> Any:
    """Compute FullGrad with the peer."""
    from pytorch_grad_cam import FullGrad

    with FullGrad(setting.model, []) as extractor:
        return extractor(setting.x.clone(), targets)


def guided_by_peer(setting: Setting, _layer: str, _targets: list[Any]) -> Any:
    """Compute guided backpropagation with the peer, on one image after the other."""
    from pytorch_grad_cam import GuidedBackpropReLUModel

    guided = GuidedBackpropReLUModel(copy.deepcopy(setting.model), "cpu")  # it leaves other ReLUs behind
    pairs = zip(setting.x, setting.classes(), strict=True)
    return np.stack([guided(x.unsqueeze(0).clone(), c).transpose(2, 0, 1) for x, c in pairs])


# What is compared

GRADIENT = {"resnet": ["layer4", "layer3", "layer2"], "demo": ["layer4", "layer3", "layer2"]}
MASKED = {"resnet": ["layer1"], "demo": ["layer4", "layer2"]}
INPUT = {"resnet": ["input"], "demo": ["input"]}
EIGEN = "has the sign that the decomposition gives"
CHANNELS = "scales every channel by itself"
CASES = [
    Case("GradCAM", "GradCAM", GRADIENT),
    Case("GradCAMpp", "GradCAMPlusPlus", GRADIENT, {}, "adds 1e-6 to alpha's denominator", padded_grad_cam_pp),
    Case("XGradCAM", "XGradCAM", GRADIENT),
    Case("LayerCAM", "LayerCAM", GRADIENT),
    Case("HiResCAM", "HiResCAM", GRADIENT),
    Case("GradCAMElementWise", "GradCAMElementWise", GRADIENT),
    Case("ShapleyCAM", "ShapleyCAM", GRADIENT),
    Case("FEM", "FEM", GRADIENT, {}, "weights A by the share of B, not B by the mean of A", share_weighted_fem),
    Case("AblationCAM", "AblationCAM", MASKED),
    Case("ScoreCAM", "ScoreCAM", MASKED, {}, "masks upsampled with corners aligned", corner_aligned_score_cam),
    Case("EigenCAM", "EigenCAM", GRADIENT, {}, EIGEN, unsigned_eigen_cam),
    Case("EigenGradCAM", "EigenGradCAM", GRADIENT, {}, EIGEN, unsigned_eigen_grad_cam),
    Case("SegEigenCAM", "SegEigenCAM", GRADIENT),
    Case("KPCACAM", "KPCA_CAM", GRADIENT, {}, EIGEN, unsigned_kpca_cam),
    Case("EigenSmoothedCAM", "GradCAM", GRADIENT, {}, EIGEN, unsigned_eigen_smoothed_cam, call={"eigen_smooth": True}),
    Case("AugmentedCAM", "GradCAM", GRADIENT, answer=augmented_by_peer),
    Case(
        "FullGrad", "FullGrad", INPUT, {}, "scales every channel by itself", channel_scaled_full_grad, full_grad_by_peer
    ),
    Case("GuidedBackprop", "GuidedBackpropReLUModel", INPUT, answer=guided_by_peer),
]


def make_settings() -> dict[str, Setting]:
    """Build the models and inputs, the same in both processes."""
    from torchvision.models import resnet18

    from torchcam.demo import load_model, sample_images

    torch.manual_seed(0)
    resnet = resnet18().eval()
    pictures = torch.cat([sample.to_tensor() for sample in sample_images()[:2]])
    return {
        "resnet": Setting("resnet18 with random weights, 2 x 3 x 128 x 128", resnet, torch.rand(2, 3, 128, 128)),
        "demo": Setting("the bundled model, 2 x 3 x 96 x 96", load_model(), pictures),
    }


def maps_of_peer() -> Maps:
    """Compute all maps with the peer, by case, setting and layer."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    maps = {}
    for name, setting in make_settings().items():
        targets = [ClassifierOutputTarget(class_idx) for class_idx in setting.classes()]
        for case in CASES:
            for layer in case.layers[name]:
                if case.answer is not None:
                    with contextlib.redirect_stdout(io.StringIO()):
                        maps[f"{case.method}.{name}.{layer}"] = case.answer(setting, layer, targets)
                    continue
                extractor = getattr(pytorch_grad_cam, case.peer)(setting.model, [setting.model.get_submodule(layer)])
                compute = extractor.get_cam_image

                def keep(*args: Any, key: str = f"{case.method}.{name}.{layer}", compute: Any = compute) -> Any:
                    maps[key] = compute(*args)
                    return maps[key]

                extractor.get_cam_image = keep
                with extractor, contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    extractor(setting.x.clone(), targets, **case.call)
    return maps


def scaled(cam: Tensor, setting: Setting) -> Tensor:
    """Rectify, scale and resize a raw map; one that has the input's shape is as it should be."""
    if cam.ndim > 3:
        return cam.float()
    return resize(min_max(cam.float().relu()).unsqueeze(1), setting.x.shape[2:]).squeeze(1)


def compare(peer: Maps, tolerance: float) -> bool:
    """Print the table; return whether all differences are as they should be."""
    import torchcam.methods as methods

    print(f"{PEER.requirements[0]} and this package: cosine of the maps of a sample, the smallest of the batch of 2")
    print("'in its way': the cosine when the listed difference is undone here; '-' where there is none to undo")
    header = f"{'method':<20}{'layer':<8}{'map':<9}{'cosine':>12}{'in its way':>12}  why"
    good = True
    for name, setting in make_settings().items():
        print(f"\n{setting.title}\n{header}\n{'-' * len(header)}")
        classes = setting.classes()
        for case in CASES:
            for layer in case.layers[name]:
                target_layer = None if layer == "input" else layer
                with getattr(methods, case.method)(setting.model, target_layer, **case.options) as extractor:
                    scores = setting.model(setting.x)
                    (ours,) = extractor(classes, scores, normalized=False)
                raw = torch.from_numpy(peer[f"{case.method}.{name}.{layer}"])
                theirs = scaled(raw, setting).flatten(1)
                found = F.cosine_similarity(scaled(ours, setting).flatten(1), theirs).amin().item()
                fine, in_its_way = found >= 1 - tolerance, "-"
                if case.imitation is not None:
                    imitated = scaled(case.imitation(setting, layer, classes), setting).flatten(1)
                    explained = F.cosine_similarity(imitated, theirs).amin().item()
                    fine, in_its_way = explained >= 1 - tolerance, f"{explained:.6f}"
                good &= fine
                side = "x".join(str(length) for length in ours.shape[1:])
                why = case.why if fine else "NOT LISTED"
                print(f"{case.method:<20}{layer:<8}{side:<9}{found:>12.6f}{in_its_way:>12}  {why}".rstrip())
    print("\n" + ("all as listed" if good else "FAILED: a difference that is not listed"))
    return good


if __name__ == "__main__":
    sys.exit(run(PEER, __doc__, maps_of_peer, compare, tolerance=1e-4))
