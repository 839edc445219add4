"""The families of libraries of pictures and volumes, and what PEFT and torchao make of a transformer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _family import Family
from _family_transformers import VIT, by_name, ids, made
from torch import Tensor

PICTURES: dict[str, Any] = {"shape": (1, 3, 128, 128), "other": (1, 3, 128, 192)}


def as_list(x: Tensor) -> Any:
    """Call a detector with a list of pictures."""
    return (list(x),)


def best_box(output: Any) -> Any:
    """Return the highest score of a detector's boxes."""
    return output["scores"].max()


def torchvision_families() -> Iterator[Family]:
    """Yield detectors, segmenters and nets of films."""
    from torchvision.models import detection, segmentation, video

    bare: dict[str, Any] = {"weights": None, "weights_backbone": None}
    sizes = bare | {"min_size": 128, "max_size": 192, "num_classes": 5}
    boxes = {"box_score_thresh": 0.0, "box_detections_per_img": 9}
    dense = {"score_thresh": 0.0, "detections_per_img": 9}
    detectors = {
        "fasterrcnn_resnet50_fpn": sizes | boxes,
        "fasterrcnn_mobilenet_v3_large_fpn": sizes | boxes,
        "maskrcnn_resnet50_fpn": sizes | boxes,
        "keypointrcnn_resnet50_fpn": sizes | boxes | {"num_classes": 2},
        "retinanet_resnet50_fpn": sizes | dense,
        "fcos_resnet50_fpn": sizes | dense,
        "ssdlite320_mobilenet_v3_large": bare | dense | {"num_classes": 5},
        "ssd300_vgg16": bare | dense | {"num_classes": 5},
    }
    for name, options in detectors.items():
        build = partial(getattr(detection, name), **options)
        yield Family(name, build, **PICTURES, call=as_list, target=best_box)
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        build = partial(getattr(segmentation, name), num_classes=5, **bare)
        yield Family(name, build, **PICTURES, target=1)
    film: dict[str, Any] = {"shape": (1, 3, 8, 64, 64), "other": (1, 3, 8, 64, 96)}
    for name in ("r3d_18", "swin3d_t"):
        yield Family(name, partial(getattr(video, name), num_classes=5, weights=None), **film)


def _ultralytics() -> Any:
    """Import ultralytics so that it neither uses the network nor writes into the user's folder."""
    folder = Path(tempfile.gettempdir()) / "torchcam-ultralytics"
    folder.mkdir(exist_ok=True)
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    os.environ["YOLO_CONFIG_DIR"] = str(folder)
    import ultralytics

    ultralytics.settings.update({"sync": False})
    return ultralytics


def _yolo(config: str, task: str) -> Any:
    return _ultralytics().YOLO(config, task=task).model


