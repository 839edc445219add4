"""The result of an evaluation: numbers by method and metric, as a table and in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam._files import atomic_write
from torchcam._numbers import finite, to_json
from torchcam._tables import as_csv, as_text, make_table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

FORMATS = {".json": "to_json", ".csv": "to_csv", ".md": "to_markdown", ".txt": "__str__"}
"""The formats that an evaluation can be saved in, by the file's suffix."""

_ARROWS = {True: "↑", False: "↓", None: ""}


@dataclass(frozen=True)
class MethodResult:
    """The results of one method.

    Attributes:
        values: the values of each metric, by the metric's name and then by the value's
        measured: the number of samples in each metric's means, for metrics that count them
        left_out: the number of samples that each metric left out, their map or scores not finite, likewise
        empty: the number of samples that a metric left out because they hold no evidence to compare with
        nan_maps: the number of samples whose map was not finite
        seconds: the mean time of a map, without its metrics
    """

    values: Mapping[str, Mapping[str, float]]
    measured: Mapping[str, int]
    left_out: Mapping[str, int]
    empty: Mapping[str, int]
    nan_maps: int
    seconds: float


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of :func:`torchcam.evaluate`, printed as a table; ``result["GradCAM", "avg_drop"]`` is one number.

    Attributes:
        methods: the results of each method, by its name
        higher_is_better: for each metric and each of its values whether a high one is good; None where it is neither
        num_samples: the number of samples
        agreement: the share of the samples whose explained class is the one that the model predicts
        settings: the arguments and the versions
    """

    methods: Mapping[str, MethodResult]
    higher_is_better: Mapping[str, Mapping[str, bool | None]]
    num_samples: int
    agreement: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, place: tuple[str, str]) -> float:
        """Return one number by the names of a method and a value, the latter after its metric's name where needed.

        Raises:
            KeyError: if there is no such method or value
        """
        method, value = place
        if method not in self.methods:
            raise KeyError(f"there is no method '{method}'; there are {', '.join(self.methods)}")
        titles = {title: column for column, title in self._titles().items()}
        full = {f"{metric}.{key}": (metric, key) for metric, key in titles.values()}
        found = titles.get(value) or full.get(value)
        if found is None:
            raise KeyError(f"there is no value '{value}'; there are {', '.join(titles)}")
        return self.methods[method].values[found[0]][found[1]]

    def _titles(self) -> dict[tuple[str, str], str]:
        """Return the title of each column: the value's name, after its metric's where several have it."""
        columns = [(metric, key) for metric, keys in self.higher_is_better.items() for key in keys]
        count = Counter(key for _, key in columns)
        return {(metric, key): key if count[key] == 1 else f"{metric}.{key}" for metric, key in columns}

    def _best(self) -> set[tuple[str, str, str]]:
        """Return the best numbers: method, metric, value."""
        best = set()
        for metric, key in self._titles():
            direction = self.higher_is_better[metric][key]
            numbers = {name: entry.values[metric][key] for name, entry in self.methods.items()}
            comparable = [number for number in numbers.values() if math.isfinite(number)]
            if direction is not None and len(set(comparable)) > 1:
                top = max(comparable) if direction else min(comparable)
                best |= {(name, metric, key) for name, number in numbers.items() if number == top}
        return best

    @property
    def summary(self) -> str:
        """A description of the data, in a sentence."""
        images = "1 sample" if self.num_samples == 1 else f"{self.num_samples} samples"
        return f"{images}; in {self.agreement:.1%} the explained class is the one that the model predicts"

    @property
    def notes(self) -> list[str]:
        """Remarks on the numbers: the samples that are missing in them."""
        notes = []
        for name, entry in self.methods.items():
            if entry.nan_maps:
                notes.append(f"{name}: {entry.nan_maps} of {self.num_samples} maps are NaN; no metric includes them")
            for metric, count in entry.left_out.items():
                if count > entry.nan_maps:
                    rest = count - entry.nan_maps
                    notes.append(f"{name}: {metric} leaves out {rest} more of {self.num_samples}, scores not finite")
            for metric, count in entry.empty.items():
                if count:
                    notes.append(f"{name}: {metric} leaves out {count} of {self.num_samples}, their masks empty")
        return notes

    # Formats.

    def _header(self) -> list[str]:
        arrows = [f"{title} {_ARROWS[self.higher_is_better[m][k]]}".strip() for (m, k), title in self._titles().items()]
        return ["method", *arrows, "NaN maps", "s / map"]

    def _rows(self, mark: Callable[[str], Any]) -> Iterator[list[Any]]:
        """Yield the cells of each method, the best numbers marked."""
        best = self._best()
        for name, entry in self.methods.items():
            cells: list[Any] = []
            for metric, key in self._titles():
                cell = _number(entry.values[metric][key])
                cells.append(mark(cell) if (name, metric, key) in best else cell)
            yield [name, *cells, str(entry.nan_maps), _number(entry.seconds)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it: NaN and infinity become None."""
        methods = {}
        for name, entry in self.methods.items():
            methods[name] = dict(vars(entry))
            methods[name]["seconds_per_map"] = methods[name].pop("seconds")
        everything: dict[str, Any] = finite(
            {
                "schema_version": 1,
                "num_samples": self.num_samples,
                "agreement": self.agreement,
                "methods": methods,
                "higher_is_better": self.higher_is_better,
                "settings": self.settings,
            }
        )
        return everything

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(self.to_dict())

    def to_csv(self) -> str:
        """Return the table as CSV, a row per method, with all digits."""
        titles = self._titles()
        metrics = [
            metric for metric in self.higher_is_better if any(metric in m.left_out for m in self.methods.values())
        ]
        left_out = [f"{metric}.left_out" for metric in metrics]
        rows: list[list[Any]] = [["method", *titles.values(), *left_out, "num_samples", "nan_maps", "seconds_per_map"]]
        for name, entry in self.methods.items():
            values = [repr(entry.values[metric][key]) for metric, key in titles]
            missing = [entry.left_out.get(metric, "") for metric in metrics]
            rows.append([name, *values, *missing, self.num_samples, entry.nan_maps, repr(entry.seconds)])
        return as_csv(rows)

    def to_markdown(self) -> str:
        """Return the table as Markdown, the best numbers in bold."""
        header = self._header()
        rows = [header, ["---", *["---:"] * (len(header) - 1)], *self._rows("**{}**".format)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", f"{self.summary}.", *(f"\n{note}." for note in self.notes)]) + "\n"

    _repr_markdown_ = to_markdown

    def save(self, path: str | Path) -> Path:
        """Write the result to a file, in the format that its suffix names: .json, .csv, .md or .txt.

        Raises:
            ValueError: if the suffix is another
        """
        path = Path(path)
        method = check_format(path)
        text: str = getattr(self, method)()
        with atomic_write(path) as part:
            part.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
        return path

    def _groups(self, widths: Sequence[int], width: int) -> list[list[int]]:
        """Distribute the columns but the first to tables that fit a width."""
        groups: list[list[int]] = [[]]
        for column in range(1, len(widths)):
            if groups[-1] and widths[0] + sum(widths[c] for c in [*groups[-1], column]) > width:
                groups.append([])
            groups[-1].append(column)
        return groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        header, rows = self._header(), list(self._rows(lambda cell: Text(cell, style="bold green")))
        widths = [max(len(row[column]) for row in [header, *rows]) + 3 for column in range(len(header))]
        for group in self._groups(widths, options.max_width):
            part = [[row[column] for column in (0, *group)] for row in [header, *rows]]
            yield make_table(part[0], part[1:], right=range(1, len(part[0])))
            yield Text()
        yield Text(f"{self.summary}.")
        for note in self.notes:
            yield Text(f"{note}.", style="yellow")

    def __repr__(self) -> str:
        return as_text(self, width=120)


def check_format(path: str | Path) -> str:
    """Return the name of the method that returns the contents of a file, by its suffix.

    Raises:
        ValueError: if the file's suffix names no format
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"'{path}' has no suffix that says what to write; there are {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return f"{value:.2e}" if 0 < abs(value) < 5e-4 or abs(value) >= 1e5 else f"{value:.4f}"
