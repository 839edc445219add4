"""`torchcam diagnose`: why a map is blank, broken or not what it seems."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, add_command, add_json, library_errors, print_json
from ._methods import add_layers, as_integers, check_layer_count, find_method, split, target_layer
from ._models import add_model, find_device, load_model
from ._pictures import read_image
from .explain import check_classes

if TYPE_CHECKING:
    import argparse

__all__ = ["add_to"]

HELP = """\
Say why the map of an image is blank, constant, NaN, upside down, the same for every class, or too coarse, and what to
do about it.
"""

EXAMPLES = """\
examples:
  torchcam diagnose dog.jpg --arch vit_b_16 --target-layer encoder.layers.encoder_layer_11
      why is the map of a transformer's last block empty?
  torchcam diagnose dog.jpg --model-factory mine.models:load --method GradCAMpp --json
      your own model, for another program
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    diagnose = add_command(
        commands, "diagnose", short="say what is wrong with a map", long=HELP, examples=EXAMPLES, run=run
    )
    diagnose.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="an image file")
    add_model(diagnose)
    maps = diagnose.add_argument_group("the map")
    maps.add_argument("--method", default="GradCAM", help="a method of torchcam.methods (default: %(default)s)")
    add_layers(maps)
    maps.add_argument("--class-idx", metavar="N", help="the class whose map it is (default: the most probable)")
    add_json(diagnose)


def run(arguments: argparse.Namespace) -> None:
    """Diagnose the map of each image."""
    method = find_method(arguments.method)
    if not hasattr(method, "diagnose"):
        raise UserError(f"--method {method.__name__} is put together from others: diagnose the method that it wraps")
    layers = list(dict.fromkeys(split(arguments.target_layer)))
    check_layer_count(method.__name__, layers)
    class_indices = as_integers([] if arguments.class_idx is None else [arguments.class_idx])
    images = [read_image(path) for path in arguments.images]
    device = find_device(arguments.device)

    classifier = load_model(arguments)
    model = classifier.model.to(device)
    target = target_layer(model, layers)
    found = []
    for path, image in zip(arguments.images, images, strict=True):
        batch = classifier.preprocess(image).unsqueeze(0).to(device)
        with library_errors(layers), method(model, target_layer=target) as extractor:
            logits = model(batch)
            check_classes(class_indices, 1, logits.shape[1], classifier.name)
            found.append((str(path), extractor.diagnose(class_indices[0] if class_indices else None)))
    if arguments.json:
        entries = [{"image": path, **diagnosis.to_dict()} for path, diagnosis in found]
        print_json({"model": classifier.name, "random_weights": classifier.is_random, "diagnoses": entries})
        return
    print(classifier.name)
    for path, diagnosis in found:
        print(f"\n{path}: {diagnosis}")
