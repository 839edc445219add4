"""Put Grad-CAM and LayerCAM, with no argument but the model, on every architecture, and write down what happened.

For each model with random weights: the default layer, the shape of its maps, whether they are finite and not constant,
whether the layout is right (where one patch of the input changes, the grid changes most), and the same for an input
that is not square where the model takes one. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchcam.layers import candidates
from torchcam.layout import find_layout, first_tensor
from torchcam.methods import GradCAM, LayerCAM
from torchcam.targets import read_logits

logging.getLogger("torchcam").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Entry:
    """A model to try: its library and name, how it is built, and the side of its square input."""

    library: str
    name: str
    build: Callable[[], Any]
    side: int


@dataclass
class Outcome:
    """What happened with one model."""

    layer: str = ""
    grid: str = ""
    wide: str = ""
    placed: str = ""
    seconds: float = 0.0
    failure: str = ""


def torchvision_models() -> Iterator[Entry]:
    """Yield every classification model of torchvision."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        side = {"inception_v3": 299, "vit_h_14": 224}.get(name, 224)
        yield Entry("torchvision", name, partial(torchvision.models.get_model, name, weights=None, **options), side)


def timm_models() -> Iterator[Entry]:
    """Yield the smallest member of every family (module) of timm that takes images of up to 384 pixels."""
    import timm

    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            config = timm.get_pretrained_cfg(name, allow_unregistered=True)
            side = (config.input_size if config is not None else (3, 224, 224))[-1]
            if side <= 384:
                sizes[name] = side
        # Sizes of models are not listed, but names tell: the shortest of the telling words comes first.
        ranked = sorted(sizes, key=lambda name: (_size_rank(name), sizes[name], len(name), name))
        if ranked:
            yield Entry("timm", ranked[0], partial(timm.create_model, ranked[0]), sizes[ranked[0]])


def _size_rank(name: str) -> int:
    words = [
        "test_",
        "atto",
        "femto",
        "pico",
        "nano",
        "xxs",
        "xxt",
        "_xt",
        "_xs",
        "tiny",
        "_t_",
        "_t0",
        "18",
        "_s0",
        "b0",
        "_s",
        "small",
    ]
    return next((rank for rank, word in enumerate(words) if word in name), len(words))


def transformers_models() -> Iterator[Entry]:
    """Yield image classifiers of transformers, built from small random configurations."""
    import transformers as hf

    hidden = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    vit = {"image_size": 64, "patch_size": 16, **hidden}
    stages = {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 64}
    conv = {"hidden_sizes": [16, 32, 64], "depths": [1, 1, 2], "num_stages": 3}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "ViT": ("ViTForImageClassification", vit),
        "DeiT": ("DeiTForImageClassification", vit),
        "BEiT": ("BeitForImageClassification", vit | {"use_relative_position_bias": True}),
        "Data2VecVision": ("Data2VecVisionForImageClassification", vit),
        "Dinov2": ("Dinov2ForImageClassification", {k: v for k, v in vit.items() if k != "intermediate_size"}),
        "Dinov2WithRegisters": (
            "Dinov2WithRegistersForImageClassification",
            {k: v for k, v in vit.items() if k != "intermediate_size"} | {"num_register_tokens": 4},
        ),
        "ViTMSN": ("ViTMSNForImageClassification", vit),
        "IJepa": ("IJepaForImageClassification", vit),
        "Siglip": ("SiglipForImageClassification", {"vision_config": vit}),
        "CLIP": ("CLIPForImageClassification", {"vision_config": vit}),
        "Swin": ("SwinForImageClassification", stages | {"patch_size": 4}),
        "Swinv2": ("Swinv2ForImageClassification", stages | {"patch_size": 4}),
        "Focalnet": (
            "FocalNetForImageClassification",
            {
                "embed_dim": 16,
                "depths": [1, 1, 2],
                "image_size": 64,
                "focal_levels": [2, 2, 2],
                "focal_windows": [3, 3, 3],
            },
        ),
        "ConvNext": ("ConvNextForImageClassification", conv | {"depths": [1, 1, 2]}),
        "ConvNextV2": ("ConvNextV2ForImageClassification", conv),
        "ResNet": (
            "ResNetForImageClassification",
            {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 2], "layer_type": "basic"},
        ),
        "RegNet": (
            "RegNetForImageClassification",
            {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1], "groups_width": 16},
        ),
        "MobileNetV1": ("MobileNetV1ForImageClassification", {"image_size": 224}),
        "MobileNetV2": ("MobileNetV2ForImageClassification", {"image_size": 224}),
        "MobileViT": (
            "MobileViTForImageClassification",
            {"image_size": 256, "hidden_sizes": [16, 32, 32], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 64]},
        ),
        "MobileViTV2": ("MobileViTV2ForImageClassification", {"image_size": 256}),
        "EfficientNet": (
            "EfficientNetForImageClassification",
            {"image_size": 224, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        ),
        "PVT": (
            "PvtForImageClassification",
            {
                "image_size": 64,
                "hidden_sizes": [16, 32, 32, 64],
                "depths": [1, 1, 1, 2],
                "num_attention_heads": [1, 2, 2, 4],
            },
        ),
        "PVTv2": (
            "PvtV2ForImageClassification",
            {
                "image_size": 64,
                "hidden_sizes": [16, 32, 32, 64],
                "depths": [1, 1, 1, 2],
                "num_attention_heads": [1, 2, 2, 4],
            },
        ),
        "SegFormer": (
            "SegformerForImageClassification",
            {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 2], "num_attention_heads": [1, 2, 2, 4]},
        ),
        "LeViT": ("LevitForImageClassification", {"image_size": 64}),
        "PoolFormer": ("PoolFormerForImageClassification", {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 2]}),
        "CvT": ("CvtForImageClassification", {}),
        "SwiftFormer": ("SwiftFormerForImageClassification", {"image_size": 64}),
        "BiT": (
            "BitForImageClassification",
            {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 2, 1], "num_groups": 8},
        ),
        "HGNetV2": ("HGNetV2ForImageClassification", {}),
        "EfficientFormer": ("EfficientFormerForImageClassification", {}),
        "TextNet": ("TextNetForImageClassification", {}),
    }
    for name, (architecture, options) in configs.items():
        model_class = getattr(hf, architecture, None)
        if model_class is None:
            continue

        def build(model_class: Any = model_class, options: dict[str, Any] = options) -> nn.Module:
            config = model_class.config_class(**options)
            config.num_labels = 5
            model: nn.Module = model_class(config)
            return model

        side = options.get("image_size") or options.get("vision_config", {}).get("image_size") or 224
        yield Entry("transformers", name, build, side)


