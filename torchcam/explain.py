"""One prediction, explained: the model's answer, the maps behind it, and what is needed to make them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._callable import make_callable
from torchcam._checks import positive_integer
from torchcam._choice import Choice, as_class_names
from torchcam._detections import Detections
from torchcam._explanation import Explanations, PredictionExplanation
from torchcam._files import written_whole
from torchcam._inputs import Inputs, opened, read_inputs
from torchcam._method_maps import MethodMaps
from torchcam._numbers import versions
from torchcam._passes import Call
from torchcam._recipes import Recipe, as_recipes, extractors_on, named_errors
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import over_positions, to_float
from torchcam._trust_request import TrustRequest
from torchcam._views import FULL
from torchcam.layers import TargetLayer
from torchcam.methods import GradCAM, HiResCAM
from torchcam.targets import Selector, read_logits
from torchcam.tasks.boxes import as_boxes, is_detector
from torchcam.tasks.texts import as_images, as_texts, own_scores

__all__ = [
    "Detections",
    "Explanations",
    "MethodMaps",
    "PredictionExplanation",
    "explain",
    "explain_classes",
    "written_whole",
]

Method = type[Any] | str
Layers = TargetLayer | Sequence[TargetLayer] | None
OneInput = Tensor | str | Path | Image.Image | Mapping[str, Any]
SeveralInputs = Sequence[Any] | np.ndarray[Any, Any]


class Pipeline(Protocol):
    """What is read of a pipeline of transformers."""

    model: Any
    preprocess: Any


class Options(TypedDict, total=False):
    """The keyword arguments of `explain`."""

    expected_class_idx: Any
    class_names: Sequence[str] | None
    method: Method | Sequence[Method] | Mapping[str, Method] | None
    target_layer: Layers | Mapping[Any, Layers]
    method_kwargs: Mapping[Any, Any] | None
    top_k: int | None
    class_idx: Any
    targets: Any
    box: Any
    threshold: float | None
    texts: Sequence[str] | None
    against: Literal["others"] | None
    relu: bool | Literal["negative"] | None
    transform: Any
    processor: Any
    weights: Any
    image: Any
    to_probabilities: Callable[[Tensor], Tensor] | None
    batch_size: int


class ExplainFunction(Protocol):
    """The type of `explain`. That a tensor holds a batch shows only when it runs: it counts as one input."""

    @overload
    def __call__(
        self, model: nn.Module | Pipeline, input_tensor: OneInput, **options: Unpack[Options]
    ) -> PredictionExplanation: ...

    @overload
    def __call__(
        self, model: nn.Module | Pipeline, input_tensor: SeveralInputs, **options: Unpack[Options]
    ) -> Explanations: ...


def _overloaded(function: Callable[..., Any]) -> ExplainFunction:
    return function


@_overloaded
def explain(
    model: nn.Module | Pipeline,
    input_tensor: Any,
    *,
    expected_class_idx: Any = None,
    class_names: Sequence[str] | None = None,
    method: Method | Sequence[Method] | Mapping[str, Method] | None = None,
    target_layer: Layers | Mapping[Any, Layers] = None,
    method_kwargs: Mapping[Any, Any] | None = None,
    top_k: int | None = None,
    class_idx: Any = None,
    targets: Any = None,
    box: Any = None,
    threshold: float | None = None,
    texts: Sequence[str] | None = None,
    against: Literal["others"] | None = None,
    relu: bool | Literal["negative"] | None = None,
    transform: Any = None,
    processor: Any = None,
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
        >>> import torchcam
        >>> from torchcam.demo import CLASS_NAMES, load_model, sample_images
        >>> sample = sample_images()[0]
        >>> result = torchcam.explain(load_model(), sample.to_tensor(), class_names=CLASS_NAMES, target_layer="layer4")
        >>> folder = result.save("explanation", sample.image)  # doctest: +SKIP
        >>> methods = ["Grad-CAM++", "LayerCAM"]
        >>> several = torchcam.explain(load_model(), sample.to_tensor(), method=methods, class_idx=sample.labels)
        >>> several.methods, list(several.cams) == list(sample.labels)
        (('GradCAMpp', 'LayerCAM'), True)

    Args:
        model: the model, or a pipeline of transformers, whose processors are taken
        input_tensor: one input as the model takes it, (1, C, *spatial), or a batch (N, C, *spatial); or an image: the
            path of a file, a PIL image, or an array (height, width[, channels]) of bytes or of floats in [0, 1]; or a
            list of images, or of tensors (C, *spatial); or the model's keyword arguments in a mapping
        expected_class_idx: a class to explain beside the others, say, the true one; of a batch one for all, or a list
            of one for each input
        class_names: the names of all classes, in the order of the scores; by default those of ``weights``, or those
            that a model of transformers knows
        method: the class of the method, or its name in any spelling; several in a list, or in a mapping from labels of
            your own; by default GradCAM and, for boxes, HiResCAM
        target_layer: the layer(s) to look at, as the method takes them; for several methods the same, or a mapping from
            methods to layers
        method_kwargs: further arguments of the method: of its constructor, or of its call (``relu``,
            ``comparison_idx``, ``eps``, ``target_shape``); of several methods, a mapping from methods to arguments
        top_k: how many classes with the highest scores are explained, the predicted one first; 1, or 0 with
            ``class_idx``
        class_idx: the class to explain, or a list of several; by number, or by name where the names are known. Of a
            batch one for all, a list of one for each input, or a list of as many for each.
        targets: in place of classes, what to explain of any output: a callable from one sample's output to a scalar
            (see :mod:`torchcam.targets`), several in a mapping from their names, or in a list: of one input's several
            targets, of a batch's one for each input
        box: of a detector, in place of classes: the number of a box that it finds, a list of them, or ``"all"``; by
            default the box with the highest score. In place of a number also a :class:`torchcam.targets.Box` with it,
            for a side, a mask or a point. For the wrappers of ultralytics, DETR and its relatives of transformers (with
            their ``processor``) and the detectors of torchvision; ``input_tensor`` is an image then, or a list of them.
            Their method is by default HiResCAM: the gradient of a box has a place, and GradCAM averages over it.
        threshold: of a detector, the least score of a box; by default its own
        texts: of a model with an image and a text tower (CLIP, SigLIP, ...), the texts that the image is compared with.
            They are embedded once, and are the classes from then on; so they are what ``class_idx`` names.
        against: ``"others"`` to explain what tells a text from the others: its score less the mean of theirs
        relu: True for the evidence for the classes, ``"negative"`` for that against them, False for both in signed
            maps; None for what each method does by itself
        transform: function from a PIL image to a tensor (C, *spatial), or an image processor of transformers. The image
            that is shown is the model's view, with the transform's normalisation undone where it can be found.
        processor: a processor, image processor or tokenizer of transformers: it makes a tensor of an image where there
            is no ``transform``, boxes of a detector's output, and tokens of ``texts``. For the latter also a function
            from a list of strings to what the text tower takes, as the tokenizers of open_clip are.
        weights: weights of torchvision, or their name, such as "ResNet18_Weights.DEFAULT" or, for a model as
            torchvision builds it, "DEFAULT": their transform is taken, and the names of the classes
        image: what to show in place of the model's view: an image as above, or a list of one for each input. If it is
            the original of an image that was cropped or padded, each map is drawn where the model saw it.
        to_probabilities: function from the scores (N, classes) to the probabilities that are shown: softmax by default;
            ``torch.sigmoid`` where classes do not exclude each other, and by default where ``texts`` are judged one by
            one (SigLIP). A single score is shown as it is.
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
    arguments = dict(locals())
    if top_k is not None:
        positive_integer("top_k", top_k)
    positive_integer("batch_size", batch_size)
    names = as_class_names(class_names)
    model, input_tensor, transform, processor = opened(model, input_tensor, transform, processor)
    model = original = explained = _original(model)
    others = {"class_idx": class_idx, "targets": targets, "texts": texts, "against": against, "top_k": top_k}
    about_boxes = _asks_about_boxes(model, box, threshold, {**others, "expected_class_idx": expected_class_idx})
    if about_boxes and isinstance(input_tensor, (list, tuple)):  # of pictures of any size, with any number of boxes
        if not input_tensor:
            raise ValueError("`input_tensor` is an empty list: there is nothing to explain")
        return Explanations([explain(**{**arguments, "input_tensor": one}) for one in input_tensor])
    method = (HiResCAM if about_boxes else GradCAM) if method is None else method
    recipes = as_recipes(method, target_layer, method_kwargs, relu)
    boxes, compared = None, None
    with normal_mode(graph=False):
        if about_boxes:
            boxes = as_boxes(
                model,
                input_tensor,
                box,
                processor=processor,
                threshold=threshold,
                class_names=names,
                needs_layer=any(recipe.searches_layer for recipe in recipes),
                transform=transform,
                weights=weights,
            )
            model, inputs, targets = boxes.model, boxes.inputs, boxes.targets
            recipes = [recipe.at(boxes.layer) for recipe in recipes]
            names, explained = None, model
        else:
            compared = as_texts(model, input_tensor, texts, against, targets, processor, batch_size)
            if compared is not None:
                input_tensor, transform = as_images(model, input_tensor, transform, processor)
            inputs = read_inputs(model, input_tensor, transform, weights, image, processor)
            names = inputs.class_names if names is None else names
    if compared is not None:
        model, names = compared.classifier(model), compared.names if class_names is None else names
        to_probabilities = to_probabilities or compared.to_probabilities
    count = len(inputs.tensor)
    choice = Choice(count, inputs.is_batch, class_idx, expected_class_idx, top_k, targets, names)
    input_shape = tuple(inputs.tensor.shape[1:])
    made_by = versions()
    explanations: list[PredictionExplanation] = []
    step = batch_size if inputs.kwargs is None else count
    scores = _first_scores(inputs, min(step, count), choice.targets)
    with replicated(model) as replica, extractors_on(replica, model, recipes, input_shape, scores) as extractors:
        for start in range(0, count, step):
            samples = slice(start, min(start + step, count))
            answers = _explain_samples(replica, inputs, samples, choice, recipes, extractors)
            for number, (answer, results) in enumerate(answers, start):
                first = next(iter(results.values()))
                picture = inputs.pictures[number]
                request = None
                if inputs.kwargs is None:
                    request = TrustRequest.of(
                        explained,
                        inputs.tensor[number : number + 1],
                        recipes,
                        [result.target_layers for result in results.values()],
                        {} if choice.targets is None else choice.targets[number],
                        # A map that covers another part of the picture is judged over what the model sees.
                        images=None if picture is None or inputs.shown[number] != FULL else [picture],
                        class_names=names,
                        to_probabilities=to_probabilities,
                        view=None if compared is None else compared.classifier,
                    )
                explanations.append(
                    PredictionExplanation(
                        logits=answer.logits,
                        predicted_class_idx=answer.predicted,
                        expected_class_idx=choice.expected[number],
                        cams=first.cams,
                        method=first.method,
                        target_layers=first.target_layers,
                        model=f"{type(original).__module__}.{type(original).__qualname__}",
                        input_shape=(1, *input_shape),
                        versions=made_by,
                        class_names=names,
                        method_kwargs=first.method_kwargs,
                        results=results,
                        image=picture,
                        probabilities=_probabilities(answer.logits, to_probabilities),
                        scores=answer.scores,
                        view=inputs.shown[number],
                        detections=None if boxes is None else boxes.detections,
                        _try_out=request,
                        _views=inputs.views[number],
                    )
                )
    return Explanations(explanations) if inputs.is_batch else explanations[0]


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
        made them, whose hooks are removed

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``input_tensor`` is not one sample, or the scores are not (1, classes) or not finite
    """
    recipes = as_recipes(method, target_layer, method_kwargs, None)
    if not isinstance(input_tensor, Tensor):
        raise TypeError(f"`input_tensor` must be a tensor, got {type(input_tensor).__name__}")
    if input_tensor.ndim < 3 or len(input_tensor) != 1:
        raise ValueError(
            f"`input_tensor` must be one sample with its batch dimension, (1, C, *spatial), got shape "
            f"{tuple(input_tensor.shape)}"
        )
    model, input_shape = _original(model), tuple(input_tensor.shape[1:])
    with replicated(model) as replica, extractors_on(replica, model, recipes, input_shape) as (extractor,):
        output = replica(input_tensor)
        logits = _class_scores(output, 1)
        chosen = dict.fromkeys(choose(logits))
        cams = {index: recipes[0].compute_maps(extractor, output, class_idx=index) for index in chosen}
    return logits, cams, extractor


