"""The loop over batches and methods; all metrics of a method measure the same maps."""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from torchcam import __version__
from torchcam._checks import callable_object, one_of, positive_integer, torch_module
from torchcam._methods import takes
from torchcam._passes import model_device
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import map_tensors
from torchcam.layers import TargetLayer
from torchcam.metrics.core import explaining, maps_of, with_logits
from torchcam.targets import class_scores

from ._checkpoint import Checkpoint, checksum, describe
from ._contestants import Contestant, LogitsFn, error_note, generators_of, make_contestants, metric_options
from ._data import Batch, Stream, length
from ._result import Evaluation, MethodResult
from ._team import Team

ClassSource = Literal["label", "predicted"]


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    methods: Any,
    metrics: Any = ("ClassificationMetric", "DeletionInsertionMetric"),
    *,
    target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
    logits_fn: LogitsFn | None = None,
    class_source: ClassSource = "label",
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    progress: bool = False,
    distributed: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure the maps of several methods by several metrics, over a data set.

    Each batch is explained once by each method, and all its metrics measure the same maps. The model runs in evaluation
    mode on its own device, and is left as it was. Samples whose map is not finite are counted and left out of all
    metrics.

    With a ``checkpoint``, the sums are saved after each batch: after an interruption, the same call resumes after the
    last finished batch, and the result is the same to the bit. All settings must be the same, and each bit of the
    model. Functions are compared by their names, and of the data only type and number.

    In a process group (``torchrun``), each process takes every n-th batch and all get the same result. No sample is
    repeated, and the batches are those of a single process, so that its result differs by rounding only (but for
    extractors with a moving ``generator``). The processes go in step, and an error in one ends all of them.

    Args:
        model: the model
        loader: a ``DataLoader`` or any iterable of batches: (input, class), (input, class, {name: more}), dicts such as
            {"image": ..., "label": ...}, or inputs alone. Named values are passed to each metric that takes them, such
            as the ``masks`` of :class:`torchcam.metrics.Localization`.
        methods: names or classes of :mod:`torchcam.methods`, extractors on ``model``, or functions from the model to an
            extractor, such as ``partial(GradCAM, target_layer="layer4")``; in a dict, by their names in the table
        metrics: names or classes of :mod:`torchcam.metrics`, or functions from an extractor to a
            :class:`torchmetrics.Metric` whose ``update`` takes ``(input, class_idx)`` and preferably ``maps=``
        target_layer: the layer(s) for methods that are given by name or class, as they take them
        logits_fn: for metrics that are given by name or class, the function from the model's output to the scores, such
            as a softmax; the maps explain the score after it
        class_source: whether to explain the class that comes with an input, or the one that the model predicts
        batch_size: largest number of inputs in one pass, for the methods and metrics that run many; by default theirs
        checkpoint: a folder to save the finished batches in
        keep_checkpoint: whether to keep the checkpoint in the end, or else to remove it
        progress: whether to show a progress bar with the time left
        distributed: whether to share the work with the other processes; by default, if there is a process group
        settings: more about the evaluation, to be compared with the checkpoint's and recorded in the result: what a
            JSON file can hold

    Returns:
        the table

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a name is unknown, ``loader`` yields no batches or no labels, or shuffles where it must not, or
            the checkpoint belongs to another evaluation
        RuntimeError: if another process has failed

    Example:
        >>> import torch
        >>> from torchcam import evaluate
        >>> from torchcam.demo import load_model, sample_images
        >>> batches = [(sample.to_tensor(), [sample.labels[0]]) for sample in sample_images()]
        >>> methods = ["GradCAM", "RandomCAM"]
        >>> result = evaluate(load_model(), batches, methods, target_layer="layer4", logits_fn=torch.sigmoid)
        >>> result["GradCAM", "avg_drop"] < result["RandomCAM", "avg_drop"]
        True
    """
    torch_module("model", model)
    one_of("class_source", class_source, ("label", "predicted"))
    callable_object("logits_fn", logits_fn, optional=True)
    if batch_size is not None:
        positive_integer("batch_size", batch_size)
    model = getattr(model, "_orig_mod", model)
    team = Team(distributed)
    with ExitStack() as stack, normal_mode(graph=False):
        with team.telling_errors():
            stream = Stream(loader, team.rank, team.size)
            contestants = make_contestants(
                stack, model, methods, metrics, target_layer=target_layer, logits_fn=logits_fn, batch_size=batch_size
            )
            saved = None if checkpoint is None else Checkpoint(checkpoint, team.rank, team.size)
            run = _Run(model, stream, contestants, logits_fn, class_source, team, saved, settings)
            run.resume()
        team.step(working=True, failed=False)
        if not team.agree(zlib.crc32(json.dumps(run.settings, sort_keys=True).encode())):
            raise ValueError("the processes of the group were given different settings, models or data")
        run.run_batches(progress)
        result = run.result()
        if saved is not None and not keep_checkpoint:
            team.sum(torch.zeros(1))  # waits until all processes have the result
            saved.remove()
    return result


def discard_checkpoint(checkpoint: str | Path) -> None:
    """Remove the files that :func:`evaluate` has saved in a folder, and the folder if nothing else is in it."""
    Checkpoint(checkpoint).remove()


@dataclass
class _Run:
    """An evaluation and its progress."""

    model: nn.Module
    stream: Stream
    contestants: Sequence[Contestant]
    logits_fn: LogitsFn | None
    class_source: str
    team: Team
    checkpoint: Checkpoint | None
    more: Mapping[str, Any] | None
    finished: int = 0

    def __post_init__(self) -> None:
        self.device = model_device(self.model)
        # The numbers of samples and of those predicted as explained; of each method: maps of NaN, seconds.
        self.tally = torch.zeros(2 + 2 * len(self.contestants), dtype=torch.float64)
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        """Return a description of the evaluation, the same in every run, as JSON can hold it."""
        loader, first = self.stream.loader, self.contestants[0]
        dataset = getattr(loader, "dataset", None)
        record: dict[str, Any] = {
            "torchcam": __version__,
            "model": {"class": describe(type(self.model)), "checksum": checksum(self.model)},
            "methods": {one.name: one.description for one in self.contestants},
            "metrics": {
                name: {"made_by": first.descriptions[name], "class": describe(type(metric)), **metric_options(metric)}
                for name, metric in first.metrics.items()
            },
            "logits_fn": None if self.logits_fn is None else describe(self.logits_fn),
            "class_source": self.class_source,
            "data": {
                "loader": describe(type(loader)),
                "dataset": None if dataset is None else describe(type(dataset)),
                "samples": length(dataset),
                "batches": self.stream.total,
                "batch_size": getattr(loader, "batch_size", None),
            },
            "processes": self.team.size,
        }
        if self.more is not None:
            record["settings"] = dict(self.more)
        try:
            plain: dict[str, Any] = json.loads(json.dumps(record))
        except (TypeError, ValueError) as error:
            raise TypeError(f"`settings` must be what a JSON file can hold: {error}") from error
        return plain

    # The checkpoint.

    def resume(self) -> None:
        """Restore the state that an earlier run has saved."""
        if self.team.size > 1 or self.checkpoint is not None:
            self.stream.check_order()
        if self.checkpoint is None or (state := self.checkpoint.load(self.settings)) is None:
            return
        if (flaw := self._flaw(state)) is not None:
            raise self.checkpoint.refusal(f"holds {flaw}, which this evaluation cannot have saved")
        self.finished = state["finished"]
        self.tally = state["tally"]
        for one, states, generators in zip(self.contestants, state["states"], state["generators"], strict=True):
            for name, metric in one.metrics.items():
                to_device = methodcaller("to", metric.device)
                metric.load_state_dict(map_tensors(to_device, states[name]))
            for number, generator in enumerate(generators_of(one.extractor)):
                generator.set_state(generators[number])

    def _flaw(self, state: Mapping[str, Any]) -> str | None:
        """Return what in a state cannot be that of this evaluation, None if all of it can."""
        finished, own = state.get("finished"), self.stream.own
        if type(finished) is not int or finished < 0 or (own is not None and finished > own):
            return f"finished={finished!r}" + ("" if own is None else f" of {own} batches")
        wrong = [key for key, value in self._state(0).items() if not _alike(state.get(key), value)]
        if not wrong:
            tally = state["tally"]
            possible = tally.shape == self.tally.shape and bool((tally >= 0).all()) and (tally[0] > 0) == (finished > 0)
            wrong = [] if possible else ["tally"]
        return f"an impossible '{wrong[0]}'" if wrong else None

    def _state(self, finished: int) -> dict[str, Any]:
        """Return the state after a number of batches."""
        return {
            "finished": finished,
            "tally": self.tally,
            "states": [{name: metric.state_dict() for name, metric in one.metrics.items()} for one in self.contestants],
            "generators": [
                dict(enumerate(generator.get_state() for generator in generators_of(one.extractor)))
                for one in self.contestants
            ],
        }

    # The batches.

    def run_batches(self, progress: bool) -> None:
        """Measure one batch after the other, in step with the other processes; each method of a batch is one map."""
        tqdm = import_module("tqdm.auto" if progress else "tqdm").tqdm  # the former warns in some notebooks
        own, steps = self.stream.own, len(self.contestants)
        bar_format = None if own is None else "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
        with tqdm(
            total=None if own is None else own * steps,
            initial=self.finished * steps,
            bar_format=bar_format,
            unit="map",
            smoothing=0.05,
            leave=False,
            disable=not progress or self.team.rank > 0,
        ) as bar:
            try:
                batches = self.stream.after(self.finished)
                working = True
                while self.team.step(working=working, failed=False):
                    with self.team.telling_errors():
                        raw = next(batches, None) if working else None
                        working = raw is not None
                        if working:
                            self._measure(raw, bar)
                            if self.checkpoint is not None:
                                self.checkpoint.save(self.settings, **self._state(self.finished + 1))
                            self.finished += 1  # not earlier: the note on an interrupt says what is saved
            except BaseException as error:
                done = f"{self.finished} {'batches' if own is None else f'of {own} batches'}"
                saved = "" if self.checkpoint is None else f", and are kept in '{self.checkpoint.folder}'"
                whose = f"process {self.team.rank}: " if self.team.together else ""
                error.add_note(f"{whose}{done} were finished{saved}")
                raise

    def _measure(self, raw: Any, bar: Any) -> None:
        """Explain a batch by each method, and measure the maps."""
        batch = Batch.read(raw, self.device)
        with replicated(self.model) as model, torch.inference_mode():
            output = with_logits(self.logits_fn, model(batch.image))
            predicted: list[int] = class_scores(output).argmax(1).tolist()
        classes = predicted if self.class_source == "predicted" else batch.labels
        if classes is None:
            raise ValueError(
                "`loader` gives inputs without classes: pass class_source='predicted' to explain what the model "
                "predicts"
            )
        self.tally[0] += len(classes)
        self.tally[1] += sum(a == b for a, b in zip(classes, predicted, strict=True))
        own = self.stream.own
        place = f"batch {self.finished + 1} of this process"
        for number, one in enumerate(self.contestants):
            bar.set_description(f"batch {self.finished + 1}{'' if own is None else f' of {own}'}, {one.name}")
            with error_note(f"the method {one.name}, {place}"):
                started = self._now()
                found = self._explain(one, batch.image, classes, self.logits_fn)
                self.tally[3 + 2 * number] += self._now() - started
            self.tally[2 + 2 * number] += int((~found.flatten(1).isfinite().all(1)).sum())
            maps = {id(self.logits_fn): found}
            for name, metric in one.metrics.items():
                options = {key: value for key, value in batch.extras.items() if takes(metric.update, key)}
                with error_note(f"the metric {name} of the method {one.name}, {place}"):
                    if takes(metric.update, "maps"):
                        logits_fn = getattr(metric, "logits_fn", self.logits_fn)
                        if id(logits_fn) not in maps:
                            maps[id(logits_fn)] = self._explain(one, batch.image, classes, logits_fn)
                        options["maps"] = maps[id(logits_fn)]
                    metric.update(batch.image, classes, **options)
            bar.update()

    def _explain(self, one: Contestant, image: Tensor, classes: list[int], logits_fn: LogitsFn | None) -> Tensor:
        """Return the maps of a batch, (N, *spatial)."""
        with normal_mode(graph=False), explaining(one.extractor, logits_fn) as extractor:
            return maps_of(extractor, extractor.model(image), image, class_idx=classes)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # The result.

    def result(self) -> Evaluation:
        """Return the table of all processes."""
        tally = self.team.sum(self.tally).tolist()
        num_samples = int(tally[0])
        if not num_samples:
            raise ValueError("`loader` gives no batches: there is nothing to evaluate")
        entries, directions = {}, {}
        for number, one in enumerate(self.contestants):
            values: dict[str, dict[str, float]] = {}
            counts: dict[str, dict[str, int]] = {"total": {}, "nan_count": {}, "empty_count": {}}
            for name, metric in one.metrics.items():
                values[name] = self._compute(name, metric)
                by_key = getattr(metric, "key_higher_is_better", {})
                directions[name] = {key: by_key.get(key, metric.higher_is_better) for key in values[name]}
                for state, of_metrics in counts.items():
                    if isinstance(count := getattr(metric, state, None), Tensor):
                        of_metrics[name] = int(self.team.sum(count.cpu()))
            nan_maps, seconds = tally[2 + 2 * number : 4 + 2 * number]
            measured, left_out, empty = counts.values()
            entries[one.name] = MethodResult(values, measured, left_out, empty, int(nan_maps), seconds / num_samples)
        return Evaluation(
            methods=entries,
            higher_is_better=directions,
            num_samples=num_samples,
            agreement=tally[1] / num_samples,
            settings=self.settings,
        )

    def _compute(self, name: str, metric: Metric) -> dict[str, float]:
        """Return the values of a metric over the samples of all processes."""
        metric.distributed_available_fn = lambda: self.team.together
        metric.to(self.team.device)
        with warnings.catch_warnings(), self.team.watching():
            # A process may have had no batch, or those of an earlier run.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            computed = metric.compute()
        values = computed if isinstance(computed, Mapping) else {name: computed}
        try:
            return {str(key): float(value) for key, value in values.items()}
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"the metric {name} does not compute single numbers: {error}") from error


def _alike(found: Any, expected: Any) -> bool:
    """Check whether a structure has the keys, lengths and types of another, whose empty lists stand for any."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_alike(found[key], value) for key, value in expected.items())
    if isinstance(expected, list) and expected:
        return len(found) == len(expected) and all(map(_alike, found, expected))
    return True
