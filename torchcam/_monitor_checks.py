"""Checks of what a monitor is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ._checks import torch_module
from ._pictures import to_picture
from .targets import ClassIndex, check_one_of, class_columns


def check_model(model: Any) -> nn.Module:
    sharded = {"FullyShardedDataParallel", "FSDPModule"}
    modules = torch_module("model", model).modules()
    if any(sharded & {kind.__name__ for kind in type(module).__mro__} for module in modules):
        raise ValueError(
            "`model` is sharded over several processes (FSDP), but a monitor runs it in one: pass a gathered copy, "
            "and call `probe` when that is up to date"
        )
    found: nn.Module = model
    return found


def check_images(images: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a floating-point tensor (N, C, *spatial), got {found}")
    if not 3 <= images.ndim <= 5 or not images.numel():
        raise ValueError(f"`images` must be a batch (N, C, *spatial) of one image or more, got {tuple(images.shape)}")
    return images


def check_explained(class_idx: ClassIndex | None, targets: Any, num_images: int) -> tuple[ClassIndex | None, Any]:
    check_one_of(class_idx, targets)
    several = class_columns(class_idx, targets) is not None
    given: Any = class_idx if targets is None else targets
    if several or (hasattr(given, "__len__") and getattr(given, "shape", None) != () and len(given) != num_images):
        what = "several of each" if several else f"{len(given)}"
        name = "class_idx" if targets is None else "targets"
        raise ValueError(f"`{name}` must be one for all images or one per image: got {what} for {num_images} images")
    return (class_idx.detach().clone() if isinstance(class_idx, Tensor) else class_idx), targets


def check_masks(masks: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the masks by the names of their scalars."""
    if masks is None:
        return {}
    shape = (len(images), *images.shape[2:])
    checked = {}
    for name, mask in (masks if isinstance(masks, Mapping) else {"": masks}).items():
        _check_line("masks", str(name))
        if not isinstance(mask, Tensor):
            raise TypeError(f"`masks` must be a tensor (N, *spatial), or several by name, got {type(mask).__name__}")
        if tuple(mask.shape) != shape:
            raise ValueError(f"`masks` must have the shape {shape} of the images, got {tuple(mask.shape)}")
        checked["_".join(filter(None, ("energy_inside", str(name))))] = mask.detach().cpu().float().clone()
    return checked


def _check_count(name: str, entries: Sequence[Any], num_images: int) -> None:
    if len(entries) != num_images:
        raise ValueError(f"`{name}` has {len(entries)} entries for {num_images} images")


def check_interval(every_n_steps: int | None, every_n_epochs: int | None) -> None:
    if every_n_steps is not None and every_n_epochs is not None:
        raise ValueError(
            f"pass `every_n_steps` ({every_n_steps}) or `every_n_epochs` ({every_n_epochs}), not both: only "
            "one of them is counted"
        )


def check_labels(labels: Any, num_images: int) -> list[str] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError("`labels` must be a sequence of strings, one per image")
    _check_count("labels", labels, num_images)
    for label in labels:
        _check_line("labels", label)
    return list(labels)


def _check_line(argument: str, text: str) -> None:
    """Check that a name fits into a line of a file."""
    if "".join(text.splitlines()) != text or text.encode(errors="ignore").decode() != text:
        raise ValueError(f"`{argument}` has {text!r}, which has no place in a line of text: leave out what is escaped")


def check_pictures(images: Tensor, pictures: Any) -> list[Image.Image]:
    """Return the pictures to draw on: those given, by default the images."""
    if pictures is None:
        return [to_picture(image) for image in images]
    if isinstance(pictures, Tensor):
        if pictures.ndim < 3 or not pictures.is_floating_point() or not ((pictures >= 0) & (pictures <= 1)).all():
            raise ValueError(
                f"`pictures` must be a floating-point tensor (N, C, *spatial) in [0, 1], got {pictures.dtype} of shape "
                f"{tuple(pictures.shape)} in [{pictures.min()}, {pictures.max()}]"
            )
        found = [to_picture(picture) for picture in pictures]
    else:
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise TypeError("`pictures` must be a tensor (N, C, *spatial) in [0, 1] or PIL images")
        found = [picture.convert("RGB") for picture in pictures]
    _check_count("pictures", found, len(images))
    return found