def _asks_about_boxes(model: nn.Module, box: Any, threshold: float | None, others: Mapping[str, Any]) -> bool:
    """Check whether a detector is asked about its boxes: it is, if nothing else is asked.

    Raises:
        ValueError: if it is asked about something else as well, or there is a ``threshold`` for no boxes
    """
    asked = [name for name, value in others.items() if value is not None]
    if box is not None and asked:
        raise ValueError(f"give `box` or `{asked[0]}`, not both: boxes take the place of classes and targets")
    if box is not None or (not asked and is_detector(model)):
        return True
    if threshold is not None:
        raise ValueError(
            f"`threshold` is {threshold}, the least score of a detector's boxes, but no `box` is asked about"
        )
    return False


def _original(model: object) -> nn.Module:
    """Return the model, or what `torch.compile` was given: compiled code runs no hooks."""
    if not isinstance(model, nn.Module):
        is_exported = type(model).__name__ == "ExportedProgram"
        hint = ": its layers are gone, pass the model it was made from" if is_exported else ""
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}{hint}")
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


@dataclass(frozen=True)
class _Answer:
    """The model's class scores of one input (1, classes), the class with the highest, and the scores of targets."""

    logits: Tensor
    predicted: int | None
    scores: Mapping[str, float]


def _first_scores(
    inputs: Inputs, count: int, targets: Sequence[Mapping[str, Any]] | None
) -> tuple[Call, Callable[[Any], Tensor]] | None:
    """Return the call of the model for the first inputs, and a function from its output to the scores of targets."""
    if targets is None:
        return None
    columns = _columns([list(named.values()) for named in targets[:count]])
    call = Call((inputs.tensor[:count],), {}) if inputs.kwargs is None else Call((), dict(inputs.kwargs))
    return call, lambda output: torch.stack([Selector(None, column, len(column))(output) for column in columns], 1)


