"""What the commands about images share: checks, images that are read, results that are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, library_errors
from ._models import Classifier, load_model
from ._paths import SOFTWARE, check_output

if TYPE_CHECKING:
    import argparse

    from PIL import Image

    from torchcam._explanation import PredictionExplanation
    from torchcam._recommended import Recommended


def prepare(
    arguments: argparse.Namespace, outputs: Sequence[Path] = (), images: Sequence[Path] | None = None
) -> Classifier:
    """Check the options of a command about images, and load its model.

    Args:
        arguments: the parsed arguments
        outputs: the files that the command writes
        images: the images that must be there; by default all that the arguments name
    """
    from PIL import Image

    from torchcam._choice import named
    from torchcam.utils import overlay_map

    images = arguments.images if images is None else images
    for path in images:
        read_image(path)
    with library_errors():
        overlay_map(Image.new("L", (1, 1)), [[0.0]], arguments.colormap, arguments.alpha)
    classifier = load_model(arguments)
    check_output(outputs, images, arguments.overwrite)
    with library_errors():
        arguments.class_idx = named(arguments.class_idx, classifier.categories)
    return classifier


def recommend(arguments: argparse.Namespace, classifier: Classifier, image: Image.Image) -> Recommended | None:
    """Return what is best for the kind of model, if that is not the usual; None where a method or a layer is named."""
    from torchcam._recommended import recommended

    if arguments.methods is not None or arguments.target_layer:
        return None
    with library_errors():
        found = recommended(classifier.model, classifier.read([image]).tensor)
    return None if found.target_layer is None else found


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright."""
    from torchcam._inputs import as_rgb, read_picture

    try:
        return as_rgb(read_picture(path))
    except (OSError, ValueError) as error:
        raise UserError(f"IMAGE: {error}") from error


def save_figure(arguments: argparse.Namespace, explanation: PredictionExplanation, title: str, path: Path) -> None:
    """Draw an explanation, and write the picture completely or not at all."""
    from torchcam._files import atomic_write

    with library_errors():
        figure = explanation.plot(colormap=arguments.colormap, alpha=arguments.alpha, dark=False, title=title)
    with file_errors(path), atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": SOFTWARE})


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
