"""Which layer, which method, plain or balanced? Gradient methods at four layers of each model, alone and together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _quality_scenes import Task
from _quality_scores import CHUNK, COLUMNS, Board, Entry, locate
from _quality_stats import group_means
from torch import Tensor, nn

from torchcam import methods
from torchcam._tensors import min_max, resize

__all__ = ["LAYERS", "METHODS", "Setting", "measure_settings", "settings"]

# From the input to the head: the first layer with positions, the first tokens or a stage further, a late and the last.
POSITIONS = ("first", "early", "late", "last")
LAYERS: dict[str, tuple[str, str, str, str]] = {
    "cnn": ("layer1", "layer2", "layer3", "layer4"),
    "shortcut": ("net.layer1", "net.layer2", "net.layer3", "net.layer4"),
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
# What every operation of these models obeys already: balanced gradients are the plain ones.
PIECEWISE_LINEAR = ("cnn", "shortcut", "vgg")


@dataclass(frozen=True)
class Setting:
    """A method, its gradients, and the layers that it looks at.

    Attributes:
        method: its name
        balanced: whether its gradients are balanced
        where: one of ``POSITIONS``, or how the maps of all four are made one: "mean", "maximum" or "product"
    """

    method: str
    balanced: bool
    where: str

    def __str__(self) -> str:
        gradients = "balanced" if self.balanced else "plain"
        where = f"{self.where} layer" if self.where in POSITIONS else f"{self.where} of four"
        return f"{self.method}, {gradients}, {where}"


def settings(name: str) -> list[Setting]:
    """List the settings for a model; balanced gradients where they differ."""
    kinds = (False,) if name in PIECEWISE_LINEAR else (False, True)
    return [
        Setting(method, balanced, where)
        for method in METHODS
        for balanced in kinds
        for where in (*POSITIONS, "mean", "maximum", "product")
    ]


def measure_settings(name: str, model: nn.Module, tasks: Mapping[str, Task], wanted: list[Setting]) -> Board:
    """Score settings on the pictures of some tasks."""
    board: Board = {}
    for method, balanced in dict.fromkeys((one.method, one.balanced) for one in wanted):
        places = [one.where for one in wanted if (one.method, one.balanced) == (method, balanced)]
        found: dict[str, dict[str, list[Tensor]]] = {where: {} for where in places}
        for letter, task in tasks.items():
            for start in range(0, len(task), CHUNK):
                part = task[slice(start, start + CHUNK)]
                maps = dict(_ways(_maps(name, model, method, balanced, part)))
                for where in places:
                    for key, value in locate(maps[where], part, letter).items():
                        found[where].setdefault(key, []).append(value)
        for where, scores in found.items():
            values = {
                key: group_means(torch.cat(parts).numpy(), tasks[COLUMNS[key].task].groups.numpy())
                for key, parts in scores.items()
            }
            setting = Setting(method, balanced, where)
            board[str(setting)] = Entry("gradient", ", ".join(_layers(name, where)), "", values)
    return board


def _layers(name: str, where: str) -> list[str]:
    return [layer for place, layer in zip(POSITIONS, LAYERS[name], strict=True) if where in (place, *_WAYS)]


@torch.no_grad()
def _maps(name: str, model: nn.Module, method: str, balanced: bool, task: Task) -> list[Tensor]:
    """Return the maps of each layer, of the pictures' size."""
    options: dict[str, Any] = {"gradients": "balanced"} if balanced else {}
    with getattr(methods, method)(model, list(LAYERS[name]), **options) as extractor:
        maps = extractor(task.classes, model(task.images))
    return [resize(cam.unsqueeze(1), task.images.shape[2:]).squeeze(1) for cam in maps]


def _ways(maps: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the maps of each layer, and those that are made of all of them."""
    yield from zip(POSITIONS, maps, strict=True)
    together = torch.stack([min_max(cam) for cam in maps])
    for where, fuse in _WAYS.items():
        yield where, fuse(together)


_WAYS = {"mean": lambda maps: maps.mean(0), "maximum": lambda maps: maps.amax(0), "product": lambda maps: maps.prod(0)}
