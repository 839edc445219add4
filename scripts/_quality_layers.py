"""Which layer, which method, plain or balanced? Gradient methods at four layers of each model, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _quality_scenes import SIZE, Task
from _quality_scores import CHUNK, COLUMNS, Board, Entry, locate, mean, precisions
from _quality_stats import group_means
from torch import Tensor, nn
from tqdm import tqdm

from torchcam import methods
from torchcam._recommended import recommended
from torchcam._tensors import gaussian_blur, min_max, resize
from torchcam.methods.gradient import _GradientCAM

__all__ = ["LAYERS", "METHODS", "POSITIONS", "RECOMMENDED", "Setting", "choose", "measure_settings", "settings"]

# From the input to the head: the first layer with positions, the next stage or the first tokens, a late one, the last.
POSITIONS = ("first layer", "early layer", "late layer", "last layer")
LAYERS: dict[str, tuple[str, ...]] = {
    "cnn": ("layer1", "layer2", "layer3", "layer4"),
    "vgg": ("stage1.0", "stage1", "stage2", "stage3"),
    "vit": ("stem.0", "vit.conv_proj", *(f"vit.encoder.layers.encoder_layer_{block}.ln_1" for block in (1, 2))),
    "swin": ("net.features.0", "net.features.1", "net.features.2", "net.norm"),
    "convnext": ("net.features.0", "net.features.1", "net.features.2", "net.features.3"),
}
METHODS = (
    "GradCAM",
    "GradCAMpp",
    "SmoothGradCAMpp",
    "XGradCAM",
    "LayerCAM",
    "HiResCAM",
    "GradCAMElementWise",
    "EigenGradCAM",
)
PIECEWISE_LINEAR = ("cnn", "vgg")  # their operations obey the rules already: balanced gradients are the plain ones
_BLUR = SIZE / 8  # pixels


class _Change(_GradientCAM):
    """What a layer's deviation from its mean adds to the score, by position: Σ (A − Ā) G."""

    _relu = False

    def map(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (_deviation(activation) * gradient).sum(1)


class _Size(_GradientCAM):
    """How much a layer's deviation from its mean moves the score, whatever the sign: Σ |(A − Ā) G|."""

    def map(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (_deviation(activation) * gradient).abs().sum(1)


class _Contrast(_GradientCAM):
    """What stands out in a layer, whatever the score: Σ |A − Ā|."""

    def map(self, activation: Tensor, _gradient: Tensor) -> Tensor:
        return _deviation(activation).abs().sum(1)


def _deviation(activation: Tensor) -> Tensor:
    return activation - activation.flatten(2).mean(-1)[..., None, None]


@dataclass(frozen=True)
class Setting:
    """A method, its gradients, and the layers that it looks at.

    Attributes:
        method: its name, "gated", or "recommended"
        balanced: whether its gradients are balanced
        where: how it is made of the maps of the layers: see `_FUSED` and `_GATED`
    """

    method: str
    balanced: bool
    where: str

    def __str__(self) -> str:
        return f"{self.method}, {'balanced' if self.balanced else 'plain'}, {self.where}"


RECOMMENDED = Setting("recommended", True, "by kind of model")


def settings() -> list[Setting]:
    """List all settings."""
    ways = dict.fromkeys(METHODS, tuple(_FUSED)) | {"gated": _GATED}
    every = [Setting(method, kind, where) for method in ways for kind in (False, True) for where in ways[method]]
    return [*every, RECOMMENDED]


def choose(boards: Mapping[str, Board]) -> list[str]:
    """Choose the settings to report, by their average precision over the tasks of each model.

    Those are: for each model, the best plain and the best balanced one; over all models, the best three; Grad-CAM at
    the last layer; and the gated maps.
    """
    means = {
        name: {one: float(np.mean([mean(entry, key) for key in precisions(name)])) for one, entry in board.items()}
        for name, board in boards.items()
    }
    overall = {one: float(np.mean([found[one] for found in means.values()])) for one in next(iter(means.values()))}
    kept = [str(Setting("GradCAM", False, POSITIONS[-1])), str(RECOMMENDED)]
    kept += [str(Setting("gated", kind, where)) for kind in (False, True) for where in _GATED]
    for found, count in [*((found, 1) for found in means.values()), (overall, 3)]:
        for kind in ("plain", "balanced"):
            rivals = {
                one: score for one, score in found.items() if f", {kind}, " in one and one.split(",")[0] in METHODS
            }
            kept += sorted(rivals, key=rivals.__getitem__, reverse=True)[:count]
    return sorted(dict.fromkeys(kept), key=lambda one: -overall[one])


def measure_settings(name: str, model: nn.Module, tasks: Mapping[str, Task], wanted: list[Setting]) -> Board:
    """Score settings on the pictures of some tasks."""
    parts = [
        (letter, task[slice(start, start + CHUNK)])
        for letter, task in tasks.items()
        for start in range(0, len(task), CHUNK)
    ]
    measured = [replace(one, balanced=one.balanced and name not in PIECEWISE_LINEAR) for one in wanted]
    found: dict[Setting, dict[str, list[Tensor]]] = {one: {} for one in measured}
    for method, balanced in tqdm(dict.fromkeys((one.method, one.balanced) for one in found), desc=f"{name}, settings"):
        ask = _SPECIAL.get(method) or partial(_fused, getattr(methods, method))
        asked = [one for one in found if (one.method, one.balanced) == (method, balanced)]
        for letter, part in parts:
            maps = ask(name, model, balanced, part)
            for one in asked:
                for key, value in locate(maps[one.where], part, letter).items():
                    found[one].setdefault(key, []).append(value)
    board = {}
    for one, same in zip(wanted, measured, strict=True):
        single = one.where in POSITIONS
        layers: Sequence[str] = [LAYERS[name][POSITIONS.index(one.where)]] if single else LAYERS[name]
        if one == RECOMMENDED:
            layers = recommended(model, next(iter(tasks.values())).images[:1]).target_layer or LAYERS[name][-1:]
        values = {
            key: group_means(torch.cat(scores).numpy(), tasks[COLUMNS[key].task].groups.numpy())
            for key, scores in found[same].items()
        }
        board[str(one)] = Entry("setting", ", ".join(layers), "", values)
    return board


@torch.no_grad()
def _maps(
    method: Callable[..., Any], name: str, model: nn.Module, balanced: bool, task: Task, normalized: bool = True
) -> list[Tensor]:
    """Return the maps of each layer, of the pictures' size."""
    with method(model, list(LAYERS[name]), gradients="balanced" if balanced else "plain") as extractor:
        maps = extractor(task.classes, model(task.images), normalized=normalized)
    return [resize(cam.unsqueeze(1), task.images.shape[2:]).squeeze(1) for cam in maps]


_FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    **{place: lambda maps, index=index: maps[index] for index, place in enumerate(POSITIONS)},  # type: ignore[misc]
    "mean of four": lambda maps: maps.mean(0),
    "maximum of four": lambda maps: maps.amax(0),
    "product of four": lambda maps: maps.prod(0),
}


def _fused(method: Callable[..., Any], name: str, model: nn.Module, balanced: bool, task: Task) -> dict[str, Tensor]:
    """Return the maps of each layer, and those that are made of all of them, scaled to [0, 1] before."""
    together = torch.stack([min_max(cam) for cam in _maps(method, name, model, balanced, task)])
    return {where: fuse(together) for where, fuse in _FUSED.items()}


_GATED = ("gate alone", "evidence × gate", "contrast × gate")


def _gated(name: str, model: nn.Module, balanced: bool, task: Task) -> dict[str, Tensor]:
    r"""Return maps that say roughly where, in detail.

    The gate is the mean over layers of what each layer's deviation from its mean adds to the score, blurred until only
    the object is told (σ is an eighth of the side), its negative part 0, scaled by its peak. It is multiplied with the
    detail of the first layer: how much its deviation moves the score, or, as a control, how much it deviates.
    """
    changes = _maps(_Change, name, model, balanced, task, normalized=False)
    size = 2 * int(2 * _BLUR) + 1
    gate = torch.stack([_to_peak(gaussian_blur(cam.unsqueeze(1), size, _BLUR).squeeze(1)) for cam in changes]).mean(0)
    evidence, contrast = (_maps(kind, name, model, balanced, task)[0] for kind in (_Size, _Contrast))
    return dict(zip(_GATED, (gate, evidence * gate, contrast * gate), strict=True))


@torch.no_grad()
def _recommended(name: str, model: nn.Module, _balanced: bool, task: Task) -> dict[str, Tensor]:
    """Return the maps of what the package recommends for the model."""
    found = recommended(model, task.images[:1])
    with getattr(methods, found.method)(model, found.target_layer or LAYERS[name][-1], **found.method_kwargs) as cam:
        maps = cam.fuse_cams(cam(task.classes, model(task.images)))
    return {RECOMMENDED.where: resize(maps.unsqueeze(1), task.images.shape[2:]).squeeze(1)}


_SPECIAL = {"gated": _gated, "recommended": _recommended}


def _to_peak(maps: Tensor) -> Tensor:
    return maps.relu() / maps.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
