"""What may be found about a map, and the report that says so."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["CODES", "Diagnosis", "Finding", "Severity", "listed"]

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
}
"""What may be found, causes before effects, and how grave it usually is: no map, a doubtful one, or good to know."""

_GRAVITY: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
_ORDER = {code: place for place, code in enumerate(CODES)}


@dataclass(frozen=True)
class Finding:
    """Something that explains a map, or the lack of one.

    Attributes:
        code: a name that does not change, one of ``CODES``
        severity: ``"error"`` (there is no map to speak of), ``"warning"`` (the map is not what it seems) or ``"info"``
        message: what was found, with the numbers
        advice: what to do
        layer: the target layer it is about, if one
        samples: the samples of the batch it is about; empty if all, or none in particular
    """

    code: str
    severity: Severity
    message: str
    advice: str
    layer: str | None = None
    samples: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the finding as plain values."""
        return {**asdict(self), "samples": list(self.samples)}

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} {self.advice}"


class Diagnosis(Sequence[Finding]):
    """The findings about a map, the gravest first; empty, and false, where nothing wrong was found. Prints as a report.

    Attributes:
        subject: the extractor, as it prints
        model: the name of the model's class
        class_idx: the explained class of each sample, where classes were explained
        findings: the findings
    """

    def __init__(
        self, subject: str, model: str, findings: Iterable[Finding], class_idx: Sequence[int] | None = None
    ) -> None:
        self.subject = subject
        self.model = model
        self.class_idx = None if class_idx is None else tuple(class_idx)
        self.findings = tuple(sorted(findings, key=lambda f: (_GRAVITY[f.severity], _ORDER[f.code])))

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, each once."""
        return tuple(dict.fromkeys(finding.code for finding in self))

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, for JSON."""
        return {
            "method": self.subject,
            "model": self.model,
            "class_idx": None if self.class_idx is None else list(self.class_idx),
            "findings": [finding.to_dict() for finding in self],
        }

    def _headline(self) -> str:
        classes = "" if self.class_idx is None else f", class {', '.join(map(str, dict.fromkeys(self.class_idx)))}"
        count = f"{len(self)} finding{'s' * (len(self) > 1)}" if self else "nothing wrong found"
        return f"{self.subject} on {self.model}{classes}: {count}"

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
        rows = "".join(
            f"<tr><td>{finding.severity}</td><td><code>{finding.code}</code></td>"
            f"<td>{html.escape(finding.message)}</td><td>{html.escape(finding.advice)}</td></tr>"
            for finding in self
        )
        head = "<tr><th></th><th></th><th>found</th><th>what to do</th></tr>"
        table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
        return f"<p>{html.escape(self._headline())}</p>{table}"


def listed(values: Sequence[Any], most: int = 5) -> str:
    """Write down values, the first ones if they are many; names in quotes."""
    shown = ", ".join(f"'{value}'" if isinstance(value, str) else str(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")
