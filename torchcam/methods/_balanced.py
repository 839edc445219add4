"""Balanced gradients: each operation hands back as much of the score as has come through it.

The rules change what operations hand back and leave the forward pass as it is. Without biases, the sum of gradient ×
activation over a layer that all paths cross is the score. They follow LibraGrad (Mehri, Baghshah & Pilehvar, CVPR 2025,
arXiv:2411.16760) and AttnLRP (Achtibat et al., ICML 2024, arXiv:2402.05602):

* ``y = f(x)`` with ``f(0) = 0`` hands back ``grad · f(x) / x``. Piecewise linear functions do so already.
* The standard deviation of a normalisation, and whatever else divides, is a constant.
* A gate (a softmax, a sigmoid) that is multiplied with a value is a constant.
* Of two other paths that are multiplied, each gets half of its gradient.

The rules are hooks on the nodes of the graph. They are removed before the call returns and act in its own backward pass
alone: another backward pass through the same graph, in another thread as well, gets plain gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torchcam._tensors import tensors_in

Gradients = Sequence[Tensor | None]
Rule = Callable[[Gradients, Gradients], tuple[Tensor | None, ...]]  # of a node's plain gradients for inputs and outputs


def balanced_grad(
    output: Any,
    unbalanced: set[str],
    score: Tensor,
    inputs: Sequence[Tensor | GradientEdge],
    grad_outputs: Tensor,
    retain_graph: bool,
    create_graph: bool = False,
    *,
    together: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Differentiate a score with balanced gradients, as :func:`torch.autograd.grad` does with plain ones.

    Args:
        output: the model's output, in any structure; what makes the score of it is differentiated as it is
        unbalanced: the names of operations that have no rule are added to it
        score: the score
        inputs: what to differentiate for
        grad_outputs: the gradient of the score
        retain_graph: whether the graph is kept
        create_graph: whether the gradients have a graph of their own
        together: whether the inputs count as one: what depends on one of them depends on all
        options: what else :func:`torch.autograd.grad` takes

    Returns:
        the gradients, None where no gradient gets to an input
    """
    score = score.view_as(score)  # its node is new: no other backward pass begins there
    edges = [edge if isinstance(edge, GradientEdge) else get_gradient_edge(edge) for edge in inputs]
    outputs = {tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None}
    plans, groups = [_Plan(score.grad_fn, edges, outputs, together)], [edges]
    if not plans[0].fits_all:
        plans = [_Plan(score.grad_fn, [edge], outputs) for edge in edges]
        groups = [[edge] for edge in edges]
    gradients: tuple[Tensor | None, ...] = ()
    for number, (plan, group) in enumerate(zip(plans, groups, strict=True), 1):
        with _hooked(score, plan.rules):
            keep = retain_graph or number < len(plans)
            gradients += torch.autograd.grad(score, group, grad_outputs, keep, create_graph, **options)
            unbalanced |= plan.unbalanced
    return gradients


@contextmanager
def _hooked(score: Tensor, rules: Sequence[tuple[Node, Rule]]) -> Iterator[None]:
    """Apply rules in the backward pass that begins at a score inside the block."""
    own: list[int] = []  # the number of that pass; others may run through the same nodes meanwhile

    def begin(_gradient: Tensor) -> None:
        own.append(torch._C._current_graph_task_id())

    def apply(rule: Rule, plain: Gradients, incoming: Gradients) -> tuple[Tensor | None, ...] | None:
        if torch._C._current_graph_task_id() not in own or all(gradient is None for gradient in plain):
            return None
        return rule(plain, incoming)

    handles: list[Any] = [score.register_hook(begin)]  # type: ignore[no-untyped-call]  # torch's
    try:
        for node, rule in rules:
            handles.append(node.register_hook(partial(apply, rule)))
        yield
    finally:
        own.clear()
        for handle in handles:
            handle.remove()


# What nodes do, by the names of torch's functions. Numbers are positions among a node's inputs.

