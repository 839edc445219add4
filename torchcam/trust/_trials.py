"""Trials of maps: the passes, the maps and the metrics of a trust report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._checks import callable_object, positive_integer, torch_module
from torchcam._methods import CALL_OPTIONS, by_method, find_method, takes
from torchcam._pictures import to_picture
from torchcam._replica import replicated
from torchcam._tensors import blurred_out, is_constant, over_channels, resize, to_float
from torchcam.layers import TargetLayer
from torchcam.methods import MeanActivation
from torchcam.methods.core import on_replica, plain_tensors
from torchcam.metrics import ROAD, DeletionInsertionMetric, Localization, SanityCheck
from torchcam.metrics._statistics import energy, spearman
from torchcam.metrics.core import CAMMetric, as_image, check_seed, explaining, run_to_explain
from torchcam.metrics.localization import _checked_mask
from torchcam.targets import ClassIndex, Selector, read_logits

from . import _verdicts as verdicts
from ._report import PredictionTrust, TrustReport
from ._verdicts import Check

__all__ = ["trust"]

Layers = TargetLayer | Sequence[TargetLayer] | None


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
    """Try out the maps of one prediction or of several, and report in words whether to believe them.

    The trials of each prediction:

    * *diagnosis*: is the map blank, NaN or inverted (see :meth:`_CAM.diagnose`)?
    * *evidence*: does the probability of the class fall when the input is blurred, or painted in its mean colour or its
      mean grey? If not, there is nothing to explain, as in a model without training.
    * *weights*: does the map change when the model's weights are randomised (:class:`torchcam.metrics.SanityCheck`)?
    * *class*: is the map of another class different?
    * *deletion and insertion*, *removal*: does the probability fall faster, and rise earlier, when pixels go in the
      order of the map than in the order of random maps, and of the mean activation
      (:class:`torchcam.metrics.DeletionInsertionMetric`, :class:`torchcam.metrics.ROAD`)?
    * *agreement*: do the maps of other methods rank the positions alike?

    ``THRESHOLDS`` holds the limits. Beside the verdict there are remarks on what a map shows, whether or not it is
    right: that it looks at the border, at the same place in each input, or, with ``masks``, past the object. The map of
    a model that has learned a shortcut is to be believed; the remarks report the shortcut.

    Cost: for each prediction about ``(num_random + 2) * (2 * steps + 7)`` forward passes, and a map for each of the
    model's stages. All of it runs on a replica: a copy of the modules that shares the parameters. The model itself is
    not run and not changed.

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
        methods: the method to judge, by class or name, and those to compare it with; repeated methods are ignored
        target_layer: the target layer(s), as the methods take them; or a mapping from methods to them
        method_kwargs: further arguments of the methods' constructors, in a mapping from methods
        call_kwargs: arguments of the methods' calls, ``relu`` (but not ``"negative"``, as the trials are about the
            evidence for a class), ``eps`` and ``target_shape``, in a mapping from methods
        masks: where the object is, (N, *spatial) of the input's size, booleans or integers in a tensor or an array
        images: the pictures to show; by default the inputs, if they are images
        class_names: the names of the classes
        to_probabilities: function from the scores (N, classes) to probabilities; by default a softmax, or a sigmoid of
            a single score
        num_random: the number of random maps to compare with
        steps: the number of steps of deletion and insertion
        seed: seed of the random maps and weights; the global random state is left alone
        batch_size: largest number of inputs in one pass

    Returns:
        the report

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if there is no input or no method, an argument is for a method that is not in ``methods``, an
            argument's length does not fit, or the scores are not (N, classes)
    """
    classes = _as_methods(methods)
    names = [method.__name__ for method in classes]
    if not isinstance(target_layer, Mapping):
        target_layer = dict.fromkeys(names, target_layer)
    layers = by_method("target_layer", target_layer, names)
    constructor_options = _by_methods("method_kwargs", method_kwargs, names)
    call_options = _by_methods("call_kwargs", call_kwargs, names)
    for name, options in call_options.items():
        _check_call(name, options)
    torch_module("model", model)
    callable_object("to_probabilities", to_probabilities, optional=True)
    check_seed(seed)
    for argument, value in (("num_random", num_random), ("steps", steps), ("batch_size", batch_size)):
        positive_integer(argument, value)
    image = as_image(input_tensor)
    if images is not None and len(images) != len(image):
        raise ValueError(f"`images` must hold one for each of the {len(image)} inputs, got {len(images)}")
    masks = None if masks is None else _checked_mask(masks, image)
    layer_names = {module: name for name, module in model.named_modules()}

    with replicated(model) as replica:
        trials = _Trials(replica, image, class_idx, to_probabilities, num_random, steps, seed, batch_size)
        num_classes = trials.probabilities.shape[1]
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"`class_names` has {len(class_names)} names, but the model gives scores of {num_classes} classes"
            )

        def make(method: type[Any]) -> Any:
            options = {"target_layer": layers.get(method.__name__), **constructor_options.get(method.__name__, {})}
            if takes(method, "input_shape"):
                options.setdefault("input_shape", tuple(image.shape[1:]))
            # The modules of the replica have the same names.
            named = {key: _named(value, layer_names) for key, value in options.items()}
            return _with_options(method, call_options.get(method.__name__, {}))(replica, **named)

        with make(classes[0]) as extractor:
            judged = repr(extractor)
            signed = call_options.get(names[0], {}).get("relu") is False
            checks, cams = trials.judge(extractor, signed=signed)
        others: dict[str, Tensor | str] = {}
        for method in classes[1:]:
            try:
                with make(method) as extractor:
                    others[method.__name__] = trials.maps(extractor)
            except (ValueError, RuntimeError) as error:
                others[method.__name__] = f"{type(error).__name__}: {error}"
    items = []
    for sample, (index, cam) in enumerate(zip(trials.classes, cams, strict=True)):
        compared = {name: other if isinstance(other, str) else other[sample] for name, other in others.items()}
        mask = None if masks is None else masks[sample : sample + 1]
        items.append(
            PredictionTrust(
                class_idx=index,
                class_name=None if class_names is None else class_names[index],
                probability=float(trials.probability[sample]),
                checks=(*checks[sample], verdicts.check_agreement(*_correlations(cam, compared))),
                remarks=tuple(_remarks(cam, mask, image[sample : sample + 1])),
                cam=cam.cpu(),
                picture=_picture(image[sample]) if images is None else images[sample],
            )
        )
    remark = verdicts.remark_on_common_place(_shared_positions(cams))
    return TrustReport(items, judged, type(model).__name__, tuple(others), [remark] if remark else [])


@dataclass
class _Trials:
    """The trials of the maps of some predictions of a model.

    Attributes:
        model: the model, a replica that only these trials run
        image: the inputs, (N, C, *spatial)
        class_idx: the class to explain, for all inputs or one for each; None for the predicted one
        to_probabilities: function from the scores (N, classes) to probabilities; None for the default
        num_random: the number of random maps
        steps: the number of steps of deletion and insertion
        seed: seed of the random maps and weights
        batch_size: largest number of inputs in one pass
        probabilities: the probabilities of all classes, (N, K)
        classes: the explained class of each input
        probability: the probability of the explained class, (N,)
    """

    model: nn.Module
    image: Tensor
    class_idx: ClassIndex | None
    to_probabilities: Callable[[Tensor], Tensor] | None
    num_random: int
    steps: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        self.probabilities = self._predict(self.image)
        chosen = self.probabilities.argmax(1) if self.class_idx is None else self.class_idx
        indices = Selector(chosen, None, len(self.image)).indices(self.probabilities)
        if indices.ndim > 1:
            raise ValueError(f"`class_idx` must name one class for each input, got {self.class_idx!r}")
        self.classes: list[int] = indices.tolist()
        self.probability = self._of_classes(self.probabilities)

    def scores(self, output: Any) -> Tensor:
        """Return the probabilities (N, K) in an output of the model."""
        logits = read_logits(output)
        logits = to_float(logits.reshape(-1, 1) if logits.ndim < 2 else logits)
        if logits.ndim != 2:
            raise ValueError(f"the model must give class scores (N, classes), got {tuple(logits.shape)}")
        if self.to_probabilities is not None:
            return self.to_probabilities(logits)
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)

    def _predict(self, image: Tensor) -> Tensor:
        with replicated(self.model) as model, torch.inference_mode():
            parts = [self.scores(model(part)) for part in torch.split(image, self.batch_size)]
        return torch.cat(parts).clone()

    def _of_classes(self, probabilities: Tensor) -> Tensor:
        indices = torch.tensor(self.classes, device=probabilities.device)
        return probabilities.gather(1, indices.unsqueeze(1)).squeeze(1)

    def _batches(self) -> Iterator[tuple[Tensor, list[int]]]:
        for start in range(0, len(self.image), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self.image[batch], self.classes[batch]

    def maps(self, extractor: Any) -> Tensor:
        """Return the maps of an extractor, (N, *grid)."""
        parts = []
        for image, classes in self._batches():
            with plain_tensors(), explaining(extractor, None) as own:
                output = run_to_explain(own, image)
                parts.append(to_float(own.fuse_cams(own(classes, output)).detach()))
        maps = torch.cat(parts)
        return over_channels(maps) if maps.ndim == self.image.ndim else maps

    def judge(self, extractor: Any, *, signed: bool) -> tuple[list[list[Check]], Tensor]:
        """Try out the maps of an extractor, which may be signed.

        Returns:
            the checks of each sample, and the maps (N, *grid)
        """
        cams = self.maps(extractor)
        evidence, baselines = self._evidence()
        checks = [list(pair) for pair in zip(self._diagnosis(extractor, signed=signed), evidence, strict=True)]
        flat = cams.flatten(1)
        usable = flat.isfinite().all(1) & ~is_constant(flat.amin(1), flat.amax(1))
        active = self._mean_activation(extractor)
        sanity = SanityCheck(extractor, seed=self.seed, batch_size=self.batch_size)
        for sample in usable.nonzero().flatten().tolist():
            checks[sample] += self._sanity(sanity, sample)
            checks[sample] += self._faithfulness(sample, cams, active, baselines[sample])
        return checks, cams

    def _diagnosis(self, extractor: Any, *, signed: bool) -> list[Check]:
        """Diagnose the map of each sample."""
        checks = []
        for image, classes in self._batches():
            with plain_tensors(), on_replica(extractor) as own:
                own.model(image)
                findings = own.diagnose(classes)
            size = len(classes)
            checks += [verdicts.check_diagnosis(findings, row, size, signed=signed) for row in range(size)]
        return checks

    def _evidence(self) -> tuple[list[Check], list[Tensor]]:
        """Remove the content of each input in three ways; return also the result with the lowest probability."""
        means = [self.image.mean(tuple(range(first, self.image.ndim)), keepdim=True) for first in (2, 1)]
        without = [blurred_out(self.image), *(mean.expand_as(self.image) for mean in means)]
        found = torch.stack([self._of_classes(self._predict(image)) for image in without])
        lowest, strongest = found.min(0)
        checks = map(verdicts.check_evidence, self.probability.tolist(), lowest.tolist())
        return list(checks), [without[kind][sample] for sample, kind in enumerate(strongest.tolist())]

    def _sanity(self, metric: SanityCheck, sample: int) -> list[Check]:
        """Compare the map with those of randomised models, and with that of another class."""
        values = self._measured(metric, sample)
        rank = values["rank_correlation"]
        return [
            verdicts.check_weights(rank, values["ssim"], len(metric.layers)),
            verdicts.check_class(values["class_overlap"], finite=not math.isnan(rank)),
        ]

    def _mean_activation(self, extractor: Any) -> Tensor | None:
        """Return the mean activations of the layers of an extractor, if it has any."""
        try:
            with MeanActivation(
                self.model, extractor.target_names, reshape_transform=extractor.reshape_transform
            ) as active:
                return self.maps(active)
        except (ValueError, RuntimeError):
            return None

    def _faithfulness(self, sample: int, cams: Tensor, active: Tensor | None, baseline: Tensor) -> list[Check]:
        """Score the map, random maps and the mean activation by what happens when pixels go in their order."""
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.rand((self.num_random, *cams.shape[1:]), generator=generator).to(cams)
        deletion = DeletionInsertionMetric(
            self.model,
            self.scores,
            steps=self.steps,
            baseline=baseline.unsqueeze(0),
            batch_size=self.batch_size,
        )
        removal = ROAD(self.model, self.scores, seed=self.seed, batch_size=self.batch_size)

        def area(cam: Tensor) -> float:
            values = self._measured(deletion, sample, cam)
            return values["insertion_auc"] - values["deletion_auc"]

        def road(cam: Tensor) -> float:
            return self._measured(removal, sample, cam)["road"]

        return [
            verdicts.check_faithfulness(
                name,
                measure(cams[sample]),
                [measure(cam) for cam in random],
                None if active is None else measure(active[sample]),
            )
            for name, measure in (("deletion and insertion", area), ("removal", road))
        ]

    def _measured(self, metric: CAMMetric, sample: int, cam: Tensor | None = None) -> dict[str, float]:
        """Measure the map of one sample, by default the one that the metric makes."""
        metric.reset()
        maps = None if cam is None else cam.unsqueeze(0)
        metric.update(self.image[sample : sample + 1], self.classes[sample], maps=maps)
        return {key: float(value) for key, value in metric.compute().items()}


# Arguments.


def _as_methods(given: Sequence[type[Any] | str]) -> list[type[Any]]:
    """Return the classes of the methods, each once."""
    if isinstance(given, (str, type)):
        given = [given]
    found = list(dict.fromkeys(find_method(method, "methods") for method in given))
    if not found:
        raise ValueError("`methods` is empty: name the method whose maps are to be judged")
    return found


def _by_methods(argument: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return a mapping from methods as a mapping from their names."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`{argument}` must be a mapping from methods to arguments, got {type(given).__name__}")
    return by_method(argument, given or {}, names)


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


def _named(value: Any, names: Mapping[nn.Module, str]) -> Any:
    """Replace a module with its name, also in a list."""
    if isinstance(value, (list, tuple)) and any(isinstance(entry, nn.Module) for entry in value):
        return [_named(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, nn.Module) else value


# Numbers about maps.


def _correlations(cam: Tensor, others: Mapping[str, Tensor | str]) -> tuple[dict[str, float], list[str]]:
    """Correlate the ranks in a map (*grid) with those in the maps of other methods.

    Args:
        cam: the map
        others: the maps, or the errors in their place

    Returns:
        the correlations, and why there are no others
    """
    values, missing = {}, []
    for name, other in others.items():
        if isinstance(other, str):
            missing.append(f"{name} has none ({other.split('. ')[0].rstrip('.')})")
            continue
        if is_constant(*other.flatten().aminmax()):
            missing.append(f"that of {name} is blank")
            continue
        shape = [max(sides) for sides in zip(cam.shape, other.shape, strict=True)]
        first, second = (resize(m[None, None].float(), shape)[0] for m in (cam, other))
        value = float(spearman(first, second))
        if not math.isnan(value):
            values[name] = value
    return values, missing


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
        metric = Localization()
        metric.update(image, masks=mask, maps=cam)
        values, area = metric.summary(), float(mask.float().mean())
        remarks.append(verdicts.remark_on_object(values["energy"], values["pointing_game"], area))
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
