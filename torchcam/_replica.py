"""Replicas: copies of a model's modules that share its parameters, to run a model without a trace on it."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_WRAPPED_CALL = nn.Module._wrapped_call_impl.__code__
_SHARED = frozenset({bool, int, float, str, bytes, NoneType, type, torch.dtype, torch.device, torch.Size, nn.Parameter})
_MAPPINGS = frozenset({dict, OrderedDict, defaultdict, Counter})
_EMPTY = frozenset({dict, OrderedDict, list, set, tuple})  # the types whose empty values are copied at once
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
AS_IT_IS = contextlib.nullcontext()


def normal_mode(graph: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context without inference mode, and with gradients on or off.

    An interrupt leaves no mode switched, wherever it comes: one object of torch's restores both modes when it goes, and
    no frame that a traceback keeps holds it.
    """
    if torch.is_grad_enabled() == graph and not torch.is_inference_mode_enabled():
        return AS_IT_IS
    return (torch._C._InferenceMode(False), torch._C._set_grad_enabled(graph))[0]  # type: ignore[func-returns-value]


class ExtractorHook:
    """A module hook of an extractor: replicas have none, and in copies of a model it does nothing and holds nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is made of the standard library alone: it can be loaded where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes any arguments and returns None


class CallWrapper:
    """Runs in place of ``module(...)``, around the module's forward and all of its hooks, while it is attached.

    Unlike hooks, a wrapper can end what it began on every exception, and torch leaves it out of copies of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.inner: Callable[..., Any] | None = None
        self.attach(module)

    def attach(self, module: nn.Module) -> None:
        """Run in place of the module's calls, unless it does so already."""
        outermost = found = vars(module).get("_compiled_call_impl")
        while isinstance(found, CallWrapper) and found is not self:
            found = found.inner
        if found is not self:
            self.inner = outermost
            vars(module)["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        own: Any = self._module()
        if torch.compiler.is_compiling():
            return own._call_impl(*args, **kwargs)
        frame = sys._getframe(1)  # shallow copies of the module, as `nn.DataParallel` makes them, take attributes along
        called = frame.f_locals["self"] if frame.f_code is _WRAPPED_CALL else own
        return self.call(own, args, kwargs) if called is own else called._call_impl(*args, **kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module with what the wrapper adds."""
        raise NotImplementedError

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module as if there was no wrapper."""
        return (module._call_impl if self.inner is None else self.inner)(*args, **kwargs)

    def detach(self) -> None:
        """Remove the wrapper from the module's calls."""
        module = self._module()
        if module is not None and vars(module).get("_compiled_call_impl") is self:
            del vars(module)["_compiled_call_impl"]
            if self.inner is not None:
                vars(module)["_compiled_call_impl"] = self.inner

    def __reduce__(self) -> tuple[Any, ...]:
        return NoneType, ()


def replicate(model: nn.Module) -> nn.Module:
    """Return a copy of the tree of modules of ``model`` in evaluation mode that shares its parameters.

    Buffers, other tensors and containers in attributes are copied; the user's hooks are kept, those of extractors left
    out. So nothing that runs a replica changes the model. Wrappers for several devices hand their calls on to the
    module they wrap, compiled modules are replaced with what was compiled. Names of modules stay the same.
    """
    return _copied(model)[0]


def _copied(model: nn.Module) -> tuple[nn.Module, list[tuple[Any, Any]]]:
    """Return a replica, and all that was copied for it: pairs of an original and its copy."""
    copier = _Copier()
    with normal_mode(graph=False):
        replica: nn.Module = copier(model)
    return replica, list(copier.copies.values())


class KeptReplica:
    """A replica that may run again while neither its attributes nor those of the model have changed.

    To find out takes less time than to copy the modules once more. Tensors are copied each time.

    Args:
        model: the model

    Attributes:
        replica: the replica
        last_call: how it was called last
        parameter: the first parameter of both, if there is one
    """

    def __init__(self, model: nn.Module) -> None:
        self.replica, copies = _copied(model)
        self.last_call = _LastCall(self.replica)
        self.parameter = next(model.parameters(), None)
        self._tensors = [pair for pair in copies if isinstance(pair[0], Tensor)]
        others = [pair for pair in copies if not isinstance(pair[0], Tensor)]
        fields = [[vars(one) if isinstance(one, nn.Module) else one for one in pair] for pair in others]
        # Sequences are not looked at, and of modules of TorchScript there is nothing to see.
        can_be_kept = all(isinstance(one, dict) for pair in fields for one in pair) and not any(
            isinstance(original, torch.jit.ScriptModule) for original, _ in others
        )
        self._of_model, self._own = [
            _Attributes([pair[side] for pair in fields]) if can_be_kept else None for side in (0, 1)
        ]

    def renew(self) -> bool:
        """Copy the tensors of the model once more; return whether all else of it is as it was."""
        if self._of_model is None or self._of_model.have_changed():
            return False
        if not self._tensors:
            return True
        try:
            with normal_mode(graph=False):
                for original, own in self._tensors:
                    own.copy_(original)
        except (RuntimeError, TypeError):  # of another size, or another kind of tensor, by now
            return False
        return True

    def is_as_made(self) -> bool:
        """Check whether runs have changed no attribute of the replica; one that keeps a tensor is not to be held."""
        return self._own is not None and not self._own.have_changed()


class _Attributes:
    """The attributes of modules, and the dictionaries in them, as they are now.

    Args:
        fields: the dictionaries
    """

    def __init__(self, fields: Iterable[dict[Any, Any]]) -> None:
        self._now = list(fields)
        self._before = [dict(now) for now in self._now]
        values = [value for before in self._before for value in before.values()]
        self._empty = [value for value in values if type(value) in _EMPTY and not value]

    def have_changed(self) -> bool:
        """Check whether they are others by now, or cannot be compared."""
        try:
            return self._now != self._before or any(self._empty)
        except Exception:  # noqa: BLE001 - whatever a comparison of values of the user's raises
            return True


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List the modules of a model, each once, outer ones first; in less time than ``model.modules()`` takes."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def freeze(replica: nn.Module, value_of: Callable[[Tensor], Tensor] = lambda value: value) -> None:
    """Replace parameters of a replica with others that need no gradient, those that modules share with one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in replica.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                before = parameter.detach()
                value = value_of(before)
                is_kept = value is before and not parameter.requires_grad  # of a class of its own, say quantised
                made[parameter] = parameter if is_kept else nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[parameter]


def has_hooks(model: nn.Module) -> bool:
    """Check whether a hook of the user's is on a module, or on all modules that there are."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) or any(
        not isinstance(hook, ExtractorHook)
        for module in modules_of(model)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def has_backward_hooks(model: nn.Module) -> bool:
    """Check whether a hook of the user's would run in a backward pass."""
    return any(module._backward_hooks or module._backward_pre_hooks for module in modules_of(model))


class replicated:  # noqa: N801 - named as the contexts of torch
    """A context with a replica of ``model`` to run.

    If the model draws random numbers, the state of the global generators is restored on exit.

    Args:
        model: the model
        kept: replicas of earlier blocks that nobody runs: one of them is taken if it can be, and comes back at the end
    """

    def __init__(self, model: nn.Module, kept: list[KeptReplica] | None = None) -> None:
        self._model = model
        self._kept = kept

    def __enter__(self) -> nn.Module:
        found = self._found = None if self._kept is None else _renewed(self._model, self._kept)
        replica = replicate(self._model) if found is None else found.replica
        self._last_call = _LastCall(replica) if found is None else found.last_call
        parameter = next(self._model.parameters(), None) if found is None else found.parameter
        self._states = [(generator, generator.get_state()) for generator in _global_generators(parameter)]
        return replica

    def __exit__(self, raised: object, *_: object) -> None:
        # Another thread may draw from the same generators: its numbers must not be drawn twice.
        if threading.active_count() == 1 or (
            any(not torch.equal(generator.get_state(), state) for generator, state in self._states)
            and (raised or self._last_call.draws_random_numbers())
        ):
            for generator, state in self._states:
                generator.set_state(state)
        self._last_call.arguments = None
        if self._kept is None or self._found is None:
            self._last_call.detach()
        elif raised is None and self._found.is_as_made():
            self._kept.append(self._found)


def _renewed(model: nn.Module, kept: list[KeptReplica]) -> KeptReplica:
    """Return one of the replicas that were kept if it is as the model is, else a new one."""
    try:
        found = kept.pop()  # which no other thread gets
    except IndexError:
        return KeptReplica(model)
    return found if found.renew() else KeptReplica(model)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the global random states of Python and NumPy; those of torch are restored by :func:`replicated`."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is meant
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _Copier:
    """Copies values of attributes, each once: modules, tensors and containers; others are shared.

    Other threads may run the model or put extractors on it meanwhile: containers are read in one step.
    """

    def __init__(self) -> None:
        self.copies: dict[int, tuple[Any, Any]] = {}  # with the original, which must outlive its key
        self._functions: dict[FunctionType, FunctionType] = {}

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SHARED:
            return value
        if kind in _EMPTY and not value:
            return kind()
        if kind is tuple and _SHARED.issuperset(map(type, value)):
            return value
        known = self.copies.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return value if isinstance(value, nn.Parameter) else self._keep(value, value.detach().clone())
        if kind in {list, deque}:
            copied = self._keep(value, kind() if kind is list else deque(maxlen=value.maxlen))
            copied.extend(map(self, [*value]))
            return copied
        if kind is dict and _SHARED.issuperset(map(type, value)) and _SHARED.issuperset(map(type, value.values())):
            return self._keep(value, value.copy())
        if kind in _MAPPINGS:
            copied = self._keep(value, defaultdict(value.default_factory) if kind is defaultdict else kind())
            for key, item in [*value.items()]:
                copied[key if type(key) is str else self(key)] = self(item)
            return copied
        if kind in {set, tuple}:
            return self._keep(value, kind(map(self, [*value])))
        if isinstance(value, np.ndarray):
            return self._keep(value, value.copy())
        if kind is FunctionType:
            return self._function(value) if value.__closure__ else value
        if kind is MethodType:
            own = value.__self__
            return MethodType(self(value.__func__), self(own)) if isinstance(own, nn.Module) else value
        if kind is functools.partial:
            keywords = {name: self(item) for name, item in value.keywords.items()}
            return functools.partial(self(value.func), *map(self, value.args), **keywords)
        return value

    def _keep(self, value: Any, copied: Any) -> Any:
        self.copies[id(value)] = value, copied
        return copied

    def _function(self, function: FunctionType) -> FunctionType:
        """Copy a function that holds modules, such as a `forward` of the user's; others are shared."""
        if function not in self._functions:
            self._functions[function] = function  # it may hold itself
            closure = tuple(map(self._cell, function.__closure__ or ()))
            if closure != function.__closure__:
                code, names = function.__code__, function.__globals__
                copied = FunctionType(code, names, function.__name__, function.__defaults__, closure)
                copied.__kwdefaults__ = function.__kwdefaults__
                vars(copied).update(vars(function))
                self._functions[function] = copied
        return self._functions[function]

    def _cell(self, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # nothing was assigned yet
            return cell
        if not isinstance(value, (nn.Module, FunctionType, MethodType, functools.partial)):
            return cell
        copied = self(value)
        return cell if copied is value else CellType(copied)

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            script: nn.Module = self._keep(module, copy.deepcopy(module).eval() if module.training else module)
            return script
        if isinstance(module, _WRAPPERS):
            return self._handing_on(module, "module")
        if "_orig_mod" in module._modules:  # what `torch.compile` returned
            return self._handing_on(module, "_orig_mod")
        replica: nn.Module = self._keep(module, object.__new__(type(module)))
        attributes = vars(replica)
        for name, value in vars(module).copy().items():
            kind = type(value)
            if kind in _SHARED or (kind is tuple and _SHARED.issuperset(map(type, value))):
                attributes[name] = value
            else:  # most of what a module holds is empty
                attributes[name] = kind() if kind in _EMPTY and not value else self(value)
        attributes.pop("_compiled_call_impl", None)
        attributes["training"] = False
        for hooks in (attributes["_forward_hooks"], attributes["_forward_pre_hooks"]):
            if hooks:
                for key in [key for key, hook in hooks.items() if isinstance(hook, ExtractorHook)]:
                    del hooks[key]
        return replica

    def _handing_on(self, module: nn.Module, child: str) -> nn.Module:
        replica = self._keep(module, _HandingOn(child))
        replica.add_module(child, self(module._modules[child]))
        replica.training = False
        handing_on: nn.Module = replica
        return handing_on


class _HandingOn(nn.Module):
    """Hands its calls on to its only child."""

    def __init__(self, child: str) -> None:
        super().__init__()
        self.child = child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the child."""
        return getattr(self, self.child)(*args, **kwargs)


class _LastCall(CallWrapper):
    """Remembers how a replica was called last, to find out whether it draws random numbers."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module."""
        self.arguments = args, kwargs
        return self.run(module, args, kwargs)

    def draws_random_numbers(self) -> bool:
        """Check whether the last call draws random numbers, by a repetition without hooks; the replica has served."""
        module = self._module()
        if module is None or self.arguments is None:
            return False
        for inner in modules_of(module):
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        watch = _DrawsWatched()  # type: ignore[no-untyped-call]  # torch's
        try:
            with watch, torch.no_grad():
                self.run(module, *self.arguments)
        except Exception:  # noqa: BLE001 - whatever a call raises that has raised before
            return True
        return bool(watch.seen)


class _DrawsWatched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes whether an operation draws from a generator."""

    seen: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _global_generators(parameter: nn.Parameter | None) -> list[torch.Generator]:
    """Return the default generators of the CPU and of the kind of device that a parameter is on."""
    generators = [torch.default_generator]
    device_type = "cpu" if parameter is None else parameter.device.type
    if device_type not in {"cpu", "meta"}:
        generators += list(getattr(torch.get_device_module(device_type), "default_generators", ()))
    return generators
