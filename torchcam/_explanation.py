"""Explanations: the prediction, its maps, and pictures, pages and files of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image
from torch import Tensor

from . import _page
from ._detections import Detections
from ._displays import Pictures
from ._figures import Cell, Column, Row, Sheet
from ._files import atomic_write, free_directory
from ._inputs import as_rgb, read_picture
from ._method_maps import MethodMaps, draw_over, save_maps
from ._names import closest
from ._numbers import to_json
from ._pictures import enlarged, fitted, fitted_size
from ._views import FULL, View, Views
from .layout import Cells
from .methods.core import _CAM
from .utils import ALPHA, on_picture

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

LINES = 8  # for the inputs of a batch that is printed


@dataclass(frozen=True, eq=False, repr=False)
class PredictionExplanation(Pictures):
    """The prediction of a model for one input, and the regions that made it. All tensors are on the CPU.

    A notebook shows it as a picture. `plot`, `overlay`, `save` and `to_html` make figures, images, files and a page.

    Attributes:
        logits: the class scores, (1, classes); (1, 0) if targets were explained and the output has no such scores
        predicted_class_idx: the class with the highest score, None if there are no class scores
        expected_class_idx: the class that was expected, if one was named
        cams: the maps of the first method: class index (or name of a target) to one map (*spatial) in [0, 1] per
            target layer (methods that merge layers: one in all)
        method: the name of the first method's class
        target_layers: the names of its target layers
        model: the name of the model's class, with its module
        input_shape: the shape of the input, (1, C, *spatial)
        versions: the versions of Python, torch and torchcam
        class_names: the names of the classes, if they are known
        method_kwargs: the arguments of the first method, as plain values
        results: the maps of every method, by its name
        image: the picture below the maps, RGB: the model's view, or what was given to show; None where there is none
        probabilities: the probabilities of the classes, (1, classes); None where there are none
        scores: the scores of the targets, by their names
        view: where the model's view lies on ``image``: top, left, bottom and right, as shares of its height and width
        detections: all boxes that a detector found in the picture, if it was asked about them
    """

    logits: Tensor
    predicted_class_idx: int | None
    expected_class_idx: int | None
    cams: Mapping[Any, tuple[Tensor, ...]]
    method: str
    target_layers: tuple[str, ...]
    model: str
    input_shape: tuple[int, ...]
    versions: Mapping[str, str]
    class_names: tuple[str, ...] | None = None
    method_kwargs: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, MethodMaps] = field(default_factory=dict)
    image: Image.Image | None = None
    probabilities: Tensor | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    view: View = FULL
    detections: Detections | None = None
    _try_out: Callable[..., Any] | None = None  # holds on to the input, but not to the model
    _views: Views | None = None  # tells the view on other pictures
    _reports: dict[int | str, Any] = field(default_factory=dict, init=False)  # of trust, by class or target

    def __post_init__(self) -> None:
        if not self.results:
            fused = {key: _CAM.fuse_cams([cam[None] for cam in maps])[0] for key, maps in self.cams.items()}
            only = MethodMaps(self.method, self.target_layers, self.method_kwargs, self.cams, fused)
            object.__setattr__(self, "results", {self.method: only})

    @property
    def _items(self) -> Sequence[PredictionExplanation]:
        return (self,)

    # The prediction.

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(self.results)

    @property
    def maps(self) -> Mapping[str, Mapping[Any, tuple[Tensor, ...]]]:
        """The maps of every method: its name to what `cams` is of the first."""
        return {name: result.cams for name, result in self.results.items()}

    def name_of(self, key: int | str) -> str:
        """Return the name of a class (or of a target, or of the class of a box), with its index."""
        if isinstance(key, str):
            if self.detections is None or key not in self.detections.explained:
                return key
            return f"{self.detections.label(self.detections.explained[key])}, {key}"
        if self.class_names is None:
            return f"class {key}"
        name = self.class_names[key]
        return name if name == str(key) else f"{name} ({key})"

    def value_of(self, key: int | str) -> str:
        """Return the probability of a class, or the score of a box, as text; or else the explained score."""
        if isinstance(key, str):
            if self.detections is not None and key in self.detections.explained:
                return f"{float(self.detections.scores[self.detections.explained[key]]):.1%}"
            return f"score {self.scores[key]:.3g}" if key in self.scores else ""
        if self.probabilities is None:
            return f"score {self.logits[0, key]:.3g}"
        share = float(self.probabilities[0, key])
        return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"

    @property
    def title(self) -> str:
        """The prediction in one line."""
        model = self.model.rpartition(".")[2]
        if self.predicted_class_idx is None:
            return f"{model}: {', '.join(map(self.name_of, self.cams))}"
        title = f"{model} predicts {self.name_of(self.predicted_class_idx)}, {self.value_of(self.predicted_class_idx)}"
        if self.expected_class_idx is not None and self.expected_class_idx != self.predicted_class_idx:
            title += f"; expected was {self.name_of(self.expected_class_idx)}, {self.value_of(self.expected_class_idx)}"
        return title

    def __repr__(self) -> str:
        methods = ", ".join(f"{name} of {', '.join(result.target_layers)}" for name, result in self.results.items())
        return f"<{type(self).__name__}: {self.title}; maps of {len(self.cams)} by {methods or self.method}>"

    def trust(self, class_idx: int | str | None = None, **options: Any) -> Any:
        """Test the first method's map of a class or target, and say in words whether to believe it.

        The methods are those of the explanation, on the same layers; where there is one alone, two or three others are
        added to compare it with.

        Args:
            class_idx: the class (or the name of an explained target) whose map is tested, by default the first one
                explained
            options: further arguments of :func:`torchcam.trust.trust`

        Returns:
            the report, a :class:`torchcam.trust.TrustReport`, for this one prediction

        Raises:
            RuntimeError: if the model is not at hand: it is gone, the explanation was made by hand or comes from a
                pickle, or it is one of a model that takes more than its input tensor
            ValueError: if there is no target of that name
        """
        if self._try_out is None:
            raise RuntimeError(
                "this explanation knows no model (it was made by hand, comes from a pickle, or the model takes more "
                "than one input tensor): call `torchcam.trust.trust(model, input_tensor)`"
            )
        asked = next(iter(self.cams)) if class_idx is None else class_idx
        if isinstance(asked, str) and asked not in self.cams:
            raise ValueError(f"`class_idx` names '{asked}', but explained were {', '.join(map(str, self.cams))}")
        report = self._try_out(asked, **options)
        if "methods" not in options:  # the first method's map is judged
            reasons = list(report[0].reasons)
            self._reports[asked] = {"verdict": report.verdict, "headline": report.headline, "reasons": reasons}
        return report

    # Pictures.

    def overlay(
        self,
        class_idx: int | str | None = None,
        method: str | None = None,
        *,
        image: Any = None,
        alpha: float = ALPHA,
        colormap: str | Colormap | None = None,
        grey: bool = False,
    ) -> Image.Image:
        """Draw one map over the image.

        Args:
            class_idx: which class (or the name of a target), by default the first one explained
            method: the name of the method, by default the first
            image: what to draw over, by default ``image``: the picture that was explained, before or after the
                transform. Where the model saw a part of it, the map is drawn there.
            alpha: the opacity of the image under the strongest values, in [0, 1)
            colormap: a matplotlib colormap, or the name of one such as "jet"; by default one whose steps look equal,
                and a diverging one for signed maps
            grey: whether the image is drawn in grey, so that all colour is the map's

        Raises:
            ValueError: if there is no such map, it is not two-dimensional, or ``alpha`` is out of range
        """
        result = self._result(method)
        key = next(iter(result.cams)) if class_idx is None else class_idx
        if key not in result.cams:
            raise ValueError(f"`class_idx` {key!r} was not explained; there are maps of {list(result.cams)}")
        values = result.values(key)
        base, view = self._picture(values), self.view
        if image is not None:
            base, view = self._on_other(as_rgb(read_picture(image)))
        drawn = draw_over(base, values, colormap, alpha, grey=grey, signed=result.signed, view=view)
        return self._boxed(drawn, key, view)

    def _boxed(self, picture: Image.Image, key: Any = None, view: View | None = None) -> Image.Image:
        """Draw the box behind a target, or all that are explained, over a picture that shows the model's view there."""
        if self.detections is None:
            return picture
        return self.detections.drawn(picture, key, self.view, self.view if view is None else view)

    def _drawable(self) -> bool:
        """Check whether all maps have height and width."""
        return all(cam.ndim == 2 for result in self.results.values() for cam in result.fused.values())

    def _result(self, method: str | None) -> MethodMaps:
        if method is None:
            return next(iter(self.results.values()))
        if method not in self.results:
            raise ValueError(f"`method` {method!r} made no maps here; {closest(str(method), self.results)}")
        return self.results[str(method)]

    def _picture(self, values: NDArray[np.float32]) -> Image.Image:
        """Return the image below a map, or else plain grey."""
        return enlarged(Image.new("RGB", values.shape[::-1], "grey") if self.image is None else self.image)

    def _on_other(self, picture: Image.Image) -> tuple[Image.Image, View]:
        """Return a picture to draw over in place of one's own, and where the model's view lies on it."""
        height, width = self.input_shape[-2:]
        views = self._views or Views((width, height))
        found = views.on(picture.size)
        if found is not None:
            return picture, found
        place = "over all of it" if self.image is None else "over the model's view"
        warnings.warn(views.unknown(picture.size, place), UserWarning, stacklevel=3)
        return (picture, FULL) if self.image is None else (self.image, self.view)

    @property
    def _panels(self) -> int:
        """The number of pictures in a figure."""
        return len(self.cams) * len(self.results) + 1

    def _sheet(self, alpha: float = ALPHA, colormap: str | Colormap | None = None, grey: bool = False) -> Sheet:
        """Draw the image and all maps, no larger than a figure shows them."""
        columns = [Column(name, ", ".join(one.target_layers), one.signed) for name, one in self.results.items()]
        rows = []
        for key in self.cams:
            cells = []
            for result in self.results.values():
                values, signed = result.values(key), result.signed
                base = fitted(self._picture(values), 512)
                drawn = draw_over(base, values, colormap, alpha, grey=grey, signed=signed, view=self.view)
                cells.append(Cell(self._boxed(drawn, key), result.note(key)))
            rows.append(Row(self.name_of(key), self.value_of(key), cells))
        image = None if self.image is None else self._boxed(fitted(enlarged(self.image), 512))
        return Sheet(image, columns, rows)

    def _page_item(self, name: str) -> dict[str, Any]:
        methods = []
        for label, result in self.results.items():
            maps = [_in_place(result.values(key), self.view, self.image) for key in self.cams]
            notes = [result.note(key) for key in self.cams]
            layers = ", ".join(result.target_layers)
            methods.append(_page.method_entry(label, layers, maps, notes, signed=result.signed))
        roles = {self.predicted_class_idx: "predicted", self.expected_class_idx: "expected"}
        if self.predicted_class_idx == self.expected_class_idx:
            roles = {self.predicted_class_idx: "predicted, as expected"}
        classes = []
        for key in self.cams:
            share = None if self.probabilities is None or isinstance(key, str) else float(self.probabilities[0, key])
            tags = [roles[key]] if not isinstance(key, str) and key in roles else []
            names = {"name": self.name_of(key), "value": self.value_of(key)}
            classes.append({**names, "share": share, "tags": tags, "trust": self._reports.get(key)})
        image = self._boxed(self.image if self.image is not None else self._picture(maps[0]))
        return _page.item_entry(name, image, classes, methods)

    def _origin(self) -> list[tuple[str, str]]:
        """Return how the maps were made, as terms and their descriptions."""
        lines = [("model", self.model), ("input", " × ".join(map(str, self.input_shape)))]
        for name, result in self.results.items():
            options = ", ".join(f"{option}={value!r}" for option, value in result.method_kwargs.items())
            lines.append((name, f"{result.method}({options}) of {', '.join(result.target_layers) or 'the input'}"))
        return [*lines, *self.versions.items()]

    # Files.

    def save(
        self,
        directory: str | Path,
        image: Image.Image | None = None,
        alpha: float = ALPHA,
        *,
        colormap: str | Colormap | None = None,
    ) -> Path:
        """Write the explanation into a directory of its own, all of it or nothing.

        The directory holds `image.png` (in mode `F`: `image.tiff`), for each class and layer
        `class-<index>-layer-<number>` as `.npy` (the map), `-heatmap.png` (the map in grey) and `-overlay.png` (the map
        over the image), and `manifest.json`, which says what was done. Targets take the place of classes as
        `target-<number>`. Further methods write the same into a directory each, `method-<number>`.

        Args:
            directory: where to write; made if needed, with its parents
            image: the picture to keep and to draw over, as for `overlay`
            alpha: the opacity of the image under the strongest values, in [0, 1)
            colormap: a matplotlib colormap, or the name of one

        Returns:
            the directory

        Raises:
            FileExistsError: if ``directory`` exists and is not empty
            TypeError: if ``image`` is not a PIL image
            ValueError: if the maps are not two-dimensional, ``alpha`` is out of range, or the image's mode unsupported
        """
        directory = free_directory(directory)
        given = self.image if image is None else image
        if not isinstance(given, Image.Image):
            raise TypeError(f"`image` must be a PIL image, got {type(given).__name__}")
        for result in self.results.values():
            for key in result.cams:
                result.values(key)  # raises where they are no pictures
        picture, view = (given, self.view) if image is None else self._on_other(given)

        with atomic_write(directory) as folder:
            folder.mkdir()
            name_of_picture = "image.tiff" if picture.mode == "F" else "image.png"  # PNG has no floating-point pixels
            picture.save(folder / name_of_picture)

            def draw(result: MethodMaps, key: int | str, values: NDArray[np.float32]) -> Image.Image:
                colours = None if result.signed else colormap
                return self._boxed(
                    draw_over(picture, values, colours, alpha, signed=result.signed, view=view), key, view
                )

            methods = {}
            for number, (name, result) in enumerate(self.results.items()):
                place = f"method-{number}/" if number else ""
                (folder / place).mkdir(exist_ok=True)
                methods[name] = {
                    "method": result.method,
                    "method_kwargs": dict(result.method_kwargs),
                    "target_layers": list(result.target_layers),
                    "signed": result.signed,
                    "classes": {
                        str(key): {
                            **self.entry(key),
                            "artifacts": save_maps(result, key, folder, place, partial(draw, result, key)),
                        }
                        for key in result.cams
                    },
                }
            first = next(iter(methods.values()))
            manifest = {
                "schema_version": 1,
                "prediction": None if self.predicted_class_idx is None else self._reference(self.predicted_class_idx),
                "expected": None if self.expected_class_idx is None else self._reference(self.expected_class_idx),
                "classes": first["classes"],
                "logits": self.logits[0].tolist(),
                "method": self.method,
                "method_kwargs": dict(self.method_kwargs),
                "target_layers": list(self.target_layers),
                "model": self.model,
                "input_shape": list(self.input_shape),
                "versions": dict(self.versions),
                "image": name_of_picture,
                "image_size": list(picture.size),
                "view": list(view),
                "alpha": alpha,
                "methods": methods,
            }
            (folder / "manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")
        return directory

    def entry(self, key: int | str) -> dict[str, Any]:
        """Describe a class or a target as plain values."""
        entry = self._reference(key)
        if isinstance(key, str):
            return {**entry, "score": self.scores.get(key), **(self.detections.entry(key) if self.detections else {})}
        probability = None if self.probabilities is None else self.probabilities[0, key].item()
        return {**entry, "logit": self.logits[0, key].item(), "probability": probability}

    def _reference(self, key: int | str) -> dict[str, Any]:
        if isinstance(key, str):
            return {"target": key}
        return {"class_idx": key, "class_name": None if self.class_names is None else self.class_names[key]}


