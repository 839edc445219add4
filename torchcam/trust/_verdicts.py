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

__all__ = [
    "THRESHOLDS",
    "Check",
    "Outcome",
    "Verdict",
    "check_agreement",
    "check_class",
    "check_diagnosis",
    "check_evidence",
    "check_faithfulness",
    "check_weights",
    "combined_verdict",
    "reasons_of",
    "remark_on_common_place",
    "remark_on_object",
    "remark_on_place",
    "verdict_of",
]

Verdict = Literal["believe", "with care", "do not believe"]
Outcome = Literal["passed", "doubtful", "failed", "left out"]

THRESHOLDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "evidence": (0.15, 0.05),
        "weights": (0.5, 0.7),
        "class": (0.8, 0.95),
        "deletion and insertion": (0.9, 0.7),
        "removal": (0.9, 0.7),
        "agreement": (0.5, 0.25),
    }
)
"""For each check, the limit for "passed" and the limit for "failed"; values between them are "doubtful".

* ``evidence``: fall of the probability of the class when the input is blurred, or painted in its mean colour or its
  mean grey, the largest of the three: at least
* ``weights``: rank correlation of the map with those of randomised models, mean over the stages: at most
* ``class``: cosine between the maps of the two best classes: at most
* ``deletion and insertion``, ``removal``: share of the random maps with a lower score than the map: at least
* ``agreement``: mean rank correlation with the maps of other methods: at least
"""

SMALLEST_EFFECT = 0.02
"""The smallest difference of scores by which a map is better than a random one."""

_DECISIVE = {"diagnosis", "evidence", "weights"}
_FAITHFULNESS = {"deletion and insertion": "area under insertion less that under deletion", "removal": "ROAD"}
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


def check_evidence(probability: float, without: float) -> Check:
    """Judge the probability of a class for an input, and for the same input without its content."""
    fall = probability - without
    change = f"from {probability:.3f} to {without:.3f}"
    return _graded(
        "evidence",
        fall,
        {"probability": probability, "without": without, "fall": fall},
        passed=f"The prediction rests on what is in the input: without it the probability falls {change}.",
        doubtful=f"Little depends on what is in the input: without it the probability goes {change}.",
        failed=f"There is nothing to explain: without what is in the input the class is as probable ({change}).",
    )


def check_weights(rank_correlation: float, ssim: float, num_stages: int) -> Check:
    """Judge how similar a map is to those of randomised models, NaN if these are not finite.

    Args:
        rank_correlation: the rank correlation, mean over the stages
        ssim: the structural similarity, mean over the stages
        num_stages: the number of stages that were randomised, one after the other
    """
    if math.isnan(rank_correlation):
        return _not_finite("weights")
    rank = abs(rank_correlation)
    numbers = f"rank correlation {rank:.2f} over {num_stages} stages"
    return _graded(
        "weights",
        rank,
        {"rank_correlation": rank, "ssim": ssim},
        passed=f"The map depends on what the model has learned: random weights make another ({numbers}).",
        doubtful=f"With random weights the map stays half the same ({numbers}).",
        failed=f"With random weights the map stays: it does not depend on what was learned ({numbers}).",
    )


def check_class(class_overlap: float, *, finite: bool = True) -> Check:
    """Judge the cosine between the maps of the two best classes.

    Args:
        class_overlap: the cosine; NaN if there is only one class
        finite: whether the sanity check of the map had finite maps to compare
    """
    if not finite:
        return _not_finite("class")
    if math.isnan(class_overlap):
        return Check("class", "left out", "There is only one class.")
    numbers = f"cosine {class_overlap:.2f}"
    return _graded(
        "class",
        class_overlap,
        {"class_overlap": class_overlap},
        passed=f"The map is of this class: that of the next best class is another ({numbers}).",
        doubtful=f"The map of the next best class is much the same ({numbers}).",
        failed=f"The map does not tell classes apart: that of the next best class is the same ({numbers}). It shows "
        "what the model looks at, not why it chose this class.",
    )


