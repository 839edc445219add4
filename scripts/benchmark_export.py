"""Measure what a map costs in an exported model: in ONNX Runtime with the map and without it, beside eager PyTorch.

All take turns, A B C D A B C D ..., on one thread, and the clock stops while other processes have the processor. Tables
have medians of the rounds, and quartiles of the quotients of each round. 224 x 224, batch 1, random weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import replace_block, table, with_range
from _timing import quartiles
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


def rounds_of(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the times of each function, in ms; they take turns, and the first two rounds do not count."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 2):
        for function, kept in zip(functions, times, strict=True):
            began = time.process_time()
            function()
            if turn >= 2:
                kept.append(1000 * (time.process_time() - began))
    return times


def measure(model: nn.Module, layer: str, images: Tensor, rounds: int) -> list[list[float]]:
    """Return the times of the exported model without and with its map, and of the eager one, in ms."""

    def eager() -> object:
        extractor.enable_hooks()
        found = extractor(3, model(images))
        extractor.disable_hooks()
        return found

    with tempfile.TemporaryDirectory() as folder:
        exported = sessions(model, layer, images, Path(folder))
        with GradCAM(model, layer, enable_hooks=False) as extractor, torch.inference_mode():
            return rounds_of([*exported, lambda: model(images), eager], rounds)


def row(name: str, layer: str, times: Sequence[Sequence[float]]) -> list[str]:
    """Return a row of the table."""
    quotients = [quartiles([b / a for a, b in zip(times[i], times[i + 1], strict=True)]) for i in (0, 2)]
    plain, explained, eager, hooked = (f"{quartiles(one).median:.1f}" for one in times)
    cells = [plain, explained, with_range(quotients[0]), eager, hooked, with_range(quotients[1])]
    return [name, layer, *cells]


def report(results: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    heads = ["model", "layer", "exported [ms]", "with map [ms]", "with map / exported"]
    heads += ["eager [ms]", "with hooks [ms]", "with hooks / eager"]
    lines = []
    for key, times in results["times"].items():
        name, layer = key.split(" ")
        lines.append(row(name, layer, times))
    return f"Measured with {results['versions']}.\n\n{table(heads, lines, 6)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", help="models, separated by commas")
    parser.add_argument("--json", type=Path, help="a file to which the times are added")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/performance.md")
    arguments = parser.parse_args(argv)
    import onnxruntime
    import torchvision

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, {platform.system()}"
    results: dict[str, Any] = {"versions": versions, "times": {}}
    if arguments.json and arguments.json.is_file():
        results["times"] = json.loads(arguments.json.read_text(encoding="utf-8"))["times"]
    for name, layers in CASES.items():
        if arguments.only is not None and name not in arguments.only.split(","):
            continue
        torch.manual_seed(0)
        model, images = torchvision.models.get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
        for layer in layers:
            times = measure(model, layer, images, arguments.rounds)
            results["times"][f"{name} {layer}"] = times
            print(" | ".join(row(name, layer, times)), flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.write_docs:
        replace_block(Path(__file__).parent.parent / "docs" / "performance.md", "export", report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
