"""Measure what a map costs in an exported model: in ONNX Runtime with the map and without it, beside eager PyTorch.

All take turns; medians of as many rounds. One thread, 224 x 224, batch 1, random weights.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torchcam.export import export
from torchcam.methods import GradCAM

CASES = {
    "resnet18": ("layer4", "layer2"),
    "resnet50": ("layer4",),
    "mobilenet_v3_large": ("features",),
    "vit_b_16": ("encoder.layers.encoder_layer_11.ln_1",),
}


def sessions(model: nn.Module, layer: str, images: Tensor, folder: Path) -> list[Callable[[], object]]:
    """Return functions that run the exported model without and with its map."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    torch.onnx.export(model, (images,), folder / "plain.onnx", dynamo=True, verbose=False)
    export(model, "GradCAM", layer, example=images).save(folder / "map.onnx")
    plain, explained = (
        onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for name in ("plain.onnx", "map.onnx")
    )
    pixels = images.numpy()
    feed = {"images": pixels, "classes": torch.tensor([3]).numpy()}
    return [lambda: plain.run(None, {plain.get_inputs()[0].name: pixels}), lambda: explained.run(None, feed)]


def medians(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each function, in ms; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 2):
        for function, kept in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            if turn >= 2:
                kept.append(1000 * (time.perf_counter() - began))
    return [statistics.median(kept) for kept in times]


def measure(model: nn.Module, layer: str, images: Tensor, rounds: int) -> list[float]:
    """Return the times of the exported model without and with its map, and of the eager one, in ms."""

    def eager() -> object:
        extractor.enable_hooks()
        found = extractor(3, model(images))
        extractor.disable_hooks()
        return found

    with tempfile.TemporaryDirectory() as folder:
        exported = sessions(model, layer, images, Path(folder))
        with GradCAM(model, layer, enable_hooks=False) as extractor, torch.inference_mode():
            return medians([*exported, lambda: model(images), eager], rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="models, separated by commas")
    arguments = parser.parse_args(argv)
    import torchvision

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| model | layer | model [ms] | with map [ms] | with map / model | eager model [ms] | eager with map [ms] |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    for name, layers in CASES.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        torch.manual_seed(0)
        model, images = torchvision.models.get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
        for layer in layers:
            a, b, c, d = measure(model, layer, images, arguments.rounds)
            print(f"| {name} | {layer} | {a:.1f} | {b:.1f} | {b / a:.2f} | {c:.1f} | {d:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
