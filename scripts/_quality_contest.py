"""Who takes part in the benchmark: the methods of the package on each model, and the baselines that need no model.

Every contestant answers the same question: a map of the pictures' size, in [0, 1], for the class that is asked about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _quality_scenes import SIZE
from torch import Tensor, nn

from torchcam import methods
from torchcam._tensors import gaussian_blur, min_max, resize
from torchcam.methods import gradient

__all__ = ["BASELINES", "Contestant", "Passes", "Witness", "contestants", "count_passes"]

Explain = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From images (N, 3, S, S), classes (N,) and the best maps (N, S, S) to maps (N, S, S); only `truth` reads the last."""

WITHOUT_TOKENS = ("cnn", "shortcut", "vgg", "swin", "convnext")  # that methods of attention could read: a grid has none
# Where passes are counted: the first convolution and the last linear layer. Both are at the bottom of the tree of
# modules, so that no answer from memory is taken for a pass.
FIRST_AND_LAST = {
    "cnn": ("layer1.0.0", "fc"),
    "shortcut": ("net.layer1.0.0", "net.fc"),
    "vgg": ("stage1.0.0", "classifier.3"),
    "vit": ("stem.0.0.0", "vit.heads.head"),
    "swin": ("net.features.0.0", "net.head"),
    "convnext": ("net.features.0.0", "net.classifier.2"),
}
# The layers: the last with positions; those of methods that want several; the blocks, for methods that read attention.
LAST = {
    "cnn": "layer4",
    "shortcut": "net.layer4",
    "vgg": "stage3",
    "vit": "vit.encoder.layers.encoder_layer_2.ln_1",
    "swin": "net.norm",
    "convnext": "net.features.3",
}
SEVERAL = {
    "cnn": ["layer2", "layer3", "layer4"],
    "shortcut": ["net.layer2", "net.layer3", "net.layer4"],
    "vgg": ["stage2", "stage3"],
    "vit": [f"vit.encoder.layers.encoder_layer_{block}.ln_1" for block in (1, 2)],
    "swin": ["net.features.1", "net.features.3"],
    "convnext": ["net.features.1", "net.features.3"],
}
BLOCKS = [f"vit.encoder.layers.encoder_layer_{block}" for block in range(3)]
CLASSIFIER = {"cnn": "fc", "shortcut": "net.fc", "swin": "net.head"}  # where there is global pooling

BASELINES = ("truth", "random", "centre", "edges", "MeanActivation")
"""What every table has to compare with; the last is a method of the package."""

# A share of the pictures for methods whose maps take many passes.
FEW: dict[str, float] = {"ISCAM": 0.1, "SSCAM": 0.1, "ScoreCAM": 0.3, "ReciproCAM": 0.3, "GroupCAM": 0.6, "SESS": 0.6}
SLOWEST = {"ISCAM": ("cnn", "vit"), "SSCAM": ("cnn", "vit")}  # the models they are asked about
OPTIONS: dict[str, dict[str, Any]] = {
    "ScoreCAM": {"batch_size": 96},
    "SSCAM": {"num_samples": 4, "batch_size": 96},
    "ISCAM": {"batch_size": 96},
    "AblationCAM": {"batch_size": 96},
    "ReciproCAM": {"batch_size": 144},
    "SESS": {"window_size": SIZE, "scales": 3},
}
STRONGEST = ("ScoreCAM", "AblationCAM")  # take part once more with the strongest channels alone
_SEVERAL_LAYERS = {"RefineCAM"}
_SIGNED = (methods.GuidedBackprop, methods.GuidedGradCAM)
_WITHOUT_LAYER = {"GuidedBackprop", "FullGrad"}
_ATTENTION = {"AttentionRollout", "LeGrad", "TransformerAttribution"}
_USE_GRADIENTS = {*gradient.__all__, *_ATTENTION - {"AttentionRollout"}} | {
    "AugmentedCAM",
    "EigenGradCAM",
    "EigenSmoothedCAM",
    "FinerCAM",
    "FullGrad",
    "GroupCAM",
    "GuidedBackprop",
    "GuidedGradCAM",
    "RefineCAM",
    "SESS",
    "SegEigenCAM",
}


