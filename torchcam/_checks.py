"""Checks of arguments that are used by several modules: each names the argument and the value that does not fit."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")


def integer(name: str, value: Any, lowest: int | None = None) -> int:
    """Check an argument that is an integer, of any library, ``lowest`` or more.

    Raises:
        TypeError: if it is not an integer (a boolean is not)
        ValueError: if it is less than ``lowest``
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}")
    if lowest is not None and number < lowest:
        bound = f"{lowest} or more" if lowest < 1 else f"at least {lowest}"
        raise ValueError(f"`{name}` must be {bound}, got {number}")
    return number


def positive_integer(name: str, value: int) -> int:
    """Check an argument that counts something.

    Raises:
        TypeError: if it is not an integer
        ValueError: if it is not positive
    """
    return integer(name, value, lowest=1)


def finite_number(name: str, value: float, lowest: float = -math.inf) -> float:
    """Check an argument that is a finite number, ``lowest`` or more.

    Raises:
        TypeError: if it is not a number
        ValueError: if it is not finite, or less than ``lowest``
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value >= lowest):
        bound = "" if lowest == -math.inf else f", {lowest} or more"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {value}")
    return value if isinstance(value, (int, float)) else float(value)


def fraction(name: str, value: float) -> float:
    """Check an argument in [0, 1), such as an opacity.

    Raises:
        ValueError: if it is not such a number
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1), got {value!r}")
    return value if isinstance(value, (int, float)) else float(value)


def one_of(name: str, value: T, choices: Sequence[T]) -> T:
    """Check an argument with a fixed set of values.

    Raises:
        ValueError: if it is none of ``choices``
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` must be {', '.join(others)} or {last}, got {value!r}")
    return value


def callable_object(name: str, value: T, *, optional: bool = False) -> T:
    """Check an argument that is called; None is accepted if it is ``optional``.

    Raises:
        TypeError: if it is not callable
    """
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"`{name}` must be callable{' or None' if optional else ''}, got {value!r}")
    return value


def torch_module(name: str, value: Any) -> Any:
    """Check an argument that is a ``torch.nn.Module``.

    Raises:
        TypeError: if it is not
    """
    from torch import nn

    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(value).__name__}")
    return value
