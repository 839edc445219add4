"""Which layer to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ._cached import cached_property
from ._certainty import Certainty, Verdict
from ._names import closest
from ._passes import Call, to_model
from ._planted import Seen, seen_at_places
from ._replica import freeze, normal_mode, replicated
from ._templates import render
from ._tensors import map_tensors, tensors_in
from .layout import Layout, input_axes, primary_tensors, replace_tensors
from .targets import read_logits

__all__ = [
    "Candidate",
    "Candidates",
    "TargetLayer",
    "automatic_layer",
    "candidates",
    "layer_name",
    "layer_names",
]

TargetLayer = nn.Module | str

_SINGLE_SCORES = 4  # of a dense output, that are looked at one by one
_GLANCES = 12  # at default layers, of which none looks where it lies: then there is no default


def layer_names(model: nn.Module, target_layer: TargetLayer | Sequence[TargetLayer]) -> list[str]:
    """Turn any way to name target layers into a list of module names.

    Raises:
        TypeError: if a layer is neither a module nor a string
        ValueError: if a layer is not a module of ``model``, or none is given
    """
    layers = list(target_layer) if isinstance(target_layer, (list, tuple)) else [target_layer]
    if not layers:
        raise ValueError("`target_layer` is an empty list: name at least one layer")
    return [layer_name(model, layer) for layer in layers]


def layer_name(model: nn.Module, layer: Any, argument: str = "target_layer") -> str:
    """Return the name of one module of ``model``, itself named or handed over.

    Raises:
        TypeError: if ``layer`` is neither a module nor a string
        ValueError: if it is not a module of ``model``
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name
        raise ValueError(f"`{argument}` {type(layer).__name__}(...) is not a module of this {type(model).__name__}")
    if not isinstance(layer, str):
        raise TypeError(f"`{argument}` must be a module or its name, got {layer!r} of type {type(layer).__name__}")
    if layer not in modules:
        children = [name for name, _ in model.named_children()]
        raise ValueError(
            f"`{argument}` '{layer}' is not a module of {type(model).__name__}; {closest(layer, modules, children)}"
        )
    return layer


