"""The methods and metrics of an evaluation: from names, classes and factories to extractors and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from torchcam import methods as all_methods
from torchcam import metrics as all_metrics
from torchcam._methods import takes
from torchcam._names import closest, match_name
from torchcam._passes import model_device
from torchcam.layers import TargetLayer
from torchcam.methods.core import _CAM
from torchcam.metrics.core import missing_parts

from ._checkpoint import describe

LogitsFn = Callable[[Any], Any]


@dataclass
class Contestant:
    """A method, with the metrics that measure it.

    Attributes:
        name: its name in the table
        extractor: the extractor
        metrics: the metrics, by their names
        description: what the extractor was made from, the same in every run
        descriptions: the same for each metric
    """

    name: str
    extractor: Any
    metrics: dict[str, Metric]
    description: str
    descriptions: dict[str, str]


def generators_of(extractor: Any) -> Iterator[torch.Generator]:
    """Yield the random number generators of an extractor and of those that it wraps: their states change."""
    for value in vars(extractor).values():
        if isinstance(value, torch.Generator):
            yield value
        elif hasattr(value, "fuse_cams") and not isinstance(value, type):
            yield from generators_of(value)


def _named(what: str, entries: Any, module: ModuleType) -> dict[str, Any]:
    """Return entries by their names in the table, with classes in the place of names.

    Raises:
        TypeError: if ``entries`` is neither a sequence nor a mapping
        ValueError: if there are none, a name is unknown, or two entries have the same name
    """
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        entries = [entries]
    items = list(entries.items()) if isinstance(entries, Mapping) else [("", entry) for entry in entries]
    if not items:
        raise ValueError(f"`{what}` is empty: name at least one")
    found: dict[str, Any] = {}
    for name, entry in items:
        if isinstance(entry, str):
            entry = find_class(what, entry, module)
        elif not callable(entry):
            raise TypeError(f"`{what}` must hold names, classes, objects or functions that make them, got {entry!r}")
        function = _unwrapped(entry)
        name = str(name) or getattr(function, "__name__", None) or type(function).__name__
        if name in found:
            raise ValueError(f"`{what}` has two entries named '{name}': pass a dict that gives each a name of its own")
        found[name] = entry
    return found


def find_class(what: str, name: str, module: ModuleType) -> Any:
    """Find a method or metric by its name, as papers write it or as Python does.

    Raises:
        ValueError: if there is none
    """
    names = [entry for entry in module.__all__ if isinstance(getattr(module, entry), type)]
    found = match_name(name, names) or match_name(f"{name}Metric", names)
    if found is None:
        raise ValueError(f"`{what}` names '{name}', which is not in {module.__name__}; {closest(name, names)}")
    return getattr(module, found)


def make_contestants(
    stack: ExitStack,
    model: nn.Module,
    methods: Any,
    metrics: Any,
    *,
    target_layer: TargetLayer | Sequence[TargetLayer] | None,
    logits_fn: LogitsFn | None,
    batch_size: int | None,
) -> list[Contestant]:
    """Make the extractors, whose hooks are removed with ``stack``, and the metrics of each."""
    makers = _named("metrics", metrics, all_metrics)
    for maker in makers.values():
        if isinstance(maker, Metric):
            raise TypeError(
                f"`metrics` holds the object {type(maker).__name__}(), but each method needs one of its own: pass the "
                "class, or a function from an extractor to a metric"
            )
    device = model_device(model)
    sources = {name: describe(maker) for name, maker in makers.items()}
    contestants = []
    for name, entry in _named("methods", methods, all_methods).items():
        extractor = _make_extractor(stack, model, name, entry, target_layer, batch_size)
        made = {}
        for key, maker in makers.items():
            is_class = isinstance(_unwrapped(maker), type)
            options = _missing_options(maker, logits_fn=logits_fn, batch_size=batch_size) if is_class else {}
            with error_note(f"the metric {key}"):
                metric = maker(extractor, **options)
            if not isinstance(metric, Metric):
                raise TypeError(f"`metrics` entry '{key}' must make a torchmetrics.Metric, got {type(metric).__name__}")
            metric.persistent(True)
            made[key] = metric.to(device if device.type == "cuda" else "cpu")
        contestants.append(Contestant(name, extractor, made, f"{describe(entry)}: {describe(extractor)}", sources))
    return contestants


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
        method, layers = _unwrapped(entry), inspect.signature(entry).parameters.get("target_layer")
        if layers is not None or (isinstance(method, type) and issubclass(method, _CAM)):
            options = _missing_options(entry, batch_size=batch_size)
            is_required = layers is not None and layers.default is layers.empty
            if (target_layer is not None or is_required) and "target_layer" not in getattr(entry, "keywords", {}):
                options["target_layer"] = target_layer
        with error_note(f"the method {name}"):
            extractor = entry(model, **options)
    missing = missing_parts(extractor)
    if missing:
        raise TypeError(
            f"`methods` entry '{name}' gives {type(extractor).__name__}, which is no extractor: it lacks "
            f"{', '.join(missing)}"
        )
    if extractor.model is not model:
        raise ValueError(f"`methods` entry '{name}' watches another model than `model`")
    if not made and hasattr(extractor, "__exit__"):
        stack.enter_context(extractor)
    return extractor


@contextmanager
def error_note(what: str) -> Iterator[None]:
    """Add a note to an exception: what was being made or done."""
    try:
        yield
    except Exception as error:
        error.add_note(f"torchcam.evaluate: this came up in {what}")
        raise


def _unwrapped(entry: Any) -> Any:
    """Return the class or function that an entry is, or a partial of."""
    while isinstance(entry, partial):
        entry = entry.func
    return entry


def _missing_options(entry: Any, **options: Any) -> dict[str, Any]:
    """Return the options that are not None, that an entry takes, and that it is not a partial with."""
    bound = getattr(entry, "keywords", {})
    return {
        name: value for name, value in options.items() if value is not None and name not in bound and takes(entry, name)
    }


def metric_options(metric: Metric) -> dict[str, Any]:
    """Return the options of a metric for the record: plain values, and descriptions of callables and tensors."""
    found = {}
    for name in inspect.signature(type(metric)).parameters:
        value = getattr(metric, name, None)
        if isinstance(value, (bool, int, float, str, tuple, list)):
            found[name] = value
        elif name != "cam_extractor" and (callable(value) or isinstance(value, torch.Tensor)):
            found[name] = describe(value)
    return found
