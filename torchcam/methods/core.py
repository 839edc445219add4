"""The extractor every method builds on: what is asked, what a method computes, and the maps that are returned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from torchcam._checks import one_of, torch_module
from torchcam._passes import Call
from torchcam._replica import has_backward_hooks, normal_mode
from torchcam._tensors import min_max, to_float
from torchcam.layers import TargetLayer, layer_names
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, class_columns

from ._default_layer import DefaultLayer
from ._finish import all_finite, broken_samples, scale_signed, to_one_shape, weighted_sum
from ._gradients import differentiate, mixes_samples, reaches, share_of_score
from ._hooked import Hooked
from ._layouts import Layouts
from ._recorder import Pass, Recorder
from ._replicas import gradients_of_copies, on_replica
from ._request import Request
from ._running import full_precision, warn
from ._stream import Repeats

__all__ = ["_CAM", "OutputTarget", "Request", "on_replica"]


class _CAM(Hooked, Repeats):
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
        gradients: of gradient methods, how the gradient of the score is taken: ``"plain"``, the default, or
            ``"balanced"``, for layers behind which there are norms, gates, attention or smooth activation functions
            (Mehri et al. 2025, arXiv:2411.16760; ``docs/guides/transformers.md``)

    Raises:
        TypeError: if a target layer is neither a module nor a string, or ``model`` is one of TorchScript
        ValueError: if a target layer is not part of the model, or none can be found; if ``gradients`` is neither of the
            two, or given to a method that takes none at a layer
    """

    class_agnostic = False  # the map is the same for every class: none has to be named
    looks_at_a_layer = True  # its positions make the map: a default is searched for where none is named

    _default: DefaultLayer | None = None
    _channels: int | None = None  # how many the default layer must have
    _relu = False
    _differentiates = False  # the pass keeps its graph from the target layers on
    _weighs_gradients = False  # gradients of the score for what layers return make the map
    _hides_gradients = True  # a map may be finite although a gradient is not
    _expects_one_sign = False  # the weights are meant for activations of one sign
    _runs_model = False  # the model runs again when maps are computed
    _explains_many = False  # several classes of a sample are explained at once
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
        gradients: Literal["plain", "balanced"] | None = None,
    ) -> None:
        torch_module("model", model)
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("`model` is one of TorchScript, whose layers run no hooks: pass the model it was made from")
        if isinstance(model, torch.fx.GraphModule):
            called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
            if all(name.startswith("_guards") for name in called):  # which an export checks inputs by
                raise TypeError("`model` is an exported graph, whose layers are gone: pass the model it was made from")
        if gradients is not None and not self._weighs_gradients:
            raise ValueError(
                f"{type(self).__name__} takes no gradients at a layer, so there is no `gradients`, got {gradients!r}: "
                "GradCAM, HiResCAM, LayerCAM and the other gradient methods do"
            )
        self.gradients = one_of("gradients", gradients or "plain", ("plain", "balanced"))
        if reshape_transform is not None and not callable(reshape_transform):
            raise TypeError(f"`reshape_transform` must be callable, got {reshape_transform!r}")
        if input_name is not None and input_index is not None:
            raise ValueError(f"give `input_name` ({input_name!r}) or `input_index` ({input_index}), not both")
        model = vars(model)["_modules"].get("_orig_mod", model)  # of what `torch.compile` returned: it runs no hooks
        self.reshape_transform = reshape_transform
        wanted = input_name if input_index is None else input_index
        layouts = Layouts(model)
        default = DefaultLayer(model, input_shape, wanted, layouts, self._channels) if target_layer is None else None
        names = [] if target_layer is None else layer_names(model, target_layer)
        names = names if default is None else default.names
        self._default = default
        choose = None if default is None else default.confirm
        self._recorder = self._recording(
            model, names, wanted_input=wanted, enabled=enable_hooks, choose_layers=choose, layouts=layouts
        )

    def _recording(self, model: nn.Module, names: Sequence[str], **options: Any) -> Recorder:
        """Register the hooks on a model."""
        return Recorder(model, names, differentiates=self._differentiates, **options)

    @property
    def differentiates(self) -> bool:
        """Whether the method differentiates the score of the recorded pass: then a call takes ``retain_graph``."""
        return self._differentiates

    def moved_to(self, replica: nn.Module) -> Self:
        """Return an extractor like this one with its hooks, if it has any, on a replica of the model."""
        moved = copy.copy(self)
        here = self._recorder
        moved._recorder = self._recording(
            replica,
            here.target_names,
            wanted_input=here.wanted_input,
            choose_layers=here.choose_layers,
            layouts=here.layouts,
        )
        if not here.is_attached:
            moved.remove_hooks()
        return moved

    def choose_layer_for(self, call: Call, select: Callable[[Any], Tensor]) -> None:
        """Make sure that a default layer counts for what will be explained.

        Args:
            call: how the model will be called
            select: the explained scores, (N,) or (N, K)
        """
        if self._default is not None:
            self._default.choose_for(call, select)
            self._recorder.move(self._default.names)

    @property
    def inner(self) -> _CAM:
        """The extractor that looks at the layers: this one, or, of one that asks another, that."""
        return self

    # What was recorded, in grid form.

    def _last_pass(self) -> Pass | None:
        try:
            return self._recorder.find()
        except AssertionError:
            return None

    @property
    def hook_a(self) -> list[Tensor | None]:
        """The activation of each target layer in grid form, (N, C, *spatial), in float32 at least."""
        recorded = self._last_pass()
        return [None] * len(self.target_names) if recorded is None else self._grids(recorded, recorded.activations)

    @property
    def hook_g(self) -> list[Tensor | None]:
        """The gradient of the last explained score for each target layer, shaped like ``hook_a``.

        Of several scores of each sample, (N * K, C, *spatial): those of the first sample come first.
        """
        recorded = self._last_pass()
        grids: list[Tensor] = [] if recorded is None else self._gradient_grids(recorded)
        return [*grids] or [None] * len(self.target_names if recorded is None else recorded.rows)

    @property
    def unbalanced(self) -> list[str]:
        """The operations that the last explained score went through, and that balanced gradients have no rule for.

        By the names of torch's functions, or of the node in the graph for others; empty with plain gradients.
        """
        recorded = self._last_pass()
        return [] if recorded is None else sorted(recorded.unbalanced)

    @property
    def completeness(self) -> list[Tensor]:
        """The share of the last explained score that gradient × activation at each target layer's positions sums to.

        One tensor for each layer, (N,) or (N, K): 1 if the positions of the map account for all of the score. What
        biases, class tokens and paths around the layer add is missing. Empty before a call, and for methods that take
        no gradients of the recorded pass.
        """
        recorded = self._last_pass()
        if recorded is None or recorded.score is None or not self._weighs_gradients:
            return []
        found = zip(self.hook_a, self.hook_g, strict=True)
        return [share_of_score(a, g, recorded.score) for a, g in found if a is not None and g is not None]

    def _grids(self, recorded: Pass, tensors: Sequence[Tensor | None], graph: bool = False) -> list[Tensor | None]:
        """Lay out tensors shaped as the target layers' outputs as (N, C, *spatial)."""
        return [
            None if tensor is None else self._to_grid(recorded, tensor if graph else tensor.detach(), row.name)
            for tensor, row in zip(tensors, recorded.rows, strict=True)
        ]

    def _gradient_grids(self, recorded: Pass, graph: bool = False) -> list[Tensor]:
        """Lay out the gradients, if any; those of K scores of each sample, (K, ...), as (N * K, C, *spatial)."""
        grids: list[Tensor] = []
        for gradient, row in zip(recorded.gradients, recorded.rows, strict=False):
            found = gradient if graph or not gradient.requires_grad else gradient.detach()
            if recorded.num_scores is None:
                grids.append(self._to_grid(recorded, found, row.name))
            elif self.reshape_transform is None:
                batch = self._batch_dimension(recorded, found[0], row.name)
                grids.append(self._to_grid(recorded, found.movedim(0, batch + 1).flatten(batch, batch + 1), row.name))
            else:  # which may expect as many samples as the model had
                each = [self._to_grid(recorded, one, row.name) for one in found]
                grids.append(torch.stack(each, 1).flatten(0, 1))
        return grids if len(grids) == len(recorded.rows) else []

    def _batch_dimension(self, recorded: Pass, tensor: Tensor, name: str) -> int:
        """Return which dimension of a layer's output is the batch."""
        return 0 if self.reshape_transform is not None else recorded.layout(tensor, name).batch

    def check_positions(self, scores: Any = None) -> None:
        """Check that the positions of the recorded input follow its channels, (N, C, *spatial).

        Args:
            scores: the model's output; may be left out

        Raises:
            ValueError: if they do not, as far as the target layers show
        """
        recorded = self._recorder.find(scores)
        if self.reshape_transform is None:
            recorded.settle_axes()
        axes = recorded.call.axes
        if axes is not None:
            raise ValueError(
                f"the positions of the model's input of shape {recorded.input_shape} lie along its dimensions {axes}, "
                f"as the `target_layer` {', '.join(recorded.names)} shows, but what hides parts of the input needs "
                "them behind the channels, (N, C, *spatial): wrap the model in a module that takes such an input and "
                "permutes it"
            )

    def _to_grid(self, recorded: Pass, tensor: Tensor, name: str) -> Tensor:
        """Lay out a layer's output as (N, C, *spatial), in float32 at least."""
        if self.reshape_transform is None:
            layout = recorded.layout(tensor, name)
            return to_float(tensor if layout.is_plain else layout.to_grid(tensor))
        grid = self.reshape_transform(tensor)
        if not isinstance(grid, Tensor) or grid.ndim < 3:
            found = tuple(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
            raise ValueError(f"`reshape_transform` must return a tensor (N, C, *spatial), got {found}")
        return to_float(grid)

    def _activations(self, request: Request) -> list[Tensor]:
        """Return the recorded activations: (N, C, *spatial), or (N * K, C, *spatial) for K classes of each sample."""
        recorded, count, graph = request.recorded, request.num_classes, request.create_graph
        found = None if graph else recorded.grids
        if found is None:
            found = [
                self._to_grid(recorded, values if graph or not values.requires_grad else values.detach(), name)
                for _, name, values, _ in recorded.rows
                if values is not None
            ]
            if len(found) < max(len(recorded.rows), 1):
                raise AssertionError(self._recorder.nothing_recorded(recorded))
            recorded.grids = None if graph else found
        return found if count == 1 else [grid.repeat_interleave(count, 0) for grid in found]

    # What a method defines: pure functions of a layer's activation (N, C, *spatial) and of what else it looks at.

    def _no_weights(self, *_evidence: Any, **_options: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define its weights")

    weights: Callable[..., Tensor] = _no_weights
    """Return the weights of a layer's channels, (N, C), or (N, C, *spatial) for element-wise methods."""

    def map(self, *evidence: Any, **options: Any) -> Tensor:
        """Return a layer's map before ReLU and scaling, (N, *spatial): by default, its weighted channels, summed."""
        return weighted_sum(self.weights(*evidence, **options), evidence[0])

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        """Collect what the pure functions take for each target layer: by default, the activation."""
        return [(activation,) for activation in self._activations(request)]

    def _get_weights(self, class_idx: ClassIndex | None, scores: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return each target layer's weights: (N, C), or (N, C, *spatial) for element-wise methods."""
        request, options = self._request(self._recorder.find(scores), class_idx, scores, **kwargs)
        return [self.weights(*evidence, **options) for evidence in self._evidence(request)]

    def _layer_weights(self, request: Request, **options: Any) -> list[tuple[Tensor, Tensor]]:
        """Return weights and activation of each target layer."""
        if type(self)._get_weights is not _CAM._get_weights:  # a method that a user wrote for TorchCAM
            class_idx, targets = request.class_idx, request.targets
            if request.relu == "negative":
                class_idx, targets = None, self._selector(request)
            asked = {"targets": targets} if targets is not None else {}
            asked |= {"retain_graph": True} if request.retain_graph else {}
            asked |= {"create_graph": True} if request.create_graph else {}
            found = self._get_weights(class_idx, request.scores, **asked, **options)
            return list(zip(found, self._activations(request), strict=True))
        return [(self.weights(*evidence, **options), evidence[0]) for evidence in self._evidence(request)]

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        """Return each target layer's map before ReLU and scaling, (N, *spatial)."""
        if type(self)._get_weights is not _CAM._get_weights:
            return [weighted_sum(weight, activation) for weight, activation in self._layer_weights(request, **options)]
        return [self.map(*evidence, **options) for evidence in self._evidence(request)]

    def _pool_layers(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        """Return the maps to return for the target layers' raw maps: by default, those."""
        return maps

    # From a question to maps.

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
        if not self.class_agnostic:
            check_one_of(class_idx, targets)
        return self.compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: ClassIndex | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Compute the maps as a call does, without its checks."""
        columns = None if type(class_idx) is int else class_columns(class_idx, targets)
        recorded = self._recorder.find(scores)
        if columns is not None and not (self._explains_many and not has_backward_hooks(self.model)):
            asked = kwargs | {"scores": scores, "normalized": normalized}
            keep = {"retain_graph": True} if self._differentiates else {}
            each = [self.compute_cams(**asked | keep, **column) for column in columns[:-1]]
            each.append(self.compute_cams(**asked, **columns[-1]))
            return [torch.stack(of_layer, 1) for of_layer in zip(*each, strict=True)]
        count = 1 if columns is None else len(columns)
        request, options = self._request(recorded, class_idx, scores, targets, num_classes=count, **kwargs)
        if scores is not None and not recorded.has_returned(scores):
            self._check_scores(request)
        # What differentiates the recorded pass turns gradients on in any case; what it makes maps of is detached.
        graph = self._differentiates and not self._runs_model
        with normal_mode(graph), full_precision(recorded.call):
            maps = self._finished(self._raw_maps(request, **options), request, normalized)
        if graph and not request.create_graph:
            maps = [cam.detach() if cam.requires_grad else cam for cam in maps]
        recorded.explained = True
        return maps if columns is None else [cam.reshape(-1, count, *cam.shape[1:]) for cam in maps]

    def _request(
        self,
        recorded: Pass,
        class_idx: Any,
        scores: Any,
        targets: Any = None,
        *,
        relu: bool | Literal["negative"] | None = None,
        create_graph: bool = False,
        num_classes: int = 1,
        **options: Any,
    ) -> tuple[Request, dict[str, Any]]:
        """Check how maps are asked for; return that, and the options of the method."""
        if relu not in {None, True, False, "negative"}:
            raise ValueError(f"`relu` must be None, True, False or 'negative', got {relu!r}")
        if relu == "negative" and self.class_agnostic:
            raise ValueError(f"{type(self).__name__} explains no score, so there is no evidence against it: `relu`")
        if create_graph:
            if not self._differentiates or self._runs_model:
                raise ValueError(f"`create_graph`: {type(self).__name__} does not differentiate the recorded pass")
            if recorded.private:
                raise ValueError("`create_graph` needs the forward pass to be run with gradients on")
        retain_graph = self._differentiates and bool(options.pop("retain_graph", False))
        return Request(recorded, class_idx, scores, targets, relu, create_graph, retain_graph, num_classes), options

    def _finished(self, raw: list[Tensor], request: Request, normalized: bool) -> list[Tensor]:
        """Turn raw maps into those to return: broken samples marked, layers pooled, ReLU, scaled."""
        maps = self._pool_layers(self._mark_broken(raw, request), request)
        keeps_evidence = self._relu if request.relu is None else request.relu
        scale = scale_signed if request.relu is False else min_max
        kept = [*map(torch.relu, maps)] if keeps_evidence else maps
        return [*map(scale, kept)] if normalized else kept

    def _mark_broken(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        """Set the maps of samples with values that are not finite to NaN, and warn of them."""
        recorded = request.recorded
        # What is traced has no values to look at: `torchcam.export` marks samples at the end of the graph.
        seen: list[Tensor | None] = [*maps, *recorded.gradients] if self._hides_gradients else [*maps]
        if type(self).map is not _CAM.map or type(self)._raw_maps is not _CAM._raw_maps:  # sums show their parts
            seen = [*seen, *recorded.activations]
        if torch.compiler.is_compiling() or all_finite(seen):
            return maps
        if len(maps) != len(recorded.rows):  # of all layers together
            return [broken_samples(cam, None, None, ", ".join(recorded.names)) for cam in maps]
        activations = self._grids(recorded, recorded.activations)
        gradients: Sequence[Tensor | None] = self._gradient_grids(recorded) or [None] * len(maps)
        found = zip(maps, activations, gradients, recorded.names, strict=True)
        return [broken_samples(*of_layer) for of_layer in found]

    # Gradients.

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
        recorded, keep = self._recorder.find(scores), retain_graph or create_graph
        self._gradients(Request(recorded, class_idx, scores, targets, None, create_graph, keep))

    def _gradients(self, request: Request) -> list[Tensor]:
        """Differentiate the explained score for every target layer's output, shaped as the activations."""
        recorded = request.recorded
        if recorded.is_partial:
            return gradients_of_copies(self, request)
        with normal_mode():
            output = request.attached()
            select = self._selector(request)
            score = select(output)
            if recorded.others and reaches(score, recorded.others):
                return gradients_of_copies(self, request)
            if recorded.normalizes_batch and len(score) > 1 and mixes_samples(score, recorded.rows):
                warn(
                    "behind the `target_layer`, batch normalization by the statistics of the batch makes the score of "
                    "a sample depend on all samples, so a map shows what its sample did to the scores of all. If the "
                    "model is in training mode, call `model.eval()` before the forward pass; else explain one sample "
                    "at a time",
                    stacklevel=2,
                )
            balanced: tuple[Any, set[str]] | None = None
            if self.gradients == "balanced":
                recorded.unbalanced = set()
                balanced = output, recorded.unbalanced
            try:
                gradients = differentiate(score, recorded.rows, request.retain_graph, request.create_graph, balanced)
            except RuntimeError:
                if self._default is not None:  # which says what other layer there is
                    self._default.check_target(recorded.call, select, ())
                raise
        if self._default is not None:
            effects = map(self._default.of_positions, gradients)
            self._default.check_target(recorded.call, select, effects)
        recorded.gradients, recorded.num_scores = gradients, None if score.ndim == 1 else score.shape[1]
        recorded.score = score.detach()
        return self._gradient_grids(recorded, request.create_graph)

    def _selector(self, request: Request) -> Selector:
        return request.selector(self._batch_size(request))

    def _batch_size(self, request: Request) -> int:
        return self._activations(request)[0].shape[0] // request.num_classes

    def _check_scores(self, request: Request) -> None:
        """Check scores other than the recorded output."""
        request.check_scores(self._batch_size(request), self._differentiates and not self._runs_model)

    def _recorded_call(self, request: Request) -> Call:
        """Return the arguments of the recorded pass, with the axes along which its positions are."""
        recorded = request.recorded
        recorded.call.check_unchanged()
        if self.reshape_transform is None:
            recorded.settle_axes()
        return recorded.call

    # Fusion.

    @classmethod
    @torch.no_grad()
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Fuse the maps of several layers into one: the largest value at each position; of `HiResCAM`, the mean.

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
        return fused[0] if len(fused) == 1 else cls._join_cams(torch.stack(fused))

    @staticmethod
    def _join_cams(cams: Tensor) -> Tensor:
        """Join maps of one shape, (layers, N, *spatial)."""
        return cams.amax(0)

    @staticmethod
    def _scale_cams(cams: list[Tensor]) -> list[Tensor]:
        """Make the maps of several layers comparable before they are fused."""
        return list(cams)

    def __repr__(self) -> str:
        values = {
            option: self.target_names if option == "target_layer" else getattr(self, option) for option in self._options
        }
        if self.gradients == "balanced":
            values["gradients"] = self.gradients
        return f"{type(self).__name__}({', '.join(f'{option}={value}' for option, value in values.items())})"