@dataclass(frozen=True)
class Candidate:
    """A module that a map can be made from.

    Attributes:
        name: its name in the model
        type: its class
        layout: how its output is laid out
        channels: the number of channels
        influence: the share of the grid's positions that the score depends on
        calls: how often it was called in one forward pass (its last output counts)
        fits: whether the grid divides the input at a consistent stride
        is_stage: whether it is more than a projection within a layer, or the layer that makes the scores
        is_proven: whether its positions are those of the input, by what the module and the model show or by an
            experiment; None where nothing tells
        reach: the share of the single scores of a dense output (boxes, pixels) that depend on it at all, of some that
            are spread over the output; 1 where there is one score of each class
    """

    name: str
    type: str
    layout: Layout
    channels: int
    influence: float
    calls: int
    fits: bool
    is_stage: bool
    is_proven: bool | None = True
    reach: float = 1.0

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the grid in its output."""
        return self.layout.grid

    @property
    def depends(self) -> bool:
        """Whether the score depends on enough of the grid for a map: attention rows and class tokens do not suffice."""
        return self.influence >= 0.25


class Candidates(tuple[Candidate, ...]):
    """The modules that a map can be made from, in the order in which they finish. Prints as a table."""

    _HEAD = ("layer", "type", "grid", "channels", "influence", "calls")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Candidates(found) if isinstance(index, slice) else found

    @property
    def usable(self) -> Candidates:
        """Those whose maps tell positions apart: the score depends on several, and none is known to be out of place."""
        return Candidates(c for c in self if c.depends and math.prod(c.grid) > 1 and c.is_proven is not False)

    @cached_property
    def _ranking(self) -> list[str]:
        """The names of those that are usable, the last of the best kind there is first."""
        ranked = sorted(self.usable, key=lambda c: (c.reach, c.fits, c.is_stage))
        return [one.name for one in reversed(ranked)]

    @property
    def choice(self) -> str | None:
        """The layer that extractors take by default: the last of the best kind there is.

        Of a dense output, say of boxes from several levels, that is a layer which all of it depends on, if one exists.
        """
        return next(iter(self._ranking), None)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for c in self:
            mark = "  <- default" if c.name == self.choice else ""
            grid = " x ".join(map(str, c.grid))
            yield c.name, c.type, grid, str(c.channels), f"{c.influence:.0%}", f"{c.calls}{mark}"

    def __repr__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self._HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def _repr_html_(self) -> str:
        return render("_layers.html", head=self._HEAD, rows=self._rows())


def candidates(model: nn.Module, *inputs: Any, **kwargs: Any) -> Candidates:
    """List the modules that a map can be made from, by looking at one pass over an input.

    The score that the modules are checked against is a random sum of the model's scores, and parameters that are all
    zero (a head that is yet to be trained, say) are replaced with random ones for this pass, so that nothing is hidden
    by chance. The model is left as it was.

    Args:
        model: the model
        inputs: what it is called with; at least one argument must be an image-like tensor (N, C, *spatial)
        kwargs: its keyword arguments

    Returns:
        the candidates, in the order in which the modules finish; their ``choice`` is the default layer

    Example:
        >>> from torchvision.models import resnet18
        >>> candidates(resnet18(), torch.rand(1, 3, 64, 64)).choice
        'layer4'
    """
    return candidates_of(model, Call(inputs, kwargs))


def candidates_of(model: nn.Module, call: Call, select: Callable[[Any], Tensor] | None = None) -> Candidates:
    """List the modules that a map can be made from in a call of a model, as :func:`candidates` does.

    Args:
        model: the model
        call: how it is called
        select: function from its output to the scores that count, (N,), or (N, K), each of which has to depend on the
            layer, in place of a random sum of all
    """
    generator = torch.Generator().manual_seed(0)

    def filled(value: Tensor) -> Tensor:
        if value.is_floating_point() and value.numel() and _is_zero(value):
            return torch.randn(value.shape, generator=generator).mul_(0.02).to(value)
        return value

    with replicated(model) as replica, normal_mode():
        modules = {name: module for name, module in replica.named_modules() if name}
        outputs, calls = watch(modules)
        freeze(replica, filled)
        result, signal = _call_probed(replica, call)
        watched = [(name, t) for name, tensors in outputs.items() for t in tensors if t.requires_grad]
        scores = _scores(result)
        explained, singles = scores, _single_scores(result, scores)
        if select is not None:
            explained = select(result)
            singles = (one.sum() for one in (explained.unbind(1) if explained.ndim > 1 else ()))
        total = None
        if explained is not None:
            total = (torch.randn(explained.shape, generator=generator).to(explained) * explained).sum()
        gradients = _gradients(total, watched)
        reach = dependence(singles, watched)
    shapes = {name: tuple(tensors[0].shape) for name, tensors in outputs.items()}
    first = {name: g for name, parts in gradients.items() for g in parts if g.shape == shapes[name]}
    classes = scores.shape[1] if _are_dense(scores) else None
    certainty = Certainty(model, call)

    def candidate(name: str, verdict: Verdict) -> Candidate | None:
        possible = verdict.others if verdict.reading is None else (verdict.reading,)
        if not possible:
            return None
        reading = possible[0]
        num_channels = shapes[name][reading.layout.channels]
        return Candidate(
            name,
            type(modules[name]).__name__,
            reading.placed,
            num_channels,
            max(_share(one.layout, first.get(name)) for one in possible),
            calls[name],
            reading.fits,
            not isinstance(modules[name], nn.Linear) and num_channels != classes,
            verdict.holds,
            reach.get(name, 1.0),
        )

    certain = {name: certainty.certain(shape, name) for name, shape in shapes.items()}
    open_ = [name for name, one in certain.items() if one is None]
    verdicts = {n: one or Verdict(None, None, certainty.readings(shapes[n], n)) for n, one in certain.items()}
    entries = {name: candidate(name, one) for name, one in verdicts.items()}
    tried: set[str] = set()

    def listed() -> Candidates:
        found = Candidates(filter(None, entries.values()))
        surer = Candidates(one if one.is_proven else replace(one, is_proven=False) for one in found)
        # What has too few positions to prove anything is the last resort.
        return surer if tried and surer.choice is not None else found

    def try_out(names: Sequence[str]) -> None:
        certainty.try_out(names)
        tried.update(names)
        for name in names:
            if name in open_ or certainty.refutes(verdicts[name], name):  # what has too few positions stays what it is
                verdicts[name] = certainty.tried(shapes[name], name)
                entries[name] = candidate(name, verdicts[name])

    found = listed()
    if found.choice is None or found.choice in open_:  # it rests on a doubt
        try_out(open_)
        found = listed()
    for glance in range(_GLANCES):
        chosen = next((one for one in found if one.name == found.choice), None)
        if chosen is None or signal is None:
            break
        with normal_mode():
            seen, axes = _seen(chosen.layout, outputs[chosen.name][0], signal)
        if axes != chosen.layout.axes:
            found = Candidates(
                replace(one, layout=replace(one.layout, axes=axes)) if one is chosen else one for one in found
            )
        no_more = chosen.name in tried or max(chosen.grid) <= 2  # so few positions prove nothing in an experiment
        if seen is None or seen.is_clear or (no_more and not seen.is_against):
            break
        rest = [name for name in shapes if name not in tried]
        if chosen.name not in certainty.watched:  # with more of those that are next in each run of the model
            certainty.try_out([name for name in found._ranking if name not in tried][: 2**glance])
        if rest:
            try_out(rest if seen.is_against else [chosen.name])
        if seen.is_against:
            against = Verdict(None, False, certainty.readings(shapes[chosen.name], chosen.name))
            entries[chosen.name] = candidate(chosen.name, against)
        found = listed()
    return found


def _seen(layout: Layout, output: Tensor, signal: Tensor) -> tuple[Seen | None, tuple[int, ...]]:
    """Return what positions see of where they lie, and the dimensions of the input that they follow, if in doubt."""
    possible = [axes for axes in input_axes(tuple(signal.shape)) if len(axes) == len(layout.grid)]
    looks = [
        (seen_at_places(replace(layout, axes=axes), output, signal), axes)
        for axes in ([layout.axes] if layout.axes else possible)
    ]
    return max(looks, key=lambda look: look[0] or Seen(-1.0, -1.0), default=(None, layout.axes))


def watch(modules: Mapping[str, nn.Module]) -> tuple[dict[str, list[Tensor]], Counter[str]]:
    """Let modules of a replica hand on copies of what they return, for which gradients can be taken.

    Modules of TorchScript, which run no hooks, are left as they are.

    Returns:
        the primary tensors that each has returned last, in the order in which they finish, and how often each ran
    """
    outputs: dict[str, list[Tensor]] = {}
    calls: Counter[str] = Counter()

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        tensors = [*primary_tensors(output).values()]
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
            return None
        # As an extractor does, hand on copies: what counts is whether the score depends on what is handed on.
        # Behind a cut (`.detach()`) they start a graph of their own.
        copies = [(t if t.requires_grad else t.detach().requires_grad_()).clone() for t in tensors]
        outputs.pop(name, None)
        outputs[name] = copies
        calls[name] += 1
        return replace_tensors(output, [*zip(tensors, copies, strict=True)])

    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(partial(keep, name))
    return outputs, calls


def _call_probed(replica: nn.Module, call: Call) -> tuple[Any, Tensor | None]:
    """Call a replica on copies of the inputs that carry a graph: the output, and the copy of the image-like input."""
    found: list[Tensor] = []

    def prepared(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        if not copied.is_floating_point():
            return copied
        copied.requires_grad_()
        if tensor is call.signal:
            found.append(copied)
        return copied.clone()

    args, kwargs = map_tensors(prepared, (call.args, call.kwargs))
    return replica(*args, **kwargs), found[0] if found else None


def _is_zero(value: Tensor) -> bool:
    """Check whether all values are zero; subclasses of tensors that cannot tell, as quantised ones, are not."""
    try:
        return not value.any()
    except NotImplementedError:
        return False


def _scores(result: Any) -> Tensor | None:
    """Return the scores in a model's output, None where it holds none."""
    try:
        return read_logits(result)
    except TypeError:
        return None


