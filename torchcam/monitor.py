"""Class activation maps of a few fixed images through a training run."""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._files import written_whole
from torchcam._film import Film, Moment, as_pictures
from torchcam._passes import model_device, untouched
from torchcam._tensors import min_max, resize, to_float
from torchcam.layers import TargetLayer, layer_names
from torchcam.methods import GradCAM, GuidedBackprop, GuidedGradCAM
from torchcam.methods._replay import positive_integer, run_chunks
from torchcam.methods.core import is_finite, plain_tensors
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, class_columns, read_logits

__all__ = ["CAMMonitor", "Moment", "check_options"]

_HISTORY = 10_000  # moments whose means are kept


class CAMMonitor:
    r"""Explain fixed probe images again and again while a model is trained, without disturbing the training.

    At each moment the model runs on the probe images in evaluation mode and full precision, and is left as it was:
    weights, ``.grad``, buffers, modes, hooks and the random number generators (of torch, NumPy and Python) are bit for
    bit what they were, so that a training with a monitor gives the same model as one without. The model carries no
    hooks of the monitor in between.

    What comes out:

    - in ``directory``: ``strip.png``, one row per image and one column per moment; ``film.gif``, the same as a film;
      ``scalars.csv``, one line per moment and image. The pictures are replaced as a whole each time.
    - to each ``writer``: the means of the scalars, and a picture of all images at that moment; the strip on ``close``
    - in memory: ``history``, the means; ``strip()`` and ``film()``, the pictures

    The scalars are, for each image with its map :math:`m`:

    - ``score``, the score that is explained, and ``probability`` of its class
    - ``energy_inside``, the share of the map inside the image's mask, :math:`\sum_{mask} m / \sum m`, if there are
      ``masks``; with several of them by name, ``energy_inside_<name>``
    - ``drift``, one minus the correlation with the map of the moment before: 0 for the same map, 1 for an unrelated one
    - ``blank``, 1 if the map is constant, and ``nan``, 1 if it is not finite; their means are shares

    Energy and drift are not defined (NaN) for maps that are blank or not finite, which the thumbnails say in words.

    Memory is bounded: what is kept are thumbnails of at most ``max_columns`` moments. Once there are more, every second
    one is dropped, and from then on every second one kept; the first and the newest are always there.

    The model may be wrapped in ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` or ``torch.compile``:
    what is inside is explained, uncompiled. Of a distributed training only process 0 explains.

    Cost: at each moment what the method costs for the probe images, and some milliseconds per image for the pictures.

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
        ...     moment = monitor.step()
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
        directory: where to write; made if needed. A new run replaces the files of an old one.
        writer: one or several objects that take what is to be logged: with ``add_scalar`` and ``add_image`` as those of
            TensorBoard, or with ``log`` as a run of Weights & Biases, to which pictures go as `wandb.Image` if it is
            one, and as arrays (height, width, 3) otherwise
        tag: what the names of everything logged begin with
        masks: regions of the images, (N, *spatial) as booleans or weights, for ``energy_inside``; or several by name
        labels: what to call the images; by default their classes
        pictures: what to draw the maps on: tensors (N, C, *spatial) in [0, 1] or PIL images; by default ``images``,
            stretched to [0, 1] one by one where they are not in that range
        method: the class of the method
        target_layer: the layer(s) to look at, as the method takes them. A default is chosen once, at the first moment.
        method_kwargs: further arguments of the method
        forward: function from the model and some of the images to the model's output, for models that are called in
            another way than with the images alone
        activation: what makes probabilities of the model's scores; of a single score it is the sigmoid anyway
        autocast: run the probe passes under autocast of this type, for instance ``torch.bfloat16``. By default they
            are in full precision whatever the training does, so that moments can be compared.
        batch_size: largest number of images in one pass
        max_columns: largest number of moments in the strip and the film, 2 or more
        thumbnail: the longer side of a thumbnail, in pixels
        colormap: a matplotlib colormap, or the name of one
        on_error: what to do if a moment cannot be explained or written: ``"raise"``, or ``"warn"`` and go on without
            it (``failures`` counts them). Either way the model is as it was.

    Attributes:
        history: the means of each moment, with the number of steps or epochs under ``"step"`` or ``"epoch"``; the
            last 10,000
        failures: how many moments failed

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
        colormap: Any = "inferno",
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        self.model = _check_model(model)
        self._images = _check_images(images).detach().clone()
        num_images = len(self._images)
        self._class_idx, self._targets = _check_asked(class_idx, targets, num_images, method)
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError(_both_counted(every_n_steps, every_n_epochs))
        self.unit: Literal["step", "epoch"] = "step" if every_n_epochs is None else "epoch"
        every = every_n_steps if every_n_epochs is None else every_n_epochs
        self.every = None if every is None else positive_integer(f"every_n_{self.unit}s", every)

        self.method = method
        self._method_kwargs = dict(method_kwargs or {})
        if "target_layer" in self._method_kwargs:
            raise ValueError("`method_kwargs` holds 'target_layer': pass `target_layer` itself")
        if "input_shape" in inspect.signature(method).parameters:
            self._method_kwargs.setdefault("input_shape", tuple(images.shape[1:]))
        self._layers = None if target_layer is None else layer_names(_unwrapped(model), target_layer)
        if forward is not None and not callable(forward):
            raise TypeError(f"`forward` must be callable, got {forward!r}")
        self._forward = forward
        if activation not in {"softmax", "sigmoid"}:
            raise ValueError(f"`activation` must be 'softmax' or 'sigmoid', got {activation!r}")
        self._activation = activation
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"`autocast` must be a dtype such as torch.bfloat16, or None, got {autocast!r}")
        self._autocast = autocast
        self._batch_size = positive_integer("batch_size", batch_size)
        if on_error not in {"raise", "warn"}:
            raise ValueError(f"`on_error` must be 'raise' or 'warn', got {on_error!r}")
        self.on_error = on_error

        self._masks = _check_masks(masks, self._images)
        self._labels = _check_labels(labels, num_images)
        self._film = Film(
            as_pictures(self._images if pictures is None else pictures, num_images, given=pictures is not None),
            self.unit,
            positive_integer("max_columns", max_columns),
            positive_integer("thumbnail", thumbnail),
            colormap,
        )
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"`directory` must be a path, got {directory!r} of type {type(directory).__name__}")
        self.directory = None if directory is None else Path(directory)
        writers = [] if writer is None else list(writer) if isinstance(writer, (list, tuple)) else [writer]
        self._outlets = [_Outlet(one, tag, self.unit) for one in writers]
        self._csv_begun = False
        self._classes: list[int] | None = None

        self.history: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.failures = 0
        self._count = 0
        self._last: int | None = None
        self._previous: Tensor | None = None
        self._closed = False
        self._gif_frames: list[tuple[Moment, Image.Image]] = []

    # When to explain.

    def step(self, step: int | None = None) -> Moment | None:
        """Count an optimisation step, and explain the images if their time has come.

        Args:
            step: how many steps were done; by default one more than at the last call. A number that comes again, as
                while gradients are accumulated, is explained once.

        Returns:
            the moment, None where nothing was explained
        """
        return self._advance("step", step)

    def epoch(self, epoch: int | None = None) -> Moment | None:
        """Count an epoch, and explain the images if their time has come; see :meth:`step`."""
        return self._advance("epoch", epoch)

    def _advance(self, unit: str, number: int | None) -> Moment | None:
        if unit != self.unit:
            return None
        before, self._count = self._count, self._count + 1 if number is None else int(number)
        if self.every is None or self._count == self._last:
            return None
        # A counter may leave numbers out: one that grows by each of several optimisers does.
        due = not self._count % self.every or self._count // self.every > before // self.every
        return self.probe(self._count) if due else None

    def probe(self, at: int | None = None) -> Moment | None:
        """Explain the images now: say, before the training begins.

        Args:
            at: how many steps (epochs, if those are counted) were done; by default as many as were counted

        Returns:
            the moment; None in all processes of a distributed training but the first, and where it failed and
            ``on_error`` is ``"warn"``
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return None
        self._count = self._count if at is None else int(at)
        self._last = self._count
        try:
            moment = self._look(self._count)
            self._write(moment)
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
        return moment

    # Explaining.

    def _look(self, at: int) -> Moment:
        cams, scalars, classes = self._explain()
        nan = ~is_finite(cams)
        blank = ~nan & (cams.flatten(1).amax(1) == 0)
        undefined = nan | blank
        for name, mask in self._masks.items():
            scalars[name] = _energy(cams, mask.to(cams)).masked_fill(undefined, math.nan)
        scalars["drift"] = _drift(cams, self._previous).masked_fill(undefined, math.nan)
        scalars["blank"], scalars["nan"] = blank.to(cams), nan.to(cams)
        self._previous = cams

        values = {name: tuple(column.tolist()) for name, column in scalars.items()}
        means = {name: column.double().nanmean().item() for name, column in scalars.items()}
        if self._labels is None and classes is not None:
            self._labels = [f"class {index}" for index in classes]
        stamps = ["NaN" if n else "blank" if b else "" for n, b in zip(nan.tolist(), blank.tolist(), strict=True)]
        moment = Moment(at, MappingProxyType(values), MappingProxyType(means), self._film.draw(cams.numpy(), stamps))
        self._film.add(moment)
        self.history.append({self.unit: at, **means})
        self._classes = classes
        return moment

    def _explain(self) -> tuple[Tensor, dict[str, Tensor], list[int] | None]:
        """Explain all images: the maps (N, *spatial) in [0, 1], what they explain (N,), and the classes; on the CPU."""
        model = _unwrapped(self.model)
        device = model_device(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), self._images.dtype)
        asks = self._class_idx is not None or self._targets is not None
        select = Selector(self._class_idx, self._targets, len(self._images)) if asks else None
        normalized = not issubclass(self.method, (GuidedBackprop, GuidedGradCAM))  # their zero has to stay zero

        def explain(chunk: slice) -> tuple[Tensor, ...]:
            samples = torch.arange(len(self._images), device=device)[chunk]
            images = self._images[chunk].to(device=device, dtype=dtype)
            output = model(images) if self._forward is None else self._forward(model, images)
            asked = {} if select is None else select.arguments(output, samples)
            cams = extractor.fuse_cams(extractor(scores=output, normalized=normalized, **asked))
            if not normalized:
                cams = cams.abs().sum(1)  # the strength of the colours
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

        with ExitStack() as stack:
            stack.enter_context(_random_states_kept())
            stack.enter_context(plain_tensors())
            stack.enter_context(_uncompiled(model))
            stack.enter_context(_precision(device.type, self._autocast))
            extractor = stack.enter_context(self.method(model, target_layer=self._layers, **self._method_kwargs))
            watching = getattr(extractor, "base_cam", extractor)
            stack.enter_context(untouched(model, recorder=watching))
            chunks = run_chunks(explain, len(self._images), self._batch_size)
            if self._layers is None and _looks_at_layers(watching):
                self._layers = list(watching.target_names)
        cams, *scores = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        scalars = dict(zip(("score", "probability"), scores, strict=False))
        return cams, scalars, scores[2].tolist() if len(scores) > 2 else None

    def _probability(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Give the probability of each row's class, (N,); of scores (N, K, *S) the mean over positions."""
        logits = to_float(logits)
        logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
        shares = logits.sigmoid() if self._activation == "sigmoid" or logits.shape[1] == 1 else logits.softmax(1)
        picked = shares[torch.arange(len(shares), device=shares.device), classes]
        return picked.reshape(len(picked), -1).mean(1).float()

    # What comes out.

    def strip(self) -> Image.Image:
        """Draw the moments side by side: one row per image, one column per moment.

        Raises:
            RuntimeError: if nothing was explained yet
        """
        return self._film.strip(self._names(), self._captions())

    def film(self) -> list[Image.Image]:
        """Draw the moments one after the other: one picture of all images for each.

        Raises:
            RuntimeError: if nothing was explained yet
        """
        self._film.check_begun()
        return [self._frame(moment) for moment in self._film.moments]

    def close(self) -> None:
        """Send the strip to the writers, which are left open. May be called more than once."""
        if not self._closed and self._film.moments:
            for outlet in self._outlets:
                outlet.send(self._film.moments[-1].at, {}, "strip", self.strip())
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _names(self) -> list[str]:
        return self._labels or [f"image {index}" for index in range(len(self._images))]

    def _captions(self) -> dict[str, str]:
        """Give the scalars to write below each thumbnail, and what they are called there."""
        return {name: name.removeprefix("energy_").removeprefix("inside_") for name in self._masks}

    def _write(self, moment: Moment) -> None:
        self._closed = False
        if self.directory is not None:
            self._write_lines(moment)
            with written_whole(self.directory / "strip.png") as path:
                self.strip().save(path, format="PNG", compress_level=1)  # the training waits
            with written_whole(self.directory / "film.gif") as path:
                self._save_gif(path)
        if self._outlets:
            frame = self._frame(moment)
            for outlet in self._outlets:
                outlet.send(moment.at, moment.means, "maps", frame)

    def _frame(self, moment: Moment) -> Image.Image:
        return self._film.frame(moment, self._names(), self._captions())

    def _save_gif(self, path: Path) -> None:
        """Write an endless film that stays a while on its last picture."""
        moments = self._film.moments
        # To find the colours of a frame takes longer than all else, so it is done once for each.
        old = dict(self._gif_frames)
        self._gif_frames = [
            (moment, old[moment] if moment in old else self._frame(moment).quantize(method=Image.Quantize.FASTOCTREE))
            for moment in moments
        ]
        first, *others = (frame for _, frame in self._gif_frames)
        durations = [500] * len(others) + [2000]
        first.save(
            path, format="GIF", save_all=True, append_images=others, duration=durations if others else 2000, loop=0
        )

    def _write_lines(self, moment: Moment) -> None:
        assert self.directory is not None  # noqa: S101 - for the type checker: the caller has seen to it
        lines = io.StringIO(newline="")
        table = csv.writer(lines, lineterminator="\n")
        if not self._csv_begun:
            table.writerow([self.unit, "image", "label", "class", *moment.values])
        classes: Sequence[Any] = self._classes or [""] * len(self._images)
        for image, (label, class_idx, *row) in enumerate(
            zip(self._names(), classes, *moment.values.values(), strict=True)
        ):
            table.writerow([moment.at, image, label, class_idx, *(f"{value:.6g}" for value in row)])
        path = self.directory / "scalars.csv"
        if self._csv_begun:
            with path.open("a", encoding="utf-8", newline="") as file:
                file.write(lines.getvalue())
        else:
            with written_whole(path) as part:
                part.write_text(lines.getvalue(), encoding="utf-8", newline="")
        self._csv_begun = True

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs to go on with the same strip, film and history; ``torch.save`` can store it."""
        return {
            "count": self._count,
            "last": self._last,
            "layers": self._layers,
            "previous": self._previous,
            "labels": self._labels,
            "history": list(self.history),
            "film": self._film.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run left off, with the same images and arguments.

        Lines of ``scalars.csv`` that the earlier run wrote after the state was taken are dropped.

        Raises:
            ValueError: if the state is of another number of images
        """
        self._film.load_state_dict(state["film"])
        self._count, self._last, self._layers = state["count"], state["last"], state["layers"]
        self._previous, self._labels = state["previous"], state["labels"]
        self.history = deque(state["history"], maxlen=_HISTORY)
        if self._last is not None:
            self._keep_lines(self._last)

    def resume(self, at: int) -> None:
        """Go on with a run at a number of steps (epochs, if those are counted), without its state.

        Lines of ``scalars.csv`` up to there stay, later ones are dropped; strip, film and history begin anew. The
        arguments have to be those of that run.

        Args:
            at: how many steps (epochs) were done

        Raises:
            RuntimeError: if something was explained already
        """
        if self._film.moments:
            raise RuntimeError("`resume` was called after the first moment: call it before the training goes on")
        self._count = int(at)
        self._keep_lines(self._count)

    def _keep_lines(self, last: int) -> None:
        """Go on in the table of an earlier run, from after a moment on."""
        path = None if self.directory is None else self.directory / "scalars.csv"
        if path is None or not path.is_file():
            return
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        if not rows or rows[0][:1] != [self.unit]:  # empty, or it counts something else
            return
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit() and int(row[0]) <= last]
        with written_whole(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([rows[0], *kept])
        self._csv_begun = True

    def __repr__(self) -> str:
        when = "on call" if self.every is None else f"every {self.every} {self.unit}s"
        return f"CAMMonitor({self.method.__name__}, {len(self._images)} images, {when})"


# What is checked at the door.


def check_options(
    images: Tensor,
    class_idx: ClassIndex | None,
    every_n_steps: int | None,
    every_n_epochs: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Give the arguments of a monitor that is made later, when there is a model; by default it counts epochs.

    Raises:
        TypeError: if one of ``options`` is none of the monitor's
        ValueError: if ``every_n_steps`` and ``every_n_epochs`` are both given
    """
    unknown = sorted(set(options) - set(inspect.signature(CAMMonitor).parameters))
    if unknown or "model" in options:
        raise TypeError(f"{unknown or ['model']} are not options of a callback: see torchcam.monitor.CAMMonitor")
    if every_n_steps is not None and every_n_epochs is not None:
        raise ValueError(_both_counted(every_n_steps, every_n_epochs))
    if every_n_steps is None and every_n_epochs is None:
        every_n_epochs = 1
    return {
        "images": images,
        "class_idx": class_idx,
        "every_n_steps": every_n_steps,
        "every_n_epochs": every_n_epochs,
        **options,
    }


def _both_counted(every_n_steps: int, every_n_epochs: int) -> str:
    return (
        f"give `every_n_steps` ({every_n_steps}) or `every_n_epochs` ({every_n_epochs}), not both: the moments are "
        "counted in one of them"
    )


def _check_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    sharded = {"FullyShardedDataParallel", "FSDPModule"}
    if any(sharded & {kind.__name__ for kind in type(module).__mro__} for module in model.modules()):
        raise ValueError(
            "`model` is sharded over several processes (FSDP), but a monitor runs it in one: give it a gathered copy, "
            "and call `probe` when that is up to date"
        )
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Give the module inside the wrappers whose forward pass only calls it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def _check_images(images: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a floating-point tensor (N, C, *spatial), got {found}")
    if not 3 <= images.ndim <= 5 or not images.numel():
        raise ValueError(f"`images` must be a batch (N, C, *spatial) of one image or more, got {tuple(images.shape)}")
    return images


def _check_asked(
    class_idx: ClassIndex | None, targets: Any, num_images: int, method: Any
) -> tuple[ClassIndex | None, Any]:
    is_method = isinstance(method, type) and hasattr(method, "fuse_cams")
    if not is_method or "class_idx" not in inspect.signature(method.__call__).parameters:
        raise TypeError(f"`method` must be a CAM class such as GradCAM, got {method!r}")
    if class_idx is not None or targets is not None or not getattr(method, "class_agnostic", False):
        check_one_of(class_idx, targets)
    several = class_columns(class_idx, targets) is not None
    given: Any = class_idx if targets is None else targets
    if several or (hasattr(given, "__len__") and getattr(given, "shape", None) != () and len(given) != num_images):
        what = "several of each" if several else f"{len(given)}"
        name = "class_idx" if targets is None else "targets"
        raise ValueError(f"`{name}` must be one for all images or one per image: got {what} for {num_images} images")
    return (class_idx.detach().clone() if isinstance(class_idx, Tensor) else class_idx), targets


def _check_masks(masks: Any, images: Tensor) -> dict[str, Tensor]:
    if masks is None:
        return {}
    named = masks if isinstance(masks, Mapping) else {"": masks}
    shape = (len(images), *images.shape[2:])
    checked = {}
    for name, mask in named.items():
        if not isinstance(mask, Tensor):
            raise TypeError(f"`masks` must be a tensor (N, *spatial), or several by name, got {type(mask).__name__}")
        if tuple(mask.shape) != shape:
            raise ValueError(f"`masks` must have the shape {shape} of the images, got {tuple(mask.shape)}")
        checked["_".join(filter(None, ("energy_inside", str(name))))] = mask.detach().cpu().float().clone()
    return checked


def _check_labels(labels: Any, num_images: int) -> list[str] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError("`labels` must be a sequence of strings, one per image")
    if len(labels) != num_images:
        raise ValueError(f"`labels` has {len(labels)} entries for {num_images} images")
    return list(labels)


# What surrounds a probe pass.


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Keep the global random states of Python and NumPy; those of torch are seen to by ``untouched``."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is meant
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the modules that ``Module.compile`` was called on as they were written: compiled code runs no hooks."""
    compiled = [(module, module.__dict__.pop("_compiled_call_impl", None)) for module in model.modules()]
    try:
        yield
    finally:
        for module, call in compiled:
            if call is not None:
                module.__dict__["_compiled_call_impl"] = call


@contextmanager
def _precision(device_type: str, autocast: torch.dtype | None) -> Iterator[None]:
    """Turn autocast off, or on with a type; its cache of cast weights, which a training pass may share, is unused."""
    if not torch.amp.is_autocast_available(device_type):
        if autocast is not None:
            raise ValueError(f"`autocast` is {autocast}, but there is none on the device '{device_type}'")
        yield
        return
    with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        yield


def _looks_at_layers(extractor: Any) -> bool:
    """Tell whether the target names of an extractor are modules: those of input-resolution methods are not."""
    modules, own = getattr(extractor, "submodule_dict", {}), getattr(extractor, "_own_modules", ())
    return bool(extractor.target_names) and all(modules.get(name) in own for name in extractor.target_names)


# Scalars.


def _energy(cams: Tensor, mask: Tensor) -> Tensor:
    """Give the share of each map that is inside its mask, (N,)."""
    maps = resize(cams.unsqueeze(1), mask.shape[1:]).squeeze(1)
    return (maps * mask).flatten(1).sum(1) / maps.flatten(1).sum(1)


def _drift(cams: Tensor, previous: Tensor | None) -> Tensor:
    """Give one minus the correlation of each map with the previous one, (N,); NaN where one of them is constant."""
    if previous is None or previous.shape != cams.shape:
        return cams.new_full((len(cams),), math.nan)
    a, b = (maps.flatten(1).double() for maps in (cams, previous))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    # Rounding may push the correlation of equal maps past 1.
    correlation = ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).clamp(-1, 1)
    return (1 - correlation).to(cams.dtype)


# Writers.


class _Outlet:
    """A writer, however it wants to be called."""

    def __init__(self, writer: Any, tag: str, unit: str) -> None:
        self._draws = all(callable(getattr(writer, name, None)) for name in ("add_scalar", "add_image"))
        if not self._draws and not callable(getattr(writer, "log", None)):
            raise TypeError(
                "`writer` must have `add_scalar` and `add_image` (TensorBoard) or `log` (Weights & Biases), "
                f"got {type(writer).__name__}"
            )
        self._writer = writer
        self._tag = tag
        self._unit = unit
        self._defined = False

    def send(self, at: int, scalars: Mapping[str, float], name: str, picture: Image.Image) -> None:
        """Log scalars, but for those that are not defined, and a picture."""
        defined = {f"{self._tag}/{key}": value for key, value in scalars.items() if not math.isnan(value)}
        pixels = np.asarray(picture)
        if self._draws:
            for key, value in defined.items():
                self._writer.add_scalar(key, value, at)
            self._writer.add_image(f"{self._tag}/{name}", pixels, at, dataformats="HWC")
            return
        # The run's own step counter belongs to whoever else logs: ours is an axis of its own.
        axis = f"{self._tag}/{self._unit}"
        if not self._defined and callable(define := getattr(self._writer, "define_metric", None)):
            define(axis)
            define(f"{self._tag}/*", step_metric=axis)
        self._defined = True
        image: Any = pixels
        if "wandb" in {type(self._writer).__module__.split(".")[0], getattr(self._writer, "__name__", "")}:
            import wandb

            image = wandb.Image(picture)
        self._writer.log({axis: at, **defined, f"{self._tag}/{name}": image})
