"""Class activation maps of a few fixed images through a training run."""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from torchcam import _monitor_checks as checks
from torchcam._checks import callable_object, integer, one_of, positive_integer
from torchcam._chunks import run_chunks
from torchcam._files import append_lines, atomic_write
from torchcam._methods import find_method
from torchcam._passes import model_device, to_model
from torchcam._recipes import Recipe, extractors_on
from torchcam._replica import random_states_kept, replicated
from torchcam._tables import as_csv
from torchcam._tensors import is_finite, min_max, over_positions, resize, to_float
from torchcam._timeline import ProbeResult, Timeline
from torchcam.layers import TargetLayer, layer_names
from torchcam.methods import GradCAM
from torchcam.targets import ClassIndex, OutputTarget, Selector, read_logits

__all__ = ["CAMMonitor", "ProbeResult", "check_options"]

Moment = ProbeResult
"""The name of :class:`ProbeResult` in the first edition."""

_HISTORY = 10_000  # results whose means are kept


class CAMMonitor:
    r"""Explain fixed probe images again and again while a model is trained, without disturbing the training.

    At each probe a replica of the model runs on the probe images, in evaluation mode and full precision. The model
    itself is not touched: weights, ``.grad``, buffers, modes, hooks and the random number generators (of torch, NumPy
    and Python) are bit for bit what they were. A training with a monitor gives the same model as one without.

    Results:

    - in ``directory``: ``strip.png``, one row per image and one column per probe; ``film.gif``, the same as a film;
      ``scalars.csv``, one line per probe and image. The pictures are replaced as a whole each time.
    - to each ``writer``: the means of the scalars, and a picture of all images at each probe; the strip on ``close``
    - in memory: ``history``, the means; ``strip()`` and ``film()``, the pictures

    The scalars of each image with its map :math:`m`:

    - ``score``, the score that is explained, and ``probability`` of its class
    - ``energy_inside``, the share of the map inside the image's mask, :math:`\sum_{mask} m / \sum m`, if there are
      ``masks``; with several of them by name, ``energy_inside_<name>``
    - ``drift``, one minus the correlation with the map of the previous probe: 0 for the same map, 1 for an unrelated
      one
    - ``blank``, 1 if the map is constant, and ``nan``, 1 if it is not finite; their means are shares

    Energy and drift are not defined (NaN) for maps that are blank or not finite. Their thumbnails are stamped.

    Memory is bounded: thumbnails of at most ``max_columns`` probes are kept. When there are more, every second one is
    dropped, and from then on every second one is kept; the first and the newest are always there.

    The model may be wrapped in ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` or ``torch.compile``:
    the module inside is explained, uncompiled. In a distributed training only process 0 explains.

    Cost: at each probe the cost of the method for the probe images, and some milliseconds per image for the pictures.

    Example:
        >>> import torch
        >>> from torchcam.demo import load_model, sample_images
        >>> from torchcam.monitor import CAMMonitor
        >>> samples = sample_images()
        >>> images = torch.cat([sample.to_tensor() for sample in samples])
        >>> model = load_model().train()
        >>> monitor = CAMMonitor(
        ...     model, images, [sample.labels[0] for sample in samples], every_n_steps=10, target_layer="layer4"
        ... )
        >>> for _ in range(20):  # a training loop
        ...     result = monitor.step()
        >>> [entry["step"] for entry in monitor.history]
        [10, 20]

    Args:
        model: the model in training, or an averaged copy of it
        images: the probe images as the model takes them, (N, C, *spatial); copied
        class_idx: the class to explain, one for all images or one per image
        targets: in place of ``class_idx``, a callable (or one per image) from one image's output to a scalar. Class-
            agnostic methods need neither.
        every_n_steps: explain when :meth:`step` has counted a multiple of this, or gone past one
        every_n_epochs: explain when :meth:`epoch` has counted a multiple of this. With neither of the two, only
            :meth:`probe` explains.
        directory: where to write; created if needed. A new run replaces the files of an old one.
        writer: one or several loggers: with ``add_scalar`` and ``add_image`` as those of TensorBoard, or with ``log``
            as a run of Weights & Biases. The latter gets pictures as `wandb.Image` if it is such a run, otherwise as
            arrays (height, width, 3).
        tag: prefix of the names of everything logged
        masks: regions of the images, (N, *spatial) as booleans or weights, for ``energy_inside``; or several by name
        labels: the names of the images; by default their classes
        pictures: what to draw the maps on: tensors (N, C, *spatial) in [0, 1] or PIL images; by default ``images``,
            each stretched to [0, 1] if it is not in that range
        method: the class of the method
        target_layer: the layer(s) to explain, as the method takes them. A default is chosen once, at the first probe.
        method_kwargs: further arguments of the method
        forward: function from the model (the replica) and some of the images to the model's output, for models that
            are not called with the images alone
        activation: the function from scores to probabilities; for a single score it is always the sigmoid
        autocast: run the probe passes under autocast of this type, for instance ``torch.bfloat16``. By default they
            are in full precision in any training, so that results can be compared.
        batch_size: largest number of images in one pass
        max_columns: largest number of probes in the strip and the film, 2 or more
        thumbnail: the longer side of a thumbnail, in pixels
        colormap: a matplotlib colormap, or the name of one; by default that of all pictures here
        on_error: what to do if a probe fails: ``"raise"``, or ``"warn"`` and go on without it (``failures`` counts
            them). The model is unchanged in both cases.

    Attributes:
        history: the means of each probe, with the number of steps or epochs under ``"step"`` or ``"epoch"``; the
            last 10,000
        failures: the number of probes that failed

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a value or shape does not fit, or the model is sharded over several processes
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        directory: str | Path | None = None,
        writer: Any = None,
        tag: str = "cam",
        masks: Tensor | Mapping[str, Tensor] | None = None,
        labels: Sequence[str] | None = None,
        pictures: Tensor | Sequence[Image.Image] | None = None,
        method: type[Any] = GradCAM,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        method_kwargs: Mapping[str, Any] | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        autocast: torch.dtype | None = None,
        batch_size: int = 32,
        max_columns: int = 12,
        thumbnail: int = 96,
        colormap: Any = None,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        self.model = checks.check_model(model)
        self._images = checks.check_images(images).detach().clone()
        num_images = len(self._images)
        self.method = find_method(method)
        if class_idx is not None or targets is not None or not getattr(method, "class_agnostic", False):
            class_idx, targets = checks.check_explained(class_idx, targets, num_images)
        self._class_idx, self._targets = class_idx, targets
        checks.check_interval(every_n_steps, every_n_epochs)
        self.unit: Literal["step", "epoch"] = "step" if every_n_epochs is None else "epoch"
        every = every_n_steps if every_n_epochs is None else every_n_epochs
        self.every = None if every is None else positive_integer(f"every_n_{self.unit}s", every)

        self._method_kwargs = dict(method_kwargs or {})
        if "target_layer" in self._method_kwargs:
            raise ValueError("`method_kwargs` holds 'target_layer': pass `target_layer` itself")
        self._layers = None if target_layer is None else layer_names(_unwrapped(model), target_layer)
        self._forward = callable_object("forward", forward, optional=True)
        self._activation = one_of("activation", activation, ("softmax", "sigmoid"))
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"`autocast` must be a dtype such as torch.bfloat16, or None, got {autocast!r}")
        self._autocast = autocast
        self._batch_size = positive_integer("batch_size", batch_size)
        self.on_error = one_of("on_error", on_error, ("raise", "warn"))

        self._masks = checks.check_masks(masks, self._images)
        self._timeline = Timeline(
            checks.check_pictures(self._images, pictures),
            self.unit,
            integer("max_columns", max_columns, lowest=2),  # the first and the newest result
            integer("thumbnail", thumbnail, lowest=32),
            colormap,
            {name: name.removeprefix("energy_").removeprefix("inside_") for name in self._masks},
        )
        self._labels = checks.check_labels(labels, num_images)
        self._timeline.names = self._labels or self._timeline.names
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"`directory` must be a path, got {directory!r} of type {type(directory).__name__}")
        self.directory = None if directory is None else Path(directory)
        self._writers = [_Writer(one, tag, self.unit) for one in as_writers(writer)]
        self._table_started = False
        self._classes: list[int] | None = None

        self.history: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.failures = 0
        self._count = 0
        self._last: int | None = None
        self._previous: Tensor | None = None
        self._closed = False

    # When to explain.

    def step(self, step: int | None = None) -> ProbeResult | None:
        """Count an optimisation step, and explain the images if the count is due.

        Args:
            step: the number of steps done; by default one more than at the last call. A repeated number, as while
                gradients are accumulated, is explained once.

        Returns:
            the result, None if nothing was explained
        """
        return self._advance("step", step)

    def epoch(self, epoch: int | None = None) -> ProbeResult | None:
        """Count an epoch, and explain the images if the count is due; see :meth:`step`."""
        return self._advance("epoch", epoch)

    def _advance(self, unit: str, number: int | None) -> ProbeResult | None:
        if unit != self.unit:
            return None
        before, self._count = self._count, self._count + 1 if number is None else int(number)
        if self.every is None or self._count == self._last:
            return None
        # A counter may skip numbers, for example one that each of several optimisers increases.
        due = not self._count % self.every or self._count // self.every > before // self.every
        return self.probe(self._count) if due else None

    def probe(self, at: int | None = None) -> ProbeResult | None:
        """Explain the images now, for example before the training starts.

        Args:
            at: the number of steps (epochs, if those are counted) done; by default as many as were counted

        Returns:
            the result; None in all processes of a distributed training but the first, and if it failed and
            ``on_error`` is ``"warn"``
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return None
        self._last = self._count = self._count if at is None else int(at)
        try:
            result = self._evaluate(self._count)
            self._write(result)
        except Exception as error:
            self.failures += 1
            if self.on_error == "raise":
                raise
            warnings.warn(
                f"the probe images could not be explained at {self.unit} {self._count}, the training goes on without: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        return result

    # Explaining.

    def _evaluate(self, at: int) -> ProbeResult:
        """Explain all images, and compute the scalars."""
        cams, scalars, self._classes = self._explain()
        nan = ~is_finite(cams)
        blank = ~nan & (cams.flatten(1).amax(1) == 0)
        defined = cams.masked_fill((nan | blank).view(-1, *[1] * (cams.ndim - 1)), math.nan)
        for name, mask in self._masks.items():
            maps = resize(defined.unsqueeze(1), mask.shape[1:]).squeeze(1)
            scalars[name] = (maps * mask).flatten(1).sum(1) / maps.flatten(1).sum(1)
        previous = self._previous
        if previous is None or previous.shape != cams.shape:
            previous = torch.full_like(cams, math.nan)
        new, old = (maps.flatten(1).double() for maps in (defined, previous))
        correlation = F.cosine_similarity(new - new.mean(1, keepdim=True), old - old.mean(1, keepdim=True))
        scalars["drift"] = (1 - correlation).clamp(0, 2).to(cams)
        scalars["blank"], scalars["nan"] = blank.to(cams), nan.to(cams)
        self._previous = defined

        values = {name: tuple(column.tolist()) for name, column in scalars.items()}
        means = {name: column.double().nanmean().item() for name, column in scalars.items()}
        if self._labels is None and self._classes is not None:
            self._labels = self._timeline.names = [f"class {index}" for index in self._classes]
        stamps = ["NaN" if n else "blank" if b else "" for n, b in zip(nan.tolist(), blank.tolist(), strict=True)]
        thumbnails = self._timeline.draw_thumbnails(cams.numpy(), stamps)
        result = ProbeResult(at, values, means, thumbnails)
        self._timeline.add(result)
        self.history.append({self.unit: at, **means})
        return result

    def _explain(self) -> tuple[Tensor, dict[str, Tensor], list[int] | None]:
        """Return the maps (N, *spatial) in [0, 1], the scores (N,) by name, and the classes; on the CPU."""
        original = _unwrapped(self.model)
        recipe = Recipe(self.method.__name__, self.method, self._layers, self._method_kwargs, {})
        input_shape = tuple(self._images.shape[1:])
        with (
            random_states_kept(),
            replicated(original) as model,
            _precision(model_device(model).type, self._autocast),
            extractors_on(model, original, [recipe], input_shape) as (extractor,),
        ):
            agnostic = self._class_idx is None and self._targets is None
            select = None if agnostic else Selector(self._class_idx, self._targets, len(self._images))

            def explain(chunk: slice) -> tuple[Tensor, ...]:
                images = to_model(model, self._images[chunk])
                samples = torch.arange(len(self._images), device=images.device)[chunk]
                output = model(images) if self._forward is None else self._forward(model, images)
                asked = {} if select is None else select.arguments(output, samples)
                cams = over_positions(extractor.fuse_cams(extractor(scores=output, **asked)), images)
                if cams.ndim != images.ndim - 1:
                    raise ValueError(
                        f"`method` {self.method.__name__} gives maps of shape {tuple(cams.shape)} for images of shape "
                        f"{tuple(images.shape)}: one map (N, *spatial) is needed"
                    )
                found = [min_max(to_float(cams)).float()]
                if select is not None:
                    found.append(to_float(select(output, samples)).float())
                if "class_idx" in asked:
                    found += [self._probability(read_logits(output), asked["class_idx"]), asked["class_idx"]]
                return tuple(tensor.detach().cpu() for tensor in found)

            chunks = run_chunks(explain, len(self._images), self._batch_size)
            if self._layers is None and extractor.inner.looks_at_a_layer:
                self._layers = list(extractor.target_names)
        cams, *scores = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        scalars = dict(zip(("score", "probability"), scores, strict=False))
        return cams, scalars, scores[2].tolist() if len(scores) > 2 else None

    def _probability(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Return the probability of each row's class, (N,); for scores (N, K, *S) the mean over positions."""
        logits = to_float(logits)
        logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
        shares = logits.sigmoid() if self._activation == "sigmoid" or logits.shape[1] == 1 else logits.softmax(1)
        picked = shares[torch.arange(len(shares), device=shares.device), classes]
        return picked.reshape(len(picked), -1).mean(1).float()

    # Results.

    def strip(self) -> Image.Image:
        """Draw all probes side by side: one row per image, one column per probe.

        Raises:
            RuntimeError: if nothing was explained yet
        """
        return self._timeline.strip()

    def film(self) -> list[Image.Image]:
        """Draw one picture of all images for each probe.

        Raises:
            RuntimeError: if nothing was explained yet
        """
        self._timeline.check_started()
        return [self._timeline.frame(result) for result in self._timeline.results]

    def close(self) -> None:
        """Send the strip to the writers, and leave them open. May be called more than once."""
        if not self._closed and self._timeline.results:
            for writer in self._writers:
                writer.send(self._timeline.results[-1].at, {}, "strip", self.strip())
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, result: ProbeResult) -> None:
        self._closed = False
        if self.directory is not None:
            self._add_to_table(self.directory / "scalars.csv", result)
            # Encoded in memory: Pillow does not say that a disk is full.
            strip, film = io.BytesIO(), io.BytesIO()
            self.strip().save(strip, format="PNG", compress_level=1)  # the training waits
            self._timeline.save_film(film)
            for name, picture in (("strip.png", strip), ("film.gif", film)):
                with atomic_write(self.directory / name) as path:
                    path.write_bytes(picture.getvalue())
        if self._writers:
            frame = self._timeline.frame(result)
            for writer in self._writers:
                writer.send(result.at, result.means, "maps", frame)

    def _add_to_table(self, path: Path, result: ProbeResult) -> None:
        classes: Sequence[Any] = self._classes or [""] * len(self._images)
        images = enumerate(zip(self._timeline.names, classes, *result.values.values(), strict=True))
        rows = [
            [result.at, image, label, class_idx, *(f"{value:.6g}" for value in values)]
            for image, (label, class_idx, *values) in images
        ]
        if self._table_started and path.is_file():
            append_lines(path, as_csv(rows))
        else:
            self._write_table(path, [[self.unit, "image", "label", "class", *result.values], *rows])

    def _write_table(self, path: Path, rows: Iterable[Sequence[Any]]) -> None:
        with atomic_write(path) as part:
            part.write_text(as_csv(rows), encoding="utf-8", newline="")
        self._table_started = True

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, with strip, film and history; ``torch.save`` can store it."""
        return {
            "count": self._count,
            "last": self._last,
            "layers": self._layers,
            "previous": self._previous,
            "labels": self._labels,
            "history": list(self.history),
            "film": self._timeline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an earlier run with the same images and arguments.

        Lines of ``scalars.csv`` that the earlier run wrote after the state was taken are dropped.

        Raises:
            ValueError: if the state is of another number of images
        """
        self._timeline.load_state_dict(state["film"])
        self._count, self._last, self._layers = state["count"], state["last"], state["layers"]
        self._previous, self._labels = state["previous"], state["labels"]
        self._timeline.names = self._labels or self._timeline.names
        self.history = deque(state["history"], maxlen=_HISTORY)
        if self._last is not None:
            self._continue_table(self._last)

    def resume(self, at: int) -> None:
        """Continue a run at a number of steps (epochs, if those are counted), without its state.

        Lines of ``scalars.csv`` up to there are kept, later ones dropped; strip, film and history start anew. The
        arguments have to be those of that run.

        Args:
            at: the number of steps (epochs) done

        Raises:
            RuntimeError: if something was explained already
        """
        if self._timeline.results:
            raise RuntimeError("`resume` was called after the first probe: call it before the training goes on")
        self._count = int(at)
        self._continue_table(self._count)

    def _continue_table(self, last: int) -> None:
        """Keep the lines of an earlier run up to a number of steps, and add to them from now on."""
        path = None if self.directory is None else self.directory / "scalars.csv"
        if path is None or not path.is_file():
            return
        # What follows the last line break was torn off. A disk may leave anything there, also half a character.
        lines = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace").split("\n")
        rows = [row for line in lines for row in csv.reader([line])]
        if rows and rows[0][:1] == [self.unit]:  # otherwise it is empty, or counts something else
            kept = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdecimal() and int(row[0]) <= last]
            self._write_table(path, [rows[0], *kept])

    def __repr__(self) -> str:
        when = "on call" if self.every is None else f"every {self.every} {self.unit}s"
        return f"CAMMonitor({self.method.__name__}, {len(self._images)} images, {when})"


