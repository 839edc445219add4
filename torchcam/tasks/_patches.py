"""Models that take an image as a sequence of patches (SigLIP 2): their input as an image, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def as_patches(pixel_values: Tensor, size: int) -> dict[str, Tensor]:
    """Return the arguments for images (N, C, H, W) that are cut into patches of a size: all of it, nothing padded.

    Raises:
        ValueError: if the images are no multiple of the patches
    """
    image = pixel_values
    if image.ndim != 4 or image.shape[2] % size or image.shape[3] % size:
        raise ValueError(
            f"`input_tensor` must be images (N, C, H, W) whose sides are multiples of the patches' {size}, got shape "
            f"{tuple(image.shape)}"
        )
    rows, columns = image.shape[2] // size, image.shape[3] // size
    grid = image.reshape(*image.shape[:2], rows, size, columns, size)
    patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (N, rows * columns, size * size * C)
    shapes = torch.tensor([[rows, columns]], device=image.device).expand(len(image), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=image.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


class PatchTransform:
    """An image processor that makes patches, as a function from a PIL image to a tensor (C, H, W).

    Args:
        processor: the image processor
        size: the size of the patches
    """

    def __init__(self, processor: Any, size: int) -> None:
        self.processor = processor
        self.size = size
        self.image_mean, self.image_std = processor.image_mean, processor.image_std

    def __call__(self, image: Any) -> Tensor:
        """Return the image that the patches are of."""
        return from_patches(self.processor(images=[image], return_tensors="pt"), self.size)[0]


def from_patches(inputs: Mapping[str, Tensor], size: int) -> Tensor:
    """Return the images (N, C, H, W) that patches are of.

    Raises:
        ValueError: if the images have not one shape
    """
    shapes = {tuple(shape) for shape in inputs["spatial_shapes"].tolist()}
    if len(shapes) > 1:
        raise ValueError(
            f"`input_tensor` holds images of {sorted(shapes)} patches, those of a batch must have one shape: explain "
            "them one by one"
        )
    rows, columns = shapes.pop()
    patches = inputs["pixel_values"][:, : rows * columns]
    grid = patches.reshape(len(patches), rows, columns, size, size, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
