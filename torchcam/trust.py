"""Whether to believe a picture: one page that tries a map out, and says in words what came of it."""

from __future__ import annotations

import html
import itertools
import json
import math
import platform
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from torchcam import __version__
from torchcam._callable import make_callable
from torchcam._figures import data_uri, fitted
from torchcam._files import written_whole
from torchcam._methods import CALL_OPTIONS, as_method, by_method, takes
from torchcam._passes import untouched
from torchcam._tensors import blurred_out, is_constant, over_channels, resize, to_float
from torchcam.layers import TargetLayer
from torchcam.methods import MeanActivation
from torchcam.methods._diagnose import Diagnosis, diagnose, of_samples
from torchcam.methods._replay import positive_integer
from torchcam.methods.core import plain_tensors
from torchcam.metrics import ROAD, DeletionInsertionMetric, Localization, SanityCheck
from torchcam.metrics._statistics import spearman
from torchcam.metrics.core import as_image, check_seed, watched
from torchcam.targets import ClassIndex, Selector, read_logits
from torchcam.utils import overlay_map

__all__ = ["THRESHOLDS", "Check", "PredictionTrust", "TrustReport", "trust"]

Verdict = Literal["believe", "with care", "do not believe"]
Outcome = Literal["passed", "doubtful", "failed", "left out"]
Layers = TargetLayer | Sequence[TargetLayer] | None

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
"""From where on a check is passed, and beyond what it has failed; in between it is doubtful.

* ``evidence``: by how much the probability of the class falls when the input is blurred, or painted in its mean colour
  or its mean grey, whichever takes most: at least
* ``weights``: rank correlation of the map with those of randomised models, mean over the stages: at most
* ``class``: cosine between the maps of the two best classes: at most
* ``deletion and insertion``, ``removal``: the share of random maps that the map does better than: at least
* ``agreement``: mean rank correlation with the maps of other methods: at least
"""

SMALLEST_EFFECT = 0.02
"""A map that moves the probability by less than this, more than random ones do, is not better than they are."""

_DECIDING = ("diagnosis", "evidence", "weights")
_FAITHFUL = ("deletion and insertion", "removal")
_WORDS: dict[Verdict, str] = {
    "believe": "Believe this picture.",
    "with care": "Take this picture with care.",
    "do not believe": "Do not believe this picture.",
}
_MARKS: dict[Outcome, str] = {"passed": "✓", "doubtful": "?", "failed": "✗", "left out": "–"}


@dataclass(frozen=True)
class Check:
    """One way to try a map out, and what came of it.

    Attributes:
        name: what was tried
        outcome: ``"passed"``, ``"doubtful"``, ``"failed"`` or ``"left out"``
        message: what was found, in words
        values: the numbers
    """

    name: str
    outcome: Outcome
    message: str
    values: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the check as plain values."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "message": self.message,
            "values": {key: value if math.isfinite(value) else None for key, value in self.values.items()},
        }


@dataclass(frozen=True, eq=False)
class PredictionTrust:
    """What there is to say of the map of one prediction.

    Attributes:
        class_idx: the explained class
        class_name: its name, if it is known
        probability: its probability
        checks: the checks, in the order in which they are told
        remarks: what the map shows that is worth a second look, whether or not it is to be believed
        cam: the map, (*spatial), on the CPU
        picture: the input, if it is an image
    """

    class_idx: int
    class_name: str | None
    probability: float
    checks: tuple[Check, ...]
    remarks: tuple[str, ...]
    cam: Tensor
    picture: Image.Image | None = None

    @property
    def verdict(self) -> Verdict:
        """What to make of the map.

        Not to be believed is a map that is broken or upside down, one of a score that hardly depends on the input, one
        that hardly depends on the weights, and one that fails both tests of faithfulness. To be taken with care is one
        that fails anything else, or leaves two doubts.
        """
        failed = {check.name for check in self.checks if check.outcome == "failed"}
        if failed & set(_DECIDING) or failed >= set(_FAITHFUL):
            return "do not believe"
        doubts = sum(check.outcome == "doubtful" for check in self.checks)
        return "with care" if failed or doubts > 1 else "believe"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why: the checks that spoke against the map, or, where none did, those that it has passed."""
        against = [check.message for check in self.checks if check.outcome == "failed"]
        if self.verdict != "do not believe":
            against += [check.message for check in self.checks if check.outcome == "doubtful"]
        if self.verdict == "believe":
            return tuple(check.message for check in self.checks if check.outcome == "passed")
        return tuple(against)

    @property
    def title(self) -> str:
        """What is explained."""
        name = "" if self.class_name in {None, str(self.class_idx)} else f" ({self.class_name})"
        return f"class {self.class_idx}{name}, probability {self.probability:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Give the verdict and its reasons as plain values."""
        return {
            "class_idx": self.class_idx,
            "class_name": self.class_name,
            "probability": self.probability if math.isfinite(self.probability) else None,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "remarks": list(self.remarks),
            "checks": [check.to_dict() for check in self.checks],
        }

    def _lines(self) -> list[str]:
        lines = [self.title, f"  {_WORDS[self.verdict]}"]
        for check in self.checks:
            head = f"  {_MARKS[check.outcome]} {check.name}: "
            lines += _wrapped(check.message, head, 4)
        for remark in self.remarks:
            lines += _wrapped(remark, "  ! ", 4)
        return lines


