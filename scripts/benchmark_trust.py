"""Measure how often the verdicts of `torchcam.trust` are right, where the truth is known; write the page about it.

Maps are right where their average precision is 90 % or more on the asked digit's pixels, against those of the other
digit (of the model with a shortcut: on the cue's, against the digit's), and wrong at 70 % or less. Beside those of
methods there are maps that were broken on purpose; they count as wrong, or not at all: one that is right by chance says
nothing.

The limits were chosen on the models of `_trust_models` (`--choose`), and the numbers are of the benchmark's models, on
other pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _quality_contest import BLOCKS, LAST
from _quality_models import load, predict
from _quality_page import put, table
from _quality_scenes import Task, shortcut, two_digits
from _trust_models import LAYERS, OTHERS, load_other, train_other
from torch import Tensor, nn

from torchcam import methods
from torchcam.methods import GradCAM
from torchcam.metrics import Localization
from torchcam.trust import THRESHOLDS, PredictionTrust, trust
from torchcam.trust._verdicts import SMALLEST_SHARE, Check, check_region, check_removal, verdict_of

PAGE = Path(__file__).parent.parent / "docs" / "trust-benchmark.md"
REPORTED = ("cnn", "vgg", "vit", "shortcut")
SEEDS = {"reported": 43_001, "chosen on": 31_001}
RIGHT, WRONG = 0.9, 0.7
METHODS = (
    "GradCAM",
    "GradCAMpp",
    "HiResCAM",
    "XGradCAM",
    "LayerCAM",
    "EigenGradCAM",
    "AblationCAM",
    "ReciproCAM",
    "EigenCAM",
    "MeanActivation",
)
ATTENTION = ("TransformerAttribution", "AttentionRollout")
BEST = {"vit": "ReciproCAM"}  # whose maps are broken; else Grad-CAM's
RESAMPLES = 1000
REMOVAL_LIMITS = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
REGION_LIMITS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
VALUES = ("correlation", "largest_fall", "asked", "rival", "odds")
Entry = dict[str, Any]


def given(maps: Tensor) -> type[Any]:
    """Return a method whose maps of a whole batch are given: (N, *grid)."""

    class Given(GradCAM):
        def __call__(self, class_idx: Any = None, scores: Any = None, *args: Any, **kwargs: Any) -> list[Tensor]:
            super().__call__(class_idx, scores, *args, **kwargs)
            return [maps.clone()]

    return Given


def maps_of(name: str, model: nn.Module, method: str, images: Tensor, classes: Tensor) -> Tensor:
    """Return the maps of a method of the package."""
    layer: Any = BLOCKS if method in ATTENTION else (LAST | LAYERS)[name]
    with getattr(methods, method)(model, layer) as extractor:
        scores = model(images)
        (cam,) = extractor(None if getattr(extractor, "class_agnostic", False) else classes.tolist(), scores)
    found: Tensor = cam.detach()
    return found


def broken(name: str, model: nn.Module, task: Task, seed: int) -> dict[str, Tensor]:
    """Return maps that were broken on purpose, by what was done to them."""
    explain = partial(maps_of, name, method=BEST.get(name, "GradCAM"))
    good = explain(model=model, images=task.images, classes=task.classes)
    count, height, width = good.shape
    generator = torch.Generator().manual_seed(seed)
    others = predict(model, task.images).scatter(1, task.classes[:, None], -torch.inf).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)().eval()
        noise = maps_of(name, model, "RandomCAM", task.images, task.classes)
    order = torch.stack([torch.randperm(height * width, generator=generator) for _ in range(count)])
    return {
        "random channels": noise,
        "shuffled": good.flatten(1).gather(1, order).reshape(good.shape),
        "shifted by a half": good.roll((height // 2, width // 2), (1, 2)),
        "shifted by a quarter": good.roll(height // 4, 1),
        "of the next best class": explain(model=model, images=task.images, classes=others),
        "of another picture": good.roll(2, 0),
        "of an untrained model": explain(model=fresh, images=task.images, classes=task.classes),
        "inverted": 1 - good,
        "transposed layout": good.mT.contiguous(),
        "rows of a wrong length": good.flatten(1).roll(width // 2, 1).reshape(good.shape),
    }


def measure(name: str, num_pictures: int, seed: int) -> list[Entry]:
    """Judge all maps of a model, and say where they lie."""
    model = load_other(name) if name in OTHERS else load(name)
    pool = (shortcut if name == "shortcut" else two_digits)(2 * num_pictures + 8, seed)
    task = pool.found_by(predict(model, pool.images), num_pictures)
    layer = (LAST | LAYERS)[name]
    judged = partial(trust, model, task.images, task.classes, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)().eval()
    found: list[Entry] = []

    def add(kind: str, title: str, report: Sequence[PredictionTrust]) -> None:
        for sample, item in enumerate(report):
            metric = Localization()
            region = (task.masks | task.others)[sample : sample + 1]
            cam = item.cam.nan_to_num().clamp(0, 1).unsqueeze(0)
            metric.update(
                task.images[sample : sample + 1], maps=cam, masks=task.masks[sample : sample + 1], region=region
            )
            values = {key: value for check in item.checks for key, value in check.values.items()}
            found.append(
                {
                    "model": name,
                    "kind": kind,
                    "map": title,
                    "picture": int(task.groups[sample]),
                    "precision": float(metric.compute()["average_precision"]),
                    "outcomes": {check.name: check.outcome for check in item.checks},
                    "values": {key: values[key] for key in VALUES if key in values},
                }
            )

    for method in METHODS + (ATTENTION if name == "vit" else ()):
        add("method", method, judged(methods=[method], target_layer=BLOCKS if method in ATTENTION else layer))
    for title, maps in broken(name, model, task, seed).items():
        add("broken", title, judged(methods=[given(maps)], target_layer=layer))
    add(
        "broken",
        "and model untrained",
        trust(fresh, task.images, task.classes, methods=["GradCAM"], target_layer=layer),
    )
    return found


# Results


def truth_of(entry: Entry) -> bool | None:
    """Check whether a map is right; None if that is undecided."""
    if entry["precision"] <= WRONG:
        return False
    return True if entry["precision"] >= RIGHT and entry["kind"] == "method" else None


def verdict_without(entry: Entry, left_out: str = "") -> str:
    """Return the verdict by the limits as they are, without one of the checks."""
    outcomes = dict(entry["outcomes"])
    if "removal" in outcomes:
        correlation, largest, asked, rival, odds = (entry["values"][key] for key in VALUES)
        outcomes["removal"] = check_removal(correlation, largest, 64).outcome
        outcomes["region"] = check_region(asked, rival, odds).outcome
    return verdict_of(Check(name, outcome, "") for name, outcome in outcomes.items() if name != left_out)


GRADE = {"do not believe": 0, "with care": 1, "believe": 2}


def auroc(scores: Any, right: Any) -> float:
    """Return how often a right map has a higher score than a wrong one, equals counting half."""
    above = (scores[right][:, None] > scores[~right]).mean()
    return float(above + (scores[right][:, None] == scores[~right]).mean() / 2)


def interval(entries: Sequence[Entry], number: Callable[[Sequence[Entry]], float]) -> str:
    """Return a number, and the 95 % interval that drawing pictures with replacement gives it; a dash for NaN."""
    value = number(entries)
    if np.isnan(value):
        return "–"
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["model"], entry["picture"]), []).append(entry)
    pictures = list(groups.values())
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(pictures), size=(RESAMPLES, len(pictures))).tolist()
    drawn = [number([entry for row in rows for entry in pictures[row]]) for rows in chosen]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def share(entries: Sequence[Entry], of: Callable[[Entry], bool], what: Callable[[Entry], bool]) -> float:
    """Return the share of some entries for which something holds."""
    chosen = [what(entry) for entry in entries if of(entry)]
    return float(np.mean(chosen)) if chosen else float("nan")


def verdict_auroc(entries: Sequence[Entry], left_out: str = "") -> float:
    """Return the AUROC of the verdict."""
    scores = np.array([GRADE[verdict_without(entry, left_out)] for entry in entries])
    return auroc(scores, np.array([truth_of(entry) for entry in entries], dtype=bool))


def blocks(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the tables of the page."""
    known = [entry for entry in entries if truth_of(entry) is not None]
    right = [entry for entry in known if truth_of(entry)]
    wrong = [entry for entry in known if not truth_of(entry)]

    def count(some: Sequence[Entry], verdict: str, left_out: str = "") -> int:
        return sum(verdict_without(entry, left_out) == verdict for entry in some)

    def told(verdict: str) -> Callable[[Entry], bool]:
        return lambda entry: verdict_without(entry) == verdict

    def is_right(entry: Entry) -> bool:
        return bool(truth_of(entry))

    def is_wrong(entry: Entry) -> bool:
        return not truth_of(entry)

    def measured(of: Callable[[Entry], bool], what: Callable[[Entry], bool]) -> str:
        return interval(known, partial(share, of=of, what=what))

    order = list(reversed(GRADE))
    verdicts = [
        [verdict, str(count(right, verdict)), str(count(wrong, verdict)), measured(told(verdict), is_right)]
        for verdict in order
    ]
    goals = [
        ["AUROC of the verdict", interval(known, verdict_auroc), "98 %"],
        ["right maps believed", measured(is_right, told("believe")), "90 %"],
        ["wrong maps not believed", measured(is_wrong, told("do not believe")), "90 %"],
        ["wrong maps believed", f"{count(wrong, 'believe')} of {len(wrong)}", "0 of 200"],
    ]
    checks = [
        [
            left_out or "none",
            f"{verdict_auroc(known, left_out):.3f}",
            f"{count(right, 'believe', left_out) / len(right):.1%}",
            f"{count(wrong, 'do not believe', left_out) / len(wrong):.1%}",
            str(count(wrong, "believe", left_out)),
        ]
        for left_out in ("", "diagnosis", "evidence", "removal", "region")
    ]
    kinds: dict[tuple[str, str], list[Entry]] = {}
    for entry in known:
        kinds.setdefault((entry["kind"], entry["map"]), []).append(entry)
    maps = []
    for (kind, title), some in kinds.items():
        good, bad = ([entry for entry in some if truth_of(entry) is truth] for truth in (True, False))
        numbers = (len(good), len(bad), *(count(some, verdict) for verdict in order), count(bad, "believe"))
        maps.append([title if kind == "method" else f"*{title}*", *map(str, numbers)])
    models = []
    for name in dict.fromkeys(entry["model"] for entry in known):
        good, bad = ([entry for entry in some if entry["model"] == name] for some in (right, wrong))
        models.append(
            [
                name,
                f"{count(good, 'believe')} of {len(good)}",
                f"{count(bad, 'do not believe')} of {len(bad)}",
                str(count(bad, "believe")),
            ]
        )
    return {
        "verdicts": table(["verdict", "right maps", "wrong maps", "of them, on the evidence"], verdicts),
        "goals": table(["", "measured", "goal"], goals),
        "checks": table(
            ["left out", "AUROC", "right maps believed", "wrong maps not believed", "wrong maps believed"], checks
        ),
        "models": table(["model", "right maps believed", "wrong maps not believed", "wrong maps believed"], models),
        "maps": table(["map", "right", "wrong", "believe", "with care", "do not believe", "wrong and believed"], maps),
    }


