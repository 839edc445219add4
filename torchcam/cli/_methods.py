"""The methods, layers and classes that a command is about."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._messages import UserError, closest, library_errors

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "add_layers",
    "as_integers",
    "check_layer_count",
    "find_method",
    "method_names",
    "progress",
    "split",
    "target_layer",
]


def add_layers(group: Any) -> None:
    """Add the option that names target layers."""
    group.add_argument(
        "--target-layer",
        metavar="NAME",
        action="append",
        default=[],
        help="layer to look at, as in `model.named_modules()`; several, separated by commas or by repeating the "
        "option, are fused (default: the last one whose output still has positions)",
    )


def split(values: Sequence[str]) -> list[str]:
    """Split what was given by commas, by repeating the option, or both."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def as_integers(values: Sequence[str]) -> list[int]:
    """Read class numbers."""
    try:
        return [int(value) for value in values]
    except ValueError as error:
        raise UserError(f"--class-idx must be the number of a class, or several with commas, got {values}") from error


def method_names() -> list[str]:
    """List the methods whose classes can be called for a class."""
    import inspect

    from torchcam import methods

    return [
        name
        for name in methods.__all__
        if isinstance(entry := getattr(methods, name), type)
        and "class_idx" in inspect.signature(entry.__call__).parameters
    ]


def find_method(name: str, option: str = "--method") -> type[Any]:
    """Find a method by its name, as papers write it or as Python does."""
    from torchcam import methods

    names = method_names()
    # Papers write Grad-CAM++, Python cannot.
    wanted = name.lower().replace("-", "").replace("+", "p")
    for entry in names:
        if entry.lower() == wanted:
            method: type[Any] = getattr(methods, entry)
            return method
    raise UserError(f"{option} '{name}' is not a method of torchcam; {closest(wanted, names)}")


def check_layer_count(method: str, layers: Sequence[str]) -> None:
    """Check that a method gets the number of layers that it needs."""
    if method == "LeGrad" and not layers:
        raise UserError("LeGrad reads the blocks of a vision transformer: name them with --target-layer")
    if method == "RefineCAM" and len(layers) < 2:
        raise UserError("RefineCAM multiplies the maps of layers: name two or more with --target-layer")
    if method == "CAM" and len(layers) > 1:
        raise UserError(f"CAM explains one layer, the one before the pooling: --target-layer names {len(layers)}")


def target_layer(model: nn.Module, layers: Sequence[str]) -> str | list[str] | None:
    """Check layers, and give them as methods take them: one name means one layer, none leaves the choice to them."""
    from torchcam.layers import layer_names

    if not layers:
        return None
    with library_errors():
        names = layer_names(model, list(layers))
    return names if len(names) > 1 else names[0]


def progress(method: type[Any]) -> dict[str, Any]:
    """Let slow methods show a progress bar, on a terminal."""
    import inspect

    shown = sys.stderr.isatty() and "progress" in inspect.signature(method).parameters
    return {"progress": True} if shown else {}
