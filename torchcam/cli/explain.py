r"""Explain images with a classifier.

Explain what a classification model sees in images. Each image gives one
picture: the image as the model sees it (resized and cropped as the weights
want it), and a grid of maps over it, with the methods in columns and the
classes in rows. With --box, it explains what a detector found. The name of a
picture says of what model, layers, methods and classes it is. Images of a
folder that cannot be read, and pictures that torchcam made, are left out.

Examples:
  torchcam explain dog.jpg
      the most probable class of a resnet50, Grad-CAM on its last layer with
      positions
  torchcam explain dog.jpg --arch vit_b_16
      a transformer: HiResCAM with balanced gradients at its first tokens,
      which the leaderboard found best
  torchcam explain photos --output maps --html
      all images in a folder and in those below it, and a page to look into
      their maps
  torchcam explain dog.jpg cat.jpg --top-k 3 --methods GradCAM,LayerCAM
      three classes of each of two images by two methods, in one picture per
      image
  torchcam explain dog.jpg --arch convnext_tiny --method LayerCAM \
      --target-layer features.5,features.7
      the maps of two layers, fused into one
  torchcam explain dog.jpg --timm vit_base_patch16_224.augreg_in21k_ft_in1k \
      --class-idx beagle --save-maps
      a model of timm, a class by its name, and the map as numbers
  torchcam explain dog.jpg --arch resnet18 --weights resnet18-f37072fd.pth \
      --class-idx 207
      weights from a file: for machines without network
  torchcam explain dog.jpg --model-factory mine.models:load
      your own model, which the function `load` of `mine/models.py` returns
  torchcam explain street.jpg --model-factory mine.models:yolo --box 0
      why a detector found its first box; --box all for every box, --hf FOLDER
      for a detector of transformers
  torchcam explain dog.jpg --hf CLIP-FOLDER --texts cat --texts dog
      where the text is that fits best; `--top-k 2` for both
  torchcam explain dog.jpg --arch resnet18 --weights none
      random weights: to try the command, not to learn about the image

what to try first: nothing. Without --methods and --target-layer you get what
the leaderboard found best for the kind of model: GradCAM for convolutions,
HiResCAM with balanced gradients for transformers. LayerCAM gives fine maps in
early layers. ScoreCAM needs no gradients, but one forward pass per channel.
FinerCAM shows what tells a class from those most like it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam._names import listed

from . import _images, _options
from ._messages import UserError, count_of, library_errors, print_json, print_line, print_warning
from ._models import RANDOM_WEIGHTS, Classifier

if TYPE_CHECKING:
    from PIL import Image

    from torchcam._explanation import PredictionExplanation
    from torchcam._method_maps import MethodMaps
    from torchcam._recommended import Recommended

METHOD = "GradCAM"
METHOD_OF_BOXES = "HiResCAM"


def add_options(explain: Any) -> None:
    """Add the options of the command to its parser."""
    explain.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image file, a folder of them, or a pattern as in 'photos/*.jpg'"
    )
    _options.add_model(explain)
    maps = explain.add_argument_group("the maps")
    _options.add_methods(
        maps,
        f"{METHOD}; of boxes {METHOD_OF_BOXES}; for a transformer, without --target-layer, HiResCAM with balanced "
        "gradients",
    )
    _options.add_layers(maps)
    _options.add_classes(maps, "class to explain, by its number or name; several as with --target-layer")
    _options.add_count(
        maps,
        "--top-k",
        "explain the N most probable classes, before those of --class-idx (default: 1, or 0 with --class-idx)",
        lowest=0,
    )
    maps.add_argument(
        "--box",
        metavar="N|all",
        action="extend",
        type=_options.numbers,
        default=[],
        help="of a detector, the box to explain, by its number among those that it finds; several as with "
        "--target-layer. The model is one of --model-factory (of ultralytics or torchvision), or of --hf",
    )
    maps.add_argument(
        "--threshold", metavar="SCORE", type=float, help="least score of a box (default: the detector's own)"
    )
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


def run(arguments: Any) -> None:
    """Explain the images, one after the other."""
    from tqdm import tqdm

    from torchcam._explanation import Explanations

    methods = _options.find_methods(arguments.methods, METHOD_OF_BOXES if arguments.box else METHOD)
    if arguments.threshold is not None and not arguments.box:
        raise UserError("--threshold is the least score of a box: name one with --box, or --box all")
    if arguments.top_k == 0 and not arguments.class_idx:
        raise UserError("--top-k must be at least 1 without --class-idx, got 0")
    sources = _images.find_sources(arguments.images)
    file = [arguments.output] if _images.is_picture(arguments.output) else []
    if file and len(sources) > 1:
        raise UserError(f"--output '{file[0]}' is one file for {len(sources)} images: name a folder")
    if not file:
        _images.check_folder(arguments.output)
    classifier = _images.prepare(arguments, file, [source.path for source in sources if source.is_named])
    inputs, began = [source.path for source in sources], time.perf_counter()
    found: dict[str, PredictionExplanation] = {}
    images: list[dict[str, Any]] = []
    left_out: list[str] = []
    page = best = None
    for source in tqdm(sources, unit="image", disable=len(sources) < 2 or not sys.stderr.isatty(), leave=False):
        try:
            image = _images.read_image(source.path)
        except UserError as error:
            if source.is_named:
                raise
            print_warning(f"{error}: it is left out")
            left_out.append(str(source.path))
            continue
        if not images and not arguments.box:
            best = _images.recommend(arguments, classifier, image)
        explanation = explain_image(arguments, classifier, image, methods, best)
        title = _title(classifier, explanation)
        if not images:
            if arguments.html:
                page = _page_of(arguments, classifier, sources, explanation)
                _images.check_output([page], inputs, arguments.overwrite)
            if not arguments.json:
                print_line(title)
                if best is not None:
                    print_line(f"With balanced gradients, best for {best.kind}; --methods {METHOD} for another view.")
        images.append(_write(arguments, classifier, source, explanation, title, inputs))
        if arguments.html:
            found[source.name] = replace(explanation, _try_out=None)  # which holds the input
    if not images:
        raise UserError(f"none of the {count_of(len(left_out), 'image')} can be read")
    if page is not None:
        with _images.file_errors(page), library_errors():
            Explanations(list(found.values())).to_html(
                page, colormap=arguments.colormap, alpha=arguments.alpha, title=title, names=list(found)
            )
    if arguments.json:
        made_by = [
            {"method": name, "target_layers": list(result.target_layers)}
            for name, result in explanation.results.items()
        ]
        facts = {**classifier.facts, **made_by[0], "methods": made_by}
        print_json({**facts, "images": images, "left_out": left_out, "page": None if page is None else str(page)})
        return
    print_line(f"\n{_conclusion(arguments, images, left_out, page, time.perf_counter() - began)}")
    if classifier.is_random:
        print(RANDOM_WEIGHTS)


def explain_image(
    arguments: Any,
    classifier: Classifier,
    image: Image.Image,
    methods: Sequence[Any],
    best: Recommended | None = None,
) -> PredictionExplanation:
    """Explain one image by some methods, or by what is best for the model."""
    from torchcam._methods import takes
    from torchcam.explain import explain

    given: dict[Any, Any] = {}
    target: Any = arguments.target_layer or None
    if best is not None:
        methods, target, given = [best.method], best.target_layer, {best.method: best.method_kwargs}
    elif sys.stderr.isatty():
        given = {method: {"progress": True} for method in methods if takes(method, "progress")}
    with library_errors(arguments.target_layer):
        return explain(
            classifier.model,
            image,
            method=methods,
            target_layer=target,
            method_kwargs=given,
            class_idx=arguments.class_idx or None,
            top_k=arguments.top_k or None,
            texts=arguments.texts or None,
            against=arguments.against,
            box="all" if "all" in arguments.box else arguments.box or None,
            threshold=arguments.threshold,
            transform=None if arguments.box else classifier.preprocess,
            processor=classifier.processor,
            class_names=classifier.categories,
        )


def _title(classifier: Classifier, explanation: PredictionExplanation) -> str:
    layers: dict[str, list[str]] = {}
    for name, result in explanation.results.items():
        layers.setdefault(", ".join(result.target_layers), []).append(name)
    return f"{classifier.name}: " + "; ".join(f"{', '.join(names)} of {of}" for of, names in layers.items())


# The files.


def picture_of(arguments: Any, classifier: Classifier, name: str, explanation: PredictionExplanation) -> Path:
    """Return the file of an image's picture; its name carries the model, the layers, the methods and the classes."""
    if _images.is_picture(arguments.output):
        return Path(arguments.output)
    classes = [_part(key) for key in explanation.cams]
    return _images.result_path(arguments.output, name, [*_made_by(classifier, explanation.results), classes], ".png")


