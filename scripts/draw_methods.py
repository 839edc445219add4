"""Draw the map of every method for both digits of one sample picture, with the model that ships with the package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from torchcam import methods
from torchcam.demo import load_model, sample_images
from torchcam.utils import overlay_map

SKIPPED = {
    "DeepFeatureFactorization": "explains no score",
    "LeGrad": "needs a transformer",
    "AttentionRollout": "needs a transformer",
    "TransformerAttribution": "needs a transformer",
}
LAYERS: dict[str, Any] = {"RefineCAM": ["layer2", "layer3", "layer4"], "LayerCAM": "layer2", "HiResCAM": "layer3"}
WITHOUT_LAYER = {"GuidedBackprop", "FullGrad"}
OPTIONS: dict[str, dict[str, Any]] = {"SESS": {"window_size": 48, "scales": 4}, "SSCAM": {"num_samples": 8}}


def maps_of(name: str, model: Any, batch: Tensor, classes: tuple[int, ...]) -> tuple[str, list[Tensor]]:
    """Return the layers a method looked at, and its map of each class at the size of the picture."""
    method: Callable[..., Any] = getattr(methods, name)
    layer = None if name in WITHOUT_LAYER else LAYERS.get(name, "layer4")
    options = OPTIONS.get(name, {}) | ({"fc_layer": "fc"} if name == "CAM" else {})
    cams = []
    for class_idx in classes:
        with method(model, layer, **options) as extractor:
            scores = model(batch)
            cam = (
                extractor.fuse_cams(extractor(class_idx, scores))
                if name != "GuidedBackprop"
                else extractor(class_idx)[0]
            )
        if cam.ndim == 4:  # an input gradient: the strength of the colours, on a scale of its own
            cam = (cam - cam.median()).abs().sum(1)
            cam = cam / cam.max()
        cams.append(torch.nn.functional.interpolate(cam[:, None], batch.shape[2:], mode="bilinear")[0, 0])
    return ", ".join(layer) if isinstance(layer, list) else layer or "input", cams


def draw(columns: int) -> Figure:
    """Draw the picture and all maps: two rows, one for each digit, as often as the methods need it."""
    model, sample = load_model(), sample_images()[0]
    picture = sample.image.resize((384, 384), Image.Resampling.BICUBIC)
    names = [n for n in methods.__all__ if isinstance(getattr(methods, n), type) and n not in SKIPPED]
    bands = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(1.55 * columns, 3.55 * bands), dpi=110, layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(sample.image)
    axes[0, 0].set_title("picture", fontsize=9)
    axes[1, 0].text(0, 0.5, "above: {}\nbelow: {}".format(*sample.labels), fontsize=9, transform=axes[1, 0].transAxes)
    for place, name in enumerate(names, start=1):
        layers, cams = maps_of(name, model, sample.to_tensor(), sample.labels)
        band, column = divmod(place, columns)
        for row, cam in enumerate(cams):
            axes[2 * band + row, column].imshow(overlay_map(picture, cam.detach()))
        axes[2 * band, column].set_title(f"{name}\n{layers}", fontsize=8)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/methods.png"), help="where (%(default)s)")
    parser.add_argument("--columns", type=int, default=8, help="pictures in a row (default: %(default)s)")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(options.columns).savefig(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
