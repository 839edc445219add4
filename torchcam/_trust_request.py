"""What an explanation keeps for its trust report: the input and the methods, but not the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._methods import find_methods
from ._recipes import Recipe
from ._recommended import compared
from .targets import OutputTarget

if TYPE_CHECKING:
    from .trust import TrustReport


@dataclass(frozen=True, eq=False)
class TrustRequest:
    """A callable that builds the trust report of one input, as long as the model exists. A pickle leaves it out.

    Attributes:
        model: a reference to the model that does not keep it alive
        image: the input, (1, C, *spatial)
        recipes: the methods of the explanation by the names of their classes, and how they were run
        layers: the layers of each method, by the same names
        targets: the targets that were explained, by their names; none where classes were
        settings: further arguments of the report
        view: function from the model to what was explained, where that is another one: a classifier of texts
    """

    model: Callable[[], nn.Module | None]
    image: Tensor
    recipes: Mapping[str, Recipe]
    layers: Mapping[str, Any]
    targets: Mapping[str, OutputTarget]
    settings: Mapping[str, Any]
    view: Callable[[Any], nn.Module] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image: Tensor,
        recipes: Sequence[Recipe],
        target_names: Sequence[Sequence[str]],
        targets: Mapping[str, OutputTarget],
        view: Callable[[Any], nn.Module] | None = None,
        **settings: Any,
    ) -> TrustRequest:
        """Return the request for the methods of an explanation, on the layers whose names they gave."""
        modules = dict((model if view is None else view(model)).named_modules())
        layers: dict[str, Any] = {}
        for recipe, names in zip(recipes, target_names, strict=True):
            are_layers = all(name and name in modules for name in names)
            layers.setdefault(recipe.method.__name__, list(names) if are_layers else recipe.target_layer)
        by_name = {recipe.method.__name__: recipe for recipe in reversed(recipes)}
        kept = image.detach().clone()  # a view would keep the batch
        return cls(weakref.ref(model), kept, {name: by_name[name] for name in layers}, layers, targets, settings, view)

    def __call__(self, asked_about: int | str, **options: Any) -> TrustReport:
        """Report on a class, or on a target by its name."""
        model = self.model()
        if model is None:
            raise RuntimeError(
                "the model that was explained is gone, an explanation does not hold on to it: keep it in a variable, "
                "or call `torchcam.trust.trust(model, input_tensor)`"
            )
        model = model if self.view is None else self.view(model)
        from .trust import trust  # its metrics take long to import

        methods = options.pop("methods", None)
        name, first = next(iter(self.recipes.items()))
        # A default of several layers (the attention blocks, for one) suits that method alone.
        shared = self.layers[name] if first.target_layer is not None or len(self.layers[name] or ()) == 1 else None
        layers = dict(self.layers)
        arguments = {key: dict(recipe.options) for key, recipe in self.recipes.items()}
        if methods is None:
            methods = [recipe.method for recipe in self.recipes.values()]
            if len(methods) == 1:
                found = compared(model, self.image, name, shared, searched=first.target_layer is None)
                methods += [key for key in found if key != name]
                layers = {key: one.target_layer for key, one in found.items()} | layers
                arguments = {key: dict(one.method_kwargs) for key, one in found.items()} | arguments
        names = [method.__name__ for method in find_methods(methods, "methods")]
        by_method = {
            "target_layer": {key: layers.get(key, shared) for key in names},
            "method_kwargs": {key: arguments[key] for key in names if key in arguments},
            "call_kwargs": {key: dict(self.recipes[key].call_options) for key in names if key in self.recipes},
        }
        question: dict[str, Any] = {"class_idx": asked_about}
        if isinstance(asked_about, str):
            question = {"targets": self.targets[asked_about]}
        return trust(model, self.image, **{"methods": methods, **question, **by_method, **self.settings, **options})

    def __deepcopy__(self, memo: dict[int, Any]) -> TrustRequest:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()