def of_first(score: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """Return a target: a score of the first tensor of an output."""

    def target(output: Any) -> Tensor:
        while not isinstance(output, Tensor):
            output = output[0]
        return score(output)

    return target


def ultralytics_families() -> Iterator[Family]:
    """Yield one of each task, and of each kind of head."""
    dense = of_first(lambda rows: rows[4].max())  # (4 + classes + others, boxes): any box as class 0
    final = of_first(lambda rows: rows[:, 4].max())  # (boxes, 6), after the boxes were chosen
    for name, task, target in [
        ("yolov8n", "detect", dense),
        ("yolo11n", "detect", dense),
        ("yolo12n", "detect", dense),
        ("yolov10n", "detect", final),
        ("yolo26n", "detect", final),
        ("yolo11n-seg", "segment", dense),
        ("yolo11n-pose", "pose", dense),
        ("yolo11n-obb", "obb", dense),
        ("yolo11n-cls", "classify", None),
    ]:
        yield Family(name, partial(_yolo, f"{name}.yaml", task), **PICTURES, target=target)
    yield Family(
        "rtdetr-resnet50", lambda: _ultralytics().RTDETR("rtdetr-resnet50.yaml").model, **PICTURES, target=final
    )


def smp_families() -> Iterator[Family]:
    """Yield segmenters, with encoders of convolutions and of attention."""
    import segmentation_models_pytorch as smp

    names = [
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    ]
    for name, encoder in [*((name, "resnet18") for name in names), ("Unet", "mit_b0")]:
        build = partial(getattr(smp, name), encoder_name=encoder, encoder_weights=None, classes=4)
        yield Family(f"{name}, {encoder}", build, **PICTURES, target=1)


def monai_families() -> Iterator[Family]:
    """Yield nets and transformers of volumes."""
    from monai.networks import nets

    volume: dict[str, Any] = {"shape": (1, 1, 32, 32, 32), "other": (1, 1, 32, 48, 32)}
    usual: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    levels = {"channels": (4, 8, 16), "strides": (2, 2)}
    kernels = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    blocks = {"init_features": 8, "growth_rate": 4, "block_config": (1, 1, 1)}
    yield Family("DenseNet", partial(nets.DenseNet, **usual, **blocks), **volume)
    stages = {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 16], "n_input_channels": 1}
    yield Family("ResNet", partial(nets.ResNet, **stages, num_classes=3), (1, 1, 64, 64, 64), (1, 1, 64, 96, 64))
    for name, options in {
        "UNet": usual | levels,
        "AttentionUnet": usual | levels,
        "SegResNet": usual | {"init_filters": 8},
        "DynUNet": usual | kernels,
        "VNet": usual,
    }.items():
        yield Family(name, partial(getattr(nets, name), **options), **volume, target=1)
    small: dict[str, Any] = {"in_channels": 1, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
    classes = {"classification": True, "num_classes": 3, "num_layers": 3, "post_activation": ""}
    for shape, patch in (((32, 32, 32), (8, 8, 8)), ((32, 64, 64), (4, 16, 16))):
        build = partial(nets.ViT, **small, **classes, img_size=shape, patch_size=patch)
        name = "ViT, patches of " + " x ".join(map(str, patch))
        yield Family(name, build, (1, 1, *shape), target=lambda output: output[0][1])  # scores and hidden states
    build = partial(nets.UNETR, **small, out_channels=3, img_size=(32, 32, 32), feature_size=4)
    yield Family("UNETR", build, (1, 1, 32, 32, 32), target=1)
    build = partial(nets.SwinUNETR, in_channels=1, out_channels=3, feature_size=12)
    yield Family("SwinUNETR", build, (1, 1, 64, 32, 32), target=1)


def open_clip_families() -> Iterator[Family]:
    """Yield models of pictures and texts, which return an embedding of each."""
    from open_clip.model import CLIP

    patches: dict[str, Any] = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32}
    stages = patches | {"layers": [1, 1, 1, 1], "width": 16}
    words = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    for name, vision, texts in (("ViT", patches, 3), ("ViT", patches, 16), ("ResNet", stages, 3)):

        def call(x: Tensor, texts: int = texts) -> Any:
            return x, ids(texts, 16)

        def similarity(output: Any) -> Any:
            picture, texts, *_ = output
            return (texts @ picture)[0]

        yield Family(f"{name}, {texts} texts", partial(CLIP, 32, vision, words), call=call, target=similarity)


_vit = made("ViTForImageClassification", "ViT", **VIT, num_labels=5)


def peft_families() -> Iterator[Family]:
    """Yield a transformer with adapters."""
    import peft

    def build() -> Any:
        return peft.get_peft_model(_vit(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    yield Family("LoRA of a ViT", build, call=by_name("pixel_values"))


def torchao_families() -> Iterator[Family]:
    """Yield transformers with quantised weights."""
    from torchao import quantization

    for kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):

        def build(kind: str = kind) -> Any:
            model = _vit().eval()
            quantization.quantize_(model, getattr(quantization, kind)())
            return model

        yield Family(kind.removesuffix("Config") + " of a ViT", build, call=by_name("pixel_values"))


SOURCES: dict[str, Callable[[], Iterator[Family]]] = {
    "torchvision": torchvision_families,
    "ultralytics": ultralytics_families,
    "segmentation_models_pytorch": smp_families,
    "monai": monai_families,
    "open_clip": open_clip_families,
    "peft": peft_families,
    "torchao": torchao_families,
}
