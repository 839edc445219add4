"""Who records a forward pass, and what a pass leaves behind."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from torchcam._passes import Call, image_shape, without_inference
from torchcam._replica import CallWrapper, KeptReplica, normal_mode
from torchcam._tensors import map_tensors, tensors_in
from torchcam.layout import Layout, axes_of, replace_tensors, unusual_axes

from ._fused import FusedCall, SharedWrapper, attached, fused_modules
from ._layer_hook import LayerHook, drop_graphs, followed, may_be_hooked, without_graph
from ._layouts import Layouts
from ._running import thread

ChooseLayers = Callable[[tuple[Any, ...], dict[str, Any]], list[str]]

_numbers = itertools.count()


class _Key(NamedTuple):
    """Held by the contexts that a pass belongs to: threads and asyncio tasks, and copies of their contexts."""

    recorder: weakref.ref[Recorder]
    number: int

    def __del__(self) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.context_ended(self.number)


_own_keys: ContextVar[dict[int, _Key]] = ContextVar("torchcam_passes", default={})  # noqa: B039 - never changed


class Row(NamedTuple):
    """A tensor that a target layer returned.

    Attributes:
        layer: the name of the layer
        name: the same, with what tells the tensor apart where the layer returned several
        values: the tensor; None for a layer that was not reached
        edge: what to differentiate for
    """

    layer: str
    name: str
    values: Tensor | None
    edge: Tensor | GradientEdge | None


_NOT_REACHED: dict[str, tuple[Any, Any]] = {"": (None, None)}


class Pass:
    """What one forward pass left behind, in the thread or task that ran it.

    Attributes:
        thread: the thread that ran it
        in_event_loop: whether a task of asyncio ran it
        number: passes in the order in which they started
        predecessor: the number of the pass that the same context, or the one it is a copy of, had before
        call: the arguments of the model
        input_shape: the shape (N, C, *spatial) of the image-like input, if there is one
        output: what the model returned, with its graph where there is one
        returned: weak references to the tensors that the caller got
        private: whether gradients were turned on for this pass alone
        explained: whether maps were computed from it
        superseded: whether its context has run the model again
        layers: of each target layer that was reached, what it returned, by what tells several tensors apart, with what
            to differentiate for
        rows: the same in the order of the target layers, with a row without values for one that was not reached
        grids: these in grid form, once somebody has asked
        normalizes_batch: whether batch normalization of the model may have used the statistics of the batch
        is_partial: whether some use of a layer's output lies outside of the graph: it is the caller's input, or a view
        others: leaves in the place of what else the layers returned: the graph of a score that they are in is partial
        gradients: those of the score that was explained last, as the layers returned their outputs
        num_scores: how many scores of each sample were explained last; None for one without a dimension of its own
        score: the score that was explained last, (N,) or (N, K)
        unbalanced: the operations on its way to the layers that balanced gradients have no rule for
        attentions: attention probabilities by target layer, for methods that read them
        watch: what notes them while the pass runs
    """

    predecessor: int | None = None
    output: Any = None
    explained = False
    superseded = False
    is_partial = False
    normalizes_batch = False
    others: Sequence[Tensor] = ()
    watch: Any = None
    rows: Sequence[Row] = ()
    grids: list[Tensor] | None = None
    gradients: Sequence[Tensor] = ()
    num_scores: int | None = None
    score: Tensor | None = None
    unbalanced: Set[str] = frozenset()
    _versions: Sequence[tuple[Tensor, int]] = ()

    def __init__(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], private: bool) -> None:
        self.number = next(_numbers)
        self.thread = threading.get_ident()
        self.in_event_loop = asyncio._get_running_loop() is not None
        self.private = private
        self.call = Call(args, kwargs, recorder.wanted_input)
        self.input_shape = image_shape(self.call.found)
        self.call.axes = axes_of(self.input_shape)
        self.returned: list[weakref.ref[Tensor]] = []
        self.target_names = recorder.target_names
        self.attentions: list[list[Tensor] | None] = [None] * len(self.target_names)
        self.layers: dict[int, dict[str, tuple[Tensor, Tensor | GradientEdge]]] = {}
        self.layouts: dict[str, Layout] = {}
        self._layouts = recorder.layouts
        self._modules = recorder.modules.values()
        self._reads_layers = recorder.keeps_outputs
        if recorder.normalizations:
            self.normalizes_batch = any(one.training or not one.track_running_stats for one in recorder.normalizations)

    @property
    def names(self) -> list[str]:
        """The names of the rows."""
        return [row.name for row in self.rows]

    @property
    def activations(self) -> list[Tensor | None]:
        """What the target layers returned."""
        return [row.values for row in self.rows]

    def has_returned(self, scores: Any) -> bool:
        """Check whether these scores are the one tensor that the model returned."""
        return scores is not None and len(self.returned) == 1 and self.returned[0]() is scores

    def may_be_followed_by(self, other: Pass) -> bool:
        """Check whether a later pass may be meant in the context of this one: it was run for it, say, in a thread.

        That is a pass of a copy of the context, which no map was asked of there; and for a task, one of any thread.
        """
        if other.number <= self.number or other.explained:
            return False
        in_event_loop = asyncio._get_running_loop() is not None
        return other.predecessor == self.number or (in_event_loop and not other.in_event_loop)

    def check_output(self) -> None:
        """Check that the output is as the model returned it, where no graph shows what was changed.

        Raises:
            RuntimeError: if it was modified in place
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "the output of the model was modified in place after its forward pass without gradients, so the score "
                "is not the one that it was made of: change a copy (`scores.clone()`), or explain before you change it"
            )

    def fail(self) -> None:
        """Forget what the pass has recorded: it was cut short."""
        self.layers.clear()
        self.others = ()
        self.attentions = [None] * len(self.target_names)
        self.finish(None, None)

    def finish(self, output: Any, returned: Any) -> None:
        """Take note of what the model and its target layers returned, and of what the caller gets."""
        self.output = output
        if self.private:
            self._versions = [(tensor, tensor._version) for tensor in tensors_in(output)]
        returned = [returned] if isinstance(returned, Tensor) else tensors_in(returned)
        self.returned = [weakref.ref(tensor) for tensor in returned]
        self.rows = [
            Row(layer, layer + level, values, edge)
            for index, layer in enumerate(self.target_names)
            for level, (values, edge) in self.layers.get(index, _NOT_REACHED).items()
        ]

    def layout(self, tensor: Tensor, name: str) -> Layout:
        """Return the layout of a layer's output, found for the first tensor that is asked about."""
        found = self.layouts.get(name)
        if found is None:
            found = self._layouts.find(tensor.shape, name, self.target_names, self.call, self.input_shape)
            self.layouts[name] = found
        return found

    def is_of_model(self, tensor: Tensor) -> bool:
        """Check whether a tensor is a parameter or a buffer of the model, or a view of one."""
        whole = tensor if tensor._base is None else tensor._base
        return any(
            whole is one
            for module in self._modules
            for own in (module._parameters, module._buffers)
            for one in own.values()
        )

    def settle_axes(self) -> None:
        """Note in the call along which of its axes the positions of a signal or a spectrogram are."""
        if not self._reads_layers or len(self.input_shape or ()) > 3:
            return
        for row in self.rows:
            if row.values is not None:
                layout = self.layout(row.values, row.name)
                axes = layout.axes or self._layouts.axes(layout, row.name, self.target_names, self.call)
                self.call.axes = unusual_axes(axes)


