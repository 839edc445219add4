"""What the modules of a model show of how their outputs are laid out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    """What the type of a module says of its output; None for what it does not say.

    Attributes:
        channels: the dimension of the channels, 1 or -1
        spatial: how many dimensions of positions there are
        batch: the dimension of the batch
    """

    channels: int | None = None
    spatial: int | None = None
    batch: int | None = None


_UNKNOWN = Kind()
_FIRST: dict[type[nn.Module], int | None] = {nn.GroupNorm: None, nn.SyncBatchNorm: None}
for _dimensions in (1, 2, 3):
    for _name in ("Conv", "ConvTranspose", "LazyConv", "BatchNorm", "InstanceNorm"):
        _FIRST[getattr(nn, f"{_name}{_dimensions}d")] = _dimensions
    for _name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        _FIRST[getattr(nn, f"{_name}{_dimensions}d")] = _dimensions
_ELEMENTWISE = frozenset(
    {
        *(nn.CELU, nn.ELU, nn.GELU, nn.SELU, nn.SiLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU),
        *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity),
    }
)
_SEQUENCES = frozenset({nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN})


def kind_of(modules: Mapping[str, nn.Module], name: str) -> Kind:
    """Return what is certain of the output of a module, by exact types: subclasses may do something else.

    A plain ``nn.Sequential`` returns what its last child does, and an activation function or dropout in one what its
    predecessor does.
    """
    module = modules.get(name)
    if type(module) not in _ELEMENTWISE:
        return _kind_of_last([module])
    parent, _, own = name.rpartition(".")
    container = modules.get(parent)
    if type(container) is not nn.Sequential:
        return _UNKNOWN
    names = [*container._modules]
    return _kind_of_last([*container._modules.values()][: names.index(own)])


def _kind_of_last(children: Sequence[nn.Module | None]) -> Kind:
    for child in reversed(children):
        if type(child) is nn.Sequential:
            return _kind_of_last([*child._modules.values()])
        if type(child) not in _ELEMENTWISE:
            return _kind_of_one(child)
    return _UNKNOWN


def _kind_of_one(module: Any) -> Kind:
    kind = type(module)
    if kind in _FIRST:
        return Kind(1, _FIRST[kind])
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        return Kind(-1)
    module = module.self_attn if kind is nn.TransformerEncoderLayer else module
    return Kind(-1, 1, 0 if module.batch_first else 1) if type(module) in _SEQUENCES else _UNKNOWN


def hint_of(module: nn.Module) -> int | None:
    """Return where the modules inside of one have their channels, 1 or -1, if they agree."""
    kinds = {type(inner) for inner in module.modules()}
    first, last = bool(kinds & _FIRST.keys()), bool(kinds & {nn.Linear, nn.LayerNorm, nn.MultiheadAttention})
    return None if first == last else 1 if first else -1


class Patches(NamedTuple):
    """The kernel of a convolution, as a model divides its input into patches."""

    in_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def grid(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the grid of the patches of an input."""
        sizes = zip(spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((side + 2 * pad - gap * (width - 1) - 1) // step + 1 for side, width, step, pad, gap in sizes)


@dataclass(frozen=True)
class Shown:
    """What a model shows of its tokens.

    Attributes:
        prefixes: how many tokens may come before those of the patches, from parameters for a class token or registers
        patches: the convolutions that may divide the input into patches
    """

    prefixes: tuple[int, ...] = (0,)
    patches: tuple[Patches, ...] = ()

    def grids(self, input_shape: Sequence[int], axes: Sequence[int]) -> set[tuple[int, ...]]:
        """Return the grids that the convolutions, and what halves their grids, make of an input.

        Args:
            input_shape: the shape of the input
            axes: its dimensions with positions
        """
        spatial = [input_shape[axis] for axis in axes]
        others = {1, *(side for axis, side in enumerate(input_shape) if axis and axis not in axes)}
        found = set()
        for patches in self.patches:
            if patches.in_channels not in others:
                continue
            if len(patches.kernel) == len(axes):
                grid = patches.grid(spatial)
            elif len(patches.kernel) == 2 and len(axes) == 3:  # frame by frame
                grid = (spatial[0], *patches.grid(spatial[1:]))
            else:
                continue
            while min(grid) > 1:
                found.add(grid)
                grid = tuple(math.ceil(side / 2) for side in grid)
        return found


NOTHING = Shown()

_PREFIX_TOKENS = re.compile(
    r"(.*_)?(cls|class|dist|distillation|reg|register|registers|global|pool)_?(tokens?|embedding|embed|pos_token)(_\d+)?"
)
_PARTS = "text|decoders?|quer(y|ies)|prompts?|latents?|q_?former|language|perceiver|resampler|abstractor"
_COMPOSED = re.compile(rf"(^|[._])({_PARTS})([._]|\d|$)", re.IGNORECASE)
_APART = re.compile(rf"(^|[._])({_PARTS}|heads?|lm|box|bbox|mask|caption|label|memory)([._]|\d|$)", re.IGNORECASE)


def shown_by(model: nn.Module) -> Shown:
    """Read what a model shows of its tokens, from its parameters, attributes and convolutions."""
    sums = {0}
    patches = set()
    for module in model.modules():
        if type(module) in {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
            conv: nn.modules.conv._ConvNd = module  # type: ignore[assignment]
            if isinstance(conv.padding, tuple) and max(conv.stride) > 1:
                patches.add(Patches(conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation))
            continue
        counts = [
            math.prod(parameter.shape[:-1])
            for name, parameter in module._parameters.items()
            if parameter is not None and _PREFIX_TOKENS.fullmatch(name)
        ]
        for size in range(1, min(len(counts), 4) + 1):
            sums |= {sum(some) for some in itertools.combinations(counts, size)}
        attributes = vars(module)
        for source in (attributes, getattr(attributes.get("config"), "__dict__", {})):
            for name in ("num_prefix_tokens", "num_register_tokens", "num_reg_tokens"):
                count = source.get(name)
                if type(count) is int and 0 < count <= 64:
                    sums |= {count} if name == "num_prefix_tokens" else {count, count + 1}
    return Shown(tuple(sorted(sums)), tuple(patches))


def is_composed(names: Iterable[str]) -> bool:
    """Check whether the modules of a model are of several parts, of which not all see the input as a picture.

    The names of projections within attention (query, key, value) do not count.
    """
    return any(_COMPOSED.search(name) for name in names if not name.endswith(("query", "queries")))


def is_apart(name: str) -> bool:
    """Check whether the name of a module says that its positions need not be those of the input."""
    return _APART.search(name) is not None
