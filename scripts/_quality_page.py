"""The tables of the leaderboard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from _quality_contest import BASELINES
from _quality_scores import FAITH, TRUTH, Board, Column, Entry, mean, precisions, ranked_by, tasks_of
from _quality_stats import Values, interval, interval_of_mean, rank_agreement
from scipy.stats import rankdata  # type: ignore[import-untyped]

RESAMPLES = 2000
PLACES = ("ap", "pointing")  # the scores that rank: no increasing change of a map can move them


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


def ranking(boards: Mapping[str, Board]) -> dict[str, float]:
    """Return each contestant's mean rank over the scores of all models that it applies to, as a share of them.

    The scores are average precision and pointing: what no increasing change of a map can move. Equals share a rank.
    """
    ranks: dict[str, list[float]] = {}
    for name, board in boards.items():
        rivals = [one for one in board if one != "truth"]
        for key in ranked_by(name):
            places = rankdata([-round(mean(board[one], key), 9) for one in rivals])
            for one, place in zip(rivals, places, strict=True):
                ranks.setdefault(one, []).append((place - 1) / max(len(rivals) - 1, 1))
    return {one: float(np.mean(shares)) for one, shares in sorted(ranks.items(), key=lambda item: np.mean(item[1]))}


def agreements(boards: Mapping[str, Board]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return the rank correlation of each faithfulness metric with the truth, over the methods, for each model."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, board in boards.items():
        entries = [entry for entry in board.values() if entry.kind != "baseline"]
        for truth in precisions(name):
            for faith, column in FAITH.items():
                sign = 1 if column.higher else -1
                pair = [sign * entry.values[faith] for entry in entries], [entry.values[truth] for entry in entries]
                found.setdefault(f"{name} ({truth[0]})", {})[faith] = rank_agreement(*pair, RESAMPLES, 0)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table, the first column on the left, the others on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def percent(values: Values) -> str:
    """Write a mean and its interval in percent."""
    return _percent(*interval(values, RESAMPLES, 0))


def _percent(middle: float, low: float, high: float) -> str:
    return "–" if np.isnan(middle) else f"{_whole(middle)} ({_whole(low)} to {_whole(high)})"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}".replace("-0", "0") if abs(share) < 0.005 else f"{100 * share:.0f}"


def shown(name: str, entry: Entry) -> str:
    """Write a contestant's name: baselines in italics."""
    return f"*{name}*" if entry.kind == "baseline" or name in BASELINES else f"`{name}`"


def summary_table(boards: Mapping[str, Board]) -> str:
    """Make the table with the scores of all models that rank: average precision / pointing."""
    columns = [(name, letter) for name in boards for letter in tasks_of(name)]
    header = ["method", *(f"{name} ({letter})" for name, letter in columns), "mean rank"]
    rows = []
    places = {"truth": 0.0, **ranking(boards)}
    for one, place in places.items():
        found = {name: board[one] for name, board in boards.items() if one in board}
        cells = [
            " / ".join(_whole(mean(found[name], f"{letter} {score}")) for score in PLACES) if name in found else ""
            for name, letter in columns
        ]
        entry = next(iter(found.values()))
        rows.append([shown(one, entry), *cells, f"{100 * place:.0f} %" if one != "truth" else "–"])
    return table(header, rows)


def settings_tables(boards: Mapping[str, Board]) -> str:
    """Make the two tables of settings: the mean precision over a model's tasks, and what it is made of."""
    header = ["method, gradients, layers", *boards]
    means, parts = [], []
    for one in next(iter(boards.values())):
        means.append([one])
        parts.append([one])
        for name, board in boards.items():
            several = [board[one].values[key] for key in precisions(name)]
            means[-1].append(_percent(*interval_of_mean(several, RESAMPLES, 0)))
            both = [[_whole(mean(board[one], f"{letter} {score}")) for letter in tasks_of(name)] for score in PLACES]
            parts[-1].append(" · ".join(" / ".join(found) for found in both))
    return f"{table(header, means)}\n\n{table(header, parts)}"


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
    return table(["model (task)", *(column.title for column in FAITH.values())], rows)


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