def _explain_samples(
    replica: nn.Module,
    inputs: Inputs,
    samples: slice,
    choice: Choice,
    recipes: Sequence[Recipe],
    extractors: Sequence[Any],
) -> list[tuple[_Answer, dict[str, MethodMaps]]]:
    """Run the model once, and return its answer for each input with the maps of all methods."""
    count = samples.stop - samples.start
    output = inputs.call(replica, samples)
    if choice.targets is None:
        logits = _class_scores(own_scores(output), count)
        keys: list[list[Any]] = list(choice.keys(logits, samples))
        answers = _answers(logits, [{}] * count)
        columns: list[dict[str, Any]] = [{"class_idx": column if count > 1 else column[0]} for column in _columns(keys)]
    else:
        targets = choice.targets[samples]
        keys = [list(named) for named in targets]
        columns = [{"targets": column} for column in _columns([list(named.values()) for named in targets])]
        answers = _answers_of_targets(output, keys, columns, choice.class_names)
    results: list[dict[str, MethodMaps]] = [{} for _ in range(count)]
    for recipe, extractor in zip(recipes, extractors, strict=True):
        with named_errors(recipe, recipes):
            maps = [
                _fused_on_cpu(recipe.compute_maps(extractor, output, **column), extractor, inputs.tensor[samples])
                for column in columns
            ]
        for sample, named in enumerate(keys):
            of_sample = dict(zip(named, maps, strict=False))  # a sample with fewer classes has repetitions at the end
            results[sample][recipe.name] = MethodMaps(
                method=recipe.method.__name__,
                target_layers=tuple(extractor.target_names),
                method_kwargs=recipe.plain_options,
                cams={key: tuple(cam[sample].clone() for cam in layers) for key, (layers, _) in of_sample.items()},
                fused={key: fused[sample].clone() for key, (_, fused) in of_sample.items()},
                signed=recipe.signed,
            )
    return list(zip(answers, results, strict=True))


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return for each k the k-th entries of all rows; a shorter row repeats its first."""
    return [[row[k] if k < len(row) else row[0] for row in rows] for k in range(max(map(len, rows)))]


def _class_scores(output: Any, count: int) -> Tensor:
    """Return the class scores (N, classes) of an output."""
    _check_is_one_task(output, count)
    logits = to_float(read_logits(output).detach()).clone()
    if logits.ndim == 1 and len(logits) == count:  # a regression
        logits = logits.unsqueeze(1)
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


def _check_is_one_task(output: Any, count: int) -> None:
    """Check that a plain dictionary of outputs does not hold scores of several tasks."""
    if type(output) is not dict or {"logits", "logits_per_image", "out"} & output.keys():
        return
    tasks = [name for name, t in output.items() if isinstance(t, Tensor) and t.is_floating_point() and len(t) == count]
    if len(tasks) > 1:
        first = repr(tasks[0])
        raise ValueError(
            f"the model gives several outputs, {', '.join(map(repr, tasks))}: name what is explained as `targets`, say "
            f"`targets={{{first}: lambda output: output[{first}]}}` of a number, `output[{first}][2]` of a class"
        )


def _answers(logits: Tensor, scores: Sequence[Mapping[str, float]]) -> list[_Answer]:
    """Return the answer for each row of class scores."""
    predicted = logits.topk(1).indices[:, 0].tolist()
    return [_Answer(*parts) for parts in zip(logits.cpu().unsqueeze(1), predicted, scores, strict=True)]


def _answers_of_targets(
    output: Any, keys: list[list[str]], columns: list[dict[str, Any]], class_names: Sequence[str] | None
) -> list[_Answer]:
    """Score the targets. The output counts as class scores where it has as many as there are names of classes."""
    count = len(keys)
    by_column = [Selector(None, column["targets"], count)(output).tolist() for column in columns]
    scores = [{key: by_column[k][row] for k, key in enumerate(named)} for row, named in enumerate(keys)]
    if class_names is not None and not isinstance(output, list):
        logits = to_float(read_logits(output).detach())
        if logits.shape == (count, len(class_names)):
            return _answers(logits.clone(), scores)
    return [_Answer(torch.zeros(1, 0), None, one) for one in scores]


def _fused_on_cpu(maps: list[Tensor], extractor: Any, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the maps (N, *spatial) of all layers, and the one that is drawn."""
    fused = extractor.fuse_cams(maps) if len(maps) > 1 else maps[0]
    return [cam.cpu() for cam in maps], over_positions(fused, image).cpu()


def _probabilities(logits: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """Turn scores (1, classes) into probabilities; a single score has none without a function."""
    if function is None:
        return logits.double().softmax(1) if logits.shape[1] > 1 else None
    probabilities = function(logits) if logits.shape[1] else None
    if probabilities is not None and (not isinstance(probabilities, Tensor) or probabilities.shape != logits.shape):
        found = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ValueError(f"`to_probabilities` must keep the shape {tuple(logits.shape)} of the scores, got {found}")
    return probabilities


make_callable(__name__)
