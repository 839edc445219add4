"""Trust reports as text, as a page and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from torchcam._files import atomic_write
from torchcam._names import listed
from torchcam._numbers import finite, to_json, versions
from torchcam._pictures import data_uri, fitted
from torchcam._templates import render
from torchcam.utils import overlay_map

from ._verdicts import RELIABILITY, THRESHOLDS, Check, Outcome, Verdict, combined_verdict, reasons_of, verdict_of

_WORDS: dict[Verdict, str] = {
    "believe": "Believe this picture.",
    "with care": "Take this picture with care.",
    "do not believe": "Do not believe this picture.",
}
_COUNTED: dict[Verdict, str] = {
    "believe": "can be believed",
    "with care": "should be taken with care",
    "do not believe": "should not be believed",
}
_MARKS: dict[Outcome, str] = {"passed": "✓", "doubtful": "?", "failed": "✗", "left out": "–"}


@dataclass(frozen=True, eq=False)
class PredictionTrust:
    """The verdict on the map of one prediction.

    Attributes:
        class_idx: the explained class; None for a target
        class_name: its name, if it is known
        probability: its probability, or the score of the target
        checks: the checks, in the order of the report
        remarks: what the map shows that is worth a second look, whatever the verdict
        cam: the map, (*spatial), on the CPU
        picture: the input, if it is an image
        target: the name of the explained target, if it is no class
        completeness: of gradient methods, by layer, the share of the score that gradient × activation at the map's
            positions sums to; empty for others. No check reads it: biases and other paths make it differ from 1.
    """

    class_idx: int | None
    class_name: str | None
    probability: float
    checks: tuple[Check, ...]
    remarks: tuple[str, ...]
    cam: Tensor
    picture: Image.Image | None = None
    target: str | None = None
    completeness: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether to believe the map: not if a check has failed, with care if one is doubtful."""
        return verdict_of(self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The messages of the checks that spoke against the map or, if there are none, of those that it has passed."""
        return reasons_of(self.checks)

    @property
    def title(self) -> str:
        """What is explained, and its probability or score."""
        if self.target is not None:
            return f"{self.target}, score {self.probability:.3g}"
        name = "" if self.class_name in {None, str(self.class_idx)} else f" ({self.class_name})"
        return f"class {self.class_idx}{name}, probability {self.probability:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and its reasons as plain values."""
        return {
            "class_idx": self.class_idx,
            "class_name": self.class_name,
            "target": self.target,
            "probability": finite(self.probability),
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "remarks": list(self.remarks),
            "completeness": {layer: finite(share) for layer, share in self.completeness.items()},
            "checks": [check.to_dict() for check in self.checks],
        }

    @property
    def accounted(self) -> str:
        """How much of the score the positions of the map account for, in words; empty if that is not known."""
        shares = [f"{share:.0%} at '{layer}'" for layer, share in self.completeness.items() if math.isfinite(share)]
        return f"Of the score, gradient × activation at the map's positions sums to {listed(shares)}." if shares else ""

    def _lines(self) -> list[str]:
        lines = [self.title, f"  {_WORDS[self.verdict]}"]
        for check in self.checks:
            lines += _wrapped(check.message, f"  {_MARKS[check.outcome]} {check.name}: ", 4)
        for remark in self.remarks:
            lines += _wrapped(remark, "  ! ", 4)
        return [*lines, *_wrapped(self.accounted, "  ", 2)] if self.accounted else lines


@dataclass(eq=False, repr=False)
class TrustReport(Sequence[PredictionTrust]):
    """The verdicts on the maps of some predictions, and on all of them together. Prints as a page of text.

    Attributes:
        items: the verdict on each prediction
        method: the method of the maps, as it prints
        model: the name of the model's class
        others: the methods that the maps are compared with
        remarks: what the maps have in common that is worth a second look
        num_passes: the number of inputs that the trials ran the model on, beside the maps and their diagnosis
        versions: the versions of Python, torch and torchcam
    """

    items: Sequence[PredictionTrust]
    method: str
    model: str
    others: Sequence[str] = ()
    remarks: Sequence[str] = ()
    num_passes: int = 0

    def __post_init__(self) -> None:
        self.items, self.others, self.remarks = tuple(self.items), tuple(self.others), tuple(self.remarks)
        self.versions = versions()

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def verdict(self) -> Verdict:
        """Whether to believe the maps: ``"believe"`` if each can be, ``"do not believe"`` if half of them cannot."""
        return combined_verdict([item.verdict for item in self])

    @property
    def headline(self) -> str:
        """The verdict in words."""
        words, look = _WORDS[self.verdict], ""
        if self.remarks or any(item.remarks for item in self):
            look = " What it shows is worth a second look."
        if len(self) == 1:
            return words + look
        counts = Counter(item.verdict for item in self)
        parts = [f"{counts[verdict]} {text}" for verdict, text in _COUNTED.items() if counts[verdict]]
        split = f"Of {len(self)}, {listed(parts)}." if len(parts) > 1 else f"All {len(self)} {_COUNTED[self.verdict]}."
        return f"{words.replace('this picture', 'these pictures')} {split}{look.replace('it shows', 'they show')}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "method": self.method,
            "model": self.model,
            "compared_with": list(self.others),
            "remarks": list(self.remarks),
            "passes": self.num_passes,
            "predictions": [item.to_dict() for item in self],
            "thresholds": {name: {"passed": limits[0], "failed": limits[1]} for name, limits in THRESHOLDS.items()},
            "reliability": {verdict: vars(one) for verdict, one in RELIABILITY.items()},
            "versions": dict(self.versions),
        }

    def __str__(self) -> str:
        lines = [self._title, "", *textwrap.wrap(self.headline, 100)]
        for remark in self.remarks:
            lines += _wrapped(remark, "! ", 2)
        for item in self:
            lines += ["", *item._lines()]
        lines += ["", *textwrap.wrap(self._basis, 100)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._render("_notebook", 256)

    def to_html(self, path: str | Path | None = None) -> str:
        """Write a page that needs no other file, no network and no script.

        Args:
            path: the file to write; by default the page is only returned

        Returns:
            the page
        """
        page = self._render("_page", 512)
        if path is not None:
            _write(Path(path), page)
        return page

    def save(self, path: str | Path) -> Path:
        """Write the report as a page, as text or as JSON, by the suffix (``.html``, ``.txt``, ``.json``).

        Raises:
            ValueError: if the path has another suffix
        """
        path = Path(path)
        texts: dict[str, Callable[[], str]] = {
            ".html": self.to_html,
            ".txt": lambda: f"{self}\n",
            ".json": lambda: to_json(self.to_dict()) + "\n",
        }
        if path.suffix.lower() not in texts:
            raise ValueError(f"`path` must end in {', '.join(texts)}, got '{path}'")
        _write(path, texts[path.suffix.lower()]())
        return path

    @property
    def _basis(self) -> str:
        """How often such verdicts were right, and what this one took."""
        told = " ".join(f"{verdict.capitalize()}: {RELIABILITY[verdict]}." for verdict in self._verdicts)
        return f"{told} The trials took {self.num_passes} forward passes, beside the maps and their diagnosis."

    @property
    def _verdicts(self) -> list[Verdict]:
        """The verdicts that occur, the best first."""
        found = {item.verdict for item in self}
        return [verdict for verdict in _WORDS if verdict in found]

    @property
    def _title(self) -> str:
        return f"{self.method} on {self.model}"

    def _render(self, template: str, edge: int) -> str:
        made_by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return render(
            f"trust/{template}.html",
            title=self._title,
            report=self,
            words=_WORDS,
            marks=_MARKS,
            thresholds=THRESHOLDS,
            compared=listed(self.others) or "no other method",
            made_by=made_by,
            pictures=lambda item: [data_uri(fitted(picture, edge)) for picture in _pictures(item)],
        )


def _pictures(item: PredictionTrust) -> list[Image.Image]:
    """Return the input and the map over it; nothing where they are no pictures."""
    if item.picture is None or item.cam.ndim != 2:
        return []
    picture, cam = item.picture.convert("RGB"), item.cam.float()
    return [picture, overlay_map(picture, cam.numpy(), signed=bool((cam < 0).any()))]


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def _wrapped(text: str, head: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
