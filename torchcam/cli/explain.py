"""`torchcam explain`: the regions of images that made a classifier's scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam._names import listed

from . import _options
from ._images import file_errors, prepare, read_image, recommend, save_array, save_figure
from ._messages import UserError, count_of, library_errors, print_json, print_line, print_warning, printable
from ._models import RANDOM_WEIGHTS, Classifier
from ._paths import Source, check_folder, check_output, find_sources, is_picture, result_path

if TYPE_CHECKING:
    import argparse

    from PIL import Image

    from torchcam._explanation import PredictionExplanation

__all__ = ["add_to", "class_entry", "explain_image", "picture_of"]

METHOD = "GradCAM"
METHOD_OF_BOXES = "HiResCAM"

HELP = """\
Explain what a classification model sees in images. Each image gives one picture: the image as the model sees it
(resized and cropped as the weights want it), and a grid of maps over it, with the methods in columns and the classes in
rows. With --box, it explains what a detector found. The name of a picture says of what model, layers, methods and
classes it is. Images of a folder that cannot be read, and pictures that torchcam made, are left out.
"""

EXAMPLES = """\
examples:
  torchcam explain dog.jpg
      the most probable class of a resnet50, Grad-CAM on its last layer with positions
  torchcam explain dog.jpg --arch vit_b_16
      a transformer: HiResCAM with balanced gradients at its first tokens, which the leaderboard found best
  torchcam explain photos --output maps --html
      all images in a folder and in those below it, and a page to look into their maps
  torchcam explain dog.jpg cat.jpg --top-k 3 --methods GradCAM,LayerCAM
      three classes of each of two images by two methods, in one picture per image
  torchcam explain dog.jpg --arch convnext_tiny --method LayerCAM --target-layer features.5,features.7
      the maps of two layers, fused into one
  torchcam explain dog.jpg --timm vit_base_patch16_224.augreg_in21k_ft_in1k --class-idx beagle --save-maps
      a model of timm, a class by its name, and the map as numbers
  torchcam explain dog.jpg --arch resnet18 --weights resnet18-f37072fd.pth --class-idx 207
      weights from a file: for machines without network
  torchcam explain dog.jpg --model-factory mine.models:load
      your own model, which the function `load` of `mine/models.py` returns
  torchcam explain street.jpg --model-factory mine.models:yolo --box 0
      why a detector found its first box; --box all for every box, --hf FOLDER for a detector of transformers
  torchcam explain dog.jpg --hf CLIP-FOLDER --texts cat --texts dog
      where the text is that fits best; `--top-k 2` for both
  torchcam explain dog.jpg --arch resnet18 --weights none
      random weights: to try the command, not to learn about the image

what to try first: nothing. Without --methods and --target-layer you get what the leaderboard found best for the kind of
model: GradCAM for convolutions, HiResCAM with balanced gradients for transformers. LayerCAM gives fine maps in early
layers. ScoreCAM needs no gradients, but one forward pass per channel. FinerCAM shows what tells a class from those most
like it.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    explain = _options.add_command(
        commands, "explain", short="explain images with a classifier", long=HELP, examples=EXAMPLES, run=run
    )
    _options.add_sources(explain)
    _options.add_model(explain)
    maps = explain.add_argument_group("the maps")
    _options.add_methods(
        maps,
        f"{METHOD}; of boxes {METHOD_OF_BOXES}; for a transformer, without --target-layer, HiResCAM with balanced "
        "gradients",
    )
    _options.add_layers(maps)
    _options.add_classes(maps, "class to explain, by its number or name; several as with --target-layer", several=True)
    _options.add_count(
        maps,
        "--top-k",
        "explain the N most probable classes, before those of --class-idx (default: 1, or 0 with --class-idx)",
        lowest=0,
    )
    _options.add_boxes(maps)
    maps.add_argument(
        "--texts",
        metavar="TEXT",
        action="append",
        default=[],
        help="a text that images are compared with, by a model of --hf with an image and a text tower (CLIP, SigLIP); "
        "repeated, the texts are the classes",
    )
    maps.add_argument("--against", choices=["others"], help="explain what tells a text from the others")
    result = explain.add_argument_group("the result")
    _options.add_picture(result)
    result.add_argument("--html", action="store_true", help="write a page as well, to look into the maps of all images")
    result.add_argument(
        "--save-maps", action="store_true", help="write each map as well, as an array of numbers (.npy, height x width)"
    )
    _options.add_colours(result)


