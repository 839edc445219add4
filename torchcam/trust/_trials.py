"""Trials of maps: the passes and the numbers of a trust report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._checks import callable_object, positive_integer, torch_module
from torchcam._methods import CALL_OPTIONS, by_method, find_methods
from torchcam._passes import Call
from torchcam._pictures import to_picture
from torchcam._recipes import Recipe, as_recipes, extractors_on
from torchcam._recommended import COMPARED, Recommended, compared
from torchcam._replica import replicated
from torchcam._tensors import blurred_out, is_constant, over_positions, resize, to_float
from torchcam.layers import TargetLayer
from torchcam.metrics._statistics import descending_ranks, energy, pearson
from torchcam.metrics.core import as_image, check_positions, explaining, run_to_explain
from torchcam.metrics.localization import _checked_mask
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, read_logits

from . import _verdicts as verdicts
from ._report import PredictionTrust, TrustReport
from ._verdicts import Check

Layers = TargetLayer | Sequence[TargetLayer] | None

WINDOWS = {1: 32, 2: 8, 3: 4}
"""The number of windows along each axis, by the number of axes. Each is twice as long as the distance to the next."""
REGION = 0.1
"""The share of the positions that are shown alone."""


def trust(
    model: nn.Module,
    input_tensor: Tensor,
    class_idx: ClassIndex | None = None,
    *,
    targets: OutputTarget | Sequence[OutputTarget] | None = None,
    methods: Sequence[type[Any] | str] | None = None,
    target_layer: Layers | Mapping[Any, Layers] = None,
    method_kwargs: Mapping[Any, Mapping[str, Any]] | None = None,
    call_kwargs: Mapping[Any, Mapping[str, Any]] | None = None,
    masks: Any = None,
    images: Sequence[Image.Image] | None = None,
    class_names: Sequence[str] | None = None,
    to_probabilities: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> TrustReport:
    r"""Try out the maps of one prediction or of several, and report in words whether to believe them.

    The trials of each prediction:

    * *diagnosis*: is the map blank, NaN or inverted (see :meth:`_CAM.diagnose`)?
    * *evidence*: does the probability of the class fall when the input is blurred, or painted in its mean colour or its
      mean grey, or one window of it is? If not, there is nothing to explain, as in a model without training.
    * *removal*: does the map foretell how far the score falls when a window of the input is removed? There are 8 by 8
      windows for an image, overlapping, a quarter of its sides long, and each is replaced by what removed the most
      evidence from the whole input. The check is the correlation, over the windows :math:`w`, of the map's mean
      :math:`\bar m_w` with the fall of the log-odds
      :math:`\log p(x) / (1 - p(x)) - \log p(x_{\setminus w}) / (1 - p(x_{\setminus w}))`.
    * *region*: with the tenth of the positions that the map ranks highest, and nothing else, is the class more probable
      than the next best one? The check is the difference of their log-odds.

    With ``targets``, the score takes the place of the log-odds, and there is no other class to compare with.

    ``THRESHOLDS`` holds the limits, ``RELIABILITY`` how often each verdict was right where the truth is known. Beside
    the verdict there are remarks on what a map shows, whether or not it is right: that it looks at the border, at the
    same place in each input, or, with ``masks``, past the object. The map of a model that has learned a shortcut is to
    be believed; the remarks report the shortcut. Where a map is not to be believed, the removal tries the maps of the
    other methods as well, and says which one does better.

    Cost: for each prediction the map, its diagnosis and about 70 forward passes, or 4 if the diagnosis has decided; the
    report says how many there were. The other methods' maps are made
    where the first is not to be believed. All of it runs on a replica, a copy of the modules that shares parameters:
    the model itself is not run and not changed.

    Example:
        >>> from torchcam.demo import load_model, sample_images
        >>> from torchcam.trust import trust
        >>> report = trust(load_model(), sample_images()[0].to_tensor(), target_layer="layer4")
        >>> report.verdict
        'believe'

    Args:
        model: the model
        input_tensor: the inputs, (N, C, *spatial)
        class_idx: the class to explain, for all inputs or one for each; by default the predicted one
        targets: in place of ``class_idx``, a callable (or one for each input) from one input's output to a scalar, such
            as those of :mod:`torchcam.targets`
        methods: the method to judge, by class or name, and those to compare it with; repeated methods are ignored. By
            default ``GradCAM``, compared with ``LayerCAM`` and ``ReciproCAM`` and, without ``target_layer``, with what
            the leaderboard found best for the kind of model: for transformers ``HiResCAM`` with balanced gradients
        target_layer: the target layer(s), as the methods take them; or a mapping from methods to them
        method_kwargs: further arguments of the methods' constructors, in a mapping from methods
        call_kwargs: arguments of the methods' calls, ``relu`` (but not ``"negative"``, as the trials are about the
            evidence for a score), ``eps`` and ``target_shape``, in a mapping from methods
        masks: where the object is, (N, *spatial) of the input's size, booleans or integers in a tensor or an array
        images: the pictures to show; by default the inputs, if they are images
        class_names: the names of the classes
        to_probabilities: function from the scores (N, classes) to probabilities; by default a softmax, or a sigmoid of
            a single score
        batch_size: largest number of inputs in one pass

    Returns:
        the report

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if there is no input or no method, an argument is for a method that is not in ``methods``, an
            argument's length does not fit, both ``class_idx`` and ``targets`` are given, or the scores are not
            (N, classes)
    """
    torch_module("model", model)
    image = as_image(input_tensor)
    best = compared(model, image[:1]) if methods is None and target_layer is None else {}
    classes = find_methods(list(best) or COMPARED if methods is None else methods, "methods")
    if not classes:
        raise ValueError("`methods` is empty: name the method whose maps are to be judged")
    callable_object("to_probabilities", to_probabilities, optional=True)
    positive_integer("batch_size", batch_size)
    if class_idx is not None and targets is not None:
        check_one_of(class_idx, targets)
    if images is not None and len(images) != len(image):
        raise ValueError(f"`images` must hold one for each of the {len(image)} inputs, got {len(images)}")
    masks = None if masks is None else _checked_mask("masks", masks, image)
    calls = by_method("call_kwargs", call_kwargs, [method.__name__ for method in classes])
    recipes = []
    for recipe in as_recipes({method.__name__: method for method in classes}, target_layer, method_kwargs, None):
        name, options = recipe.name, {**recipe.call_options, **calls.get(recipe.name, {})}
        _check_call(name, options)
        usual = best.get(name, Recommended(name, recipe.target_layer))
        arguments = {**usual.method_kwargs, **recipe.options}
        recipes.append(Recipe(name, _with_options(recipe.method, options), usual.target_layer, arguments, options))

    trials = _Trials(model, image, class_idx, targets, to_probabilities, batch_size)
    if class_names is not None and trials.num_classes not in {None, len(class_names)}:
        raise ValueError(
            f"`class_names` has {len(class_names)} names, but the model gives scores of {trials.num_classes} classes"
        )
    checks, cams = trials.judge(recipes)
    items = []
    for sample, cam in enumerate(cams):
        index = None if trials.classes is None else trials.classes[sample]
        mask = None if masks is None else masks[sample : sample + 1]
        items.append(
            PredictionTrust(
                class_idx=index,
                class_name=None if class_names is None or index is None else class_names[index],
                probability=float(trials.values[sample, 0]),
                checks=tuple(checks[sample]),
                remarks=tuple(_remarks(cam, mask, image[sample : sample + 1])),
                cam=cam.cpu(),
                picture=_picture(image[sample]) if images is None else images[sample],
                target=_target_name(trials.select.targets[sample]) if trials.is_score else None,
                completeness=trials.completeness[sample],
            )
        )
    remark = verdicts.remark_on_common_place(_shared_positions(cams))
    return TrustReport(
        items,
        trials.judged,
        type(model).__name__,
        [recipe.name for recipe in recipes[1:]],
        [remark] if remark else [],
        trials.num_passes,
    )


class _Trials:
    """What is asked about each input, how a model answers it, and the trials of the maps.

    Attributes:
        model: the model, of which replicas run
        image: the inputs, (N, C, *spatial)
        select: the scores of targets or classes
        is_score: whether the values are scores of targets, and not probabilities
        classes: the explained class of each input; None where targets are
        num_classes: the number of classes; None where targets are asked about
        values: what is asked about the inputs, (N, 1) or with the next best class (N, 2), float64
        num_passes: the number of inputs that the model was run on
        judged: the method of the maps that are judged, as it prints
        completeness: of each sample, once it is diagnosed, the share of the score at each layer of the map
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        class_idx: ClassIndex | None,
        targets: Any,
        to_probabilities: Callable[[Tensor], Tensor] | None,
        batch_size: int,
    ) -> None:
        self.model, self.image = model, image
        self.to_probabilities = to_probabilities
        self.num_passes = 0
        self.judged = ""
        self.completeness: list[dict[str, float]] = []
        self.is_score = targets is not None
        self.classes: list[int] | None = None
        self.num_classes: int | None = None
        self._batch_size = batch_size
        if self.is_score:
            self.select = Selector(None, targets, len(image))
            self.values = self.ask(image, self.samples)
            return
        probabilities = self._run(image, len(image), lambda output, _rows: self._probabilities(output))
        self.select = Selector(probabilities.argmax(1) if class_idx is None else class_idx, None, len(image))
        asked = self.select.indices(probabilities)
        if asked.ndim > 1:
            raise ValueError(f"`class_idx` must name one class for each input, got {class_idx!r}")
        self.classes, self.num_classes = asked.tolist(), probabilities.shape[1]
        self._columns = asked.unsqueeze(1)
        if self.num_classes > 1:
            others = probabilities.scatter(1, self._columns, -1.0)
            self._columns = torch.cat([self._columns, others.argmax(1, keepdim=True)], 1)
        self.values = probabilities.gather(1, self._columns)

    @property
    def samples(self) -> Tensor:
        """The numbers of the inputs, (N,)."""
        return torch.arange(len(self.image), device=self.image.device)

    def ask(self, images: Tensor | Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """Run the model on variants of the inputs.

        Args:
            images: the variants, (B, C, *spatial), or a function from the numbers of some of them to those
            samples: the input that each variant is of, (B,)

        Returns:
            the probability of the asked class and of the next best one, or the score of the target: (B, 1 or 2)
        """
        return self._run(images, len(samples), lambda output, rows: self._read(output, samples[rows]))

    def strength(self, values: Tensor) -> Tensor:
        """Return the log-odds of probabilities; the scores of targets as they are."""
        return values if self.is_score else torch.logit(values, eps=1e-12)

    def _read(self, output: Any, samples: Tensor) -> Tensor:
        if self.is_score:
            return self.select.by_target(output, samples).double().unsqueeze(1)
        return self._probabilities(output).gather(1, self._columns[samples])

    def _probabilities(self, output: Any) -> Tensor:
        """Return the probabilities (B, K) in an output of the model."""
        logits = read_logits(output).double()  # where a probability is nearly 1, its log-odds take all digits
        logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
        if logits.ndim != 2:
            raise ValueError(
                f"the model must give class scores (N, classes), got {tuple(logits.shape)}: say by `targets` what is "
                "to be explained"
            )
        if self.to_probabilities is not None:
            return self.to_probabilities(logits)
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)

    def _run(
        self, images: Tensor | Callable[[Tensor], Tensor], count: int, read: Callable[[Any, Tensor], Tensor]
    ) -> Tensor:
        """Run the model on ``count`` inputs, and read its output for the rows of each pass."""
        if not count:
            return self.values[:0]
        chunks = torch.split(torch.arange(count, device=self.image.device), self._batch_size)
        with replicated(self.model) as model, torch.inference_mode():
            parts = [read(model(images[rows] if isinstance(images, Tensor) else images(rows)), rows) for rows in chunks]
        self.num_passes += count
        return torch.cat(parts).clone()

    def judge(self, recipes: Sequence[Recipe]) -> tuple[list[list[Check]], Tensor]:
        """Try out the maps of a method.

        Args:
            recipes: the method, and those to compare it with

        Returns:
            the checks of each sample, and the maps (N, *grid)
        """
        diagnoses: list[Check] = []

        def diagnose(extractor: Any, size: int, asked: dict[str, Any]) -> None:
            findings = extractor.diagnose(**asked)
            self.judged, shares = repr(extractor), findings.completeness
            self.completeness.extend({layer: found[row] for layer, found in shares.items()} for row in range(size))
            signed = recipes[0].signed
            diagnoses.extend(verdicts.check_diagnosis(findings, row, size, signed=signed) for row in range(size))

        cams = self._maps(recipes[0], diagnose)
        flat = cams.flatten(1)
        empty = ~flat.isfinite().all(1) | is_constant(flat.amin(1), flat.amax(1))
        checks = [
            [verdicts.EMPTY if nothing and found.outcome != "failed" else found]  # of some methods it cannot know
            for nothing, found in zip(empty.tolist(), diagnoses, strict=True)
        ]
        lowest, baseline = self._without_content()
        sound = torch.tensor([found.outcome != "failed" for (found,) in checks], device=cams.device)
        samples = sound.nonzero().flatten()
        left = self._without_windows(baseline, samples)
        parts = lowest.clone()
        if len(samples):
            parts[samples] = torch.minimum(lowest[samples], left.amin(1))
        for sample, rest in enumerate(parts.tolist()):
            value, is_part = float(self.values[sample, 0]), rest < float(lowest[sample])
            checks[sample].append(verdicts.check_evidence(value, rest, is_part=is_part, is_score=self.is_score))
        undecided = [number for number, n in enumerate(samples.tolist()) if checks[n][1].outcome != "failed"]
        samples, left = samples[undecided], left[undecided]
        if not undecided:
            return checks, cams
        whole = self.strength(self.values[samples, 0])
        falls = whole.unsqueeze(1) - self.strength(left)
        largest = falls.amax(1) / (whole - self.strength(parts[samples]))
        found = self._foretold(cams[samples], falls)
        for row, check in enumerate(self._region(cams[samples], baseline[samples], samples)):
            removal = verdicts.check_removal(float(found[row]), float(largest[row]), falls.shape[1])
            checks[samples[row]] += [removal, check]
        doubted = [row for row, n in enumerate(samples.tolist()) if verdicts.verdict_of(checks[n]) != "believe"]
        others = self._compared(recipes[1:], samples, falls) if doubted else {}
        for row in doubted:
            values = {name: other if isinstance(other, str) else float(other[row]) for name, other in others.items()}
            checks[samples[row]][2] = verdicts.with_others(checks[samples[row]][2], values)
        return checks, cams

    def _maps(self, recipe: Recipe, diagnose: Callable[[Any, int, dict[str, Any]], None] | None = None) -> Tensor:
        """Return the maps of a method, (N, *grid); ``diagnose`` gets the extractor after each pass."""
        maps, model, image, select = [], self.model, self.image, self.select
        shape = tuple(image.shape[1:])
        scores = (Call((image[:1],), {}), select.of(self.samples[:1])) if self.is_score else None
        with replicated(model) as replica, extractors_on(replica, model, [recipe], shape, scores) as (extractor,):
            for rows in torch.split(self.samples, self._batch_size):
                with explaining(extractor, None) as own:
                    output = run_to_explain(own, image[rows])
                    asked = select.arguments(output, rows)
                    maps.append(to_float(own.fuse_cams(own(scores=output, **asked)).detach()))
                    check_positions(own, output)
                    if diagnose is not None:
                        diagnose(own, len(rows), asked)
        return over_positions(torch.cat(maps), image)

    def _without_content(self) -> tuple[Tensor, Tensor]:
        """Remove the content of each input in three ways: the lowest score, (N,), and the input that has it."""
        image = self.image
        means = [image.mean(tuple(range(first, image.ndim)), keepdim=True) for first in (2, 1)]
        without = torch.stack([blurred_out(image), *(mean.expand_as(image) for mean in means)])  # (3, N, C, *spatial)
        samples = self.samples
        asked = self.ask(without.flatten(0, 1), samples.repeat(3))[:, 0].reshape(3, len(image))
        lowest, strongest = asked.min(0)
        return lowest, without[strongest, samples]

    def _without_windows(self, baseline: Tensor, samples: Tensor) -> Tensor:
        """Remove one window after the other: the scores of each of the samples, (n, V)."""
        image = self.image
        axes = _windows(image.shape[2:], image.device)
        counts = [len(axis) for axis in axes]
        num = math.prod(counts)
        owners = samples.repeat_interleave(num)

        def without(rows: Tensor) -> Tensor:
            places = torch.unravel_index(rows % num, counts)
            hidden = torch.ones((len(rows), 1, *[1] * len(axes)), dtype=torch.bool, device=image.device)
            for number, (axis, place) in enumerate(zip(axes, places, strict=True)):
                side = [-1 if each == number else 1 for each in range(len(axes))]
                hidden = hidden & axis[place].reshape(len(rows), 1, *side)
            return torch.where(hidden, baseline[owners[rows]], image[owners[rows]])

        return self.ask(without, owners)[:, 0].reshape(-1, num)

    def _foretold(self, cams: Tensor, falls: Tensor) -> Tensor:
        """Correlate the means of maps (n, *grid) in the windows with the falls of the score, (n,)."""
        spatial = self.image.shape[2:]
        means = resize(cams.unsqueeze(1), spatial).squeeze(1).double()
        for axis in _windows(spatial, cams.device):  # the first spatial axis goes, and comes back as the last
            weights = axis.double() / axis.sum(1, keepdim=True)
            means = torch.tensordot(means, weights, dims=([1], [1]))
        return pearson(means.flatten(1), falls)

    def _region(self, cams: Tensor, baseline: Tensor, samples: Tensor) -> list[Check]:
        """Show only what the maps (n, *grid) rank highest, on the inputs without content."""
        image = self.image[samples]
        if self.values.shape[1] < 2:
            return [verdicts.NO_RIVAL] * len(samples)
        ranks = descending_ranks(resize(cams.unsqueeze(1), image.shape[2:]).squeeze(1))  # (n, positions)
        shown = (ranks < math.ceil(REGION * ranks.shape[1])).reshape(len(image), 1, *image.shape[2:])
        values = self.ask(torch.where(shown, image, baseline), samples)
        strength = self.strength(values)
        odds = (strength[:, 0] - strength[:, 1]).tolist()
        pairs = zip(values.tolist(), odds, strict=True)
        return [verdicts.check_region(asked, rival, odd) for (asked, rival), odd in pairs]

    def _compared(self, recipes: Sequence[Recipe], samples: Tensor, falls: Tensor) -> dict[str, Tensor | str]:
        """Return how well the maps of other methods foretell the falls, (n,), or why there are none."""
        found: dict[str, Tensor | str] = {}
        for recipe in recipes:
            try:
                found[recipe.name] = self._foretold(self._maps(recipe)[samples], falls)
            except (ValueError, RuntimeError) as error:
                found[recipe.name] = f"{type(error).__name__}: {error}"
        return found


