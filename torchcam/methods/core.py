"""The extractor every method builds on: hooks, the recorded pass, checks, normalisation, fusion."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchcam._passes import Call, find_image, image_shape, model_device, paused, records, untouched
from torchcam._replica import replicated
from torchcam._tensors import map_tensors, min_max, resize, tensors_in, to_float
from torchcam.layers import TargetLayer, automatic_layer, candidates, layer_names
from torchcam.layout import Layout, find_layout, meant_tensors, replace_tensors
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, class_columns

from ._diagnose import Diagnosis, diagnose
from ._record import BrokenSamples, Pass, Record, Request
from ._replay import VariantRunner, run_chunks
from ._stream import stream

__all__ = ["_CAM", "OutputTarget", "is_finite", "on_replica", "one_by_one", "plain_tensors", "to_one_shape"]

logger = logging.getLogger(__name__)


class _CAM:
    r"""Hook a model, watch one forward pass, and answer which regions of the input made a score.

    The raw map of a target layer with activation :math:`A` is :math:`M(s) = \sum_k w_k A_k(s)`; a method is a subclass
    that gives the weights :math:`w`. The model, its gradients and its buffers are left as they were.

    Args:
        model: the model to explain; of one that ``torch.compile`` returned, the original is taken: call that one
        target_layer: the layer(s) whose output is looked at, as modules or names; by default the last one whose
            positions the score depends on (see :func:`torchcam.layers.candidates`)
        input_shape: shape of the model's input without the batch dimension, used only to find a default layer. Where
            the model does not take such an input, or the first forward pass has another, that pass decides: it is
            preceded by one more.
        enable_hooks: whether forward passes are recorded from the start
        reshape_transform: function from a layer's output to a tensor ``(N, C, *spatial)``, for layers whose grid is
            not found by its geometry (see :func:`torchcam.layout.find_layout`); applied to the gradient as well
        input_name: name of the image-like input among the model's keyword arguments, or in one that is a mapping
        input_index: position of the image-like input among the model's positional arguments; by default it is the
            first floating-point tensor with positions

    Raises:
        TypeError: if a target layer is neither a module nor a string
        ValueError: if a target layer is not part of the model, or none can be found
    """

    class_agnostic = False  # the map is the same for every class: none has to be named

    _explains_scores = True  # a call takes the scores, and what of them is explained
    _relu = False
    _uses_gradients = False  # differentiate the score: the pass keeps the graph from the target layer on
    _uses_input = False  # run the model again: the pass keeps its arguments
    _edits_layers = False  # replace what a layer returned: the pass notes the form of what came before
    _explains_many = False  # several classes of a sample take one backward pass: `_backprop` is all the method asks for
    _options: tuple[str, ...] = ("target_layer",)  # what `repr` shows

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        input_name: str | None = None,
        input_index: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        if reshape_transform is not None and not callable(reshape_transform):
            raise TypeError(f"`reshape_transform` must be callable, got {reshape_transform!r}")
        if input_name is not None and input_index is not None:
            raise ValueError(f"give `input_name` ({input_name!r}) or `input_index` ({input_index}), not both")
        model = getattr(model, "_orig_mod", model)  # what `torch.compile` was given: compiled code runs no hooks
        self.model = model
        self.submodule_dict = dict(model.named_modules())
        self.reshape_transform = reshape_transform
        self._input = input_name if input_index is None else input_index
        self._probed: tuple[int, ...] | None = None  # the shape of input that a default layer was chosen for
        self.target_names = (
            self._default_layer(input_shape) if target_layer is None else layer_names(model, target_layer)
        )
        self._own_modules = {model}
        self.hook_handles: list[RemovableHandle] = []
        self._layer_handles: list[RemovableHandle] = []
        self._hooks_enabled = enable_hooks
        self._record = Record(self.target_names)
        self._broken = BrokenSamples()
        weakref.finalize(self, _remove_all, self.hook_handles).atexit = False
        try:
            self._register_hooks()
        except BaseException:
            self.remove_hooks()
            raise

    # Hooks: registered here, removed in `remove_hooks`, and when the extractor is dropped.

    def _register_hooks(self) -> None:
        handles = self.hook_handles
        handles.append(self.model.register_forward_pre_hook(self._weak_hook(self._start), with_kwargs=True))
        if self._edits_layers:
            for name, module in self.submodule_dict.items():
                if module is not self.model:
                    self._own_modules.add(module)
                    handles.append(module.register_forward_hook(self._weak_hook(self._note, name)))
        self._hook_layers()
        if self._uses_gradients or self._edits_layers:
            handles.append(self.model.register_forward_hook(self._weak_hook(self._finish), always_call=True))

    def _hook_layers(self) -> None:
        for handle in self._layer_handles:
            handle.remove()
            self.hook_handles.remove(handle)
        self._layer_handles.clear()
        for index, name in enumerate(self.target_names):
            layer = self.submodule_dict[name]
            self._own_modules.add(layer)
            self._layer_handles.append(layer.register_forward_hook(self._weak_hook(self._record_layer, index)))
        self.hook_handles.extend(self._layer_handles)

    @staticmethod
    def _weak_hook(method: Callable[..., Any], *leading: Any) -> Callable[..., Any]:
        """Make a module hook of a method. One that held the extractor would keep it alive as long as the model."""
        reference = weakref.WeakMethod(method)

        def hook(module: nn.Module, *arguments: Any) -> Any:
            if torch.compiler.is_compiling():  # what is traced now would run again without this extractor
                return None
            bound: Any = reference()
            if bound is None or not bound.__self__._watches(module):
                return None
            return bound(*leading, *arguments)

        return hook

    def _watches(self, module: nn.Module) -> bool:
        # A deep copy of a model takes the hooks along, and is none of this extractor's business.
        return self._hooks_enabled and records(self, self.model) and module in self._own_modules

    # The default layer.

    def _default_layer(self, input_shape: tuple[int, ...]) -> list[str]:
        """Choose a layer by a pass over noise; none, for the first forward pass to choose, if the model takes none."""
        self._probed = ()
        try:
            found = automatic_layer(self.model, input_shape)
        except Exception as error:  # noqa: BLE001 - whatever a model raises at an input that is not its kind
            logger.info("%s does not take an input of shape %s: %s", type(self.model).__name__, input_shape, error)
            return []
        self._probed = tuple(input_shape)
        return self._announced(found, self._probed)

    def _choose_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the default layer for the first forward pass, where its input is not what was chosen for."""
        image = image_shape(find_image(args, kwargs, self._input))
        probed, self._probed = self._probed, None
        if image is not None and image[1:] != probed:
            found = candidates(self.model, *args, **kwargs).choice
            if [found] != self.target_names:
                self.target_names = self._announced(found, image[1:])
                self._hook_layers()

    def _announced(self, layer: str | None, shape: tuple[int, ...]) -> list[str]:
        if layer is None:
            raise ValueError(
                f"no layer of {type(self.model).__name__} has positions that the score depends on, for an input of "
                f"shape {shape}: name a `target_layer`"
            )
        logger.warning("no value was provided for `target_layer`, thus set to '%s'.", layer)
        return [layer]

    # The recorded pass.

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._probed is not None:
            self._choose_layer(args, kwargs)
        self._record = record = Record(self.target_names)
        record.started = True
        changed = None
        if self._uses_gradients:
            record.shared = Pass.join(self.model, self)
            grad_mode = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            if not grad_mode and not record.shared.private:
                changed = args, kwargs = record.shared.make_private(args, kwargs)
        record.running = True
        record.training = self._edits_layers and any(module.training for module in self._own_modules)
        record.input_shape = image_shape(find_image(args, kwargs, self._input))
        record.call = Call.of(args, kwargs, self._input)  # for `diagnose`, where the method has no need of it
        return changed

    def _note(self, name: str, _args: Any, output: Any) -> None:
        self._record.note(name, self.submodule_dict[name], output)

    def _record_layer(self, index: int, _args: Any, output: Any) -> Any:
        if self._edits_layers:
            self._record.reached(index, output)
        meant = meant_tensors(output)
        prepare = self._with_graph if self._uses_gradients else Tensor.detach
        kept = {level: prepare(tensor) for level, tensor in meant.items()}
        self._record.keep(index, kept)
        # What follows gets copies: an operation in place must not change what is recorded.
        handed = (kept if self._uses_gradients else meant).values()
        return replace_tensors(output, [(old, new.clone()) for old, new in zip(meant.values(), handed, strict=True)])

    def _with_graph(self, tensor: Tensor) -> Tensor:
        """Make sure that what follows can be differentiated with respect to ``tensor``."""
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        if self._record.shared is not None and self._record.shared.private:
            torch.set_grad_enabled(True)
        return tensor.detach().requires_grad_()

    def _finish(self, _args: Any, output: Any) -> Any:
        if self._edits_layers:
            self._record.running = False
            self._record.output = map_tensors(Tensor.detach, output)
        shared = self._record.shared
        if shared is None:
            return None
        output = shared.finish(self.model, output)
        if shared.output is None:  # the forward pass raised: what it left behind is no basis for a map
            self._record = Record(self.target_names)
        return output

    def enable_hooks(self) -> None:
        """Record the forward passes from now on."""
        self._hooks_enabled = True

    def disable_hooks(self) -> None:
        """Ignore the forward passes from now on."""
        self._hooks_enabled = False

    def reset_hooks(self) -> None:
        """Forget the recorded pass: its activations, gradients, input and scores."""
        self._record = Record(self.target_names)
        self._broken.report(wait=True)

    def remove_hooks(self) -> None:
        """Take all hooks off the model. May be called more than once."""
        _remove_all(self.hook_handles)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove_hooks()
        self.reset_hooks()

    @contextmanager
    def _inner_pass(self) -> Iterator[None]:
        """Let this extractor, and no other, record a pass of its own; the user's is back afterwards."""
        outer, enabled = self._record, self._hooks_enabled
        with untouched(self.model, recorder=self):
            try:
                self._hooks_enabled = True
                yield
            finally:
                self._record, self._hooks_enabled = outer, enabled

    # What was recorded, in grid form.

    @property
    def hook_a(self) -> list[Tensor | None]:
        """The activation of each target layer in grid form, (N, C, *spatial), in float32 at least."""
        return self._grids(self._record.activations)

    @property
    def hook_g(self) -> list[Tensor | None]:
        """The gradient of the last explained score for each target layer, shaped like ``hook_a``.

        Of several scores of each sample, (N * K, C, *spatial): those of the first sample come first.
        """
        record = self._record
        gradients = record.gradients or [None] * len(record.names)
        if record.num_scores is None:
            return self._grids(gradients)
        return [
            None if gradient is None or activation is None else self._grid_of_scores(gradient, activation, name)
            for gradient, activation, name in zip(gradients, record.activations, record.names, strict=True)
        ]

    def _grid_of_scores(self, gradients: Tensor, activation: Tensor, name: str) -> Tensor:
        """Lay out the gradients of K scores of each sample, (K, ...), as (N * K, C, *spatial)."""
        if self.reshape_transform is not None:  # which may expect as many samples as the model had
            return torch.stack([self._to_grid(gradient, name) for gradient in gradients], 1).flatten(0, 1)
        batch = self._layout(activation, name).batch
        return self._to_grid(gradients.movedim(0, batch + 1).flatten(batch, batch + 1), name)

    def _grids(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        names = self._record.names
        return [None if t is None else self._to_grid(t, name) for t, name in zip(tensors, names, strict=True)]

    def _layout(self, tensor: Tensor, name: str) -> Layout:
        """Find the layout of a layer's output, from the first tensor that is asked about: the one of the pass."""
        layouts = self._record.layouts
        if name not in layouts:
            layouts[name] = find_layout(tensor.shape, self._record.input_shape, name)
        return layouts[name]

    def _to_grid(self, tensor: Tensor, name: str) -> Tensor:
        tensor = tensor if self._record.request.create_graph else tensor.detach()
        if self.reshape_transform is None:
            tensor = self._layout(tensor, name).to_grid(tensor)
        else:
            tensor = self.reshape_transform(tensor)
            if not isinstance(tensor, Tensor) or tensor.ndim < 3:
                found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"`reshape_transform` must return a tensor (N, C, *spatial), got {found}")
        return to_float(tensor)

    def _from_grid(self, grid: Tensor, output: Tensor, name: str) -> Tensor:
        """Give rows of a layer's output, in its layout, with the grids (B, C, *spatial) in the place of theirs."""
        if self.reshape_transform is None:
            return self._layout(output, name).from_grid(grid.to(output.dtype), output)
        row = output[:1]
        numbers = torch.arange(row.numel(), dtype=torch.float64, device=output.device).reshape(row.shape)
        places = self.reshape_transform(numbers).flatten().round().long().clamp(0, row.numel() - 1)  # (C * S,)
        found = self.reshape_transform(row).flatten()
        if not torch.allclose(row.flatten()[places], found, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"{type(self).__name__} edits the layer's output, but `reshape_transform` computes new values where it "
                "may only select and move them: there is no way back"
            )
        rows = output.flatten(1).clone().index_copy_(1, places, grid.flatten(1).to(output.dtype))
        return rows.reshape(output.shape)

    def _activations(self) -> list[Tensor]:
        """Give the recorded activations: (N, C, *spatial), or (N * K, C, *spatial) while K classes are explained."""
        activations = [activation for activation in self.hook_a if activation is not None]
        if len(activations) < max(len(self._record.names), 1):
            hint = "compiled code and replicas of a model run no hooks: call the original module, `extractor.model`"
            if self._record.started:
                raise AssertionError(
                    f"the recorded forward pass did not run {self.target_names}, or was cut short ({hint})"
                )
            raise AssertionError(
                f"no forward pass has reached {self.target_names or 'the model'}: call the model on an input, hooks "
                f"enabled, before you ask for its maps ({hint})"
            )
        num_classes = self._record.request.num_classes
        return activations if num_classes == 1 else [a.repeat_interleave(num_classes, 0) for a in activations]

    def _gradients(self) -> list[Tensor]:
        """Give the gradients of the last backward pass, all of which must be there: shaped as the activations."""
        return [gradient for gradient in self.hook_g if gradient is not None]

    # From a score to maps.

    def _get_weights(self, class_idx: ClassIndex | None, scores: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Give each target layer's weights: (N, C), or (N, C, *spatial) for element-wise methods."""
        raise NotImplementedError(f"{type(self).__name__} does not define its weights")

    def _precheck(
        self,
        class_idx: ClassIndex | None,
        scores: Any = None,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> None:
        if not self.class_agnostic:
            check_one_of(class_idx, targets)
        activations = self._activations()
        if scores is not None and isinstance(scores, Tensor) and scores.ndim and len(scores) != len(activations[0]):
            raise ValueError(
                f"`scores` has shape {tuple(scores.shape)}, but the recorded pass had a batch of {len(activations[0])}"
            )

    def __call__(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps of the recorded pass.

        Args:
            class_idx: the class to explain, for the whole batch or one per sample; any kind of integer. Several per
                sample, as a list of as many for each or a tensor (N, K), are explained at once.
            scores: the model's output; may be left out
            normalized: whether each map is scaled to [0, 1]
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar; or
                a list of as many callables for each sample
            kwargs: options of the method, and of all methods:
                ``relu``: True for the evidence for the score, ``"negative"`` for that against it (the map of the
                negative score), False for both in a signed map, which ``normalized`` scales to [-1, 1] with zero kept;
                None, the default, for what the method does by itself.
                ``create_graph``: gradient methods keep the graph, so that a map can be part of a training loss.

        Returns:
            one map (N, *spatial) per target layer, (N, K, *spatial) for K classes, float32 or float64, on the model's
            device. A sample whose activations or gradients are not finite gets a map of NaN.

        Raises:
            AssertionError: if no forward pass was recorded
            TypeError: if a class index is not an integer
            ValueError: if not exactly one of ``class_idx`` and ``targets`` is given, a class does not exist, there is
                not one per sample, or a layer's output has no positions
            RuntimeError: if the score does not depend on a target layer
        """
        self._precheck(class_idx, scores, targets)
        return self.compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        relu: bool | Literal["negative"] | None = None,
        create_graph: bool = False,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps as a call does, without its checks."""
        columns = class_columns(class_idx, targets)
        record = self._record
        record.request = self._request(relu, create_graph, len(columns) if columns and self._explains_many else 1)
        try:
            if columns is None:
                return self._maps(class_idx, scores, normalized, targets, **kwargs)
            if self._explains_many:
                maps = self._maps(class_idx, scores, normalized, targets, **kwargs)
                return [cam.reshape(-1, len(columns), *cam.shape[1:]) for cam in maps]
            explain = partial(self._maps, class_idx=None, scores=scores, normalized=normalized, targets=None, **kwargs)
            return one_by_one(columns, explain, self._uses_gradients)
        finally:
            record.request = Request()

    def stream(
        self,
        batches: Iterable[Any],
        class_idx: ClassIndex | Callable[[Any], ClassIndex] | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> Iterator[list[Tensor]]:
        """Run the model on batches, in evaluation mode and without gradients, and yield the maps of each.

        Nothing of a batch is kept when the next one is asked for: memory stays the same over any number of them. A pass
        that was recorded before is still there afterwards.

        Example:
            >>> from torchcam.methods import GradCAM
            >>> from torchvision.models import resnet18
            >>> model = resnet18().eval()
            >>> loader = [torch.rand(2, 3, 64, 64) for _ in range(3)]
            >>> with GradCAM(model, "layer4") as extractor:
            ...     peaks = [cam.flatten(1).argmax(1) for (cam,) in extractor.stream(loader)]
            >>> len(peaks)
            3

        Args:
            batches: the model's inputs, say a ``DataLoader``: a tensor each, a tuple or list that begins with it (the
                rest is not looked at), or a mapping of the model's keyword arguments (but for ``label`` and
                ``labels``); moved to the model's device
            class_idx: the class to explain, as a call takes it, or a function from the model's output to that; by
                default the one with the highest score of each sample
            targets: in place of ``class_idx``, what a call takes
            kwargs: what else a call takes

        Yields:
            the maps of each batch, as a call returns them

        Raises:
            ValueError: if both ``class_idx`` and ``targets`` are given, and for what a call raises it
        """
        yield from stream(self, self, batches, class_idx, targets, **kwargs)

    def diagnose(
        self,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> Diagnosis:
        """Say why a map of the recorded pass is blank, constant, NaN, inverted, the same for every class or too coarse.

        The recorded pass is repeated in evaluation mode, and left as it was.

        Args:
            class_idx: the class whose map is wrong, for the whole batch or one per sample; by default the one with the
                highest score
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar

        Returns:
            the findings, each with what to do: a sequence that prints as a report, empty if nothing wrong was found

        Raises:
            TypeError: if an argument has the wrong type
            ValueError: if a class does not exist, there are several per sample, or both arguments are given
        """
        return diagnose(self, class_idx, targets=targets)

    def _request(self, relu: bool | str | None, create_graph: bool, num_classes: int) -> Request:
        """Check how maps are asked for."""
        if relu not in {None, True, False, "negative"}:
            raise ValueError(f"`relu` must be None, True, False or 'negative', got {relu!r}")
        if relu == "negative" and self.class_agnostic:
            raise ValueError(f"{type(self).__name__} explains no score, so there is no evidence against it: `relu`")
        if create_graph:
            if not self._uses_gradients or self._uses_input:
                raise ValueError(f"`create_graph`: {type(self).__name__} does not differentiate the recorded pass")
            if self._record.shared is not None and self._record.shared.private:
                raise ValueError("`create_graph` needs the forward pass to be run with gradients on")
        return Request(relu, create_graph, num_classes)

    def _maps(
        self,
        class_idx: Any,
        scores: Any,
        normalized: bool,
        targets: Any,
        raw_maps: Callable[..., list[Tensor]] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute maps from raw ones: the method's own, or those that ``raw_maps`` makes with its help."""
        if targets is not None:
            kwargs["targets"] = targets
        raw_maps = self._raw_maps if raw_maps is None else raw_maps
        device_type = model_device(self.model).type
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if self._record.request.create_graph else plain_tensors())
            if torch.amp.is_autocast_available(device_type):  # maps are summed in full precision
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return self._finished(self._mark_broken(raw_maps(class_idx, scores, **kwargs)), normalized)

    def _finished(self, raw: list[Tensor], normalized: bool) -> list[Tensor]:
        """Turn the raw maps into those to return: layers pooled, ReLU, scaled."""
        maps = self._pool_layers(raw)
        relu = self._record.request.relu
        if self._relu if relu is None else relu:
            maps = [cam.relu() for cam in maps]
        if not normalized:
            return maps
        return [min_max(cam) if relu is not False else _scale_signed(cam) for cam in maps]

    def _explain_variants(
        self,
        variants: Callable[[slice], Tensor],
        samples: Tensor,
        select: Selector | None,
        batch_size: int,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps of variants of the recorded input, in quiet passes of the model in evaluation mode.

        Args:
            variants: builds the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)
            select: the explained score, None for class-agnostic methods
            batch_size: largest number of variants in one pass
            kwargs: options of the method

        Returns:
            one normalised map (V, *spatial) per target layer, (V * K, *spatial) while K classes are explained; those
            of samples that are not finite are NaN
        """
        call, request = self._recorded_call(), self._record.request
        run = VariantRunner(self.model, call)

        def explain(chunk: slice) -> list[Tensor]:
            rows = samples[chunk]
            with call.as_recorded():
                output = run(variants(chunk), rows)
            self._record.request = request
            asked = {} if select is None else select.arguments(output, rows)
            raw = self._raw_maps(asked.pop("class_idx", None), None, **asked, **kwargs)
            return self._finished(raw, normalized=True)

        with self._inner_pass():
            chunks = run_chunks(explain, len(samples), batch_size)
        return [torch.cat(maps) for maps in zip(*chunks, strict=True)]

    def _raw_maps(self, class_idx: ClassIndex | None, scores: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Give each target layer's map before ReLU and scaling, (N, *spatial): its weighted channels, summed."""
        weights = self._get_weights(class_idx, scores, *args, **kwargs)
        return [_combine(weight, activation) for weight, activation in zip(weights, self._activations(), strict=True)]

    def _pool_layers(self, maps: list[Tensor]) -> list[Tensor]:
        """Give the maps to return for the target layers' raw maps: by default, those."""
        return maps

    def _mark_broken(self, maps: list[Tensor]) -> list[Tensor]:
        """Set the maps of samples with non-finite activations or gradients to NaN, and warn of them."""
        self._broken.report()
        marked = []
        for cam, activation, gradient, name in zip(maps, self.hook_a, self.hook_g, self._record.names, strict=True):
            finite = is_finite(cam)
            if activation is not None:
                finite &= is_finite(activation).repeat_interleave(self._record.request.num_classes)
            if gradient is not None:
                finite &= is_finite(gradient)
            self._broken.add(name, finite)
            marked.append(cam.masked_fill(~finite.reshape(-1, *[1] * (cam.ndim - 1)), torch.nan))
        self._broken.report()
        return marked

    def _backprop(
        self,
        scores: Any,
        class_idx: ClassIndex | None,
        retain_graph: bool = False,
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
        create_graph: bool = False,
    ) -> None:
        """Differentiate the explained score with respect to every target layer's output; ``hook_g`` holds the result.

        Only what follows the target layers is traversed, and no ``.grad`` field is written. With ``create_graph``, the
        recorded gradients can be differentiated once more, and the graph is kept.
        """
        with torch.inference_mode(False), torch.enable_grad():
            select = self._selector(class_idx, targets)
            score = select(self._attached(scores))
        create_graph = create_graph or self._record.request.create_graph
        gradients = self._differentiate(score, self._record.activations, retain_graph or create_graph, create_graph)
        self._record.gradients = list(gradients)
        self._record.num_scores = None if score.ndim == 1 else score.shape[1]

    def _differentiate(
        self,
        score: Tensor,
        tensors: Sequence[Tensor | None],
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> tuple[Tensor, ...]:
        """Differentiate a score with respect to one tensor of every target layer.

        Args:
            score: one score of each sample (N,), or several (N, K)
            tensors: the tensors; None for those to leave out
            retain_graph: whether the graph is kept
            create_graph: whether the gradients have a graph of their own

        Returns:
            the gradients, shaped as the tensors; of several scores (K, ...), from one batched backward pass
        """
        of_layers = zip(self._record.layers, self._record.names, tensors, strict=True)
        named = [(layer, name, tensor) for layer, name, tensor in of_layers if tensor is not None]
        gradients: tuple[Tensor | None, ...] = (None,) * len(named)
        many = score.ndim > 1
        if score.requires_grad:
            try:
                with torch.inference_mode(False), torch.enable_grad(), paused(self.model):
                    total = score.sum(0)  # the samples do not depend on each other
                    gradients = torch.autograd.grad(
                        total,
                        [tensor for *_, tensor in named],
                        torch.eye(len(total), dtype=total.dtype, device=total.device) if many else None,
                        retain_graph=retain_graph,
                        create_graph=create_graph,
                        allow_unused=True,
                        is_grads_batched=many,
                    )
            except RuntimeError as error:
                if "second time" in str(error):
                    error.add_note("To explain several scores of one forward pass, call with `retain_graph=True`.")
                raise
        # Of a layer's several tensors some may not count: a detector reads a box from one level of its pyramid.
        found = list(zip(named, gradients, strict=True))
        connected = {layer for (layer, *_), gradient in found if gradient is not None}
        missing = [name for (layer, name, _), _ in found if layer not in connected]
        if missing:
            raise RuntimeError(
                "the explained score is not connected to every target layer: it does not depend on the output of "
                + ", ".join(f"'{name}'" for name in missing)
            )
        return tuple(
            tensor.new_zeros((*score.shape[1:], *tensor.shape)) if gradient is None else gradient
            for (*_, tensor), gradient in found
        )

    def _selector(
        self,
        class_idx: ClassIndex | None,
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None,
    ) -> Selector:
        select = targets if isinstance(targets, Selector) else Selector(class_idx, targets, self._batch_size())
        return select.negative() if self._record.request.relu == "negative" else select

    def _output(self, scores: Any) -> Any:
        """Give the model's output: the one handed over, the recorded one, or else that of a repeated pass."""
        if scores is not None:
            return scores
        if self._record.shared is not None and self._record.shared.output is not None:
            return self._record.shared.output
        call = self._recorded_call()
        with untouched(self.model), plain_tensors(), call.as_recorded():
            return self.model(*call.args, **call.kwargs)

    def _recorded_call(self) -> Call:
        """Give the arguments of the recorded pass."""
        if self._record.call is None:
            raise RuntimeError(
                f"{type(self).__name__} runs the model again, but its call was not recorded: call the model itself "
                "(not a part of it) with hooks enabled"
            )
        return self._record.call

    def _batch_size(self) -> int:
        return len(self._activations()[0]) // self._record.request.num_classes

    def _attached(self, scores: Any) -> Any:
        """Give the output with its graph: the one handed over, or else the one of the recorded pass."""
        given = list(tensors_in(scores))
        if any(tensor.requires_grad for tensor in given):
            return scores
        recorded = None if self._record.shared is None else self._record.shared.output
        if given and [tensor.shape for tensor in given] != [tensor.shape for tensor in tensors_in(recorded)]:
            raise RuntimeError(
                f"`scores` of shape {[tuple(tensor.shape) for tensor in given]} carry no graph and are not shaped like "
                "the output of the recorded pass: pass that output as it came, leave `scores` out, or compute them "
                "with gradients on"
            )
        if recorded is None:
            raise RuntimeError("no output of the model was recorded: call the model itself, or pass `scores`")
        return recorded

    # Fusion.

    @classmethod
    @torch.no_grad()
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Fuse the maps of several layers into one: the largest value at each position.

        Args:
            cams: maps of the same samples, (N, *spatial) each
            target_shape: spatial shape of the result, by default the largest of each side among the maps

        Returns:
            the fused map, (N, *target_shape); a single map is returned as it is, resized if asked

        Raises:
            TypeError: if ``cams`` is not a list of tensors
            ValueError: if it is empty
        """
        fused = to_one_shape(cams, target_shape, cls._scale_cams)
        return fused[0] if len(fused) == 1 else torch.stack(fused).amax(0)

    @staticmethod
    def _scale_cams(cams: list[Tensor]) -> list[Tensor]:
        """Make the maps of several layers comparable before they are fused."""
        return list(cams)

    def __repr__(self) -> str:
        values = {
            option: self.target_names if option == "target_layer" else getattr(self, option) for option in self._options
        }
        return f"{type(self).__name__}({', '.join(f'{option}={value}' for option, value in values.items())})"


@contextmanager
def on_replica(extractor: Any) -> Iterator[Any]:
    """Return an extractor like ``extractor`` that watches a replica of its model; of a foreign one, itself."""
    base = getattr(extractor, "base_cam", extractor)
    if not isinstance(base, _CAM):
        with untouched(extractor.model, recorder=extractor):
            yield extractor
        return
    with replicated(base.model) as replica:
        moved = copy.copy(base)
        moved.model, moved.submodule_dict = replica, dict(replica.named_modules())
        moved.hook_handles, moved._layer_handles, moved._own_modules = [], [], {replica}
        moved._hooks_enabled = True
        names, moved.target_names = (
            moved.target_names,
            [n if n in moved.submodule_dict else "" for n in moved.target_names],
        )
        moved._register_hooks()
        moved.target_names = names
        moved._record = Record(names)
        if base is extractor:
            yield moved
        else:
            wrapper = copy.copy(extractor)
            wrapper.base_cam = moved
            yield wrapper
        moved.remove_hooks()


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Compute without a graph, and without the restrictions that tensors made in inference mode carry for good."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def one_by_one(
    columns: list[dict[str, Any]], explain: Callable[..., list[Tensor]], uses_gradients: bool
) -> list[Tensor]:
    """Explain one class of each sample after the other, keeping the graph in between: (N, K, *spatial) per map."""
    keep = {"retain_graph": True} if uses_gradients else {}
    maps = [explain(**column, **(keep if k < len(columns) - 1 else {})) for k, column in enumerate(columns)]
    return [torch.stack(layer, 1) for layer in zip(*maps, strict=True)]


def to_one_shape(
    cams: list[Tensor],
    target_shape: tuple[int, ...] | None,
    scale: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Check, scale and resize maps (N, *spatial) to ``target_shape``, by default the largest of each side among them.

    Raises:
        TypeError: if ``cams`` is not a list of tensors
        ValueError: if it is empty
    """
    if not isinstance(cams, (list, tuple)) or not all(isinstance(cam, Tensor) for cam in cams):
        raise TypeError(f"`cams` must be a list of tensors, one map (N, *spatial) per layer, got {type(cams).__name__}")
    if not cams:
        raise ValueError("`cams` is an empty list: there is no map to fuse")
    shape = target_shape or [max(sides) for sides in zip(*(cam.shape[1:] for cam in cams), strict=True)]
    return [resize(cam.unsqueeze(1), shape).squeeze(1) for cam in scale(list(cams))]


def _combine(weight: Tensor, activation: Tensor) -> Tensor:
    """Sum the weighted channels: (N, C) or (N, C, *spatial) by (N, C, *spatial) to (N, *spatial)."""
    if weight.ndim == 2:
        return torch.einsum("nc,nc...->n...", weight, activation)
    return (weight * activation).sum(1)


def _scale_signed(maps: Tensor) -> Tensor:
    """Scale to [-1, 1] per sample, zero kept."""
    peak = maps.flatten(1).abs().amax(1).reshape(-1, *[1] * (maps.ndim - 1))
    return torch.where(peak == 0, 0.0, maps / torch.where(peak == 0, 1.0, peak))


def is_finite(tensor: Tensor) -> Tensor:
    """Tell which samples hold finite values only, (N,)."""
    return (tensor.flatten(1) * 0).sum(1) == 0  # nothing else has a product with 0 that is not 0


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
