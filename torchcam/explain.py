"""One prediction, explained: the model's answer, the maps behind it, and what is needed to make them again."""

from __future__ import annotations

import inspect
import json
import math
import operator
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam import __version__
from torchcam._passes import untouched
from torchcam._tensors import to_float
from torchcam.layers import TargetLayer
from torchcam.methods import GradCAM
from torchcam.methods._replay import positive_integer
from torchcam.methods.core import plain_tensors
from torchcam.targets import read_logits
from torchcam.utils import overlay_mask

__all__ = ["PredictionExplanation", "explain", "explain_classes", "written_whole"]


@dataclass(frozen=True, eq=False)
class PredictionExplanation:
    """What a model said of one input, and which regions made it say so. All tensors are on the CPU.

    Attributes:
        logits: the class scores, (1, classes)
        predicted_class_idx: the class with the highest score
        expected_class_idx: the class that was expected, if one was named
        cams: the maps of the predicted class, and of the expected one: class index to one map (*spatial) in [0, 1] per
            target layer (methods that merge layers: one in all)
        method: the name of the method's class
        target_layers: the names of the target layers
        model: the name of the model's class, with its module
        input_shape: the shape of the input, (1, C, *spatial)
        versions: the versions of Python, torch and torchcam
        class_names: the names of the classes, if they were given
        method_kwargs: the arguments of the method, as plain values
    """

    logits: Tensor
    predicted_class_idx: int
    expected_class_idx: int | None
    cams: Mapping[int, tuple[Tensor, ...]]
    method: str
    target_layers: tuple[str, ...]
    model: str
    input_shape: tuple[int, ...]
    versions: Mapping[str, str]
    class_names: tuple[str, ...] | None = None
    method_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def save(self, directory: str | Path, image: Image.Image, alpha: float = 0.5) -> Path:
        """Write the explanation into a directory of its own, all of it or nothing.

        The directory holds `image.png` (in mode `F`: `image.tiff`), for each class and layer
        `class-<index>-layer-<number>` as `.npy` (the map), `-heatmap.png` (the map in grey) and `-overlay.png` (the map
        over the image), and `manifest.json`, which says what was done.

        Args:
            directory: where to write; made if needed, with its parents
            image: the image that was explained, cut as it was for the model: maps are stretched to its full size
            alpha: the opacity of the image in the overlays, in [0, 1)

        Returns:
            the directory

        Raises:
            FileExistsError: if ``directory`` exists and is not empty
            TypeError: if ``image`` is not a PIL image
            ValueError: if the maps are not two-dimensional, ``alpha`` is out of range, or the image's mode unsupported
        """
        directory = Path(directory)
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise FileExistsError(
                f"`directory` '{directory}' exists and is not an empty directory: name another one, or remove it first"
            )
        if not isinstance(image, Image.Image):
            raise TypeError(f"`image` must be a PIL image, got {type(image).__name__}")
        shapes = {tuple(cam.shape) for maps in self.cams.values() for cam in maps}
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(
                f"only maps (height, width) can be drawn over an image, these have shapes {sorted(shapes)}"
            )

        with written_whole(directory) as folder:
            folder.mkdir()
            picture = "image.tiff" if image.mode == "F" else "image.png"  # PNG has no floating-point pixels
            image.save(folder / picture)
            classes = {str(index): self._save_class(folder, index, image, alpha) for index in self.cams}
            manifest = {
                "schema_version": 1,
                "prediction": self._reference(self.predicted_class_idx),
                "expected": None if self.expected_class_idx is None else self._reference(self.expected_class_idx),
                "classes": classes,
                "logits": [_json_number(logit) for logit in self.logits[0].tolist()],
                "method": self.method,
                "method_kwargs": dict(self.method_kwargs),
                "target_layers": list(self.target_layers),
                "model": self.model,
                "input_shape": list(self.input_shape),
                "versions": dict(self.versions),
                "image": picture,
                "image_size": list(image.size),
                "alpha": alpha,
            }
            text = json.dumps(manifest, indent=2, allow_nan=False, ensure_ascii=False)
            (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
        return directory

    def _save_class(self, folder: Path, index: int, image: Image.Image, alpha: float) -> dict[str, Any]:
        """Write one class's maps, and give its entry for the manifest."""
        maps = self.cams[index]
        layers = (
            [[name] for name in self.target_layers] if len(maps) == len(self.target_layers) else [self.target_layers]
        )
        artifacts = []
        for number, (names, cam) in enumerate(zip(layers, maps, strict=True)):
            stem = f"class-{index}-layer-{number}"
            values = cam.numpy().astype(np.float32)
            grey = (255 * np.nan_to_num(values)).round().astype(np.uint8)
            np.save(folder / f"{stem}.npy", cam.numpy(), allow_pickle=False)
            Image.fromarray(grey).save(folder / f"{stem}-heatmap.png")
            overlay_mask(image, Image.fromarray(values), alpha=alpha).save(folder / f"{stem}-overlay.png")
            artifacts.append(
                {
                    "target_layers": list(names),
                    "map": f"{stem}.npy",
                    "heatmap": f"{stem}-heatmap.png",
                    "overlay": f"{stem}-overlay.png",
                }
            )
        logits = self.logits[0].double()
        return {
            **self._reference(index),
            "logit": _json_number(logits[index].item()),
            "probability": _json_number(logits.softmax(0)[index].item()),
            "artifacts": artifacts,
        }

    def _reference(self, index: int) -> dict[str, Any]:
        return {"class_idx": index, "class_name": None if self.class_names is None else self.class_names[index]}


def explain(
    model: nn.Module,
    input_tensor: Tensor,
    *,
    expected_class_idx: int | None = None,
    class_names: Sequence[str] | None = None,
    method: type[Any] = GradCAM,
    target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
    method_kwargs: Mapping[str, Any] | None = None,
    top_k: int = 1,
) -> PredictionExplanation:
    """Explain what a classifier predicts for one input.

    The model runs in evaluation mode and without gradients below the target layer, and is left as it was. All classes
    share one forward pass; the method adds its own cost for each, and the search for a default layer one pass.

    Example:
        >>> from torchcam.demo import CLASS_NAMES, load_model, sample_images
        >>> from torchcam.explain import explain
        >>> sample = sample_images()[0]
        >>> result = explain(load_model(), sample.to_tensor(), class_names=CLASS_NAMES, target_layer="layer4")
        >>> folder = result.save("explanation", sample.image)  # doctest: +SKIP

    Args:
        model: the classifier
        input_tensor: one input as the model takes it, (1, C, *spatial)
        expected_class_idx: a class to explain beside the predicted one, say, the true one
        class_names: the names of all classes, in the order of the scores
        method: the class of the method
        target_layer: the layer(s) to look at, as the method takes them
        method_kwargs: further arguments of the method
        top_k: how many classes with the highest scores are explained, the predicted one first

    Returns:
        the scores, the maps and how they were made

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``input_tensor`` is not one sample, a class does not exist, there are fewer than ``top_k``,
            ``class_names`` has the wrong length, the scores are not (1, classes) or not finite, or the method cannot
            handle the model
    """
    positive_integer("top_k", top_k)
    expected = _as_index(expected_class_idx)
    names = _as_class_names(class_names)

    def choose(logits: Tensor) -> list[int]:
        num_classes = logits.shape[1]
        if names is not None and len(names) != num_classes:
            raise ValueError(
                f"`class_names` has {len(names)} names, but the model gives scores of {num_classes} classes"
            )
        if expected is not None and not 0 <= expected < num_classes:
            raise ValueError(
                f"`expected_class_idx` must lie between 0 and {num_classes - 1} for a model with {num_classes} "
                f"classes, got {expected}"
            )
        if top_k > num_classes:
            raise ValueError(f"`top_k` must lie between 1 and the {num_classes} classes of the model, got {top_k}")
        highest: list[int] = logits[0].topk(top_k).indices.tolist()
        return highest if expected is None else [*highest, expected]

    logits, cams, extractor = explain_classes(
        model, input_tensor, choose, method=method, target_layer=target_layer, method_kwargs=method_kwargs
    )
    return PredictionExplanation(
        logits=logits.cpu(),
        predicted_class_idx=next(iter(cams)),
        expected_class_idx=expected,
        cams=MappingProxyType({index: tuple(cam[0].cpu() for cam in maps) for index, maps in cams.items()}),
        method=method.__name__,
        target_layers=tuple(extractor.target_names),
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        input_shape=tuple(input_tensor.shape),
        versions=MappingProxyType(
            {"python": platform.python_version(), "torch": str(torch.__version__), "torchcam": __version__}
        ),
        class_names=names,
        method_kwargs=MappingProxyType({name: _plain(value) for name, value in (method_kwargs or {}).items()}),
    )


def explain_classes(
    model: nn.Module,
    input_tensor: Tensor,
    choose: Callable[[Tensor], Iterable[int]],
    *,
    method: type[Any] = GradCAM,
    target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
    method_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[int, list[Tensor]], Any]:
    """Run a classifier once on one input, and explain the classes that are chosen by its scores.

    Args:
        model: the classifier, left as it was
        input_tensor: one input as the model takes it, (1, C, *spatial)
        choose: function from the scores (1, classes) to the classes to explain
        method: the class of the method
        target_layer: the layer(s) to look at, as the method takes them
        method_kwargs: further arguments of the method

    Returns:
        the scores (1, classes); each class's maps as the method returns them, (1, *spatial); and the extractor that
        made them, which is off the model again

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``input_tensor`` is not one sample, or the scores are not (1, classes) or not finite
    """
    options = dict(method_kwargs or {})
    if not (isinstance(method, type) and hasattr(method, "fuse_cams") and _takes(method.__call__, "class_idx")):
        raise TypeError(f"`method` must be a CAM class such as GradCAM, got {method!r}")
    if "target_layer" in options:
        raise ValueError("`method_kwargs` holds 'target_layer': pass `target_layer` itself")
    if not isinstance(input_tensor, Tensor):
        raise TypeError(f"`input_tensor` must be a tensor, got {type(input_tensor).__name__}")
    if input_tensor.ndim < 3 or len(input_tensor) != 1:
        raise ValueError(
            f"`input_tensor` must be one sample with its batch dimension, (1, C, *spatial), got shape "
            f"{tuple(input_tensor.shape)}"
        )
    if _takes(method, "input_shape"):
        options.setdefault("input_shape", tuple(input_tensor.shape[1:]))
    with plain_tensors(), method(model, target_layer=target_layer, **options) as extractor:
        watching = getattr(extractor, "base_cam", extractor)
        with untouched(model, recorder=watching):
            output = model(input_tensor)
            logits = to_float(read_logits(output).detach()).clone()
            if logits.ndim != 2 or len(logits) != 1:
                raise ValueError(
                    f"the model must give class scores of shape (1, classes), got {tuple(logits.shape)}; for other "
                    "outputs call the method itself with `targets`"
                )
            if not logits.max().isfinite():
                raise ValueError("the model's scores are NaN or infinite: there is no class to explain")
            again = {"retain_graph": True} if getattr(watching, "_uses_gradients", False) else {}
            cams = {index: extractor(index, output, **again) for index in dict.fromkeys(choose(logits))}
    return logits, cams, extractor


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary neighbour of ``path`` to write a file or directory to, moved to its place at the end.

    If the block raises, nothing of it stays. Missing parents are made.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if path.is_dir():  # an empty one: not every system lets a directory replace it
            path.rmdir()
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _as_index(expected_class_idx: Any) -> int | None:
    if expected_class_idx is None:
        return None
    if isinstance(expected_class_idx, bool):
        raise TypeError(f"`expected_class_idx` must be an integer, got the boolean {expected_class_idx!r}")
    try:
        return operator.index(expected_class_idx)
    except TypeError:
        raise TypeError(
            f"`expected_class_idx` must be an integer, got {expected_class_idx!r} of type "
            f"{type(expected_class_idx).__name__}"
        ) from None


def _as_class_names(class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError("`class_names` must be a sequence of strings, one per class")
    return tuple(class_names)


def _plain(value: Any) -> Any:
    """Give a value that JSON can hold, and that holds on to nothing: for most objects what they print."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _json_number(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.__name__ if isinstance(value, type) else repr(value)


def _json_number(number: float) -> float | None:
    """Give a number as JSON can hold it, which knows neither NaN nor infinity."""
    return number if math.isfinite(number) else None
