"""Export many architectures, run the files in ONNX Runtime, and write down how far the maps are from the extractor's.

Random weights, small images; for each model the default layer and one in the middle. The maps are those before
scaling: an error is a share of what they sum up, the largest sum of |w A| at a position. `--write-docs` writes
docs/exported.md. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from torchcam.export import export
from torchcam.layers import candidates

METHODS = ("GradCAM", "LayerCAM", "XGradCAM", "EigenGradCAM")
TORCHVISION = {
    "alexnet": 96,
    "vgg11": 64,
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "googlenet": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "maxvit_t": 224,
    "vit_b_16": 224,
}
TIMM = {
    "vit_tiny_patch16_224": 224,
    "vit_small_patch14_dinov2": 518,
    "mixer_s32_224": 224,
    "levit_128s": 224,
}
PAGE = Path(__file__).parent.parent / "docs" / "exported.md"
HEAD = """\
# Exports that were tried

Written by `scripts/export_zoo.py` with torch {torch} and ONNX Runtime {runtime}: random weights, maps before scaling.
*Error* is the largest difference between the maps of the ONNX file and those of the extractor, on one image, on three,
for other classes and with an image that is not finite, as a share of the largest sum of contributions |w A| at a
position. What differs by more than 1e-5 is refused.

| model | layer | method | error |
|---|---|---|---|
"""


def models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Yield names, functions that build the models, and sides of their images."""
    import torchvision

    for name, side in TORCHVISION.items():
        options = {"init_weights": False} if name == "googlenet" else {}
        yield name, partial(torchvision.models.get_model, name, weights=None, **options), side
    name = "deeplabv3_mobilenet_v3_large"
    yield name, partial(torchvision.models.get_model, name, weights=None, weights_backbone=None), 64
    try:
        import timm
    except ImportError:
        print("timm is not installed: its models are left out", file=sys.stderr)
        return
    for name, side in TIMM.items():
        yield name, partial(timm.create_model, name, pretrained=False), side


def layers_of(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the default layer, and a stage in the middle."""
    found = candidates(model, images)
    stages = [one.name for one in found if one.depends and one.is_stage and one.fits]
    middle = stages[len(stages) // 2]
    return [found.choice or middle, *([middle] if middle != found.choice else [])]


def attempt(model: nn.Module, images: torch.Tensor, layer: str, method: str) -> str:
    """Return the error of an exported file, or why there is none."""
    try:
        exported = export(model, method, layer, example=images, normalized=False)
        with tempfile.TemporaryDirectory() as folder:
            exported.save(Path(folder, "model.onnx"))
    except Exception as error:  # noqa: BLE001 - whatever stands in the way is written down
        return f"refused: {' '.join(str(error).split())[:160]}"
    return f"{exported.error:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a model that is known to export did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models, separated by commas")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="methods, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wanted = None if arguments.only is None else arguments.only.split(",")
    rows: list[tuple[str, ...]] = []
    chosen = [entry for entry in models() if wanted is None or entry[0] in wanted]
    for name, build, side in tqdm(chosen, disable=not sys.stderr.isatty()):
        torch.manual_seed(0)
        model, images = build().eval(), torch.rand(1, 3, side, side)
        for layer in layers_of(model, images):
            for method in arguments.methods.split(","):
                began = time.perf_counter()
                result = attempt(model, images, layer, method)
                print(f"{name} {layer} {method}: {result} ({time.perf_counter() - began:.0f} s)", flush=True)
                rows.append((name, f"`{layer}`", method, result))
    if arguments.write_docs:
        import onnxruntime

        head = HEAD.format(torch=torch.__version__.split("+")[0], runtime=onnxruntime.__version__)
        PAGE.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
    return int(any(row[-1].startswith("refused") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