class TrustReport(Sequence[PredictionTrust]):
    """Whether to believe the maps of some predictions, one by one and all in all. Prints as a page of text.

    Attributes:
        items: what there is to say of each prediction
        method: the method whose maps are judged, as it prints
        model: the name of the model's class
        others: the methods that they are compared with
        remarks: what the maps show together
        versions: the versions of Python, torch and torchcam
    """

    def __init__(
        self,
        items: Sequence[PredictionTrust],
        method: str,
        model: str,
        others: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        self.items = tuple(items)
        self.method = method
        self.model = model
        self.others = tuple(others)
        self.remarks = tuple(remarks)
        self.versions = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchcam": __version__,
        }

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def verdict(self) -> Verdict:
        """What to make of all the maps: ``"believe"`` if each can be, ``"do not believe"`` if half of them cannot."""
        counts = Counter(item.verdict for item in self)
        if counts["believe"] == len(self):
            return "believe"
        return "do not believe" if 2 * counts["do not believe"] >= len(self) else "with care"

    @property
    def headline(self) -> str:
        """The verdict in words."""
        if len(self) == 1:
            words = _WORDS[self.verdict]
        else:
            counts = Counter(item.verdict for item in self)
            told = [f"{counts[verdict]} {text}" for verdict, text in _COUNTED.items() if counts[verdict]]
            split = (
                f"Of {len(self)}, {_joined(told)}." if len(told) > 1 else f"All {len(self)} {_COUNTED[self.verdict]}."
            )
            words = f"{_WORDS[self.verdict].replace('this picture', 'these pictures')} {split}"
        look = " What it shows is worth a second look." if self.remarks or any(item.remarks for item in self) else ""
        return words + (look.replace("it shows", "they show") if len(self) > 1 else look)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, for JSON."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "method": self.method,
            "model": self.model,
            "compared_with": list(self.others),
            "remarks": list(self.remarks),
            "predictions": [item.to_dict() for item in self],
            "thresholds": {name: {"passed": limits[0], "failed": limits[1]} for name, limits in THRESHOLDS.items()},
            "versions": dict(self.versions),
        }

    def __str__(self) -> str:
        lines = [f"{self.method} on {self.model}", ""]
        lines += textwrap.wrap(self.headline, 100)
        for remark in self.remarks:
            lines += _wrapped(remark, "! ", 2)
        for item in self:
            lines += ["", *item._lines()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f'<div class="torchcam-trust"><style>{_STYLE}</style>{self._body(256)}</div>'

    def to_html(self, path: str | Path | None = None) -> str:
        """Write a page of its own, that fetches nothing and runs nothing.

        Args:
            path: where to write it; by default it is only returned

        Returns:
            the page
        """
        title = html.escape(f"{self.method} on {self.model}")
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            f"<title>{title}</title><style>{_PAGE_STYLE}{_STYLE}</style></head>"
            f'<body><main class="torchcam-trust">{self._body(512)}</main></body></html>\n'
        )
        if path is not None:
            with written_whole(Path(path)) as part:
                part.write_text(page, encoding="utf-8")
        return page

    def save(self, path: str | Path) -> Path:
        """Write the report: as a page, text or JSON, by the name's ending (``.html``, ``.txt``, ``.json``).

        Raises:
            ValueError: if the name ends otherwise
        """
        path = Path(path)
        texts: dict[str, Callable[[], str]] = {
            ".html": self.to_html,
            ".txt": lambda: f"{self}\n",
            ".json": lambda: json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        }
        if path.suffix.lower() not in texts:
            raise ValueError(f"`path` must end in {', '.join(texts)}, got '{path}'")
        with written_whole(path) as part:
            part.write_text(texts[path.suffix.lower()](), encoding="utf-8")
        return path

    def _body(self, edge: int) -> str:
        remarks = "".join(f'<p class="remark">{html.escape(remark)}</p>' for remark in self.remarks)
        return (
            f"<h1>{html.escape(self.method)} on {html.escape(self.model)}</h1>"
            f'<p class="verdict {_css(self.verdict)}">{html.escape(self.headline)}</p>{remarks}'
            + "".join(_section(item, edge, alone=len(self) == 1) for item in self)
            + f"<details><summary>How this was judged</summary>{_explanations()}"
            f"<p>Compared with {html.escape(_joined(self.others) or 'no other method')}. "
            + html.escape(", ".join(f"{name} {version}" for name, version in self.versions.items()))
            + "</p></details>"
        )


