"""Tables, targets and plots of the benchmark's measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from _contenders import CHANNELS_CASE, GC, IN_INFERENCE_MODE, LAYERS, OURS, OVERHEAD, PLAIN, SMALL, TC, Peers, cases
from _timing import Quartiles, Timing, quartiles
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["Results", "Target", "draw", "replace_block", "summary_table", "targets", "write_report"]

Row = Mapping[str, Any]
_KEY = ("case", "model", "layer", "batch", "note")


class Results:
    """Measurements, as they are written to a file."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def rows(self, section: str, **values: Any) -> Iterator[Row]:
        """Yield a section's rows that have these values."""
        for row in self.data.get(section, []):
            if all(row[key] == value for key, value in values.items()):
                yield row

    def forwards(self, row: Row, contender: str) -> Quartiles:
        """Return a contender's time in forwards."""
        return quartiles(Timing(**row["times"][contender]).ratios)

    def beside(self, row: Row, contender: str) -> Quartiles:
        """Return the seconds of a contender's call beside its forward pass."""
        return quartiles(Timing(**row["times"][contender]).beside)

    def seconds(self, row: Row, contender: str) -> float:
        """Return a contender's median time in seconds."""
        return float(median(row["times"][contender]["seconds"]))

    def time(self, contender: str = OURS, **values: Any) -> float | None:
        """Return the largest median time in forwards of the cases with these values; None without a measurement."""
        found = [self.forwards(r, contender).median for r in self.rows("times", **values) if contender in r["times"]]
        return max(found, default=None)

    def faster(self, other: str, contender: str = OURS, **values: Any) -> float | None:
        """Return how many times a contender is faster than another, the smallest of the cases with these values."""
        found = [
            self.forwards(row, other).median / self.forwards(row, contender).median
            for row in self.rows("times", **values)
            if {other, contender} <= set(row["times"])
        ]
        return min(found, default=None)

    def overhead(self, other: str, contender: str = OURS, **values: Any) -> float | None:
        """Return how many times another's host time a contender needs, the largest of the cases with these values."""
        found = [
            self.beside(row, contender).median / self.beside(row, other).median
            for row in self.rows("overhead", **values)
            if {other, contender} <= set(row["times"])
        ]
        return max(found, default=None)

    def memory(self, one: str, other: str, **values: Any) -> tuple[float, float] | None:
        """Return how many times as much memory a contender needs as another, the least and the most of these cases."""
        found = [
            row["bytes"][one] / max(row["bytes"][other], 1)
            for row in self.rows("memory", **values)
            if {one, other} <= set(row["bytes"])
        ]
        return (min(found), max(found)) if found else None

    def compared(self) -> list[Row]:
        """List the measurements whose maps were compared."""
        return [*self.rows("times"), *self.rows("overhead")]

    def disagreements(self) -> list[str]:
        """List the maps that differ for no known reason."""
        return [
            f"{row['case']} {row['model']} {row['layer']} batch {row['batch']}: {a['contender']} by "
            f"{a['difference']:.1e}, tolerance {a['tolerance']:.0e}"
            for row in self.compared()
            for a in row["agreements"]
            if not a["good"]
        ]

    def joined(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Add what an earlier measurement has and this one has not; keep cases and models in their order."""
        order = {case.name: place for place, case in enumerate(cases(Peers(Path()), every=True))}
        models = list(LAYERS)

        def place(row: Row) -> tuple[int, int]:
            return order.get(row["case"], len(order)), models.index(row["model"]) if row["model"] in models else -1

        data = {**earlier, **self.data}
        for section in ("times", "overhead", "memory"):
            rows = list(self.rows(section))
            known = {tuple(row[key] for key in _KEY) for row in rows}
            old = [row for row in earlier.get(section, []) if tuple(row[key] for key in _KEY) not in known]
            if rows or old:
                data[section] = sorted([*old, *rows], key=place)
        return data


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Write a table in Markdown, the last columns, of numbers, aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["--:"] * numbers
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def amount(value: float) -> str:
    """Write a number with three digits or so."""
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:,.0f}"


def with_range(found: Quartiles) -> str:
    """Write a time with its quartiles."""
    if found.count == 1:
        return f"{amount(found.median)} (once)"
    return f"{amount(found.median)} ({amount(found.lower)}–{amount(found.upper)})"


def times_table(results: Results) -> str:
    """Write the times of all packages side by side."""
    lines = []
    others: list[tuple[Row, str]] = []
    for row in results.rows("times"):
        if row["case"] == "Hooks":
            continue
        cells = [
            with_range(results.forwards(row, name))
            if name in row["times"]
            else "not run"
            if name in row["left_out"]
            else "–"
            for name in (OURS, TC, GC)
        ]
        ratios = [results.faster(name, **{key: row[key] for key in _KEY}) for name in (TC, GC)]
        cells += ["–" if ratio is None else f"{amount(ratio)} ×" for ratio in ratios]
        lines.append([_title(row), row["model"], row["layer"], str(row["batch"]), *cells])
        others += [(row, name) for name in row["times"] if name not in {OURS, TC, GC}]
    header = [
        "",
        "model",
        "layer",
        "batch",
        f"{OURS} [F]",
        "TorchCAM [F]",
        "grad-cam [F]",
        "TorchCAM / ours",
        "grad-cam / ours",
    ]
    text = table(header, lines, 6)
    if others:
        more = [
            [
                f"{_title(row)}: {name.removeprefix(OURS).lstrip(', ')}",
                row["model"],
                row["layer"],
                str(row["batch"]),
                with_range(results.forwards(row, name)),
            ]
            for row, name in others
        ]
        text += "\n\n" + table(["", "model", "layer", "batch", f"{OURS} [F]"], more, 2)
    return text


def _title(row: Row) -> str:
    return f"{row['case']}, {row['note']}" if row["note"] else str(row["case"])


def overhead_table(results: Results) -> str:
    """Write the host time of all packages beside the forward pass."""
    lines = []
    for row in results.rows("overhead"):
        forward = quartiles([seconds for times in row["times"].values() for seconds in times["forwards"]])
        cells = [
            with_range(scaled_by(1e6, results.beside(row, name))) if name in row["times"] else "–"
            for name in (OURS, IN_INFERENCE_MODE, TC, GC)
        ]
        ratios = [results.overhead(name, **{key: row[key] for key in _KEY}) for name in (TC, GC)]
        cells += ["–" if ratio is None else amount(ratio) for ratio in ratios]
        lines.append([_title(row), row["model"], row["layer"], amount(1e6 * forward.median), *cells])
    header = [
        "",
        "model",
        "layer",
        "forward [µs]",
        f"{OURS} [µs]",
        "in inference mode [µs]",
        "TorchCAM [µs]",
        "grad-cam [µs]",
        "ours / TorchCAM",
        "ours / grad-cam",
    ]
    return table(header, lines, 7)


def scaled_by(factor: float, found: Quartiles) -> Quartiles:
    """Return quartiles in another unit."""
    return Quartiles(factor * found.median, factor * found.lower, factor * found.upper, found.count)


def memory_table(results: Results) -> str:
    """Write the peak memory of all packages side by side."""
    lines = []
    for row in results.rows("memory"):
        known = row["bytes"]
        cells = [f"{known[name] / 1e6:.0f}" if name in known else "–" for name in (PLAIN, OURS, TC, GC)]
        if set(known) & {PLAIN, OURS, TC, GC}:
            lines.append([_title(row), row["model"], row["layer"], str(row["batch"]), *cells])
        for name in known:
            if name not in {PLAIN, OURS, TC, GC}:
                title = f"{_title(row)}: {name.removeprefix(OURS).lstrip(', ')}"
                lines.append(
                    [title, row["model"], row["layer"], str(row["batch"]), "–", f"{known[name] / 1e6:.0f}", "–", "–"]
                )
    header = ["", "model", "layer", "batch", "inference [MB]", f"{OURS} [MB]", "TorchCAM [MB]", "grad-cam [MB]"]
    return table(header, lines, 5)


def agreement_table(results: Results) -> str:
    """Write how far the packages' maps are apart."""
    worst: dict[tuple[str, str, str], float] = {}
    for row in results.compared():
        for found in row["agreements"]:
            key = (row["case"], found["contender"], found["reason"] if found["good"] else "NOT KNOWN")
            worst[key] = max(worst.get(key, 0.0), found["difference"])
    lines = [[case, peer, f"{value:.0e}", reason] for (case, peer, reason), value in worst.items()]
    return table(["", "package", "largest difference", "why"], lines, 0)


def growth_table(results: Results) -> str:
    """Write how the time of a method grows from the smallest to the largest value that was measured."""
    lines = []
    for (method, axis), rows in panels(results).items():
        cells = []
        for name in (OURS, TC, GC):
            line = curve(rows, name)
            ends = [f"{amount(found.median)} F at {value}" for value, found in (line[0], line[-1])] if line else ["–"]
            cells.append(" → ".join(ends))
        lines.append([method, axis, *cells])
    return table(["", "what grows", OURS, "TorchCAM", "grad-cam"], lines, 0)


def panels(results: Results) -> dict[tuple[str, str], list[Row]]:
    """Sort the measurements of growth by method and axis."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows("growth"):
        found.setdefault((row["method"], row["axis"]), []).append(row)
    return {key: sorted(rows, key=lambda row: int(row["value"])) for key, rows in found.items()}


def curve(rows: Sequence[Row], contender: str) -> list[tuple[int, Quartiles]]:
    """Return a contender's times in forwards along an axis."""
    return [
        (row["value"], quartiles(Timing(**row["times"][contender]).ratios)) for row in rows if contender in row["times"]
    ]


# Plots

SPACED = partial(ConstrainedLayoutEngine, w_pad=0.1, h_pad=0.08)
COLOURS = {OURS: "#0b6e4f", TC: "#d1495b", GC: "#8d99ae", PLAIN: "#c9ccd1"}
LABELS = {OURS: "this package", TC: "TorchCAM 0.5.0", GC: "pytorch-grad-cam 1.5.7", PLAIN: "inference alone"}


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there is; return the pictures by the section that they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    if results.data.get("growth"):
        drawn["How costs grow"] = folder / "performance.png"
        draw_growth(results).savefig(drawn["How costs grow"])
    if results.data.get("memory"):
        drawn["Peak memory"] = folder / "performance-memory.png"
        draw_memory(results).savefig(drawn["Peak memory"])
    return drawn


def draw_growth(results: Results) -> Figure:
    """Draw the time against what grows, a panel for each method and axis."""
    found = panels(results)
    columns = min(3, len(found))
    bands = -(-len(found) // columns)
    figure = Figure(figsize=(3.9 * columns, 3.2 * bands + 0.4), dpi=130, layout=SPACED())
    axes = figure.subplots(bands, columns, squeeze=False).flatten()
    for axis, ((method, title), rows) in zip(axes, found.items(), strict=False):
        values = [row["value"] for row in rows]
        for name in (GC, TC, OURS):
            line = curve(rows, name)
            if not line:
                continue
            places = [value for value, _ in line]
            times = [time for _, time in line]
            axis.fill_between(
                places, [t.lower for t in times], [t.upper for t in times], color=COLOURS[name], alpha=0.2, linewidth=0
            )
            axis.plot(
                places,
                [t.median for t in times],
                "o-",
                color=COLOURS[name],
                markersize=4,
                linewidth=2,
                label=LABELS[name],
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        if high / low < 10:  # less than a decade has one label or none
            middle = (low * high) ** 0.5
            low, high = middle / 3.3, middle * 3.3
        axis.set_ylim(low, high)
        axis.set_xticks(values, [str(value) for value in values])
        axis.set_xticks([], minor=True)
        digits = (1, 3) if high / low > 30 else (1, 2, 5)
        ticks = [tick for power in range(-1, 5) for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([], minor=True)
        axis.set_title(method, fontsize=10, fontweight="bold")
        axis.set_xlabel(title, fontsize=9)
        axis.set_ylabel("time in forwards", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    ordered = [label for label in LABELS.values() if label in handles]
    figure.legend([handles[label] for label in ordered], ordered, loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_memory(results: Results) -> Figure:
    """Draw the peak memory of all packages, a panel for each case."""
    rows = [row for row in results.rows("memory") if OURS in row["bytes"] and {TC, GC} & set(row["bytes"])]
    rows = [row for row in rows if row["case"] != "GradCAM" or row["batch"] == max(r["batch"] for r in rows)]
    columns = min(3, max(len(rows), 1))
    bands = max(-(-len(rows) // columns), 1)
    figure = Figure(figsize=(4.0 * columns, 1.85 * bands), dpi=130, layout=SPACED())
    axes = figure.subplots(bands, columns, squeeze=False).flatten()
    for axis, row in zip(axes, rows, strict=False):
        names = [name for name in (GC, TC, OURS, PLAIN) if name in row["bytes"]]
        sizes = [row["bytes"][name] / 1e6 for name in names]
        bars = axis.barh([LABELS[name] for name in names], sizes, color=[COLOURS[name] for name in names])
        axis.bar_label(bars, [f"{size:.0f} MB" for size in sizes], padding=3, fontsize=8)
        axis.set_xlim(0, 1.35 * max(sizes))
        images = "1 image" if row["batch"] == 1 else f"{row['batch']} images"
        axis.set_title(f"{row['case']}, {images}\n{row['model']}", fontsize=9, fontweight="bold", loc="left")
        axis.set_xticks([])
        axis.tick_params(axis="y", labelsize=8, length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    return figure


# Targets


@dataclass(frozen=True)
class Target:
    """A number that was asked for.

    Attributes:
        what: what it is about
        limit: the largest value, or the smallest
        value: what was measured, None if nothing was
        least: whether the limit is the smallest value
    """

    what: str
    limit: float
    value: float | None
    least: bool = False

    @property
    def verdict(self) -> str:
        """PASS or FAIL, or that nothing was measured."""
        if self.value is None:
            return "not measured"
        return "PASS" if (self.value >= self.limit if self.least else self.value <= self.limit) else "FAIL"

    @property
    def cells(self) -> list[str]:
        """The row of a table."""
        value = "–" if self.value is None else f"{self.value:.1e}" if self.limit < 1e-2 else f"{self.value:.3g}"
        limit = f"{self.limit:.0e}" if self.limit < 1e-2 else f"{self.limit:g}"
        return [self.what, f"{'≥' if self.least else '≤'} {limit}", value, self.verdict]


def targets(results: Results) -> list[Target]:
    """Return all targets with what was measured."""
    found = []
    for model, limit in (("resnet18", 1.05), ("resnet50", 1.05), ("vit_b_16", 1.10)):
        found += [
            Target(f"GradCAM {model}, batch {batch} [F]", limit, results.time(case="GradCAM", model=model, batch=batch))
            for batch in (1, 8)
        ]
    for model, limit in (("resnet18", 1.3), ("resnet50", 1.3), ("vit_b_16", 1.7)):
        for batch in (1, 8):
            ratio = results.memory(OURS, PLAIN, case="GradCAM", model=model, batch=batch)
            title = f"GradCAM {model}, batch {batch}: peak memory / plain inference's"
            found.append(Target(title, limit, None if ratio is None else ratio[1]))
    for model in ("resnet50", "vit_b_16"):
        ratio = results.memory(TC, OURS, case="GradCAM", model=model, batch=8)
        title = f"GradCAM {model}, batch 8: TorchCAM's peak memory / ours"
        found.append(Target(title, 4, None if ratio is None else ratio[0], least=True))
    for model, layer, limit in (
        ("resnet18", "layer4", 200),
        ("resnet50", "layer4", 400),
        ("resnet18", "layer3", 4),
        ("resnet50", "layer3", 4),
    ):
        value = results.faster(GC, case="AblationCAM", model=model, layer=layer)
        found.append(Target(f"AblationCAM {model} {layer}: times as fast as grad-cam", limit, value, least=True))
    differences = [a["difference"] for row in results.rows("times", case="AblationCAM") for a in row["agreements"]]
    found.append(Target("AblationCAM: largest difference of the weights", 1e-5, max(differences, default=None)))
    for case in ("ScoreCAM", "SSCAM", "ISCAM"):
        found.append(Target(f"{case}: times as fast as TorchCAM", 1.25, results.faster(TC, case=case), least=True))
    for case in OVERHEAD:
        value = results.overhead(TC, case=case, model=SMALL)
        found.append(Target(f"{case}: host time beside the forward of a small model / TorchCAM's", 1.3, value))
    sizes = [size for row in results.rows("memory", case=CHANNELS_CASE) for size in row["bytes"].values()]
    value = max(sizes) / min(sizes) if len(sizes) > 1 else None
    found.append(Target("ScoreCAM: peak memory with 2048 channels / with 512", 1.1, value))
    for case, limit in (
        ("SmoothGradCAMpp", 5.6),  # one pass of them proves that the model gives the recorded score again
        ("EigenCAM", 1.1),
        ("EigenGradCAM", 1.2),
        ("KPCACAM", 1.2),
        ("FullGrad", 4.0),
    ):
        found.append(Target(f"{case} [F]", limit, results.time(case=case)))
    one = f"{OURS}, one class"
    ratio4, ratio3 = (results.faster(OURS, one, case="100 classes", layer=layer) for layer in ("layer4", "layer3"))
    found += [
        Target("100 classes of one image at layer4 / one class", 2, ratio4),
        Target("100 classes of one image at layer3 / 100 single calls", 0.25, None if ratio3 is None else ratio3 / 100),
    ]
    stream = results.data.get("stream")
    grown = stream["end"] / stream["early"] if stream else None
    found.append(Target("2,000 images through a stream: memory at the end / after 100", 1.02, grown))
    for name, limit in (("enabled", 1.02), ("enabled, EigenCAM", 1.02), ("disabled", 1.01)):
        value = None
        for row in results.rows("times", case="Hooks"):
            value = results.forwards(row, name).median / results.forwards(row, "no extractor").median
        found.append(Target(f"hooks {name}: resnet18 forward, batch 1 / without extractor", limit, value))
    imports = results.data.get("imports")
    value = median(imports["torchcam.methods"]) / median(imports["torch"]) if imports else None
    found.append(Target("`import torchcam.methods` / `import torch`", 1.1, value))
    return found


# Documents


def describe(results: Results) -> str:
    """Describe the machine of the measurements."""
    machine = results.data.get("machine", {})
    parts = [f"{key} {value}" for key, value in machine.items()]
    if results.data.get("clock") == "cpu":
        parts.append("seconds of the process, not of the wall")
    return ", ".join(parts)


def write_report(results: Results, pictures: Mapping[str, Path] | None = None) -> str:
    """Write everything, in Markdown; with pictures, by the section that they belong to."""
    pictures = pictures or {}
    parts = [f"Measured on: {describe(results)}."]
    sections: list[tuple[str, str, Callable[[Results], str]]] = [
        ("Time", "times", times_table),
        ("Host time beside the forward pass", "overhead", overhead_table),
        ("Peak memory", "memory", memory_table),
        ("How costs grow", "growth", growth_table),
        ("Agreement", "times", agreement_table),
    ]
    for title, section, write in sections:
        if results.data.get(section):
            parts.append(f"### {title}\n\n{write(results)}")
        if title in pictures:
            parts.append(f"![{title}](images/{pictures[title].name})")
    rows = [target.cells for target in targets(results)]
    parts.append("### Targets\n\n" + table(["", "limit", "measured", ""], rows, 0))
    return "\n\n".join(parts)


def summary_table(results: Results) -> str:
    """Write the short table for the front page."""
    lines = []
    for row in results.rows("times"):
        if row["case"] == "Hooks" or row["batch"] != 1 or OURS not in row["times"]:
            continue
        if row["model"] not in {"resnet50", "vit_b_16"} and row["case"] in {"GradCAM", "EigenCAM", "FullGrad"}:
            continue
        if row["case"] in {"GradCAMpp", "LayerCAM", "EigenGradCAM", "KPCACAM", "SSCAM", "ISCAM"}:
            continue
        cells = [
            f"{amount(results.forwards(row, name).median)} F" if name in row["times"] else "–"
            for name in (OURS, TC, GC)
        ]
        where = f"{row['model']} {row['layer']}" if row["model"] not in {"vit_b_16"} else row["model"]
        lines.append([f"{_title(row)}, {where}".rstrip(), *cells])
    for row in results.rows("memory", case="GradCAM", batch=8):
        if row["model"] in {"resnet50", "vit_b_16"}:
            cells = [f"{row['bytes'][name] / 1e6:.0f} MB" if name in row["bytes"] else "–" for name in (OURS, TC, GC)]
            lines.append([f"GradCAM, {row['model']}, batch of 8, peak memory", *cells])
    return table(["", OURS, "TorchCAM 0.5.0", "grad-cam 1.5.7"], lines, 3)


def replace_block(path: Path, name: str, content: str) -> None:
    """Replace what stands between the two markers of a block in a file.

    Raises:
        ValueError: if the file does not have the two markers, once each and in order
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} needs one {begin} and, after it, one {end}")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n\n{content}\n\n{end}{tail}", encoding="utf-8")