_PIECEWISE_LINEAR = re.compile(
    "A(bs|dd|lias|max|min)|Adaptive(Avg|Max)Pool.*|AsStrided.*|AvgPool.*|Cat|Clone|Col2Im|ConstantPadNd|Copy(Backwards)?"
    "|Cumsum|Detach|Diagonal|Expand|Fft.*|Fill|Flip|FractionalMaxPool.*|(Fused|Native)Dropout|Gather|Im2Col|Imag|Index.*"
    "|Kthvalue|LeakyRelu|(LinalgVector)?Norm|Masked(Fill|Scatter|Select)|Max|MaxPool.*|MaxUnpool.*|Maximum|Mean|Median"
    "|Min|Minimum|Mt|NanToNum|Nan(mean|sum)|Neg|Permute|Pixel(Uns|S)huffle|PreluKernel|Real|Re(flection|plication)Pad.*"
    "|Relu|Repeat|Reshape.*|Roll|Rot90|RreluWithNoise|Rsub|Scatter.*|Select|Slice.*|Sort|Split.*|Squeeze|Stack|Std(Mean)?"
    "|Sub|Sum|T|Take.*|Threshold|ToCopy|Topk|Trace|Transpose|Tri[lu]|Unbind|Unfold.*|Unsafe.*|Unsqueeze|Upsample.*"
    "|VarMean|View.*|Where"
)
_FACTORS = {
    **dict.fromkeys(("Bmm", "Convolution", "Div", "Dot", "GridSampler2D", "GridSampler3D"), (0, 1)),
    **dict.fromkeys(("Linear", "Mm", "Mul", "Mv"), (0, 1)),
    **dict.fromkeys(("Addbmm", "Addcdiv", "Addcmul", "Addmm", "Addmv", "Addr", "Baddbmm"), (1, 2)),
    **dict.fromkeys(
        (
            "ScaledDotProductCudnnAttention",
            "ScaledDotProductEfficientAttention",
            "ScaledDotProductFlashAttention",
            "ScaledDotProductFlashAttentionForCpu",
            "ScaledDotProductFusedAttentionOverrideable",
        ),
        (0, 1, 2, 3),
    ),
}
_VALUES = {"Addcdiv": 1, "Div": 0, "GridSampler2D": 0, "GridSampler3D": 0} | {
    kind: 2 for kind, factors in _FACTORS.items() if len(factors) == 4
}  # all other factors are constants
_GATES = {"Hardsigmoid", "MaskedSoftmax", "Reciprocal", "Rsqrt", "SafeSoftmax", "Sigmoid", "Softmax", "SpecialNdtr"}
_BOUNDED = {"Erf", "Tanh"}  # gates once a constant is added
_QUESTIONS = {"Exp", "Log", "LogSigmoid", "LogSoftmax", "Logsumexp", "Sigmoid", "Softmax"}


@cache
def _kind(name: str) -> str:
    """Return the function of torch that a node of this name differentiates; for another node, the name."""
    own = re.fullmatch(r"(?!Pow)(\w+)Backward\d+", name)  # x ** 2 and 2 ** x are told apart by their numbers
    return own[1] if own else name.removeprefix("torch::autograd::")


@cache
def _is_piecewise_linear(kind: str) -> bool:
    return _PIECEWISE_LINEAR.fullmatch(kind) is not None


