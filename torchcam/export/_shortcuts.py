"""What a backward pass computes in vain, left out of a graph.

The gradient of a score is zero for all classes but one, and behind a class token for all tokens but that one. Autograd
multiplies these zeros: with the weights of the last linear layer, and with those of the last block of a vision
transformer, which costs as much as the block itself. Behind global pooling it is the same at all positions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
KEPT = (aten.select_backward.default,)
"""What is decomposed here, in place of torch's table."""


def shorten(graph: Graph) -> None:
    """Rewrite a decomposed graph in place, so that it computes the same with less."""
    for node in list(graph.nodes):
        if node.target is aten.mm.default:
            _select_rows(graph, node)
        elif node.target in {aten.mean.dim, aten.sum.dim_IntList}:
            _average_once(graph, node)
    _Positions(graph).run()
    graph.eliminate_dead_code()


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a node, with what torch notes of its value."""
    node = graph.call_function(target, args, kwargs)
    values = map_arg((args, kwargs), lambda one: one.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _padded(graph: Graph, values: Node, axis: int, before: Any, after: Any, size: Any) -> Node:
    """Insert zeros before and after a position of an axis."""
    shape = list(values.meta["val"].shape)
    margins = [0] * (2 * (len(shape) - axis - 1)) + [before, after]
    node = graph.call_function(aten.constant_pad_nd.default, (values, margins, 0.0))
    shape[axis] = size
    node.meta["val"] = values.meta["val"].new_empty(shape)  # computed by torch, it would fix dynamic sizes
    return node


def _select_rows(graph: Graph, product: Any) -> None:
    """Replace the product of a matrix with one-hot rows by the rows that these select.

    Such a row is the gradient of the score of a class: 1 where the number of the column is that of the class.
    """
    hot, weight = product.args
    if hot.target is not aten.where.self or hot.args[0].target is not aten.eq.Tensor:
        return
    condition, ones, zero = hot.args
    classes, columns = condition.args
    known = (
        [_constant(ones), _constant(zero)] == [1, 0]
        and classes.target is aten.unsqueeze.default
        and columns.target is aten.arange.start_step
        and columns.args == (0, *columns.meta["val"].shape)
        and classes.args[0].meta["val"].ndim == 1
    )
    if known:
        with graph.inserting_before(product):
            product.replace_all_uses_with(_call(graph, aten.index_select.default, weight, 0, classes.args[0]))


def _average_once(graph: Graph, node: Any) -> None:
    """Sum or average what is the same at all positions, as the gradient of a pooled map is, as one position."""
    source, dims, *rest = node.args
    steps: list[Any] = []
    while source.target in {aten.alias.default, aten.clone.default, aten.div.Tensor, aten.mul.Tensor}:
        if any(isinstance(one, Node) for one in source.args[1:]):
            return
        steps.append(source)
        source = source.args[0]
    sides, axes = _sides(node.args[0]), _axes(dims, node.args[0])
    if source.target is not aten.expand.default or len(_sides(source.args[0])) != len(sides):
        return
    same = [axis for axis in axes if _sides(source.args[0])[axis] == 1]
    count = math.prod(sides[axis] for axis in same)
    if not same or not isinstance(count, int):
        return
    with graph.inserting_before(node):
        values = source.args[0]
        for step in reversed(steps):
            values = _call(graph, step.target, values, *step.args[1:], **step.kwargs)
        values = _call(graph, node.target, values, dims, *rest, **node.kwargs)
        if node.target is aten.sum.dim_IntList:
            values = _call(graph, aten.mul.Tensor, values, count)
        node.replace_all_uses_with(values)


def _constant(node: Any) -> float | None:
    """Return the value that all elements of a tensor have, if it shows."""
    while node.target in {aten.expand.default, aten.unsqueeze.default, aten.view.default}:
        node = node.args[0]
    at = {aten.full_like.default: 1, aten.full.default: 1, aten.scalar_tensor.default: 0}.get(node.target)
    value: float | None = None if at is None else node.args[at]
    return value


@dataclass(frozen=True)
class _Position:
    """A tensor that is zero but at one position of an axis.

    Attributes:
        values: what is at that position, the axis kept
        axis: the axis; if it was merged with its neighbours, that of the whole
        index: the position
        merged: the sizes of the axes that were merged, and which of them has the position
    """

    values: Node
    axis: int
    index: int
    merged: tuple[tuple[Any, ...], int] | None = None

    def matches(self, other: _Position) -> bool:
        """Check whether two tensors are zero at the same positions."""
        return replace(self, values=other.values) == other


class _Positions:
    """Follows tensors that are zero but at one position through a graph, and computes what is there alone."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[Node, _Position] = {}
        self.whole: dict[Node, Node] = {}

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.nodes):
            inputs = [one for one in node.all_input_nodes if one in self.known]
            rule = _RULES.get(node.target)
            with self.graph.inserting_before(node):
                if rule is not None and (inputs or rule is _start) and rule(self, node):
                    continue
                for one in inputs:
                    node.replace_input_with(one, self.dense(one))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a node."""
        return _call(self.graph, target, *args, **kwargs)

    def found(self, node: Node, position: _Position, target: Any, *args: Any, **kwargs: Any) -> bool:
        """Note that a node is zero but at a position, and what is there."""
        self.known[node] = replace(position, values=self.call(target, *args, **kwargs))
        return True

    def dense(self, node: Node) -> Node:
        """Return a whole tensor, zeros and all."""
        if node not in self.known:
            return node
        if node not in self.whole:
            known, sides, values = self.known[node], _sides(node), self.known[node].values
            axis = known.axis
            if known.merged is not None:
                sizes, inner = known.merged
                sides, axis = (*sides[:axis], *sizes, *sides[axis + 1 :]), axis + inner
                values = self.call(aten.view.default, values, _as_shape((*sides[:axis], 1, *sides[axis + 1 :])))
            values = _padded(self.graph, values, axis, known.index, sides[axis] - known.index - 1, sides[axis])
            if known.merged is not None:
                values = self.call(aten.view.default, values, _as_shape(_sides(node)))
            self.whole[node] = values
        return self.whole[node]

    def at(self, node: Any, position: _Position, ndim: int) -> Any:
        """Return the part of a factor that meets a position in a product of so many dimensions; None if unknown."""
        if not isinstance(node, Node) or node.meta["val"].ndim == 0:
            return node
        if node in self.known:
            return self.known[node].values if self.known[node].matches(position) else None
        axis = position.axis - (ndim - node.meta["val"].ndim)
        if axis < 0 or node.meta["val"].shape[axis] == 1:
            return node
        return None if position.merged else self.row(node, axis, position.index)

    def row(self, node: Node, axis: int, index: int) -> Node:
        """Return one position of an axis, the axis kept."""
        return self.call(aten.slice.Tensor, node, axis, index, index + 1)


# Rules. Each says what an operation makes of tensors that are zero but at one position, if it knows.


def _start(run: _Positions, node: Any) -> bool:
    """The gradient of one position of an axis."""
    gradient, sizes, axis, index = node.args
    axis, size = axis % len(sizes), sizes[axis]
    values = run.call(aten.unsqueeze.default, run.dense(gradient), axis)
    if isinstance(size, int):
        run.known[node] = _Position(values, axis, index % size)
        return True
    count = size.meta["val"]
    if index < 0:
        whole = _padded(run.graph, values, axis, run.call(operator.add, size, index), -index - 1, count)
    else:
        whole = _padded(run.graph, values, axis, index, run.call(operator.sub, size, index + 1), count)
    node.replace_all_uses_with(whole)
    return True


def _unary(run: _Positions, node: Any) -> bool:
    position = run.known[node.args[0]]
    return run.found(node, position, node.target, position.values, *node.args[1:], **node.kwargs)


def _scaled(run: _Positions, node: Any) -> bool:
    """A product, a quotient of a numerator that is zero, or what a condition chooses in place of a zero."""
    first, others = _first(run, node), [one for one in node.args if one is not _first(run, node)]
    position, sides = run.known[first], _sides(node)
    if node.target is aten.div.Tensor and first is not node.args[0]:
        return False
    if node.target is aten.where.self and (first is node.args[0] or _constant(others[1]) != 0):
        return False
    if len(sides) != len(_sides(first)) or sides[position.axis] != _sides(first)[position.axis]:
        return False
    parts = [run.at(one, position, len(sides)) for one in node.args]
    return None not in parts and run.found(node, position, node.target, *parts)


def _added(run: _Positions, node: Any) -> bool:
    """A sum of two that are zero at the same positions."""
    one, other = (run.known.get(term) for term in node.args)
    if one is None or other is None or not one.matches(other):
        return False
    left, right = map(_sides, node.args)
    if len(left) != len(right) or left[one.axis] != right[one.axis]:
        return False
    return run.found(node, one, node.target, one.values, other.values, **node.kwargs)


def _summed(run: _Positions, node: Any) -> bool:
    source, dims, *rest = node.args
    position, gone = run.known[source], _axes(dims, source)
    if position.merged is not None or not gone:
        return False
    if position.axis in gone:
        node.replace_all_uses_with(run.call(node.target, position.values, *node.args[1:], **node.kwargs))
        return True
    axis = position.axis if rest and rest[0] else position.axis - sum(one < position.axis for one in gone)
    return run.found(node, replace(position, axis=axis), node.target, position.values, *node.args[1:], **node.kwargs)


def _permuted(run: _Positions, node: Any) -> bool:
    source, dims = node.args
    position = run.known[source]
    moved = replace(position, axis=_axes(dims, source).index(position.axis))
    return run.found(node, moved, node.target, position.values, dims)


def _unsqueezed(run: _Positions, node: Any) -> bool:
    source, axis = node.args
    position = run.known[source]
    moved = replace(position, axis=position.axis + (axis % len(_sides(node)) <= position.axis))
    return run.found(node, moved, node.target, position.values, axis)


def _squeezed(run: _Positions, node: Any) -> bool:
    source, dims = node.args
    position, gone = run.known[source], _axes(dims, source)
    if position.axis in gone:
        return False
    moved = replace(position, axis=position.axis - sum(one < position.axis for one in gone))
    return run.found(node, moved, node.target, position.values, dims)


def _expanded(run: _Positions, node: Any) -> bool:
    source, sizes = node.args
    position, new = run.known[source], len(_sides(node)) - len(_sides(source))
    axis = position.axis + new
    if _sides(node)[axis] != _sides(source)[position.axis]:
        return False
    sizes = [*sizes[:axis], -1, *sizes[axis + 1 :]]
    return run.found(node, replace(position, axis=axis), node.target, position.values, sizes)


def _viewed(run: _Positions, node: Any) -> bool:
    """An axis that stays, is merged with its neighbours, or is split again."""
    source, shape = node.args
    position, before, after = run.known[source], _sides(source), _sides(node)
    axis, shape = position.axis, list(shape)
    if position.merged is not None:
        sizes, inner = position.merged
        if (*before[:axis], *sizes) != after[: axis + len(sizes)]:
            return False
        moved, side = replace(position, axis=axis + inner, merged=None), 1
    elif (stays := _same_place(before, axis, axis + 1, after)) is not None:
        moved, side = replace(position, axis=stays), 1
    else:
        spans = [(a, b) for a in range(axis + 1) for b in range(axis + 1, len(before) + 1) if b - a > 1]
        places = [(a, b, place) for a, b in spans if (place := _same_place(before, a, b, after)) is not None]
        if not places or -1 in shape or sum(not isinstance(side, int) for side in before) > 1:
            return False
        a, b, place = places[0]
        moved, side = replace(position, axis=place, merged=(before[a:b], axis - a)), -1
    shape[moved.axis] = side
    return run.found(node, moved, node.target, position.values, shape)


def _same_place(before: Sequence[Any], start: int, end: int, after: Sequence[Any]) -> int | None:
    """Return the axis of a view that axes of its source became."""
    for axis, side in enumerate(after):
        if side == math.prod(before[start:end]) and math.prod(after[:axis]) == math.prod(before[:start]):
            return axis
    return None


def _multiplied(run: _Positions, node: Any) -> bool:
    """A product of matrices: along a row or column that is zero, or summed over the position."""
    left, right = node.args
    rows = len(_sides(node)) - 2
    first = left if left in run.known else right
    position = run.known[first]
    other = run.dense(right if first is left else left)
    kept, summed = (rows, rows + 1) if first is left else (rows + 1, rows)
    if position.axis == kept:
        parts = [position.values, other]
    elif position.axis == summed and position.merged is None:
        parts = [position.values, run.row(other, rows if first is left else rows + 1, position.index)]
    else:
        return False
    parts = parts if first is left else parts[::-1]
    if position.axis == kept:
        return run.found(node, position, node.target, *parts)
    node.replace_all_uses_with(run.call(node.target, *parts))
    return True


_RULES: dict[Any, Callable[[_Positions, Any], bool]] = {
    aten.select_backward.default: _start,
    **dict.fromkeys((aten.alias.default, aten.clone.default, aten.neg.default, aten.mul.Scalar), _unary),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor, aten.where.self), _scaled),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _added),
    aten.sum.dim_IntList: _summed,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.dims: _squeezed,
    aten.expand.default: _expanded,
    aten.view.default: _viewed,
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _multiplied),
}


def _first(run: _Positions, node: Any) -> Any:
    return next(one for one in node.args if one in run.known)


def _sides(node: Any) -> tuple[Any, ...]:
    """Return the sizes of a tensor, those that are dynamic as expressions."""
    return tuple(side.node.expr if isinstance(side, torch.SymInt) else side for side in node.meta["val"].shape)


def _axes(dims: Sequence[int] | None, source: Node) -> list[int]:
    return [dim % len(_sides(source)) for dim in dims or ()]


def _as_shape(sides: Sequence[Any]) -> list[int]:
    """Return a shape with at most one dynamic size, as a view takes it."""
    return [side if isinstance(side, int) else -1 for side in sides]
