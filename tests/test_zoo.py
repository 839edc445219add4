"""Grad-CAM and LayerCAM, with no argument but the model, on real architectures: the sweep of `scripts/zoo.py`."""

from __future__ import annotations

import warnings

import pytest

from scripts import zoo

FEW = {
    "torchvision": ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_32", "swin_t"],
    "transformers": ["ViT", "Dinov2WithRegisters", "Swin", "ConvNext", "LeViT", "SegFormer", "Siglip"],
}
# What the choice is for architectures that readers know.
KNOWN = {
    ("torchvision", "resnet18"): "layer4",
    ("torchvision", "mobilenet_v3_small"): "features",
    ("torchvision", "vit_b_32"): "encoder.layers.encoder_layer_11.ln_1",
}


def look_at(entry: zoo.Entry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say of their own code is not what is tested
        outcome = zoo.try_out(entry)
    assert outcome.failure == ""
    assert outcome.layer
    assert outcome.layer == KNOWN.get((entry.library, entry.name), outcome.layer)
    assert outcome.placed
    assert outcome.wide


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in FEW.items() for name in names])
def test_a_few(library: str, name: str) -> None:
    source = {"torchvision": zoo.torchvision_models, "transformers": zoo.transformers_models}[library]
    (entry,) = (entry for entry in source() if entry.name == name)
    look_at(entry)


@pytest.mark.zoo
@pytest.mark.parametrize("source", ["torchvision_models", "timm_models", "transformers_models"])
def test_all(source: str) -> None:
    for entry in getattr(zoo, source)():
        look_at(entry)