class _Plan:
    """The rules for what lies between a score and some target layers.

    Args:
        root: the score's node
        targets: the target layers' edges
        outputs: the nodes of the model's output: what is above them belongs to the question, and is left as it is
        together: whether the targets count as one

    Attributes:
        rules: nodes with their rules
        unbalanced: the names of operations that have no rule
        fits_all: whether the rules are the same for each target layer alone. They are not, say, for both factors of a
            product and one of them: where that one stands alone, the other factor is a constant.
    """

    def __init__(
        self, root: Any, targets: Sequence[GradientEdge], outputs: Collection[Node], together: bool = False
    ) -> None:
        self.rules: list[tuple[Node, Rule]] = []
        self.unbalanced: set[str] = set()
        self.fits_all = True
        self._targets: dict[Node, dict[int, int]] = {}  # a bit for each target, by node and output
        for number, (node, output, *_) in enumerate(targets):
            of_node = self._targets.setdefault(node, {})
            of_node[output] = of_node.get(output, 0) | (1 if together else 1 << number)
        self._edges: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        self._kinds: dict[Node, str] = {}
        self._reach: dict[Node, int] = {}  # the targets that gradients get to from a node
        self._gates: dict[Node, bool | None] = {}  # whether a node returns a gate; None: it would, plus a constant
        order = self._order(root)
        inside = self._inside(order, outputs)
        constants = {node: self._constants(node, node in inside) for node in order}
        self._choose(order, inside, constants)

    def _order(self, root: Node) -> list[Node]:
        """List the nodes, each after those that it hands gradients to."""
        only_one = len(self._targets) == 1
        order: list[Node] = []
        ahead = [root]
        while ahead:
            node = ahead[-1]
            if node not in self._edges:
                self._edges[node] = () if only_one and node in self._targets else node.next_functions
                ahead += [one for one, _ in self._edges[node] if one is not None and one not in self._edges]
                continue
            ahead.pop()
            if node not in self._kinds:
                self._kinds[node] = _kind(node.name())
                order.append(node)
        return order

    def _inside(self, order: list[Node], outputs: Collection[Node]) -> Collection[Node]:
        """Return the nodes that belong to the model; all of them if its output is not among them."""
        inside = set(outputs).intersection(order)
        if not inside:
            return set(order)
        for node in reversed(order):
            if node in inside:
                inside.update(one for one, _ in self._edges[node] if one is not None)
        return inside

    def _reaches(self, edge: tuple[Node | None, int]) -> int:
        node, output = edge
        if node is None:
            return 0
        return self._reach[node] | (self._targets[node].get(output, 0) if node in self._targets else 0)

    def _constants(self, node: Node, inside: bool) -> tuple[Collection[int], bool]:
        """Return the inputs of a node that count as constants, and whether two others share the gradient."""
        edges, kind = self._edges[node], self._kinds[node]
        reaches = [self._reaches(edge) for edge in edges]
        constants: Collection[int] = ()
        shared = False
        factors = [i for i in _FACTORS.get(kind, ()) if i < len(edges) and reaches[i]] if inside else []
        if len(factors) > 1:
            value = _VALUES.get(kind)
            gates = [i for i in factors if self._gates[edges[i][0]]]  # type: ignore[index]  # it reaches a target
            if value is None and len(gates) == 1:
                (value,) = set(factors).difference(gates)
            if value is None:
                one, other = (reaches[i] for i in factors)
                shared = bool(one & other)
                self.fits_all &= not shared or one == other
            elif value in factors:
                constants = {i for i in factors if i != value and reaches[i] & reaches[value]}
                self.fits_all &= not any(reaches[i] & ~reaches[value] for i in constants)
        self._reach[node] = 0
        for i, reach in enumerate(reaches):
            if i not in constants:
                self._reach[node] |= reach
        if self._reach[node] or node in self._targets:
            self._gates[node] = self._is_gate(node, kind, [e for e, reach in zip(edges, reaches, strict=True) if reach])
        return constants, shared

    def _is_gate(self, node: Node, kind: str, edges: list[Any]) -> bool | None:
        """Check whether a node returns a number of which as much as there is passes, and no evidence of its own."""
        if kind in _GATES:
            return True
        if kind in _BOUNDED:
            return None
        if not edges:  # nothing behind it counts
            return False
        above = edges[0][0]
        if kind in {"Hardtanh", "Clamp"} and _number(node, "min_val" if kind == "Hardtanh" else "min") == 0:
            # ReLU6(x + 3), the hard sigmoid as it is written out
            return self._kinds[above] == "Add" and sum(map(bool, map(self._reaches, self._edges[above]))) == 1
        if kind == "PowBackward0":
            return (_number(node, "exponent") or 0) < 0
        if kind == "Div" and edges[0] is not self._edges[node][0]:
            return True
        if not (kind in _FACTORS or _is_piecewise_linear(kind)):
            return False
        found = {self._gates.get(one, False) for one, _ in edges}
        if found == {None} and kind in {"Add", "Sub", "Rsub"}:
            return True if len(edges) == 1 else None
        return found.pop() if len(found) == 1 else False

    def _choose(self, order: list[Node], inside: Collection[Node], constants: dict[Node, Any]) -> None:
        """Find the rules of the nodes that get a gradient."""
        behind_product = {order[-1]: False}
        for node in reversed(order):
            if node not in behind_product or not self._reach[node]:
                continue
            kind = self._kinds[node]
            behind = behind_product[node] or kind in _FACTORS
            for number, edge in enumerate(self._edges[node]):
                if edge[0] is not None and number not in constants[node][0] and self._reaches(edge):
                    behind_product[edge[0]] = behind_product.get(edge[0], False) or behind
                    if self._kinds[edge[0]] == "VarMean" and edge[1] == 0:
                        self.unbalanced.add("VarMean")
            if node in inside and not (kind in _QUESTIONS and not behind):
                self._choose_for(node, kind, *constants[node])

    def _choose_for(self, node: Node, kind: str, constants: Collection[int], shared: bool) -> None:
        if constants or shared:
            self.rules.append((node, partial(_product, constants, _FACTORS[kind] if shared else ())))
        elif kind.endswith("BatchNorm") and _number(node, "training") == 0:
            pass  # it is linear
        elif kind in _RULES and not self._gates[node]:
            rule, *names = _RULES[kind]
            try:
                saved = [_saved(node, name) for name in names]  # now: checkpoints hand out a tensor once in a pass
            except AttributeError:  # it has another name in this version of torch
                self.unbalanced.add(kind)
            else:
                self.rules.append((node, partial(_single, rule, saved)))
        elif kind in _FACTORS:
            if kind in _VALUES and not self._reaches(self._edges[node][_VALUES[kind]]):
                self.unbalanced.add(kind)
        elif not _is_piecewise_linear(kind):
            self.unbalanced.add(kind)


