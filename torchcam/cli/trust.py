"""`torchcam trust`: whether to believe the map of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, add_command, add_outputs, library_errors, print_json
from ._methods import add_layers, as_integers, check_layer_count, find_method, split, target_layer
from ._models import add_model, find_device, load_model
from ._pictures import check_output, read_image, writing

if TYPE_CHECKING:
    import argparse

__all__ = ["add_to"]

METHODS = "GradCAM,LayerCAM,ReciproCAM"
SUFFIXES = (".html", ".json", ".txt")

HELP = """\
Try out the map of a prediction, and say in words whether to believe it: does it change with the weights and with the
class, does the score fall where the map says, do other methods say the same? The first method is judged, the others are
what it is compared with. Takes some hundreds of forward passes for each image.
"""

EXAMPLES = """\
examples:
  torchcam trust dog.jpg
      Grad-CAM on the most probable class of a resnet50
  torchcam trust dog.jpg cat.jpg --arch convnext_tiny --methods LayerCAM,GradCAM --output report.html
      Layer-CAM on two images, in a page with pictures
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    trust = add_command(commands, "trust", short="say whether to believe a map", long=HELP, examples=EXAMPLES, run=run)
    trust.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="an image file")
    add_model(trust)
    maps = trust.add_argument_group("the map")
    maps.add_argument(
        "--methods",
        metavar="NAMES",
        action="append",
        help=f"the method to judge and those to compare with, separated by commas (default: {METHODS})",
    )
    add_layers(maps)
    maps.add_argument(
        "--class-idx",
        metavar="N",
        action="append",
        default=[],
        help="the class whose map it is, for all images or, separated by commas, for each (default: the most probable)",
    )
    maps.add_argument(
        "--chunk-size", metavar="N", type=int, default=32, help="images in one pass (default: %(default)s)"
    )
    result = trust.add_argument_group("the result")
    add_outputs(result, "write the report there, too, as .html, .json or .txt")


def run(arguments: argparse.Namespace) -> None:
    """Try out the maps of the images."""
    import torch

    names = split(arguments.methods or [METHODS])
    if not names:
        raise UserError(f"--methods names none; try {METHODS}")
    methods = list(dict.fromkeys(find_method(name, "--methods") for name in names))
    layers = list(dict.fromkeys(split(arguments.target_layer)))
    check_layer_count(methods[0].__name__, layers)
    classes = as_integers(split(arguments.class_idx))
    if len(classes) not in {0, 1, len(arguments.images)}:
        raise UserError(f"--class-idx must name one class, or one for each of {len(arguments.images)} images")
    if arguments.chunk_size < 1:
        raise UserError(f"--chunk-size must be at least 1, got {arguments.chunk_size}")
    arguments.output = list(dict.fromkeys(arguments.output))
    for path in arguments.output:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--output '{path}' must end in {', '.join(SUFFIXES)}")
    check_output(arguments.output, arguments.images, arguments.overwrite)
    images = [read_image(path) for path in arguments.images]
    device = find_device(arguments.device)

    classifier = load_model(arguments)
    model = classifier.model.to(device)
    inputs = [classifier.preprocess(image) for image in images]
    if len({tuple(image.shape) for image in inputs}) > 1:
        raise UserError("the images are not of one size after the model's transform: give them one by one")
    batch = torch.stack(inputs).to(device)

    from torchcam.trust import trust  # heavy: after all that can be said no to

    with library_errors(layers):
        report = trust(
            model,
            batch,
            classes if len(classes) > 1 else classes[0] if classes else None,
            methods=methods,
            target_layer=target_layer(model, layers),
            images=[classifier.picture(image.unsqueeze(0)) for image in batch],
            class_names=classifier.categories,
            batch_size=arguments.chunk_size,
        )
    for path in arguments.output:
        with writing(path) as part:
            saved = report.save(part.with_suffix(path.suffix))
            saved.replace(part)
    if arguments.json:
        pictures = [str(path) for path in arguments.images]
        print_json({"images": pictures, "random_weights": classifier.is_random, **report.to_dict()})
        return
    print(classifier.name)
    print(report)
    for path in arguments.output:
        print(f"\n-> {path}")
