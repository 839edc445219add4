"""`torchcam explain`: the regions of images that made a classifier's scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _options
from ._images import picture_paths, prepare, read_image, save_figure
from ._messages import UserError, library_errors, print_json, printable
from ._models import RANDOM_WEIGHTS, Classifier

if TYPE_CHECKING:
    import argparse

    from torchcam._explanation import PredictionExplanation

__all__ = ["add_to", "class_entry", "explain_image"]

HELP = """\
Explain what a classification model sees in images. Each image gives one picture: the image as the model sees it
(resized and cropped as the weights want it), and a map over it for every class that is explained.
"""

EXAMPLES = """\
examples:
  torchcam explain dog.jpg
      the most probable class of a resnet50, Grad-CAM on its last layer with positions
  torchcam explain dog.jpg cat.jpg --top-k 3 --output maps
      three classes of each of two images, in one picture per image
  torchcam explain dog.jpg --arch convnext_tiny --method LayerCAM --target-layer features.5,features.7
      the maps of two layers, fused into one
  torchcam explain dog.jpg --arch resnet18 --weights resnet18-f37072fd.pth --class-idx 207
      weights from a file: for machines without network
  torchcam explain dog.jpg --model-factory mine.models:load
      your own model, which the function `load` of `mine/models.py` returns
  torchcam explain dog.jpg --arch resnet18 --weights none
      random weights: to try the command, not to learn about the image

what to try first: GradCAM is quick and a good default. LayerCAM gives fine maps in early layers. ScoreCAM needs no
gradients, but one forward pass per channel. FinerCAM shows what tells a class from those most like it.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    explain = _options.add_command(
        commands, "explain", short="explain images with a classifier", long=HELP, examples=EXAMPLES, run=run
    )
    _options.add_images(explain)
    _options.add_model(explain)
    maps = explain.add_argument_group("the maps")
    _options.add_method(maps)
    _options.add_layers(maps)
    _options.add_classes(maps, "class to explain, by its number or name; several as with --target-layer", several=True)
    _options.add_count(
        maps,
        "--top-k",
        "explain the N most probable classes, before those of --class-idx (default: 1, or 0 with --class-idx)",
        lowest=0,
    )
    result = explain.add_argument_group("the result")
    _options.add_picture(result, "IMAGE-METHOD.png")
    _options.add_colours(result)


def run(arguments: argparse.Namespace) -> None:
    """Explain the images, one after the other."""
    method = _options.find_method(arguments.method)
    if arguments.top_k == 0 and not arguments.class_idx:
        raise UserError("--top-k must be at least 1 without --class-idx, got 0")
    pictures = picture_paths(arguments.output, arguments.images, method.__name__)
    classifier, target = prepare(arguments, [method], pictures)
    title, images = "", []
    for source, path in zip(arguments.images, pictures, strict=True):
        explanation = explain_image(arguments, classifier, source, [method], target, top_k=arguments.top_k or None)
        if not title:
            title = f"{classifier.name}: {method.__name__} of {', '.join(explanation.target_layers)}"
            if not arguments.json:
                print(title)
        with library_errors():
            figure = explanation.plot(colormap=arguments.colormap, alpha=arguments.alpha, dark=False, title=title)
        save_figure(figure, path)
        classes = [class_entry(explanation, index) for index in explanation.cams]
        images.append({"image": str(source), "picture": str(path), "classes": classes})
        if not arguments.json:
            print(printable(f"{source} -> {path}"))
            for index in explanation.cams:
                print(f"  {explanation.value_of(index):>6}  {classifier.label(index)}")
    if arguments.json:
        layers = list(explanation.target_layers)
        print_json({**classifier.facts, "method": method.__name__, "target_layers": layers, "images": images})
    elif classifier.is_random:
        print(RANDOM_WEIGHTS)


def explain_image(
    arguments: argparse.Namespace,
    classifier: Classifier,
    source: Path,
    methods: Sequence[type[Any]],
    target: Any,
    top_k: int | None = None,
) -> PredictionExplanation:
    """Explain one image by some methods."""
    from torchcam._methods import takes
    from torchcam.explain import explain

    shown = [method for method in methods if sys.stderr.isatty() and takes(method, "progress")]
    with library_errors(arguments.target_layer):
        return explain(
            classifier.model,
            read_image(source),
            method=methods,
            target_layer=target,
            method_kwargs={method: {"progress": True} for method in shown},
            class_idx=arguments.class_idx or None,
            top_k=top_k,
            transform=classifier.preprocess,
            class_names=classifier.categories,
        )


def class_entry(explanation: PredictionExplanation, index: int) -> dict[str, Any]:
    """Describe what a model says of a class, for other programs."""
    probabilities = explanation.probabilities
    return {
        "class_idx": index,
        "class_name": None if explanation.class_names is None else explanation.class_names[index],
        "logit": float(explanation.logits[0, index]),
        "probability": None if probabilities is None else float(probabilities[0, index]),
    }
