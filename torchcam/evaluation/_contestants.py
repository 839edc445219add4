"""The methods and metrics of an evaluation: from names, classes and factories to extractors and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from torchcam import methods as all_methods
from torchcam import metrics as all_metrics
from torchcam.layers import TargetLayer
from torchcam.methods.core import _CAM
from torchcam.metrics.core import CAMMetric

from ._checkpoint import describe

__all__ = ["Contestant", "LogitsFn", "find_class", "make_contestants", "named", "plain_attributes"]

LogitsFn = Callable[[Any], Any]


@dataclass
class Contestant:
    """A method, with the metrics that measure it.

    Attributes:
        name: its name in the table
        extractor: the extractor
        metrics: the metrics, by their names
        accepted: what the `update` of each metric takes beside the input and the class
        description: what it was made from, the same in every run
        descriptions: the same for each metric
    """

    name: str
    extractor: Any
    metrics: dict[str, Metric]
    description: str
    descriptions: dict[str, str]
    accepted: dict[str, set[str]] = field(default_factory=dict)

    @property
    def generators(self) -> list[torch.Generator]:
        """The random number generators that the extractor draws from, whose state moves on from batch to batch."""
        parts = [self.extractor, getattr(self.extractor, "base_cam", None)]
        found = (getattr(part, "generator", None) for part in parts)
        return [generator for generator in found if isinstance(generator, torch.Generator)]


def named(what: str, entries: Any, module: ModuleType) -> dict[str, Any]:
    """Give entries by their names in the table; a name alone stands for what is called so.

    Raises:
        TypeError: if ``entries`` is neither a sequence nor a mapping
        ValueError: if there are none, a name is unknown, or two entries have the same name
    """
    if isinstance(entries, Mapping):
        items = [(str(name), entry) for name, entry in entries.items()]
    elif isinstance(entries, str) or not isinstance(entries, Iterable):
        items = [("", entries)]
    else:
        items = [("", entry) for entry in entries]
    if not items:
        raise ValueError(f"`{what}` is empty: name at least one")
    found: dict[str, Any] = {}
    for name, entry in items:
        if isinstance(entry, str):
            entry = find_class(what, entry, module)
        elif not callable(entry):
            raise TypeError(f"`{what}` must hold names, classes, objects or functions that make them, got {entry!r}")
        name = name or _name_of(entry)
        if name in found:
            raise ValueError(f"`{what}` has two entries named '{name}': pass a dict that gives each a name of its own")
        found[name] = entry
    return found


def _name_of(entry: Any) -> str:
    while isinstance(entry, partial):
        entry = entry.func
    return getattr(entry, "__name__", None) or type(entry).__name__


def find_class(what: str, name: str, module: ModuleType) -> Any:
    """Find a method or metric by its name, as papers write it or as Python does.

    Raises:
        ValueError: if there is none
    """
    known = {_plain_name(entry): entry for entry in module.__all__ if isinstance(getattr(module, entry), type)}
    wanted = _plain_name(name)
    if wanted in known:
        return getattr(module, known[wanted])
    close = [known[match] for match in get_close_matches(wanted, known, n=3, cutoff=0.5)]
    there = f"closest: {', '.join(close)}" if close else f"there are {', '.join(sorted(known.values()))}"
    raise ValueError(f"`{what}` names '{name}', which is not in {module.__name__}; {there}")


def _plain_name(name: str) -> str:
    # Papers write Grad-CAM++, Python cannot.
    name = name.lower().replace("+", "p").replace("-", "").replace("_", "").replace(" ", "").replace("/", "")
    return name.removesuffix("metric")


def make_contestants(
    stack: ExitStack,
    model: nn.Module,
    methods: Any,
    metrics: Any,
    *,
    target_layer: TargetLayer | Sequence[TargetLayer] | None,
    logits_fn: LogitsFn | None,
    batch_size: int | None,
    device: torch.device,
) -> list[Contestant]:
    """Make the extractors, which leave the model with ``stack``, and the metrics of each."""
    found = {name: find_metric(entry) for name, entry in named("metrics", metrics, all_metrics).items()}
    contestants = []
    for name, entry in named("methods", methods, all_methods).items():
        extractor = _make_extractor(stack, model, name, entry, target_layer, batch_size)
        made = {metric: _make_metric(metric, make, extractor, logits_fn, batch_size) for metric, make in found.items()}
        for metric in made.values():
            metric.to(device).persistent(True)
        accepted = {metric: _accepted(made[metric]) for metric in made}
        sources = {metric: describe(make) for metric, make in found.items()}
        source = f"{describe(entry)}: {describe(extractor)}"
        contestants.append(Contestant(name, extractor, made, source, sources, accepted))
    return contestants


def find_metric(entry: Any) -> Any:
    """Check that an entry makes metrics."""
    if isinstance(entry, Metric):
        raise TypeError(
            f"`metrics` holds the object {type(entry).__name__}(), but each method needs one of its own: pass the "
            "class, or a function from an extractor to a metric"
        )
    return entry


def _make_extractor(
    stack: ExitStack,
    model: nn.Module,
    name: str,
    entry: Any,
    target_layer: TargetLayer | Sequence[TargetLayer] | None,
    batch_size: int | None,
) -> Any:
    made = hasattr(entry, "fuse_cams") and hasattr(entry, "model") and not isinstance(entry, type)
    if made:
        extractor = entry
    else:
        options: dict[str, Any] = {}
        of_ours = _class_of(entry)
        if (of_ours is not None and issubclass(of_ours, _CAM)) or _takes(entry, "target_layer"):
            if target_layer is not None and "target_layer" not in getattr(entry, "keywords", {}):
                options["target_layer"] = target_layer
            if batch_size is not None and _takes(entry, "batch_size"):
                options["batch_size"] = batch_size
        with plainly(f"the method {name}"):
            extractor = entry(model, **options)
    missing = [part for part in ("model", "fuse_cams", "__call__") if not hasattr(extractor, part)]
    if missing:
        raise TypeError(
            f"`methods` entry '{name}' gives {type(extractor).__name__}, which is no extractor: it lacks "
            f"{', '.join(missing)}"
        )
    if extractor.model is not getattr(model, "_orig_mod", model):
        raise ValueError(f"`methods` entry '{name}' watches another model than `model`")
    if not made and hasattr(extractor, "__exit__"):
        stack.enter_context(extractor)
    return extractor


def _make_metric(name: str, entry: Any, extractor: Any, logits_fn: LogitsFn | None, batch_size: int | None) -> Metric:
    options: dict[str, Any] = {}
    if _class_of(entry) is not None:
        options = {
            option: value
            for option, value in (("logits_fn", logits_fn), ("batch_size", batch_size))
            if value is not None and _takes(entry, option) and option not in getattr(entry, "keywords", {})
        }
    with plainly(f"the metric {name}"):
        metric = entry(extractor, **options)
    if not isinstance(metric, Metric):
        raise TypeError(f"`metrics` entry '{name}' must make a torchmetrics.Metric, got {type(metric).__name__}")
    return metric


class plainly:  # noqa: N801 - reads as a statement
    """Say what was being made or done when an error came up."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, Exception):
            error.add_note(f"torchcam.evaluate: this came up in {self.what}")


def _class_of(entry: Any) -> type | None:
    """Give the class that an entry is, or a partial of."""
    while isinstance(entry, partial):
        entry = entry.func
    return entry if isinstance(entry, type) else None


def _takes(function: Any, option: str) -> bool:
    try:
        return option in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _accepted(metric: Metric) -> set[str]:
    """Give the names of what a metric's update takes."""
    return set(inspect.signature(metric.update).parameters)


def plain_attributes(metric: Metric) -> dict[str, Any]:
    """Give the options of a metric for the record: plain values, and descriptions of callables and tensors."""
    common = vars(_Bare())
    plain = {
        name: value
        for name, value in vars(metric).items()
        if not name.startswith("_") and name not in common and isinstance(value, (bool, int, float, str, tuple, list))
    }
    options = metric._subject.options if isinstance(metric, CAMMetric) else {}
    described = {name: value if isinstance(value, str) else describe(value) for name, value in options.items()}
    return plain | {name: text for name, text in described.items() if options[name] is not None}


class _Bare(Metric):
    """A metric without options."""

    def update(self) -> None:
        """Take nothing."""

    def compute(self) -> None:
        """Give nothing."""
