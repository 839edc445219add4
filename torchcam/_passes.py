"""Run a model and leave it as it was; remember how it was called."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._tensors import map_structure, map_tensors, tensors_in

__all__ = [
    "EVERYONE",
    "Call",
    "caches_of",
    "find_image",
    "forwards_replaced",
    "image_shape",
    "model_device",
    "paused",
    "records",
    "untouched",
]

_scope = threading.local()
_paused: Counter[int] = Counter()

EVERYONE = object()
"""In place of one ``recorder``: all extractors record."""


def records(extractor: object, model: nn.Module) -> bool:
    """Tell whether the hooks of ``extractor`` on ``model`` shall look at the pass that runs now in this thread."""
    only = getattr(_scope, "only", None)
    return (only is None or any(one is extractor for one in only)) and not _paused[id(model)]


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Record nothing of ``model`` inside the block, in any thread: a backward pass may run parts of it again."""
    _paused[id(model)] += 1
    try:
        yield
    finally:
        _paused[id(model)] -= 1
        if not _paused[id(model)]:
            del _paused[id(model)]


@contextmanager
def untouched(model: nn.Module, recorder: object = None) -> Iterator[None]:
    """Run ``model`` in evaluation mode inside the block, and leave no trace of it behind.

    On every exit path each submodule's ``training`` flag, every buffer, the tensors, numbers and dictionaries that
    modules keep in attributes, and the random number generators are what they were. Hooks of extractors record nothing
    meanwhile, but for those of ``recorder``: one extractor, several in a tuple, or all if it is ``EVERYONE``.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else (buffer.clone(), _version(buffer)))
        for module, _ in modes
        for name, buffer in module._buffers.items()
    ]
    caches = [(cache, dict(cache)) for cache in caches_of(model)]
    values = [
        (vars(module), name, value)
        for module, _ in modes
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, float)) and not name.startswith("_")
    ]
    outer = getattr(_scope, "only", None)
    with _forked_rng(model):
        try:
            if recorder is not EVERYONE:
                _scope.only = recorder if isinstance(recorder, tuple) else (recorder,)
            for module, _ in modes:
                module.training = False
            yield
        finally:
            _scope.only = outer
            for module, training in modes:
                module.training = training
            for module, name, buffer, kept in buffers:
                module._buffers[name] = buffer
                if buffer is not None and kept is not None:
                    _restore(buffer, *kept)
            for cache, items in caches:
                cache.clear()
                cache.update(items)
            for attributes, name, value in values:
                attributes[name] = value


def caches_of(model: nn.Module) -> list[dict[Any, Any]]:
    """List the dictionaries among the attributes of the modules: some keep there what evaluation mode lets them reuse.

    What was computed from weights must not outlast a change of them: modules themselves notice calls of ``train()``.
    """
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and not name.startswith("_")
    ]


@contextmanager
def forwards_replaced(
    wrappers: dict[nn.Module, Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]],
) -> Iterator[None]:
    """Put a wrapper in the place of each module's ``forward`` inside the block."""
    own = {module: vars(module).get("forward") for module in wrappers}
    try:
        for module, wrap in wrappers.items():
            vars(module)["forward"] = wrap(module, module.forward)
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _version(tensor: Tensor) -> int | None:
    """Give the version counter; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version


def _restore(buffer: Tensor, value: Tensor, version: int | None) -> None:
    # Untouched buffers are left alone: a write would invalidate a graph of the user's that has saved them.
    if version is None or buffer._version != version:
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(value)


def _forked_rng(model: nn.Module) -> AbstractContextManager[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in {"cpu", "meta"}}
    device_type = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng(sorted(devices, key=str), device_type=device_type)


def model_device(model: nn.Module) -> torch.device:
    """Give the device of the first parameter or buffer of ``model``, the CPU where it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@dataclass(frozen=True)
