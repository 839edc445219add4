"""A family of models to try: how it is built, what it is called with, and what is explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def positional(x: Tensor) -> Any:
    """Call a model with its input alone."""
    return (x,)


@dataclass(frozen=True)
class Family:
    """A model, the inputs that it takes and the score that is explained.

    Attributes:
        name: its name in the table
        build: makes it, with weights that depend on torch's seed only
        shape: the shape of the input that a user thinks of: an image, a recording
        other: the shape of a second input; None for a model that takes one size
        axes: the dimensions of the input along which there are positions; by default, all from the third on
        call: the model's arguments for such an input: a tuple, or a dictionary of keyword arguments
        target: a class, or a callable from a sample's output to a scalar; None for the class with the highest score
    """

    name: str
    build: Callable[[], Any]
    shape: tuple[int, ...] = (1, 3, 64, 64)
    other: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()
    call: Callable[[Tensor], Any] = positional
    target: Any = None

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions of the input along which there are positions."""
        return self.axes or tuple(range(2, len(self.shape)))


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Make white noise, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model: Any, family: Family, x: Tensor) -> Any:
    """Call a model with the arguments for an input."""
    arguments = family.call(x)
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)
