"""Inputs of a model, made from files, images, arrays, tensors or batches of them."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ._checks import callable_object
from ._passes import Call, to_model
from ._pictures import from_unit_range, to_picture
from ._views import FULL, View, Views

Transform = Callable[..., Any]
Normalisation = tuple[Sequence[float], Sequence[float]]

_CHANNELS = {1, 3, 4}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a model, and pictures of them.

    Attributes:
        tensor: the image-like input, (N, C, *spatial)
        kwargs: the model's keyword arguments, that input among them; None if it is the only argument
        is_batch: whether a batch was given, if only of one
        pictures: what is shown of each sample, RGB: the model's view, or what was given; None where that is no picture
        shown: where the model's view lies on that picture
        views: tells where it lies on other pictures of the sample
        channels: the number of channels that the model's first convolution takes; None without one
        class_names: the names of the classes, as far as the weights or the model know them
    """

    tensor: Tensor
    kwargs: Mapping[str, Any] | None
    is_batch: bool
    pictures: tuple[Image.Image | None, ...]
    shown: tuple[View, ...]
    views: tuple[Views | None, ...]
    channels: int | None
    class_names: tuple[str, ...] | None

    def call(self, model: nn.Module, samples: slice) -> Any:
        """Run a model on some of the samples; on all of them where there are other arguments.

        Raises:
            ValueError: if it fails, and the input has another number of channels than its first convolution takes
        """
        try:
            return model(self.tensor[samples]) if self.kwargs is None else model(**self.kwargs)
        except RuntimeError as error:
            if self.channels in {None, self.tensor.shape[1]}:
                raise
            raise ValueError(
                f"`input_tensor` of shape {tuple(self.tensor.shape)} has {self.tensor.shape[1]} channels, the model's "
                f"first convolution takes {self.channels} ({error})"
            ) from error


def read_inputs(
    model: nn.Module,
    given: Any,
    transform: Any = None,
    weights: Any = None,
    image: Any = None,
    processor: Any = None,
) -> Inputs:
    """Return the model's input for any kind of input that people have.

    Args:
        model: the model
        given: a tensor (N, C, *spatial), the model's keyword arguments in a mapping, an image (a path, a PIL image or
            an array), or a list of images or of tensors (C, *spatial)
        transform: function from a PIL image to a tensor (C, *spatial), or an image processor of transformers
        weights: weights of torchvision, or their name, that know a transform and the names of the classes
        image: what to show in place of the model's view: an image, or a list of one for each sample
        processor: a processor of transformers, whose image processor is the transform where there is no other

    Raises:
        TypeError: if ``given`` is none of these
        ValueError: if it is not a batch of inputs, or an image without a known transform
    """
    if isinstance(weights, str):
        weights = _weights_named(weights, model)
    callable_object("transform", transform, optional=True)
    if weights is not None and not (hasattr(weights, "transforms") and hasattr(weights, "meta")):
        raise TypeError(f"`weights` must be weights of torchvision such as ResNet18_Weights.DEFAULT, got {weights!r}")
    if transform is None and weights is not None:
        transform = weights.transforms()
    if processor is not None:
        transform = transform or split_processor(processor)[0]

    kwargs: Mapping[str, Any] | None = None
    images: list[Image.Image] = []
    channels = input_channels(model)
    is_batch = isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim == 4)
    if isinstance(given, Tensor):
        tensor = _check_tensor(given, model)
        is_batch = len(given) != 1
    elif isinstance(given, Mapping):
        kwargs, tensor = given, _image_of(given)
        is_batch = len(tensor) != 1
    else:
        items = list(given) if is_batch else [given]
        if not items:
            raise ValueError("`input_tensor` is an empty list: there is nothing to explain")
        if all(isinstance(item, Tensor) for item in items):
            tensor = _stack(items)
        else:
            images = [_for_model(read_picture(item), channels) for item in items]
            transform = transform or _own_transform(model)
            made = to_model(model, _transformed(transform, images))
            kwargs, tensor = made if isinstance(made, dict) and len(made) > 1 else None, _image_of(made)
    views: tuple[Views | None, ...] = (None,) * len(tensor)
    if tensor.ndim == 4:
        seen = (tensor.shape[3], tensor.shape[2])
        to_tensor = None if transform is None else partial(transformed, transform, channels)
        sources: list[tuple[int, int] | None] = [picture.size for picture in images] or [None] * len(tensor)
        views = tuple(Views(seen, source, to_tensor) for source in sources)
    pictures, shown = _pictures(tensor, _normalisation(transform) or _normalisation(_pretrained(model)), image, views)
    return Inputs(
        tensor,
        kwargs,
        is_batch,
        pictures,
        shown,
        views,
        channels,
        _class_names(model, weights),
    )