def check_faithfulness(name: str, own: float, random: Sequence[float], mean_activation: float | None = None) -> Check:
    """Judge the score of a map beside the scores of random maps.

    Args:
        name: ``"deletion and insertion"`` or ``"removal"``
        own: the score of the map
        random: the scores of the random maps
        mean_activation: the score of the mean activation, if there is one
    """
    beaten = sum(own > score + SMALLEST_EFFECT for score in random) / len(random)
    mean, best = sum(random) / len(random), max(random)
    numbers = f"{_FAITHFULNESS[name]}: {own:.3f}, random maps {mean:.3f} on average, {best:.3f} at best"
    most = "any random one" if beaten == 1 else "most random ones"
    values = {"map": own, "random_mean": mean, "random_best": best, "beaten": beaten}
    note = ""
    if mean_activation is not None:
        values["mean_activation"] = mean_activation
        if mean_activation > own - 0.05:
            how = "better" if mean_activation > own + 0.05 else "as well"
            note = f" What is merely active does {how} ({mean_activation:.3f})."
    check = _graded(
        name,
        beaten,
        values,
        passed=f"The score follows the map more than {most} ({numbers}).{note}",
        doubtful=f"The score follows the map, but some random maps do as well ({numbers}).{note}",
        failed=f"The score follows the map no more than random ones ({numbers}).{note}",
    )
    if check.outcome == "passed" and mean_activation is not None and mean_activation > own + 0.05:
        return replace(check, outcome="doubtful")
    return check


def check_agreement(correlations: Mapping[str, float], missing: Sequence[str] = ()) -> Check:
    """Judge the rank correlations of a map with those of other methods.

    Args:
        correlations: the rank correlation for each method
        missing: why the maps of further methods cannot be compared
    """
    without = f" Left out: {'; '.join(missing)}." if missing else ""
    if not correlations:
        return Check("agreement", "left out", f"There is no other map to compare with.{without}")
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in correlations.items())
    return _graded(
        "agreement",
        sum(correlations.values()) / len(correlations),
        correlations,
        passed=f"Other methods say the same (rank correlation: {numbers}).{without}",
        doubtful=f"Other methods say something else in part (rank correlation: {numbers}).{without}",
        failed=f"Other methods say something else (rank correlation: {numbers}).{without}",
    )


def _graded(name: str, value: float, values: Mapping[str, float], **messages: str) -> Check:
    """Return a check with the outcome of a value, and the message for it. NaN has failed."""
    passed, failed = THRESHOLDS[name]
    sign = 1 if passed > failed else -1
    outcome: Outcome = "failed"
    if sign * value >= sign * passed:
        outcome = "passed"
    elif sign * value >= sign * failed:
        outcome = "doubtful"
    return Check(name, outcome, messages[outcome], values)


def _not_finite(name: str) -> Check:
    return Check(name, "left out", "The maps of the randomised models are not finite.")


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


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """Conclude from the checks of one map.

    A map is not believed if its diagnosis, the evidence or the weights have failed, or both tests of faithfulness. It
    is taken with care if another check has failed, or two are doubtful.
    """
    checks = tuple(checks)
    failed = {check.name for check in checks if check.outcome == "failed"}
    if failed & _DECISIVE or failed >= _FAITHFULNESS.keys():
        return "do not believe"
    doubts = sum(check.outcome == "doubtful" for check in checks)
    return "with care" if failed or doubts > 1 else "believe"


def reasons_of(checks: Iterable[Check]) -> tuple[str, ...]:
    """Return the messages of the checks behind the verdict: those against the map, or else those that it has passed."""
    checks = tuple(checks)
    counted: dict[Verdict, tuple[Outcome, ...]] = {
        "believe": ("passed",),
        "with care": ("failed", "doubtful"),
        "do not believe": ("failed",),
    }
    outcomes = counted[verdict_of(checks)]
    return tuple(check.message for outcome in outcomes for check in checks if check.outcome == outcome)


def combined_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Conclude from the verdicts on several maps.

    They are believed if each one is, and not believed if at least half of them are not.
    """
    counts = Counter(verdicts)
    if counts["believe"] == len(verdicts):
        return "believe"
    return "do not believe" if 2 * counts["do not believe"] >= len(verdicts) else "with care"
