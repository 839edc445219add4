"""The options that several commands have, and the checks that need no model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _completion
from ._messages import UserError, library_errors

ARCH = "resnet50"
# What options are for commands that do not have them.
DEFAULTS: dict[str, Any] = {
    "weights": None,
    "device": "cpu",
    "top_k": None,
    "texts": [],
    "against": None,
    "box": [],
    "threshold": None,
    "overwrite": False,
    "alpha": 0.25,
    "colormap": None,
}
FACTORY_HELP = """\
your own model in place of --arch: a function that is called without arguments and returns the model, or a tuple of the
model, the transform that makes an input (C, H, W) of a PIL image (by default: ImageNet's resize, crop and
normalisation), and the list of its class names; it is looked up in the current directory, too"""


# The images and the model.


def add_images(parser: Any, count: str | int = "+") -> None:
    """Add the argument that names images."""
    parser.add_argument("images", metavar="IMAGE", nargs=count, type=Path, help="an image file")


def add_model(parser: Any, *, weights: bool = True, default: str = ARCH) -> None:
    """Add the options that name a model."""
    model = parser.add_argument_group("the model")
    arch = model.add_argument("--arch", help=f"a classification model of torchvision (default: {default})")
    arch.completer = _completion.architectures
    timm = model.add_argument("--timm", metavar="NAME", help="a classification model of timm in place of --arch")
    timm.completer = _completion.timm_models
    model.add_argument(
        "--hf",
        metavar="FOLDER",
        help="a model of transformers in place of --arch: a folder, or a name on the hub",
    )
    model.add_argument("--model-factory", metavar="PACKAGE.MODULE:FUNCTION", help=FACTORY_HELP)
    if weights:
        model.add_argument(
            "--weights",
            metavar="DEFAULT|none|PATH",
            help="DEFAULT or another name of torchvision's weights for the model, downloaded once; none for random "
            "weights; or a file with its state dict (default: DEFAULT; with --model-factory: what the function loads)",
        )
        model.add_argument(
            "--device", default="cpu", help="where it runs: cpu, cuda, cuda:1, mps (default: %(default)s)"
        )


# The maps.


def names(text: str) -> list[str]:
    """Split names at commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_layers(group: Any) -> None:
    """Add the option that names target layers."""
    layer = group.add_argument(
        "--target-layer",
        metavar="NAME",
        action="extend",
        type=names,
        default=[],
        help="layer to look at, as in `model.named_modules()`; several, separated by commas or by repeating the "
        "option, are fused (default: the last one whose output still has positions)",
    )
    layer.completer = _completion.layers


def add_method(group: Any) -> None:
    """Add the option that names one method."""
    method = group.add_argument(
        "--method", default="GradCAM", help="a method of torchcam.methods, in any case (default: %(default)s)"
    )
    method.completer = _completion.method_names


def add_methods(group: Any, default: str, what: str = "methods of torchcam.methods") -> None:
    """Add the option that names several methods."""
    several = group.add_argument(
        "--methods",
        "--method",
        metavar="NAMES",
        action="extend",
        type=names,
        help=f"{what}, separated by commas (default: {default})",
    )
    several.completer = _completion.method_names


def find_methods(given: Sequence[str] | None, default: str) -> list[type[Any]]:
    """Find the methods that `--methods` names, each once."""
    if given is not None and not given:
        raise UserError(f"--methods names none; try {default}")
    return list(dict.fromkeys(find_method(name, "--methods") for name in given or names(default)))


def find_method(name: str, option: str = "--method") -> type[Any]:
    """Find a method by its name."""
    from torchcam import _methods

    with library_errors():
        return _methods.find_method(name, option)


def numbers(text: str) -> list[int | str]:
    """Split numbers and names at commas."""
    found = [_number(part) for part in names(text)]
    if not found:
        raise argparse.ArgumentTypeError(f"names none, got '{text}'")
    return found


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def add_classes(group: Any, what: str) -> None:
    """Add the option that names classes."""
    group.add_argument("--class-idx", metavar="CLASS", action="extend", type=numbers, default=[], help=what)


def add_class(group: Any, what: str) -> None:
    """Add the option that names one class; commas are a part of its name."""
    group.add_argument(
        "--class-idx",
        metavar="CLASS",
        type=lambda text: [_number(text)],
        default=[],
        help=f"{what} (default: the most probable)",
    )


def add_count(group: Any, option: str, what: str, *, lowest: int = 1, default: int | None = None) -> None:
    """Add an option that counts something."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid int value: '{text}'") from None
        if value < lowest:
            raise UserError(f"{option} must be at least {lowest}, got {value}")
        return value

    group.add_argument(option, metavar="N", type=read, default=default, help=what)


# The result.


def add_json(parser: Any) -> None:
    """Add the option that prints the result for other programs."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def add_picture(parser: Any, what: str = "IMAGE-MODEL-LAYER-METHOD-CLASS.png") -> None:
    """Add the options of commands that write pictures, named as ``what`` says, into a folder."""
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        default=Path(),
        help=f"the folder for {what}, or, of one image, the file (.png) (default: here)",
    )
    _add_overwrite_and_json(parser)


def add_reports(parser: Any, what: str, suffixes: Sequence[str]) -> None:
    """Add the options of commands that can write their result to files, in the formats of ``suffixes``."""
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=file_with(suffixes),
        action="append",
        default=[],
        help=f"write {what} as {', '.join(suffixes[:-1])} or {suffixes[-1]} there, too; may be repeated",
    )
    _add_overwrite_and_json(parser)


def file_with(suffixes: Sequence[str]) -> Callable[[str], Path]:
    """Return the type of an `--output` whose suffix is one of some."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise UserError(f"--output '{path}' must end in {', '.join(suffixes)}")
        return path

    return read


def _add_overwrite_and_json(parser: Any) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_json(parser)


def add_colours(parser: Any) -> None:
    """Add the options of pictures."""
    parser.add_argument(
        "--alpha",
        type=float,
        default=DEFAULTS["alpha"],
        help="opacity of the image under the strongest values of a map, in [0, 1) (default: %(default)s)",
    )
    parser.add_argument("--colormap", help="a colormap of matplotlib (default: viridis; coolwarm for signed maps)")
