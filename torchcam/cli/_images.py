"""The images that a command reads, and the files that it writes."""

from __future__ import annotations

import glob
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam import __version__

from ._messages import UserError, library_errors
from ._models import Classifier, load_model

if TYPE_CHECKING:
    from PIL import Image

    from torchcam._explanation import PredictionExplanation
    from torchcam._recommended import Recommended

SOFTWARE = f"torchcam {__version__}"
"""What is written into pictures, so that a folder's results are not taken for its images."""

PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".pdf", ".svg"}
LONGEST = 150  # characters of a file's name, of which file systems take 255 bytes


# The images.


@dataclass(frozen=True)
class Source:
    """An image to read.

    Attributes:
        path: the file
        name: the beginning of the names of its results, with the folders below the one that was named
        is_named: whether it was named itself, and not found in a folder or by a pattern
    """

    path: Path
    name: str
    is_named: bool = True


def find_sources(given: Sequence[str]) -> list[Source]:
    """Find the images that files, folders and patterns name, each once; pictures made by torchcam are left out."""
    found: dict[str, Source] = {}
    for text in given:
        for source in _sources_of(text):
            found.setdefault(os.path.realpath(source.path) if "\0" not in text else text, source)
    names = Counter(source.name for source in found.values())
    sources = [
        replace(source, name=source.name + source.path.suffix) if names[source.name] > 1 else source
        for source in found.values()
    ]
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise UserError(f"several images are called '{twice[0]}': explain them one by one, with an --output each")
    return sources


def _sources_of(text: str) -> list[Source]:
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        raise UserError(f"IMAGE '{text}' is an address, and nothing is fetched: download it first, and name the file")
    path = Path(text)
    is_folder = os.path.isdir(path)  # noqa: PTH112 - unlike `Path.is_dir`, it takes names of any length
    if not is_folder and (not glob.has_magic(text) or os.path.lexists(path)):
        return [Source(path, path.stem)]
    matches = glob.glob(text, recursive=True)  # noqa: PTH207 - `text` may begin at the root
    found = images_in(path) if is_folder else [Path(match) for match in sorted(matches)]
    files = [file for file in found if _has_image_suffix(file) and file.is_file() and not _is_result(file)]
    if not files:
        raise UserError(f"IMAGE '{text}' {'is a folder that holds' if is_folder else 'matches'} no images")
    names = [file.relative_to(path).with_suffix("").as_posix() if is_folder else file.stem for file in files]
    return [Source(file, name, is_named=False) for file, name in zip(files, names, strict=True)]


def images_in(root: Path) -> list[Path]:
    """List the images in a folder and in those below it, links included."""
    found = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return sorted(path for path in found if _has_image_suffix(path))


def _has_image_suffix(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.suffix.lower() in IMG_EXTENSIONS


def _is_result(path: Path) -> bool:
    """Check whether a picture was made by a command of torchcam."""
    from PIL import Image

    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as picture:
            return str(picture.info.get("Software", "")).startswith("torchcam ")
    except Exception:  # noqa: BLE001 - decoders raise errors of any type; whoever reads the image will say it
        return False


def prepare(arguments: Any, outputs: Sequence[Path] = (), images: Sequence[Path] | None = None) -> Classifier:
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


def recommend(arguments: Any, classifier: Classifier, image: Image.Image) -> Recommended | None:
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


# The results.


def result_path(folder: Path, name: str, parts: Sequence[Sequence[str]], suffix: str) -> Path:
    """Return the file of a result.

    Args:
        folder: where results are written
        name: what the name of the file begins with, after folders within ``folder``
        parts: what it says besides: model, layers, methods, classes
        suffix: the suffix, such as ".png"
    """
    within, _, stem = name.rpartition("/")
    stem = "-".join([stem, *filter(None, map(_joined, parts))])
    if len(stem) > LONGEST:
        stem = f"{stem[:LONGEST]}-{_digest(stem)}"
    return folder / within / f"{stem}{suffix}"


def is_picture(output: Path) -> bool:
    """Check whether ``--output`` is the name of a picture and not of a folder."""
    if output.suffix.lower() not in PICTURES or output.is_dir():
        return False
    if output.suffix.lower() != ".png":
        raise UserError(f"--output '{output}': pictures are written as .png")
    return True


def _joined(names: Sequence[str]) -> str:
    """Return names as a part of a file's name; of many, the first, their number and a digest of all."""
    plain = [re.sub(r"[^\w.+-]+", "_", name).strip("_") for name in names]
    return "+".join(plain) if len(plain) < 4 else f"{plain[0]}+{len(plain) - 1}more-{_digest('+'.join(plain))}"


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"[:6]


def check_folder(folder: Path) -> None:
    """Check that there is a folder, or can be."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"--output '{folder}' cannot be made: '{there}' is not a directory")


def check_output(paths: Sequence[Path], inputs: Collection[Path], overwrite: bool) -> None:
    """Check that results can be written, before any is.

    Args:
        paths: the files
        inputs: files that must stay
        overwrite: whether to replace a file that is there
    """
    for path in paths:
        check_folder(path.parent)
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise UserError(f"'{there[0]}'{more}: pass --overwrite, or another --output")
    taken = {path.resolve() for path in there} & {path.resolve() for path in inputs if path.exists()}
    if taken or any(path.is_dir() for path in there):
        raise UserError(f"'{min(taken, default=there[0] if there else None)}' is in the way: pass another --output")


def save_figure(arguments: Any, explanation: PredictionExplanation, title: str, path: Path) -> None:
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
