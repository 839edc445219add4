"""The model of the app, and what is asked about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._checks import torch_module
from torchcam._explanation import PredictionExplanation
from torchcam._inputs import read_inputs
from torchcam._methods import find_method, method_names
from torchcam._passes import Call
from torchcam._recommended import Recommended, recommended_of
from torchcam.explain import explain
from torchcam.layers import Candidates, candidates_of

# RefineCAM multiplies the maps of several layers, and one is chosen here.
METHODS = tuple(name for name in method_names() if name != "RefineCAM")

BUNDLED = """\
import torch
from torchcam.demo import CLASS_NAMES, load_model
from torchvision.transforms import Compose, Resize, ToTensor

model = load_model()
class_names = CLASS_NAMES
transform = Compose([Resize(96), ToTensor()])
to_probabilities = torch.sigmoid  # several digits may be there
"""
BEST = "recommended"
UNKNOWN = "model = ...  # your model, and what was passed to `torchcam.app.build` with it\n"


@dataclass(frozen=True)
class Question:
    """What is to be shown: of which picture (a file), for which classes (none: the predicted one), where and how."""

    picture: str
    classes: tuple[int, ...]
    layer: str | None
    methods: tuple[str, ...]


class Subject:
    """A classifier with what belongs to it.

    Args:
        model: the classifier
        transform: its transform, as for `explain`
        class_names: the names of its classes
        to_probabilities: function from its scores to probabilities
        setup: the code that makes these, under the names that they have here
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Any = None,
        class_names: Sequence[str] | None = None,
        to_probabilities: Callable[[Tensor], Tensor] | None = None,
        setup: str | None = None,
    ) -> None:
        self.model: nn.Module = torch_module("model", model)
        self.setup = UNKNOWN if setup is None else setup
        given = {"transform": transform, "class_names": class_names, "to_probabilities": to_probabilities}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.best: dict[str, Recommended] = {}

    def look_at(self, picture: str) -> Candidates:
        """Return the layers that a map can be made from, by passes over a picture, and note what is recommended."""
        inputs = read_inputs(self.model, picture, self._given.get("transform"))
        call = Call((inputs.tensor,), {}) if inputs.kwargs is None else Call((), dict(inputs.kwargs))
        found = candidates_of(self.model, call)
        best = recommended_of(self.model, found)
        if best.target_layer is not None:
            self.best = {f"{best.method}, {BEST}": best}
        usable = found.usable
        return Candidates([one for one in usable if one.is_stage] or usable)

    @property
    def methods(self) -> list[str]:
        """The methods to choose from: first the one that is recommended for the model, if it is not the default."""
        return [*self.best, *METHODS]

    def answer(self, question: Question) -> PredictionExplanation:
        """Explain a picture. The maps are drawn on the picture itself, where the model saw it."""
        options = {**self._given, **self._options(question)}
        result: PredictionExplanation = explain(self.model, question.picture, image=question.picture, **options)
        return result

    def code(self, question: Question, picture: str, imports: str = "") -> str:
        """Return the code that gives the same answer.

        Args:
            question: what was asked
            picture: the expression that stands for the picture
            imports: what this expression needs
        """
        options = {name: as_code(value) for name, value in self._options(question).items()}
        arguments = {"image": "picture", **{name: name for name in self._given}, **options}
        lines = "".join(f"    {name}={text},\n" for name, text in arguments.items())
        return (
            f"import torchcam\n{imports}{self.setup}\npicture = {picture}\n"
            f"result = torchcam.explain(\n    model,\n    picture,\n{lines})\n"
            'result.plot().savefig("maps.png")  # a notebook shows `result` by itself\n'
            'result.to_html("maps.html")  # a page with opacity, threshold and zoom\n'
        )

    def _options(self, question: Question) -> dict[str, Any]:
        """Return the arguments of `explain` that a question decides."""
        best = {name: self.best[name] for name in question.methods if name in self.best}
        placed = [name for name in question.methods if name not in best and find_method(name).looks_at_a_layer]
        options: dict[str, Any] = {"method": list(question.methods)}
        layers: dict[str, Any] = {name: one.target_layer for name, one in best.items()}
        if question.layer is not None:
            layers |= dict.fromkeys(placed, question.layer)
        if layers:
            options["target_layer"] = question.layer if len(placed) == len(question.methods) else layers
        if best:  # it has a name of its own beside the method with the chosen layer
            options["method"] = {name: best[name].method if name in best else name for name in question.methods}
            options["method_kwargs"] = {name: dict(one.method_kwargs) for name, one in best.items()}
        if question.classes:
            options["class_idx"] = list(question.classes)
        return options


def as_code(value: Any) -> str:
    """Return the code of a text, a number, or a list or mapping of such."""
    return json.dumps(value, ensure_ascii=False)


def bundled() -> Subject:
    """Return the model that ships with the package."""
    from torchvision.transforms import Compose, Resize, ToTensor

    from torchcam.demo import CLASS_NAMES, load_model

    return Subject(load_model(), Compose([Resize(96), ToTensor()]), CLASS_NAMES, torch.sigmoid, BUNDLED)
