"""Checks of arguments: what they return, and their messages."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from torchcam._checks import (
    callable_object,
    finite_number,
    fraction,
    integer,
    one_of,
    positive_integer,
    torch_module,
)

LAYER = nn.Identity()


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (integer, (-3,)),
        (integer, (0, 0)),
        (positive_integer, (1,)),
        (finite_number, (-2.5,)),
        (finite_number, (3, 3)),
        (fraction, (0,)),
        (fraction, (0.999,)),
        (one_of, ("b", ("a", "b"))),
        (callable_object, (len,)),
        (torch_module, (LAYER,)),
    ],
)
def test_a_good_value_is_returned(check: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert check("x", *arguments) is arguments[0]


def test_an_optional_callable_may_be_none() -> None:
    assert callable_object("x", None, optional=True) is None
    with pytest.raises(TypeError, match="`x` must be callable, got None"):
        callable_object("x", None)
    with pytest.raises(TypeError, match="`x` must be callable or None, got 3"):
        callable_object("x", 3, optional=True)


def test_numbers_of_numpy_become_floats() -> None:
    for check in (finite_number, fraction):
        assert type(check("x", np.float32(0.25))) is float
        assert check("x", np.float32(0.25)) == 0.25


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (integer, (True,), TypeError, "`x` must be an integer, got True of type bool"),
        (integer, (1.0,), TypeError, "`x` must be an integer, got 1.0 of type float"),
        (integer, (-1, 0), ValueError, "`x` must be 0 or more, got -1"),
        (positive_integer, (0,), ValueError, "`x` must be at least 1, got 0"),
        (finite_number, ("1",), TypeError, "`x` must be a number, got '1' of type str"),
        (finite_number, (False,), TypeError, "`x` must be a number, got False of type bool"),
        (finite_number, (math.nan,), ValueError, "`x` must be a finite number, got nan"),
        (finite_number, (-1, 0), ValueError, "`x` must be a finite number, 0 or more, got -1"),
        (fraction, (1,), ValueError, r"`x` must be a number in \[0, 1\), got 1"),
        (fraction, (math.nan,), ValueError, r"`x` must be a number in \[0, 1\), got nan"),
        (fraction, ("0",), ValueError, r"`x` must be a number in \[0, 1\), got '0'"),
        (one_of, ("c", ("a", "b")), ValueError, "`x` must be 'a' or 'b', got 'c'"),
        (one_of, ([], ("a", "b", None)), ValueError, r"`x` must be 'a', 'b' or None, got \[\]"),
        (torch_module, (len,), TypeError, "`x` must be a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_a_bad_value_is_named(
    check: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{message}$"):
        check("x", *arguments)
