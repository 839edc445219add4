"""Modules that can be called: `torchcam.explain(...)` is `torchcam.explain.explain(...)`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module or package whose call is that of the function that has its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (self.__name__,)  # a partial of `torchcam.explain` goes to other processes

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self, self.__name__.rpartition(".")[2])
        return function


def make_callable(name: str) -> None:
    """Make the module of that name callable; to be called from the module itself, with ``__name__``."""
    sys.modules[name].__class__ = CallableModule
