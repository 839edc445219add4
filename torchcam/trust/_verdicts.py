"""Conclusions: checks and remarks from numbers, a verdict with its reasons from checks. Nothing here runs a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torchcam._numbers import finite
from torchcam.methods._diagnose import Finding, of_samples

Verdict = Literal["believe", "with care", "do not believe"]
Outcome = Literal["passed", "doubtful", "failed", "left out"]

THRESHOLDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "evidence": (0.15, 0.05),
        "relative evidence": (0.5, 0.2),
        "removal": (0.55, 0.45),
        "region": (2.0, -1.0),
    }
)
"""For each check, the limit for "passed" and the limit for "failed"; values between them are "doubtful".

* ``evidence``: fall of the probability of the class when the input, or one window of it, is blurred or painted in its
  mean colour or its mean grey, the largest of these: at least
* ``relative evidence``: the same as a share of the probability: the better of the two outcomes counts. For targets,
  only this one counts
* ``removal``: correlation of the map with the falls of the log-odds when one window after the other is removed: at
  least
* ``region``: log-odds of the class less those of the next best class, with the highest tenth of the map alone: at least

``scripts/benchmark_trust.py`` has chosen the last two.
"""


@dataclass(frozen=True)
class Reliability:
    """How often a verdict was right, of maps whose truth is known.

    Attributes:
        right: the number of maps with this verdict that lay on the evidence
        wrong: the number that lay elsewhere
    """

    right: int
    wrong: int

    def __str__(self) -> str:
        count = self.right + self.wrong
        return f"of {count} maps with this verdict whose truth is known, {self.right / count:.1%} lay on the evidence"


RELIABILITY: Mapping[Verdict, Reliability] = MappingProxyType(
    {
        "believe": Reliability(646, 2),
        "with care": Reliability(45, 29),
        "do not believe": Reliability(6, 1229),
    }
)
"""How often each verdict was right, measured by ``scripts/benchmark_trust.py`` on small models of digits."""

SMALLEST_SHARE = 0.05
"""The smallest share of the evidence that removing some window must take away, for the removal to say anything."""

_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_RARELY = "Objects are rarely there; watermarks, frames and marks of the scanner are."


@dataclass(frozen=True)
class Check:
    """The result of one trial of a map.

    Attributes:
        name: the name of the check
        outcome: ``"passed"``, ``"doubtful"``, ``"failed"`` or ``"left out"``
        message: the result in words
        values: the numbers
    """

    name: str
    outcome: Outcome
    message: str
    values: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain values."""
        values: dict[str, Any] = finite({**vars(self), "values": dict(self.values)})
        return values


# Checks.


def check_diagnosis(findings: Iterable[Finding], sample: int, batch_size: int, *, signed: bool = False) -> Check:
    """Judge the findings about one sample of a batch.

    Args:
        findings: the findings about the batch
        sample: the number of the sample
        batch_size: the number of samples in the batch
        signed: whether the map has negative values, so that it is not blank if all values are negative
    """
    found = [finding for finding in findings if not finding.samples or sample in finding.samples]
    if signed:
        found = [finding for finding in found if finding.code != "all_negative"]
    errors = [finding for finding in found if finding.severity == "error" or finding.code == "inverted"]
    warnings = [finding for finding in found if finding.severity == "warning"]
    text = " ".join(
        f"{finding.code}: {finding.message.removeprefix(of_samples(finding.samples, batch_size))}"
        for finding in errors or warnings
    )
    if errors:
        return Check("diagnosis", "failed", f"The map is not in order. {text}")
    if warnings:
        return Check("diagnosis", "doubtful", f"The map has a weak point. {text}")
    return Check("diagnosis", "passed", "Nothing is wrong with how the map was made.")


EMPTY = Check("diagnosis", "failed", "The map is not in order. It is the same everywhere, or not finite.")


def check_evidence(value: float, without: float, *, is_part: bool = False, is_score: bool = False) -> Check:
    """Judge the probability of a class for an input, and for the same input without its content.

    Args:
        value: the probability, or the score of a target
        without: the same without the content
        is_part: whether not all of the content was removed, but the part that matters most
        is_score: whether it is the score of a target, whose scale is unknown
    """
    fall = value - without
    share = fall / abs(value) if value else math.copysign(math.inf, fall) if fall else 0.0
    name = "score" if is_score else "probability"
    change = f"from {value:.3g} to {without:.3g}"
    outcome = _outcome("relative evidence", share)
    if not is_score:
        outcome = min(outcome, _outcome("evidence", fall), key=_ORDER.index)
    falls = "hardly falls" if fall > 0 else "does not fall"
    what = "the part that matters most" if is_part else "it"
    says = {
        "passed": f"The prediction rests on what is in the input: without {what} the {name} falls {change}.",
        "doubtful": f"Little depends on what is in the input: without {what} the {name} falls {change}.",
        "failed": f"There is nothing to explain: without what is in the input the {name} {falls} ({change}).",
    }
    return Check("evidence", outcome, says[outcome], {name: value, "without": without, "fall": fall, "share": share})


def check_removal(correlation: float, largest: float, num_windows: int) -> Check:
    """Judge how well a map foretells the fall of the score when a window of the input is removed.

    Args:
        correlation: the correlation of the map's means in the windows with the falls
        largest: the largest fall, as a share of that without the content
        num_windows: the number of windows
    """
    values = {"correlation": correlation, "largest_fall": largest}
    outcome = _outcome("removal", correlation)
    numbers = f"correlation {correlation:.2f} over {num_windows} windows"
    if not largest >= SMALLEST_SHARE and outcome == "failed":
        return Check(
            "removal",
            "doubtful",
            f"No single window matters: removing one takes away {max(largest, 0):.1%} of the evidence at most, too "
            f"little to test the map ({numbers}).",
            values,
        )
    says = {
        "passed": f"The score falls where the map says so: it foretells what removing a window does ({numbers}).",
        "doubtful": f"The map foretells in part what removing a window does ({numbers}).",
        "failed": f"The score does not fall where the map says so: what removing a window does is another matter "
        f"({numbers}).",
    }
    return Check("removal", outcome, says[outcome], values)