def _made_by(classifier: Classifier, results: Mapping[str, MethodMaps]) -> list[list[str]]:
    """Return what the name of a file says of how maps were made: the model, the layers, the methods."""
    layers = dict.fromkeys(layer for result in results.values() for layer in result.target_layers)
    return [[classifier.file_name], list(layers), list(results)]


def _part(key: int | str) -> str:
    """Return a class or a box as a part of a file's name."""
    return key.replace(" ", "") if isinstance(key, str) else f"class{key}"


def _write(
    arguments: Any,
    classifier: Classifier,
    source: _images.Source,
    explanation: PredictionExplanation,
    title: str,
    inputs: Collection[Path],
) -> dict[str, Any]:
    """Write the picture of an image, and its maps if they are asked for; print what the model sees, or return it."""
    picture = picture_of(arguments, classifier, source.name, explanation)
    stem = picture.stem if _images.is_picture(arguments.output) else Path(source.name).name
    files = {
        (name, key): _images.result_path(
            picture.parent, stem, [*_made_by(classifier, {name: result}), [_part(key)]], ".npy"
        )
        for name, result in explanation.results.items()
        for key in explanation.cams
        if arguments.save_maps
    }
    _images.check_output([picture, *files.values()], inputs, arguments.overwrite)
    _images.save_figure(arguments, explanation, title, picture)
    for (name, key), file in files.items():
        _images.save_array(explanation.results[name].values(key), file)
    if not arguments.json:
        print_line(f"{source.path} -> {picture}")
        for key in explanation.cams:
            print_line(f"  {explanation.value_of(key):>6}  {explanation.name_of(key)}")
    return {
        "image": str(source.path),
        "picture": str(picture),
        "classes": [explanation.entry(key) for key in explanation.cams],
        "maps": [
            {"method": name, "box" if isinstance(key, str) else "class_idx": key, "file": str(file)}
            for (name, key), file in files.items()
        ],
    }


def _page_of(
    arguments: Any,
    classifier: Classifier,
    sources: Sequence[_images.Source],
    explanation: PredictionExplanation,
) -> Path:
    """Return the file of the page; of several images, its name says in place of classes what was asked for."""
    if len(sources) == 1:
        return picture_of(arguments, classifier, sources[0].name, explanation).with_suffix(".html")
    top = int(not arguments.class_idx) if arguments.top_k is None else arguments.top_k
    asked = [*([f"top{top}"] if top else []), *map(_part, arguments.class_idx)]
    if arguments.box:
        asked = [f"box{number}" for number in arguments.box]
    parts = [*_made_by(classifier, explanation.results), asked]
    return _images.result_path(arguments.output, f"{len(sources)}-images", parts, ".html")


def _conclusion(
    arguments: Any,
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
