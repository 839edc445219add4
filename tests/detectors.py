"""Tiny detectors of torchvision and transformers, and pictures with one bright place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


def noise_picture(width: int, height: int) -> Image.Image:
    small = torch.randint(0, 255, (10, 22, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height))


def bright_picture(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (width, height), "black")
    picture.paste("white", box)
    return picture


class Brightness(nn.Module):
    """Two channels: the mean brightness of 8 × 8 pixels, and darkness."""

    out_channels = 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.mix = nn.Conv2d(3, 2, 1)
        nn.init.constant_(self.mix.weight, 1 / 3)
        self.mix.weight.data[1] *= -1
        self.mix.bias.data[:] = torch.tensor([0.0, 1.0])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", self.mix(self.pool(x)))])


class BrightHead(nn.Module):
    """Each position is an object as far as it is bright; its box is the anchor."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        (grid,) = features
        logits = 8 * grid[:, 0].flatten(1) - 4
        others = torch.full_like(logits, -8.0)
        boxes = torch.zeros(*logits.shape, 4)
        return {"cls_logits": torch.stack([others] * (self.classes - 1) + [logits], -1), "bbox_regression": boxes}


def bright_retinanet(min_size: int = 96, max_size: int = 256) -> Any:
    """A RetinaNet that finds what is white, as boxes of 16 × 16 pixels of what it sees."""
    return RetinaNet(
        Brightness(),
        2,
        min_size=min_size,
        max_size=max_size,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        head=BrightHead(),
        detections_per_img=5,
    ).eval()


class Small(nn.Module):
    out_channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 8, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", self.body(x))])


def faster_rcnn() -> Any:
    """A tiny Faster R-CNN with random weights."""
    torch.manual_seed(0)
    return FasterRCNN(
        Small(),
        3,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((24, 48),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_score_thresh=0.0,
        box_detections_per_img=4,
    ).eval()


# transformers.

DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_labels": 5,
    "num_queries": 7,
}
SIZE = {"shortest_edge": 96, "longest_edge": 192}


def _resnet(name: str = "ResNet", **options: Any) -> Any:
    import transformers

    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return getattr(transformers, f"{name}Config")(embedding_size=8, **stages, **options)


def detr_family(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a tiny model of a family, and its processor."""
    import transformers

    kind = name.partition(",")[0]
    settings: dict[str, Any] = dict(DETECTOR)
    processor: Callable[..., Any] = getattr(transformers, f"{kind}ImageProcessor", transformers.RTDetrImageProcessor)
    size: dict[str, int] = SIZE
    if kind in {"Detr", "ConditionalDetr"}:
        settings["backbone_config"] = _resnet(out_features=["stage4"])
    elif kind == "DeformableDetr":
        settings["backbone_config"] = _resnet(out_features=["stage2", "stage3", "stage4"])
        if "two stages" in name:
            settings |= {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 7}
    elif kind == "Yolos":
        settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        settings |= {"image_size": [96, 96], "num_detection_tokens": 9, "num_labels": 5}
    else:
        settings.pop("encoder_layers")
        settings |= {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32] * 3}
        settings["backbone_config"] = _resnet("RTDetrResNet", out_features=["stage2", "stage3", "stage4"])
        size = {"height": 128, "width": 128}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForObjectDetection")(getattr(transformers, f"{kind}Config")(**settings))
    return model.eval(), processor(**{"size": size, **options})