def choose(entries: Sequence[Entry]) -> str:
    """Say which limits of the removal and the region do best.

    For belief these let no wrong map pass, and the most right ones; against it they turn away the most wrong maps and
    no more than 3 % of the right ones, and leave a tenth of the correlation for doubt.
    """
    known = [entry for entry in entries if truth_of(entry) is not None]
    right = np.array([truth_of(entry) for entry in known], dtype=bool)
    removal, region, largest = (
        np.array([entry["values"].get(key, np.nan) for entry in known])
        for key in ("correlation", "odds", "largest_fall")
    )
    decided = np.isnan(removal)  # by the diagnosis or the evidence
    limits = [(first, second) for first in REMOVAL_LIMITS for second in REGION_LIMITS]
    above = [(removal >= first) & (region >= second) for first, second in limits]
    below = [
        decided | ((removal < first) & (largest >= SMALLEST_SHARE)) | (region < second) for first, second in limits
    ]
    lines = [
        f"{right.sum()} right maps, {(~right).sum()} wrong ones; removal, region: right and wrong above, and below"
    ]
    for (first, second), more, less in zip(limits, above, below, strict=True):
        shares = (
            f"{part[right].mean():.1%} and {part[~right].mean():.1%} ({part[~right].sum()})" for part in (more, less)
        )
        lines.append(f"{first:.2f}, {second:4.1f}: {', '.join(shares)}")
    believed = [part[right].mean() * (not part[~right].any()) for part in above]
    belief = limits[int(np.argmax(believed))]
    turned_away = [
        part[~right].mean() * (part[right].mean() <= 0.03) * (first < belief[0] - 0.09)
        for (first, _), part in zip(limits, below, strict=True)
    ]
    lines.append(f"for belief {belief}, against it {limits[int(np.argmax(turned_away))]}")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--numbers", type=Path, default=Path("trust-numbers"), help="folder that keeps what was measured"
    )
    parser.add_argument("--pictures", type=int, default=16, help="pictures for each model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="models (default: all that are reported, or chosen on)")
    parser.add_argument("--choose", action="store_true", help="look for limits, on the models that are not reported")
    parser.add_argument("--train", action="store_true", help="train these models again, first")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.train:
        for name in OTHERS:
            train_other(name)
    entries: list[Entry] = []
    for name in options.only or (OTHERS if options.choose else REPORTED):
        seed = SEEDS["chosen on" if name in OTHERS else "reported"]
        path = options.numbers / f"{name}-{options.pictures}-{seed}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measure(name, options.pictures, seed)), encoding="utf-8")
        entries += json.loads(path.read_text(encoding="utf-8"))
    if options.choose:
        print(choose(entries))
        return 0
    parts = blocks(entries)
    for name, part in parts.items():
        print(f"\n{name.upper()}\n{part}")
    if options.only is None:
        PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")
        print(f"\nwrote {PAGE}; limits: {dict(THRESHOLDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