def trust(
    model: nn.Module,
    input_tensor: Tensor,
    class_idx: ClassIndex | None = None,
    *,
    methods: Sequence[type[Any] | str] = ("GradCAM", "LayerCAM", "ReciproCAM"),
    target_layer: Layers | Mapping[Any, Layers] = None,
    method_kwargs: Mapping[Any, Mapping[str, Any]] | None = None,
    call_kwargs: Mapping[Any, Mapping[str, Any]] | None = None,
    masks: Any = None,
    images: Sequence[Image.Image] | None = None,
    class_names: Sequence[str] | None = None,
    to_probabilities: Callable[[Tensor], Tensor] | None = None,
    num_random: int = 10,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 32,
) -> TrustReport:
    """Try out the maps of one prediction, or of a few, and say in words whether to believe them.

    What is tried, of each prediction:

    * *diagnosis*: is the map blank, NaN, upside down (see :meth:`_CAM.diagnose`)?
    * *evidence*: does the probability of the class fall when the input is blurred, or painted in its mean colour or its
      mean grey? If not, there is nothing to explain, as in a model that has not been trained.
    * *weights*: does the map change when the model's weights are randomised (:class:`torchcam.metrics.SanityCheck`)?
    * *class*: is it another map for another class?
    * *deletion and insertion*, *removal*: does the probability fall faster, and come back sooner, when pixels go in the
      order of the map than in the order of random maps, and of the mean activation
      (:class:`torchcam.metrics.DeletionInsertionMetric`, :class:`torchcam.metrics.ROAD`)?
    * *agreement*: do other methods say the same?

    ``THRESHOLDS`` says from where on each is passed. Beside the verdict come remarks on what the maps show, true as
    they may be: that they look at the border, at the same place whatever the input, or, given ``masks``, past the
    object. A map of a model that has learned a shortcut is to be believed: it is the remarks that tell.

    Cost: for each prediction about ``(num_random + 2) * (2 * steps + 7)`` forward passes, and a map for each of the
    model's stages. The model is left as it was.

    Example:
        >>> from torchcam.demo import load_model, sample_images
        >>> from torchcam.trust import trust
        >>> report = trust(load_model(), sample_images()[0].to_tensor(), target_layer="layer4")
        >>> report.verdict
        'believe'

    Args:
        model: the classifier
        input_tensor: the inputs, (N, C, *spatial)
        class_idx: the class to explain, for all inputs or one for each; by default the predicted one
        methods: the method to judge, by class or name, and those to compare it with; one that comes again is left out
        target_layer: the layer(s) to look at, as the methods take them; or a mapping from methods to them
        method_kwargs: further arguments of the methods' constructors, in a mapping from methods
        call_kwargs: arguments of the methods' calls, ``relu`` (but not ``"negative"``: it is the evidence for a class
            that is tried out), ``eps`` and ``target_shape``, in a mapping from methods
        masks: where the object is, (N, *spatial) of the input's size, booleans or integers in a tensor or an array
        images: the pictures to show; by default the inputs, if they are images
        class_names: the names of the classes
        to_probabilities: function from the scores (N, classes) to probabilities; by default a softmax, or a sigmoid of
            a single score
        num_random: how many random maps the map is compared with
        steps: how many steps deletion and insertion take
        seed: seed of the random maps and weights; the global random state is left alone
        batch_size: largest number of inputs in one pass

    Returns:
        the report

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if there is no input or no method, something is given for a method that is not named, an argument's
            length does not fit, or the scores are not (N, classes)
    """
    classes = _as_methods(methods)
    names = [method.__name__ for method in classes]
    layers = by_method("target_layer", target_layer, names) if isinstance(target_layer, Mapping) else None
    made_with = _by_methods("method_kwargs", method_kwargs, names)
    called_with = _by_methods("call_kwargs", call_kwargs, names)
    for name, given in called_with.items():
        _check_call(name, given)
    trial = _Trial(
        model,
        input_tensor,
        class_idx,
        to_probabilities,
        num_random=positive_integer("num_random", num_random),
        steps=positive_integer("steps", steps),
        seed=check_seed(seed),
        batch_size=positive_integer("batch_size", batch_size),
    )
    count = len(trial.image)
    if images is not None and len(images) != count:
        raise ValueError(f"`images` must hold one for each of the {count} inputs, got {len(images)}")
    masks = None if masks is None else _as_masks(masks, trial.image)
    if class_names is not None and len(class_names) != trial.probabilities.shape[1]:
        raise ValueError(
            f"`class_names` has {len(class_names)} names, but the model gives scores of "
            f"{trial.probabilities.shape[1]} classes"
        )

    def make(method: type[Any]) -> Any:
        name = method.__name__
        layer = target_layer if layers is None else layers.get(name)
        options = dict(made_with.get(name, {}))
        if takes(method, "input_shape"):
            options.setdefault("input_shape", tuple(trial.image.shape[1:]))
        return method(model, target_layer=layer, **options)

    with make(classes[0]) as extractor:
        checks, cams = trial.judge(_Asked(extractor, called_with.get(names[0], {})))
        judged = repr(extractor)
    others: dict[str, Tensor | str] = {}
    for method in classes[1:]:
        try:
            with make(method) as extractor:
                others[method.__name__] = trial.maps(_Asked(extractor, called_with.get(method.__name__, {})))
        except (ValueError, RuntimeError) as error:
            others[method.__name__] = f"{type(error).__name__}: {error}"
    for sample in range(count):
        checks[sample].append(_agreement(cams[sample], {name: _one(m, sample) for name, m in others.items()}))
    remarks = _remarks(cams, masks, trial.image)
    items = [
        PredictionTrust(
            class_idx=index,
            class_name=None if class_names is None else class_names[index],
            probability=float(trial.probability[sample]),
            checks=tuple(checks[sample]),
            remarks=tuple(remarks[sample]),
            cam=cams[sample].cpu(),
            picture=_picture(trial.image[sample]) if images is None else images[sample],
        )
        for sample, index in enumerate(trial.classes)
    ]
    return TrustReport(items, judged, type(model).__name__, tuple(others), _common_remarks(cams))


