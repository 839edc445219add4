"""What is certain of how the output of a layer is laid out, and what an experiment must prove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ._architecture import Kind, Shown, hint_of, is_apart, is_composed, kind_of, shown_by
from ._cached import cached_property
from ._passes import Call, image_shape
from ._planted import Changes, Trial, changes_of, try_reading
from ._tensors import tensors_in
from .layout import FEW, Layout, Reading, input_axes, readings

_NEEDED = 0.4  # the score at which a grid follows the input
_NEEDED_OF_SEVERAL = 0.6  # the same where several readings are possible
_NEEDED_UNGUIDED = 0.8  # the same where many readings are tried that nothing else speaks for


@dataclass(frozen=True)
class Verdict:
    """What is known of how the output of a layer is laid out.

    Attributes:
        reading: the reading that is meant; None if none is, or several are
        holds: whether it is certain or proven (True), tried and refuted (False), or could not be tried (None)
        others: the readings that are possible besides
    """

    reading: Reading | None
    holds: bool | None
    others: tuple[Reading, ...] = ()


class Certainty:
    """Finds out how the outputs of layers are laid out in one call of a model.

    Args:
        model: the model
        call: how it was called

    Attributes:
        watched: the layers that the experiment was run for
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model = model
        self.call = call
        self.modules = dict(model.named_modules())
        self.input_shape = image_shape(call.signal)
        self.watched: set[str] = set()
        self._changes: dict[str, dict[tuple[int, int], Changes]] = {}

    @cached_property
    def shown(self) -> Shown:
        """What the model shows of its tokens."""
        return shown_by(self.model)

    @cached_property
    def _is_composed(self) -> bool:
        return is_composed(self.modules)

    def readings(self, shape: Sequence[int], layer: str, *, wide: bool = False) -> tuple[Reading, ...]:
        """Return the readings of a layer's output that its type and the model leave possible."""
        kind = kind_of(self.modules, layer)
        if self.input_shape is not None:
            return readings(tuple(shape), self.input_shape, kind, self.shown, wide=wide)
        return self._readings_of_integers(tuple(shape), kind)

    def _readings_of_integers(self, shape: tuple[int, ...], kind: Kind) -> tuple[Reading, ...]:
        """Return the readings for an input of integers (N, L), each of which has a position."""
        if kind.channels == 1 and kind.spatial == len(shape) - 2:
            return (Reading(Layout(shape[2:], 0, 1, tuple(range(2, len(shape)))), ()),)
        sizes = {tuple(t.shape) for t, _ in self.call.versions if t.ndim == 2 and not t.is_floating_point()}
        found = [
            one for size in sizes for one in readings(shape, size, kind, self.shown) if one.layout.grid == size[1:]
        ]
        return tuple(dict.fromkeys(found))

    def certain(self, shape: Sequence[int], layer: str) -> Verdict | None:
        """Return the verdict that needs no experiment; None where there is a doubt, or no reading."""
        found = self.readings(shape, layer)
        if not found or self._has_twin():  # which of the inputs the layer sees is not known
            return None
        only = _without_doubtful_axes(found) if len({one.layout for one in found}) == 1 else None
        if self.input_shape is None:
            return Verdict(only, None if only is None else True, found)
        if len(shape) == len(self.input_shape) and kind_of(self.modules, layer).channels == 1:
            return None if only is None or (is_apart(layer) and not only.fits) else Verdict(only, True)
        if len(self.input_shape) < 4 or self._is_composed:
            return None
        if len(shape) > 3:
            fitting = {one.layout: one for one in found if one.fits}
            if len(fitting) != 1:
                return None
            ((layout, reading),) = fitting.items()
            hint = hint_of(self.modules[layer])
            rivals = any(one.is_plausible for one in found if one.layout != layout)
            sure = not rivals if hint is None else hint == (1 if layout.channels == 1 else -1)
            return Verdict(reading, True) if sure else None
        alone = sum(t.numel() > 1 for t, _ in self.call.versions) <= len([*tensors_in(self.call.signal)])
        if only is None or not only.is_shown or not alone or is_apart(layer) or only.layout.channels == 1:
            return None
        by_chance = not only.layout.prefix and math.prod(only.layout.grid) < FEW
        return None if by_chance else Verdict(only, True)

    def _has_twin(self) -> bool:
        """Check whether the call has another input of the same shape, as of a siamese model."""
        signal = self.call.signal
        if not isinstance(signal, Tensor):
            return False
        return any(t is not signal and t.shape == signal.shape for t, _ in self.call.versions if t.is_floating_point())

    def axes(self, layout: Layout, layer: str, level: str = "") -> tuple[int, ...]:
        """Return the dimensions of the input that the grid of a layout follows, as far as the experiment shows."""
        measured = self._changes.get(layer + level, {})
        possible = [axes for axes in input_axes(self.input_shape or ()) if len(axes) == len(layout.grid)]
        scores = [try_reading(Reading(layout, axes), measured, _NEEDED).score for axes in possible]
        return possible[scores.index(max(scores))] if scores and max(scores) > 0 else ()

    def try_out(self, layers: Sequence[str]) -> None:
        """Run the experiment for the outputs of layers, once for each; :meth:`tried` says what it shows."""
        new = [layer for layer in layers if layer not in self.watched]
        self.watched.update(new)
        if new and self.input_shape is not None:
            with suppress(Exception):  # whatever a model raises at noise: then nothing is known
                self._changes |= changes_of(self.model, self.call, self.input_shape, new)

    def refutes(self, verdict: Verdict, layer: str) -> bool:
        """Check whether the experiment speaks against a verdict that was certain."""
        measured = self._changes.get(layer, {})
        return verdict.reading is not None and try_reading(verdict.reading, measured, _NEEDED).follows is False

    def tried(self, shape: Sequence[int], layer: str, level: str = "") -> Verdict:
        """Return what the experiment shows of a layer."""
        measured = self._changes.get(layer + level, {})
        strict = self.readings(shape, layer)
        only = len({one.layout for one in strict}) == 1
        needed = _NEEDED if only and not is_apart(layer) else _NEEDED_OF_SEVERAL
        trials = {one: try_reading(one, measured, needed, only=only) for one in strict}
        following = [(trial, one) for one, trial in trials.items() if trial.follows]
        found = _only([(trial, one) for trial, one in following if only or trial.sides == len(one.axes)])
        if found is None:  # of readings that differ in tokens which look nowhere, that without them
            least = [(t, one) for t, one in following if not any(_extends(one.layout, o.layout) for _, o in following)]
            found = _only([(trial, one) for trial, one in least if trial.sides == len(one.axes)])
        if found is not None or following:
            return Verdict(found, found is not None, strict)
        if measured:
            layouts = {one.layout for one in strict}
            unguided = [one for one in self.readings(shape, layer, wide=True) if one.layout not in layouts]
            tried = [(try_reading(one, measured, _NEEDED_UNGUIDED, only=False), one) for one in unguided]
            whole = [(trial, one) for trial, one in tried if trial.follows and trial.sides == len(one.axes)]
            found = _only(whole, margin=0.1)
            if found is not None:
                return Verdict(found, True, strict)
        if only:
            is_map = len(strict[0].layout.positions) == len(strict[0].layout.grid) and not is_apart(layer)
            unsure = any(trial.follows is None for trial in trials.values()) and (is_map or strict[0].is_shown)
            return Verdict(strict[0], None if unsure else False, strict)
        return Verdict(None, False, strict)


def _without_doubtful_axes(found: Sequence[Reading]) -> Reading:
    """Return the first of several readings of one layout; without axes where several may be those it follows."""
    fitting = [one for one in found if one.fits] or found
    return fitting[0] if len({one.axes for one in fitting}) == 1 else fitting[0]._replace(axes=())


def _extends(layout: Layout, other: Layout) -> bool:
    """Check whether a layout counts tokens as positions that another one leaves out."""
    if len(other.positions) == 1:  # of a row it is not checked whether these tokens look nowhere
        return False
    return layout.prefix < other.prefix and replace(other, prefix=layout.prefix, grid=()) == replace(
        layout, grid=(), before=other.before
    )


def _only(following: list[tuple[Trial, Reading]], margin: float = 1.0) -> Reading | None:
    """Return the reading that follows the input along most sides, unless one of another layout does so as well.

    One whose score is lower by the margin is no rival.
    """
    most = max((trial.sides for trial, _ in following), default=0)
    ranked = sorted(((t, one) for t, one in following if t.sides == most), key=lambda pair: -pair[0].score)
    if not ranked:
        return None
    best, reading = ranked[0]
    rivals = [one for t, one in ranked if one.layout != reading.layout and t.score > best.score - margin]
    return None if rivals else reading
