"""How each method of an explanation is run: its class, its layers and its arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ._methods import CALL_OPTIONS, by_method, find_method, takes
from ._passes import Call
from ._replica import normal_mode
from .methods.core import _CAM


@dataclass(frozen=True)
class Recipe:
    """How one method is to be run.

    Attributes:
        name: its name among the methods
        method: its class
        target_layer: the layers, as the method takes them
        options: the arguments of its constructor
        call_options: the arguments of its call
    """

    name: str
    method: type[Any]
    target_layer: Any
    options: Mapping[str, Any]
    call_options: Mapping[str, Any]

    def compute_maps(self, extractor: Any, output: Any, **requested: Any) -> list[Tensor]:
        """Return the maps of a class or a target of each sample; the graph is kept for further calls."""
        keep = {"retain_graph": True} if extractor.differentiates else {}
        maps: list[Tensor] = extractor(scores=output, **requested, **keep, **self.call_options)
        return maps

    @property
    def plain_options(self) -> dict[str, Any]:
        """All arguments, as plain values."""
        return {name: plain_value(value) for name, value in {**self.options, **self.call_options}.items()}

    @property
    def searches_layer(self) -> bool:
        """Whether the method looks for a layer with positions by itself: none is named, and it looks at one."""
        return self.target_layer is None and bool(self.method.looks_at_a_layer)

    def at(self, layer: str | None) -> Recipe:
        """Return this recipe with a layer in the place of the one that it would look for."""
        return replace(self, target_layer=layer) if self.searches_layer else self

    @property
    def signed(self) -> bool:
        """Whether the maps have negative values."""
        return self.call_options.get("relu") is False


def as_recipes(method: Any, target_layer: Any, method_kwargs: Any, relu: Any) -> list[Recipe]:
    """Return a recipe for each method, from the arguments of `explain`."""
    several = isinstance(method, (list, tuple, Mapping))
    given = list(method.values()) if isinstance(method, Mapping) else list(method) if several else [method]
    classes = [find_method(one) for one in given]
    labels = [str(label) for label in method] if isinstance(method, Mapping) else [one.__name__ for one in classes]
    if not labels:
        raise ValueError("`method` names no method")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(
            f"`method` names {twice} more than once: tell them apart in a mapping such as "
            f"{{'{twice} A': {twice}, '{twice} B': {twice}}}"
        )
    if method_kwargs is not None and not isinstance(method_kwargs, Mapping):
        raise TypeError(f"`method_kwargs` must be a mapping, got {type(method_kwargs).__name__}")
    if isinstance(target_layer, Mapping):
        layers = by_method("target_layer", target_layer, labels)
    else:
        layers = dict.fromkeys(labels, target_layer)
    options = by_method("method_kwargs", method_kwargs, labels) if several else {labels[0]: method_kwargs}
    recipes = []
    for label, one in zip(labels, classes, strict=True):
        arguments = dict(options.get(label) or {})
        if "target_layer" in arguments:
            raise ValueError("`method_kwargs` holds 'target_layer': pass `target_layer` itself")
        call_options = {name: arguments.pop(name) for name in CALL_OPTIONS & arguments.keys()}
        if relu is not None:
            call_options.setdefault("relu", relu)
        recipes.append(Recipe(label, one, layers.get(label), arguments, call_options))
    return recipes


@contextmanager
def extractors_on(
    replica: nn.Module,
    model: nn.Module,
    recipes: Sequence[Recipe],
    input_shape: tuple[int, ...],
    scores: tuple[Call, Callable[[Any], Tensor]] | None = None,
) -> Iterator[list[Any]]:
    """Return an extractor for each recipe, which watches a replica inside the block.

    Modules of ``model`` among the arguments, and their bound methods, are replaced by those of ``replica``.

    Args:
        replica: the replica
        model: what it is a replica of
        recipes: the methods
        input_shape: the shape of an input without its batch
        scores: a call of the model, and a function from its output to the scores that default layers must count for
    """
    names = {module: name for name, module in model.named_modules()}

    def on_replica(value: Any) -> Any:
        if isinstance(value, nn.Module) and value in names:
            return replica.get_submodule(names[value])
        if isinstance(value, MethodType):
            owner = on_replica(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        return type(value)(map(on_replica, value)) if type(value) in {list, tuple} else value

    with normal_mode(graph=False), ExitStack() as stack:
        made = []
        for recipe in recipes:
            options = {name: on_replica(value) for name, value in recipe.options.items()}
            if takes(recipe.method, "input_shape"):
                options.setdefault("input_shape", input_shape)
            with named_errors(recipe, recipes):
                extractor = recipe.method(replica, target_layer=on_replica(recipe.target_layer), **options)
                made.append(stack.enter_context(extractor))
                if scores is not None and isinstance(extractor, _CAM):
                    extractor.inner.choose_layer_for(*scores)
        yield made


@contextmanager
def named_errors(recipe: Recipe, recipes: Sequence[Recipe]) -> Iterator[None]:
    """Add to errors which of several methods they are from."""
    try:
        yield
    except Exception as error:
        if len(recipes) > 1:
            error.add_note(f"This was {recipe.name}, one of the methods {', '.join(one.name for one in recipes)}.")
        raise


def plain_value(value: Any) -> Any:
    """Return a value that JSON can hold and that keeps no object alive: for most objects their printed form."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    # The address of an object says nothing, and changes from run to run.
    return value.__name__ if isinstance(value, type) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
