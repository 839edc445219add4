"""Which method, on which layers, with which gradients: what the leaderboard found best for a kind of model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ._architecture import is_composed
from .layers import Candidate, Candidates, candidates

COMPARED = ("GradCAM", "LayerCAM", "ReciproCAM")
"""The methods that a map is compared with in a trust report, beside what is recommended for the model."""


@dataclass(frozen=True)
class Recommended:
    """A method, and how it is to be run, as `explain` takes it.

    Attributes:
        method: its name
        target_layer: the layers; None for the default
        method_kwargs: the arguments of its constructor
        kind: the kind of model that it was found best for
    """

    method: str
    target_layer: list[str] | None
    method_kwargs: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "convolutions, or a kind that was not measured"


GRAD_CAM = Recommended("GradCAM", None)


def recommended(model: nn.Module, *inputs: Any, **kwargs: Any) -> Recommended:
    """Return what the leaderboard found best for a kind of model.

    Transformers are models in which convolutions make tokens and several modules of attention follow, with no
    convolution behind the first layer norm. ``HiResCAM`` with balanced gradients looks there at the first tokens, the
    finest grid; where no class token runs along, at the default layer as well. For all others it is ``GradCAM`` at the
    default layer. docs/leaderboard.md has the numbers.

    The model runs once, forwards and backwards, and is left as it was.

    Args:
        model: the model
        inputs: what it is called with; at least one argument must be an image-like tensor (N, C, *spatial)
        kwargs: its keyword arguments

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18, vit_b_16
        >>> recommended(resnet18(), torch.rand(1, 3, 64, 64)).method
        'GradCAM'
        >>> recommended(vit_b_16(image_size=32), torch.rand(1, 3, 32, 32)).target_layer
        ['conv_proj']
    """
    return recommended_of(model, candidates(model, *inputs, **kwargs)) if _is_transformer(model) else GRAD_CAM


def recommended_of(model: nn.Module, found: Candidates) -> Recommended:
    """Return what is recommended for a model whose layers are known."""
    last = next((one for one in found if one.name == found.choice), None)
    first = _first_tokens(model, found)
    if last is None or first is None or not _is_transformer(model):
        return GRAD_CAM
    balanced = {"gradients": "balanced"}
    if last.layout.prefix:
        return Recommended("HiResCAM", [first.name], balanced, "a transformer with a class token")
    return Recommended("HiResCAM", [first.name, last.name], balanced, "a transformer without a class token")


def compared(
    model: nn.Module, image: Tensor, method: str = "GradCAM", layer: Any = None, *, searched: bool = True
) -> dict[str, Recommended]:
    """Return how the method of a map is run, and those that it is compared with, by their names.

    Args:
        model: the model
        image: an input, (1, C, *spatial)
        method: the name of the method
        layer: its layers, and those of the others; None for their defaults
        searched: whether the method has found its layers by itself; then what is recommended is one of the others
    """
    best = recommended(model, image)
    if not searched and layer == best.target_layer:  # these suit what is recommended, not the others
        layer = None
    found = {method: Recommended(method, layer)}
    if searched and best.target_layer is not None:
        found.setdefault(best.method, best)
    for name in COMPARED:
        found.setdefault(name, Recommended(name, layer))
    return found


def _is_transformer(model: nn.Module) -> bool:
    """Check whether a model has several modules of attention, and no convolution behind the first norm or attention."""
    modules = list(model.modules())
    attention = [one for one in modules if _is_attention(one)]
    innermost = [one for one in attention if not any(map(_is_attention, list(one.modules())[1:]))]
    if len(innermost) < 2 or is_composed(name for name, _ in model.named_modules()):
        return False
    first = next(number for number, one in enumerate(modules) if isinstance(one, nn.LayerNorm) or one is attention[0])
    return not any(map(_is_convolution, modules[first:]))


def _first_tokens(model: nn.Module, found: Candidates) -> Candidate | None:
    """Return the layer whose output are the tokens before the first attention, without a class token."""
    made: Candidate | None = None
    for one in found:
        inside = list(model.get_submodule(one.name).modules())
        holds_convolution = any(map(_is_convolution, inside)) and not any(map(_is_attention, inside))
        if holds_convolution and one.depends and one.is_proven and not one.layout.prefix:
            made = one
    return made


def _is_attention(module: nn.Module) -> bool:
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
