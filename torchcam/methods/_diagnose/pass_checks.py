"""Checks of the recorded pass: its presence, its input, the modes of the model, and values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchcam._tensors import to_float

from .facts import Facts
from .findings import Finding, finding, listed, numbers
from .view import ExtractorView

# The recorded pass.


def check_recording(recorded: ExtractorView) -> Iterator[Finding]:
    """Check that hooks are on the model, and that they have recorded a pass that can be repeated."""
    if not recorded.recorder.is_attached:
        yield finding(
            "hooks_removed",
            "the extractor's hooks have been taken off the model, by the end of its `with` block or by "
            "`remove_hooks()`.",
            "Ask inside the `with` block, or make a new extractor and call the model again.",
        )
        return
    if not recorded.recorder.enabled:
        old = "; what follows is about the pass before that" if recorded.reached else ""
        yield finding(
            "hooks_disabled",
            f"the hooks are disabled, so forward passes are not recorded{old}.",
            "Call `enable_hooks()` and then the model.",
            severity="warning" if recorded.reached else "error",
        )
    elif not recorded.reached:
        yield _not_reached(recorded)
    if recorded.reached and recorded.call is None:
        yield finding(
            "nothing_recorded",
            "the target layers were called, but the model itself was not.",
            "Call the model, not a part of it.",
        )
    elif recorded.reached:
        changed = next((t for t, version in recorded.call.versions if version not in {None, t._version}), None)
        if changed is not None:
            yield finding(
                "input_modified",
                f"an input of shape {tuple(changed.shape)} was modified in place since the forward pass, which can "
                "therefore not be repeated.",
                "Pass a copy to the model (`x.clone()`), or ask before you change it.",
            )


def _not_reached(recorded: ExtractorView) -> Finding:
    """Return the reason why no pass has reached a target layer."""
    model = recorded.model
    if recorded.recorder.is_compiled:
        return finding(
            "compiled",
            f"this {type(model).__name__} was compiled in place by `model.compile()`, and compiled code runs no hooks.",
            'Call it under `torch.compiler.set_stance("force_eager")` (torch 2.6 or newer), or explain a model '
            "with the same weights that was not compiled.",
        )
    if recorded.found is not None:
        hint = f", such as '{recorded.choice}'" if recorded.choice else ""
        return finding(
            "layer_not_reached",
            f"the forward pass did not run {_target_layers(recorded)}, or was cut short by an exception.",
            f"Name a layer that runs for this input{hint}. If an exception cut the pass short, call the model again.",
        )
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    replicas = " Here the model is wrapped for several devices: explain `model.module`." if wrapped else ""
    return finding(
        "nothing_recorded",
        f"no forward pass of this {type(model).__name__} was recorded.",
        "Call the model on an input after the extractor was made. Call the module itself, `extractor.model`: "
        "what `torch.compile` returned, `model.forward`, copies and replicas of the model, and its parts "
        f"called one by one run no hooks of it.{replicas}",
    )


def _target_layers(view: ExtractorView) -> str:
    return listed(view.cam.target_names) or "any target layer"


# The input and the modes.


def check_input(facts: Facts) -> Iterator[Finding]:
    """Check that the input is finite and has the range of values that the model was trained on."""
    if facts.image is None:
        return
    if facts.broken_input is not None:
        yield finding(
            "input_not_finite",
            "the input itself holds NaN or infinite values.",
            "Look at how the input is made: a division by a standard deviation of 0, a broken file.",
            samples=facts.broken_input,
        )
        return
    lowest, highest = float(facts.image.min()), float(facts.image.max())
    values = f"the input's values go from {lowest:.3g} to {highest:.3g}"
    name, deviation, ratio = facts.watch.normalization or (None, 0.0, 0.0)
    mean, std = _trained_normalization(facts.recorded.model)
    if deviation > 4 or ratio > 50:
        yield finding(
            "input_range",
            f"{values}, and the first batch normalisation, '{name}', gets channels whose mean is typically "
            f"{deviation:.1f} standard deviations off what it has seen in training (variance: {ratio:.3g} times).",
            "Prepare the input as it was for training: divide bytes by 255, subtract the mean, divide by the "
            "standard deviation.",
        )
    elif lowest >= 0 and highest > 20 and name is None:
        yield finding(
            "input_range",
            f"{values}, which looks like bytes: nothing in the model says that it takes such values.",
            "Divide by 255 and normalise as for training; if the model was trained on such values, all is well.",
        )
    elif lowest >= 0 and 0.1 < highest <= 1 and any(mean):
        yield finding(
            "input_range",
            f"{values}, but the model's configuration says that inputs have the mean {numbers(mean)} subtracted and "
            f"are divided by {numbers(std)}, which leaves values below 0.",
            "Normalise the input as the configuration says (timm: `timm.data.create_transform`).",
        )


def _trained_normalization(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and the standard deviation of the inputs by the model's configuration, as far as it has them."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping):
        return (), ()
    return config.get("mean") or (), config.get("std") or ()


def check_modes(facts: Facts) -> Iterator[Finding]:
    """Check that the recorded pass is like its repetition in evaluation mode."""
    difference = _largest_difference(facts.recorded.activations, facts.repeated.activations)
    differs = difference > 0.02  # more than rounding, half-precision rounding included
    percent = f"differ by up to {difference:.0%} of their largest value from those of evaluation mode"
    modules = facts.recorded.model.named_modules()
    training = [name for name, module in modules if module.training and _acts_in_training(module)]
    if training:
        effect = percent if differs else "are those of evaluation mode, all the same"
        yield finding(
            "train_mode",
            f"{len(training)} modules that act differently in training are in train mode: {listed(training)}. "
            f"The recorded activations {effect}.",
            "Call `model.eval()` before the forward pass. What follows is about evaluation mode.",
        )
    elif differs:
        yield finding(
            "not_repeatable",
            f"The recorded activations {percent}, in which the pass was repeated.",
            "Call `model.eval()` before the forward pass. If the model draws random numbers or remembers earlier "
            "passes by itself, so do its maps: take the mean of several.",
        )
    if not facts.repeated.reached:
        yield finding(
            "not_repeatable",
            f"the repeated pass, in evaluation mode, did not run {_target_layers(facts.recorded)}.",
            "Put the model in evaluation mode (`model.eval()`), and name a layer that runs in it.",
        )


def _acts_in_training(module: Any) -> bool:
    """Check whether a module computes something else in training mode."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return bool(module.track_running_stats)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout) > 0
    if "drop" in type(module).__name__.lower() or isinstance(module, nn.modules.dropout._DropoutNd):
        rates = [getattr(module, name, None) for name in ("p", "drop_prob", "drop_rate", "rate")]
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
    return isinstance(module, nn.RReLU)


