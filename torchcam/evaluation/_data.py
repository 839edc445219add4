"""The batches of a data set: their contents, and their distribution to processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, WeightedRandomSampler

from torchcam._tensors import map_tensors

_IMAGE_KEYS = ("input_tensor", "input", "inputs", "image", "images", "pixel_values", "x")
_CLASS_KEYS = ("class_idx", "label", "labels", "class", "y")


@dataclass(frozen=True)
class Batch:
    """Inputs with their classes and annotations.

    Attributes:
        image: the model's input, (N, C, *spatial)
        labels: the class of each, (N,), if it is known
        extras: annotations by name, such as the `masks` of :class:`torchcam.metrics.Localization`
    """

    image: Tensor
    labels: list[int] | None
    extras: dict[str, Any]

    @classmethod
    def read(cls, raw: Any, device: torch.device) -> Batch:
        """Convert a batch of a loader.

        Raises:
            TypeError: if it holds no inputs, or labels that are not integers
            ValueError: if there is not one label for each input
        """
        image, labels, extras = _parts(raw)
        if not isinstance(image, Tensor):
            raise TypeError(
                "`loader` must give batches of (input, class), of (input, class, {name: more}), or dicts with an input "
                f"({', '.join(_IMAGE_KEYS)}) and a class ({', '.join(_CLASS_KEYS)}); got {_describe(raw)}"
            )
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"`loader` must give classes as integers, got a tensor of {labels.dtype}")
            if tuple(labels.shape) != (len(image),):
                raise ValueError(
                    f"`loader` must give one class for each of {len(image)} inputs, got shape {tuple(labels.shape)}"
                )
            labels = labels.tolist()
        move = {name: map_tensors(lambda t: t.to(device, non_blocking=True), value) for name, value in extras.items()}
        return cls(image.to(device, non_blocking=True), labels, move)


def _parts(raw: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the input, the classes and the rest."""
    if isinstance(raw, Tensor):
        return raw, None, {}
    if isinstance(raw, Mapping):
        rest = dict(raw)
        image = next((rest.pop(key) for key in _IMAGE_KEYS if key in rest), None)
        labels = next((rest.pop(key) for key in _CLASS_KEYS if key in rest), None)
        return image, labels, rest
    if isinstance(raw, Sequence) and 1 <= len(raw) <= 3:
        image, labels, extras = (*raw, None, None)[:3]
        if extras is None or isinstance(extras, Mapping):
            return image, labels, dict(extras or {})
    return None, None, {}


def _describe(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a mapping of {sorted(map(str, raw))}"
    if isinstance(raw, (list, tuple)):
        return f"a {type(raw).__name__} of ({', '.join(type(item).__name__ for item in raw)})"
    return type(raw).__name__


class Stream:
    """The batches of a loader, of which process ``rank`` of ``size`` takes every ``size``-th.

    The batches are those of a single process: nothing is padded, and no sample is repeated. A ``DataLoader`` over a
    data set with random access loads only the batches of this process that are not finished; the others of any other
    iterable are read and dropped.

    Args:
        loader: a ``DataLoader``, or any iterable of batches
        rank: the number of this process
        size: the number of processes
    """

    def __init__(self, loader: Iterable[Any], rank: int = 0, size: int = 1) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"`loader` must be an iterable of batches, got {type(loader).__name__}")
        self.loader, self.rank, self.size = loader, rank, size
        self.total: int | None = length(loader)

    @property
    def own(self) -> int | None:
        """The number of batches that this process takes, if it is known."""
        return None if self.total is None else len(range(self.rank, self.total, self.size))

    def check_order(self) -> None:
        """Check that the batches are the same each time, in each process.

        Raises:
            ValueError: if the loader shuffles, or shares the data out itself
        """
        batches = getattr(self.loader, "batch_sampler", None)
        samplers = [getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        reasons = {
            RandomSampler: "draws its samples at random",
            WeightedRandomSampler: "draws its samples at random",
            DistributedSampler: "repeats samples to share them out evenly",
        }
        found = ((one, why) for one in samplers for kind, why in reasons.items() if isinstance(one, kind))
        sampler, why = next(found, (None, None))
        if why is not None:
            raise ValueError(
                f"`loader` has a {type(sampler).__name__}, which {why}; an evaluation that is resumed or shared by "
                "processes takes the same batches each time, and shares them out itself: make it with shuffle=False "
                "and no `sampler`"
            )

    def after(self, finished: int) -> Iterator[Any]:
        """Return this process's batches but for the first ``finished``.

        Raises:
            ValueError: on iteration, if the loader is found to give fewer
        """
        start = self.rank + finished * self.size
        loader = self.loader
        if start == 0 and self.size == 1:
            return iter(loader)
        if (
            type(loader) is DataLoader
            and loader.batch_sampler is not None
            and not isinstance(loader.dataset, IterableDataset)
        ):
            return iter(_with_batches(loader, list(islice(loader.batch_sampler, start, None, self.size))))
        return _skipping(loader, max(0, start - self.size + 1), start, self.size)


def _skipping(batches: Iterable[Any], finished: int, start: int, step: int) -> Iterator[Any]:
    """Yield each ``step``-th batch from ``start``; the first ``finished`` must exist."""
    rest = iter(batches)
    found = sum(1 for _ in islice(rest, finished))
    if found < finished:
        raise ValueError(f"`loader` gives {found} batches, but the checkpoint is of a run that has finished {finished}")
    yield from islice(rest, start - finished, None, step)


def _with_batches(loader: DataLoader[Any], batches: list[list[int]]) -> DataLoader[Any]:
    """Return a loader with the same options for some of the batches."""
    some = copy.copy(loader)
    vars(some).update(batch_sampler=batches, _iterator=None)  # the attributes of a loader refuse to be set
    return some


def length(batches: Any) -> int | None:
    """Return the number of batches or samples, if it is known."""
    try:
        return len(batches)
    except TypeError:  # generators have none, nor do loaders of iterable data sets that do not know theirs
        return None
