"""Score the maps of all methods where the truth is known, and by metrics that do without; write the leaderboard.

Pictures, models and numbers come from seeds; nothing is downloaded. The pictures hold handwriting that no model was
trained on. The models' weights lie in `scripts/quality_models`; `--train` trains them again.

The exit code is 1 if a check fails for a reason that the page does not give: see `EXPLAINED`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from _quality_contest import Contestant, Witness, contestants, count_passes
from _quality_layers import LAYERS, Setting, choose, measure_settings, settings
from _quality_models import MODELS, WEIGHTS, load, predict, train, what_it_relies_on
from _quality_page import (
    RESAMPLES,
    Check,
    agreement_table,
    as_json,
    check_table,
    model_tables,
    models_table,
    percent,
    put,
    settings_tables,
    summary_table,
)
from _quality_scenes import Task, grids, one_digit, shortcut, two_digits
from _quality_scores import CHUNK, COLUMNS, TRUTH, Board, Entry, judge_faith, locate, mean, tasks_of
from _quality_stats import group_means, interval
from torch import Tensor, nn
from tqdm import tqdm

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
QUICK = ("truth", "random", "centre", "edges", "MeanActivation", "EigenCAM", "GradCAM", "LayerCAM", "LeGrad")


TASKS: dict[str, tuple[Callable[[int, int], Task], int]] = {
    "a": (one_digit, 20_001),
    "b": (two_digits, 20_002),
    "c": (shortcut, 20_003),
    "d": (grids, 20_004),
}


CHOICE = 10_000  # added to the seeds of the pictures by which settings are chosen

# Gradient methods that do not beat the random map on two digits by a wide margin. The page says why.
EXPLAINED = {
    "vit": {
        "AugmentedCAM",
        "EigenGradCAM",
        "EigenSmoothedCAM",
        "FullGrad",
        "GradCAM",
        "GradCAMElementWise",
        "GradCAMpp",
        "GroupCAM",
        "GuidedBackprop",
        "GuidedGradCAM",
        "HiResCAM",
        "LayerCAM",
        "LayerCAM, fused",
        "RefineCAM",
        "SegEigenCAM",
        "ShapleyCAM",
        "SmoothGradCAMpp",
        "XGradCAM",
    },
    "swin": {"FullGrad", "GuidedBackprop", "LayerCAM, fused"},
}


# Measuring


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


def make_tasks(
    name: str, model: nn.Module, num_pictures: int, shift: int = 0
) -> tuple[dict[str, Task], dict[str, str]]:
    """Make the pictures in which a model sees all that is asked about, and say what share of all those are.

    Args:
        name: the model's
        model: the model
        num_pictures: how many there are in each task, at most
        shift: added to the seeds
    """
    tasks, kept = {}, {}
    for letter in tasks_of(name):
        make, seed = TASKS[letter]
        wanted = max(num_pictures // 2, 1) if letter == "b" else num_pictures  # two questions about each picture
        pool = make(2 * wanted + 8, seed + shift)
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


def run_settings(
    models: Mapping[str, nn.Module], num_pictures: int, wanted: Sequence[Setting], shift: int, folder: Path | None
) -> dict[str, Board]:
    """Score settings on models; numbers that are in a file of the folder are taken from there, and others added."""
    boards = {}
    for name, model in models.items():
        path = None if folder is None else folder / f"{name}-settings-{num_pictures}-{shift}.json"
        done = {} if path is None or not path.is_file() else read(path)
        missing = [one for one in wanted if str(one) not in done]
        if missing:
            done |= measure_settings(name, model, make_tasks(name, model, num_pictures, shift)[0], missing)
            if path is not None:
                write(path, done)
        boards[name] = {str(one): done[str(one)] for one in wanted}
    return boards


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


def check(boards: Mapping[str, Board]) -> list[Check]:
    """Check what a sound benchmark must show."""
    results = []
    for name, board in boards.items():
        truth = board["truth"]
        beaten = []
        for key in (key for key in truth.values if key in TRUTH and not key.endswith(("pointing", "digit", "d ap"))):
            rivals = {one: mean(entry, key) for one, entry in board.items() if one != "truth"}
            beaten += [f"{one} ({key} {score:.3f})" for one, score in rivals.items() if score >= mean(truth, key)]
        found = ", ".join(beaten) or "by every score"
        results.append(Check(f"{name}: the true mask beats everyone", not beaten, found))
        if "b ap" not in truth.values:
            continue
        scores = {one: interval(entry.values["b ap"], RESAMPLES, 0) for one, entry in board.items()}
        margin = scores["random"][0] + 0.2
        weak = [one for one, entry in board.items() if entry.kind == "gradient" and scores[one][1] < margin]
        what = f"{name}: every gradient method beats the random map on two digits by 20 points, interval included"
        found = ", ".join(f"{one} ({percent(board[one].values['b ap'])})" for one in weak)
        explained = set(weak) <= EXPLAINED.get(name, set())
        results.append(Check(what, not weak, found or f"all above {margin:.0%}", explained))
        blind = [one for one, entry in board.items() if entry.kind == "class-agnostic"]
        scores = {one: interval(board[one].values["b energy"], RESAMPLES, 0) for one in blind}
        off = [one for one in blind if not scores[one][1] - 1e-6 <= 0.5 <= scores[one][2] + 1e-6]
        what = f"{name}: class-agnostic methods are at chance on two digits ({', '.join(blind)})"
        found = ", ".join(f"{one} ({scores[one][0]:.0%})" for one in off) or "all at 50 %"
        results.append(Check(what, not off, found))
    return results


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
    parser.add_argument("--faith", type=int, help="pictures for the metrics without truth (default: 16; 4 if quick)")
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
    num_faith = options.faith or (4 if options.quick else 16)
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
    candidates = [
        one for one in settings() if not options.quick or one.method in ("GradCAM", "HiResCAM", "gated", "recommended")
    ]
    asked = {name: models[name] for name in LAYERS if name in models}
    tried = run_settings(asked, num_pictures // 4, candidates, CHOICE, options.numbers)
    chosen = choose(tried)
    wanted = [next(one for one in candidates if str(one) == title) for title in chosen]
    reported = run_settings(asked, num_pictures, wanted, 0, options.numbers)
    results = check(boards)
    facts = {
        name: what_it_relies_on(name, model, 100 if options.quick else 400, 10_000) for name, model in models.items()
    }
    blocks = {
        "summary": summary_table(boards),
        "settings": settings_tables(reported),
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
        everything = {name: board | reported.get(name, {}) for name, board in boards.items()}
        options.output.with_suffix(".json").write_text(as_json(everything), encoding="utf-8")
        draw(models, options.output.parent / "images" / "leaderboard.png")
        print(f"wrote {options.output}")
    print(f"took {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0 if all(one.good or one.explained for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
