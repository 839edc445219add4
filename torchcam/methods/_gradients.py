"""The gradient of a score for what the target layers returned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._balanced import balanced_grad

__all__ = ["differentiate", "share_of_score"]


def differentiate(
    score: Tensor,
    recorded: Sequence[tuple[str, str, Tensor | None, Any]],
    retain_graph: bool,
    create_graph: bool,
    balanced: tuple[Any, set[str]] | None = None,
) -> list[Tensor]:
    """Differentiate a score with respect to what target layers returned.

    Args:
        score: one score of each sample (N,), or several (N, K)
        recorded: of each tensor its layer, its name, its values, and what to differentiate for; None to leave one out
        retain_graph: whether the graph is kept
        create_graph: whether the gradients have a graph of their own
        balanced: for balanced gradients, the model's output, and a set that the names of operations without a rule are
            added to

    Returns:
        the gradients, shaped as the tensors; of several scores (K, ...), from one batched backward pass

    Raises:
        RuntimeError: if the score does not depend on a layer
    """
    wanted = [(layer, name, tensor, edge) for layer, name, tensor, edge in recorded if edge is not None]
    gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
    many = score.ndim > 1
    if score.requires_grad:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad():
            one = torch.ones_like(score) if not many else None  # the samples do not depend on each other
            total = score.sum(0) if many else score
            try:
                grad = torch.autograd.grad if balanced is None else partial(balanced_grad, *balanced)
                gradients = grad(
                    total,
                    [edge for *_, edge in wanted],
                    torch.eye(len(total), dtype=total.dtype, device=total.device) if many else one,
                    retain_graph=retain_graph or create_graph,
                    create_graph=create_graph,
                    allow_unused=True,
                    is_grads_batched=many,
                )
            except RuntimeError as error:
                if "second time" in str(error):
                    error.add_note("To explain several scores of one forward pass, call with `retain_graph=True`.")
                raise
    # Of a layer's several tensors some may not count: a detector reads a box from one level of its pyramid.
    connected = {layer for (layer, *_), gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    missing = [name for layer, name, *_ in wanted if layer not in connected]
    if missing:
        raise RuntimeError(
            "the explained score is not connected to every target layer: it does not depend on the output of "
            + ", ".join(f"'{name}'" for name in missing)
            + ". `scores` of another pass, a cut such as `.detach()` and activation checkpointing hide a dependence"
            + ("" if balanced is None else "; balanced gradients take gates, attention and divisors for constants")
        )
    return [
        tensor.new_zeros((*score.shape[1:], *tensor.shape)) if gradient is None else gradient  # type: ignore[union-attr]
        for (_, _, tensor, _), gradient in zip(wanted, gradients, strict=True)
    ]


def share_of_score(activation: Tensor, gradient: Tensor, score: Tensor) -> Tensor:
    """Return how much of a score the sum of gradient × activation is, for each sample.

    Args:
        activation: the activation of a layer, (N, ...)
        gradient: the gradient of the score for it, (N, ...), or (N * K, ...) of K scores
        score: the score, (N,) or (N, K)

    Returns:
        the shares, shaped as the score: 1 where the layer accounts for all of it, NaN where it is 0
    """
    count = len(gradient) // len(activation)
    total = (gradient * activation.repeat_interleave(count, 0)).flatten(1).sum(1).reshape(score.shape)
    return torch.where(score == 0, torch.nan, total / score)
