r"""Write a classifier and its maps to a file that runs without Python.

Write a classification model and the maps of a method to one file that runs
without Python: it computes the scores, and the map of a class. The suffix says
for what: .onnx (ONNX Runtime), .pt2 (torch.export), .aoti.pt2 (C++, compiled
for this kind of processor), .html (a page that runs the model in a browser).
What the file computes is compared with the maps of the method before it is
written. Needs torch 2.13; .onnx and .html need the extra of a clone:
`pip install -e ".[export]"`.

Examples:
  torchcam export --arch resnet18 --output resnet18.onnx
      scores and Grad-CAM of any class, for batches of any size
  torchcam export --model-factory mine:load --method LayerCAM \
      --target-layer stage3 --dynamic-size --output mine.onnx
      your own model, for images of any size
  torchcam export --arch resnet18 --output page.html --runtime onnxruntime-web
      a page; the folder is the npm package, unpacked
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import _options
from ._images import check_output, file_errors
from ._messages import UserError, library_errors, print_json, print_line
from ._models import RANDOM_WEIGHTS, SEED, load_model

SUFFIXES = (".onnx", ".pt2", ".aoti.pt2", ".html")


def add_options(export: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_model(export)
    maps = export.add_argument_group("the maps")
    _options.add_method(maps)
    _options.add_layers(maps)
    maps.add_argument(
        "--top-class", action="store_true", help="explain the class with the highest score: no class input"
    )
    maps.add_argument("--dynamic-size", action="store_true", help="take images of any size that the model takes")
    result = export.add_argument_group("the result")
    result.add_argument(
        "--output",
        metavar="FILE",
        type=_options.file_with(SUFFIXES),
        required=True,
        help="the file, in the format of its suffix",
    )
    result.add_argument(
        "--runtime", metavar="DIR", type=Path, help="for a page: the folder of the npm package onnxruntime-web"
    )
    result.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    _options.add_json(result)


def run(arguments: Any) -> None:
    """Export the model."""
    import torch

    from torchcam.export import export

    path = arguments.output
    if path.suffix.lower() == ".html" and arguments.runtime is None:
        raise UserError("a page needs --runtime, the folder of the npm package onnxruntime-web")
    method = _options.find_method(arguments.method)
    check_output([path], [], arguments.overwrite)
    classifier = load_model(arguments)
    noise = torch.rand((2, *classifier.blank.shape), generator=torch.Generator().manual_seed(SEED))
    with file_errors(path), library_errors(arguments.target_layer):
        exported = export(
            classifier.model,
            method,
            arguments.target_layer or None,
            example=noise.to(next(classifier.model.parameters(), noise)),
            top_class=arguments.top_class,
            dynamic_size=arguments.dynamic_size,
            transform=classifier.preprocess,
            class_names=classifier.categories,
        )
        exported.save(path, runtime=arguments.runtime)
    if arguments.json:
        print_json({**classifier.facts, "file": str(path), "error": exported.error, "metadata": exported.metadata})
        return
    print_line(f"{classifier.name}: {method.__name__} of {', '.join(exported.metadata['target_layers'])} -> {path}")
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    print_line(f"{path.name} has {size}; its maps differ from those of the method by {exported.error:.0e} at most.")
    if classifier.is_random:
        print(RANDOM_WEIGHTS)
