"""How a model was called, and what looks like an image among its arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._replica import AS_IT_IS
from ._tensors import map_structure, map_tensors, tensors_in


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run ``model`` itself in evaluation mode inside the block; restore its flags, buffers and attributes afterwards.

    For models whose hooks are not ours to move to a replica: other threads see the flags.
    """
    states = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    copies = [(buffer, buffer.clone()) for _, _, buffers in states for buffer in buffers.values() if buffer is not None]
    containers = [
        (value, copy.copy(value))
        for _, attributes, _ in states
        for name, value in attributes.items()
        if type(value) in {dict, list, set} and not name.startswith("_")
    ]
    with torch.random.fork_rng():
        try:
            for module, *_ in states:
                module.training = False
            yield
        finally:
            for module, attributes, buffers in states:
                for now, before in ((vars(module), attributes), (module._buffers, buffers)):
                    for name in now.keys() - before.keys():
                        del now[name]
                    now.update(before)
            for buffer, kept in copies:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    if not torch.equal(buffer, kept):  # a write would invalidate a graph that has saved the buffer
                        buffer.copy_(kept)
            for value, kept in containers:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(kept)


@contextmanager
def forwards_replaced(
    wrappers: dict[nn.Module, Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]],
) -> Iterator[None]:
    """Replace each module's ``forward`` with a wrapper inside the block."""
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


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of ``model``, the CPU where it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def to_model(model: nn.Module, value: Any) -> Any:
    """Move the tensors of a structure to the device of ``model``, those of floats to the type of its parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    device = model_device(model)
    return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else None), value)


class Call:
    """The arguments a model was called with: tensors by reference, lists and dictionaries as they were.

    Args:
        args: the positional arguments
        kwargs: the keyword arguments
        wanted: the name or position of the image-like argument, where it is not to be found by its looks

    Attributes:
        versions: every tensor among the arguments with its version at the time of the call
        found: the image-like argument as it was given; None if there is none
        autocast: the type of autocast; None where it was off
        shared: the inputs that all samples share although they have as many rows, by identity; None until it is proven
        axes: the dimensions of the image-like input, or of the signal, along which its positions are; None for all
            from the third on
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str | int | None = None) -> None:
        values = (*args, *kwargs.values())
        tensors = values if set(map(type, values)) == {Tensor} else tuple(tensors_in(values))
        if any(map(Tensor.is_inference, tensors)):  # no later change to such a tensor could be noticed
            args, kwargs = without_inference((args, kwargs), shared=True)
            tensors = tuple(tensors_in((args, kwargs)))
        if tensors is not values:  # the model may add to a list of the caller's
            args, kwargs = map_structure(_unless_built_in, (args, kwargs))
        self.args = args
        self.kwargs = kwargs
        self.wanted = wanted
        self.found = find_image(args, kwargs, wanted)
        self.versions = [(tensor, None if tensor.is_inference() else tensor._version) for tensor in tensors]
        self.autocast: torch.dtype | None = None
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(self.device_type):
            self.autocast = torch.get_autocast_dtype(self.device_type)
        self.shared: set[int] | None = None
        self.axes: tuple[int, ...] | None = None

    def check_unchanged(self) -> None:
        """Raise a ``RuntimeError`` if an argument was modified in place since the call."""
        for tensor, version in self.versions:
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    f"an input of shape {tuple(tensor.shape)} was modified in place between the forward pass and the "
                    "computation of the maps, so the pass cannot be repeated: pass a copy to the model (`x.clone()`), "
                    "or compute the maps before you change it"
                )

    def _image(self) -> Tensor | list[Tensor]:
        found = self.found if self.axes is None else self.signal
        if found is None:
            shapes = [tuple(tensor.shape) for tensor, _ in self.versions]
            raise ValueError(f"no input of the model looks like an image (N, C, *spatial); it was called with {shapes}")
        return found

    @property
    def device(self) -> torch.device:
        """The device of the image-like input, the CPU where there is none."""
        first = next(tensors_in(self.signal), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def image(self) -> Tensor:
        """The image-like input, (N, C, *spatial), whatever its order; a list of images of one size is stacked.

        Raises:
            ValueError: if no argument is such a tensor
            RuntimeError: if an argument was modified in place since the call
        """
        self.check_unchanged()
        return self.image_now

    @property
    def image_now(self) -> Tensor:
        """The image-like input, (N, C, *spatial), also if it was modified since the call."""
        found = self._image()
        if isinstance(found, Tensor):
            return found if self.axes is None else _channels_first(found, self.axes)
        return torch.stack(found)

    def with_image(self, image: Tensor, samples: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the image-like input replaced by ``image``.

        Args:
            image: variants of the input, (B, C, *spatial)
            samples: the sample of the recorded batch that each variant belongs to, (B,)
        """
        self.check_unchanged()
        given = self._image()
        if self.axes is not None and isinstance(given, Tensor):
            image = _as_given(image, self.axes, given.ndim)
        return self._with(given, image, samples)

    @property
    def signal(self) -> Tensor | list[Tensor] | None:
        """The image-like input or, where there is none, the first of floating-point numbers (N, L)."""
        if self.found is not None:
            return self.found
        tensors = (tensor for tensor, _ in self.versions)
        return next((t for t in tensors if t.is_floating_point() and t.ndim == 2), None)

    def with_signal(self, signal: Tensor, samples: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with ``signal`` in the place of the image-like input or the signal (N, L)."""
        self.check_unchanged()
        original = self.signal
        return self._with(self._image() if original is None else original, signal, samples)

    def _with(
        self, original: Tensor | list[Tensor], replacement: Tensor, samples: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(original, Tensor) and len(self.args) == 1 and self.args[0] is original and not self.kwargs:
            return (replacement,), {}
        batch_size = len(original)

        def substitute(value: Any) -> Any:
            if value is original:
                return replacement if isinstance(original, Tensor) else type(original)(replacement.unbind(0))
            if isinstance(value, Tensor):
                follows = value.ndim and value.shape[0] == batch_size and id(value) not in (self.shared or ())
                return value[samples] if follows else value
            return NotImplemented

        return map_structure(substitute, self.args), map_structure(substitute, self.kwargs)

    def prove_rows(self, model: nn.Module) -> None:
        """Find out which inputs with as many rows as there are samples have a row for each: prompts need not.

        The first row of such an input is replaced by the second, and the model runs once more with the same random
        numbers: where what it returns of other samples changes, all samples share that input. One whose rows are the
        same, a mask say, is shared if another one is.

        Args:
            model: a replica of the model
        """
        if self.shared is not None:
            return
        self.shared = set()
        count = 0 if self.found is None else len(self.found)
        if count < 2:
            return
        images = {id(image) for image in tensors_in(self.found)}
        suspects = [t for t, _ in self.versions if t.ndim and len(t) == count and id(t) not in images]
        if not suspects:
            return
        state = torch.get_rng_state()

        def rows_of(changed: Tensor | None) -> list[Tensor]:
            torch.set_rng_state(state)
            other = None if changed is None else torch.cat([changed[1:2], changed[1:]])
            args, kwargs = map_tensors(lambda t: other if t is changed else t.clone(), (self.args, self.kwargs))
            found = tensors_in(model(*args, **kwargs))
            return [t.float() for t in found if t.is_floating_point() and t.ndim and len(t) == count]

        with torch.no_grad(), self.as_recorded():
            base = rows_of(None)
            alike = [t for t in suspects if torch.equal(t[0], t[1])]
            for tensor in suspects:
                found = [] if any(tensor is one for one in alike) else rows_of(tensor)
                if not all(_others_are_close(new, old) for new, old in zip(found, base, strict=False)):
                    self.shared.add(id(tensor))
        if self.shared:
            self.shared.update(map(id, alike))

    def as_recorded(self, autocast: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """Return a context with the autocast state of the call, or with autocast to another type."""
        dtype = self.autocast if autocast is None else autocast
        if dtype is None and not torch._C._is_any_autocast_enabled():
            return AS_IT_IS
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    @property
    def device_type(self) -> str:
        """The type of the device of the first tensor."""
        return self.versions[0][0].device.type if self.versions else "cpu"


def _unless_built_in(value: Any) -> Any:
    """Return what is no built-in container, so that the structure of those is copied."""
    return NotImplemented if type(value) in {tuple, list, dict} else value


def without_inference(arguments: Any, *, shared: bool = False) -> Any:
    """Return the arguments of a call with copies of the tensors that were made in inference mode.

    Args:
        arguments: the arguments
        shared: whether a list or mapping without such tensors stays the same object, which the model may add to
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if value.is_inference() else value
        stays = shared and not any(tensor.is_inference() for tensor in tensors_in(value))
        return value if stays else NotImplemented

    return map_structure(plain, arguments)


def _channels_first(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return an input with positions along some axes as (N, C, *spatial); one without channels has one."""
    others = [axis for axis in range(1, tensor.ndim) if axis not in axes]
    moved = tensor.permute(0, *others, *axes)
    return moved if others else moved.unsqueeze(1)


def _as_given(tensor: Tensor, axes: tuple[int, ...], ndim: int) -> Tensor:
    """Return what :func:`_channels_first` made of an input of so many dimensions as it was given."""
    order = [0, *(axis for axis in range(1, ndim) if axis not in axes), *axes]
    moved = tensor if tensor.ndim == ndim else tensor.squeeze(1)
    return moved.permute([order.index(axis) for axis in range(ndim)])


def _others_are_close(new: Tensor, old: Tensor) -> bool:
    """Check whether the rows but the first are the same, to rounding."""
    return new.shape == old.shape and torch.allclose(new[1:], old[1:], rtol=1e-4, atol=1e-5, equal_nan=True)


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
    for value in (*args, *kwargs.values()):
        found = _first_image(value)
        if found is not None:
            return found
    return None


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
    """Return the shape (N, C, *spatial) of an image-like input; of a list of images, the one that holds them all."""
    if image is None or isinstance(image, Tensor):
        return None if image is None else tuple(image.shape)
    return len(image), *(max(sides) for sides in zip(*(item.shape for item in image), strict=True))
