"""Measure a backward pass with balanced gradients against the plain one, on the same graph and layers.

The two run in turn (A B A B ...) on one recorded pass, to the output of the layer that is named, so that the forward
pass and what a method makes of the gradients are not in the times. The table shows medians with quartiles, and the
median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from torchcam.methods import HiResCAM
from torchcam.methods._request import Request

CASES = {  # an early layer, so that all operations lie behind it
    "vit_b_16": "conv_proj",
    "swin_t": "features.0",
    "convnext_tiny": "features.0",
    "efficientnet_b0": "features.0",
    "resnet50": "layer1",
}


def backward(
    model: nn.Module, layer: str, images: torch.Tensor, gradients: str
) -> tuple[HiResCAM, Callable[[], float]]:
    """Record a pass, and return a function that differentiates it once more and says how long that took."""
    extractor = HiResCAM(model, layer, gradients="balanced" if gradients == "balanced" else "plain")
    with torch.no_grad():
        model(images)

    def run() -> float:
        request = Request(extractor._recorder.find(), class_idx=0, retain_graph=True)
        synchronize(images.device)
        start = time.perf_counter()
        with torch.enable_grad():
            extractor._gradients(request)
        synchronize(images.device)
        return time.perf_counter() - start

    return extractor, run


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    """Print a table with a row for each model."""
    from torchvision import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, batch {options.batch_size}\n")
    print("| model | layer | plain, ms | balanced, ms | ratio |\n|---|---|---|---|---|")
    for name in options.models:
        model = getattr(models, name)().eval().to(options.device)
        images = torch.rand(options.batch_size, 3, 224, 224, device=options.device)
        runs = []
        extractors = []
        for gradients in ("plain", "balanced"):
            extractor, run = backward(model, CASES[name], images, gradients)
            extractors.append(extractor)
            runs.append(run)
        times = [(runs[0](), runs[1]()) for _ in range(options.repeats + 2)][2:]
        plain, balanced = ([1000 * value for value in column] for column in zip(*times, strict=True))
        ratio = statistics.median(after / before for before, after in zip(plain, balanced, strict=True))
        shown = " | ".join(
            f"{statistics.median(values):.1f} ({low:.1f} to {high:.1f})"
            for values in (plain, balanced)
            for low, _, high in [statistics.quantiles(values, n=4)]
        )
        print(f"| {name} | {CASES[name]} | {shown} | {ratio:.2f} |", flush=True)
        for extractor in extractors:
            extractor.remove_hooks()


if __name__ == "__main__":
    main()
