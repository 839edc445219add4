"""What a shell completes: names of methods, models and layers. Needs the extra `completion`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torchcam


def complete(parser: Any) -> None:
    """Answer a shell that asks for completions, and end; otherwise do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    argcomplete.autocomplete(parser)


def _of_list(names: Callable[[Any], Iterable[str]]) -> Callable[..., list[str]]:
    """Return a completer of names that are separated by commas."""

    def completer(prefix: str, parsed_args: Any = None, **_: Any) -> list[str]:
        before, comma, _last = prefix.rpartition(",")
        return [f"{before}{comma}{name}" for name in names(parsed_args)]

    return completer


@_of_list
def method_names(_arguments: Any) -> Iterable[str]:
    """Complete the names of methods, without torch."""
    return (name for name in torchcam.__all__ if not name.islower() and name != "DeepFeatureFactorization")


@_of_list
def layers(arguments: Any) -> Iterable[str]:
    """Complete the names of a model's layers, of a library's model that the arguments name."""
    import torch

    with torch.device("meta"):
        if arguments.timm:
            import timm

            model = timm.create_model(arguments.timm)
        elif arguments.hf or arguments.model_factory:
            return []
        else:
            from torchvision.models import get_model

            model = get_model(arguments.arch or "resnet50", weights=None)
    return [name for name, _ in model.named_modules() if name]


def architectures(**_: Any) -> list[str]:
    """Complete the names of torchvision's classification models."""
    from torchvision import models

    return list(models.list_models(module=models))


def timm_models(prefix: str, **_: Any) -> list[str]:
    """Complete the names of timm's models; behind a dot, those of their weights."""
    try:
        import timm
    except ImportError:
        return []
    arch, dot, _tag = prefix.partition(".")
    return list(timm.list_pretrained(f"{arch}.*") if dot else timm.list_models())
