"""Small models with random weights in the place of those that the recipes of the docs download."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
import transformers
from torchvision import models

from tests import test_texts as texts
from tests import vision_language as vl

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def vit() -> tuple[Any, Any]:
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, id2label=dict(enumerate("abc")))
    size = {"height": 32, "width": 32}
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(size=size)


def clip() -> tuple[Any, Any]:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return texts.clip(), transformers.CLIPProcessor(images, texts.make_tokenizer())


def spectrogram() -> tuple[Any, Any]:
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**SIZES)), transformers.ASTFeatureExtractor()


def detr() -> tuple[Any, Any]:
    sizes = {"d_model": 32, "num_queries": 7, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "num_labels": 5}
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(backbone_config=backbone, **sizes, **heads)
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    model = transformers.DetrForObjectDetection(config)
    torch.nn.init.constant_(model.class_labels_classifier.bias[:1], 5.0)  # so that it finds something
    return model, processor


def yolo(ultralytics: Any) -> Any:
    """Make a YOLO that finds something."""
    made = ultralytics.YOLO("yolo11n.yaml")
    for branch in made.model.model[-1].cv3:
        torch.nn.init.zeros_(branch[-1].bias)
    return made


SMALL = {
    "google/vit-base-patch16-224": vit,
    "openai/clip-vit-base-patch16": clip,
    "MIT/ast-finetuned-audioset-10-10-0.4593": spectrogram,
    "facebook/detr-resnet-50": detr,
    "llava-hf/llava-interleave-qwen-0.5b-hf": vl.llava,
}


def place(patch: pytest.MonkeyPatch) -> None:
    """Let libraries build models without weights, for as long as the patch holds."""
    ultralytics = sys.modules.get("ultralytics")
    if ultralytics is not None:
        small_yolo = yolo(ultralytics)
        patch.setattr(ultralytics, "YOLO", lambda _: small_yolo)
    create = timm.create_model
    patch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))

    def state(self: Any, *_: Any, **__: Any) -> Any:
        names = [name for name in models.list_models() if models.get_model_weights(name) is type(self)]
        options = {"weights_backbone": None} if "segmentation" in type(self).__module__ else {}
        return models.get_model(names[0], weights=None, **options).state_dict()

    patch.setattr(models.WeightsEnum, "get_state_dict", state)
    for kind, part in {
        "AutoModel": 0,
        "AutoModelForImageClassification": 0,
        "AutoModelForImageTextToText": 0,
        "AutoModelForObjectDetection": 0,
        "ASTForAudioClassification": 0,
        "AutoImageProcessor": 1,
        "AutoProcessor": 1,
        "AutoFeatureExtractor": 1,
    }.items():

        def small(name: str, part: int = part, **_: Any) -> Any:
            made = SMALL[name]()[part]
            return made.eval() if isinstance(made, torch.nn.Module) else made

        patch.setattr(getattr(transformers, kind), "from_pretrained", small)
