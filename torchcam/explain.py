"""One prediction, explained: the model's answer, the maps behind it, and what is needed to make them again."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam import __version__
from torchcam._choice import Choice, as_class_names
from torchcam._explanation import Explanations, MethodMaps, PredictionExplanation, plain
from torchcam._files import written_whole
from torchcam._inputs import Inputs, read_inputs
from torchcam._methods import CALL_OPTIONS, by_method, find_method, takes
from torchcam._passes import untouched
from torchcam._tensors import over_channels, to_float
from torchcam.layers import TargetLayer
from torchcam.methods import GradCAM
from torchcam.methods._replay import positive_integer
from torchcam.methods.core import plain_tensors
from torchcam.targets import Selector, read_logits

if TYPE_CHECKING:
    from torchcam.trust import TrustReport

__all__ = ["Explanations", "MethodMaps", "PredictionExplanation", "explain", "explain_classes", "written_whole"]

Method = type[Any] | str
Layers = TargetLayer | Sequence[TargetLayer] | None


class _Options(TypedDict, total=False):
    """The keyword arguments of `explain`."""

    expected_class_idx: Any
    class_names: Sequence[str] | None
    method: Method | Sequence[Method] | Mapping[str, Method]
    target_layer: Layers | Mapping[Any, Layers]
    method_kwargs: Mapping[Any, Any] | None
    top_k: int | None
    class_idx: Any
    targets: Any
    relu: bool | Literal["negative"] | None
    transform: Any
    weights: Any
    image: Any
    to_probabilities: Callable[[Tensor], Tensor] | None
    batch_size: int


@overload
def explain(
    model: nn.Module, input_tensor: Tensor | str | Path | Image.Image | Mapping[str, Any], **options: Unpack[_Options]
) -> PredictionExplanation: ...  # a batch in a tensor has the type of the sequence that it becomes only when it runs


@overload
def explain(
    model: nn.Module, input_tensor: Sequence[Any] | np.ndarray[Any, Any], **options: Unpack[_Options]
) -> Explanations: ...


def explain(
    model: nn.Module,
    input_tensor: Any,
    *,
    expected_class_idx: Any = None,
    class_names: Sequence[str] | None = None,
    method: Method | Sequence[Method] | Mapping[str, Method] = GradCAM,
    target_layer: Layers | Mapping[Any, Layers] = None,
    method_kwargs: Mapping[Any, Any] | None = None,
    top_k: int | None = None,
    class_idx: Any = None,
    targets: Any = None,
    relu: bool | Literal["negative"] | None = None,
    transform: Any = None,
    weights: Any = None,
    image: Any = None,
    to_probabilities: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> PredictionExplanation | Explanations:
    """Explain what a model predicts for one input, or for each of a batch.

    The model runs in evaluation mode and without gradients below the target layers, and is left as it was. All classes
    and methods share one forward pass; each method adds its own cost for each class, and one pass if it has to search
    for its default layer. The result shows itself in a notebook.

    An image becomes a tensor by ``transform``, or that of ``weights``, or, for a model of timm, the one it was trained
    with. There is no other default: an image that is prepared in the wrong way is explained in the wrong way.

    Example:
        >>> from torchcam.demo import CLASS_NAMES, load_model, sample_images
        >>> from torchcam.explain import explain
        >>> sample = sample_images()[0]
        >>> result = explain(load_model(), sample.to_tensor(), class_names=CLASS_NAMES, target_layer="layer4")
        >>> folder = result.save("explanation", sample.image)  # doctest: +SKIP
        >>> several = explain(load_model(), sample.to_tensor(), method=["GradCAM", "LayerCAM"], class_idx=sample.labels)
        >>> several.methods, list(several.cams) == list(sample.labels)
        (('GradCAM', 'LayerCAM'), True)

    Args:
        model: the model
        input_tensor: one input as the model takes it, (1, C, *spatial), or a batch (N, C, *spatial); or an image: the
            path of a file, a PIL image, or an array (height, width[, channels]) of bytes or of floats in [0, 1]; or a
            list of images, or of tensors (C, *spatial); or the model's keyword arguments in a mapping
        expected_class_idx: a class to explain beside the others, say, the true one; of a batch one for all, or a list
            of one for each input
        class_names: the names of all classes, in the order of the scores; by default those of ``weights``, or those
            that a model of transformers knows
        method: the class of the method, or its name; several in a list, or in a mapping from what each shall be called
        target_layer: the layer(s) to look at, as the method takes them; for several methods the same, or a mapping from
            methods to layers
        method_kwargs: further arguments of the method: of its constructor, or of its call (``relu``,
            ``comparison_idx``, ``eps``, ``target_shape``); of several methods, a mapping from methods to arguments
        top_k: how many classes with the highest scores are explained, the predicted one first; 1, or 0 with
            ``class_idx``
        class_idx: the class to explain, or a list of several. Of a batch one for all, a list of one for each input, or
            a list of as many for each.
        targets: in place of classes, what to explain of any output: a callable from one sample's output to a scalar
            (see :mod:`torchcam.targets`), several in a mapping from their names, or in a list: of one input's several
            targets, of a batch's one for each input
        relu: True for the evidence for the classes, ``"negative"`` for that against them, False for both in signed
            maps; None for what each method does by itself
        transform: function from a PIL image to a tensor (C, *spatial), or an image processor of transformers. The image
            that is shown is the model's view, with the transform's normalisation undone where it can be found.
        weights: weights of torchvision, or their name: their transform is taken, and the names of the classes
        image: what to show in place of the model's view: an image as above, or a list of one for each input
        to_probabilities: function from the scores (N, classes) to the probabilities that are shown: softmax by default;
            ``torch.sigmoid`` where classes do not exclude each other. A single score is shown as it is.
        batch_size: largest number of inputs in one forward pass

    Returns:
        the scores, the maps and how they were made; of a batch or a list, a sequence of as many

    Raises:
        FileNotFoundError: if there is no file of that name
        TypeError: if an argument has the wrong type
        ValueError: if ``input_tensor`` is no input, or an image without a known ``transform``; a class does not exist,
            there are fewer than ``top_k``, ``class_names`` has the wrong length, the scores are not (N, classes) or not
            finite, or a method cannot handle the model
    """
    if top_k is not None:
        positive_integer("top_k", top_k)
    positive_integer("batch_size", batch_size)
    recipes = _as_recipes(method, target_layer, method_kwargs, relu)
    names = as_class_names(class_names)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # what `torch.compile` was given: compiled code runs no hooks
    with plain_tensors():
        inputs = read_inputs(model, input_tensor, transform, weights, image)
    names = inputs.class_names if names is None else names
    count = len(inputs.tensor)
    choice = Choice(count, inputs.is_batch, class_idx, expected_class_idx, top_k, targets, names)
    about: dict[str, Any] = {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "input_shape": (1, *inputs.tensor.shape[1:]),
        "versions": MappingProxyType(
            {"python": platform.python_version(), "torch": str(torch.__version__), "torchcam": __version__}
        ),
        "class_names": names,
    }
    found: list[PredictionExplanation] = []
    with _extractors(model, recipes, tuple(inputs.tensor.shape[1:])) as extractors:
        step = batch_size if inputs.kwargs is None else count
        for start in range(0, count, step):
            samples = slice(start, min(start + step, count))
            answers = _explained(model, inputs, samples, choice, recipes, extractors)
            for number, (answer, results) in enumerate(answers, start):
                first = next(iter(results.values()))
                found.append(
                    PredictionExplanation(
                        logits=answer.logits,
                        predicted_class_idx=answer.predicted,
                        expected_class_idx=choice.expected[number],
                        cams=first.cams,
                        method=first.method,
                        target_layers=first.target_layers,
                        method_kwargs=first.method_kwargs,
                        results=MappingProxyType(results),
                        image=inputs.pictures[number],
                        probabilities=_probabilities(answer.logits, to_probabilities),
                        scores=MappingProxyType(answer.scores),
                        _try_out=_trial_of(model, recipes, inputs, number, results, to_probabilities, names),
                        **about,
                    )
                )
    return Explanations(found) if inputs.is_batch else found[0]


def _trial_of(
    model: nn.Module,
    recipes: Sequence[_Recipe],
    inputs: Inputs,
    number: int,
    results: Mapping[str, MethodMaps],
    to_probabilities: Callable[[Tensor], Tensor] | None,
    class_names: Sequence[str] | None,
) -> _Trial | None:
    """Give what tries out the maps of one input, by the same methods on the same layers; it keeps that input alone."""
    if inputs.kwargs is not None:
        return None
    layers: dict[str, Any] = {}
    classes: dict[str, Method] = {}
    for recipe in recipes:
        classes.setdefault(recipe.method.__name__, recipe.method)
        found = list(results[recipe.name].target_layers)
        layers.setdefault(recipe.method.__name__, None if found == ["input"] else found)
    first = next(iter(layers.values()))
    if len(layers) == 1:
        for other in ("GradCAM", "LayerCAM", "ReciproCAM"):
            layers.setdefault(other, first)
            classes.setdefault(other, other)
    picture = inputs.pictures[number]
    return _Trial(
        weakref.ref(model),
        inputs.tensor[number : number + 1].detach().clone(),  # a view would hold on to the batch
        {
            "methods": list(classes.values()),
            "target_layer": layers,
            "method_kwargs": {recipe.method.__name__: dict(recipe.options) for recipe in reversed(recipes)},
            "call_kwargs": {recipe.method.__name__: dict(recipe.call_options) for recipe in reversed(recipes)},
            "images": None if picture is None else [picture],
            "class_names": class_names,
            "to_probabilities": to_probabilities,
        },
    )


@dataclass(frozen=True, eq=False)
class _Trial:
    """Tries out the maps of one input as long as there is the model, of which it holds nothing; a pickle leaves it out.

    Attributes:
        model: a reference to the model that does not keep it
        image: the input, (1, C, *spatial)
        settings: the arguments of the report
    """

    model: Callable[[], nn.Module | None]
    image: Tensor
    settings: Mapping[str, Any]

    def __call__(self, **options: Any) -> TrustReport:
        model = self.model()
        if model is None:
            raise RuntimeError(
                "the model that was explained is gone, an explanation does not hold on to it: keep it in a variable, "
                "or call `torchcam.trust.trust(model, input_tensor)`"
            )
        from torchcam.trust import trust  # what it measures with takes long to import

        settings = dict(self.settings)
        if "methods" in options:
            given = options["methods"]
            asked = [find_method(one, "methods") for one in ([given] if isinstance(given, (str, type)) else given)]
            names = [one.__name__ for one in asked]
            layers = settings["target_layer"]
            first = next(iter(layers.values()))
            settings["target_layer"] = {name: layers.get(name, first) for name in names}
            for argument in ("method_kwargs", "call_kwargs"):
                settings[argument] = {name: settings[argument].get(name, {}) for name in names}
        return trust(model, self.image, **{**settings, **options})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Trial:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()


def explain_classes(
    model: nn.Module,
    input_tensor: Tensor,
    choose: Callable[[Tensor], Iterable[int]],
    *,
    method: type[Any] = GradCAM,
    target_layer: Layers = None,
    method_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[int, list[Tensor]], Any]:
    """Run a classifier once on one input, and explain the classes that are chosen by its scores.

    Args:
        model: the classifier, left as it was
        input_tensor: one input as the model takes it, (1, C, *spatial)
        choose: function from the scores (1, classes) to the classes to explain
        method: the class of the method
        target_layer: the layer(s) to look at, as the method takes them
        method_kwargs: further arguments of the method

    Returns:
        the scores (1, classes); each class's maps as the method returns them, (1, *spatial); and the extractor that
        made them, which is off the model again

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``input_tensor`` is not one sample, or the scores are not (1, classes) or not finite
    """
    recipes = _as_recipes(method, target_layer, method_kwargs, None)
    if not isinstance(input_tensor, Tensor):
        raise TypeError(f"`input_tensor` must be a tensor, got {type(input_tensor).__name__}")
    if input_tensor.ndim < 3 or len(input_tensor) != 1:
        raise ValueError(
            f"`input_tensor` must be one sample with its batch dimension, (1, C, *spatial), got shape "
            f"{tuple(input_tensor.shape)}"
        )
    with (
        _extractors(model, recipes, tuple(input_tensor.shape[1:])) as extractors,
        untouched(model, recorder=_watching(extractors)),
    ):
        output = model(input_tensor)
        logits = _class_scores(output, 1)
        chosen = dict.fromkeys(choose(logits))
        cams = {index: recipes[0].maps(extractors[0], output, {"class_idx": index}) for index in chosen}
    return logits, cams, extractors[0]


# Which methods.


@dataclass(frozen=True)
class _Recipe:
    """How one method is to be run.

    Attributes:
        name: what it is called
        method: its class
        target_layer: the layers, as it takes them
        options: the arguments of its constructor
        call_options: the arguments of its call
    """

    name: str
    method: type[Any]
    target_layer: Any
    options: Mapping[str, Any]
    call_options: Mapping[str, Any]

    def make(self, model: nn.Module, input_shape: tuple[int, ...]) -> Any:
        """Put the method on a model."""
        options = dict(self.options)
        if takes(self.method, "input_shape"):
            options.setdefault("input_shape", input_shape)
        return self.method(model, target_layer=self.target_layer, **options)

    def maps(self, extractor: Any, output: Any, asked: Mapping[str, Any]) -> list[Tensor]:
        """Compute maps, and keep the graph for whoever comes next."""
        again = {"retain_graph": True} if getattr(_watched(extractor), "_uses_gradients", False) else {}
        maps: list[Tensor] = extractor(scores=output, **asked, **again, **self.call_options)
        return maps

    @property
    def signed(self) -> bool:
        """Whether the maps have negative values."""
        return self.call_options.get("relu") is False


def _as_recipes(method: Any, target_layer: Any, method_kwargs: Any, relu: Any) -> list[_Recipe]:
    """Check what is said of the methods, and sort it by method."""
    several = isinstance(method, (list, tuple, Mapping))
    classes = [
        find_method(one)
        for one in (method.values() if isinstance(method, Mapping) else method if several else [method])
    ]
    labels = [str(label) for label in method] if isinstance(method, Mapping) else [one.__name__ for one in classes]
    if not labels:
        raise ValueError("`method` names no method")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(
            f"`method` names {twice} more than once: tell them apart in a mapping such as "
            f"{{'{twice} A': {twice}, '{twice} B': {twice}}}"
        )
    layers = by_method("target_layer", target_layer, labels) if isinstance(target_layer, Mapping) else {}
    if method_kwargs is not None and not isinstance(method_kwargs, Mapping):
        raise TypeError(f"`method_kwargs` must be a mapping, got {type(method_kwargs).__name__}")
    options = dict(method_kwargs or {})
    sorted_options = by_method("method_kwargs", options, labels) if several and options else {labels[0]: options}
    recipes = []
    for label, one in zip(labels, classes, strict=True):
        mine = dict(sorted_options.get(label) or {})
        if "target_layer" in mine:
            raise ValueError("`method_kwargs` holds 'target_layer': pass `target_layer` itself")
        call_options = {name: mine.pop(name) for name in CALL_OPTIONS & mine.keys()}
        if relu is not None:
            call_options.setdefault("relu", relu)
        layer = layers.get(label) if isinstance(target_layer, Mapping) else target_layer
        recipes.append(_Recipe(label, one, layer, mine, call_options))
    return recipes


@contextmanager
def _extractors(model: nn.Module, recipes: Sequence[_Recipe], input_shape: tuple[int, ...]) -> Iterator[list[Any]]:
    """Put the methods on a model inside the block."""
    with plain_tensors(), ExitStack() as stack:
        made = []
        for recipe in recipes:
            with _named(recipe, recipes):
                made.append(stack.enter_context(recipe.make(model, input_shape)))
        yield made


@contextmanager
def _named(recipe: _Recipe, recipes: Sequence[_Recipe]) -> Iterator[None]:
    """Say of errors which of several methods they are from."""
    try:
        yield
    except Exception as error:
        if len(recipes) > 1:
            error.add_note(f"This was {recipe.name}, one of the methods {', '.join(one.name for one in recipes)}.")
        raise


def _watched(extractor: Any) -> Any:
    """Give the extractor that has the hooks: the innermost of those that wrap another."""
    while hasattr(extractor, "base_cam"):
        extractor = extractor.base_cam
    return extractor


def _watching(extractors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_watched(extractor) for extractor in extractors)


# The pass.


@dataclass(frozen=True)
class _Answer:
    """What a model said of one input: its class scores (1, classes), the highest, and the scores of targets."""

    logits: Tensor
    predicted: int | None
    scores: Mapping[str, float]


def _explained(
    model: nn.Module,
    inputs: Inputs,
    samples: slice,
    choice: Choice,
    recipes: Sequence[_Recipe],
    extractors: Sequence[Any],
) -> list[tuple[_Answer, dict[str, MethodMaps]]]:
    """Run the model once, and explain what it says of each input: by all methods, what was chosen."""
    count = samples.stop - samples.start
    num_spatial = inputs.tensor.ndim - 2
    with untouched(model, recorder=_watching(extractors)):
        output = inputs.call(model, samples)
        if choice.targets is None:
            logits = _class_scores(output, count)
            keys: list[list[Any]] = list(choice.keys(logits, samples))
            rows = zip(logits.cpu().unsqueeze(1), _predicted(logits), strict=True)
            answers = [_Answer(row, index, {}) for row, index in rows]
            columns = [{"class_idx": column if count > 1 else column[0]} for column in _columns(keys)]
        else:
            targets = choice.targets[samples]
            keys = [list(named) for named in targets]
            columns = [{"targets": column} for column in _columns([list(named.values()) for named in targets])]
            answers = _answers_of_targets(output, keys, columns, choice.class_names, count)
        results: list[dict[str, MethodMaps]] = [{} for _ in range(count)]
        for recipe, extractor in zip(recipes, extractors, strict=True):
            with _named(recipe, recipes):
                maps = [_kept(recipe.maps(extractor, output, column), extractor, num_spatial) for column in columns]
            for sample, named in enumerate(keys):
                results[sample][recipe.name] = _method_maps(
                    recipe, extractor, dict(zip(named, maps, strict=False)), sample
                )
    return list(zip(answers, results, strict=True))


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Give the k-th entries of all rows for each k; a shorter row repeats its first, which nobody will read."""
    return [[row[k] if k < len(row) else row[0] for row in rows] for k in range(max(map(len, rows)))]