class _Trial:
    """Some predictions of a model, whose maps are tried out.

    Attributes:
        image: the inputs, (N, C, *spatial)
        classes: the explained class of each
        probabilities: the probabilities of all classes, (N, K)
        probability: that of the explained class, (N,)
    """

    def __init__(
        self,
        model: nn.Module,
        input_tensor: Tensor,
        class_idx: ClassIndex | None,
        to_probabilities: Callable[[Tensor], Tensor] | None,
        *,
        num_random: int,
        steps: int,
        seed: int,
        batch_size: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        if to_probabilities is not None and not callable(to_probabilities):
            raise TypeError(f"`to_probabilities` must be callable, got {to_probabilities!r}")
        self.model = model
        self.image = as_image(input_tensor).detach()
        self.to_probabilities = to_probabilities
        self.num_random = num_random
        self.steps = steps
        self.seed = seed
        self.batch_size = batch_size
        self.probabilities = self._predict(self.image)
        chosen = self.probabilities.argmax(1) if class_idx is None else class_idx
        select = Selector(chosen, None, len(self.image))
        indices = select.indices(self.probabilities)
        if indices.ndim > 1:
            raise ValueError(f"`class_idx` must name one class for each input, got {class_idx!r}")
        self.classes: list[int] = indices.tolist()
        self.probability = self._of_classes(self.probabilities)
        self._strongest = torch.zeros(len(self.image), dtype=torch.long)  # what destroys each input best

    def scores(self, output: Any) -> Tensor:
        """Read the probabilities (N, K) off an output."""
        logits = read_logits(output)
        logits = to_float(logits.reshape(-1, 1) if logits.ndim < 2 else logits)
        if logits.ndim != 2:
            raise ValueError(f"the model must give class scores (N, classes), got {tuple(logits.shape)}")
        if self.to_probabilities is not None:
            return self.to_probabilities(logits)
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)

    def _predict(self, image: Tensor) -> Tensor:
        with untouched(self.model), torch.inference_mode():
            parts = [self.scores(self.model(part)) for part in torch.split(image, self.batch_size)]
        return torch.cat(parts).clone()

    def _of_classes(self, probabilities: Tensor) -> Tensor:
        indices = torch.tensor(self.classes, device=probabilities.device)
        return probabilities.gather(1, indices.unsqueeze(1)).squeeze(1)

    def maps(self, extractor: Any) -> Tensor:
        """Give an extractor's maps in [0, 1], (N, *grid)."""
        parts = []
        for start in range(0, len(self.image), self.batch_size):
            part = slice(start, start + self.batch_size)
            with plain_tensors(), watched(extractor):
                output = self.model(self.image[part])
                fused = extractor.fuse_cams(extractor(self.classes[part], output))
            parts.append(to_float(fused.detach()))
        maps = torch.cat(parts)
        return over_channels(maps) if maps.ndim == self.image.ndim else maps

    def judge(self, extractor: Any) -> tuple[list[list[Check]], Tensor]:
        """Try out an extractor's maps: what came of it for each sample, and the maps."""
        cams = self.maps(extractor)
        diagnosis = self._diagnosis(extractor)
        evidence = self._evidence()
        broken = ~cams.flatten(1).isfinite().all(1)
        flat = cams.flatten(1)
        blank = broken | is_constant(flat.amin(1), flat.amax(1))
        active = self._mean_activation(extractor)
        sanity = SanityCheck(extractor, seed=self.seed, batch_size=self.batch_size)
        checks = []
        for sample in range(len(cams)):
            found = [diagnosis[sample], evidence[sample]]
            if not bool(blank[sample]):
                found += self._sanity(sanity, sample)
                found += self._faithfulness(sample, cams, active)
            checks.append(found)
        return checks, cams

    def _diagnosis(self, extractor: Any) -> list[Check]:
        checks = []
        for start in range(0, len(self.image), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            classes = self.classes[chunk]
            with plain_tensors(), untouched(self.model, extractor.base_cam):
                self.model(self.image[chunk])
                report = diagnose(extractor, classes)
            checks += [self._diagnosed(report, row, len(classes), extractor.signed) for row in range(len(classes))]
        return checks

    @staticmethod
    def _diagnosed(report: Diagnosis, sample: int, count: int, signed: bool) -> Check:
        """Say what was found about one of the samples that were diagnosed together."""
        found = [f for f in report if not f.samples or sample in f.samples]
        if signed:  # then there is a map, all below zero
            found = [f for f in found if f.code != "all_negative"]
        grave = [f for f in found if f.severity == "error" or f.code == "inverted"]
        doubts = [f for f in found if f.severity == "warning" and f not in grave]
        text = " ".join(f"{f.code}: {f.message.removeprefix(of_samples(f.samples, count))}" for f in grave or doubts)
        if grave:
            return Check("diagnosis", "failed", f"The map is not in order. {text}")
        if doubts:
            return Check("diagnosis", "doubtful", f"The map has a weak point. {text}")
        return Check("diagnosis", "passed", "Nothing is wrong with how the map was made.")

    def _destroyed(self, kind: int, samples: slice = slice(None)) -> Tensor:
        """Give the inputs without what is in them: blurred, in their mean colour, or in one grey."""
        image = self.image[samples]
        if kind == 0:
            return blurred_out(image)
        return image.mean(tuple(range(3 - kind, image.ndim)), keepdim=True).expand_as(image)

    def _evidence(self) -> list[Check]:
        """See whether the prediction depends on the input at all, and what takes most of it away."""
        found = torch.stack([self._of_classes(self._predict(self._destroyed(kind))) for kind in range(3)])
        without, self._strongest = found.min(0)
        checks = []
        for probability, rest in zip(self.probability.tolist(), without.tolist(), strict=True):
            fall = probability - rest
            outcome = _judged("evidence", fall)
            change = f"from {probability:.3f} to {rest:.3f}"
            message = {
                "passed": f"The prediction rests on what is in the input: without it the probability falls {change}.",
                "doubtful": f"Little depends on what is in the input: without it the probability goes {change}.",
                "failed": "There is nothing to explain: without what is in the input the class is as probable "
                f"({change}).",
            }[outcome]
            checks.append(
                Check("evidence", outcome, message, {"probability": probability, "without": rest, "fall": fall})
            )
        return checks

    def _sanity(self, metric: SanityCheck, sample: int) -> list[Check]:
        """See whether the map depends on the weights and on the class."""
        metric.reset()
        metric.update(self.image[sample : sample + 1], self.classes[sample])
        if not int(metric.total):
            return [
                Check(name, "left out", "The maps of the randomised models are not finite.")
                for name in ("weights", "class")
            ]
        values = {key: float(value) for key, value in metric.compute().items()}
        rank, overlap = abs(values["rank_correlation"]), values["class_overlap"]
        outcome = _judged("weights", rank, higher_is_better=False)
        numbers = f"rank correlation {rank:.2f} over {len(metric.layers)} stages"
        message = {
            "passed": f"The map depends on what the model has learned: random weights make another ({numbers}).",
            "doubtful": f"With random weights the map stays half the same ({numbers}).",
            "failed": f"With random weights the map stays: it does not depend on what was learned ({numbers}).",
        }[outcome]
        checks = [Check("weights", outcome, message, {"rank_correlation": rank, "ssim": values["ssim"]})]
        if math.isnan(overlap):
            checks.append(Check("class", "left out", "There is only one class."))
            return checks
        outcome = _judged("class", overlap, higher_is_better=False)
        numbers = f"cosine {overlap:.2f}"
        message = {
            "passed": f"The map is of this class: that of the next best class is another ({numbers}).",
            "doubtful": f"The map of the next best class is much the same ({numbers}).",
            "failed": f"The map does not tell classes apart: that of the next best class is the same ({numbers}). It "
            "shows what the model looks at, not why it chose this class.",
        }[outcome]
        checks.append(Check("class", outcome, message, {"class_overlap": overlap}))
        return checks

    def _mean_activation(self, extractor: Any) -> Tensor | None:
        """Give the map of what is active, whatever the class; none if the method looks at no layer."""
        layers = extractor.target_names
        if not all(name in extractor.submodule_dict for name in layers):
            return None
        base = getattr(extractor, "base_cam", extractor)
        try:
            with MeanActivation(
                self.model, list(layers), reshape_transform=getattr(base, "reshape_transform", None)
            ) as active:
                return self.maps(active)
        except (ValueError, RuntimeError):
            return None

    def _faithfulness(self, sample: int, cams: Tensor, active: Tensor | None) -> list[Check]:
        """See whether the score follows the map, more than it follows maps that know nothing."""
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.rand((self.num_random, *cams.shape[1:]), generator=generator).to(cams)
        deletion = DeletionInsertionMetric(
            self.model,
            self.scores,
            steps=self.steps,
            baseline=self._destroyed(int(self._strongest[sample]), slice(sample, sample + 1)),
            batch_size=self.batch_size,
        )
        removal = ROAD(self.model, self.scores, seed=self.seed, batch_size=self.batch_size)

        def gap(cam: Tensor) -> float:
            values = self._measured(deletion, sample, cam)
            return values["insertion_auc"] - values["deletion_auc"]

        def road(cam: Tensor) -> float:
            return self._measured(removal, sample, cam)["road"]

        told = {
            "deletion and insertion": (gap, "area under insertion less that under deletion"),
            "removal": (road, "ROAD"),
        }
        checks = []
        for name, (measure, unit) in told.items():
            own = measure(cams[sample])
            chance = [measure(cam) for cam in random]
            usual = None if active is None else measure(active[sample])
            better = sum(own > value + SMALLEST_EFFECT for value in chance) / len(chance)
            outcome = _judged(name, better)
            highest = max(chance)
            numbers = (
                f"{unit}: {own:.3f}, random maps {sum(chance) / len(chance):.3f} on average, {highest:.3f} at best"
            )
            most = "any random one" if better == 1 else "most random ones"
            message = {
                "passed": f"The score follows the map more than {most}",
                "doubtful": "The score follows the map, but some random maps do as well",
                "failed": "The score follows the map no more than random ones",
            }[outcome] + f" ({numbers})."
            values = {"map": own, "random_mean": sum(chance) / len(chance), "random_best": highest, "beaten": better}
            if usual is not None:
                values["mean_activation"] = usual
                if usual > own + 0.05:
                    message += f" What is merely active does better ({usual:.3f})."
                    outcome = "doubtful" if outcome == "passed" else outcome
                elif usual > own - 0.05:
                    message += f" What is merely active does as well ({usual:.3f})."
            checks.append(Check(name, outcome, message, values))
        return checks

    def _measured(self, metric: Any, sample: int, cam: Tensor) -> dict[str, float]:
        metric.reset()
        metric.update(self.image[sample : sample + 1], self.classes[sample], maps=cam.unsqueeze(0))
        return {key: float(value) for key, value in metric.compute().items()}


class _Asked:
    """An extractor that is called with some options, whoever calls it."""

    def __init__(self, extractor: Any, options: Mapping[str, Any]) -> None:
        self.extractor = extractor
        self.base_cam = getattr(extractor, "base_cam", extractor)  # whose hooks they are
        self.options = options

    @property
    def signed(self) -> bool:
        """Whether the maps have negative values."""
        return self.options.get("relu") is False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.extractor(*args, **self.options, **kwargs)

    def compute_cams(self, *args: Any, **kwargs: Any) -> Any:
        return self.extractor.compute_cams(*args, **self.options, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extractor, name)

    def __repr__(self) -> str:
        return repr(self.extractor)


def _as_methods(given: Sequence[type[Any] | str]) -> list[type[Any]]:
    """Check the methods, and give their classes, each once."""
    if isinstance(given, (str, type)):
        given = [given]
    found = list(dict.fromkeys(as_method(method, "methods") for method in given))
    if not found:
        raise ValueError("`methods` is empty: name the method whose maps are to be judged")
    return found


def _by_methods(argument: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`{argument}` must be a mapping from methods to arguments, got {type(given).__name__}")
    return by_method(argument, given or {}, names)


def _check_call(name: str, options: Mapping[str, Any]) -> None:
    """Check the options of a method's call: whether what they make is a map of the evidence for a class."""
    unknown = [option for option in options if option not in CALL_OPTIONS]
    if unknown:
        raise ValueError(f"`call_kwargs` of {name} holds {unknown[0]!r}: there are {', '.join(sorted(CALL_OPTIONS))}")
    if options.get("relu") == "negative":
        raise ValueError(
            f"`relu` of {name} is 'negative', but a trust report tries out the evidence for a class, not that against "
            "it: leave `relu` out, or explain with `relu=False` for both in one map"
        )
    if options.get("comparison_idx") is not None:
        raise ValueError(
            f"`comparison_idx` of {name} is {options['comparison_idx']!r}, but a trust report tries out maps of other "
            "classes as well, which have other references: leave `comparison_idx` out"
        )


def _as_masks(masks: Any, image: Tensor) -> Tensor:
    """Check the masks, and put them where the inputs are."""
    if not isinstance(masks, Tensor) and not hasattr(masks, "__array__"):
        raise TypeError(f"`masks` must be a tensor or an array (N, *spatial), got {type(masks).__name__}")
    found = torch.as_tensor(masks)
    shape = (len(image), *image.shape[2:])
    if tuple(found.shape) != shape:
        raise ValueError(
            f"`masks` must hold one for each of the {len(image)} inputs, of their size, {shape}, got "
            f"{tuple(found.shape)}"
        )
    return found.detach().to(image.device)


def _judged(name: str, value: float, higher_is_better: bool = True) -> Literal["passed", "doubtful", "failed"]:
    passed, failed = THRESHOLDS[name]
    sign = 1 if higher_is_better else -1
    if sign * value >= sign * passed:
        return "passed"
    return "failed" if not sign * value >= sign * failed else "doubtful"


def _one(maps: Tensor | str, sample: int) -> Tensor | str:
    return maps if isinstance(maps, str) else maps[sample]


def _agreement(cam: Tensor, others: Mapping[str, Tensor | str]) -> Check:
    """Compare a map (*grid) with those of other methods."""
    values, failures = {}, []
    for name, other in others.items():
        if isinstance(other, str):
            failures.append(f"{name} has none ({other.split('. ')[0].rstrip('.')})")
            continue
        if bool(is_constant(*other.flatten().aminmax())):
            failures.append(f"that of {name} is blank")
            continue
        shape = [max(sides) for sides in zip(cam.shape, other.shape, strict=True)]
        first, second = (resize(m[None, None].float(), shape)[0] for m in (cam, other))
        value = float(spearman(first, second))
        if not math.isnan(value):
            values[name] = value
    without = f" Left out: {'; '.join(failures)}." if failures else ""
    if not values:
        return Check("agreement", "left out", f"There is no other map to compare with.{without}")
    mean = sum(values.values()) / len(values)
    outcome = _judged("agreement", mean)
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    message = {
        "passed": "Other methods say the same",
        "doubtful": "Other methods say something else in part",
        "failed": "Other methods say something else",
    }[outcome]
    return Check("agreement", outcome, f"{message} (rank correlation: {numbers}).{without}", values)


# What the maps show.

_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_RARELY = "Objects are rarely there; watermarks, frames and marks of the scanner are."


def _remarks(cams: Tensor, masks: Tensor | None, image: Tensor) -> list[list[str]]:
    """Say what each map shows that is worth a second look."""
    full = resize(cams.unsqueeze(1), image.shape[2:]).squeeze(1)
    remarks: list[list[str]] = [[] for _ in full]
    spatial = full.shape[1:]
    frame = torch.ones(spatial, dtype=torch.bool, device=full.device)
    frame[tuple(slice(max(1, side // 10), side - max(1, side // 10)) for side in spatial)] = False
    share = float(frame.float().mean())
    ends = [(slice(0, max(1, side // 4)), slice(side - max(1, side // 4), side)) for side in spatial]
    for sample, cam in enumerate(full):
        cam = cam.relu()
        total = float(cam.sum())
        if not 0 < total < math.inf:
            continue
        at_border = float(cam[frame].sum()) / total
        in_corner, corner = max((float(cam[end].sum()) / total, i) for i, end in enumerate(itertools.product(*ends)))
        if len(spatial) == 2 and in_corner > 0.4:
            remarks[sample].append(
                f"It looks at a corner: {in_corner:.0%} of the map lies in the {_CORNERS[corner]} sixteenth of the "
                f"input. {_RARELY}"
            )
        elif at_border > max(0.6, 1.5 * share):
            remarks[sample].append(
                f"It looks at the border: {at_border:.0%} of the map lies in the outer tenth of the input, which is "
                f"{share:.0%} of its area. {_RARELY}"
            )
        if masks is None:
            continue
        metric = Localization()
        metric.update(image[sample : sample + 1], masks=masks[sample : sample + 1], maps=cam.unsqueeze(0))
        if not int(metric.total):
            continue
        values = {key: float(value) for key, value in metric.compute().items()}
        area = float((masks[sample] != 0).float().mean())
        if values["energy"] < 1 / 3 and not values["pointing_game"]:
            remarks[sample].append(
                f"It looks past the object: {values['energy']:.0%} of the map lies on it, which is {area:.0%} of the "
                "area, and the peak lies beside it. The class was recognised by something else, in the main."
            )
    return remarks


def _common_remarks(cams: Tensor) -> list[str]:
    """Say what the maps of several inputs have in common."""
    flat = cams.flatten(1)
    flat = flat[flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))]
    if len(flat) < 3:
        return []
    count = max(1, flat.shape[1] // 10)
    top = torch.zeros_like(flat).scatter_(1, flat.topk(count, dim=1).indices, 1.0)
    shared = top @ top.T / count
    alike = float((shared.sum() - shared.diagonal().sum()) / (len(flat) * (len(flat) - 1)))
    if alike <= 0.6:
        return []
    remark = (
        f"They all look at the same place: two inputs share {alike:.0%} of the positions that their maps rank highest. "
        "Unless the inputs are aligned, such as portraits or scans, the model has learned a place and not a thing."
    )
    return [remark]


def _picture(sample: Tensor) -> Image.Image | None:
    """Show an input (C, H, W), stretched to the whole range unless it is in [0, 1]."""
    if sample.ndim != 3:
        return None
    pixels = torch.nan_to_num(to_float(sample))
    pixels = pixels if len(pixels) == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    lowest, highest = pixels.amin(), pixels.amax()
    if lowest < 0 or highest > 1:
        pixels = (pixels - lowest) / (highest - lowest).clamp(min=1e-12)
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


# The report.

_COUNTED: dict[Verdict, str] = {
    "believe": "can be believed",
    "with care": "should be taken with care",
    "do not believe": "should not be believed",
}

_PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1d21; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e9eb; } }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
"""

_STYLE = """
.torchcam-trust { color: inherit; }
.torchcam-trust h1 { font-size: 1.1rem; font-weight: 600; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.torchcam-trust h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.torchcam-trust .verdict { font-size: 1.15rem; font-weight: 600; margin: 0 0 .6rem; padding: .6rem .8rem;
  border-left: .4rem solid; border-radius: .3rem; background: rgb(128 128 128 / .12); }
.torchcam-trust .believe { border-color: #1a7f5a; }
.torchcam-trust .care { border-color: #c98a00; }
.torchcam-trust .not { border-color: #c2361b; }
.torchcam-trust .remark { margin: .5rem 0; padding: .5rem .8rem; border: 1px solid #c98a00; border-radius: .3rem; }
.torchcam-trust .remark::before { content: "! "; font-weight: 700; }
.torchcam-trust section { margin: 1.2rem 0; padding-top: 1rem; border-top: 1px solid rgb(128 128 128 / .4); }
.torchcam-trust .row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.torchcam-trust .pictures { display: flex; gap: .5rem; flex: 0 1 24rem; }
.torchcam-trust figure { margin: 0; flex: 1 1 0; min-width: 6rem; }
.torchcam-trust img { display: block; width: 100%; height: auto; border-radius: .3rem; }
.torchcam-trust figcaption { font-size: .85rem; opacity: .8; }
.torchcam-trust .text { flex: 1 1 22rem; min-width: 0; }
.torchcam-trust table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.torchcam-trust th, .torchcam-trust td { text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0; }
.torchcam-trust th { font-weight: 600; min-width: 6rem; }
.torchcam-trust tr + tr { border-top: 1px solid rgb(128 128 128 / .25); }
.torchcam-trust .outcome { white-space: nowrap; }
.torchcam-trust .failed { color: #c2361b; }
.torchcam-trust .doubtful { color: #9a6a00; }
.torchcam-trust .passed { color: #1a7f5a; }
@media (prefers-color-scheme: dark) {
  .torchcam-trust .failed { color: #ff8a70; }
  .torchcam-trust .doubtful { color: #f0b93a; }
  .torchcam-trust .passed { color: #5fd0a3; }
}
.torchcam-trust details { margin-top: 1.2rem; font-size: .92rem; }
.torchcam-trust summary { cursor: pointer; font-weight: 600; }
"""


def _css(verdict: Verdict) -> str:
    return {"believe": "believe", "with care": "care", "do not believe": "not"}[verdict]


def _section(item: PredictionTrust, edge: int, alone: bool) -> str:
    pictures = ""
    if item.picture is not None and item.cam.ndim == 2:
        cam = item.cam.float()
        over = overlay_map(item.picture.convert("RGB"), cam.numpy(), signed=bool((cam < 0).any()))
        for picture, caption in ((item.picture.convert("RGB"), "input"), (over, "map")):
            uri = data_uri(fitted(picture, edge))
            pictures += f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        pictures = f'<div class="pictures">{pictures}</div>'
    rows = "".join(
        f'<tr><td class="outcome {check.outcome.replace(" ", "-")}">{_MARKS[check.outcome]} {check.outcome}</td>'
        f"<th>{html.escape(check.name)}</th><td>{html.escape(check.message)}</td></tr>"
        for check in item.checks
    )
    remarks = "".join(f'<p class="remark">{html.escape(remark)}</p>' for remark in item.remarks)
    verdict = f'<p class="verdict {_css(item.verdict)}">{_WORDS[item.verdict]}</p>'
    return (
        f"<section><h2>{html.escape(item.title)}</h2>{'' if alone else verdict}{remarks}"
        f'<div class="row">{pictures}<div class="text"><table>{rows}</table></div></div></section>'
    )


_EXPLAINED = {
    "evidence": "by how much the probability falls when the input is blurred or painted over, at least",
    "weights": "rank correlation with the maps of randomised models, at most",
    "class": "cosine between the maps of the two best classes, at most",
    "deletion and insertion": "share of random maps that the map does better than, at least",
    "removal": "the same with ROAD, at least",
    "agreement": "mean rank correlation with the maps of other methods, at least",
}


def _explanations() -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td>{_EXPLAINED[name]}</td><td>{passed:g}</td><td>{failed:g}</td></tr>"
        for name, (passed, failed) in THRESHOLDS.items()
    )
    return (
        "<p>A map is not believed if its diagnosis, the evidence or the weights fail, or both deletion and insertion "
        "and removal. It is taken with care if anything else fails, or two checks are doubtful.</p>"
        f"<table><tr><th></th><td>what is measured</td><td>passed</td><td>failed beyond</td></tr>{rows}</table>"
    )


def _wrapped(text: str, head: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


make_callable(__name__)
