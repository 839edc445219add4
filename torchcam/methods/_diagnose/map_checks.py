"""Checks of the explained score, its gradient and the maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchcam._tensors import blurred_out, resize
from torchcam.targets import class_scores

from .facts import Facts
from .findings import Finding, finding, listed, numbers

# The score and its gradient.


def check_score(facts: Facts) -> Iterator[Finding]:
    """Check that the explained score is no probability."""
    if facts.probabilities is None:
        return
    advice = (
        "Explain the logit: take the last activation function out of the model "
        "(`model.softmax = torch.nn.Identity()`, say), or pass `targets` that read what goes into it."
    )
    if facts.saturated is not None:
        shown = numbers(facts.probabilities[facts.saturated].tolist())
        yield finding(
            "score_saturated",
            f"the explained score is a probability, made by a {facts.squash}, and it is {shown}: there it hardly "
            "changes, whatever the evidence, and its gradient vanishes.",
            advice,
            samples=facts.saturated,
            severity="error" if any(bool(gradient.zero.any()) for gradient in facts.gradients) else None,
        )
    else:
        shown = numbers(facts.probabilities.tolist())
        yield finding(
            "score_squashed",
            f"the explained score is a probability, made by a {facts.squash} ({shown}): what speaks against other "
            "classes counts as evidence, too.",
            advice,
        )


def check_method(facts: Facts) -> Iterator[Finding]:
    """Check that the method can compute maps."""
    error = facts.raw.error or facts.final.error
    message = str(error)
    if isinstance(error, RuntimeError) and "not connected" in message:
        layers = message.partition("does not depend on ")[2] or "the target layer"
        choice = facts.recorded.choice
        yield finding(
            "no_gradient",
            f"the score does not depend on {layers} by any path that gradients take: the layer may belong to another "
            "branch, or the model cuts the graph behind it (`.detach()`, `.data`, `torch.no_grad()`, NumPy, an "
            "integer). Frozen parameters are not the reason.",
            f"Name a layer that has a gradient{f': {choice!r}' if choice else ''}, take the cut out of the model's "
            "`forward`, or use a method without gradients, such as ScoreCAM.",
        )
    elif error is not None:
        yield finding(
            "method_failed",
            f"{facts.recorded.method} cannot explain this pass: {message.rstrip('.')}.",
            "Do as the message says.",
        )


def check_gradients(facts: Facts) -> Iterator[Finding]:
    """Check that the gradients for the target layers are finite and not zero."""
    for gradient in facts.gradients:
        name = gradient.name
        if gradient.broken.any():
            place = ""
            if facts.first_broken_gradient is not None:
                place = f"Going back from the score, it first is so for the output of '{facts.first_broken_gradient}'."
            yield finding(
                "gradient_not_finite",
                f"the gradient for '{name}' holds NaN or infinite values, though scores and activations are finite. "
                f"{place}",
                "Look at what follows there: a root or a logarithm at 0, a norm of zeros, `torch.where` around either; "
                "clamp its argument.",
                layer=name,
                samples=gradient.broken,
            )
        if gradient.zero_on_grid.any():
            choice = facts.recorded.choice
            yield finding(
                "no_gradient",
                f"the gradient for '{name}' is 0 at all {gradient.positions} positions, but not at the tokens before "
                "them: the score is read from the class token alone.",
                f"Name {f'{choice!r}' if choice else 'an earlier layer'}, before the last attention, or a method that "
                "reads attention, such as LeGrad or TransformerAttribution.",
                layer=name,
                samples=gradient.zero_on_grid,
            )
        if gradient.zero.any() and facts.saturated is None:
            parameters = facts.recorded.model.named_parameters()
            zeros = [key for key, value in parameters if key.endswith("weight") and value.numel() and not value.any()]
            because = f" The parameters {listed(zeros)} are all 0." if zeros else ""
            yield finding(
                "zero_gradient",
                f"the gradient of the score for '{name}' is exactly 0 everywhere: no small change of this layer "
                f"changes the score.{because}",
                "Look at what follows it: a ReLU that lets nothing through, a saturated or a rounding function, "
                "weights that are 0. A method without gradients, such as AblationCAM, sees larger changes.",
                layer=name,
                samples=gradient.zero,
            )


def check_balance(facts: Facts) -> Iterator[Finding]:
    """Check that balanced gradients have a rule for every operation."""
    if facts.raw.unbalanced:
        yield finding(
            "unbalanced",
            f"balanced gradients have no rule for {listed(facts.raw.unbalanced)}, which the score goes through: these "
            "hand back plain gradients.",
            "Look at `extractor.completeness`: where it is far from 1, name a layer behind them, or compare with a "
            "method without gradients.",
        )


# The maps.


def check_signs(facts: Facts) -> Iterator[Finding]:
    """Check that maps have positive values and are not constant."""
    for cam in facts.maps:
        if cam.negative.any():
            values = cam.flat[cam.negative]
            message = (
                f"before the ReLU the map goes from {float(values.min()):.3g} to {float(values.amax(1).max()):.3g}: "
                f"what '{cam.layer}' shows speaks against the score, everywhere, and the ReLU leaves nothing."
            )
            yield _all_negative(facts, message, cam.layer, cam.negative)
        if not cam.constant.any() or facts.has_constant_layer:
            continue
        if cam.opposed:
            message = (
                f"no position of '{cam.layer}' has a positive gradient where it is active, and {facts.recorded.method} "
                "leaves out the negative ones."
            )
            yield _all_negative(facts, message, cam.layer, cam.constant)
            continue
        yield finding(
            "map_constant",
            f"the map is {numbers(cam.flat[cam.constant][:, 0].tolist())} everywhere, so there is nothing to show.",
            "The channels' weights are 0, or cancel: explain another class, name another layer, or compare with "
            "another method.",
            layer=cam.layer,
            samples=cam.constant,
        )


def _all_negative(facts: Facts, message: str, layer: str | None, samples: Tensor) -> Finding:
    another = ""
    if facts.classes is not None:
        predicted = class_scores(facts.output).argmax(1)
        differs = samples & (predicted != torch.tensor(facts.classes, device=predicted.device))
        if differs.any():
            another = f" (the model's own choice is {listed(sorted(set(predicted[differs].tolist())))})"
    other_method = ", or try LayerCAM, which weights each position by itself"
    return finding(
        "all_negative",
        message,
        f"Explain another class{another}, look at both signs with `relu=False` or at the evidence against the class "
        f'with `relu="negative"`{"" if facts.recorded.method == "LayerCAM" else other_method}.',
        layer=layer,
        samples=samples,
    )


def check_classes(facts: Facts) -> Iterator[Finding]:
    """Check that the map depends on the class."""
    final = facts.final
    if facts.recorded.cam.class_agnostic and final.cam is not None:
        yield finding(
            "class_agnostic",
            f"{facts.recorded.method} looks at no score: its map is the same for every class.",
            "For a map of one class, take a method that explains a score, such as GradCAM.",
        )
    if final.cam is None or final.rivals is None or final.rival_cam is None or facts.classes is None:
        return
    difference = (final.cam - final.rival_cam).flatten(1)
    alike = (difference.abs().amax(1) <= 0.01) & (final.cam.flatten(1).amax(1) > 0)
    if alike.any():
        first = int(alike.nonzero()[0])
        yield finding(
            "same_for_every_class",
            f"class {facts.classes[first]} and class {int(final.rivals[first])}, the best one beside it, have "
            f"the same map (they differ by {float(difference[alike].abs().max()):.2g} at most).",
            "Either both classes look at the same places, or the method does not tell them apart here: contrast "
            "them with FinerCAM, or name a later layer.",
            samples=alike,
        )


def check_peak(facts: Facts) -> Iterator[Finding]:
    """Check that the score falls when the peak of the map is masked."""
    image, cam, score = facts.image, facts.final.cam, facts.scores
    if image is None or cam is None or score is None or cam.ndim != image.ndim - 1:
        return
    try:
        facts.repeated.extractor.check_positions()
    except ValueError:  # the part of the input under the peak is not known
        return
    cam = resize(cam.unsqueeze(1), image.shape[2:]).flatten(1)
    if cam.shape[1] < 10:
        return
    masks = [mask.reshape(len(image), 1, *image.shape[2:]) for mask in _extremes(cam)]
    mean_colour = image.flatten(2).mean(2).reshape(*image.shape[:2], *[1] * (image.ndim - 2)).expand_as(image)
    fills = [mean_colour, blurred_out(image)]
    everything = torch.ones_like(masks[0])
    masked = (torch.where(mask, fill, image) for fill in fills for mask in (*masks, everything))
    found = facts.scores_of_variants(masked).reshape(len(fills), -1, len(image))  # (fills, masks, N)
    top_rise, bottom_rise, whole_rise = (found - score).unbind(1)
    scale = torch.maximum(whole_rise.abs(), bottom_rise.abs())
    inverted = ((top_rise > 0.5 * scale) & (top_rise > 2 * bottom_rise)).all(0) & (cam.amax(1) > cam.amin(1))
    if inverted.any():
        first = int(inverted.nonzero()[0])
        before, without_top, without_bottom = (float(v[first]) for v in (score, found[1, 0], found[1, 1]))
        yield finding(
            "inverted",
            f"the score rises when the 20 % of the input that the map ranks highest are blurred, from {before:.3g} to "
            f"{without_top:.3g}; without the 20 % that it ranks lowest it is {without_bottom:.3g}. The map points at "
            "what speaks against the score.",
            "Compare with a method that tries out what it says, such as ScoreCAM or AblationCAM; look at the evidence "
            'against the class with `relu="negative"`; check the sign of the target.',
            samples=inverted,
        )


def _extremes(cam: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks (N, positions) of the 20 % with the highest and with the lowest values."""
    shuffled = torch.randperm(cam.shape[1], generator=torch.Generator().manual_seed(0)).to(cam.device)  # breaks ties
    ranks = cam[:, shuffled].argsort(dim=1, stable=True).argsort(1)[:, shuffled.argsort()]
    share = max(1, round(0.2 * cam.shape[1]))
    return ranks >= cam.shape[1] - share, ranks < share


CHECKS = (check_score, check_method, check_gradients, check_balance, check_signs, check_classes, check_peak)
