"""Measure the peak memory of one case in a process of its own, and print it.

What counts is the peak of the process (on CUDA, of the tensors) during one call, less what it held before it: the
libraries, the model, the input, and what a first, small call has left behind for good. On the CPU the peak is the
kernel's high-water mark of resident memory, set back right before the call; the benchmark makes the C library return
freed blocks to the system at once, in all processes alike, so that the mark is that of memory in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ALLOCATOR", "high_water", "main", "reset_high_water", "resident"]

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""What the environment says to the C library in all of these processes."""

_STATUS = Path("/proc/self/status")


def _field(name: str) -> int:
    """Return a number of kilobytes in the process's status, in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {name}")


def resident() -> int:
    """Return the resident memory in bytes, after what is free was returned to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _field("VmRSS")


def reset_high_water() -> None:
    """Set the high-water mark back to the resident memory of now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def high_water() -> int:
    """Return the largest resident memory since the mark was set back, in bytes."""
    return _field("VmHWM")


class Images:
    """Batches of noise, made when they are asked for."""

    def __init__(self, count: int, batch: int, side: int, device: str) -> None:
        self.count, self.batch, self.side, self.device = count, batch, side, device

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches."""
        import torch

        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, self.batch):
            shape = (min(self.batch, self.count - start), 3, self.side, self.side)
            yield torch.randn(shape, generator=generator).to(self.device)


def follow_stream(model: nn.Module, layer: str, images: Images, early: int) -> dict[str, int]:
    """Explain a stream of images; return the memory after so many of them, and at the end."""
    from torchcam.methods import GradCAM

    held: dict[str, int] = {}
    seen = 0
    with GradCAM(model, layer) as extractor:
        for (cams,) in extractor.stream(images):
            seen += len(cams)
            if seen >= early and "early" not in held:
                held["early"] = in_use(images.device)
        held["end"] = in_use(images.device)
    return held


def in_use(device: str) -> int:
    """Return the memory that is in use: of the process, or on CUDA of the tensors."""
    if device != "cuda":
        return _field("VmRSS")
    import torch

    return int(torch.cuda.memory_allocated())


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", type=int, help="number of the case")
    what.add_argument("--stream", type=int, metavar="IMAGES", help="explain so many images in place of a case")
    parser.add_argument("--side", type=int, default=224, help="of the images of a stream")
    parser.add_argument("--every", action="store_true", help="count the slow cases as well")
    parser.add_argument("--contender")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args(arguments)

    import torch
    from _contenders import LAYERS, SQUARE_TOKENS, Peers, Setting, make_model, memory_cases

    torch.set_num_threads(options.threads)
    if options.stream is not None:
        model = make_model(options.model, options.device)
        images = Images(options.stream, options.batch, options.side, options.device)
        print(json.dumps(follow_stream(model, LAYERS[options.model], images, early=100)))
        return 0
    peers = Peers(options.peers)
    case = memory_cases(peers, every=options.every)[options.case]
    prepare = case.contenders[options.contender]
    model = make_model(options.model, options.device)
    setting = case.setting(options.model, model, options.batch)
    small = setting.x[:1] if options.model in SQUARE_TOKENS else setting.x[:1, :, :64, :64]
    with prepare(Setting(setting.name, model, setting.layer, small.clone(), setting.classes[:1])) as trial:
        trial.run()
    del trial, small

    with prepare(setting) as trial:
        if options.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = trial.run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            before = resident()
            reset_high_water()
            result = trial.run()
            peak = high_water()
        del result
    print(json.dumps({"before": before, "peak": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
