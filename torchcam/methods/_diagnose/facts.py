"""The facts of a diagnosis: a recorded pass, its repetition in evaluation mode, and the maps of the latter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._cached import cached_property
from torchcam._passes import find_image, without_inference
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import is_constant, is_finite, to_float
from torchcam.layers import watch
from torchcam.methods._replicas import on_replica
from torchcam.methods._running import quietly
from torchcam.targets import Selector, class_scores, read_logits

from .trace import PassWatch, squashing_node
from .view import ExtractorView, RawMaps


@dataclass(frozen=True)
class GradientFacts:
    """The gradient of the score for one activation, as masks (N,) of samples.

    Attributes:
        name: the name of the activation
        positions: the number of positions in its grid
        broken: samples with values that are not finite
        zero: samples with zeros only
        zero_on_grid: samples with zeros at all positions, but not at the tokens before them
    """

    name: str
    positions: int
    broken: Tensor
    zero: Tensor
    zero_on_grid: Tensor


@dataclass(frozen=True)
class MapFacts:
    """The raw map of one layer.

    Attributes:
        layer: the name of the activation, if the map is of one
        flat: the map, (N, positions)
        negative: a mask (N,) of the samples of which the ReLU leaves nothing
        constant: a mask (N,) of the samples with one value everywhere
        opposed: whether no position of the constant samples has a positive gradient where it is active
    """

    layer: str | None
    flat: Tensor
    negative: Tensor
    constant: Tensor
    opposed: bool


@dataclass(frozen=True)
class FinalMaps:
    """The maps as a user gets them, all layers in one.

    Attributes:
        cam: the map of each sample, (N, *spatial); None if there is none
        rivals: the class with the highest score besides the explained one, (N,), if the map is of a class
        rival_cam: the map of each sample for that class
        error: the reason why there are no maps
    """

    cam: Tensor | None = None
    rivals: Tensor | None = None
    rival_cam: Tensor | None = None
    error: ValueError | None = None


@contextmanager
def examined(recorded: ExtractorView, class_idx: Any, targets: Any) -> Iterator[Facts]:
    """Repeat the recorded pass on a replica of the model. The facts about it can be read inside the block."""
    with ExitStack() as stack:
        extractor = stack.enter_context(on_replica(recorded.extractor))
        stack.enter_context(quietly())  # their subjects are among the findings
        stack.enter_context(normal_mode(recorded.recorder.differentiates and not recorded.found.private))
        stack.enter_context(recorded.call.as_recorded())
        yield Facts(recorded, extractor, class_idx, targets)


class Facts:
    """A recorded pass, its repetition in evaluation mode, and the maps of the latter. Facts are computed when read.

    Facts build on each other: without a sound input there are no scores, without a method that succeeds no maps, and a
    blank map is not compared with that of another class. A fact without its basis is None or empty.

    Attributes:
        recorded: the extractor with the recorded pass
        repeated: the extractor with the repeated pass
        image: the image-like input as one tensor, if there is one
        output: the output of the repeated pass
        watch: the events of the repeated pass
        grids: by name, the activations in grid form, (N, C, *spatial); empty if one has none
        layout_error: the reason why an activation has no grid form
        classes: the explained class of each sample, if classes are explained
        select: the explained score, if any
    """

    def __init__(self, recorded: ExtractorView, extractor: Any, class_idx: Any, targets: Any) -> None:
        self.recorded = recorded
        self.image = _as_batch(find_image(recorded.call.args, recorded.call.kwargs, recorded.call.wanted))
        self.watch = PassWatch(recorded.cam.target_names if recorded.reads_layers else [])
        with self.watch.watching(extractor.model):
            self.output = self._repeat(extractor.model)
        self.repeated = ExtractorView(extractor)
        self.grids: dict[str, Tensor] = {}
        self.layout_error: ValueError | None = None
        self.classes: list[int] | None = None
        self.select: Selector | None = None
        if self.repeated.reached:
            try:
                grids = zip(self.repeated.names, self.repeated.grids(), strict=False)
                self.grids = {name: grid for name, grid in grids if grid is not None}
            except ValueError as error:
                self.layout_error = error
            self.select = self._selector(class_idx, targets)

    def _selector(self, class_idx: Any, targets: Any) -> Selector | None:
        try:
            logits = read_logits(self.output).detach()
        except TypeError:
            if targets is None and not self.recorded.cam.class_agnostic:
                raise
            logits = None
        if targets is None and class_idx is None:
            if logits is None:
                return None
            class_idx = class_scores(logits).argmax(1)
        select = Selector(class_idx, targets, self.repeated.batch_size)
        if logits is not None and targets is None:
            indices = select.indices(logits.reshape(-1, 1) if logits.ndim < 2 else logits)
            if indices.ndim > 1:
                raise ValueError(f"`class_idx` must name one class per sample to diagnose, got {class_idx!r}")
            self.classes = indices.tolist()
            if self.layout_error is None:
                with suppress(ValueError):  # the reason comes up again when maps are asked for
                    return self.repeated.selector(self.classes, self.output)
        return select

    def _repeat(self, model: nn.Module, image: Tensor | None = None) -> Any:
        """Run a model as recorded, or on a variant of the image-like input."""
        call = self.recorded.call
        arguments = call.args, call.kwargs
        if image is not None:
            arguments = call.with_image(image, torch.arange(len(image), device=image.device))
        args, kwargs = without_inference(arguments)
        try:
            return model(*args, **kwargs)
        except Exception as error:
            error.add_note("raised while `diagnose` repeated the recorded forward pass")
            raise

    # Values that are not finite.

    @cached_property
    def broken_input(self) -> Tensor | None:
        """The samples (N,) whose input is not finite, if there are any."""
        broken = None if self.image is None else ~is_finite(self.image)
        return broken if broken is not None and broken.any() else None

    @cached_property
    def broken_activations(self) -> dict[str, Tensor]:
        """By name, the samples (N,) whose recorded or repeated activations are not finite, if there are any."""
        found = {}
        view = self.repeated
        for name, *tensors in zip(view.names, view.activations, self.recorded.activations, strict=False):
            kept = [tensor for tensor in tensors if tensor is not None and len(tensor) == view.batch_size]
            finite = torch.stack([is_finite(tensor) for tensor in kept]).all(0) if kept else None
            if finite is not None and not finite.all():
                found[name] = ~finite
        return found

    @cached_property
    def scores(self) -> Tensor | None:
        """The explained scores, (N,)."""
        return None if self.select is None else self._scores_of(self.output)

    @cached_property
    def is_sound(self) -> bool:
        """Whether the repeated pass reached a layer with a grid, and input, activations and scores are finite."""
        if self.layout_error is not None or self.broken_input is not None or self.broken_activations:
            return False
        return self.repeated.reached and (self.scores is None or bool(self.scores.isfinite().all()))

    @cached_property
    def first_broken_gradient(self) -> str | None:
        """The module for whose output the gradient stops to be finite, on its way back from the score."""
        if self.select is None:
            return None
        with torch.enable_grad(), on_replica(self.recorded.extractor) as extractor:
            outputs, _ = watch(dict(extractor.model.named_modules()))
            output = self._repeat(extractor.model)
            score = self.select(ExtractorView(extractor).with_graph(output)).sum()
        watched = [(name or "the model", tensor) for name, tensors in outputs.items() for tensor in tensors]
        gradients = torch.autograd.grad(score, [tensor for _, tensor in watched], allow_unused=True)
        broken = (gradient is not None and not gradient.isfinite().all() for gradient in reversed(gradients))
        return next((name for (name, _), is_broken in zip(reversed(watched), broken, strict=True) if is_broken), None)

    # Variants of the input.

    @cached_property
    def moved_activations(self) -> list[list[Tensor | None]]:
        """The activations for inputs with noise in the lower and in the upper half, along each axis in turn."""
        image, found = self.image, []
        if image is None:
            return []
        noise = torch.randn(image.shape[1:], generator=torch.Generator().manual_seed(0)).to(image)
        noise = noise * image.float().std().clamp(min=0.1)
        with on_replica(self.recorded.extractor) as extractor:
            for axis in range(2, image.ndim):
                half = image.shape[axis] // 2
                for start in (0, image.shape[axis] - half):
                    changed = image.clone()
                    changed.narrow(axis, start, half).add_(noise.narrow(axis - 1, start, half))
                    self._repeat(extractor.model, changed)
                    found.append(ExtractorView(extractor).activations)
        return found

    def scores_of_variants(self, images: Iterable[Tensor]) -> Tensor:
        """Return the explained scores (V, N) of V variants of the input."""
        with replicated(self.recorded.model) as model, torch.no_grad():
            return torch.stack([self._scores_of(self._repeat(model, image)) for image in images])

    def _scores_of(self, output: Any) -> Tensor:
        assert self.select is not None  # noqa: S101 - for the type checker
        with torch.no_grad():
            return to_float(self.select(output).detach())

    # The score and its gradient.

    @cached_property
    def squash(self) -> str | None:
        """The function that made a probability of the explained score, if one has."""
        if self.select is None or self.recorded.cam.class_agnostic or not self.is_sound:
            return None
        if self.recorded.recorder.differentiates:
            with torch.enable_grad():
                return squashing_node(self.select(self.repeated.with_graph(self.output)))
        if self.select.targets:
            return None
        return self.watch.squashing_module(self.output) or _softmax_by_values(self.output)

    @property
    def probabilities(self) -> Tensor | None:
        """The explained scores (N,), if they are probabilities."""
        if self.squash is None or self.scores is None:
            return None
        return self.scores.exp() if "log" in self.squash.lower() else self.scores

    @cached_property
    def saturated(self) -> Tensor | None:
        """The samples (N,) whose score is a probability close to 0 or 1, if there are any."""
        found = None if self.probabilities is None else (self.probabilities > 0.99) | (self.probabilities < 1e-6)
        return found if found is not None and found.any() else None

    @cached_property
    def question(self) -> dict[str, Any]:
        """The arguments that ask the extractor for the explained maps."""
        if self.classes is not None:
            return {"class_idx": self.classes}
        return {} if self.select is None else {"targets": self.select.targets}

    @cached_property
    def raw(self) -> RawMaps:
        """The result of the method before its maps are finished."""
        if not self.is_sound:
            return RawMaps([], [])
        try:
            return self.repeated.raw_maps(self.question, self.select, self.output)
        except (RuntimeError, ValueError) as error:
            return RawMaps([], [], error)

    @cached_property
    def gradients(self) -> list[GradientFacts]:
        """The gradient for each activation that has one and that must have one."""
        view, found = self.repeated, []
        gradients = list(zip(view.found.rows, self.raw.gradients, strict=False))
        for row, gradient in gradients:
            if gradient is None or not gradient.numel():
                continue
            levels = [g for other, g in gradients if other.layer == row.layer]
            # A detector reads a box from one level of its pyramid.
            may_vanish = len(levels) > 1 and any(g is not None and bool(g.any()) for g in levels)
            grid = view.to_grid(gradient, row.name)
            broken = ~is_finite(gradient)
            must_count = not may_vanish and not bool(broken.any())
            zero = ~gradient.flatten(1).any(1) & must_count
            zero_on_grid = ~grid.flatten(1).any(1) & ~zero & must_count
            found.append(GradientFacts(row.name, math.prod(grid.shape[2:]), broken, zero, zero_on_grid))
        return found

    # The maps.

    @cached_property
    def constant_activations(self) -> dict[str, Tensor]:
        """By name, the samples (N,) each of whose channels is constant, if there are any."""
        found = {}
        for name, grid in self.grids.items() if self.is_sound and self.recorded.reads_layers else ():
            flat = grid.flatten(2)
            constant = is_constant(flat.amin(-1), flat.amax(-1)).all(1)
            if flat.shape[2] > 1 and constant.any():
                found[name] = constant
        return found

    @property
    def has_constant_layer(self) -> bool:
        """Whether a target layer has no map because its activation is constant or has one position."""
        grids = self.grids.values() if self.recorded.reads_layers else ()
        return bool(self.constant_activations) or any(math.prod(grid.shape[2:]) == 1 for grid in grids)

    @cached_property
    def maps(self) -> list[MapFacts]:
        """The raw map of each layer, if the gradients are finite and not zero."""
        maps, names, found = self.raw.maps, self.repeated.names, []
        if any(bool((fact.broken | fact.zero | fact.zero_on_grid).any()) for fact in self.gradients):
            return []
        by_layer = len(maps) == len(names)
        # Single levels of a pyramid may be blank.
        must_count = len(names) == len(self.recorded.cam.target_names) or not any(bool(cam.any()) for cam in maps)
        for index, cam in enumerate(maps):
            flat = cam.detach().flatten(1)
            lowest, highest = flat.amin(1), flat.amax(1)
            constant = is_constant(lowest, highest) & must_count
            negative = (highest <= 0) & ~constant & must_count & self.recorded.cam._relu
            opposed = by_layer and bool(constant.any()) and not flat[constant].any() and self._opposes(index, constant)
            found.append(MapFacts(names[index] if by_layer else None, flat, negative, constant, opposed))
        return found

    def _opposes(self, index: int, samples: Tensor) -> bool:
        """Check whether no position of some samples has a positive gradient where it is active."""
        gradient = self.raw.gradients[index] if index < len(self.raw.gradients) else None
        name = self.repeated.names[index]
        if gradient is None or name not in self.grids or self.recorded.recorder.reads_attention:
            return False
        towards, grid = self.repeated.to_grid(gradient, name)[samples], self.grids[name]
        return bool((towards <= 0).all()) or bool((towards * grid[samples] <= 0).all())

    @cached_property
    def final(self) -> FinalMaps:
        """The maps as a user gets them, if the raw ones are in order."""
        if not self.maps or any(bool((fact.negative | fact.constant).any()) for fact in self.maps):
            return FinalMaps()
        try:
            cam = self.repeated.fused_map(self.question, self.output)
            scores = class_scores(self.output) if self.classes is not None else None
            if scores is None or scores.shape[1] < 2 or self.recorded.cam.class_agnostic:
                return FinalMaps(cam)
            explained = torch.tensor(self.classes, device=scores.device).unsqueeze(1)
            rivals = scores.scatter(1, explained, -torch.inf).argmax(1)
            return FinalMaps(cam, rivals, self.repeated.fused_map({"class_idx": rivals.tolist()}, self.output))
        except ValueError as error:
            return FinalMaps(error=error)


def _as_batch(image: Tensor | list[Tensor] | None) -> Tensor | None:
    """Return an image-like input as one tensor; None for images of several sizes."""
    if image is None or isinstance(image, Tensor):
        return image
    return torch.stack(list(image)) if len({item.shape for item in image}) == 1 else None


def _softmax_by_values(output: Any) -> str | None:
    """Recognise a softmax by its values: two or more for each sample, none below 0, with a sum of 1."""
    logits = read_logits(output).detach()
    if logits.ndim != 2 or logits.shape[1] < 2 or (logits < 0).any():
        return None
    return "softmax" if ((to_float(logits).sum(1) - 1).abs() < 1e-3).all() else None
