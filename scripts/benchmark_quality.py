"""Score the maps of all methods where the truth is known, and by metrics that do without; write the leaderboard.

Pictures, models and numbers come from seeds; nothing is downloaded. The pictures hold handwriting that no model was
trained on. The models' weights lie in `scripts/quality_models`; `--train` trains them again.

The exit code is 1 if a check fails for a reason that the page does not give: see `EXPLAINED`.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _quality_contest import BASELINES, Contestant, Witness, contestants, count_passes
from _quality_models import MODELS, WEIGHTS, load, predict, train, what_it_relies_on
from _quality_scenes import Task, grids, one_digit, shortcut, two_digits
from _quality_stats import Values, group_means, interval, rank_agreement
from torch import Tensor, nn
from tqdm import tqdm

from torchcam.metrics import ADCC, ARCC, ClassificationMetric, DeletionInsertionMetric, Localization

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
TOLERANCE = 4  # pixels that a map may point beside the evidence: half a position of the maps
STEPS = 10  # of deletion and insertion
CHUNK = 32
RESAMPLES = 2000
QUICK = ("truth", "random", "centre", "edges", "MeanActivation", "EigenCAM", "GradCAM", "LayerCAM", "LeGrad")
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
    "a energy": Column("a", "energy"),
    "a pointing": Column("a", "pointing"),
    "a rank": Column("a", "rank accuracy"),
    "a overlap": Column("a", "best IoU"),
    "b energy": Column("b", "energy", chance=0.5),
    "b pointing": Column("b", "pointing", chance=0.5),
    "c energy": Column("c", "energy"),
    "c pointing": Column("c", "pointing"),
    "c digit": Column("c", "energy on the digit", higher=False),
    "d energy": Column("d", "energy", chance=0.25),
    "d pointing": Column("d", "pointing", chance=0.25),
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
MAIN = {"shortcut": ("c energy",)}  # what ranks the methods of a model; of the others, the three below
MAIN_OF_OTHERS = ("a energy", "b energy", "d energy")
TASKS: dict[str, tuple[Callable[[int, int], Task], int]] = {
    "a": (one_digit, 20_001),
    "b": (two_digits, 20_002),
    "c": (shortcut, 20_003),
    "d": (grids, 20_004),
}


# Gradient methods that do not beat the random map on two digits by a wide margin. The page says why.
EXPLAINED = {
    "cnn": {"FullGrad"},
    "vit": {
        "AugmentedCAM",
        "EigenSmoothedCAM",
        "FullGrad",
        "GradCAMElementWise",
        "GradCAMpp",
        "GroupCAM",
        "GuidedBackprop",
        "LeGrad",
        "RefineCAM",
        "SegEigenCAM",
        "SmoothGradCAMpp",
        "XGradCAM",
    },
}


@dataclass(frozen=True)
class Check:
    """Something that a sound benchmark must show.

    Attributes:
        what: what was checked
        good: whether it is so
        found: what was found
        explained: whether all that speaks against it is explained
    """

    what: str
    good: bool
    found: str
    explained: bool = False


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


# Measuring


def each_sample(metric: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Update a metric, and give what it computes for each sample by itself, (N,) each; NaN for one that it leaves out.

    All that a metric keeps are sums over samples, and what it computes is made of them element by element: so sums of
    one sample each, side by side, give its numbers for each.
    """
    parts: dict[str, Tensor] = {}

    def keep(found: Mapping[str, Tensor], valid: Tensor, **_counts: Tensor) -> None:
        for part in found.values():
            valid = valid & part.isfinite()
        parts.update({name: torch.where(valid, part, 0.0).double() for name, part in found.items()}, total=valid.long())

    metric._add = keep
    metric.update(*args, **kwargs)
    for name, part in parts.items():
        setattr(metric, name, part)
    values: dict[str, Tensor] = type(metric).compute(metric)
    return {name: torch.where(parts["total"] > 0, value, torch.nan) for name, value in values.items()}