def check_options(
    images: Tensor,
    class_idx: ClassIndex | None,
    every_n_steps: int | None,
    every_n_epochs: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a monitor that is created when there is a model; by default it counts epochs.

    Raises:
        TypeError: if one of ``options`` is not an argument of the monitor
        ValueError: if ``every_n_steps`` and ``every_n_epochs`` are both given
    """
    unknown = sorted(set(options) - set(inspect.signature(CAMMonitor).parameters))
    if unknown or "model" in options:
        raise TypeError(f"{unknown or ['model']} are not options of a callback: see torchcam.monitor.CAMMonitor")
    checks.check_interval(every_n_steps, every_n_epochs)
    if every_n_steps is None and every_n_epochs is None:
        every_n_epochs = 1
    interval = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}
    return {"images": images, "class_idx": class_idx, **interval, **options}


def as_writers(writer: Any) -> list[Any]:
    """Return the ``writer`` of a monitor as a list: none, one or several."""
    if writer is None:
        return []
    return list(writer) if isinstance(writer, (list, tuple)) else [writer]


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers whose forward pass only calls it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    inside = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return _unwrapped(inside) if isinstance(inside, nn.Module) else model


# The surroundings of a probe pass.


@contextmanager
def _precision(device_type: str, autocast: torch.dtype | None) -> Iterator[None]:
    """Turn autocast off, or on with a type, and do not share its cache of cast weights with the training."""
    if not torch.amp.is_autocast_available(device_type):
        if autocast is not None:
            raise ValueError(f"`autocast` is {autocast}, but there is none on the device '{device_type}'")
        yield
        return
    with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        yield


class _Writer:
    """One interface to the loggers of TensorBoard and of Weights & Biases."""

    def __init__(self, writer: Any, tag: str, unit: str) -> None:
        self._has_images = all(callable(getattr(writer, name, None)) for name in ("add_scalar", "add_image"))
        if not self._has_images and not callable(getattr(writer, "log", None)):
            raise TypeError(
                "`writer` must have `add_scalar` and `add_image` (TensorBoard) or `log` (Weights & Biases), "
                f"got {type(writer).__name__}"
            )
        self._writer = writer
        self._tag = tag
        self._unit = unit
        self._axis_defined = False

    def send(self, at: int, scalars: Mapping[str, float], name: str, picture: Image.Image) -> None:
        """Log a picture, and the scalars that are defined."""
        defined = {f"{self._tag}/{key}": value for key, value in scalars.items() if not math.isnan(value)}
        pixels = np.asarray(picture)
        if self._has_images:
            for key, value in defined.items():
                self._writer.add_scalar(key, value, at)
            self._writer.add_image(f"{self._tag}/{name}", pixels, at, dataformats="HWC")
            return
        # The run's own step counter belongs to others that log: the monitor has an axis of its own.
        axis = f"{self._tag}/{self._unit}"
        if not self._axis_defined and callable(define := getattr(self._writer, "define_metric", None)):
            define(axis)
            define(f"{self._tag}/*", step_metric=axis)
        self._axis_defined = True
        image: Any = pixels
        if "wandb" in {type(self._writer).__module__.split(".")[0], getattr(self._writer, "__name__", "")}:
            import wandb

            image = wandb.Image(picture)
        self._writer.log({axis: at, **defined, f"{self._tag}/{name}": image})