class Recorder:
    """Records the passes of a model: its hooks are on the target layers, a wrapper is around the model's call.

    A pass is a call of the whole model, the outermost where a model calls itself. It belongs to the thread and the
    context (an asyncio task, say) that ran it. Other threads are not disturbed.

    Args:
        model: the model
        target_names: the names of the target layers
        differentiates: whether a pass keeps its graph from the target layers on
        reads_attention: whether fused kernels of attention are computed explicitly as well
        keeps_outputs: whether the outputs of the target layers are recorded
        wanted_input: name or position of the image-like input
        enabled: whether passes are recorded from the start
        choose_layers: called with the arguments of a pass before it starts; returns the target layers
        layouts: finds the layouts of the target layers
        around: called in the place of the model, with the pass that starts, the model and its arguments
        ended: called with a pass when the model has returned

    Attributes:
        replicas: replicas of the model that ran in earlier calls, and may run again
    """

    def __init__(
        self,
        model: nn.Module,
        target_names: Sequence[str],
        *,
        differentiates: bool = False,
        reads_attention: bool = False,
        keeps_outputs: bool = True,
        wanted_input: str | int | None = None,
        enabled: bool = True,
        choose_layers: ChooseLayers | None = None,
        around: Callable[..., Any] | None = None,
        ended: Callable[[Pass], None] | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self.model = model
        self.layouts = Layouts(model) if layouts is None else layouts
        self.modules = dict(model.named_modules())
        self.normalizations = [m for m in self.modules.values() if differentiates and isinstance(m, _BatchNorm)]
        self.target_names = list(target_names)
        self.differentiates = differentiates
        self.reads_attention = reads_attention
        self.keeps_outputs = keeps_outputs
        self.wanted_input = wanted_input
        self.enabled = enabled
        self.replicas: list[KeptReplica] = []
        self.handles: list[RemovableHandle] = []
        self.choose_layers = choose_layers
        self.around = around
        self.ended = ended
        self._lock = threading.RLock()
        self._passes: dict[int, Pass] = {}
        self._last_ended: Pass | None = None
        self._reference = weakref.ref(self)
        self._leave: list[Callable[[], None]] = []
        weakref.finalize(self, _remove_all, self.handles, self._leave).atexit = False
        try:
            self._hook_layers()  # first: another thread may run the model as soon as its calls are recorded
            self._leave.append(attached(_ModelCall, unwrapped(model), weakref.ref(self)))
        except BaseException:
            self.remove()
            raise

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._leave)

    @property
    def is_compiled(self) -> bool:
        """Whether the model was compiled in place."""
        found = vars(unwrapped(self.model)).get("_compiled_call_impl")
        while isinstance(found, CallWrapper):
            found = found.inner
        return found is not None

    def _hook_layers(self) -> None:
        self.layers = [self.modules[name] for name in self.target_names]
        for module in fused_modules(self.model, self.target_names, self.differentiates or self.reads_attention):
            self._leave.append(attached(FusedCall, module, weakref.ref(self)))  # before a hook would switch it off
        if self.keeps_outputs:
            for index, layer in enumerate(self.layers):
                self.handles.append(layer.register_forward_hook(LayerHook(self, index)))

    def move(self, target_names: Sequence[str]) -> None:
        """Watch other layers from now on."""
        with self._lock:
            _remove_all(self.handles, [])
            self.target_names = list(target_names)
            self._hook_layers()

    def remove(self) -> None:
        """Take all hooks off the model. May be called more than once."""
        self.replicas.clear()
        _remove_all(self.handles, self._leave)

    # Passes.

    def prepare(self, choose_layers: ChooseLayers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Watch the default layers, which the first pass decides: of this recorder, or of one on a replica."""
        with self._lock:
            names = choose_layers(args, kwargs)
            if names != self.target_names:
                self.move(names)

    def end(self, ended: Pass) -> None:
        """Make a pass the one that its context means, now that the model has returned or raised."""
        keys = _own_keys.get()
        before = keys.get(id(self))
        with self._lock:
            if before is not None and before.recorder is self._reference:
                ended.predecessor = before.number
                if before.number in self._passes:
                    self._passes[before.number].superseded = True
            self._passes[ended.number] = ended
            self._last_ended = None  # there is a later one
        if before is None:  # other recorders may be gone
            keys = {identity: key for identity, key in keys.items() if key.recorder() is not None}
        _own_keys.set(keys | {id(self): _Key(self._reference, ended.number)})

    def find(self, scores: Any = None) -> Pass:
        """Return the pass that is meant: the one with these scores, else that of this thread or task.

        Raises:
            AssertionError: if there is none
            RuntimeError: if it cannot be told which one is meant
        """
        key = _own_keys.get().get(id(self))
        own = self._passes.get(key.number) if key is not None and key.recorder is self._reference else None
        is_only_one = len(self._passes) == 1 and (scores is None or self._last_ended is None)
        if own is not None and (is_only_one or own.has_returned(scores)):
            return own
        with self._lock:
            passes, ended = dict(self._passes), self._last_ended
        candidates = [one for one in (own, *passes.values(), ended) if one is not None]
        if scores is not None:
            given = list(tensors_in(scores))
            for one in candidates:
                if given and all(any(tensor is known() for known in one.returned) for tensor in given):
                    return one
        if own is not None:
            if any(own.may_be_followed_by(one) for one in candidates):
                raise RuntimeError(
                    "another thread or task has run the model since this one has: pass `scores`, the output of the "
                    "forward pass that you mean"
                )
            return own
        if ended is not None and ended.thread == threading.get_ident():
            return ended
        if candidates:
            raise RuntimeError(
                "no forward pass was run in this thread or task, but another one has run the model: pass `scores`, the "
                "output of the forward pass that you mean"
            )
        raise AssertionError(self.nothing_recorded(None))

    def nothing_recorded(self, found: Pass | None) -> str:
        """Return the message for a pass that did not reach the target layers, or for no pass at all."""
        hint = (
            "compiled code, replicas of a model and transforms of `torch.func` record nothing: call the original "
            "module, `extractor.model`"
        )
        if found is not None:
            return f"the recorded forward pass did not run {self.target_names}, or was cut short ({hint})"
        return (
            f"no forward pass has reached {self.target_names or 'the model'}: call the model (not a part of it) on an "
            f"input, hooks enabled, before you ask for its maps ({hint})"
        )

    def forget(self, *, every: bool = False) -> None:
        """Forget the pass of this thread or task, or every pass."""
        key = _own_keys.get().get(id(self))
        with self._lock:
            self._last_ended = None
            if every:
                self._passes.clear()
            elif key is not None and key.recorder is self._reference:
                self._passes.pop(key.number, None)

    def context_ended(self, number: int) -> None:
        """Take note that nobody means a pass any more but by its output, and forget it when that is gone."""
        with self._lock:
            ended = self._passes.get(number)
            if ended is None:
                return
            if ended.superseded:  # by the next pass of the same context
                del self._passes[number]
                return
            if not ended.private:
                ended.output = None  # who asks for its maps hands it over, with its graph
            alive = [tensor for tensor in (known() for known in ended.returned) if tensor is not None]
            ended.returned = [weakref.ref(one, partial(_output_gone, self._reference, number)) for one in alive]
            if not alive:
                self.output_gone(number)

    def output_gone(self, number: int) -> None:
        """Forget a pass whose context has ended, now that its output is gone; of such passes, the last one is kept."""
        with self._lock:
            ended = self._passes.get(number)
            if ended is not None and all(known() is None for known in ended.returned):
                del self._passes[number]
                if self._last_ended is None or self._last_ended.number < number:
                    self._last_ended = ended


def _output_gone(recorder: weakref.ref[Recorder], number: int, _reference: Any) -> None:
    found = recorder()
    if found is not None:
        found.output_gone(number)


def _remove_all(handles: list[RemovableHandle], leave: list[Callable[[], None]]) -> None:
    for handle in [*handles]:
        handle.remove()
    handles.clear()
    for leave_one in [*reversed(leave)]:
        leave_one()
    leave.clear()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers for several devices: its call is a pass."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def _is_transformed() -> bool:
    """Check whether calls are traced, or go through a transform of `torch.func` or forward-mode differentiation."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


class _ModelCall(SharedWrapper):
    """Records the calls of a model for the recorders on it.

    Where the caller has turned gradients off and a recorder differentiates, they are turned on behind the earliest
    target layer, the output is kept with its graph, and the caller gets it without.
    """

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        recorders: list[Recorder] = []
        differentiates = False
        for reference in self.members:
            recorder = reference()
            if recorder is not None and recorder.enabled and id(recorder) not in thread.passes:
                recorders.append(recorder)
                differentiates |= recorder.differentiates
        if not recorders or _is_transformed():
            return self.run(module, args, kwargs)
        for recorder in recorders:
            if recorder.choose_layers is not None:
                recorder.prepare(recorder.choose_layers, args, kwargs)
        in_inference_mode = torch.is_inference_mode_enabled()
        is_outermost = not thread.passes
        try:
            if thread.private or not differentiates or (torch.is_grad_enabled() and not in_inference_mode):
                return self._recorded(module, recorders, args, kwargs)
            with normal_mode():
                if in_inference_mode:
                    # A graph may use none of its tensors.
                    args, kwargs = without_inference((args, kwargs), shared=True)
                return self._recorded_privately(module, recorders, args, kwargs)
        finally:
            # An interrupt may have come while a pass ended.
            if is_outermost and (thread.passes or thread.private or thread.written or thread.watches):
                thread.reset()

    def _recorded_privately(self, module: nn.Module, recorders: list[Recorder], args: Any, kwargs: Any) -> Any:
        containers = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, dict))]
        given = set(map(id, tensors_in(containers)))
        hooked = any(may_be_hooked(layer) for recorder in recorders for layer in recorder.layers)
        try:
            torch.set_grad_enabled(False)
            thread.private = True
            # A graph that saved tensors itself could not be followed once these are detached, as below.
            with followed() if hooked else nullcontext():
                return self._recorded(module, recorders, args, kwargs, detached=True)
        except RuntimeError as error:
            if torch.is_grad_enabled() and any(word in str(error) for word in ("grad", "graph", "backward")):
                error.add_note(
                    "An extractor on the model has turned gradients on behind its target layer. If the model cannot "
                    "run with gradients there, take a method that needs none, or disable the extractor's hooks."
                )
            raise
        finally:
            started = torch.is_grad_enabled()
            thread.private = False
            torch.set_grad_enabled(False)
            if started:
                drop_graphs(module)
                for container in containers:
                    if any(tensor.grad_fn is not None and id(tensor) not in given for tensor in tensors_in(container)):
                        without_graph(container, given)  # of what the model has added to it
            while thread.written:
                tensor, _ = thread.written.pop()
                if tensor.is_leaf:
                    tensor.requires_grad_(False)
                elif hooked and not tensor._is_view():
                    tensor.detach_()

    def _recorded(
        self, module: nn.Module, recorders: list[Recorder], args: Any, kwargs: Any, *, detached: bool = False
    ) -> Any:
        passes: list[tuple[Recorder, Pass]] = []
        run: Callable[..., Any] = module._call_impl if self.inner is None else self.inner
        try:
            for recorder in recorders:  # one after the other: those that have begun have to end
                started = thread.passes[id(recorder)] = Pass(recorder, args, kwargs, thread.private)
                passes.append((recorder, started))
                if recorder.around is not None:
                    run = partial(recorder.around, started, run)
            output = run(*args, **kwargs)
            if detached and thread.written:
                output = replace_tensors(output, [(tensor, tensor.view_as(tensor)) for tensor, _ in thread.written])
        except BaseException:
            for _, started in passes:
                started.fail()
            raise
        else:
            returned = map_tensors(Tensor.detach, output) if detached else output
            for recorder, started in passes:
                if recorder.ended is not None:
                    recorder.ended(started)
                started.finish(output if recorder.differentiates else map_tensors(Tensor.detach, output), returned)
            return returned
        finally:
            for recorder in recorders:
                thread.passes.pop(id(recorder), None)
            for recorder, started in passes:
                recorder.end(started)
