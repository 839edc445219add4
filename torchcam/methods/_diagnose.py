"""Why is this map blank, constant, NaN, inverted, the same for every class, or too coarse?"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._passes import Call, find_image, untouched
from torchcam._tensors import blurred_out, is_constant, map_tensors, resize, to_float
from torchcam.layers import Candidates, candidates
from torchcam.layout import Layout, has_consistent_stride
from torchcam.targets import ClassIndex, OutputTarget, Selector, check_one_of, class_scores, read_logits

from ._findings import CODES, Diagnosis, Finding, Severity, listed
from ._trace import GradientTrace, Trace, Watch

__all__ = ["CODES", "Diagnosis", "Finding", "diagnose", "of_samples"]


def diagnose(
    extractor: Any,
    class_idx: ClassIndex | None = None,
    *,
    targets: OutputTarget | Sequence[OutputTarget] | None = None,
) -> Diagnosis:
    """Look for what is wrong with the maps of the pass that an extractor has recorded.

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
    examination = _Examination(extractor)
    if examination.has_recorded():
        examination.repeat(class_idx, targets)
    return Diagnosis(
        repr(extractor), type(examination.model).__name__, examination.findings, examination.explained_classes
    )


def of_samples(samples: Sequence[int], count: int) -> str:
    """Give what the message of a finding about some of the samples begins with."""
    return f"{len(samples)} of {count} samples ({listed(samples)}): " if samples else ""