def _class_scores(output: Any, count: int) -> Tensor:
    """Read the class scores (N, classes) off an output."""
    logits = to_float(read_logits(output).detach()).clone()
    if logits.ndim != 2 or len(logits) != count:
        raise ValueError(
            f"the model must give class scores of shape ({count}, classes), got {tuple(logits.shape)}; for other "
            "outputs pass `targets`: say, of torchcam.targets Segmentation, BoxScores or Similarity"
        )
    broken = [row for row, finite in enumerate(logits.amax(1).isfinite().tolist()) if not finite]
    if broken:
        where = f" for the inputs {broken}" if count > 1 else ""
        raise ValueError(f"the model's scores are NaN or infinite{where}: there is no class to explain")
    return logits


def _predicted(logits: Tensor) -> list[int]:
    predicted: list[int] = logits.topk(1).indices[:, 0].tolist()
    return predicted


def _answers_of_targets(
    output: Any, keys: list[list[str]], columns: list[dict[str, Any]], class_names: Any, count: int
) -> list[_Answer]:
    """Score the targets. The output counts as class scores where it has as many as there are names of classes."""
    by_column = [Selector(None, column["targets"], count)(output).tolist() for column in columns]
    scores = [{key: by_column[k][row] for k, key in enumerate(named)} for row, named in enumerate(keys)]
    logits = None if class_names is None or isinstance(output, list) else to_float(read_logits(output).detach())
    if logits is None or logits.shape != (count, len(class_names)):
        return [_Answer(torch.zeros(1, 0), None, one) for one in scores]
    rows = zip(logits.clone().cpu().unsqueeze(1), _predicted(logits), scores, strict=True)
    return [_Answer(row, index, one) for row, index, one in rows]


