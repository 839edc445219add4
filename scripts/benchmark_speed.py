"""Measure the time and the memory of maps, side by side with TorchCAM 0.5.0 and pytorch-grad-cam 1.5.7.

All three packages run in one process on the same model and input, in turn (A B C A B C ...), after a round to warm up,
in which their maps are compared. Every call stands between two forwards of the same model and batch in inference mode,
and is counted in F, the mean of the two; tables show medians with quartiles. Ours explain in inference mode; the peers
run as their documentation has it. Extractors are made beforehand, unmeasured.

Overhead is the host time beside the forward pass: what a forward with its call takes, less the mean of the forwards
around it, on the CPU with one thread. On a model of three layers each of these times is the median of calls in a row.

Peak memory is measured in fresh processes, one for each case and package (see scripts/_memory_case.py).

The exit code is 1 if the maps of a peer differ from ours for no known reason. A target that is missed does not change
it: times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _contenders import (
    GRADCAM,
    LAYERS,
    OURS,
    TORCHCAM,
    Case,
    Contender,
    Growth,
    Peers,
    Setting,
    cases,
    growths,
    make_model,
    memory_cases,
    overhead_cases,
)
from _memory_case import ALLOCATOR
from _report import Results, draw, replace_block, summary_table, write_report
from _timing import Budget, Clock, CudaClock, WallClock, interleave, quartiles

import torchcam

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("times", "overhead", "memory", "imports", "growth")
QUICK = {"models": ["resnet18"], "batch_sizes": [1], "repeats": 2}


def make_clock(options: argparse.Namespace, calls: int = 1) -> Clock:
    """Return the clock that calls are measured with, so many in a row."""
    if options.device == "cuda":
        return CudaClock()
    return WallClock(time.process_time if options.cpu_time else time.perf_counter, calls)


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions, without anything that names it."""
    import torchvision

    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found = {
        "system": platform.system(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        OURS: torchcam.__version__,
        "TorchCAM": TORCHCAM.requirements[0].partition("==")[2],
        "pytorch-grad-cam": GRADCAM.requirements[0].partition("==")[2],
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


# Times


def as_entrant(contender: Contender, setting: Setting, results: dict[str, Any], name: str) -> Any:
    """Prepare a contender for `interleave`; keep what is to be compared of its first result."""

    @contextmanager
    def prepared() -> Iterator[Callable[[], Any]]:
        with contender(setting) as trial:
            returned: list[Any] = []
            first = name not in results

            def run() -> Any:
                result = trial.run()
                if first:
                    returned.append(result)
                return result

            yield run
            if first:
                results[name] = trial.comparable(returned[0]) if trial.comparable and returned else None

    return prepared


def measure_case(
    case: Case,
    setting: Setting,
    clock: Clock,
    *,
    repeats: int,
    seconds: float | None,
    every: bool,
    once_above: float = 20.0,
) -> dict[str, Any]:
    """Compare the results of all contenders of a case, and measure them."""
    compared: dict[str, Any] = {}
    entrants = {
        name: as_entrant(contender, setting, compared, name)
        for name, contender in case.contenders.items()
        if every or name not in case.slow
    }
    timings = interleave(setting.forward, entrants, clock, repeats=repeats, seconds=seconds, once_above=once_above)
    agreements = []
    for name, check in case.checks.items():
        if name in compared:
            found = check.compare(compared[OURS], compared[name])
            agreements.append({"contender": name, "good": found.good, **vars(found)})
    return {
        "case": case.name,
        "model": setting.name,
        "layer": "" if case.name == "FullGrad" else ", ".join(setting.layers),
        "batch": len(setting.x),
        "note": case.note,
        "times": {name: vars(timing) for name, timing in timings.items() if timing.seconds},
        "left_out": [name for name in case.slow if not every],
        "agreements": agreements,
    }


def measure_times(found: Sequence[Case], options: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Measure all cases, model after model."""
    rows = []
    for name in options.models:
        model = None
        for case in found:
            if name not in case.models:
                continue
            for batch in case.batches:
                if batch not in options.batch_sizes:
                    continue
                label = f"{case.name} {name} {case.layer or LAYERS[name]} batch {batch}"
                share = budget.share()
                if share is not None and share <= 0:
                    print(f"{label}: out of time, left out", flush=True)
                    continue
                model = make_model(name, options.device) if model is None else model
                setting = case.setting(name, model, batch)
                clock = make_clock(options, case.calls)
                row = measure_case(case, setting, clock, repeats=options.repeats, seconds=share, every=options.slow)
                rows.append(row)
                print(f"{label}: {one_line(row)}", flush=True)
    return rows


def measure_overhead(found: Sequence[Case], options: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Measure the host time beside the forward pass: on the CPU, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_times(found, argparse.Namespace(**{**vars(options), "device": "cpu"}), budget)
    finally:
        torch.set_num_threads(threads)


def one_line(row: dict[str, Any]) -> str:
    """Summarise the results of a case: its time in forwards, and the time beside its forward."""
    results = Results({"times": [row]})
    parts = [
        f"{name} {results.forwards(row, name).median:.2f} F ({1e3 * results.beside(row, name).median:+.3f} ms)"
        for name in row["times"]
    ]
    for agreement in row["agreements"]:
        verdict = agreement["reason"] or ("as ours" if agreement["good"] else "DISAGREES")
        parts.append(f"{agreement['contender']} {verdict} ({agreement['difference']:.1e})")
    return ", ".join(parts)


def count_tasks(found: Sequence[Case], options: argparse.Namespace) -> int:
    """Count what there is to measure."""
    return sum(
        len(set(case.batches) & set(options.batch_sizes)) * len(set(case.models) & set(options.models))
        for case in found
    )


# Growth


def measure_growth(found: Sequence[Growth], options: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Measure how costs grow."""
    rows = []
    clock = make_clock(options)
    # Small values first, everywhere: where time runs out, it is the large ones that are missing.
    points = [(position, growth, value) for growth in found for position, value in enumerate(growth.values)]
    for _, growth, value in sorted(points, key=lambda point: point[0]):
        label = f"growth: {growth.method}, {growth.axis} {value}"
        share = budget.share()
        if share is not None and share <= 0:
            print(f"{label}: out of time, left out", flush=True)
            continue
        setting = growth.setting(value)
        entrants = {
            name: as_entrant(contender, setting, {name: None}, name)
            for name, contender in growth.contenders.items()
            if options.slow or value <= growth.most.get(name, value)
        }
        timings = interleave(
            setting.forward, entrants, clock, repeats=min(options.repeats, 5), seconds=share, once_above=5.0
        )
        row: dict[str, Any] = {"method": growth.method, "axis": growth.axis, "value": value}
        row["times"] = {name: vars(timing) for name, timing in timings.items()}
        rows.append(row)
        parts = [f"{name} {quartiles(timing.ratios).median:.2f} F" for name, timing in timings.items()]
        print(f"{label}: {', '.join(parts)}", flush=True)
    return rows


# Memory


def environment_for(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment that memory is measured in."""
    exact = ALLOCATOR if options.allocator == "exact" else {}
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), **exact}


def measure_memory(options: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Measure the peak memory of all cases, each in a process of its own."""
    rows = []
    environment = environment_for(options)
    for number, case in enumerate(memory_cases(Peers(options.peers), every=options.slow)):
        if options.cases and case.name not in options.cases:
            continue
        for model in (name for name in case.models if name in options.models):
            for batch in (size for size in case.batches if size in options.batch_sizes):
                row: dict[str, Any] = {
                    "case": case.name,
                    "model": model,
                    "layer": "" if case.name == "FullGrad" else case.layer or LAYERS[model],
                    "batch": batch,
                    "note": case.note,
                    "bytes": {},
                }
                for contender in case.contenders:
                    share = budget.share()
                    if share is not None and share <= 0:
                        continue
                    row["bytes"][contender] = memory_of(number, contender, model, batch, options, environment)
                if row["bytes"]:
                    rows.append(row)
                    parts = [f"{name} {size / 1e6:.0f} MB" for name, size in row["bytes"].items()]
                    print(f"memory: {case.name} {model} {row['layer']} batch {batch}: {', '.join(parts)}", flush=True)
    return rows


def memory_of(
    number: int, contender: str, model: str, batch: int, options: argparse.Namespace, environment: dict[str, str]
) -> int:
    """Return the peak memory of one contender above what the process held before."""
    what = ["--case", str(number), "--contender", contender, *(["--every"] if options.slow else [])]
    found = in_fresh_process([*what, "--model", model, "--batch", str(batch)], options, environment)
    return found["peak"] - found["before"]


def measure_stream(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Measure the memory during a stream of images."""
    side, count = (224 if options.slow else 64), 2000
    what = ["--stream", str(count), "--side", str(side), "--model", "resnet18", "--batch", "4"]
    found = in_fresh_process(what, options, environment)
    print(
        f"stream: {found['early'] / 1e6:.0f} MB after 100 images, {found['end'] / 1e6:.0f} MB after {count}", flush=True
    )
    return {"images": count, "side": side, **found}


def in_fresh_process(what: Sequence[str], options: argparse.Namespace, environment: dict[str, str]) -> dict[str, int]:
    """Run a measurement of memory in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("_memory_case.py")), *what, "--peers", str(options.peers)]
    command += ["--threads", str(options.threads), "--device", options.device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise SystemExit(f"{' '.join(what)} failed:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


# Imports


def measure_imports(repeats: int) -> dict[str, list[float]]:
    """Return the seconds of imports in fresh processes, in turn; the first round is not counted."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    names = ["torch", "torchcam.methods"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats + 1):
        for name in names:
            command = [sys.executable, "-c", code.format(name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - nothing foreign
            if round_:
                seconds[name].append(float(done.stdout))
    medians = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in seconds.items())
    print(f"imports: {medians}", flush=True)
    return seconds


# The command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, default=ROOT / "build" / "peers", help="folder with the peers, installed where missing"
    )
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS), help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names of the cases to measure; default: all")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most (default: %(default)s)")
    parser.add_argument("--budget-seconds", type=float, help="stop adding rounds, and then cases, after so long")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's own seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument("--slow", action="store_true", help="measure what takes minutes as well")
    parser.add_argument("--quick", action="store_true", help="one model, one image, two rounds: to see that it works")
    parser.add_argument(
        "--allocator",
        choices=["exact", "default"],
        default="exact",
        help="memory on the CPU: freed blocks go back to the system at once, or as the C library likes (noisy)",
    )
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--render", type=Path, nargs="+", help="measure nothing: read these, later ones first")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--write-readme", action="store_true", help="put the short table into README.md")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
        if options.sections == list(SECTIONS):
            options.sections = ["times", "imports"]
    names = {case.name for every in (False, True) for case in cases(Peers(options.peers), every=every)}
    names |= {case.name for case in memory_cases(Peers(options.peers), every=True)}
    unknown = sorted(set(options.cases or ()) - names)
    if unknown:
        parser.error(f"unknown --cases {unknown}; there are {sorted(names)}")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for."""
    torch.set_num_threads(options.threads)
    peers = Peers(options.peers)
    peers.install()
    listed = {
        "times": cases(peers, every=options.slow),
        "overhead": overhead_cases(peers),
        "memory": memory_cases(peers, every=options.slow),
    }
    found = {
        section: [case for case in listed[section] if not options.cases or case.name in options.cases]
        for section in options.sections
        if section in listed
    }
    tasks = sum(count_tasks(found.get(section, ()), options) for section in ("times", "overhead"))
    tasks += sum(count_tasks([case], options) * len(case.contenders) for case in found.get("memory", ()))
    growing = growths(peers, options.device) if "growth" in options.sections and not options.cases else []
    tasks += sum(len(growth.values) for growth in growing)
    budget = Budget(options.budget_seconds, tasks, WallClock())
    results: dict[str, Any] = {"machine": machine(options.device), "device": options.device, "slow": options.slow}
    results["allocator"], results["clock"] = options.allocator, "cpu" if options.cpu_time else "wall"
    if "memory" in options.sections:
        results["memory"] = measure_memory(options, budget)
        if not options.cases:
            results["stream"] = measure_stream(options, environment_for(options))
    if "times" in options.sections:
        results["times"] = measure_times(found["times"], options, budget)
    if "overhead" in options.sections:
        results["overhead"] = measure_overhead(found["overhead"], options, budget)
    if growing:
        results["growth"] = measure_growth(growing, options, budget)
    if "imports" in options.sections and not options.cases:
        results["imports"] = measure_imports(min(options.repeats, 9))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    if options.render:
        data: dict[str, Any] = {}
        for path in options.render:
            data = Results(json.loads(path.read_text(encoding="utf-8"))).joined(data)
    else:
        data = measure(options)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    results = Results(data)
    print(f"\n{write_report(results)}\n\n{summary_table(results)}")
    if options.write_docs:
        pictures = draw(results, ROOT / "docs" / "images")
        replace_block(ROOT / "docs" / "performance.md", "benchmark", write_report(results, pictures))
    if options.write_readme:
        replace_block(ROOT / "README.md", "speed", summary_table(results))
    wrong = results.disagreements()
    for line in wrong:
        print(f"DISAGREES: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
