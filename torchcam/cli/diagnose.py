r"""Report what is wrong with a map.

Report why the map of an image is blank, constant, NaN, upside down, the same
for every class, or too coarse, and what to do about it.

Examples:
  torchcam diagnose dog.jpg --arch vit_b_16 \
      --target-layer encoder.layers.encoder_layer_11
      why is the map of a transformer's last block empty?
  torchcam diagnose dog.jpg --model-factory mine.models:load \
      --method GradCAMpp --json
      your own model, for another program
"""

from __future__ import annotations

from typing import Any

from . import _options
from ._images import prepare, read_image
from ._messages import UserError, count_of, library_errors, print_json, print_line, print_marked

MARKS = {r"^error: ": "bold red", r"^warning: ": "bold yellow", r"^info: ": "bold"}


def add_options(diagnose: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_images(diagnose)
    _options.add_model(diagnose)
    maps = diagnose.add_argument_group("the map")
    _options.add_method(maps)
    _options.add_layers(maps)
    _options.add_class(maps, "the class whose map it is")
    _options.add_json(diagnose)


def run(arguments: Any) -> None:
    """Diagnose the map of each image."""
    method = _options.find_method(arguments.method)
    if not hasattr(method, "diagnose"):
        raise UserError(f"--method {method.__name__} is put together from others: diagnose the method that it wraps")
    classifier = prepare(arguments)
    found = []
    for path in arguments.images:
        with library_errors(arguments.target_layer):
            inputs = classifier.read([read_image(path)])
            with method(classifier.model, target_layer=arguments.target_layer or None) as extractor:
                classifier.model(inputs.tensor)
                found.append((str(path), extractor.diagnose(*arguments.class_idx)))
    if arguments.json:
        entries = [{"image": path, **diagnosis.to_dict()} for path, diagnosis in found]
        print_json({**classifier.facts, "diagnoses": entries})
        return
    print_line(classifier.name)
    for path, diagnosis in found:
        print_marked(f"\n{path}: {diagnosis}", MARKS)
    sound = sum(not diagnosis for _, diagnosis in found)
    print_line(f"\nNothing was found wrong with {sound} of {count_of(len(found), 'map')}.", "bold")
