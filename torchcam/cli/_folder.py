"""A folder of images as a data set, and the classes of its subfolders."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._images import images_in, read_image
from ._messages import UserError, one_line
from ._models import Classifier


@dataclass(frozen=True)
class Folder:
    """The images of a folder: inputs of a model, with their classes if these are known.

    Attributes:
        classifier: the model that they are inputs of
        root: the folder
        files: the images
        classes: the class of each subfolder; empty if the classes of the images are not known
        how: how the classes were found
    """

    classifier: Classifier
    root: Path
    files: Sequence[Path]
    classes: Mapping[str, int]
    how: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from torchcam._inputs import input_channels, transformed

        path = self.files[index]
        channels = input_channels(self.classifier.model)
        pixels = transformed(self.classifier.preprocess, channels, read_image(path))
        return (pixels, self.classes[_subfolder(self.root, path)]) if self.classes else pixels

    @property
    def facts(self) -> dict[str, Any]:
        """The identity of the folder, for the record of the evaluation."""
        named = "\n".join(path.relative_to(self.root).as_posix() for path in self.files)
        return {
            "model": self.classifier.name,
            "folder": str(self.root.resolve()),
            "files": f"{len(self)}, {zlib.crc32(named.encode()):08x}",
            "classes": dict(self.classes),
        }


def read_folder(arguments: Any, classifier: Classifier) -> Folder:
    """List the images of a folder, and find their classes."""
    root: Path = arguments.data
    files = images_in(root)
    if arguments.class_source == "predicted":
        if not files:
            raise UserError(f"DIR '{root}' holds no images")
        return Folder(classifier, root, files, {}, "what the model predicts is explained")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise UserError(
            f"DIR '{root}' has no subfolder for each class: pass --class-source predicted to explain what the model "
            "predicts"
        )
    if arguments.class_map is None:
        classes, how = match_classes(folders, classifier)
    else:
        classes, how = _read_class_map(arguments.class_map, folders), f"classes as in {arguments.class_map}"
    files = [path for path in files if path.parent != root]
    empty = set(folders) - {_subfolder(root, path) for path in files}
    if empty:
        raise UserError(f"DIR '{root}': the subfolder '{min(empty)}' holds no images")
    return Folder(classifier, root, files, classes, how)


def _subfolder(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0]


def match_classes(folders: Sequence[str], classifier: Classifier) -> tuple[dict[str, int], str]:
    """Find the class of each folder by its name.

    Returns:
        the number of each folder's class, and how they were found
    """
    categories = classifier.categories
    count = _num_outputs(classifier) if categories is None else len(categories)
    by_name: dict[str, list[int]] = {}
    for index, category in enumerate(categories or ()):
        by_name.setdefault(_plain(category), []).append(index)
    found = {name: by_name.get(_plain(name), []) for name in folders}
    wrong = next((name for name, indices in found.items() if len(indices) != 1), None)
    if wrong is None:
        return {name: indices[0] for name, indices in found.items()}, "classes by the folders' names"
    if all(re.fullmatch(r"\d+", name) and int(name) < count for name in folders):
        return {name: int(name) for name in folders}, "classes by the folders' numbers"
    in_order = {name: index for index, name in enumerate(folders)}
    if len(folders) == count and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return in_order, "classes in the order of the folders' WordNet names"
    if len(folders) == count and categories is None:
        return in_order, "classes in the order of the folders' names"
    why = "is the name of several" if found[wrong] else "is not the name of one"
    known = "" if categories else ", whose names are not known"
    raise UserError(
        f"the folder '{wrong}' {why} of the {count} classes of {classifier.name}{known}: pass --class-map FILE with "
        'the number of each folder\'s class, as in {"dog": 207}, or --class-source predicted to explain what the model '
        "predicts"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _num_outputs(classifier: Classifier) -> int:
    import torch

    from torchcam._replica import replicated
    from torchcam.targets import read_logits

    with replicated(classifier.model) as replica, torch.inference_mode():
        return read_logits(replica(classifier.blank.unsqueeze(0))).shape[1]


def _read_class_map(path: Path, folders: Sequence[str]) -> dict[str, int]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--class-map '{path}' cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(type(index) is int and index >= 0 for index in found.values()):
        raise UserError(f"--class-map '{path}' must hold the numbers of classes by folder, as in {{\"dog\": 207}}")
    missing = next((name for name in folders if name not in found), None)
    if missing is not None:
        raise UserError(f"--class-map '{path}' does not name the class of the folder '{missing}'")
    return {name: found[name] for name in folders}
