"""Properties that are computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

_T = TypeVar("_T")


class cached_property(functools.cached_property[_T]):  # noqa: N801 - a decorator
    """A property that is computed once for an object.

    That of Python 3.11 holds a lock for all objects of a class while it computes, so that threads wait for each other:
    for ever, where a model that runs meanwhile waits for a lock which another of these threads holds.
    """

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        super().__init__(compute)
        self.lock = nullcontext()