def split_processor(processor: Any) -> tuple[Any, Any]:
    """Return what a processor makes tensors of images with, and of texts; None for what it does not read.

    Args:
        processor: a processor, image processor or tokenizer of transformers, or a function of a list of texts

    Raises:
        TypeError: if it is none of these
    """
    reads = getattr(processor, "model_input_names", None)
    if not callable(processor) or isinstance(processor, type):
        raise TypeError(
            "`processor` must be a processor, image processor or tokenizer of transformers, or a function of a list of "
            f"texts, got {processor!r} of type {type(processor).__name__}"
        )
    if reads is None:  # the tokenizers of open_clip, and functions
        return None, processor
    of_images = getattr(processor, "image_processor", None) or (processor if "pixel_values" in reads else None)
    of_texts = getattr(processor, "tokenizer", None) or (processor if "input_ids" in reads else None)
    return of_images, of_texts


def opened(model: Any, given: Any, transform: Any, processor: Any) -> tuple[Any, Any, Any, Any]:
    """Return the model of a pipeline, its input, and what makes tensors of images and of texts; others as they are.

    A pipeline of sounds turns an array (length,) into the model's arguments.
    """
    inside = getattr(model, "model", None)
    if (
        isinstance(model, nn.Module)
        or not isinstance(inside, nn.Module)
        or not callable(getattr(model, "preprocess", None))
    ):
        return model, given, transform, processor
    images, tokenizer, sounds = (
        getattr(model, part, None) for part in ("image_processor", "tokenizer", "feature_extractor")
    )
    if processor is None:
        transform, processor = transform or images, images if tokenizer is None else tokenizer
    if images is None and sounds is not None and isinstance(given, np.ndarray) and given.ndim == 1:
        given = dict(sounds(given, sampling_rate=sounds.sampling_rate, return_tensors="pt"))
    return inside, given, transform, processor


# Tensors.


def _check_tensor(tensor: Tensor, model: nn.Module) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.uint8:
        raise TypeError(
            f"`input_tensor` of shape {shape} holds bytes, models take floats: convert it as the model was trained, or "
            "pass the image itself (a path, a PIL image or an array) with `transform=` or `weights=`"
        )
    has_images = input_channels(model) is not None
    lacks_batch = tensor.ndim == 3 and len(tensor) in {3, 4} and has_images
    is_signal = tensor.ndim == 2 and tensor.is_floating_point() and not has_images  # (N, length), as of speech
    if (tensor.ndim < 3 and not is_signal) or not len(tensor) or lacks_batch:
        raise ValueError(
            "`input_tensor` must be one sample with its batch dimension, (1, C, *spatial), or a batch "
            f"(N, C, *spatial), got shape {shape}" + (": pass `input_tensor.unsqueeze(0)`" if lacks_batch else "")
        )
    return tensor