class Explanations(Pictures, Sequence[PredictionExplanation]):
    """The predictions for the inputs of a batch, with their maps. A notebook shows the first of them as pictures.

    Args:
        items: the explanations
    """

    def __init__(self, items: Sequence[PredictionExplanation]) -> None:
        self._all = tuple(items)

    @property
    def _items(self) -> Sequence[PredictionExplanation]:
        return self._all

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> PredictionExplanation: ...

    @overload
    def __getitem__(self, index: slice) -> Explanations: ...

    def __getitem__(self, index: int | slice) -> PredictionExplanation | Explanations:
        return Explanations(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __repr__(self) -> str:
        lines = [f"  {item!r}," for item in self._items[:LINES]]
        more = [f"  … and {len(self) - LINES} more"] if len(self) > LINES else []
        return "\n".join([f"<{type(self).__name__} of {len(self)} inputs:", *lines, *more, ">"])

    @property
    def title(self) -> str:
        """What this is, in one line."""
        return f"{len(self)} input{'s' if len(self) != 1 else ''}" + (
            f" to {self[0].model.rpartition('.')[2]}" if self._items else ""
        )

    def overlay(
        self, class_idx: int | str | None = None, method: str | None = None, **options: Any
    ) -> list[Image.Image]:
        """Draw one map over each image: see `PredictionExplanation.overlay`."""
        return [item.overlay(class_idx, method, **options) for item in self._items]

    def save(self, directory: str | Path, images: Sequence[Image.Image] | None = None, alpha: float = ALPHA) -> Path:
        """Write each explanation into a directory `input-<number>` of its own: see `PredictionExplanation.save`.

        Args:
            directory: where to write; made if needed, with its parents
            images: the images that were explained, by default what the model sees
            alpha: the opacity of the image under the strongest values, in [0, 1)

        Returns:
            the directory
        """
        directory = free_directory(directory)
        pictures = [None] * len(self) if images is None else list(images)
        if len(pictures) != len(self):
            raise ValueError(f"`images` must hold one image for each of the {len(self)} inputs, got {len(pictures)}")
        digits = len(str(max(len(self) - 1, 0)))
        with atomic_write(directory) as folder:
            folder.mkdir()
            for number, (item, picture) in enumerate(zip(self._items, pictures, strict=True)):
                item.save(folder / f"input-{number:0{digits}}", picture, alpha)
        return directory


def _in_place(values: NDArray[np.float32], view: View, picture: Image.Image | None) -> NDArray[np.float32]:
    """Return a map that covers the whole picture: undefined where the model saw nothing of it."""
    if picture is None or view == FULL:
        return values
    return on_picture(values, Cells.of_grid(values.shape, view), fitted_size(picture.size, 512))
