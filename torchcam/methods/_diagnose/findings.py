"""The findings about a map, and the report that lists them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from torchcam._numbers import finite
from torchcam._templates import render

Severity = Literal["error", "warning", "info"]

CODES: dict[str, Severity] = {
    "nothing_recorded": "error",
    "hooks_disabled": "error",
    "hooks_removed": "error",
    "compiled": "error",
    "layer_not_reached": "error",
    "input_modified": "error",
    "input_not_finite": "error",
    "activation_not_finite": "error",
    "score_not_finite": "error",
    "gradient_not_finite": "error",
    "method_failed": "error",
    "no_positions": "error",
    "one_position": "error",
    "wrong_layout": "error",
    "no_gradient": "error",
    "zero_gradient": "error",
    "activation_constant": "error",
    "all_negative": "error",
    "map_constant": "error",
    "score_saturated": "warning",
    "same_for_every_class": "warning",
    "inverted": "warning",
    "coarse_grid": "warning",
    "layout_ambiguous": "warning",
    "train_mode": "warning",
    "not_repeatable": "warning",
    "input_range": "warning",
    "called_repeatedly": "warning",
    "score_squashed": "info",
    "class_agnostic": "info",
    "inplace_after_layer": "info",
    "both_signs": "info",
    "unbalanced": "info",
}
"""The codes of all findings, causes before effects, each with its usual severity."""

_SEVERITIES: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
_ORDER = {code: place for place, code in enumerate(CODES)}


@dataclass(frozen=True)
class Finding:
    """A reason why a map is as it is, or why there is none.

    Attributes:
        code: the name of the finding, one of ``CODES``; it stays the same between releases
        severity: ``"error"`` (there is no usable map), ``"warning"`` (the map may mislead) or ``"info"``
        message: the observation, with its numbers
        advice: the remedy
        layer: the target layer concerned, if any
        samples: the samples of the batch concerned; empty for all of them
    """

    code: str
    severity: Severity
    message: str
    advice: str
    layer: str | None = None
    samples: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return {**asdict(self), "samples": list(self.samples)}

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} {self.advice}"


class Diagnosis(Sequence[Finding]):
    """The findings about a map, the most severe first. Empty, and false, if nothing is wrong. Prints as a report.

    Attributes:
        subject: the ``repr`` of the extractor
        model: the name of the model's class
        class_idx: the explained class of each sample, if classes were explained
        findings: the findings
        completeness: of gradient methods, by layer, the share of each sample's score that gradient × activation at the
            map's positions sums to; empty for others
    """

    def __init__(
        self,
        subject: str,
        model: str,
        findings: Iterable[Finding],
        class_idx: Sequence[int] | None = None,
        completeness: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.subject = subject
        self.model = model
        self.class_idx = None if class_idx is None else tuple(class_idx)
        self.completeness = dict(completeness or {})
        self.findings = tuple(sorted(findings, key=lambda f: (_SEVERITIES[f.severity], _ORDER[f.code])))

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, without duplicates."""
        return tuple(dict.fromkeys(finding.code for finding in self))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "method": self.subject,
            "model": self.model,
            "class_idx": None if self.class_idx is None else list(self.class_idx),
            "completeness": finite(self.completeness),
            "findings": [finding.to_dict() for finding in self],
        }

    def _headline(self) -> str:
        classes = "" if self.class_idx is None else f", class {', '.join(map(str, dict.fromkeys(self.class_idx)))}"
        count = f"{len(self)} finding{'s' * (len(self) > 1)}" if self else "nothing wrong found"
        shares = ""
        for layer, found in self.completeness.items():
            most = f" to {max(found):.0%}" if len(found) > 1 else ""
            shares += f", gradient × activation at '{layer}' {min(found):.0%}{most} of the score"
        return f"{self.subject} on {self.model}{classes}{shares}: {count}"

    def __str__(self) -> str:
        lines = [self._headline()]
        for finding in self:
            lines += ["", f"{finding.severity}: {finding.code}"]
            for label, text in (("found", finding.message), ("do", finding.advice)):
                lines += textwrap.wrap(
                    text, 100, initial_indent=f"  {label:5}  ", subsequent_indent=" " * 9, break_on_hyphens=False
                )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render("methods/_diagnose/_report.html", headline=self._headline(), findings=self.findings)


def finding(
    code: str,
    message: str,
    advice: str,
    *,
    layer: str | None = None,
    samples: Tensor | None = None,
    severity: Severity | None = None,
) -> Finding:
    """Return a finding; its message names the samples concerned.

    Args:
        code: one of ``CODES``
        message: the observation
        advice: the remedy
        layer: the target layer concerned
        samples: a mask (N,) of the samples concerned; by default all
        severity: by default the usual one of the code
    """
    concerned = [] if samples is None or samples.all() else samples.nonzero().flatten().tolist()
    message = of_samples(concerned, 0 if samples is None else len(samples)) + message
    return Finding(code, severity or CODES[code], message, advice, layer, tuple(concerned))


def of_samples(samples: Sequence[int], count: int) -> str:
    """Return the beginning of a message about some of the samples of a batch."""
    return f"{len(samples)} of {count} samples ({listed(samples)}): " if samples else ""


def listed(values: Sequence[Any], most: int = 5) -> str:
    """Return the first values as text, names in quotes, with the number of the others."""
    shown = ", ".join(f"'{value}'" if isinstance(value, str) else str(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def numbers(values: Iterable[float], most: int = 4) -> str:
    """Return the first of the different values as text."""
    texts = list(dict.fromkeys(f"{value:.4g}" for value in values))
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
