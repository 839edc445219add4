"""Why is this map blank, constant, NaN, inverted, the same for every class, or too coarse?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchcam.targets import ClassIndex, OutputTarget, check_one_of

from . import layer_checks, map_checks, pass_checks
from .facts import examined
from .findings import CODES, Diagnosis, Finding, of_samples
from .view import ExtractorView

__all__ = ["CODES", "Diagnosis", "Finding", "diagnose", "of_samples"]


def diagnose(
    extractor: Any,
    class_idx: ClassIndex | None = None,
    *,
    targets: OutputTarget | Sequence[OutputTarget] | None = None,
) -> Diagnosis:
    """Find the reasons why the maps of the pass that an extractor has recorded are not as they should be.

    The pass is repeated in evaluation mode, with the class that has the highest score where none is named. The model,
    the extractor and the recorded pass are left as they were, also if the model raises.

    Cost: a few forward passes (up to six on variants of the input, to see whether the peak of the map matters), the
    maps of two classes, and, where another layer has to be named, one look at all layers.

    Args:
        extractor: the extractor, after a forward pass
        class_idx: the class whose map is wrong, for the whole batch or one per sample
        targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar

    Returns:
        the findings

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a class does not exist, there are several per sample, or both arguments are given
    """
    if class_idx is not None and targets is not None:
        check_one_of(class_idx, targets)
    recorded = ExtractorView(extractor)
    findings = list(pass_checks.check_recording(recorded))
    classes, completeness = None, None
    if not any(finding.severity == "error" for finding in findings):
        with examined(recorded, class_idx, targets) as facts:
            checks = (*pass_checks.CHECKS, *layer_checks.CHECKS, *map_checks.CHECKS)
            findings += [finding for check in checks for finding in check(facts)]
            classes, completeness = facts.classes, facts.raw.completeness
    return Diagnosis(repr(extractor), type(recorded.model).__name__, findings, classes, completeness)
