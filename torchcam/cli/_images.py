"""What the commands about images share: checks, images that are read, results that are written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, library_errors
from ._models import Classifier, check_model, find_device, load_model
from ._paths import SOFTWARE, check_output

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure
    from PIL import Image
    from torch import nn

    from torchcam._recommended import Recommended

__all__ = [
    "check_layers",
    "file_errors",
    "prepare",
    "read_image",
    "recommend",
    "save_array",
    "save_figure",
    "save_reports",
    "target_layer",
]


def prepare(
    arguments: argparse.Namespace,
    methods: Sequence[type[Any]],
    outputs: Sequence[Path] = (),
    images: Sequence[Path] | None = None,
) -> tuple[Classifier, str | list[str] | None]:
    """Check the options of a command about images, and load its model.

    Args:
        arguments: the parsed arguments
        methods: the methods that they name
        outputs: the files that the command writes
        images: the images that must be there; by default all that the arguments name

    Returns:
        the model on its device, and the target layers as a method takes them
    """
    from torchcam._choice import named

    layers = check_layers(arguments, methods)
    images = arguments.images if images is None else images
    for path in images:
        read_image(path)
    check_model(arguments)
    if outputs:
        check_output(outputs, images, arguments.overwrite)
    if hasattr(arguments, "colormap"):
        _check_colours(arguments.alpha, arguments.colormap)
    device = find_device(arguments.device)
    classifier = load_model(arguments)
    if arguments.class_idx:
        with library_errors():
            arguments.class_idx = named(arguments.class_idx, classifier.categories)
    return classifier, target_layer(classifier.model.to(device), layers)


def recommend(arguments: argparse.Namespace, classifier: Classifier, image: Image.Image) -> Recommended | None:
    """Return what is best for the kind of model, if that is not the usual; None where a method or a layer is named."""
    from torchcam._recommended import recommended

    if arguments.methods is not None or arguments.target_layer:
        return None
    with library_errors():
        found = recommended(classifier.model, classifier.read([image]).tensor)
    return None if found.target_layer is None else found


def check_layers(arguments: argparse.Namespace, methods: Sequence[type[Any]]) -> list[str]:
    """Check that the methods get as many layers as they need, and return the names of the layers, each once."""
    layers = list(dict.fromkeys(arguments.target_layer))
    taken = {method.__name__ for method in methods}
    if "LeGrad" in taken and not layers:
        raise UserError("LeGrad reads the blocks of a vision transformer: name them with --target-layer")
    if "RefineCAM" in taken and len(layers) < 2:
        raise UserError("RefineCAM multiplies the maps of layers: name two or more with --target-layer")
    if "CAM" in taken and len(layers) > 1:
        raise UserError(f"CAM explains one layer, the one before the pooling: --target-layer names {len(layers)}")
    return layers


def target_layer(model: nn.Module, layers: Sequence[str]) -> str | list[str] | None:
    """Return the target layers as methods take them: one name for one layer, None for the default of each method."""
    from torchcam.layers import layer_names

    if not layers:
        return None
    with library_errors():
        found = layer_names(model, list(layers))
    return found if len(found) > 1 else found[0]


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright."""
    from torchcam._inputs import as_rgb, read_picture

    if os.path.isdir(path):  # noqa: PTH112 - unlike `Path.is_dir`, it takes names of any length
        raise UserError(f"IMAGE '{path}' is a directory: name the images in it")
    try:
        image = read_picture(path)
    except FileNotFoundError as error:
        missing = "there is no file" in str(error)
        raise UserError(f"IMAGE '{path}' does not exist" if missing else f"IMAGE {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"IMAGE {error}") from error
    if image.mode == "F":
        raise UserError(f"IMAGE '{path}' has floating-point pixels of unknown range: save it with 8 or 16 bits")
    return as_rgb(image)


def _check_colours(alpha: float, colormap: str | None) -> None:
    from PIL import Image

    from torchcam.utils import overlay_map

    with library_errors():
        overlay_map(Image.new("L", (1, 1)), [[0.0]], colormap, alpha)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a picture completely or not at all."""
    from torchcam._files import atomic_write

    with file_errors(path), atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": SOFTWARE})


def save_array(values: Any, path: Path) -> None:
    """Write an array of numbers completely or not at all."""
    import numpy as np

    from torchcam._files import atomic_write

    with file_errors(path), atomic_write(path) as part, part.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def save_reports(report: Any, paths: Sequence[Path]) -> None:
    """Write a result to files, in the formats that their suffixes name."""
    for path in paths:
        with file_errors(path):
            report.save(path)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