def _windows(spatial: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return the windows along each axis as masks, (number, side)."""
    axes = []
    for side in spatial:
        number = min(WINDOWS[len(spatial)], side)
        length = max(2 * side // number, 1) if number > 1 else 1
        start = torch.linspace(0, side - length, number, device=device).round().unsqueeze(1)
        places = torch.arange(side, device=device)
        axes.append((places >= start) & (places < start + length))
    return axes


# Arguments.


def _check_call(name: str, options: Mapping[str, Any]) -> None:
    """Check that the options of a method's call ask for a map of the evidence for a class."""
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


def _with_options(method: type[Any], options: Mapping[str, Any]) -> type[Any]:
    """Return a method whose calls take some options by default."""
    calls = {name: partialmethod(getattr(method, name), **options) for name in ("__call__", "compute_cams")}
    return type(method.__name__, (method,), calls) if options else method


# Numbers about maps.


def _target_name(target: Any) -> str:
    """Return what a target is called: its representation, or the name of a function."""
    return str(getattr(target, "__name__", None) or repr(target))


def _remarks(cam: Tensor, mask: Tensor | None, image: Tensor) -> list[str]:
    """Return the remarks on where a map (*grid) of an input (1, C, *spatial) looks."""
    cam = resize(cam[None, None], image.shape[2:]).squeeze(1).relu()
    if not 0 < float(cam.sum()) < math.inf:
        return []

    sides = cam.shape[1:]
    masks = torch.zeros((1 + 2 ** len(sides), *sides), dtype=torch.bool, device=cam.device)
    masks[0] = True
    masks[0][tuple(slice(max(1, side // 10), side - max(1, side // 10)) for side in sides)] = False
    ends = [(slice(0, max(1, side // 4)), slice(side - max(1, side // 4), side)) for side in sides]
    for inside, corner in zip(masks[1:], itertools.product(*ends), strict=True):
        inside[corner] = True
    border, *corners = energy(cam.expand_as(masks), masks).tolist()
    border_area = float(masks[0].float().mean())
    remarks = [verdicts.remark_on_place(corners if len(sides) == 2 else [], border, border_area)]
    if mask is not None and mask.any():
        hit = float((mask & (cam == cam.amax())).any())
        remarks.append(verdicts.remark_on_object(float(energy(cam, mask)), hit, float(mask.float().mean())))
    return [remark for remark in remarks if remark]


def _shared_positions(cams: Tensor) -> float:
    """Return the share of the highest positions that two maps have in common, mean over all pairs; NaN for too few."""
    flat = cams.flatten(1)
    flat = flat[flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))]
    if len(flat) < 3:
        return math.nan
    count = max(1, flat.shape[1] // 10)
    top = torch.zeros_like(flat).scatter_(1, flat.topk(count, dim=1).indices, 1.0)
    shared = top @ top.T / count
    return float((shared.sum() - shared.diagonal().sum()) / (len(flat) * (len(flat) - 1)))


def _picture(sample: Tensor) -> Image.Image | None:
    """Return an input (C, *spatial) as a picture; None for signals and volumes."""
    return to_picture(sample) if sample.ndim == 3 and sample.is_floating_point() else None
