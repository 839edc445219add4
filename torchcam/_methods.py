"""Methods as people name them, and what is said of several of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from . import methods

__all__ = ["CALL_OPTIONS", "as_method", "by_method", "takes"]

# Options of an extractor's call; all others are for its constructor.
CALL_OPTIONS = {"comparison_idx", "eps", "relu", "target_shape"}


def as_method(method: Any, argument: str = "method") -> type[Any]:
    """Find a method by its class or its name, in any case; papers write Grad-CAM++, Python cannot.

    Raises:
        TypeError: if it is neither a name nor a method that explains scores
        ValueError: if there is no method of that name
    """
    if isinstance(method, str):
        known = {name.lower(): name for name in methods.__all__ if _is_method(getattr(methods, name))}
        wanted = _spelled(method)
        if wanted not in known:
            close = [known[name] for name in get_close_matches(wanted, known, n=3, cutoff=0.5)] or known.values()
            raise ValueError(f"`{argument}` {method!r} is not a method of torchcam; closest: {', '.join(close)}")
        method = getattr(methods, known[wanted])
    if not _is_method(method):
        raise TypeError(f"`{argument}` must be a CAM class such as GradCAM, or its name, got {method!r}")
    found: type[Any] = method
    return found


def by_method(argument: str, given: Mapping[Any, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Sort what is given for methods, by their classes or their names, by label.

    Raises:
        TypeError: if there are to be arguments for a method, and they are no mapping
        ValueError: if a method is none of the labels
    """
    spelled = {_spelled(label): label for label in reversed(labels)}
    sorted_by = {}
    for key, value in given.items():
        name = key.__name__ if isinstance(key, type) else str(key)
        label = name if name in labels else spelled.get(_spelled(name))
        if label is None:
            close = [spelled[found] for found in get_close_matches(_spelled(name), spelled, n=3, cutoff=0.5)]
            raise ValueError(
                f"`{argument}` of several methods must be a mapping from {', '.join(map(repr, labels))}, got {name!r}"
                + (f"; closest: {', '.join(close)}" if close else "")
            )
        if argument != "target_layer" and not isinstance(value, Mapping):
            raise TypeError(f"`{argument}` of {label} must be a mapping, got {type(value).__name__}")
        sorted_by[label] = value
    return sorted_by


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Tell whether a function has an argument of that name."""
    return argument in inspect.signature(function).parameters


def _spelled(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "").replace("+", "p")


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and hasattr(value, "fuse_cams") and takes(value.__call__, "class_idx")