def _image_of(given: Tensor | Mapping[str, Any]) -> Tensor:
    """Return the image-like input among a model's keyword arguments; a tensor is one itself."""
    found = given if isinstance(given, Tensor) else Call((), dict(given)).signal
    if not isinstance(found, Tensor):
        raise ValueError(  # noqa: TRY004 - a mapping is a right type
            f"`input_tensor` is a mapping with {sorted(given)}, none of which is a tensor of images (N, C, *spatial) "
            "or signals (N, length)"
        )
    return found


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack inputs (C, *spatial), or (1, C, *spatial)."""
    tensors = [one[0] if one.ndim > 3 and len(one) == 1 else one for one in tensors]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"the inputs of a batch must have one shape, these have {sorted(shapes)}: resize or crop them alike, or "
            "explain them one by one"
        )
    return torch.stack(tensors)


def _transformed(transform: Any, images: list[Image.Image]) -> Tensor | dict[str, Any]:
    """Return the batch of transformed images, or the model's keyword arguments where the transform makes them."""
    if "pixel_values" in (getattr(transform, "model_input_names", None) or ()):  # of transformers
        return dict(transform(images=images, return_tensors="pt"))
    tensors = [transform(image) for image in images]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`transform` must make a tensor of an image, got {type(tensor).__name__}")
    return _stack(tensors)


def transformed(transform: Any, channels: int | None, image: Image.Image) -> Tensor:
    """Return a transformed image, (C, *spatial)."""
    return _image_of(_transformed(transform, [_for_model(image, channels)]))[0]


def _own_transform(model: nn.Module) -> Any:
    """Return the transform that a model of timm was trained with."""
    if _pretrained(model) is not None:
        from timm import data

        timm: Any = data  # whose types do not tell what it exports
        return timm.create_transform(**timm.resolve_model_data_config(model), is_training=False)
    hint = (
        "`processor=AutoImageProcessor.from_pretrained(...)`"
        if hasattr(model, "config")
        else "`weights=...` (torchvision)"
    )
    raise ValueError(
        f"how {type(model).__name__} wants an image as a tensor is not known: pass a tensor (1, C, *spatial), "
        f"`transform=` (a function from a PIL image to a tensor (C, H, W), with its normalisation), or {hint}"
    )


def _pretrained(model: nn.Module) -> Any:
    """Return timm's configuration of a pretrained model."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else None


def input_channels(model: nn.Module) -> int | None:
    """Return the number of channels of a model's images, by its first convolution; None without one."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


# Images.