class Call:
    """The arguments a model was called with, held by reference.

    Attributes:
        args: the positional arguments
        kwargs: the keyword arguments
        versions: every tensor among them with its version at the time of the call
        autocast: the type of device, whether autocast was on for it, and its type
        wanted: the name or position of the image-like argument, where it is not to be found by its looks
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[tuple[Tensor, int | None], ...]
    autocast: tuple[str, bool, torch.dtype]
    wanted: str | int | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str | int | None = None) -> Call:
        """Remember a call. Inference tensors are copied, as no later change to them could be noticed."""
        args, kwargs = map_tensors(lambda t: t.clone() if t.is_inference() else t, (args, dict(kwargs)))
        tensors = tuple(tensors_in((args, kwargs)))
        device_type = tensors[0].device.type if tensors else "cpu"
        return cls(
            args,
            kwargs,
            tuple((tensor, _version(tensor)) for tensor in tensors),
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)),
            wanted,
        )

    def _found(self) -> Tensor | list[Tensor]:
        for tensor, version in self.versions:
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    f"an input of shape {tuple(tensor.shape)} was modified in place between the forward pass and the "
                    "computation of the maps, so the pass cannot be repeated: pass a copy to the model (`x.clone()`), "
                    "or compute the maps before you change it"
                )
        found = find_image(self.args, self.kwargs, self.wanted)
        if found is None:
            shapes = [tuple(tensor.shape) for tensor, _ in self.versions]
            raise ValueError(f"no input of the model looks like an image (N, C, *spatial); it was called with {shapes}")
        return found

    @property
    def image(self) -> Tensor:
        """The image-like input, (N, C, *spatial); a list of images of one size is stacked.

        Raises:
            ValueError: if no argument is such a tensor
            RuntimeError: if an argument was modified in place since the call
        """
        found = self._found()
        return found if isinstance(found, Tensor) else torch.stack(found)

    def with_image(self, image: Tensor, samples: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the arguments with the image-like input replaced by ``image``.

        Args:
            image: variants of the input, (B, C, *spatial)
            samples: the sample of the recorded batch that each variant belongs to, (B,)
        """
        original = self._found()
        batch_size = len(original)

        def substitute(value: Any) -> Any:
            if value is original:
                return image if isinstance(original, Tensor) else type(original)(image.unbind(0))
            if isinstance(value, Tensor):
                return value[samples] if value.ndim and value.shape[0] == batch_size else value
            return NotImplemented

        arguments: tuple[tuple[Any, ...], dict[str, Any]] = map_structure(substitute, (self.args, self.kwargs))
        return arguments

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        """Restore the autocast state of the call inside the block."""
        device_type, enabled, dtype = self.autocast
        with torch.autocast(device_type, dtype=dtype, enabled=enabled):
            yield


def find_image(args: Any, kwargs: dict[str, Any], wanted: str | int | None = None) -> Tensor | list[Tensor] | None:
    """Find the image-like argument of a call: floating-point, with positions, or a list of such images (C, *spatial).

    Args:
        args: the positional arguments
        kwargs: the keyword arguments
        wanted: the position among the former or the name among the latter (also inside an argument that is a mapping);
            by default, the first that looks like it

    Raises:
        ValueError: if there is no argument ``wanted``
    """
    found: Tensor | list[Tensor] | None
    if isinstance(wanted, int):
        if not -len(args) <= wanted < len(args):
            raise ValueError(f"`input_index` is {wanted}, but the model was called with {len(args)} positional inputs")
        found = _first_image(args[wanted])
        return found
    if wanted is not None:
        for mapping in (kwargs, *(value for value in (*args, *kwargs.values()) if isinstance(value, Mapping))):
            if wanted in mapping:
                found = _first_image(mapping[wanted])
                return found
        raise ValueError(f"`input_name` is {wanted!r}, but the model was called with the keywords {sorted(kwargs)}")
    found = next((image for image in map(_first_image, (*args, *kwargs.values())) if image is not None), None)
    return found


def _first_image(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim >= 3 else None
    if isinstance(value, (list, tuple)) and value and all(_is_single_image(item) for item in value):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(_first_image, items) if found is not None), None)


def _is_single_image(value: Any) -> bool:
    # Detectors take a list of images without a batch dimension; a list of signals (N, C, L) looks different.
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[0] in {1, 3, 4}


def image_shape(image: Tensor | Sequence[Tensor] | None) -> tuple[int, ...] | None:
    """Give the shape (N, C, *spatial) of an image-like input; of a list of images, the one that holds them all."""
    if image is None or isinstance(image, Tensor):
        return None if image is None else tuple(image.shape)
    return len(image), *(max(sides) for sides in zip(*(item.shape for item in image), strict=True))
