"""Put Grad-CAM, with no argument but the model, on families of models beyond classifiers, and write down what happened.

For each model with random weights: the default layer, its grid, and a verdict. *Right*: the grid lies over the input,
axis by axis, as judged by `_family_judge.py`. *Warned*: it does not, and torchcam says so. *Refused*: an error of
torchcam that names an argument. *Wrong*: a map that does not lie over the input, without a word. *Crash*: any other
error. The model's outputs afterwards, for inputs of two sizes where it takes two, have to be bit for bit those of a
twin that nobody explained. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _family_signals
import _family_transformers
import _family_vision
import torch
from _family import Family, noise, run
from _family_judge import judge
from torch import Tensor

import torchcam
from torchcam.methods import GradCAM
from torchcam.targets import read_logits

OURS = Path(torchcam.__file__).parent
SOURCES: dict[str, Callable[[], Iterator[Family]]] = {
    "torch": _family_signals.families,
    "lightning": _family_signals.lightning_families,
    "transformers": _family_transformers.families,
    **_family_vision.SOURCES,
}
FAULTS = ("wrong", "crash", "broken")


@dataclass
class Outcome:
    """What happened with one family.

    Attributes:
        verdict: right, warned, refused, wrong or crash; broken if the model itself does not run
        layer: the layers that were explained
        grid: their grids
        detail: how well each axis of a grid agrees with the input's, or what was said
        trace: whether an output changed because the model was explained, and which; empty if none did
        seconds: how long all of this took
    """

    verdict: str = ""
    layer: str = ""
    grid: str = ""
    detail: str = ""
    trace: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the outcome is one that users can live with."""
        return self.verdict not in FAULTS and not self.trace


class Heard(logging.Handler):
    """Keeps what torchcam warns about in its log, other than the layer that it chose."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        if "thus set to" not in record.getMessage():
            self.said.append(record.getMessage())


def leaves(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from leaves(item)


def same(one: Any, other: Any) -> bool:
    """Check whether two outputs hold the same tensors, bit for bit."""
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return bool(pairs) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def made(family: Family) -> Any:
    """Build a model, always the same."""
    torch.manual_seed(0)
    return family.build().eval()


def is_refusal(error: Exception) -> bool:
    """Check whether an error was raised by torchcam, is of a type that it promises, and names an argument."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    promised = isinstance(error, (ValueError, TypeError, RuntimeError))
    return promised and raised.is_relative_to(OURS) and re.search(r"`\w+", str(error)) is not None