def _are_dense(scores: Tensor | None) -> TypeGuard[Tensor]:
    """Check whether scores are class scores of every position, (N, C, *S), as in segmentation."""
    return scores is not None and scores.ndim > 2


def _single_scores(result: Any, scores: Tensor | None) -> Iterator[Tensor]:
    """Yield some of the numbers in a dense output, of scores (N, C, *S) or a detector's boxes, spread over it."""
    parts = [scores.sum(0)] if _are_dense(scores) else []
    if isinstance(result, list) and result and isinstance(result[0], Mapping):
        parts = [part for part in tensors_in(result[0]) if part.is_floating_point()]
    parts = [part for part in parts if part.ndim and part.numel() and part.requires_grad]
    for number in range(_SINGLE_SCORES if parts else 0):
        share = number / (_SINGLE_SCORES - 1)
        yield torch.stack([part[*(round(share * (side - 1)) for side in part.shape)].float() for part in parts]).sum()


def _gradients(score: Tensor | None, watched: list[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Return the gradients of a score for tensors that it is connected to, by the names of their layers."""
    if score is None or not score.requires_grad or not watched:
        return {}
    found = torch.autograd.grad(score, [tensor for _, tensor in watched], retain_graph=True, allow_unused=True)
    gradients: dict[str, list[Tensor]] = {}
    for (name, _), gradient in zip(watched, found, strict=True):
        if gradient is not None:
            gradients.setdefault(name, []).append(gradient)
    return gradients


def dependence(scores: Iterable[Tensor], watched: list[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the share of scores that depend on each layer, by tensors with the names of their layers.

    A number that depends on no layer, as that of a class, does not count; none are returned if all are such numbers.
    """
    found = [_gradients(score, watched) for score in scores]
    moved = [{name for name, parts in one.items() if any(bool(part.any()) for part in parts)} for one in found]
    moved = [names for names in moved if names]
    return {name: sum(name in names for names in moved) / len(moved) for name, _ in watched} if moved else {}


def _share(layout: Layout, gradient: Tensor | None) -> float:
    """Return the share of a grid's positions with a gradient, 0 unless half of the channels have one somewhere."""
    if gradient is None:
        return 0.0
    moved = layout.to_grid(gradient) != 0
    if moved.flatten(2).any(-1).float().mean() < 0.5:
        return 0.0
    return float(moved.any(1).float().mean())


def automatic_layer(model: nn.Module, input_shape: Sequence[int]) -> str | None:
    """Find the default layer of a model that takes one image, by one pass over noise.

    Args:
        model: the model, left as it was
        input_shape: shape of its input without the batch dimension

    Returns:
        the name of the layer, or None if there is none
    """
    return candidates_of(model, probe(model, input_shape)).choice


def probe(model: nn.Module, input_shape: Sequence[int]) -> Call:
    """Return a call of a model with one image of noise, of a shape without the batch dimension."""
    noise = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0))
    return Call((to_model(model, noise),), {})
