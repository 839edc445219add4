"""Measure ROAD against that of pytorch-grad-cam 1.5.7, on the CPU: both score the same maps of the same model.

What is timed is the whole metric, the passes of the model included: the change of one class's logit when the most and
the least relevant 20, 40, 60 and 80 percent of the positions are imputed, combined. The two take turns in one process;
the table shows the median and the quartiles of the seconds, the median of the ratios between neighbouring calls, and
the values that they give: these differ by the noise, which either draws for itself.

The exit code is 1 if the ratio is less than the one asked for.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _contenders import GRADCAM
from _peers import install, load
from _timing import Timing, WallClock, interleave, quartiles
from torch import Tensor, nn

from torchcam.methods import GradCAM
from torchcam.metrics import ROAD

PERCENTILES = (20, 40, 60, 80)


def contenders(
    folder: Path, model: nn.Module, x: Tensor, maps: Tensor, class_idx: int
) -> Mapping[str, Callable[[], float]]:
    """Return the calls to compare: each gives the mean of ROAD over the samples.

    Args:
        folder: where pytorch-grad-cam is, or gets installed
        model: the model
        x: its inputs
        maps: the maps to score, of the inputs' size
        class_idx: the class whose logit changes
    """
    install(GRADCAM, folder)
    package = load(GRADCAM, folder, GRADCAM.module)
    targets = [importlib.import_module(f"{package.__name__}.utils.model_targets").ClassifierOutputTarget(class_idx)]
    theirs = importlib.import_module(f"{package.__name__}.metrics.road").ROADCombined(list(PERCENTILES))
    arrays = maps.numpy()

    def ours() -> float:
        metric = ROAD(model, percentiles=PERCENTILES)
        metric.update(x, class_idx, maps=maps)
        return metric.summary()["road"]

    return {"torchcam": ours, "pytorch-grad-cam": lambda: float(theirs(x, arrays, targets * len(x), model).mean())}


class CpuClock(WallClock):
    """The time that this process has been computing, in all its threads: on a busy machine, the fairer one."""

    def measure(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, and what it returns."""
        taken = 0.0

        def timed() -> Any:
            nonlocal taken
            start = time.process_time()
            result = call()
            taken = time.process_time() - start
            return result

        _, result = super().measure(timed)
        return taken, result


def compare(
    calls: Mapping[str, Callable[[], float]], forward: Callable[[], Any], repeats: int, clock: WallClock
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Measure the calls in turn; return their timings, and what each gave at first."""
    values: dict[str, float] = {}

    def entrant(call: Callable[[], float]) -> Callable[[], Any]:
        @contextmanager
        def ready() -> Iterator[Callable[[], float]]:
            yield call

        return ready

    entrants = {name: entrant(call) for name, call in calls.items()}
    timings = interleave(forward, entrants, clock, repeats=repeats, once_above=float("inf"), look=values.__setitem__)
    return timings, values


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "torchcam-peers" / "gradcam"
    parser.add_argument("--peer-dir", type=Path, default=default, help=f"folder for the peer (default: {default})")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the one to warm up (default: 5)")
    parser.add_argument("--samples", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: 224)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count the time of computing, not that on the wall")
    parser.add_argument("--at-least", type=float, default=5.0, help="ratio to reach (default: 5)")
    options = parser.parse_args(arguments)

    from torchvision.models import resnet18

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = resnet18().eval()
    x = torch.randn(options.samples, 3, options.size, options.size)
    with GradCAM(model, "layer3") as extractor, torch.no_grad():
        model(x)
        (cams,) = extractor(0)
    maps = torch.nn.functional.interpolate(cams.unsqueeze(1), x.shape[2:], mode="bilinear").squeeze(1)

    with torch.no_grad():
        calls = contenders(options.peer_dir, model, x, maps, class_idx=0)
        timings, values = compare(
            calls, lambda: model(x), options.repeats, CpuClock() if options.cpu_time else WallClock()
        )
    print(f"{'package':<20}{'seconds':>10}{'quartiles':>20}{'ROAD':>12}")
    for name, timing in timings.items():
        spread = quartiles(timing.seconds)
        print(f"{name:<20}{spread.median:>10.3f}{spread.lower:>12.3f} –{spread.upper:>6.3f}{values[name]:>12.5f}")
    ours, theirs = timings.values()
    ratio = statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))
    print(f"\n{ratio:.1f} times as fast, {options.samples} image(s) of {options.size} × {options.size}, ", end="")
    print(f"{options.threads} thread(s)")
    return 0 if ratio >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
