"""What an explanation keeps for its trust report: the input and the methods, but not the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._methods import find_method
from ._recipes import Recipe

if TYPE_CHECKING:
    from .trust import TrustReport

__all__ = ["TrustRequest"]

COMPARED = ("GradCAM", "LayerCAM", "ReciproCAM")  # with a method that was alone


@dataclass(frozen=True, eq=False)
class TrustRequest:
    """A callable that builds the trust report of one input, as long as the model exists. A pickle leaves it out.

    Attributes:
        model: a reference to the model that does not keep it alive
        image: the input, (1, C, *spatial)
        settings: the arguments of the report; those that depend on the method, by the methods' names
    """

    model: Callable[[], nn.Module | None]
    image: Tensor
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image: Tensor,
        recipes: Sequence[Recipe],
        target_names: Sequence[Sequence[str]],
        **settings: Any,
    ) -> TrustRequest:
        """Return the request for the methods of an explanation, on the layers whose names they gave."""
        modules = dict(model.named_modules())
        layers: dict[str, Any] = {}
        for recipe, names in zip(recipes, target_names, strict=True):
            are_layers = all(name and name in modules for name in names)
            layers.setdefault(recipe.method.__name__, list(names) if are_layers else recipe.target_layer)
        classes: dict[str, Any] = {recipe.method.__name__: recipe.method for recipe in reversed(recipes)}
        methods = [classes[name] for name in layers]
        if len(methods) == 1:
            # A default of several layers (attention, for one) is one method's own: the others choose for themselves.
            (found,) = layers.values()
            shared = found if recipes[0].target_layer is not None or len(found or ()) == 1 else None
            methods += [find_method(name) for name in COMPARED if name not in layers]
            layers = {**dict.fromkeys(COMPARED, shared), **layers}
        return cls(
            weakref.ref(model),
            image.detach().clone(),  # a view would keep the batch
            {
                "methods": methods,
                "target_layer": layers,
                "method_kwargs": {recipe.method.__name__: dict(recipe.options) for recipe in reversed(recipes)},
                "call_kwargs": {recipe.method.__name__: dict(recipe.call_options) for recipe in reversed(recipes)},
                **settings,
            },
        )

    def __call__(self, **options: Any) -> TrustReport:
        model = self.model()
        if model is None:
            raise RuntimeError(
                "the model that was explained is gone, an explanation does not hold on to it: keep it in a variable, "
                "or call `torchcam.trust.trust(model, input_tensor)`"
            )
        from .trust import trust  # its metrics take long to import

        settings = dict(self.settings)
        if "methods" in options:
            given = options["methods"]
            several = [given] if isinstance(given, (str, type)) else given
            names = [find_method(one, "methods").__name__ for one in several]
            layers = settings["target_layer"]
            first = next(iter(layers.values()))
            settings["target_layer"] = {name: layers.get(name, first) for name in names}
            for argument in ("method_kwargs", "call_kwargs"):
                settings[argument] = {name: settings[argument].get(name, {}) for name in names}
        return trust(model, self.image, **{**settings, **options})

    def __deepcopy__(self, memo: dict[int, Any]) -> TrustRequest:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()