def _largest_difference(before: Sequence[Tensor | None], now: Sequence[Tensor | None]) -> float:
    """Return the largest difference between paired tensors, as a share of the largest value of the later one."""
    shares = [0.0]
    for old, new in zip(before, now, strict=False):
        if old is not None and new is not None and old.shape == new.shape and new.numel():
            old, new = to_float(old.detach()), to_float(new.detach())
            share = (old - new).abs().max() / new.abs().max().clamp(min=1e-30)
            shares.append(float(share.nan_to_num(0.0)))
    return max(shares)


def check_calls(facts: Facts) -> Iterator[Finding]:
    """Check that each target layer runs once and that its output is not changed in place."""
    for layer, calls in facts.watch.calls.items():
        if calls > 1:
            yield finding(
                "called_repeatedly",
                f"'{layer}' ran {calls} times in the forward pass. The map is of its last call.",
                "If another call is meant, name a layer that runs once: the block around the call, or the layer "
                "after it.",
                layer=layer,
            )
    for layer, culprit in facts.watch.changed.items():
        yield finding(
            "inplace_after_layer",
            f"what '{layer}' returns is changed in place afterwards, by {culprit}.",
            "Nothing: the extractor has kept what the layer returned. Code of your own that reads the layer's "
            "output after the pass sees the changed values.",
            layer=layer,
        )


def check_finite(facts: Facts) -> Iterator[Finding]:
    """Check that activations and scores are finite, if the input is."""
    if facts.broken_input is not None or facts.layout_error is not None:
        return
    for name, broken in facts.broken_activations.items():
        yield finding(
            "activation_not_finite",
            f"what '{name}' returns holds NaN or infinite values. {_first_place(facts)}",
            "Look at that module: a division by 0, the logarithm or root of a negative number, an overflow of "
            "half precision (run the pass in float32, without autocast), or weights that training has broken.",
            layer=name,
            samples=broken,
        )
    if not facts.broken_activations and facts.scores is not None and not facts.scores.isfinite().all():
        broken = ~facts.scores.isfinite()
        yield finding(
            "score_not_finite",
            f"the explained score is {numbers(facts.scores[broken].tolist())}. {_first_place(facts)}",
            "Look at that module, after the target layer: the activations are finite.",
            samples=broken,
        )


def _first_place(facts: Facts) -> str:
    if facts.watch.first_not_finite is None:
        return "A pass in evaluation mode is free of them: see `train_mode`."
    return f"They first appear {facts.watch.first_not_finite}."


CHECKS = (check_input, check_modes, check_calls, check_finite)