def read_picture(given: Any) -> Image.Image:
    """Read an image: a file, upright; a PIL image; or an array (height, width[, channels]) of bytes or of [0, 1].

    Raises:
        FileNotFoundError: if there is no such file
        TypeError: if ``given`` is none of these
        ValueError: if the file holds no image, or the array has another shape or range
    """
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, np.ndarray):
        return _from_array(given)
    if not isinstance(given, (str, Path)):
        raise TypeError(
            "`input_tensor` must be a tensor, a path, a PIL image, an array, a mapping of the model's arguments, or a "
            f"list of images, got {type(given).__name__}"
        )
    try:
        mode = Path(given).stat().st_mode
    except (OSError, ValueError) as error:  # a name may be too long, or hold what no name may hold
        raise FileNotFoundError(f"there is no file {str(given)[:200]!r} to read an image from") from error
    if not stat.S_ISREG(mode):  # a pipe or a device may have no end
        raise FileNotFoundError(f"{str(given)!r} is no regular file to read an image from: name the image itself")
    try:
        with Image.open(given) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # decoders raise errors of any type
        what = f"({type(error).__name__}: {error})"
        raise ValueError(f"'{given}' is not an image that Pillow can read {what}") from error
    return image


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in {2, 3} or (array.ndim == 3 and array.shape[2] not in _CHANNELS) or not array.size:
        hint = ": pass `array.transpose(1, 2, 0)`" if array.ndim == 3 and array.shape[0] in _CHANNELS else ""
        raise ValueError(f"an image as an array must be (height, width[, channels]), got {array.shape}{hint}")
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype.kind != "f":
        raise TypeError(f"an image as an array must be uint8, or floats in [0, 1], got {array.dtype}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(
            f"an image as an array of floats must lie in [0, 1], got [{array.min():.3g}, {array.max():.3g}]: rescale "
            "it, or pass what the model takes as a tensor (1, C, H, W)"
        )
    return from_unit_range(array)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; 16-bit greys are scaled, transparency is dropped.

    Raises:
        ValueError: if floating-point pixels lie outside [0, 1]
    """
    if image.mode.startswith("I"):  # `convert` would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        image = _from_array(np.asarray(image))
    elif image.mode == "P" and image.has_transparency_data:  # Pillow warns of a direct conversion
        image = image.convert("RGBA")
    return image.convert("RGB")


def _for_model(image: Image.Image, channels: int | None) -> Image.Image:
    return as_rgb(image).convert("L") if channels == 1 else as_rgb(image)


# The model's view, as a picture.


def _pictures(
    tensor: Tensor, normalisation: Normalisation | None, image: Any, views: Sequence[Views | None]
) -> tuple[tuple[Image.Image | None, ...], tuple[View, ...]]:
    """Return what is shown of each sample, and where the model's view lies on that."""
    is_picture = tensor.ndim == 4 and tensor.is_floating_point()

    def own(sample: Tensor) -> Image.Image | None:
        return to_picture(sample, normalisation) if is_picture else None

    if image is None:
        return tuple(map(own, tensor)), (FULL,) * len(tensor)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) != len(tensor):
        raise ValueError(f"`image` must hold a picture for each of the {len(tensor)} inputs, got {len(images)}")
    given = [as_rgb(read_picture(one)) for one in images]
    shown = [FULL if known is None else known.on(one.size) for known, one in zip(views, given, strict=True)]
    for place, (known, view) in enumerate(zip(views, shown, strict=True)):
        if view is None and known is not None:
            warnings.warn(known.unknown(given[place].size), UserWarning, stacklevel=4)
    return (
        tuple(own(sample) if view is None else one for sample, view, one in zip(tensor, shown, given, strict=True)),
        tuple(view or FULL for view in shown),
    )


def _normalisation(source: Any) -> Normalisation | None:
    """Find mean and standard deviation in a transform, an image processor or a configuration."""
    if source is None:
        return None

    def entry(name: str) -> Any:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)

    for mean, std in (("mean", "std"), ("image_mean", "image_std")):
        if _are_numbers(entry(mean)) and _are_numbers(entry(std)):
            return list(entry(mean)), list(entry(std))
    parts = [*(entry("transforms") or ()), entry("image_processor")] if not callable(entry("transforms")) else []
    if isinstance(source, nn.Module):
        parts += list(source.children())
    return next((found for found in map(_normalisation, parts) if found is not None), None)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple, Tensor)) and len(values) > 0


# The names of the classes.


def _weights_named(name: str, model: nn.Module) -> Any:
    """Return weights of torchvision by their name, with that of their architecture or for a model that it built."""
    from torchvision import models

    try:
        if "." in name:
            return models.get_weight(name)
        sizes = sum(parameter.numel() for parameter in model.parameters())
        for arch in models.list_models(module=models):
            entries = models.get_model_weights(arch)
            own = models.get_model_builder(arch).__module__ == type(model).__module__
            if own and entries.DEFAULT.meta["num_params"] == sizes:
                return entries[name.upper()]
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"`weights` {name!r} are none of torchvision's: {error}") from error
    raise ValueError(
        f"`weights` {name!r} are of no architecture, and {type(model).__name__} is not built as torchvision "
        'builds its own: pass their whole name, such as "ResNet18_Weights.DEFAULT"'
    )


def _class_names(model: nn.Module, weights: Any) -> tuple[str, ...] | None:
    if weights is not None and weights.meta.get("categories"):
        return tuple(weights.meta["categories"])
    labels = getattr(getattr(model, "config", None), "id2label", None)  # of transformers
    if not isinstance(labels, Mapping) or sorted(labels) != list(range(len(labels))):
        return None
    names = tuple(str(labels[index]) for index in range(len(labels)))
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names