def check_region(asked: float, rival: float, odds: float) -> Check:
    """Judge what a model says about the region that a map ranks highest, alone.

    Args:
        asked: the probability of the explained class
        rival: that of the class that is the next best for the whole input
        odds: the log-odds of the first less those of the second
    """
    numbers = f"{asked:.3g} against {rival:.3g}"
    says = {
        "passed": f"What the map ranks highest is enough to tell the class from the next best one ({numbers}).",
        "doubtful": f"What the map ranks highest, alone, hardly tells the class from the next best one ({numbers}).",
        "failed": f"What the map ranks highest, alone, speaks for the next best class ({numbers}).",
    }
    outcome = _outcome("region", odds)
    return Check("region", outcome, says[outcome], {"asked": asked, "rival": rival, "odds": odds})


NO_RIVAL = Check("region", "left out", "There is no other class to tell it from.")


def with_others(check: Check, others: Mapping[str, float | str]) -> Check:
    """Add to the check of the removal what the maps of other methods foretell, or why they have none."""
    own = check.values["correlation"]
    found = {name: value for name, value in others.items() if not isinstance(value, str) and math.isfinite(value)}
    missing = [
        f"{name} has none ({str(value).split('. ')[0].rstrip('.')})"
        for name, value in others.items()
        if name not in found
    ]
    best = max(found, key=found.__getitem__, default=None)
    text = ""
    if best is not None and found[best] >= THRESHOLDS["removal"][0] and found[best] > own + 0.005:
        text += f" That of {best} does better ({found[best]:.2f})."
    elif found:
        text += f" Other methods: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}."
    if missing:
        text += f" Left out: {'; '.join(missing)}."
    return replace(check, message=check.message + text, values={**check.values, **found})


_ORDER: tuple[Outcome, ...] = ("passed", "doubtful", "failed")


def _outcome(name: str, value: float) -> Outcome:
    """Compare a value with the limits of a check. NaN has failed."""
    passed, failed = THRESHOLDS[name]
    return "passed" if value >= passed else "doubtful" if value >= failed else "failed"


# Remarks.


def remark_on_place(corners: Sequence[float], border: float, border_area: float) -> str | None:
    """Remark on a map that looks at a corner or at the border.

    Args:
        corners: the share of the map in each corner of an image, in the order of reading; empty for other inputs
        border: the share of the map in the outer tenth
        border_area: the share of the area in the outer tenth
    """
    if corners and max(corners) > 0.4:
        share, corner = max((share, corner) for corner, share in enumerate(corners))
        return (
            f"It looks at a corner: {share:.0%} of the map lies in the {_CORNERS[corner]} sixteenth of the input. "
            f"{_RARELY}"
        )
    if border > max(0.6, 1.5 * border_area):
        return (
            f"It looks at the border: {border:.0%} of the map lies in the outer tenth of the input, which is "
            f"{border_area:.0%} of its area. {_RARELY}"
        )
    return None


def remark_on_object(energy: float, pointing_game: float, area: float) -> str | None:
    """Remark on a map that looks past the object.

    Args:
        energy: the share of the map on the object
        pointing_game: whether the peak of the map is on the object
        area: the share of the area that the object covers
    """
    if energy < 1 / 3 and not pointing_game:
        return (
            f"It looks past the object: {energy:.0%} of the map lies on it, which is {area:.0%} of the area, and the "
            "peak lies beside it. The class was recognised by something else, in the main."
        )
    return None


def remark_on_common_place(shared: float) -> str | None:
    """Remark on maps of several inputs that share a place.

    Args:
        shared: the share of the highest positions that two maps have in common, mean over all pairs; NaN if the maps
            are too few to compare
    """
    if shared > 0.6:
        return (
            f"They all look at the same place: two inputs share {shared:.0%} of the positions that their maps rank "
            "highest. Unless the inputs are aligned, such as portraits or scans, the model has learned a place and not "
            "a thing."
        )
    return None


# Verdicts.

_COUNTED: dict[Verdict, Outcome] = {"believe": "passed", "with care": "doubtful", "do not believe": "failed"}


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """Conclude from the checks of one map.

    A map is not believed if a check has failed, and taken with care if one is doubtful. A diagnosis that found only
    weak points does not count.
    """
    outcomes = {check.outcome for check in checks if check.name != "diagnosis" or check.outcome == "failed"}
    return "do not believe" if "failed" in outcomes else "with care" if "doubtful" in outcomes else "believe"


def reasons_of(checks: Iterable[Check]) -> tuple[str, ...]:
    """Return the messages of the checks behind the verdict: those against the map, or else those that it has passed."""
    checks = tuple(checks)
    counted = _COUNTED[verdict_of(checks)]
    return tuple(check.message for check in checks if check.outcome == counted)


def combined_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Conclude from the verdicts on several maps.

    They are believed if each one is, and not believed if at least half of them are not.
    """
    counts = Counter(verdicts)
    if counts["believe"] == len(verdicts):
        return "believe"
    return "do not believe" if 2 * counts["do not believe"] >= len(verdicts) else "with care"