def _kept(maps: list[Tensor], extractor: Any, num_spatial: int) -> tuple[list[Tensor], Tensor]:
    """Give the maps (N, *spatial) on the CPU, and what is drawn of them: fused."""
    fused = extractor.fuse_cams(maps) if len(maps) > 1 else maps[0]
    drawn = over_channels(fused) if fused.ndim - 1 > num_spatial else fused
    return [cam.cpu() for cam in maps], drawn.cpu()


def _method_maps(
    recipe: _Recipe, extractor: Any, maps: Mapping[Any, tuple[list[Tensor], Tensor]], sample: int
) -> MethodMaps:
    """Take one input's maps out of those of a batch."""
    options = {**recipe.options, **recipe.call_options}
    return MethodMaps(
        method=recipe.method.__name__,
        target_layers=tuple(extractor.target_names),
        method_kwargs=MappingProxyType({name: plain(value) for name, value in options.items()}),
        cams=MappingProxyType({key: tuple(cam[sample].clone() for cam in layers) for key, (layers, _) in maps.items()}),
        fused=MappingProxyType({key: fused[sample].clone() for key, (_, fused) in maps.items()}),
        signed=recipe.signed,
    )


def _probabilities(logits: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """Turn scores (1, classes) into probabilities; a single score is none without a function."""
    if function is None:
        return logits.double().softmax(1) if logits.shape[1] > 1 else None
    probabilities = function(logits) if logits.shape[1] else None
    if probabilities is not None and (not isinstance(probabilities, Tensor) or probabilities.shape != logits.shape):
        found = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ValueError(f"`to_probabilities` must keep the shape {tuple(logits.shape)} of the scores, got {found}")
    return probabilities