def run(arguments: argparse.Namespace) -> None:
    """Explain the images, one after the other."""
    methods = _options.find_methods(arguments.methods, METHOD_OF_BOXES if arguments.box else METHOD)
    _check_boxes(arguments)
    if arguments.top_k == 0 and not arguments.class_idx:
        raise UserError("--top-k must be at least 1 without --class-idx, got 0")
    if arguments.texts and arguments.hf is None:
        raise UserError("--texts compares images with texts by a model of --hf, such as CLIP: name one")
    sources = find_sources(arguments.images)
    file = [arguments.output] if is_picture(arguments.output) else []
    if file and len(sources) > 1:
        raise UserError(f"--output '{file[0]}' is one file for {len(sources)} images: name a folder")
    named = [source.path for source in sources if source.is_named]
    if not file:
        check_folder(arguments.output)
    classifier, target = prepare(arguments, methods, file, named)
    inputs, began = [source.path for source in sources], time.perf_counter()
    found: dict[str, PredictionExplanation] = {}
    images: list[dict[str, Any]] = []
    left_out: list[str] = []
    page = best = None
    for source in _with_progress(sources):
        try:
            image = read_image(source.path)
        except UserError as error:
            if source.is_named:
                raise
            print_warning(f"{error}: it is left out")
            left_out.append(str(source.path))
            continue
        if not images and not arguments.box:
            best = recommend(arguments, classifier, image)
            if best is not None:
                methods, target = [_options.find_method(best.method)], best.target_layer
        options = {best.method: dict(best.method_kwargs)} if best else {}
        explanation = explain_image(
            arguments, classifier, image, methods, target, top_k=arguments.top_k or None, options=options
        )
        if arguments.html and page is None:
            page = _page_of(arguments, classifier, sources, explanation)
            check_output([page], inputs, arguments.overwrite)
        if not images and not arguments.json:
            print_line(_title(classifier, explanation))
            if best is not None:
                print_line(f"With balanced gradients, best for {best.kind}; --methods {METHOD} for another view.")
        images.append(_write(arguments, classifier, source, explanation, inputs))
        if arguments.html:
            found[source.name] = replace(explanation, _try_out=None)  # which holds the input
    if not images:
        raise UserError(f"none of the {count_of(len(left_out), 'image')} can be read")
    if page is not None:
        _write_page(arguments, page, found, _title(classifier, explanation))
    if arguments.json:
        facts = {**classifier.facts, **_facts(explanation)}
        print_json({**facts, "images": images, "left_out": left_out, "page": None if page is None else str(page)})
        return
    print_line(f"\n{_conclusion(arguments, images, left_out, page, time.perf_counter() - began)}")
    if classifier.is_random:
        print(RANDOM_WEIGHTS)


def _check_boxes(arguments: argparse.Namespace) -> None:
    """Check that boxes are asked of a model that may be a detector, and that nothing else is asked."""
    if not arguments.box:
        if arguments.threshold is not None:
            raise UserError("--threshold is the least score of a box: name one with --box, or --box all")
        return
    if arguments.class_idx or arguments.texts or arguments.top_k is not None:
        raise UserError("--box takes the place of --class-idx, --texts and --top-k: give one of them")
    if arguments.hf is None and arguments.model_factory is None:
        raise UserError("--box needs a detector: name it with --model-factory or --hf")


def _with_progress(sources: Sequence[Source]) -> Iterator[Source]:
    """Yield the images, of several with a bar on the terminal."""
    from tqdm import tqdm

    hidden = len(sources) < 2 or not sys.stderr.isatty()
    yield from tqdm(sources, unit="image", disable=hidden, leave=False)


def explain_image(
    arguments: argparse.Namespace,
    classifier: Classifier,
    image: Image.Image,
    methods: Sequence[type[Any]],
    target: Any,
    top_k: int | None = None,
    options: Mapping[Any, dict[str, Any]] | None = None,
) -> PredictionExplanation:
    """Explain one image by some methods; ``options`` holds arguments of theirs."""
    from torchcam._methods import takes
    from torchcam.explain import explain

    shown = [method for method in methods if sys.stderr.isatty() and takes(method, "progress")]
    with library_errors(arguments.target_layer):
        return explain(
            classifier.model,
            image,
            method=methods,
            target_layer=target,
            method_kwargs={**{method: {"progress": True} for method in shown}, **(options or {})},
            class_names=classifier.categories,
            **_asked(arguments, classifier, top_k),
        )


def _asked(arguments: argparse.Namespace, classifier: Classifier, top_k: int | None) -> dict[str, Any]:
    """Return the arguments of `explain` that say what is explained, and how the model gets its input."""
    boxes = getattr(arguments, "box", None)  # which a command may lack
    if boxes:
        box = "all" if "all" in boxes else boxes
        return {"box": box, "threshold": arguments.threshold, "processor": classifier.processor}
    return {
        "class_idx": arguments.class_idx or None,
        "top_k": top_k,
        "texts": list(classifier.texts) or None,
        "against": getattr(arguments, "against", None),
        "transform": classifier.preprocess,
        "processor": classifier.processor,
    }


def _part(key: int | str) -> str:
    """Return a class or a box as a part of a file's name."""
    return key.replace(" ", "") if isinstance(key, str) else f"class{key}"


def _facts(explanation: PredictionExplanation) -> dict[str, Any]:
    """Describe the methods, for other programs."""
    methods = [
        {"method": name, "target_layers": list(result.target_layers)} for name, result in explanation.results.items()
    ]
    return {**methods[0], "methods": methods}


def _title(classifier: Classifier, explanation: PredictionExplanation) -> str:
    layers: dict[str, list[str]] = {}
    for name, result in explanation.results.items():
        layers.setdefault(", ".join(result.target_layers), []).append(name)
    return f"{classifier.name}: " + "; ".join(f"{', '.join(names)} of {of}" for of, names in layers.items())


