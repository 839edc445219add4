"""Clocks, interleaved measurements and their statistics."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Budget", "Clock", "CudaClock", "Quartiles", "Timing", "WallClock", "interleave", "quartiles"]

SHORT = 10.0  # forwards: a call that takes less is repeated before it is measured
Entrant = Callable[[], AbstractContextManager[Callable[[], Any]]]


class Clock(Protocol):
    """What measures a call."""

    def measure(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, and what it returns."""
        ...

    def now(self) -> float:
        """Return the seconds since some moment."""
        ...


class WallClock:
    """The clock on the wall, without the garbage collector.

    Args:
        read: tells the seconds since some moment; ``time.process_time`` leaves out those that other processes got
        calls: how many calls in a row a measurement is the median of
    """

    def __init__(self, read: Callable[[], float] = time.perf_counter, calls: int = 1) -> None:
        self._read = read
        self._calls = calls

    def measure(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, and what it returns."""
        gc.collect(0)  # whatever a call leaves behind is young, as nothing was collected during it
        gc.disable()
        try:
            seconds = []
            for _ in range(self._calls):
                start = self._read()
                result = call()
                seconds.append(self._read() - start)
            return statistics.median(seconds), result
        finally:
            gc.enable()

    def now(self) -> float:
        """Return the seconds since some moment."""
        return time.perf_counter()


class CudaClock(WallClock):
    """The time between two events on the current CUDA stream, work of the CPU in between included."""

    def measure(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, and what it returns."""
        import torch

        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        gc.collect(0)  # whatever a call leaves behind is young, as nothing was collected during it
        gc.disable()
        try:
            torch.cuda.synchronize()
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
        finally:
            gc.enable()
        return float(start.elapsed_time(end)) / 1000, result


@dataclass(frozen=True)
class Quartiles:
    """The middle of some numbers, and the range that half of them are in."""

    median: float
    lower: float
    upper: float
    count: int


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles, interpolated between the numbers.

    Raises:
        ValueError: if there are no numbers
    """
    if not values:
        raise ValueError("there are no numbers to give the quartiles of")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, lower, upper, len(values))


@dataclass
class Timing:
    """Measurements of one entrant.

    Attributes:
        seconds: how long each of its calls took
        forwards: how long a forward took at that time: the mean of the one before and the one after
    """

    seconds: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    def add(self, seconds: float, before: float, after: float) -> None:
        """Add a call, with the forwards around it."""
        self.seconds.append(seconds)
        self.forwards.append((before + after) / 2)

    @property
    def ratios(self) -> list[float]:
        """Each call's time in forwards."""
        return [seconds / forward for seconds, forward in zip(self.seconds, self.forwards, strict=True)]

    @property
    def beside(self) -> list[float]:
        """The seconds of each call beside its forward pass."""
        return [seconds - forward for seconds, forward in zip(self.seconds, self.forwards, strict=True)]


@dataclass
class Budget:
    """Seconds to be shared among tasks; what one leaves goes to those that follow.

    Attributes:
        seconds: all that there is, None for no end
        tasks: how many tasks are to come
        clock: tells the time
    """

    seconds: float | None
    tasks: int
    clock: Clock

    def __post_init__(self) -> None:
        self._start = self.clock.now()

    def share(self) -> float | None:
        """Return the seconds for the next task, None for as many as it wants; not positive where none are left."""
        tasks = max(self.tasks, 1)
        self.tasks -= 1
        return None if self.seconds is None else (self.seconds - (self.clock.now() - self._start)) / tasks


def interleave(
    forward: Callable[[], Any],
    entrants: Mapping[str, Entrant],
    clock: Clock,
    *,
    repeats: int,
    seconds: float | None = None,
    once_above: float = 20.0,
    look: Callable[[str, Any], None] | None = None,
) -> dict[str, Timing]:
    """Measure calls in turn, A B C A B C ..., each between two forwards, after one round to warm up.

    Before a forward is measured, another one runs, and before a call that takes no longer than a few forwards another
    such call: so neither pays for what ran before.

    Args:
        forward: what the time of the calls is divided by
        entrants: what to measure by name: a context manager that prepares a call and clears up after it; neither counts
        clock: measures the calls
        repeats: the largest number of rounds
        seconds: time for all rounds together, None for no end; one is always run. An entrant that takes more than its
            share of it gets fewer rounds than the others.
        once_above: an entrant whose first call takes more seconds, or more than its share of them, is not called again:
            that call counts
        look: sees the result of each entrant's first call, within its context

    Returns:
        the measurements of each entrant
    """
    timings = {name: Timing() for name in entrants}
    lasted: dict[str, float] = {}
    if seconds is not None:
        once_above = min(once_above, max(seconds, 0.0) / max(len(entrants), 1))

    def measured(name: str, before: float, *, first: bool) -> tuple[float, float]:
        with entrants[name]() as call:
            if not first and lasted[name] < SHORT * before:
                call()
            taken, result = clock.measure(call)
            if first and look is not None:
                look(name, result)
            del result, call
        lasted.setdefault(name, taken)
        forward()
        after, _ = clock.measure(forward)
        if not first or taken > once_above:
            timings[name].add(taken, before, after)
        return taken, after

    start = clock.now()
    spent = dict.fromkeys(entrants, 0.0)
    forward()
    before, _ = clock.measure(forward)
    going = []
    for name in entrants:
        taken, before = measured(name, before, first=True)
        if taken <= once_above:
            going.append(name)
    share = None if seconds is None else max(seconds - (clock.now() - start), 0.0) / max(len(going), 1)
    for _ in range(repeats):
        for name in list(going):
            if share is not None and timings[name].seconds and spent[name] >= share:
                going.remove(name)
                continue
            began = clock.now()
            _, before = measured(name, before, first=False)
            spent[name] += clock.now() - began
    return timings