class _Examination:
    """One diagnosis as it is made.

    Attributes:
        findings: what was found so far
        explained_classes: the explained class of each sample, where classes are explained
    """

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.cam = getattr(extractor, "base_cam", extractor)  # whose hooks and recorded pass they are
        self.model: nn.Module = self.cam.model
        self.findings: list[Finding] = []
        self.explained_classes: list[int] | None = None
        self.reads_attention = hasattr(self.cam, "prefix_tokens")
        # Methods that look at the input, or at all attention, have their hooks on the model itself.
        self.has_layers = all(name in self.cam.submodule_dict for name in self.cam.target_names)
        self.looks_at_layers = self.has_layers and not self.reads_attention

    def add(
        self,
        code: str,
        message: str,
        advice: str,
        *,
        layer: str | None = None,
        samples: Sequence[int] = (),
        severity: Severity | None = None,
    ) -> None:
        """Note a finding; one about some samples of the batch says so."""
        if samples and len(samples) == self.batch_size:
            samples = ()
        message = of_samples(samples, self.batch_size) + message
        self.findings.append(Finding(code, severity or CODES[code], message, advice, layer, tuple(samples)))

    def found(self, *codes: str) -> bool:
        """Tell whether any of these was found."""
        return any(finding.code in codes for finding in self.findings)

    @property
    def batch_size(self) -> int:
        """The number of samples of the recorded pass."""
        recorded = next((a for a in self.cam._record.activations if a is not None), None)
        shape = self.cam._record.input_shape
        return shape[0] if shape is not None else 1 if recorded is None else len(recorded)

    # What was recorded.

    def has_recorded(self) -> bool:
        """Tell whether there is a pass to look at; if not, note why."""
        cam, record = self.cam, self.cam._record
        reached = any(activation is not None for activation in record.activations)
        if not cam.hook_handles:
            self.add(
                "hooks_removed",
                "the extractor's hooks have been taken off the model, by the end of its `with` block or by "
                "`remove_hooks()`.",
                "Ask inside the `with` block, or make a new extractor and call the model again.",
            )
            return False
        if not cam._hooks_enabled:
            old = "; what follows is about the pass before that" if reached else ""
            self.add(
                "hooks_disabled",
                f"the hooks are disabled, so forward passes are not recorded{old}.",
                "Call `enable_hooks()` and then the model.",
                severity="warning" if reached else "error",
            )
            if not reached:
                return False
        if reached:
            return self._still_the_same(record)
        if record.started:
            self.add(
                "layer_not_reached",
                f"the forward pass did not run {_quoted(cam.target_names)}, or was cut short by an exception.",
                f"Name a layer that runs for this input{self._hint_of(record.call)}. If an exception cut the pass "
                "short, call the model again.",
            )
        elif getattr(self.model, "_compiled_call_impl", None) is not None:
            self.add(
                "compiled",
                f"this {type(self.model).__name__} was compiled in place by `model.compile()`, and compiled code runs "
                "no hooks.",
                'Call it under `torch.compiler.set_stance("force_eager")` (torch 2.6 or newer), or explain a model '
                "with the same weights that was not compiled.",
            )
        else:
            wrapped = isinstance(self.model, nn.DataParallel | nn.parallel.DistributedDataParallel)
            replicas = " Here the model is wrapped for several devices: explain `model.module`." if wrapped else ""
            self.add(
                "nothing_recorded",
                f"no forward pass of this {type(self.model).__name__} was recorded.",
                "Call the model on an input after the extractor was made. Call the module itself, `extractor.model`: "
                "what `torch.compile` returned, `model.forward`, copies and replicas of the model, and its parts "
                f"called one by one run no hooks of it.{replicas}",
            )
        return False

    def _still_the_same(self, record: Any) -> bool:
        if record.call is None:
            self.add(
                "nothing_recorded",
                "the target layers were called, but the model itself was not.",
                "Call the model, not a part of it.",
            )
            return False
        versions = record.call.versions
        modified = [tensor for tensor, version in versions if version is not None and tensor._version != version]
        if modified:
            self.add(
                "input_modified",
                f"an input of shape {tuple(modified[0].shape)} was modified in place since the forward pass, which can "
                "therefore not be repeated.",
                "Pass a copy to the model (`x.clone()`), or ask before you change it.",
            )
        return not modified

    def _hint_of(self, call: Call | None) -> str:
        choice = self._choice(call)
        return "" if choice is None else f", such as '{choice}'"

    def _choice(self, call: Call | None) -> str | None:
        found = self._candidates_for(call)
        return None if found is None else found.choice

    def _candidates_for(self, call: Call | None) -> Candidates | None:
        if call is None:
            return None
        try:
            return candidates(self.model, *call.args, **call.kwargs)
        except Exception:  # noqa: BLE001 - a hint is not worth an error of its own
            return None

    @cached_property
    def candidates(self) -> Candidates | None:
        """The layers that a map can be made from, where they can be found."""
        return self._candidates_for(self.call)

    # The repeated pass.

    def repeat(self, class_idx: Any, targets: Any) -> None:
        """Repeat the recorded pass, and look at all of it."""
        cam = self.cam
        recorded = cam._record
        self.call: Call = recorded.call
        self.image = _as_batch(find_image(self.call.args, self.call.kwargs, self.call.wanted))
        recorded_activations = list(recorded.activations)
        private = recorded.shared is None or recorded.shared.private
        training = [
            name for name, module in self.model.named_modules() if module.training and _acts_in_training(module)
        ]
        cam._broken.report(wait=True)  # what the user's own maps have left to say
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what a method warns of is among the findings
            stack.callback(cam._broken.report, wait=True)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(not private))
            stack.enter_context(cam._inner_pass())
            stack.enter_context(self.call.as_recorded())
            watch = Watch(self.model, cam.target_names if self.looks_at_layers else [])
            self.output = self._run(watch)
            self.record = cam._record
            self._check_input(watch)
            self._check_modes(training, recorded_activations)
            self._check_calls(watch)
            if not any(activation is not None for activation in self.record.activations):
                self.add(
                    "not_repeatable",
                    f"the repeated pass, in evaluation mode, did not run {_quoted(cam.target_names)}.",
                    "Put the model in evaluation mode (`model.eval()`), and name a layer that runs in it.",
                )
                return
            self.select = self._selector(class_idx, targets)
            self._check_layers(recorded_activations, watch)

    def _run(self, watch: Watch | None = None) -> Any:
        args, kwargs = map_tensors(lambda t: t.clone() if t.is_inference() else t, (self.call.args, self.call.kwargs))
        with ExitStack() if watch is None else watch.watching():
            try:
                return self.model(*args, **kwargs)
            except Exception as error:
                error.add_note("raised while `diagnose` repeated the recorded forward pass")
                raise

    def _selector(self, class_idx: Any, targets: Any) -> Selector | None:
        """Give the explained score; none if the method explains none and the output has no scores to choose from."""
        try:
            logits = read_logits(self.output).detach()
        except TypeError:
            if targets is None and not self.cam.class_agnostic:
                raise
            logits = None
        if targets is None and class_idx is None:
            if logits is None:
                return None
            class_idx = class_scores(logits).argmax(1)
        select = Selector(class_idx, targets, self.batch_size)
        if logits is not None and targets is None:
            indices = select.indices(logits.reshape(-1, 1) if logits.ndim < 2 else logits)
            if indices.ndim > 1:
                raise ValueError(f"`class_idx` must name one class per sample to diagnose, got {class_idx!r}")
            self.explained_classes = indices.tolist()
            contrast = getattr(self.extractor, "_contrast", None)
            if contrast is not None:
                with torch.no_grad():
                    select = contrast(self.explained_classes, self.output, None)
        return select

    @property
    def _question(self) -> dict[str, Any]:
        """What is asked of the extractor: the class or target of each sample."""
        if self.explained_classes is not None:
            return {"class_idx": self.explained_classes}
        return {} if self.select is None else {"targets": self.select.targets}

    # The input and the modes.

    def _check_input(self, watch: Watch) -> None:
        image = self.image
        if image is None:
            return
        finite = image.isfinite().flatten(1).all(1)
        if not finite.all():
            self.add(
                "input_not_finite",
                "the input itself holds NaN or infinite values.",
                "Look at how the input is made: a division by a standard deviation of 0, a broken file.",
                samples=_where(~finite),
            )
            return
        lowest, highest = float(image.min()), float(image.max())
        config = getattr(self.model, "pretrained_cfg", None) or getattr(self.model, "default_cfg", None)
        mean, std = (config.get("mean"), config.get("std")) if isinstance(config, Mapping) else (None, None)
        seen = f"the input's values go from {lowest:.3g} to {highest:.3g}"
        if watch.normalization is not None:
            name, deviation, ratio = watch.normalization
            if deviation > 4 or ratio > 50:
                self.add(
                    "input_range",
                    f"{seen}, and the first batch normalisation, '{name}', gets channels whose mean is typically "
                    f"{deviation:.1f} standard deviations off what it has seen in training (variance: {ratio:.3g} "
                    "times).",
                    "Prepare the input as it was for training: divide bytes by 255, subtract the mean, divide by the "
                    "standard deviation.",
                )
                return
        if lowest >= 0 and highest > 20 and watch.normalization is None:
            self.add(
                "input_range",
                f"{seen}, which looks like bytes: nothing in the model says that it takes such values.",
                "Divide by 255 and normalise as for training; if the model was trained on such values, all is well.",
            )
        elif lowest >= 0 and 0.1 < highest <= 1 and mean is not None and any(mean):
            self.add(
                "input_range",
                f"{seen}, but the model's configuration says that inputs have the mean {_numbers(mean)} subtracted and "
                f"are divided by {_numbers(std or ())}, which leaves values below 0.",
                "Normalise the input as the configuration says (timm: `timm.data.create_transform`).",
            )

    def _check_modes(self, training: list[str], recorded: list[Tensor | None]) -> None:
        """Compare the recorded pass with the repeated one, in evaluation mode."""
        difference = _largest_difference(recorded, self.record.activations)
        percent = f"differ by up to {difference:.0%} of their largest value from those of evaluation mode"
        # Rounding is no difference, half-precision rounding included.
        if training and difference > 0.02:
            effect = f"The recorded activations {percent}."
        else:
            effect = "The recorded activations are those of evaluation mode, all the same."
        if training:
            self.add(
                "train_mode",
                f"{len(training)} modules that act differently in training are in train mode: {listed(training)}. "
                + effect,
                "Call `model.eval()` before the forward pass. What follows is about evaluation mode.",
            )
        elif difference > 0.02:
            self.add(
                "not_repeatable",
                f"The recorded activations {percent}, in which the pass was repeated.",
                "Call `model.eval()` before the forward pass. If the model draws random numbers or remembers earlier "
                "passes by itself, so do its maps: take the mean of several.",
            )

    def _check_calls(self, watch: Watch) -> None:
        for layer, calls in watch.calls.items():
            if calls > 1:
                self.add(
                    "called_repeatedly",
                    f"'{layer}' ran {calls} times in the forward pass. The map is of its last call.",
                    "If another call is meant, name a layer that runs once: the block around the call, or the layer "
                    "after it.",
                    layer=layer,
                )
        for layer, culprit in watch.changed.items():
            self.add(
                "inplace_after_layer",
                f"what '{layer}' returns is changed in place afterwards, by {culprit}.",
                "Nothing: the extractor has kept what the layer returned. Code of your own that reads the layer's "
                "output after the pass sees the changed values.",
                layer=layer,
            )

    # The layers, the score and the maps.

    def _check_layers(self, recorded: list[Tensor | None], watch: Watch) -> None:
        try:
            grids = self.cam.hook_a
        except ValueError as error:
            choice = self._choice(self.call)
            self.add(
                "no_positions",
                f"{error}.",
                "There is nothing to draw a map on." + (f" A layer with positions is '{choice}'." if choice else ""),
            )
            return
        broken = self._check_finite(recorded)
        for name, grid in zip(self.record.names, grids, strict=True):
            if grid is not None and self.looks_at_layers:
                self._check_grid(name, grid)
        if broken or self.found("input_not_finite"):
            return
        if self.looks_at_layers:
            self._check_layout()
            self._check_constant(grids)
        squash = self._check_score(watch)
        maps = self._check_maps(grids, squash)
        if maps is not None:
            self._check_classes()

    def _check_finite(self, recorded: list[Tensor | None]) -> bool:
        """Look for NaN and infinity in activations and scores; tell whether there are any."""
        if self.found("input_not_finite"):
            return True
        broken = False
        for name, now, then in zip(self.record.names, self.record.activations, recorded, strict=False):
            kept = [tensor for tensor in (now, then) if tensor is not None and len(tensor) == self.batch_size]
            finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in kept]).all(0) if kept else None
            if finite is not None and not finite.all():
                broken = True
                self.add(
                    "activation_not_finite",
                    f"what '{name}' returns holds NaN or infinite values. {self._first_broken()}",
                    "Look at that module: a division by 0, the logarithm or root of a negative number, an overflow of "
                    "half precision (run the pass in float32, without autocast), or weights that training has broken.",
                    layer=name,
                    samples=_where(~finite),
                )
        scores = None if self.select is None else self._score(self.output)
        if not broken and scores is not None and not scores.isfinite().all():
            broken = True
            self.add(
                "score_not_finite",
                f"the explained score is {_numbers(scores[~scores.isfinite()].tolist())}. {self._first_broken()}",
                "Look at that module, after the target layer: the activations are finite.",
                samples=_where(~scores.isfinite()),
            )
        return broken

    def _score(self, output: Any) -> Tensor:
        assert self.select is not None  # noqa: S101 - for the type checker
        with torch.no_grad():
            return to_float(self.select(output).detach())

    def _first_broken(self) -> str:
        """Say where NaN or infinity appears first, in the order in which the modules run."""
        trace = Trace(self.model)
        with untouched(self.model), trace.watching():
            self._run()
        if trace.first is None:
            return "A pass in evaluation mode is free of them: see `train_mode`."
        return f"They first appear {trace.first}."

    def _check_grid(self, name: str, grid: Tensor) -> None:
        spatial = tuple(grid.shape[2:])
        shape = " x ".join(map(str, spatial))
        if math.prod(spatial) > 1 and math.prod(spatial[-2:]) >= 4 ** len(spatial[-2:]):
            return
        finer = [
            c
            for c in self.candidates or ()
            if c.depends
            and c.fits
            and math.prod(c.grid[-2:]) >= max(4 ** len(c.grid[-2:]), 4 * math.prod(spatial[-2:]))
        ]
        finer = [c for c in finer if c.is_stage] or finer
        larger = "give the model a larger input, if it takes one"
        if finer:
            where = " x ".join(map(str, finer[-1].grid))
            larger = f"Name an earlier layer: '{finer[-1].name}' has a grid of {where}. Or {larger}"
        else:
            larger = larger.capitalize()
        code = "one_position" if math.prod(spatial) == 1 else "coarse_grid"
        self.add(
            code,
            f"the grid of '{name}' is {shape}"
            + (": one position cannot be higher than another." if code == "one_position" else ", a very coarse map."),
            f"{larger}.",
            layer=name,
        )

    def _check_layout(self) -> None:
        """See whether a grid is read along the right dimensions: where the input changes, so must the grid, there."""
        if self.image is None:
            return
        doubtful = []
        for index, (name, activation) in enumerate(zip(self.record.names, self.record.activations, strict=True)):
            if activation is not None and math.prod(self.cam._to_grid(activation, name).shape[2:]) > 1:
                other = self._other_reading(activation, name)
                plain = self.cam.reshape_transform is None and self.cam._layout(activation, name) == Layout(
                    tuple(activation.shape[2:]), 0, 1, tuple(range(2, activation.ndim))
                )
                if not plain or other is not None:
                    doubtful.append((index, name, other))
        if not doubtful:
            return
        moved = self._moved_activations()
        for index, name, other in doubtful:
            base = self.record.activations[index]
            variants = [activations[index] for activations in moved]

            def to_grid(tensor: Tensor, name: str = name) -> Tensor:
                grid: Tensor = self.cam._to_grid(tensor, name)
                return grid

            verdict = _is_in_place(base, variants, to_grid)
            if verdict is False:
                right = other is not None and _is_in_place(base, variants, other.to_grid)
                own = "`reshape_transform` gives" if self.cam.reshape_transform is not None else "the layout found is"
                self.add(
                    "wrong_layout",
                    f"the output of '{name}', {tuple(base.shape)}, is read along the wrong dimensions: {own} a grid "
                    f"of {' x '.join(map(str, to_grid(base).shape[2:]))}, but where one half of the input is changed, "
                    "the other half of that grid, or another side of it, changes most.",
                    "Pass a `reshape_transform` to (N, C, *spatial)"
                    + (
                        f": `{_permutation(other, base.ndim)}`, for channels that come last."
                        if right and other
                        else "."
                    ),
                    layer=name,
                )
            elif verdict is None and other is not None:
                self.add(
                    "layout_ambiguous",
                    f"the output of '{name}', {tuple(base.shape)}, can be read with channels first or channels last, "
                    "and changes of the input do not tell which; it is read with channels "
                    f"{'first' if self.cam._layout(base, name).channels == 1 else 'last'}.",
                    f"If that is wrong, pass `reshape_transform={_permutation(other, base.ndim)}`.",
                    layer=name,
                )

    def _other_reading(self, activation: Tensor, name: str) -> Layout | None:
        """Give the other layout that fits the shape of a layer's map as well, if there is one."""
        shape, spatial = tuple(activation.shape), self.image.shape[2:] if self.image is not None else ()
        if self.cam.reshape_transform is not None or len(shape) != len(spatial) + 2 or len(spatial) == 1:
            return None
        found = self.cam._layout(activation, name)
        others = [layout for layout in _map_layouts(shape) if layout != found]
        if found not in _map_layouts(shape) or not has_consistent_stride(others[0].grid, spatial):
            return None
        as_good = _skew(others[0].grid, spatial) <= _skew(found.grid, spatial)
        return others[0] if as_good else None

    def _moved_activations(self) -> list[list[Any]]:
        """Give the layers' outputs for inputs with noise in the lower and the upper half along each axis in turn."""
        assert self.image is not None  # noqa: S101 - for the type checker
        image = self.image
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(image.shape[1:], generator=generator).to(image) * image.float().std().clamp(min=0.1)
        found = []
        for axis in range(2, image.ndim):
            place = (torch.arange(image.shape[axis], device=image.device) + 0.5) / image.shape[axis]
            place = place.reshape(-1, *[1] * (image.ndim - 1 - axis))
            for half in (place < 0.5, place > 0.5):
                with self.cam._inner_pass():
                    self._forward(image + noise * half.to(image))
                    found.append(list(self.cam._record.activations))
        return found

    def _forward(self, image: Tensor, samples: Tensor | None = None) -> Any:
        samples = torch.arange(len(image), device=image.device) if samples is None else samples
        args, kwargs = self.call.with_image(image, samples)
        args, kwargs = map_tensors(lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
        return self.model(*args, **kwargs)

    def _check_constant(self, grids: list[Tensor | None]) -> None:
        for name, grid in zip(self.record.names, grids, strict=True):
            if grid is None or math.prod(grid.shape[2:]) == 1:
                continue
            flat = grid.flatten(2)
            constant = is_constant(flat.amin(-1), flat.amax(-1)).all(1)
            if constant.any():
                zero = not flat[constant].any()
                self.add(
                    "activation_constant",
                    f"each of the {grid.shape[1]} channels of '{name}' is {'0' if zero else 'the same'} everywhere, so "
                    "the map is constant whatever the weights.",
                    "Look at what comes before it: "
                    + (
                        "an activation function that lets nothing through, weights that are all 0"
                        if zero
                        else "a pooling over all positions, weights that are all 0"
                    )
                    + ", or an input that is blank.",
                    layer=name,
                    samples=_where(constant),
                )

    def _check_score(self, watch: Watch) -> str | None:
        """Look for a probability in place of a logit; give the function that has made it."""
        if self.select is None or self.cam.class_agnostic:
            return None
        squash = None
        if self.cam._uses_gradients:
            with torch.enable_grad():
                squash = _squashing_node(self.select(self.cam._attached(self.output)))
        elif not self.select.targets:
            squash = watch.squashing_module(self.output) or _by_values(self.output)
        if squash is None:
            return None
        score = self._score(self.output)
        probability = score.exp() if "log" in squash.lower() else score
        saturated = (probability > 0.99) | (probability < 1e-6)
        advice = (
            "Explain the logit: take the last activation function out of the model "
            "(`model.softmax = torch.nn.Identity()`, say), or pass `targets` that read what goes into it."
        )
        if saturated.any():
            shown = _numbers(probability[saturated].tolist())
            self.add(
                "score_saturated",
                f"the explained score is a probability, made by a {squash}, and it is {shown}: there it hardly "
                "changes, whatever the evidence, and its gradient vanishes.",
                advice,
                samples=_where(saturated),
            )
        else:
            self.add(
                "score_squashed",
                f"the explained score is a probability, made by a {squash} ({_numbers(probability.tolist())}): what "
                "speaks against other classes counts as evidence, too.",
                advice,
            )
        return squash

    def _check_maps(self, grids: list[Tensor | None], squash: str | None) -> list[Tensor] | None:
        """Compute the raw maps, and say what is wrong with them; None if there are none worth a look."""
        cam = self.cam
        asked = {"targets": self.select} if hasattr(self.extractor, "_contrast") else self._question
        keep = {"retain_graph": True} if cam._uses_gradients else {}
        try:
            maps = cam.compute_cams(scores=self.output, normalized=False, relu=False, **keep, **asked)
            gradients = self._layer_gradients()
        except RuntimeError as error:
            if "not connected" not in str(error):
                self._add_failure(error)
            else:
                self._add_unconnected(str(error))
            return None
        except ValueError as error:
            self._add_failure(error)
            return None
        if self._check_gradients(gradients, squash):
            return None
        blank = self._check_signs(maps, grids, gradients)
        return None if blank else maps

    def _add_failure(self, error: Exception) -> None:
        self.add(
            "method_failed",
            f"{type(self.cam).__name__} cannot explain this pass: {str(error).rstrip('.')}.",
            "Do as the message says.",
        )

    def _layer_gradients(self) -> list[Tensor | None]:
        """Give the gradient of the explained score for what each target layer returned."""
        cam = self.cam
        if not cam._record.gradients and cam._uses_gradients and not self.reads_attention and self.select is not None:
            cam._backprop(self.output, None, retain_graph=True, targets=self.select)
        return list(cam._record.gradients) or [None] * len(self.record.names)

    def _add_unconnected(self, message: str) -> None:
        _, _, layers = message.partition("does not depend on ")
        choice = self._choice(self.call)
        self.add(
            "no_gradient",
            f"the score does not depend on {layers or 'the target layer'} by any path that gradients take: the layer "
            "may belong to another branch, or the model cuts the graph behind it (`.detach()`, `.data`, "
            "`torch.no_grad()`, NumPy, an integer). Frozen parameters are not the reason.",
            f"Name a layer that has a gradient{f': {choice!r}' if choice else ''}, take the cut out of the model's "
            "`forward`, or use a method without gradients, such as ScoreCAM.",
        )

    def _check_gradients(self, gradients: list[Tensor | None], squash: str | None) -> bool:
        """Look for gradients that are not finite, or nothing; tell whether no map can be made."""
        bad = False
        for name, layer, gradient in zip(self.record.names, self.record.layers, gradients, strict=False):
            if gradient is None or not gradient.numel():
                continue
            finite = gradient.isfinite().flatten(1).all(1)
            if not finite.all():
                bad = True
                self.add(
                    "gradient_not_finite",
                    f"the gradient for '{name}' holds NaN or infinite values, though scores and activations are "
                    f"finite. {self._first_broken_gradient()}",
                    "Look at what follows there: a root or a logarithm at 0, a norm of zeros, `torch.where` around "
                    "either; clamp its argument.",
                    layer=name,
                    samples=_where(~finite),
                )
                continue
            levels = [g for other, g in zip(self.record.layers, gradients, strict=False) if other == layer]
            if len(levels) > 1 and any(g is not None and bool(g.any()) for g in levels):
                continue  # a detector reads a box from one level of its pyramid
            none = ~gradient.flatten(1).any(1)
            grid = gradient if self.reads_attention else self.cam._to_grid(gradient, name)
            elsewhere = ~none & ~grid.flatten(1).any(1)
            if elsewhere.any():
                bad = True
                choice = self._choice(self.call)
                self.add(
                    "no_gradient",
                    f"the gradient for '{name}' is 0 at all {math.prod(grid.shape[2:])} positions, but not at the "
                    "tokens before them: the score is read from the class token alone.",
                    f"Name {f'{choice!r}' if choice else 'an earlier layer'}, before the last attention, or a method "
                    "that reads attention, such as LeGrad or TransformerAttribution.",
                    layer=name,
                    samples=_where(elsewhere),
                )
            if none.any():
                bad = True
                if squash is not None and self._as_error("score_saturated"):
                    continue
                zeros = [
                    key
                    for key, value in self.model.named_parameters()
                    if key.endswith("weight") and value.numel() and not value.any()
                ]
                because = f" The parameters {listed(zeros)} are all 0." if zeros else ""
                self.add(
                    "zero_gradient",
                    f"the gradient of the score for '{name}' is exactly 0 everywhere: no small change of this layer "
                    f"changes the score.{because}",
                    "Look at what follows it: a ReLU that lets nothing through, a saturated or a rounding function, "
                    "weights that are 0. A method without gradients, such as AblationCAM, sees larger changes.",
                    layer=name,
                    samples=_where(none),
                )
        return bad

    def _as_error(self, code: str) -> bool:
        """Make an error of a finding, if there is such a one."""
        for place, finding in enumerate(self.findings):
            if finding.code == code:
                values = {**vars(finding), "severity": "error"}
                self.findings[place] = Finding(**values)
                return True
        return False

    def _first_broken_gradient(self) -> str:
        """Say between which modules, on the way back from the score, a gradient stops to be finite."""
        trace = GradientTrace(self.model)
        with torch.enable_grad(), self.cam._inner_pass(), trace.watching():
            output = self._run()
            assert self.select is not None  # noqa: S101 - for the type checker
            name = trace.last_broken(self.select(self.cam._attached(output)))
        return f"Going back from the score, it first is so for the output of '{name}'." if name else ""

    def _check_signs(self, maps: list[Tensor], grids: list[Tensor | None], gradients: list[Tensor | None]) -> bool:
        """Look for maps of which nothing is left; tell whether there are any."""
        blank = False
        causes = ("activation_constant", "one_position")
        layers = self.record.names if len(maps) == len(self.record.names) else [None] * len(maps)
        if len(self.record.names) > len(self.cam.target_names) and any(bool(cam.any()) for cam in maps):
            return False  # of the levels of a pyramid, some need not count
        for index, (cam, layer) in enumerate(zip(maps, layers, strict=True)):
            flat = cam.detach().flatten(1)
            lowest, highest = flat.amin(1), flat.amax(1)
            constant = is_constant(lowest, highest)
            negative = (highest <= 0) & ~constant if self.cam._relu else torch.zeros_like(constant)
            if negative.any():
                blank = True
                self._add_negative(
                    f"before the ReLU the map goes from {float(lowest[negative].min()):.3g} to "
                    f"{float(highest[negative].max()):.3g}: what '{layer}' shows speaks against the score, everywhere, "
                    "and the ReLU leaves nothing.",
                    layer,
                    _where(negative),
                )
            if not constant.any():
                continue
            blank = True
            if self.found(*causes):
                continue
            gradient = gradients[index] if index < len(gradients) and layer is not None else None
            grid = grids[index] if layer is not None else None
            if gradient is not None and grid is not None and not self.reads_attention and not flat[constant].any():
                towards = self.cam._to_grid(gradient, layer)[constant]
                if bool((towards <= 0).all()) or bool((towards * grid[constant] <= 0).all()):
                    self._add_negative(
                        f"no position of '{layer}' has a positive gradient where it is active, and "
                        f"{type(self.cam).__name__} leaves out the negative ones.",
                        layer,
                        _where(constant),
                    )
                    continue
            self.add(
                "map_constant",
                f"the map is {_numbers(flat[constant][:, 0].tolist())} everywhere, so there is nothing to show.",
                "The channels' weights are 0, or cancel: explain another class, name another layer, or compare with "
                "another method.",
                layer=layer,
                samples=_where(constant),
            )
        return blank

    def _add_negative(self, message: str, layer: str | None, samples: Sequence[int]) -> None:
        predicted = class_scores(self.output).argmax(1).tolist() if self.explained_classes else []
        others = {p for s in samples for p in predicted[s : s + 1] if p != (self.explained_classes or predicted)[s]}
        another = f" (the model's own choice is {listed(sorted(others))})" if others else ""
        layered = (
            "" if type(self.cam).__name__ == "LayerCAM" else ", or try LayerCAM, which weights each position by itself"
        )
        self.add(
            "all_negative",
            message,
            f"Explain another class{another}, look at both signs with `relu=False` or at the evidence against the "
            f'class with `relu="negative"`{layered}.',
            layer=layer,
            samples=samples,
        )

    # The final maps.

    def _check_classes(self) -> None:
        """Compare the maps of two classes, and see what their peaks do to the score."""
        if self.select is None:
            self._add_agnostic()
            return
        try:
            cam = self._fused(self._question)
            other = None
            if self.cam.class_agnostic:
                self._add_agnostic()
            elif self.explained_classes is not None:
                other = self._best_other()
            if other is not None:
                self._compare(cam, self._fused({"class_idx": other.tolist()}), other)
        except ValueError as error:
            self._add_failure(error)
            return
        if self.image is not None and cam.ndim == self.image.ndim - 1:
            self._check_peak(cam)

    def _fused(self, question: dict[str, Any]) -> Tensor:
        """Give the map of each sample as the user gets it, all layers in one."""
        keep = {"retain_graph": True} if self.cam._uses_gradients else {}
        maps = self.extractor.compute_cams(scores=self.output, **keep, **question)
        return to_float(self.extractor.fuse_cams(maps).detach())

    def _add_agnostic(self) -> None:
        self.add(
            "class_agnostic",
            f"{type(self.cam).__name__} looks at no score: its map is the same for every class.",
            "For a map of one class, take a method that explains a score, such as GradCAM.",
        )

    def _best_other(self) -> Tensor | None:
        """Give the class with the highest score beside the explained one, (N,)."""
        scores = class_scores(self.output)
        if scores.shape[1] < 2 or self.explained_classes is None:
            return None
        explained = torch.tensor(self.explained_classes, device=scores.device).unsqueeze(1)
        return scores.scatter(1, explained, -torch.inf).argmax(1)

    def _compare(self, cam: Tensor, other: Tensor, classes: Tensor) -> None:
        """Note where two classes have one map."""
        alike = (cam - other).abs().flatten(1).amax(1) <= 0.01
        alike &= cam.flatten(1).amax(1) > 0
        if alike.any():
            first = int(alike.nonzero()[0])
            assert self.explained_classes is not None  # noqa: S101 - for the type checker
            self.add(
                "same_for_every_class",
                f"class {self.explained_classes[first]} and class {int(classes[first])}, the best one beside it, have "
                f"the same map (they differ by {float((cam - other)[alike].abs().max()):.2g} at most).",
                "Either both classes look at the same places, or the method does not tell them apart here: contrast "
                "them with FinerCAM, or name a later layer.",
                samples=_where(alike),
            )

    def _check_peak(self, cam: Tensor) -> None:
        """See whether the score falls when the peak of the map is masked, as it should."""
        assert self.image is not None  # noqa: S101 - for the type checker
        assert self.select is not None  # noqa: S101 - for the type checker
        image = self.image
        cam = resize(cam.unsqueeze(1), image.shape[2:]).flatten(1)
        if cam.shape[1] < 10:
            return
        generator = torch.Generator().manual_seed(0)
        shuffled = torch.randperm(cam.shape[1], generator=generator).to(cam.device)  # of equals, any are as good
        ranks = cam[:, shuffled].argsort(dim=1, stable=True).argsort(1)[:, shuffled.argsort()]
        share = max(1, round(0.2 * cam.shape[1]))
        top = (ranks >= cam.shape[1] - share).reshape(len(image), 1, *image.shape[2:])
        bottom = (ranks < share).reshape_as(top)
        fills = [image.flatten(2).mean(2).reshape(*image.shape[:2], *[1] * (image.ndim - 2)).expand_as(image)]
        fills.append(blurred_out(image))
        score = self._score(self.output)
        everything = torch.ones_like(top)
        with untouched(self.model), torch.no_grad():
            found = torch.stack(
                [
                    torch.stack(
                        [self._score(self._forward(torch.where(m, fill, image))) for m in (top, bottom, everything)]
                    )
                    for fill in fills
                ]
            )  # (fills, masks, N)
        rise = found - score
        top_rise, bottom_rise, whole = rise[:, 0], rise[:, 1], rise[:, 2].abs()
        scale = torch.maximum(whole, bottom_rise.abs())
        inverted = ((top_rise > 0.5 * scale) & (top_rise > 2 * bottom_rise)).all(0)
        inverted &= cam.amax(1) > cam.amin(1)
        if inverted.any():
            first = int(inverted.nonzero()[0])
            values = [float(v) for v in (score[first], found[1, 0, first], found[1, 1, first])]
            self.add(
                "inverted",
                "the score rises when the 20 % of the input that the map ranks highest are blurred, from "
                f"{values[0]:.3g} to {values[1]:.3g}; without the 20 % that it ranks lowest it is {values[2]:.3g}. The "
                "map points at what speaks against the score.",
                "Compare with a method that tries out what it says, such as ScoreCAM or AblationCAM; "
                'look at the evidence against the class with `relu="negative"`; check the sign of the target.',
                samples=_where(inverted),
            )


_SQUASHING_NODE = re.compile(r"((?:Log)?(?:Softmax|Sigmoid))Backward\d*")
# Nodes that hand on some of the numbers, as they are.
_SELECTING_NODE = re.compile(
    r"(Index|Select|Slice|View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Clone|ToCopy|Stack|Sum|Permute|Transpose|T|"
    r"Alias|Expand|Gather|Take)Backward\d*"
)


def _squashing_node(score: Tensor) -> str | None:
    """Give the function that has made a probability of a score, by its graph."""
    node: Any = score.grad_fn
    if node is not None and node.name().startswith("Mul"):  # the sign that the selector has applied
        node = node.next_functions[0][0]
    for _ in range(50):
        if node is None:
            return None
        name = node.name()
        if found := _SQUASHING_NODE.fullmatch(name):
            return found[1].lower().replace("log", "log-")
        if not _SELECTING_NODE.fullmatch(name):
            return None
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return None


def _by_values(output: Any) -> str | None:
    """Tell a softmax by what it makes: two numbers or more for each sample, none below 0, that sum up to 1."""
    logits = read_logits(output).detach()
    if logits.ndim != 2 or logits.shape[1] < 2 or (logits < 0).any():
        return None
    return "softmax" if ((to_float(logits).sum(1) - 1).abs() < 1e-3).all() else None


def _as_batch(image: Tensor | list[Tensor] | None) -> Tensor | None:
    """Give the image-like input as one tensor; none if there is none, or images of several sizes."""
    if image is None or isinstance(image, Tensor):
        return image
    return torch.stack(list(image)) if len({item.shape for item in image}) == 1 else None


def _map_layouts(shape: Sequence[int]) -> tuple[Layout, Layout]:
    """Give the two ways to read maps: channels first, and channels last."""
    dimensions = tuple(range(len(shape)))
    first = Layout(tuple(shape[2:]), 0, 1, dimensions[2:])
    return first, Layout(tuple(shape[1:-1]), 0, dimensions[-1], dimensions[1:-1])


def _skew(grid: Sequence[int], spatial: Sequence[int]) -> float:
    """Give the ratio of the larger to the smaller stride in the last two dimensions."""
    strides = [pixels / side for side, pixels in zip(grid, spatial, strict=True)][-2:]
    return max(strides) / min(strides)


def _is_in_place(base: Tensor, variants: Sequence[Any], to_grid: Callable[[Tensor], Tensor]) -> bool | None:
    """Tell whether a grid changes on the side where the input was changed.

    Args:
        base: what the layer returned
        variants: what it returned for inputs changed in the lower and in the upper half, along each axis in turn
        to_grid: the way to read it

    Returns:
        None if the changes do not tell
    """
    pairs = len(variants) // 2
    grid = to_grid(base)
    if grid.ndim - 2 != pairs or any(not isinstance(v, Tensor) or v.shape != base.shape for v in variants):
        return None
    centres = []
    for variant in variants:
        change = to_float(to_grid(variant) - grid).abs().sum((0, 1))  # (*S)
        total = change.sum()
        if not bool(total > 0) or not bool(total.isfinite()):
            return None
        sums = [change.sum([d for d in range(pairs) if d != axis]) if pairs > 1 else change for axis in range(pairs)]
        centres.append(
            torch.stack(
                [(s * torch.linspace(0.5 / len(s), 1 - 0.5 / len(s), len(s)).to(s)).sum() / total for s in sums]
            )
        )
    shifts = torch.stack(centres[1::2]) - torch.stack(centres[::2])  # (changed axis, axis of the grid)
    own = shifts.diagonal()
    others = (shifts - own.diag()).abs()
    if (own < -0.1).any() or ((others > 0.1) & (others > 2 * own.abs().unsqueeze(1))).any():
        return False
    wide = torch.tensor([side > 1 for side in grid.shape[2:]], device=own.device)
    return True if (own[wide] > 0.1).all() else None


def _permutation(layout: Layout | None, ndim: int) -> str:
    """Write down the function that turns a map into (N, C, *spatial)."""
    if layout is None or layout.channels == 1:
        return "lambda t: t"
    return f"lambda t: t.permute(0, {', '.join(map(str, (ndim - 1, *range(1, ndim - 1))))})"


def _acts_in_training(module: Any) -> bool:
    """Tell whether a module computes something else in train mode."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return bool(module.track_running_stats)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout) > 0
    if "drop" in type(module).__name__.lower() or isinstance(module, nn.modules.dropout._DropoutNd):
        rates = [getattr(module, name, None) for name in ("p", "drop_prob", "drop_rate", "rate")]
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
    return isinstance(module, nn.RReLU)


def _largest_difference(before: Sequence[Tensor | None], now: Sequence[Tensor | None]) -> float:
    """Give the largest difference between tensors, as a share of the largest value of the one it is found in."""
    worst = 0.0
    for old, new in zip(before, now, strict=False):
        if old is None or new is None or old.shape != new.shape or not new.numel():
            continue
        difference = (to_float(old.detach()) - to_float(new.detach())).abs().max()
        worst = max(worst, float((difference / to_float(new.detach()).abs().max().clamp(min=1e-30)).nan_to_num(0.0)))
    return worst


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _quoted(names: Sequence[str]) -> str:
    return listed(list(names)) or "any target layer"


def _numbers(values: Iterable[float]) -> str:
    texts = list(dict.fromkeys(f"{value:.4g}" for value in values))
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")
