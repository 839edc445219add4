"""The gradient of a score for what the target layers returned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ._balanced import balanced_grad
from ._recorder import Row

OTHER_SIGN = 0.1
"""The share of the rarer sign from which on activations count as of both signs."""


# What `torch.autograd.grad` calls after checks that take as long as the whole pass on a small model.
_engine = torch.autograd.Variable._execution_engine


def differentiate(
    score: Tensor,
    rows: Sequence[Row],
    retain_graph: bool,
    create_graph: bool,
    balanced: tuple[Any, set[str]] | None = None,
) -> list[Tensor]:
    """Differentiate a score with respect to what target layers returned, where graphs are recorded.

    Args:
        score: one score of each sample (N,), or several (N, K)
        rows: what the layers returned; all were reached
        retain_graph: whether the graph is kept
        create_graph: whether the gradients have a graph of their own
        balanced: for balanced gradients, the model's output, and a set that the names of operations without a rule are
            added to

    Returns:
        the gradients, shaped as the tensors; of several scores (K, ...), from one batched backward pass

    Raises:
        RuntimeError: if the score does not depend on a layer
    """
    gradients: Sequence[Tensor | None] = [None] * len(rows)
    if score.requires_grad:
        edges: Any = tuple([row.edge for row in rows])
        retain_graph |= create_graph
        try:
            many = score.ndim > 1
            if balanced is None and not many:
                gradients = _engine.run_backward(
                    (score,), (torch.ones_like(score),), retain_graph, create_graph, edges, True, accumulate_grad=False
                )
            else:
                grad: Any = torch.autograd.grad if balanced is None else partial(balanced_grad, *balanced)
                total = score.sum(0) if many else score  # the samples do not depend on each other
                start = (
                    torch.eye(len(total), dtype=total.dtype, device=total.device) if many else torch.ones_like(total)
                )
                gradients = grad(
                    total, edges, start, retain_graph, create_graph, allow_unused=True, is_grads_batched=many
                )
        except RuntimeError as error:
            if "second time" in str(error):
                error.add_note("To explain several scores of one forward pass, call with `retain_graph=True`.")
            raise
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) == len(rows):
        return found
    # Of a layer's several tensors some may not count: a detector reads a box from one level of its pyramid.
    connected = {row.layer for row, gradient in zip(rows, gradients, strict=True) if gradient is not None}
    missing = [row.name for row in rows if row.layer not in connected]
    if missing:
        raise RuntimeError(
            "the explained score is not connected to every target layer: it does not depend on the output of "
            + ", ".join(f"'{name}'" for name in missing)
            + ". `scores` of another pass, a cut such as `.detach()` and activation checkpointing hide a dependence"
            + ("" if balanced is None else "; balanced gradients take gates, attention and divisors for constants")
        )
    return [
        row.values.new_zeros((*score.shape[1:], *row.values.shape)) if gradient is None else gradient  # type: ignore[union-attr]
        for row, gradient in zip(rows, gradients, strict=True)
    ]


def nodes_of(score: Tensor) -> Iterator[Node]:
    """Go through the nodes of the graph of a score."""
    seen: set[Node | None] = {None}
    ahead = [score.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions]


def mixes_samples(score: Tensor, rows: Sequence[Row]) -> bool:
    """Check whether batch normalization by the statistics of the batch is on a way from a target layer to a score."""
    uses: dict[Node | None, list[Any]] = defaultdict(list)
    for node in nodes_of(score):
        for following, _ in node.next_functions:
            uses[following].append(node)
    edges = [get_gradient_edge(row.edge) if isinstance(row.edge, Tensor) else row.edge for row in rows]
    ahead, behind = [edge.node for edge in edges if edge is not None], []
    while ahead:
        found = uses.pop(ahead.pop(), [])
        ahead += found
        behind += [node for node in found if "BatchNorm" in node.name() and getattr(node, "_saved_training", True)]
    try:  # instance normalization is that of a batch of one
        return any(not hasattr(node, "_saved_input") or len(node._saved_input) > 1 for node in behind)
    except RuntimeError:  # the graph is used up, as the backward pass will say
        return False


def reaches(score: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Check whether any of some leaves is in the graph of a score."""
    wanted = set(map(id, leaves))
    return any(id(getattr(node, "variable", None)) in wanted for node in nodes_of(score))


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


def share_of_other_sign(activation: Tensor) -> Tensor:
    """Return the share of the rarer sign in the sum of the sizes of activations (N, C, *spatial): (N,), 0 to 0.5."""
    flat = activation.detach().flatten(1)
    size = flat.abs().sum(1)
    return torch.where(size == 0, 0.0, (size - flat.sum(1).abs()) / (2 * size))