def image(height: int, width: int) -> Tensor:
    """Make an image of smooth noise, always the same."""
    noise = torch.randn((1, 3, height // 8, width // 8), generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, (height, width), mode="bilinear") * 1.5


def settle(model: nn.Module, x: Tensor) -> None:
    """Make random weights behave: some for layers that start as zeros, and a batch for batch normalisation to see.

    A head of zeros has no evidence for anything; and without statistics the signal of a deep network dies out.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
        normalisations = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if normalisations:
            for module in normalisations:
                module.momentum = 1.0
            model.train()(torch.cat([x, -x]))
            model.eval()


def maps_of(model: nn.Module, x: Tensor) -> tuple[str, tuple[int, ...]]:
    """Explain a prediction with both methods; return the layer and the shape of the maps.

    Raises:
        ValueError: if a map is not finite, is constant or has another aspect ratio than the input
    """
    for method in (GradCAM, LayerCAM):
        with method(model) as extractor, torch.inference_mode():
            scores = read_logits(model(x))
            # With random weights all evidence may be against a class: it is the signed map that must not be constant.
            (cam,) = extractor(scores.argmax(1), relu=False)
        if not cam.isfinite().all():
            raise ValueError(f"{method.__name__}: the map is not finite")
        if cam.max() == cam.min():
            raise ValueError(f"{method.__name__}: the map is constant")
        grid = tuple(cam.shape[1:])
        strides = [pixels / side for pixels, side in zip(x.shape[2:], grid, strict=True)]
        if max(strides) / min(strides) > 1.6:
            raise ValueError(f"{method.__name__}: a grid of {grid} for an input of {tuple(x.shape[2:])}")
    return extractor_layer(extractor), grid


def extractor_layer(extractor: Any) -> str:
    """Return the name of an extractor's only target layer."""
    (name,) = extractor.target_names
    return str(name)


def placed(model: nn.Module, layer: str, x: Tensor) -> bool:
    """Check whether a patch of the input that changes is where the layer's grid changes most, for two patches."""
    outputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            outputs.append(tensor)

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.inference_mode():
            model(x)
            layout = find_layout(tuple(outputs[-1].shape), tuple(x.shape), layer)
            before = layout.to_grid(outputs[-1])
            rows, columns = layout.grid
            block = (
                max(1, rows // 7),
                max(1, columns // 7),
            )  # cells; in a fine grid, a single one is smaller than a kernel
            for place in [(rows // 3, columns - 1 - columns // 4), (rows - 1 - rows // 4, columns // 5)]:
                first = [cell // size * size for cell, size in zip(place, block, strict=True)]
                top, bottom = (round(edge * x.shape[2] / rows) for edge in (first[0], first[0] + block[0]))
                left, right = (round(edge * x.shape[3] / columns) for edge in (first[1], first[1] + block[1]))
                # A small change: a large one drives a deep network with random weights somewhere else altogether.
                changed = x.repeat(3, 1, 1, 1)
                patches = changed[..., top:bottom, left:right]
                patches += 0.02 * torch.randn(patches.shape, generator=generator)
                model(changed)
                layout = find_layout(tuple(outputs[-1].shape), tuple(changed.shape), layer)
                change = (layout.to_grid(outputs[-1]) - before).norm(dim=1).mean(0)
                size = before.norm(dim=1)
                change = change / (size + size.mean())  # relative, but not to what is next to nothing
                peak = divmod(int(change.flatten().argmax()), columns)
                if any(not 0 <= at - start < size for at, start, size in zip(peak, first, block, strict=True)):
                    return False
    finally:
        handle.remove()
    return True


def try_out(entry: Entry) -> Outcome:
    """Build a model and look at it from all sides; what fails is written down, not raised."""
    outcome = Outcome()
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = entry.build().eval()
        x = image(entry.side, entry.side)
        settle(model, x)
        outcome.layer, grid = maps_of(model, x)
        outcome.grid = " x ".join(map(str, grid))
        outcome.placed = where_placed(model, outcome.layer, x)
        outcome.wide = wide(model, entry.side)
    except Exception as error:  # noqa: BLE001 - a failure of any kind is what the table is for
        outcome.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    outcome.seconds = time.perf_counter() - start
    return outcome


def where_placed(model: nn.Module, layer: str, x: Tensor) -> str:
    """Name the layer at which the layout was confirmed.

    That is the one explained or, where attention or a wide view has mixed the patches, the last before it that is
    laid out in the same way; one of the same grid, if there is any.

    Raises:
        ValueError: if there is none
    """
    if placed(model, layer, x):
        return "yes"
    found = candidates(model, x)
    (chosen,) = (candidate for candidate in found if candidate.name == layer)
    alike = [c for c in found if c.is_stage and c.calls == 1 and c.layout.channels == chosen.layout.channels]
    alike = [c for c in alike if min(c.grid) > 2]  # a grid of one position confirms nothing
    alike = [*(c for c in alike if c.grid != chosen.grid), *(c for c in alike if c.grid == chosen.grid)][::-1]
    for early in alike[:: max(1, len(alike) // 16)]:
        if placed(model, early.name, x):
            return f"at {early.name}"
    raise ValueError(f"a patch of the input is not where the grid of '{layer}' changes most")


def wide(model: nn.Module, side: int) -> str:
    """Explain an image that is half as wide again; return the grid, or that the model takes no such image."""
    x = image(side, side + (side // 2 + 31) // 32 * 32)
    try:
        with torch.inference_mode():
            model(x)
    except Exception:  # noqa: BLE001 - each model refuses in its own way
        return "takes squares only"
    return " x ".join(map(str, maps_of(model, x)[1]))


def table(results: list[tuple[Entry, Outcome]]) -> str:
    """Write the outcomes as Markdown."""
    good = sum(not outcome.failure for _, outcome in results)
    lines = [
        "# Architectures",
        "",
        f"Written by `scripts/zoo.py` with torch {torch.__version__.split('+')[0]}: Grad-CAM and LayerCAM with no",
        f"argument but the model, random weights; {good} of {len(results)} models pass. *Placed*: where a patch of the",
        "input changes, the layer's grid changes most (where attention or a wide view has mixed the patches, that of",
        "an earlier layer laid out in the same way). *Wide*: the grid for an image half as wide again.",
        "",
        "| library | model | default layer | grid | placed | wide |",
        "|---|---|---|---|---|---|",
    ]
    for entry, outcome in results:
        cells = [f"`{outcome.layer}`" if outcome.layer else "", outcome.grid, outcome.placed, outcome.wide]
        if outcome.failure:
            cells[-1] = f"**{outcome.failure}**".replace("|", "/")
        lines.append(f"| {entry.library} | {entry.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; return 1 if a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = {"torchvision": torchvision_models, "timm": timm_models, "transformers": transformers_models}
    parser.add_argument("--library", choices=sources, action="append", help="only this library (repeatable)")
    parser.add_argument("--only", metavar="TEXT", help="only models whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args(arguments)
    entries = [entry for name in options.library or sources for entry in sources[name]()]
    entries = [entry for entry in entries if options.only is None or options.only in entry.name]
    results = []
    warnings.simplefilter("ignore")
    for entry in (bar := tqdm(entries, desc="models")):
        bar.set_postfix_str(entry.name)
        outcome = try_out(entry)
        results.append((entry, outcome))
        if outcome.failure:
            tqdm.write(f"{entry.library} {entry.name} ({outcome.seconds:.0f} s): {outcome.failure}")
        gc.collect()
    print(f"{sum(not outcome.failure for _, outcome in results)} of {len(results)} models")
    if options.output is not None:
        options.output.write_text(table(results), encoding="utf-8")
    return int(any(outcome.failure for _, outcome in results))


if __name__ == "__main__":
    sys.exit(main())
