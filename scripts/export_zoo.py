"""Export many architectures, run the files in ONNX Runtime, and write down how far the maps are from the extractor's.

Random weights, small images, and of large architectures few blocks of each kind; for each model a deep layer and one in
the middle. The maps are those before ReLU and scaling: an error is a share of what they sum up, the largest sum of
|w A| at a position. Results are added to docs/exported.json, where what is known is not tried again; `--write-docs`
writes docs/exported.md from it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchcam.export import export
from torchcam.export._exported import EXPORTABLE

METHODS = ("GradCAM", "LayerCAM", "EigenGradCAM")  # weights of channels, of elements, an eigenvector
OF_ALL_METHODS = ("resnet18", "vit_b_16", "swin_t")
DOCS = Path(__file__).parent.parent / "docs"
HEAD = """\
# Exports that were tried

Written by `scripts/export_zoo.py` with {versions}: {right} of {count} were right, random weights, maps before ReLU and
scaling. A number is the largest difference between the maps of the ONNX file and those of the extractor, on one image,
on three, for other classes and beside an image that is not finite, as a share of the largest sum of contributions |w A|
at a position. What differs by more than 1e-5 is refused.

Architectures that repeat their blocks were built with few of them, and narrow; their operations are the same.

One thing to know of ONNX Runtime: a `ScatterND` that adds runs on several threads and loses what two of them add to the
same place ([its issue 18048](https://github.com/microsoft/onnxruntime/issues/18048)). The gradient of DeepLab's
resizing held such nodes: in 28 of 300 runs maps were wrong by 0.04 to 0.14, in the others by less than 1e-5. Resizing
is now a product with matrices, and other sums over indices are `ScatterElements`, which adds in order.
"""


@dataclass(frozen=True)
class Model:
    """An architecture: how it is built, the side of its images, its layers from deep to middle."""

    build: Callable[[], nn.Module]
    side: int
    layers: tuple[str, str]
    about: str = "as it is"


def torchvision_models() -> dict[str, Model]:
    """Return the models of torchvision, by name."""
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.efficientnet import MBConvConfig
    from torchvision.models.regnet import BlockParams
    from torchvision.models.resnet import Bottleneck

    def narrow_vgg() -> nn.Module:
        model: nn.Module = models.vgg11(num_classes=10, init_weights=False)
        model.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
        return model

    expanding = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(6, 5, 2, 16, 24, 2), MBConvConfig(6, 3, 2, 24, 40, 1)]
    stages = BlockParams([1, 2], [32, 64], [16, 16], [1.0, 1.0], [2, 2], 0.25)
    attention: dict[str, Any] = {"partition_size": 2, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
    deeplab = "deeplabv3_mobilenet_v3_large"
    return {
        "alexnet": Model(lambda: models.alexnet(num_classes=10), 96, ("features", "features.7")),
        "vgg11": Model(
            narrow_vgg,
            64,
            ("features", "features.13"),
            "64 numbers in the head",
        ),
        "resnet18": Model(lambda: models.resnet18(num_classes=10), 64, ("layer4", "layer3.0.conv1")),
        "resnet50": Model(
            lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10),
            64,
            ("layer4", "layer3.0.downsample.0"),
            "one block in each stage",
        ),
        "densenet121": Model(
            lambda: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10),
            64,
            ("features", "features.denseblock3"),
            "two layers in each block, growth 8",
        ),
        "googlenet": Model(
            lambda: models.googlenet(num_classes=10, init_weights=False), 64, ("inception5b", "inception4c.branch3")
        ),
        "mobilenet_v3_large": Model(
            lambda: models.mobilenet_v3_large(num_classes=10), 64, ("features", "features.9.block.1.0")
        ),
        "efficientnet_b0": Model(
            lambda: models.EfficientNet(expanding, 0.2, num_classes=10),
            64,
            ("features", "features.2.0.block.0"),
            "four blocks",
        ),
        "shufflenet_v2_x0_5": Model(
            lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 1024], num_classes=10),
            64,
            ("conv5", "stage3"),
            "two blocks in each stage",
        ),
        "squeezenet1_1": Model(lambda: models.squeezenet1_1(num_classes=10), 64, ("features", "features.6")),
        "regnet_y_400mf": Model(
            lambda: models.RegNet(stages, num_classes=10), 64, ("trunk_output", "trunk_output.block1"), "three blocks"
        ),
        "convnext_tiny": Model(
            lambda: models.ConvNeXt([CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)], num_classes=10),
            64,
            ("features", "features.1.0.stochastic_depth"),
            "two blocks, 32 and 64 channels",
        ),
        "swin_t": Model(
            lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=10),
            64,
            ("permute", "features.1.1"),
            "two blocks in each of two stages, windows of 4",
        ),
        "maxvit_t": Model(
            lambda: models.MaxVit((64, 64), 16, stochastic_depth_prob=0.0, num_classes=10, **attention),
            64,
            ("blocks.1", "blocks.0"),
            "two blocks, windows of 2",
        ),
        "vit_b_16": Model(
            lambda: models.VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=10),
            64,
            ("encoder.layers.encoder_layer_2.ln_1", "encoder.layers.encoder_layer_1.ln_1"),
            "three blocks, 64 channels",
        ),
        deeplab: Model(
            lambda: models.get_model(deeplab, weights=None, weights_backbone=None),
            64,
            ("classifier.3", "backbone.10.block.0"),
        ),
    }


def timm_models() -> dict[str, Model]:
    """Return the models of timm, by name."""
    import timm
    from timm.models.mlp_mixer import MlpMixer

    return {
        "vit_small_patch14_dinov2": Model(
            lambda: timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=98, depth=3),
            98,
            ("blocks.2.norm1", "blocks.1.norm1"),
            "three blocks",
        ),
        "mixer_s32_224": Model(
            lambda: MlpMixer(10, 64, patch_size=16, num_blocks=3, embed_dim=64),
            64,
            ("norm", "blocks.1"),
            "three blocks, 64 channels",
        ),
        "levit_128s": Model(
            lambda: timm.create_model("levit_128s", pretrained=False, depth=(1, 1, 1)),
            224,
            ("stages.2", "stages.1"),
            "one block in each stage",
        ),
    }


def transformers_models() -> dict[str, Model]:
    """Return the models of transformers, by name."""
    import transformers as hf

    classes: dict[str, Any] = {"num_labels": 10}
    small: dict[str, Any] = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], **classes}
    pyramid: dict[str, Any] = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
        **classes,
    }
    return {
        "ConvNextV2ForImageClassification": Model(
            lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**small)),
            64,
            ("convnextv2.encoder", "convnextv2.encoder.stages.0"),
            "two blocks",
        ),
        "SegformerForSemanticSegmentation": Model(
            lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**pyramid)),
            64,
            ("decode_head.linear_fuse", "segformer.stages.0"),
            "two blocks",
        ),
    }


def models() -> dict[str, Model]:
    """Return all models whose library is installed, by name."""
    found = {}
    for library in (torchvision_models, timm_models, transformers_models):
        try:
            found.update(library())
        except ImportError as error:
            print(f"{error}: its models are left out", file=sys.stderr)
    return found


def cases(name: str, model: Model) -> Iterator[tuple[str, str]]:
    """Yield layers, several of them joined by a space, and the methods to try a model with."""
    deep, middle = model.layers
    yield from ((layer, method) for method in METHODS for layer in model.layers)
    if name in OF_ALL_METHODS:
        layers = {"CAM": deep, "RefineCAM": f"{middle} {deep}"}
        yield from ((layers.get(method, middle), method) for method in EXPORTABLE if method not in METHODS)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a ``TimeoutError`` if the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(model: nn.Module, images: torch.Tensor, layer: str, method: str, seconds: int = 600) -> dict[str, Any]:
    """Return the error of an exported file, or why there is none."""
    try:
        with at_most(seconds), tempfile.TemporaryDirectory() as folder:
            exported = export(model, method, layer.split(), example=images, relu=False, normalized=False)
            exported.save(Path(folder, "model.onnx"))
    except Exception as error:  # noqa: BLE001 - whatever stands in the way is written down
        return {"refused": " ".join(str(error).split())}
    return {"error": exported.error}


def page(rows: Sequence[dict[str, Any]], known: dict[str, Model]) -> str:
    """Return the text of the page."""
    versions = " and ".join(sorted({f"torch {row['torch']}, ONNX Runtime {row['onnxruntime']}" for row in rows}))
    by_case = {(row["model"], row["layer"], row["method"]): row for row in rows}
    reasons: dict[str, list[str]] = {}

    def cell(model: str, layer: str, method: str) -> str:
        row = by_case.get((model, layer, method))
        if row is None:
            return ""
        if "error" in row:
            return f"{row['error']:.0e}"
        of = reasons.setdefault(row["refused"], [])
        of.append(f"{method} of `{layer}` of {model}")
        return f"refused[^{list(reasons).index(row['refused']) + 1}]"

    def table(*rows: Sequence[str]) -> list[str]:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return ["", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]

    right = sum("error" in row for row in rows)
    lines = [HEAD.format(versions=versions, right=right, count=len(rows)).rstrip()]
    built = [(name, model) for name, model in known.items() if any(row["model"] == name for row in rows)]
    lines += table(
        ("model", "built", "side", "layer", *METHODS),
        *(
            (name, model.about, str(model.side), f"`{layer}`", *(cell(name, layer, method) for method in METHODS))
            for name, model in built
            for layer in model.layers
        ),
    )
    untried = sum((name, *case) not in by_case for name, model in known.items() for case in cases(name, model))
    if untried:
        lines += ["", f"{untried} cells were not tried yet: they are empty, and models without any are left out."]
    by_method = {(name, method): layer for name in OF_ALL_METHODS for layer, method in cases(name, known[name])}
    more = [method for method in EXPORTABLE if method not in METHODS]
    if any((name, by_method[name, method], method) in by_case for name in OF_ALL_METHODS for method in more):
        lines += [
            "",
            "More methods, in the middle of models of three kinds (CAM in the deep layer, RefineCAM in both):",
        ]
        lines += table(
            ("method", *OF_ALL_METHODS),
            *((method, *(cell(name, by_method[name, method], method) for name in OF_ALL_METHODS)) for method in more),
        )
    lines.append("")
    lines += [f"[^{number}]: {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a model did not export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models, separated by commas")
    parser.add_argument("--methods", help="methods, separated by commas (default: three, and of three models all)")
    parser.add_argument("--layers", choices=["deep", "middle"], help="which of the two layers (default: both)")
    parser.add_argument("--results", type=Path, default=DOCS / "exported.json", help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="try what is known as well")
    parser.add_argument("--write-docs", action="store_true", help="try nothing, write exported.md")
    arguments = parser.parse_args(argv)

    def read() -> dict[str, Any]:
        rows = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else []
        return {f"{row['model']} {row['layer']} {row['method']}": row for row in rows}

    known = models()
    if arguments.write_docs:
        (DOCS / "exported.md").write_text(page(list(read().values()), known), encoding="utf-8")
        return 0

    import onnxruntime

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    command = ["git", "-C", str(DOCS), "rev-parse", "--short", "HEAD"]
    about = {
        "torch": torch.__version__.split("+")[0],
        "onnxruntime": onnxruntime.__version__,
        "commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),  # noqa: S603 - ours
    }
    names = list(known) if arguments.only is None else arguments.only.split(",")
    refused = 0
    for name in names:
        torch.manual_seed(0)
        model, side = known[name].build().eval(), known[name].side
        for parameter in model.parameters():
            if not parameter.any():  # as the head of a new vision transformer, behind which no map would tell anything
                nn.init.normal_(parameter.data, std=0.02)
        images = torch.rand(1, 3, side, side)
        for layer, method in cases(name, known[name]):
            case = f"{name} {layer} {method}"
            if arguments.methods is not None and method not in arguments.methods.split(","):
                continue
            if arguments.layers is not None and layer != known[name].layers[arguments.layers == "middle"]:
                continue
            if not arguments.again and case in read():
                continue
            began = time.perf_counter()
            row = {"model": name, "layer": layer, "method": method, **attempt(model, images, layer, method), **about}
            row["seconds"] = round(time.perf_counter() - began, 1)
            refused += "refused" in row
            print(f"{case}: {row.get('refused') or format(row['error'], '.1e')} ({row['seconds']:.0f} s)", flush=True)
            rows = read() | {case: row}  # another process may have added to it
            text = ",\n".join(json.dumps(row) for row in rows.values())
            arguments.results.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