def in_one_line(error: Exception) -> str:
    """Return the type of an error and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def explain(model: Any, family: Family, expected: Any, outcome: Outcome) -> None:
    """Explain a model with no argument but the model, and judge what comes of it."""
    x = noise(family.shape)
    with warnings.catch_warnings(record=True) as caught, GradCAM(model) as extractor, torch.no_grad():
        warnings.simplefilter("always")
        output = run(extractor.model, family, x)
        if not same(output, expected):
            outcome.trace = "while it is explained"
        if family.target is None:
            scores = read_logits(output)
            maps = extractor(scores.reshape(len(scores), -1).argmax(1), relu=False)
        elif callable(family.target):
            maps = extractor(targets=family.target, relu=False)
        else:
            maps = extractor(family.target, relu=False)
        outcome.layer = ", ".join(extractor.target_names)
        outcome.grid = ", ".join(" x ".join(map(str, cam.shape[1:])) for cam in maps)
        said = [str(w.message) for w in caught if Path(w.filename).is_relative_to(OURS) or w.filename == __file__]

        def read(changed: Tensor) -> list[Tensor]:
            run(extractor.model, family, changed)
            return [grid for grid in extractor.hook_a if grid is not None]

        verdicts = judge(read, x, family.positions)
    faults = [verdict.fault for verdict in verdicts if verdict.fault and not verdict.is_point]
    # Of a pyramid, the last levels may have one position, and the score may depend on a single level.
    if all(verdict.is_point for verdict in verdicts):
        faults.append("one position")
    elif all(cam.max() == cam.min() for cam in maps):
        faults.append("a constant map")
    if not all(cam.isfinite().all() for cam in maps):
        faults.append("not finite")
    agreement = [" x ".join("-" if score is None else f"{score:.2f}" for score in v.scores) for v in verdicts]
    outcome.detail = "; ".join([*faults[:1], *said[:1]]) or ", ".join(agreement)
    outcome.verdict = "right" if not faults else "warned" if said else "wrong"


def try_out(family: Family) -> Outcome:
    """Build a model and a twin, explain the model, and look at it from all sides; what fails is written down."""
    outcome = Outcome()
    start = time.perf_counter()
    heard = Heard()
    logging.getLogger("torchcam").addHandler(heard)
    inputs = [noise(family.shape, 0), noise(family.other or family.shape, 1)]
    inputs.append(inputs[0])
    try:
        model, twin = made(family), made(family)
        with torch.no_grad():
            expected = [run(twin, family, x) for x in inputs]
        try:
            explain(model, family, expected[0], outcome)
        except Exception as error:  # noqa: BLE001 - a failure of any kind is what the table is for
            outcome.verdict = "refused" if is_refusal(error) else "crash"
            outcome.detail = in_one_line(error)
        if outcome.verdict == "wrong" and heard.said:
            outcome.verdict, outcome.detail = "warned", "; ".join([outcome.detail, *heard.said])
        with torch.no_grad():
            changed = [number for number, x in enumerate(inputs) if not same(run(model, family, x), expected[number])]
        if changed:
            outcome.trace = outcome.trace or f"in call {changed[0] + 1} afterwards"
    except Exception as error:  # noqa: BLE001 - a model that does not run is a fault of the table
        outcome.verdict, outcome.detail = "broken", in_one_line(error)
    finally:
        logging.getLogger("torchcam").removeHandler(heard)
    outcome.seconds = time.perf_counter() - start
    return outcome


def families_of(library: str) -> list[Family]:
    """Return the families of a library, none if it is not installed."""
    return list(SOURCES[library]()) if find_spec(library) is not None else []


def table(results: dict[str, dict[str, Outcome]]) -> str:
    """Write the outcomes as Markdown."""
    outcomes = [outcome for found in results.values() for outcome in found.values()]
    count = Counter(outcome.verdict for outcome in outcomes)
    counts = ", ".join(f"{number} {verdict}" for verdict, number in count.most_common())
    lines = [
        "# Families that were tried",
        "",
        f"Written by `scripts/families.py` with torch {torch.__version__.split('+')[0]}: Grad-CAM with no argument",
        "but the model (and a target where the output needs one) on models beyond classifiers, with random weights.",
        "[Choosing a layer](guides/layers.md) has the rules behind it.",
        f"Of {len(outcomes)}: {counts}.",
        "",
        "* *Right*: the grid lies over the input. Strips of the input are changed; how much each cell changes agrees",
        "  with how close it is to the strip. The numbers are the correlations, axis by axis; `-` is an axis of one",
        "  position.",
        "* *Refused*: an error that says what to do. *Warned*: a map that does not lie over the input, with a warning.",
        "* *Wrong*: such a map without a word. *Crash*: an error that does not help.",
        "",
        "Each model's outputs afterwards, for inputs of two sizes where it takes two, were compared with those of a",
        f"twin that nobody explained: {trace_summary(outcomes)}",
        "",
        "| library | family | verdict | layer | grid | detail |",
        "|---|---|---|---|---|---|",
    ]
    for library, found in results.items():
        for name, outcome in found.items():
            verdict = outcome.verdict if outcome.passed else f"**{outcome.verdict}**"
            trace = f"**output changed {outcome.trace}**" if outcome.trace else ""
            detail = "; ".join(filter(None, [in_markdown(outcome.detail), trace]))
            layer = f"`{outcome.layer}`" if outcome.layer else ""
            cells = [library, name, verdict, layer, outcome.grid, detail]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_markdown(detail: str, longest: int = 400) -> str:
    """Return what was said as a cell of a table, cut if it is long."""
    kept = detail if len(detail) <= longest else detail[:longest].rsplit(" ", 1)[0] + " …"
    kept += "`" * (kept.count("`") % 2)
    parts = kept.replace("|", "/").split("`")
    escaped = [re.sub(r"([_*<\[])", r"\\\1", part) if number % 2 == 0 else part for number, part in enumerate(parts)]
    return "`".join(escaped)


def trace_summary(outcomes: list[Outcome]) -> str:
    """Say how many models' outputs changed because they were explained."""
    changed = sum(bool(outcome.trace) for outcome in outcomes)
    return f"{changed} of {len(outcomes)} changed." if changed else "all are the same, bit for bit."


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; return 1 if a family is wrong, crashes, or if its model was changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=SOURCES, action="append", help="only this library (repeatable)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only families whose name contains this")
    parser.add_argument("--results", type=Path, help="keep outcomes in this file of JSON; skip those that are in it")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args(arguments)
    kept: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        kept = json.loads(options.results.read_text(encoding="utf-8"))
    for library in options.library or SOURCES:
        entries = [family for family in families_of(library) if options.only in family.name]
        if not entries:
            print(f"{library}: not installed, or no family of this name")
        for family in entries:
            known = kept.setdefault(library, {})
            if family.name in known:
                continue
            outcome = try_out(family)
            print(
                f"{outcome.verdict:7} {library}: {family.name} ({outcome.seconds:.0f} s) {outcome.layer} {outcome.grid}"
            )
            if not outcome.passed or outcome.verdict != "right":
                print(f"        {outcome.detail[:300]} {outcome.trace}", flush=True)
            known[family.name] = asdict(outcome)
            if options.results is not None:
                options.results.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            gc.collect()
    results = {library: {name: Outcome(**one) for name, one in found.items()} for library, found in kept.items()}
    if options.output is not None:
        options.output.write_text(table(results), encoding="utf-8")
    outcomes = [outcome for found in results.values() for outcome in found.values()]
    print(", ".join(f"{number} {verdict}" for verdict, number in Counter(o.verdict for o in outcomes).most_common()))
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
