"""What a map is scored by: where it lies, beside the truth, and what the model makes of changed pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _quality_contest import Witness
from _quality_scenes import Task
from _quality_stats import Values
from torch import Tensor

from torchcam.metrics import ADCC, ARCC, ClassificationMetric, DeletionInsertionMetric, Localization

__all__ = [
    "CHUNK",
    "COLUMNS",
    "FAITH",
    "STEPS",
    "TOLERANCE",
    "TRUTH",
    "Board",
    "Column",
    "Entry",
    "judge_faith",
    "locate",
    "mean",
    "precisions",
    "ranked_by",
    "tasks_of",
]

TOLERANCE = 4  # pixels that a map may point beside the evidence: half a position of the coarsest maps
STEPS = 10  # of deletion and insertion
CHUNK = 32
softmax = partial(torch.softmax, dim=-1)


@dataclass(frozen=True)
class Column:
    """A score of the leaderboard.

    Attributes:
        task: the letter of the task it is about
        title: its title in the tables
        higher: whether a higher value is better
        chance: what a map that knows nothing gets, if that can be said
    """

    task: str
    title: str
    higher: bool = True
    chance: float | None = None


TRUTH = {
    "a ap": Column("a", "AP"),
    "a pointing": Column("a", "pointing"),
    "a energy": Column("a", "energy"),
    "a rank": Column("a", "rank accuracy"),
    "a overlap": Column("a", "best IoU"),
    "b ap": Column("b", "AP"),
    "b pointing": Column("b", "pointing", chance=0.5),
    "b energy": Column("b", "energy", chance=0.5),
    "c ap": Column("c", "AP"),
    "c pointing": Column("c", "pointing"),
    "c energy": Column("c", "energy"),
    "c digit": Column("c", "energy on the digit", higher=False),
    "d ap": Column("d", "AP", chance=0.25),
    "d pointing": Column("d", "pointing", chance=0.25),
    "d energy": Column("d", "energy", chance=0.25),
}
FAITH = {
    "avg_drop": Column("f", "average drop", higher=False),
    "conf_increase": Column("f", "increase"),
    "deletion_auc": Column("f", "deletion", higher=False),
    "insertion_auc": Column("f", "insertion"),
    "road": Column("f", "ROAD"),
    "adcc": Column("f", "ADCC"),
    "arcc": Column("f", "ARCC"),
}
COLUMNS = TRUTH | FAITH


def tasks_of(name: str) -> str:
    """Return the letters of the tasks that a model is asked in."""
    return "c" if name == "shortcut" else "abd"


def precisions(name: str) -> list[str]:
    """Return the average precisions of a model's tasks."""
    return [f"{letter} ap" for letter in tasks_of(name)]


def ranked_by(name: str) -> list[str]:
    """Return the scores that rank the methods of a model: those that no increasing change of a map can move."""
    return [f"{letter} {score}" for letter in tasks_of(name) for score in ("ap", "pointing")]


@dataclass
class Entry:
    """What a contestant got on one model.

    Attributes:
        kind: what it is, see `Contestant`
        layers: what it looked at
        cost: passes for a map
        values: by the name of a score, one number for each picture
        broken: the number of maps that were not finite
    """

    kind: str
    layers: str
    cost: str
    values: dict[str, Values]
    broken: int = 0


Board = dict[str, Entry]


def mean(entry: Entry, key: str) -> float:
    """Return the mean of a score over the pictures."""
    return float(np.nanmean(entry.values[key]))


def each_sample(metric: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Update a metric, and give what it computes for each sample by itself, (N,) each; NaN for one that it leaves out.

    All that a metric keeps are sums over samples: so sums of one sample each give its numbers for each.
    """
    parts: dict[str, Tensor] = {}

    def keep(found: Mapping[str, Tensor], valid: Tensor, **_counts: Tensor) -> None:
        for part in found.values():
            valid = valid & part.isfinite()
        parts.update({name: torch.where(valid, part, 0.0).double() for name, part in found.items()}, total=valid.long())

    metric._add = keep
    metric.update(*args, **kwargs)
    rows: list[dict[str, Tensor]] = []
    for row, total in enumerate(parts["total"]):
        for name, part in parts.items():
            setattr(metric, name, part[row])
        computed = type(metric).compute(metric)
        rows.append({name: torch.where(total > 0, value, torch.nan) for name, value in computed.items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def locate(maps: Tensor, task: Task, letter: str) -> dict[str, Tensor]:
    """Score maps by where they lie, each sample by itself."""

    def compare(masks: Tensor, region: Tensor | None = None, tolerance: float = 0) -> dict[str, Tensor]:
        metric = Localization(tolerance=tolerance)
        return each_sample(metric, task.images, maps=maps, masks=masks, region=region)

    region = task.masks | task.others if letter == "b" else None  # which of the two digits is meant?
    found = compare(task.masks, region, TOLERANCE if letter in "ac" else 0)
    names = {"average_precision": "ap", "pointing_game": "pointing", "energy": "energy"}
    if letter == "a":
        names |= {"rank_accuracy": "rank", "best_iou": "overlap"}
    scores = {f"{letter} {short}": found[name] for name, short in names.items()}
    if letter == "c":
        scores["c digit"] = compare(task.others)["energy"]
    return scores


def judge_faith(witness: Witness, maps: Tensor, task: Task) -> dict[str, Tensor]:
    """Score maps by what the model makes of changed pictures, each sample by itself, as probabilities."""
    metrics: tuple[Any, ...] = (
        ClassificationMetric(witness, softmax),
        DeletionInsertionMetric(witness, softmax, steps=STEPS, batch_size=64),
        ADCC(witness, softmax, batch_size=CHUNK),
        ARCC(witness, softmax, batch_size=CHUNK),
    )
    witness.truth = task.truth
    found: dict[str, Tensor] = {}
    for metric in metrics:
        found |= each_sample(metric, task.images, task.classes.tolist(), maps=maps)
    return {key: found[key] for key in FAITH}
