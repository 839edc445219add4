"""`torchcam explain`: what a classifier sees in images."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, add_command, add_json, library_errors, percent, print_json
from ._methods import add_layers, as_integers, check_layer_count, find_method, progress, split, target_layer
from ._models import add_model, find_device, load_model
from ._pictures import add_colours, check_colours, check_output, draw_panels, read_image, write

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

__all__ = ["add_to"]

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
    explain = add_command(
        commands, "explain", short="explain images with a classifier", long=HELP, examples=EXAMPLES, run=run
    )
    explain.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="an image file")
    add_model(explain)
    maps = explain.add_argument_group("the maps")
    maps.add_argument(
        "--method", default="GradCAM", help="a method of torchcam.methods, in any case (default: %(default)s)"
    )
    add_layers(maps)
    maps.add_argument(
        "--class-idx",
        metavar="N",
        action="append",
        default=[],
        help="class to explain, by its number; several as with --target-layer",
    )
    maps.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        help="explain the K most probable classes, before those of --class-idx (default: 1, or 0 with --class-idx)",
    )
    pictures = explain.add_argument_group("the result")
    pictures.add_argument(
        "--output", metavar="DIR", type=Path, default=Path(), help="where to write IMAGE-METHOD.png (default: here)"
    )
    pictures.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    add_colours(pictures)
    add_json(pictures)


def run(arguments: argparse.Namespace) -> None:
    """Explain the images, one after the other."""
    from torchcam.explain import explain_classes

    method = find_method(arguments.method)
    layers = list(dict.fromkeys(split(arguments.target_layer)))
    check_layer_count(method.__name__, layers)
    class_indices = as_integers(split(arguments.class_idx))
    top_k = arguments.top_k if arguments.top_k is not None else int(not class_indices)
    paths = [arguments.output / f"{path.stem}-{method.__name__}.png" for path in arguments.images]
    check_output(paths, arguments.images, arguments.overwrite)
    for path in arguments.images:
        read_image(path)
    check_colours(arguments.alpha, arguments.colormap)
    device = find_device(arguments.device)

    classifier = load_model(arguments)
    model = classifier.model.to(device)
    target = target_layer(model, layers)

    def choose(logits: Tensor) -> list[int]:
        check_classes(class_indices, top_k, logits.shape[1], classifier.name)
        return [*logits[0].topk(top_k).indices.tolist(), *class_indices]

    title, results = "", []
    for source, path in zip(arguments.images, paths, strict=True):
        batch = classifier.preprocess(read_image(source)).unsqueeze(0).to(device)
        with library_errors(layers):
            logits, cams, extractor = explain_classes(
                model, batch, choose, method=method, target_layer=target, method_kwargs=progress(method)
            )
            maps = {index: extractor.fuse_cams(list(layer_maps))[0] for index, layer_maps in cams.items()}
        for cam in maps.values():
            if cam.ndim != 2:
                shape = tuple(cam.shape)
                raise UserError(f"{method.__name__} gives maps of shape {shape}, which cannot be drawn over an image")
        if not title:
            title = f"{classifier.name}: {method.__name__} of {', '.join(extractor.target_names)}"
            if not arguments.json:
                print(title)
        probabilities = logits[0].softmax(0)
        panels = [
            (f"{textwrap.fill(classifier.label(index), 26)}\n{percent(probabilities[index])}", cam)
            for index, cam in maps.items()
        ]
        write(draw_panels(classifier.picture(batch), panels, title, arguments.alpha, arguments.colormap), path)
        classes = [
            {
                "class_idx": index,
                "class_name": None if classifier.categories is None else classifier.categories[index],
                "logit": float(logits[0, index]),
                "probability": float(probabilities[index]),
            }
            for index in maps
        ]
        results.append({"image": str(source), "picture": str(path), "classes": classes})
        if not arguments.json:
            print(f"{source} -> {path}")
            for index in maps:
                print(f"  {percent(probabilities[index]):>6}  {classifier.label(index)}")
    if arguments.json:
        print_json(
            {
                "model": classifier.name,
                "random_weights": classifier.is_random,
                "method": method.__name__,
                "target_layers": list(extractor.target_names),
                "images": results,
            }
        )
    elif classifier.is_random:
        print("The weights are random: these maps say nothing of the images.")


def check_classes(class_indices: list[int], top_k: int, num_classes: int, model: str) -> None:
    """Check the numbers of classes against a model's."""
    for option, values, lowest, highest in (
        ("--class-idx", class_indices, 0, num_classes - 1),
        ("--top-k", [top_k], 0 if class_indices else 1, num_classes),
    ):
        for value in values:
            if not lowest <= value <= highest:
                raise UserError(
                    f"{option} must lie between {lowest} and {highest} for the {num_classes} classes of {model}, got "
                    f"{value}"
                )
