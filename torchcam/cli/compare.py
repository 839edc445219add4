"""`torchcam compare`: one image, many methods, one picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, add_command, add_json, library_errors, percent, print_json
from ._methods import add_layers, as_integers, check_layer_count, find_method, progress, split, target_layer
from ._models import add_model, find_device, load_model
from ._pictures import add_colours, check_colours, check_output, draw_panels, read_image, write
from .explain import check_classes

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

__all__ = ["add_to"]

METHODS = "GradCAM,GradCAMpp,XGradCAM,HiResCAM,LayerCAM,EigenCAM,RandomCAM"

HELP = """\
Explain one image by several methods, all on the same class and layers, in one picture with one scale of colours. The
table says how much each map is like the others: the mean rank correlation with them, from -1 to 1. RandomCAM knows
nothing of the class: a method whose map looks like its is no help.
"""

EXAMPLES = """\
examples:
  torchcam compare dog.jpg
      seven methods on the most probable class of a resnet50
  torchcam compare dog.jpg --arch convnext_tiny --target-layer features.5 --methods GradCAM,LayerCAM,Ablation-CAM
      three methods, on a layer with more positions
  torchcam compare dog.jpg --class-idx 207 --json
      the numbers for another program, beside the picture
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    compare = add_command(
        commands, "compare", short="explain an image by several methods", long=HELP, examples=EXAMPLES, run=run
    )
    compare.add_argument("image", metavar="IMAGE", type=Path, help="an image file")
    add_model(compare)
    maps = compare.add_argument_group("the maps")
    maps.add_argument(
        "--methods",
        metavar="NAMES",
        action="append",
        help=f"methods of torchcam.methods, separated by commas (default: {METHODS})",
    )
    add_layers(maps)
    maps.add_argument("--class-idx", metavar="N", help="class to explain, by its number (default: the most probable)")
    result = compare.add_argument_group("the result")
    result.add_argument(
        "--output", metavar="DIR", type=Path, default=Path(), help="where to write IMAGE-compare.png (default: here)"
    )
    result.add_argument("--overwrite", action="store_true", help="replace the picture if it is there")
    add_colours(result)
    add_json(result)


def run(arguments: argparse.Namespace) -> None:
    """Explain the image by each method, draw the maps, and say how alike they are."""
    import torch

    from torchcam.explain import explain_classes

    names = split(arguments.methods or [METHODS])
    if not names:
        raise UserError(f"--methods names none; try {METHODS}")
    methods = list(dict.fromkeys(find_method(name, "--methods") for name in names))
    layers = list(dict.fromkeys(split(arguments.target_layer)))
    for method in methods:
        check_layer_count(method.__name__, layers)
    class_indices = as_integers([] if arguments.class_idx is None else [arguments.class_idx])
    path = arguments.output / f"{arguments.image.stem}-compare.png"
    check_output([path], [arguments.image], arguments.overwrite)
    check_colours(arguments.alpha, arguments.colormap)
    image = read_image(arguments.image)
    device = find_device(arguments.device)

    classifier = load_model(arguments)
    model = classifier.model.to(device)
    target = target_layer(model, layers)
    batch = classifier.preprocess(image).unsqueeze(0).to(device)

    def choose(logits: Tensor) -> list[int]:
        check_classes(class_indices, 1, logits.shape[1], classifier.name)
        return class_indices or logits[0].topk(1).indices.tolist()

    cams, found = [], []
    for method in methods:
        with library_errors(layers):
            logits, by_class, extractor = explain_classes(
                model, batch, choose, method=method, target_layer=target, method_kwargs=progress(method)
            )
            ((index, maps),) = by_class.items()
            cam = extractor.fuse_cams(list(maps), tuple(batch.shape[2:]))[0]
        if cam.ndim != 2:
            raise UserError(
                f"{method.__name__} gives maps of shape {tuple(cam.shape)}, which cannot be drawn over an image"
            )
        cams.append(cam)
        found.append((method.__name__, list(extractor.target_names)))
    likeness = _likeness(torch.stack(cams))
    probability = logits[0].softmax(0)[index]
    title = f"{classifier.name}: evidence for {classifier.label(index)}, {percent(probability)}"
    panels = [
        (f"{name}\n{textwrap.shorten(', '.join(names), 30, placeholder=' ...')}", cam)
        for (name, names), cam in zip(found, cams, strict=True)
    ]
    write(draw_panels(classifier.picture(batch), panels, title, arguments.alpha, arguments.colormap), path)
    if arguments.json:
        entries = [
            {
                "method": name,
                "target_layers": names,
                "likeness": like,
                "correlations": dict(zip((other for other, _ in found), row, strict=True)),
            }
            for (name, names), like, row in zip(found, *likeness, strict=True)
        ]
        print_json(
            {
                "image": str(arguments.image),
                "picture": str(path),
                "model": classifier.name,
                "random_weights": classifier.is_random,
                "class_idx": index,
                "class_name": None if classifier.categories is None else classifier.categories[index],
                "probability": float(probability),
                "methods": entries,
            }
        )
        return
    print(f"{title}\n")
    width = max(len(name) for name, _ in found) + 2
    print(f"  {'method':<{width}}{'like the others':>16}  layers")
    for (name, names), like in zip(found, likeness[0], strict=True):
        alike = "" if like is None else f"{like:.2f}"
        print(f"  {name:<{width}}{alike:>16}  {', '.join(names)}")
    print(f"\n{arguments.image} -> {path}")
    if classifier.is_random:
        print("The weights are random: these maps say nothing of the image.")


def _likeness(cams: Tensor) -> tuple[list[float | None], list[list[float | None]]]:
    """Give the mean rank correlation of each map with the others, and all of them."""
    from torchcam.metrics._statistics import spearman

    count = len(cams)
    rows = spearman(cams.repeat_interleave(count, 0), cams.repeat(count, 1, 1)).reshape(count, count).tolist()
    table = [[value if value == value else None for value in row] for row in rows]
    means: list[float | None] = []
    for own, row in enumerate(table):
        others = [value for other, value in enumerate(row) if other != own and value is not None]
        means.append(sum(others) / len(others) if others else None)
    return means, table