def locate(maps: Tensor, task: Task, letter: str) -> dict[str, Tensor]:
    """Score maps by where they lie, each sample by itself."""

    def compare(cam: Tensor, masks: Tensor, tolerance: float = 0) -> dict[str, Tensor]:
        return each_sample(Localization(tolerance=tolerance), task.images, maps=cam, masks=masks)

    if letter == "b":  # on the two digits alone: what part is on the right one, and which has the highest point
        found = compare(maps * (task.masks | task.others), task.masks)
        blank = (maps * (task.masks | task.others)).flatten(1).amax(1) <= 0  # nothing on either: no preference
        return {
            "b energy": found["energy"].where(~blank, 0.5),
            "b pointing": found["pointing_game"].where(~blank, 0.5),
        }
    found = compare(maps, task.masks, 0 if letter == "d" else TOLERANCE)
    scores = {f"{letter} energy": found["energy"], f"{letter} pointing": found["pointing_game"]}
    if letter == "a":
        scores |= {"a rank": found["rank_accuracy"], "a overlap": found["best_iou"]}
    if letter == "c":
        scores["c digit"] = compare(maps, task.others)["energy"]
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


def chunks(task: Task) -> list[Task]:
    """Split a task."""
    return [task[slice(start, start + CHUNK)] for start in range(0, len(task), CHUNK)]


def measure(name: str, model: nn.Module, one: Contestant, tasks: Mapping[str, Task], num_faith: int) -> Entry:
    """Ask a contestant about all pictures, and score its maps."""
    any_task = next(iter(tasks.values()))
    cost = str(count_passes(name, model, one, any_task.images[:4], any_task.classes[:4]))
    witness = Witness(copy.deepcopy(model), one.explain)
    found: dict[str, list[Tensor]] = {}
    groups: dict[str, Tensor] = {}
    broken = 0
    for letter, task in tasks.items():
        ids: Tensor = torch.unique(task.groups)
        task = task[torch.isin(task.groups, ids[: max(1, round(one.share * len(ids)))])]
        faithful = task[torch.isin(task.groups, ids[: max(1, round(one.share * num_faith))])]
        groups[letter] = task.groups
        maps = torch.cat([one.explain(part.images, part.classes, part.truth) for part in chunks(task)])
        broken += int((~maps.flatten(1).isfinite().all(1)).sum())
        for key, value in locate(maps, task, letter).items():
            found.setdefault(key, []).append(value)
        if letter in "ac":
            groups["f"] = faithful.groups
            start = 0
            for part in chunks(faithful):
                for key, value in judge_faith(witness, maps[start : start + len(part)], part).items():
                    found.setdefault(key, []).append(value)
                start += len(part)
    witness.remove()
    one.remove()
    values = {
        key: group_means(torch.cat(parts).double().numpy(), groups[COLUMNS[key].task].numpy())
        for key, parts in found.items()
    }
    return Entry(one.kind, one.layers, cost, values, broken)


