r"""Explain an image by several methods.

Explain one image by several methods, all on the same class and layers, in one
picture with one scale of colours. The table shows how similar each map is to
the others: the mean rank correlation with them, from -1 to 1. RandomCAM does
not depend on the class: a method whose maps look like those of RandomCAM is no
help.

Examples:
  torchcam compare dog.jpg
      seven methods on the most probable class of a resnet50
  torchcam compare dog.jpg --arch convnext_tiny --target-layer features.5 \
      --methods GradCAM,LayerCAM,Ablation-CAM
      three methods, on a layer with more positions
  torchcam compare dog.jpg --class-idx 207 --json
      the numbers for another program, beside the picture
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import _options
from ._images import check_output, is_picture, prepare, read_image, save_figure
from ._messages import BEST, print_json, print_line, print_table
from ._models import RANDOM_WEIGHTS
from .explain import explain_image, picture_of

if TYPE_CHECKING:
    from torchcam._explanation import PredictionExplanation

METHODS = "GradCAM,GradCAMpp,XGradCAM,HiResCAM,LayerCAM,EigenCAM,RandomCAM"


def add_options(compare: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_images(compare, 1)
    _options.add_model(compare)
    maps = compare.add_argument_group("the maps")
    _options.add_methods(maps, METHODS)
    _options.add_layers(maps)
    _options.add_class(maps, "class to explain, by its number or name")
    result = compare.add_argument_group("the result")
    _options.add_picture(result)
    _options.add_colours(result)


def run(arguments: Any) -> None:
    """Explain the image by each method, draw the maps, and print how similar they are."""
    methods = _options.find_methods(arguments.methods, METHODS)
    (source,) = arguments.images
    file = [arguments.output] if is_picture(arguments.output) else []
    classifier = prepare(arguments, file)
    explanation = explain_image(arguments, classifier, read_image(source), methods)
    path = picture_of(arguments, classifier, source.stem, explanation)
    check_output([path], [source], arguments.overwrite)
    (index,) = explanation.cams
    title = f"{classifier.name}: evidence for {explanation.name_of(index)}, {explanation.value_of(index)}"
    save_figure(arguments, explanation, title, path)
    entries = _similarities(explanation, index)
    if arguments.json:
        about = {"image": str(source), "picture": str(path), **classifier.facts, **explanation.entry(index)}
        print_json({**about, "methods": entries})
        return

    from rich.text import Text

    from torchcam._tables import make_table

    print_line(f"{title}\n")
    known = {entry["method"]: entry["likeness"] for entry in entries if not math.isnan(entry["likeness"])}
    best = max(known.values(), default=math.nan)
    rows = []
    for name, layers, likeness in ((one["method"], one["target_layers"], one["likeness"]) for one in entries):
        cell = Text(f"{likeness:.2f}" if name in known else "", BEST if likeness == best else "")
        rows.append((f"  {name}", cell, ", ".join(layers)))
    print_table(make_table(("  method", "like the others", "layers"), rows, right=[1]))
    print_line(f"\n{source} -> {path}")
    if len(known) > 2:
        most, least = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
        print_line(f"{most} is most like the others ({known[most]:.2f}), {least} least ({known[least]:.2f}).")
    elif known:
        print_line(f"The two maps agree to {best:.2f}.")
    if classifier.is_random:
        print(RANDOM_WEIGHTS)


def _similarities(explanation: PredictionExplanation, index: int) -> list[dict[str, Any]]:
    """Return the rank correlations of each method's map with the others, and their mean."""
    import torch

    from torchcam._tensors import resize
    from torchcam.metrics._statistics import spearman

    results = explanation.results
    shape = explanation.input_shape[2:]
    maps = torch.stack([resize(result.fused[index][None, None], shape)[0, 0] for result in results.values()])
    count = len(maps)
    table = spearman(maps.repeat_interleave(count, 0), maps.repeat(count, 1, 1)).reshape(count, count)
    means = table.masked_fill(torch.eye(count, dtype=torch.bool), torch.nan).nanmean(1)
    return [
        {
            "method": name,
            "target_layers": list(result.target_layers),
            "likeness": mean,
            "correlations": dict(zip(results, row, strict=True)),
        }
        for (name, result), mean, row in zip(results.items(), means.tolist(), table.tolist(), strict=True)
    ]
