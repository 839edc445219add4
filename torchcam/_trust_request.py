"""What an explanation keeps for its trust report: the input and the methods, but not the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._methods import find_method
from ._recipes import Recipe
from ._recommended import COMPARED, recommended
from .targets import OutputTarget

if TYPE_CHECKING:
    from .trust import TrustReport

__all__ = ["TrustRequest"]


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

        asked = options.pop("methods", None)
        layers, shared = dict(self.layers), self._shared_layers
        arguments = {name: dict(recipe.options) for name, recipe in self.recipes.items()}
        if asked is None:
            asked = [recipe.method for recipe in self.recipes.values()]
            if len(asked) == 1:
                best = recommended(model, self.image)
                if best.target_layer is not None and next(iter(self.recipes.values())).target_layer is None:
                    asked.append(best.method)
                    layers.setdefault(best.method, best.target_layer)
                    arguments.setdefault(best.method, dict(best.method_kwargs))
                elif best.target_layer == shared:  # these suit what is recommended, not the others
                    shared = None
                asked += COMPARED
        asked = [asked] if isinstance(asked, (str, type)) else asked
        methods = list(dict.fromkeys(find_method(method, "methods") for method in asked))
        names = [method.__name__ for method in methods]
        by_method = {
            "target_layer": {name: layers.get(name, shared) for name in names},
            "method_kwargs": {name: arguments[name] for name in names if name in arguments},
            "call_kwargs": {name: dict(self.recipes[name].call_options) for name in names if name in self.recipes},
        }
        question: dict[str, Any] = {"class_idx": asked_about}
        if isinstance(asked_about, str):
            question = {"targets": self.targets[asked_about]}
        return trust(model, self.image, **{"methods": methods, **question, **by_method, **self.settings, **options})

    @property
    def _shared_layers(self) -> Any:
        """The layers for methods that are not of the explanation: those of its first, or None for their defaults."""
        name, recipe = next(iter(self.recipes.items()))
        # A default of several layers (the attention blocks, for one) suits that method alone.
        return self.layers[name] if recipe.target_layer is not None or len(self.layers[name] or ()) == 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> TrustRequest:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()