def make_tasks(name: str, model: nn.Module, num_pictures: int) -> tuple[dict[str, Task], dict[str, str]]:
    """Make the pictures in which a model sees all that is asked about, and say what share of all those are."""
    tasks, kept = {}, {}
    for letter in "c" if name == "shortcut" else "abd":
        make, seed = TASKS[letter]
        wanted = max(num_pictures // 2, 1) if letter == "b" else num_pictures  # two questions about each picture
        pool = make(2 * wanted + 8, seed)
        tasks[letter] = pool.found_by(predict(model, pool.images), wanted)
        seen = len(pool.found_by(predict(model, pool.images), len(pool)))
        kept[letter] = f"{seen / len(pool):.0%}"
    return tasks, kept


def run(
    name: str,
    model: nn.Module,
    num_pictures: int,
    num_faith: int,
    only: Sequence[str] | None = None,
    path: Path | None = None,
) -> tuple[Board, dict[str, str]]:
    """Score everyone on a model; numbers that are in the file ``path`` are taken from there, and others added to it."""
    tasks, seen = make_tasks(name, model, num_pictures)
    done = {} if path is None or not path.is_file() else read(path)
    board = {}
    with tqdm(contestants(name, model, only), desc=name, unit="method") as progress:
        for one in progress:
            progress.set_postfix_str(one.name)
            board[one.name] = done.get(one.name) or measure(name, model, one, tasks, num_faith)
            if path is not None:
                write(path, done | board)
    return board, seen


def write(path: Path, board: Board) -> None:
    """Write each picture's numbers."""
    entries = {
        one: {**vars(entry), "values": {key: values.tolist() for key, values in entry.values.items()}}
        for one, entry in board.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")


def read(path: Path) -> Board:
    """Read what `write` wrote."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        one: Entry(**{**entry, "values": {key: np.array(values) for key, values in entry["values"].items()}})
        for one, entry in entries.items()
    }


# Results


def mean(entry: Entry, key: str) -> float:
    """Return the mean of a score over the pictures."""
    return float(np.nanmean(entry.values[key]))


def ranking(boards: Mapping[str, Board]) -> dict[str, float]:
    """Return each contestant's mean rank over the main scores of all models that it applies to, as a share of them."""
    ranks: dict[str, list[float]] = {}
    for name, board in boards.items():
        for key in MAIN.get(name, MAIN_OF_OTHERS):
            ordered = sorted((one for one in board if one != "truth"), key=lambda one: -mean(board[one], key))
            for place, one in enumerate(ordered):
                ranks.setdefault(one, []).append(place / max(len(ordered) - 1, 1))
    return {one: float(np.mean(shares)) for one, shares in sorted(ranks.items(), key=lambda item: np.mean(item[1]))}


def check(boards: Mapping[str, Board]) -> list[Check]:
    """Check what a sound benchmark must show."""
    results = []
    for name, board in boards.items():
        truth = board["truth"]
        beaten = []
        for key in (key for key in truth.values if key in TRUTH and not key.endswith(("pointing", "digit"))):
            rivals = {one: mean(entry, key) for one, entry in board.items() if one != "truth"}
            beaten += [f"{one} ({key} {score:.3f})" for one, score in rivals.items() if score >= mean(truth, key)]
        found = ", ".join(beaten) or "by every score"
        results.append(Check(f"{name}: the true mask beats everyone", not beaten, found))
        if "b energy" not in truth.values:
            continue
        scores = {one: interval(entry.values["b energy"], RESAMPLES, 0) for one, entry in board.items()}
        margin = scores["random"][0] + 0.2
        weak = [one for one, entry in board.items() if entry.kind == "gradient" and scores[one][1] < margin]
        what = f"{name}: every gradient method beats the random map on two digits by 20 points, interval included"
        found = ", ".join(f"{one} ({percent(board[one].values['b energy'])})" for one in weak)
        explained = set(weak) <= EXPLAINED.get(name, set())
        results.append(Check(what, not weak, found or f"all above {margin:.0%}", explained))
        blind = [one for one, entry in board.items() if entry.kind == "class-agnostic"]
        off = [one for one in blind if not scores[one][1] - 1e-6 <= 0.5 <= scores[one][2] + 1e-6]
        what = f"{name}: class-agnostic methods are at chance on two digits ({', '.join(blind)})"
        found = ", ".join(f"{one} ({scores[one][0]:.0%})" for one in off) or "all at 50 %"
        results.append(Check(what, not off, found))
    return results


def agreements(boards: Mapping[str, Board]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return the rank correlation of each faithfulness metric with the truth, over the methods, for each model."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, board in boards.items():
        entries = [entry for entry in board.values() if entry.kind != "baseline"]
        for truth in MAIN.get(name, MAIN_OF_OTHERS):
            for faith, column in FAITH.items():
                sign = 1 if column.higher else -1
                pair = [sign * entry.values[faith] for entry in entries], [entry.values[truth] for entry in entries]
                found.setdefault(f"{name} ({truth})", {})[faith] = rank_agreement(*pair, RESAMPLES, 0)
    return found


# Writing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table, the first column on the left, the others on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def percent(values: Values) -> str:
    """Write a mean and its interval in percent."""
    middle, low, high = interval(values, RESAMPLES, 0)
    if np.isnan(middle):
        return "–"
    return f"{_whole(middle)} ({_whole(low)} to {_whole(high)})"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}".replace("-0", "0") if abs(share) < 0.005 else f"{100 * share:.0f}"


def shown(name: str, entry: Entry) -> str:
    """Write a contestant's name: baselines in italics."""
    return f"*{name}*" if entry.kind == "baseline" or name in BASELINES else f"`{name}`"


def summary_table(boards: Mapping[str, Board]) -> str:
    """Make the table with the main scores of all models."""
    columns = [(name, key) for name in boards for key in MAIN.get(name, MAIN_OF_OTHERS)]
    header = ["method", *(f"{name} ({key[0]})" for name, key in columns), "mean rank"]
    rows = []
    places = {"truth": 0.0, **ranking(boards)}
    for one, place in places.items():
        entry = next(board[one] for board in boards.values() if one in board)
        cells = [f"{100 * mean(boards[name][one], key):.0f}" if one in boards[name] else "" for name, key in columns]
        rows.append([shown(one, entry), *cells, f"{100 * place:.0f} %" if one != "truth" else "–"])
    return table(header, rows)


def model_tables(name: str, board: Board) -> str:
    """Make the two tables of a model: the truth, and the metrics that do without."""
    order = ["truth", *(one for one in ranking({name: board}))]
    keys = [key for key in TRUTH if key in board["truth"].values]
    header = [
        "method",
        "layers",
        *(f"({key[0]}) {TRUTH[key].title} {_arrow(TRUTH[key])}" for key in keys),
        "pictures",
        "passes",
    ]
    truth = [
        [
            shown(one, board[one]),
            board[one].layers,
            *(percent(board[one].values[key]) for key in keys),
            str(max(len(values) for values in board[one].values.values())),
            board[one].cost,
        ]
        for one in order
    ]
    header_of_faith = ["method", *(f"{column.title} {_arrow(column)}" for column in FAITH.values()), "pictures"]
    faith = [
        [
            shown(one, board[one]),
            *(percent(board[one].values[key]) for key in FAITH),
            str(len(board[one].values["road"])),
        ]
        for one in order
    ]
    return f"{table(header, truth)}\n\n{table(header_of_faith, faith)}"


def _arrow(column: Column) -> str:
    return "↑" if column.higher else "↓"


def agreement_table(boards: Mapping[str, Board]) -> str:
    """Make the table of rank correlations."""
    rows = [[what, *(_signed(*numbers) for numbers in found.values())] for what, found in agreements(boards).items()]
    return table(["model (truth)", *(column.title for column in FAITH.values())], rows)


def _signed(rho: float, low: float, high: float) -> str:
    return "–" if np.isnan(rho) else f"{rho:+.2f} ({low:+.2f} to {high:+.2f})"


def check_table(results: Sequence[Check]) -> str:
    """Make the table of checks."""
    rows = [
        [one.what, "PASS" if one.good else "FAIL, see below" if one.explained else "FAIL", one.found] for one in results
    ]
    return table(["check", "", "found"], rows)


def models_table(facts: Mapping[str, Mapping[str, float]], kept: Mapping[str, Mapping[str, str]]) -> str:
    """Make the table of what the models can do."""
    rows = [[f"{name}: {what}", f"{share:.0%}"] for name, found in facts.items() for what, share in found.items()]
    rows += [
        [f"{name}: pictures of task ({letter}) in which it sees all that is asked about", share]
        for name, found in kept.items()
        for letter, share in found.items()
    ]
    return table(["on handwriting that no model was trained on", ""], rows)


def put(page: str, blocks: Mapping[str, str]) -> str:
    """Put blocks between the markers of a page that have their names.

    Raises:
        ValueError: if a marker is not there exactly once
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have one line '{begin}' and one '{end}'")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page = pattern.sub(lambda _match, text=f"{begin}\n{block}\n{end}": text, page)  # type: ignore[misc]
    return page


def as_json(boards: Mapping[str, Board]) -> str:
    """Write all means with their intervals, rounded, one contestant on a line."""

    def numbers(entry: Entry) -> dict[str, list[float | None]]:
        found = {key: interval(values, RESAMPLES, 0) for key, values in entry.values.items()}
        return {key: [None if np.isnan(x) else round(x, 4) for x in three] for key, three in found.items()}

    lines = [
        json.dumps({"model": name, "method": one, "kind": entry.kind, "passes": entry.cost, **numbers(entry)})
        for name, board in boards.items()
        for one, entry in board.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def draw(models: Mapping[str, nn.Module], path: Path) -> None:
    """Draw one picture of each task, the truth, and the maps of a few methods."""
    from matplotlib.figure import Figure

    rows = [
        ("(a) one digit", "cnn", "a", 0),
        ("(b) two digits", "cnn", "b", 0),
        ("(b) the other digit", "cnn", "b", 1),
        ("(c) shortcut", "shortcut", "c", 0),
        ("(d) grid", "vgg", "d", 0),
        ("(b) two digits", "vit", "b", 0),
        ("(b) the other digit", "vit", "b", 1),
    ]
    names = ("truth", "random", "edges", "EigenCAM", "GradCAM", "LayerCAM", "ScoreCAM", "ReciproCAM", "RefineCAM")
    figure = Figure(figsize=(1.25 * (len(names) + 1) + 0.9, 1.34 * len(rows)), dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), len(names) + 1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, (title, name, letter, index) in enumerate(rows):
        task = make_tasks(name, models[name], 8)[0][letter][slice(index, index + 1)]
        axes[row, 0].imshow(task.images[0].movedim(0, -1))
        axes[row, 0].set_ylabel(f"{title}\n{name}: {int(task.classes[0])}?", fontsize=8)
        by_name = {one.name: one for one in contestants(name, models[name], names)}
        for column, method in enumerate(names, start=1):
            cam = by_name[method].explain(task.images, task.classes, task.truth)[0]
            axes[row, column].imshow(task.images[0].mean(0), cmap="gray")
            axes[row, column].imshow(cam, cmap="inferno", alpha=0.75, vmin=0, vmax=1)
            axes[row, column].contour(task.masks[0].float(), [0.5], colors="white", linewidths=0.6)
            if row == 0:
                axes[row, column].set_title("truth" if method == "truth" else method, fontsize=8)
        for one in by_name.values():
            one.remove()
    axes[0, 0].set_title("picture", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, score everyone, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and methods; nothing is written")
    parser.add_argument("--pictures", type=int, help="pictures of each task (default: 80; 12 if quick)")
    parser.add_argument("--faith", type=int, help="pictures for the metrics without truth (default: 24; 4 if quick)")
    parser.add_argument("--models", type=Path, default=WEIGHTS, help="folder of the weights (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="train the models again, into that folder")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="models to look at; fewer than all are not written",
    )
    parser.add_argument("--methods", nargs="+", help="names of methods to look at; then nothing is written")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write to (default: %(default)s)")
    parser.add_argument(
        "--numbers", type=Path, help="folder for each picture's numbers; those there are not made again"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    num_pictures = options.pictures or (12 if options.quick else 80)
    num_faith = options.faith or (4 if options.quick else 24)
    only = options.methods or (QUICK if options.quick else None)

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    if options.train:
        for name in MODELS[1:]:
            train(name, options.models)
    models = {name: load(name, options.models) for name in options.only}
    boards: dict[str, Board] = {}
    seen: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        path = None if options.numbers is None else options.numbers / f"{name}-{num_pictures}-{num_faith}.json"
        boards[name], seen[name] = run(name, model, num_pictures, num_faith, only, path)
    results = check(boards)
    facts = {
        name: what_it_relies_on(name, model, 100 if options.quick else 400, 10_000) for name, model in models.items()
    }
    blocks = {
        "summary": summary_table(boards),
        "checks": check_table(results),
        "agreement": agreement_table(boards),
        "models": models_table(facts, seen),
        **{name: model_tables(name, board) for name, board in boards.items()},
    }
    for name, block in blocks.items():
        print(f"\n{name.upper()}\n{block}")
    broken = {
        f"{name} {one}": entry.broken for name, board in boards.items() for one, entry in board.items() if entry.broken
    }
    print(f"\nmaps that were not finite: {broken or 'none'}")
    if only is None and options.only == list(MODELS):
        options.output.write_text(put(options.output.read_text(encoding="utf-8"), blocks), encoding="utf-8")
        options.output.with_suffix(".json").write_text(as_json(boards), encoding="utf-8")
        draw(models, options.output.parent / "images" / "leaderboard.png")
        print(f"wrote {options.output}")
    print(f"took {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0 if all(one.good or one.explained for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
