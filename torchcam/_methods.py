"""Methods by their names, and arguments that are given by method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import methods
from ._names import closest, match_name

# Options of an extractor's call; all others are for its constructor.
CALL_OPTIONS = {"comparison_idx", "eps", "relu", "target_shape"}


def find_method(name: type[Any] | str, argument: str = "method") -> type[Any]:
    """Return the class of a method that is given by its class or its name.

    Names are understood as papers write them and as Python does, in any case: "GradCAMpp", "Grad-CAM++", "grad_cam_pp".

    Args:
        name: the name, or the class: any whose instances are called with a class and can fuse their maps
        argument: the argument that holds the name, for the message of an error; an option such as ``--method`` is
            quoted as it is

    Raises:
        TypeError: if ``name`` is neither a name nor the class of a method
        ValueError: if no method has that name; the message names the closest
    """
    quoted = argument if argument.startswith("-") else f"`{argument}`"
    found: Any = name
    if isinstance(name, str):
        names = method_names()
        known = match_name(name, names)
        if known is None:
            raise ValueError(f"{quoted} {name!r} is not a method of torchcam; {closest(name, names)}")
        found = getattr(methods, known)
    if not _is_method(found):
        raise TypeError(f"{quoted} must be a CAM class such as GradCAM, or its name, got {name!r}")
    method: type[Any] = found
    return method


def find_methods(given: Sequence[type[Any] | str] | type[Any] | str, argument: str) -> list[type[Any]]:
    """Return the classes of one method or several, each once."""
    several = [given] if isinstance(given, (str, type)) else given
    return list(dict.fromkeys(find_method(one, argument) for one in several))


def method_names() -> list[str]:
    """Return the names of all methods that explain a class."""
    return [name for name in methods.__all__ if _is_method(getattr(methods, name))]


def by_method(argument: str, given: Mapping[Any, Any] | None, labels: Sequence[str]) -> dict[str, Any]:
    """Sort a mapping from methods, by their classes or their names, to one from labels.

    Raises:
        TypeError: if it is no mapping, or the arguments of a method are none
        ValueError: if a method is none of the labels
    """
    if not isinstance(given, Mapping | None):
        raise TypeError(f"`{argument}` must be a mapping from methods to arguments, got {type(given).__name__}")
    sorted_by = {}
    for key, value in (given or {}).items():
        name = key.__name__ if isinstance(key, type) else str(key)
        label = match_name(name, labels)
        if label is None:
            known = ", ".join(map(repr, labels))
            raise ValueError(
                f"`{argument}` of several methods must be a mapping from {known}, got {name!r}; {closest(name, labels)}"
            )
        if argument != "target_layer" and not isinstance(value, Mapping):
            raise TypeError(f"`{argument}` of {label} must be a mapping, got {type(value).__name__}")
        sorted_by[label] = value
    return sorted_by


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Check whether a function has an argument of that name."""
    return argument in inspect.signature(function).parameters


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and hasattr(value, "fuse_cams") and takes(value.__call__, "class_idx")