# The files.


def picture_of(
    arguments: argparse.Namespace, classifier: Classifier, name: str, explanation: PredictionExplanation
) -> Path:
    """Return the file of an image's picture; its name carries the model, the layers, the methods and the classes."""
    if is_picture(arguments.output):
        return Path(arguments.output)
    return result_path(arguments.output, name, _parts(classifier, explanation), ".png")


def _parts(
    classifier: Classifier, explanation: PredictionExplanation, method: str | None = None, class_idx: Any = None
) -> list[list[str]]:
    results = explanation.results if method is None else {method: explanation.results[method]}
    layers = dict.fromkeys(layer for result in results.values() for layer in result.target_layers)
    classes = explanation.cams if class_idx is None else [class_idx]
    return [[classifier.file_name], list(layers), list(results), [_part(index) for index in classes]]


def _write(
    arguments: argparse.Namespace,
    classifier: Classifier,
    source: Source,
    explanation: PredictionExplanation,
    inputs: Collection[Path],
) -> dict[str, Any]:
    """Write the picture of an image, and its maps if they are asked for; print what the model sees, or return it."""
    picture = picture_of(arguments, classifier, source.name, explanation)
    stem = picture.stem if is_picture(arguments.output) else Path(source.name).name
    files = {
        (method, index): result_path(picture.parent, stem, _parts(classifier, explanation, method, index), ".npy")
        for method in explanation.results
        for index in explanation.cams
        if arguments.save_maps
    }
    check_output([picture, *files.values()], inputs, arguments.overwrite)
    title = _title(classifier, explanation)
    with library_errors():
        figure = explanation.plot(colormap=arguments.colormap, alpha=arguments.alpha, dark=False, title=title)
    save_figure(figure, picture)
    for (method, index), file in files.items():
        save_array(explanation.results[method].values(index), file)
    if not arguments.json:
        print_line(f"{source.path} -> {picture}")
        for index in explanation.cams:
            label = explanation.name_of(index) if isinstance(index, str) else classifier.label(index)
            print_line(f"  {explanation.value_of(index):>6}  {printable(label)}")
    return {
        "image": str(source.path),
        "picture": str(picture),
        "classes": [class_entry(explanation, index) for index in explanation.cams],
        "maps": [
            {"method": m, "box" if isinstance(index, str) else "class_idx": index, "file": str(file)}
            for (m, index), file in files.items()
        ],
    }


def _page_of(
    arguments: argparse.Namespace,
    classifier: Classifier,
    sources: Sequence[Source],
    explanation: PredictionExplanation,
) -> Path:
    """Return the file of the page; of several images, its name says in place of classes what was asked for."""
    parts = _parts(classifier, explanation)[:-1]
    if len(sources) == 1:
        return picture_of(arguments, classifier, sources[0].name, explanation).with_suffix(".html")
    top = int(not arguments.class_idx) if arguments.top_k is None else arguments.top_k
    asked = [*([f"top{top}"] if top else []), *(f"class{index}" for index in arguments.class_idx)]
    if arguments.box:
        asked = [f"box{number}" for number in arguments.box]
    return result_path(arguments.output, f"{len(sources)}-images", [*parts, asked], ".html")


def _write_page(arguments: argparse.Namespace, page: Path, found: dict[str, PredictionExplanation], title: str) -> None:
    from torchcam._explanation import Explanations

    with file_errors(page), library_errors():
        Explanations(list(found.values())).to_html(
            page, colormap=arguments.colormap, alpha=arguments.alpha, title=title, names=list(found)
        )


def _conclusion(
    arguments: argparse.Namespace,
    images: Sequence[dict[str, Any]],
    left_out: Sequence[str],
    page: Path | None,
    seconds: float,
) -> str:
    """Return what came out, in a sentence or two."""
    arrays = sum(len(image["maps"]) for image in images)
    made = [count_of(len(images), "picture"), *([count_of(arrays, "array")] if arrays else [])]
    made += ["a page"] if page else []
    folder = Path(images[0]["picture"]).parent if len(images) == 1 else arguments.output
    place = "this folder" if folder == Path() else folder
    parts = [
        f"Explained {count_of(len(images), 'image')} in {seconds:.1f} s: {listed(made)} in {place}.",
        f"{count_of(len(left_out), 'image')} could not be read." if left_out else "",
        f"Open {page} in a browser." if page else "",
    ]
    return " ".join(filter(None, parts))


def class_entry(explanation: PredictionExplanation, index: Any) -> dict[str, Any]:
    """Describe what a model says of a class, or of a box, for other programs."""
    if isinstance(index, str) and explanation.detections is not None:
        found = explanation.detections
        return {"number": found.explained[index], **found.entry(index), "score": explanation.scores[index]}
    probabilities = explanation.probabilities
    return {
        "class_idx": index,
        "class_name": None if explanation.class_names is None else explanation.class_names[index],
        "logit": float(explanation.logits[0, index]),
        "probability": None if probabilities is None else float(probabilities[0, index]),
    }