def _saved(node: Any, name: str) -> Any:
    return getattr(node, f"_saved_{name}")


def _number(node: Any, name: str) -> float | None:
    found = getattr(node, f"_saved_{name}", None)
    return found if isinstance(found, (int, float)) else None


# The rules for products: the plain gradients for the inputs, of which some are constants or share.


def _product(constants: Collection[int], shared: Collection[int], plain: Gradients, _: Gradients) -> Any:
    return tuple(
        None if number in constants or gradient is None else gradient / 2 if number in shared else gradient
        for number, gradient in enumerate(plain)
    )


# The rules for functions of one input: its plain gradient, the gradient for what was returned, and what was saved.


def _single(rule: Callable[..., Tensor], saved: list[Any], plain: Gradients, incoming: Gradients) -> Any:
    first, gradient = plain[0], incoming[0]
    return None if first is None else (rule(first, gradient, *saved).to(first.dtype), *plain[1:])


def _place(plain: Tensor) -> Tensor | None:
    """Return where a rule can write: the plain gradient, which its result replaces.

    None where gradients get a graph, and for those of several scores at once: torch has no place for them.
    """
    is_batched = torch._C._functorch.is_legacy_batchedtensor(plain)
    return None if torch.is_grad_enabled() or is_batched else plain


def _gelu(plain: Tensor, gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    out = _place(plain)
    if approximate == "tanh":  # (1 + tanh(y)) / 2 is sigmoid(2 y)
        scale = 2 * math.sqrt(2 / math.pi)
        twice = torch.mul(torch.mul(x, x, out=out).mul_(0.044715 * scale).add_(scale), x, out=out)
        return torch.mul(torch.sigmoid(twice, out=out), gradient, out=out)
    complement = torch.erfc(torch.mul(x, -math.sqrt(0.5), out=out), out=out)
    return torch.addcmul(gradient.new_zeros(()), gradient, complement, value=0.5, out=out)


def _silu(plain: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    out = _place(plain)
    return torch.mul(torch.sigmoid(x, out=out), gradient, out=out)


def _mish(_: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * torch.tanh(F.softplus(x))


def _hardswish(_: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * F.hardsigmoid(x)


def _elu(_: Tensor, gradient: Tensor, x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    negative = torch.where(x < 0, x * input_scale, -1.0)
    return gradient * scale * torch.where(x < 0, alpha * input_scale * torch.expm1(negative) / negative, 1.0)


def _celu(plain: Tensor, gradient: Tensor, x: Tensor, alpha: float) -> Tensor:
    return _elu(plain, gradient, x, alpha, 1.0, 1 / alpha)


def _clamp(plain: Tensor, gradient: Tensor, x: Tensor, lowest: Any, highest: Any = None) -> Tensor:
    has_bias = torch.zeros_like(x).clamp(lowest, highest) != 0  # the rest is linear or constant
    ratio = x.clamp(lowest, highest) / torch.where(x == 0, 1.0, x)
    return torch.where((x == 0) | has_bias, plain, gradient * ratio)


def _power(plain: Tensor, _: Tensor, exponent: float) -> Tensor:
    return plain / exponent


def _root(plain: Tensor, _: Tensor) -> Tensor:
    return plain * 2


def _glu(plain: Tensor, _: Tensor, dim: int) -> Tensor:
    value, gate = plain.chunk(2, dim)
    return torch.cat([value, torch.zeros_like(gate)], dim)


# Normalisations. ``rstd`` is one by the standard deviation.


def _layer_norm(
    plain: Tensor, gradient: Tensor, x: Tensor, shape: Sequence[int], rstd: Tensor, weight: Tensor | None
) -> Tensor:
    axes, out = tuple(range(-len(shape), 0)), _place(plain)
    scaled = torch.mul(gradient, _differentiable(rstd, x, axes), out=out)
    scaled = scaled if weight is None else torch.mul(scaled, weight, out=out)
    return scaled.sub_(scaled.mean(axes, keepdim=True))


def _rms_norm(
    _: Tensor, gradient: Tensor, x: Tensor, shape: Sequence[int], rstd: Tensor, weight: Tensor | None
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    return (gradient if weight is None else gradient * weight) * _differentiable(rstd, x, axes, centred=False)


def _group_norm(_: Tensor, gradient: Tensor, x: Tensor, groups: int, rstd: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        gradient = gradient * weight.reshape(-1, *[1] * (x.ndim - 2))
    grouped = gradient.reshape(len(x), groups, -1)
    scaled = grouped * _differentiable(rstd.unsqueeze(-1), x.reshape(grouped.shape), (-1,))
    return (scaled - scaled.mean(-1, keepdim=True)).reshape(x.shape)


def _batch_norm(_: Tensor, gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    axes, shape = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    scaled = gradient if weight is None else gradient * weight.reshape(shape)
    scaled = scaled * _differentiable(rstd.reshape(shape), x, axes)
    return scaled - scaled.mean(axes, keepdim=True)


def _differentiable(rstd: Tensor, x: Tensor, axes: tuple[int, ...], *, centred: bool = True) -> Tensor:
    """Return one by the standard deviation of x with a graph, if gradients get one: torch saves it without."""
    rstd = rstd.detach()
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rstd
    x = x.to(rstd.dtype)
    square = (x - x.mean(axes, keepdim=True) if centred else x).square().mean(axes, keepdim=True)
    return rstd * (1 + rstd**2 * (square - square.detach())).rsqrt()


_RULES: dict[str, tuple[Any, ...]] = {  # with the names of what nodes save
    "Celu": (_celu, "self", "alpha"),
    "Clamp": (_clamp, "self", "min", "max"),
    "ClampMin": (_clamp, "self", "min"),
    "CudnnBatchNorm": (_batch_norm, "input", "result2", "weight"),
    "Elu": (_elu, "self", "alpha", "scale", "input_scale"),
    "FusedRmsNorm": (_rms_norm, "input", "normalized_shape", "result1", "weight"),
    "Gelu": (_gelu, "self", "approximate"),
    "Glu": (_glu, "dim"),
    "Hardswish": (_hardswish, "self"),
    "Hardtanh": (_clamp, "self", "min_val", "max_val"),
    "MiopenBatchNorm": (_batch_norm, "input", "result2", "weight"),
    "Mish": (_mish, "self"),
    "NativeBatchNorm": (_batch_norm, "input", "result2", "weight"),
    "NativeGroupNorm": (_group_norm, "input", "group", "result2", "weight"),
    "NativeLayerNorm": (_layer_norm, "input", "normalized_shape", "result2", "weight"),
    "PowBackward0": (_power, "exponent"),
    "Silu": (_silu, "self"),
    "Sqrt": (_root,),
}