@dataclass(frozen=True)
class Contestant:
    """One that gives maps.

    Attributes:
        name: how it is called in the tables
        kind: "baseline", "class-agnostic", "gradient" or "gradient-free"
        layers: what it looks at
        explain: makes the maps
        share: the share of the pictures that it is asked about
        remove: takes its hooks off the model
    """

    name: str
    kind: str
    layers: str
    explain: Explain
    share: float = 1.0
    remove: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Passes:
    """What a map costs, for each picture.

    Attributes:
        forward: passes through all of the model
        head: passes through what follows the target layer alone
        backward: backward passes from the score
    """

    forward: float
    head: float
    backward: float

    def __str__(self) -> str:
        counted = ((self.forward, "F"), (self.head, "H"), (self.backward, "B"))
        return " + ".join(f"{count:.3g} {unit}" for count, unit in counted if count) or "0"


class Witness:
    """What a metric takes for an extractor: it asks a contestant about whatever the model has just been shown.

    The metric's model is a copy. The contestant's explains its logits, whatever the metric makes of the copy's.
    """

    def __init__(self, model: nn.Module, explain: Explain) -> None:
        self.model = model
        self.explain = explain
        self.truth = torch.zeros(0)
        self._seen = torch.zeros(0)
        self._last: tuple[Tensor, Tensor] | None = None
        self._handle = model.register_forward_pre_hook(self._look)

    def _look(self, _model: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = args[0]

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    @staticmethod
    def fuse_cams(maps: list[Tensor]) -> Tensor:
        """Return the only map."""
        return maps[0]

    def __call__(self, class_idx: Sequence[int], _scores: Any) -> list[Tensor]:
        """Explain what the model was shown last. Two metrics that show the same get the same answer."""
        if self._last is None or not torch.equal(self._last[0], self._seen):
            maps = self.explain(self._seen.detach(), torch.as_tensor(class_idx), self.truth)
            self._last = (self._seen.detach().clone(), maps)
        return [self._last[1]]


def contestants(name: str, model: nn.Module, only: Sequence[str] | None = None) -> list[Contestant]:
    """List the baselines and the methods that apply to a model.

    Args:
        name: the model's
        model: the model; methods hook it, and look at nothing but the passes they are asked about
        only: the names of those to take; by default all
    """
    found = [Contestant(key, "baseline", "–", explain) for key, explain in _baselines().items()]
    for key in methods.__all__:
        if not inspect.isclass(getattr(methods, key)) or key == "DeepFeatureFactorization":  # it explains no score
            continue
        if (key == "CAM" and name not in CLASSIFIER) or (key in _ATTENTION and name in WITHOUT_TOKENS):
            continue
        if key in SLOWEST and name not in SLOWEST[key]:
            continue
        found.append(_method(key, name, model))
    found.append(_method("LayerCAM", name, model, "LayerCAM, fused", SEVERAL[name]))
    found += [_method(key, name, model, f"{key}, 90 % energy", options={"energy": 0.9}) for key in STRONGEST]
    if name == "vit":

        def read_class_token(tokens: Tensor, model: Any = model) -> Tensor:
            scores: Tensor = model.vit.heads(model.vit.encoder.ln(tokens[:, 0]))
            return scores

        found.append(
            _method("LeGrad", name, model, "LeGrad, class token", options={"score_projection": read_class_token})
        )
    return [one for one in found if only is None or one.name in only]


def _method(
    key: str,
    name: str,
    model: nn.Module,
    title: str = "",
    layers: list[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Contestant:
    """Put a method of the package on a model."""
    method: Any = getattr(methods, key)
    target: Any = layers or (SEVERAL[name] if key in _SEVERAL_LAYERS else LAST[name])
    if key in _ATTENTION:
        target = BLOCKS
    elif key in _WITHOUT_LAYER:
        target = None
    options = OPTIONS.get(key, {}) | dict(options or {})
    if key == "CAM":
        options["fc_layer"] = CLASSIFIER[name]
    if key == "LeGrad" and "score_projection" not in options:
        options["score_projection"] = partial(_read_mean_token, model)
    extractor = method(model, target, enable_hooks=False, **options)
    if getattr(method, "class_agnostic", False):
        kind = "class-agnostic"
    else:
        kind = "gradient" if key in _USE_GRADIENTS else "gradient-free"
    shown = (
        "input"
        if target is None
        else ", ".join(_short(layer) for layer in ([target] if isinstance(target, str) else target))
    )
    explain = partial(_explain, extractor)
    if key == "ShapleyCAM":
        explain = partial(_twice_differentiable, explain)
    return Contestant(title or key, kind, shown, explain, FEW.get(key, 1.0), extractor.remove_hooks)


def _read_mean_token(model: Any, tokens: Tensor) -> Tensor:
    """Read class scores as LeGrad does by default."""
    scores: Tensor = model.vit.heads(model.vit.encoder.ln(tokens.mean(1)))
    return scores


def _short(layer: str) -> str:
    return (
        layer.removeprefix("net.")
        .removeprefix("vit.encoder.layers.")
        .replace("encoder_layer_", "block ")
        .replace(".ln_1", ", ln_1")
    )


@torch.no_grad()
def _explain(extractor: Any, images: Tensor, classes: Tensor, _truth: Tensor) -> Tensor:
    """Explain the logits of a batch."""
    extractor.enable_hooks()
    try:
        scores = extractor.model(images)
        asked = None if getattr(extractor, "class_agnostic", False) else classes
        # Input gradients have a sign, and 0 is where nothing matters: scaled to [0, 1] that would be lost.
        maps = extractor(asked, scores, normalized=not isinstance(extractor, _SIGNED))
    finally:
        extractor.disable_hooks()
    cam: Tensor = extractor.fuse_cams(maps) if len(maps) > 1 else maps[0]
    extractor.reset_hooks()
    if isinstance(extractor, _SIGNED):  # how strong the gradient is, in all colours
        cam = min_max(cam.abs().sum(1))
    return resize(cam.detach().unsqueeze(1), images.shape[2:]).squeeze(1)


def _twice_differentiable(explain: Explain, images: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
    """Explain with the one form of attention that has second derivatives."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return explain(images, classes, truth)


def _baselines() -> dict[str, Explain]:
    """Make what needs no model."""
    generator = torch.Generator().manual_seed(0)
    axis = (torch.arange(SIZE) + 0.5 - SIZE / 2) / (SIZE / 4)
    gauss = torch.exp(-0.5 * (axis[:, None] ** 2 + axis**2))

    def random(images: Tensor, _classes: Tensor, _truth: Tensor) -> Tensor:
        noise = torch.rand(len(images), 1, SIZE // 8, SIZE // 8, generator=generator)  # as coarse as a map
        return min_max(resize(noise, (SIZE, SIZE)).squeeze(1))

    def centre(images: Tensor, _classes: Tensor, _truth: Tensor) -> Tensor:
        return gauss.expand(len(images), -1, -1)

    def truth(_images: Tensor, _classes: Tensor, best: Tensor) -> Tensor:
        return best.float()

    return {"truth": truth, "random": random, "centre": centre, "edges": lambda images, _c, _t: edges(images)}


def edges(images: Tensor) -> Tensor:
    """Compute Sobel's gradient magnitude of the brightness, blurred a little: (N, S, S) in [0, 1]."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.mT]).unsqueeze(1)
    brightness = nn.functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    strength = nn.functional.conv2d(brightness, kernels).square().sum(1, keepdim=True).sqrt()
    return min_max(gaussian_blur(strength, 5, 1.0).squeeze(1))


@contextmanager
def _counting(name: str, model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the samples that pass through the model's ends inside the block."""
    counted = {"forward": 0, "all": 0, "backward": 0}
    first, last = (model.get_submodule(key) for key in FIRST_AND_LAST[name])

    def entered(_module: nn.Module, args: tuple[Any, ...]) -> None:
        counted["forward"] += len(args[0])

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        counted["all"] += len(output)
        if output.requires_grad:
            output.register_hook(partial(returned, len(output)))

    def returned(samples: int, _gradient: Tensor) -> None:
        counted["backward"] += samples

    handles = [first.register_forward_pre_hook(entered), last.register_forward_hook(left)]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def count_passes(name: str, model: nn.Module, contestant: Contestant, images: Tensor, classes: Tensor) -> Passes:
    """Count the passes that a contestant's maps take: by hooks on the model, while it makes some."""
    with _counting(name, model) as counted:
        contestant.explain(images, classes, torch.zeros(len(images), SIZE, SIZE))
    forward, everything, backward = (counted[key] / len(images) for key in ("forward", "all", "backward"))
    return Passes(forward, max(everything - forward, 0.0), backward)
