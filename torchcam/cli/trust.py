r"""Report whether to believe a map.

Test the map of a prediction, and report whether to believe it: is there
evidence in the image, does the score fall where the map says so when windows
of the image are removed, is the map's region enough to tell the class? The
first method is judged; if it fails, the others are tried as well. Takes about
70 forward passes for each image.

Examples:
  torchcam trust dog.jpg
      Grad-CAM on the most probable class of a resnet50
  torchcam trust dog.jpg cat.jpg --arch convnext_tiny \
      --methods LayerCAM,GradCAM --output report.html
      Layer-CAM on two images, in a page with pictures
"""

from __future__ import annotations

from typing import Any

from torchcam._names import listed

from . import _options
from ._images import prepare, read_image, recommend, save_reports
from ._messages import UserError, library_errors, print_json, print_line, print_marked

METHODS = "GradCAM,LayerCAM,ReciproCAM"
MARKS = {
    r"^ *Do not believe": "bold red",
    r"^ *Take th\w+ pictures? with care": "bold yellow",
    r"^ *Believe": "bold green",
    r"^  ✓": "green",
    r"^  [?!]": "yellow",
    r"^  ✗": "red",
}


def add_options(trust: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_images(trust)
    _options.add_model(trust)
    maps = trust.add_argument_group("the map")
    _options.add_methods(
        maps,
        f"{METHODS}; for a transformer, without --target-layer, HiResCAM with balanced gradients before them",
        "the method to judge and those to compare with",
    )
    _options.add_layers(maps)
    _options.add_classes(
        maps,
        "the class whose map it is, for all images or, separated by commas, for each (default: the most probable)",
    )
    _options.add_count(maps, "--chunk-size", "images in one pass (default: %(default)s)", default=32)
    _options.add_reports(trust.add_argument_group("the result"), "the report", (".html", ".json", ".txt"))


def run(arguments: Any) -> None:
    """Test the maps of the images."""
    methods = _options.find_methods(arguments.methods, METHODS)
    if len(arguments.class_idx) not in {0, 1, len(arguments.images)}:
        raise UserError(f"--class-idx must name one class, or one for each of {len(arguments.images)} images")
    outputs = list(dict.fromkeys(arguments.output))
    classifier = prepare(arguments, outputs)

    from torchcam.trust import trust  # after all checks, as it takes long to import

    with library_errors(arguments.target_layer):
        pictures = [read_image(path) for path in arguments.images]
        inputs = classifier.read(pictures)
        best = recommend(arguments, classifier, pictures[0])
        report = trust(
            classifier.model,
            inputs.tensor,
            arguments.class_idx if len(arguments.class_idx) > 1 else next(iter(arguments.class_idx), None),
            methods=[best.method, *methods] if best else methods,
            target_layer={best.method: best.target_layer} if best else arguments.target_layer or None,
            method_kwargs={best.method: best.method_kwargs} if best else None,
            images=[picture for picture in inputs.pictures if picture is not None] or None,
            class_names=classifier.categories,
            batch_size=arguments.chunk_size,
        )
    save_reports(report, outputs)
    if arguments.json:
        images = [str(path) for path in arguments.images]
        print_json({"images": images, "random_weights": classifier.is_random, **report.to_dict()})
        return
    print_line(classifier.name)
    print_marked(report, MARKS)
    if outputs:
        print_line(f"\nThe report is in {listed([str(path) for path in outputs])}.")
