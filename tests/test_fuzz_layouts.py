"""Small random networks whose sizes coincide: every layout that is found is that of the module, or none is."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.models import CONVOLUTIONS, shuffled
from torchcam.layers import candidates
from torchcam.methods import MeanActivation

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class First(nn.Module):
    """A block of a type that nobody knows: maps, channels first."""

    def __init__(self, dim: int, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[dim](inside, outside, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Last(nn.Module):
    """A block that returns maps with channels last."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inside)
        self.linear = nn.Linear(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)).relu()


class Moved(nn.Module):
    """Moves the channels to the end, or back."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.places = source, destination

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(*self.places)


class Tokens(nn.Module):
    """Makes a row of tokens of a map with channels last, after a class token."""

    def __init__(self, channels: int, with_class: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels)) if with_class else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, -2)
        return x if self.cls_token is None else torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)


class Net(nn.Module):
    """Blocks, then the mean over all positions, and a classifier."""

    def __init__(self, blocks: list[nn.Module], channels: int, channel: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.channel = channel
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.movedim(self.channel, -1).flatten(1, -2).mean(1))


@dataclass
class Case:
    """A network, its input, and by block how its output is laid out as (N, C, *grid)."""

    model: nn.Module
    x: Tensor
    to_grid: list[Callable[[Tensor], Tensor]]


def draw(seed: int) -> Case:
    """Draw a network of one to four blocks, in which numbers of channels, sides and samples are often the same."""
    choose = random.Random(seed)
    dim = choose.choice([1, 1, 2, 2, 3])
    sizes = [choose.randint(4, {1: 40, 2: 16, 3: 9}[dim]) for _ in range(2)]
    spatial = [choose.choice(sizes) for _ in range(dim)]
    batch_size = choose.choice([1, 2, 3, *sizes[:1]])
    channels = choose.choice([1, 3, 3, 4, choose.choice(sizes) if max(sizes) <= 8 else 2])
    x = torch.randn((batch_size, channels, *spatial), generator=torch.Generator().manual_seed(seed))
    blocks: list[nn.Module] = []
    to_grid: list[Callable[[Tensor], Tensor]] = []

    def first(t: Tensor) -> Tensor:
        return t

    def last(t: Tensor) -> Tensor:
        return t.movedim(-1, 1)

    layout, shape = first, torch.Size(spatial)
    for _ in range(choose.randint(1, 4)):
        wide = choose.choice([*range(1, 9), *(side for side in shape if side <= 16)])
        stride = choose.choice([1, 1, 2]) if min(shape) > 4 else 1
        if layout is first:
            padding = choose.choice([1, 1, 2])
            new: nn.Module = choose.choice(
                [
                    CONVOLUTIONS[dim](channels, wide, 3, stride, padding),
                    nn.Sequential(CONVOLUTIONS[dim](channels, wide, 3, stride, padding), NORMS[dim](wide), nn.ReLU()),
                    First(dim, channels, wide, stride),
                    First(dim, channels, wide, stride),
                    POOLS[dim](2) if stride == 2 else NORMS[dim](channels),
                    Moved(1, -1),
                ]
            )
            layout = last if isinstance(new, Moved) else first
        else:
            new = choose.choice([Last(channels, wide), nn.LayerNorm(channels), Moved(-1, 1)])
            layout = first if isinstance(new, Moved) else last
        blocks.append(new)
        to_grid.append(layout)
        with torch.no_grad():
            probe = x[:1]
            for block in blocks:
                probe = block.eval()(probe)
        channels, shape = (probe.shape[1], probe.shape[2:]) if layout is first else (probe.shape[-1], probe.shape[1:-1])
    if layout is last and choose.random() < 0.4:
        with_class, grid = choose.random() < 0.5, tuple(shape)
        blocks += [Tokens(channels, with_class), Last(channels, channels)]
        to_grid += [lambda t: t[:, int(with_class) :].mT.unflatten(2, grid)] * 2
    model = Net(blocks, channels, -1 if layout is last else 1)
    return Case(shuffled(model, seed), x, to_grid)


def misread(seed: int) -> list[str]:
    """Say which layers of a network are read wrongly, without a warning."""
    case = draw(seed)
    found = []
    for number, to_grid in enumerate(case.to_grid):
        outputs: list[Tensor] = []
        handle = case.model.blocks[number].register_forward_hook(lambda _m, _a, out, kept=outputs: kept.append(out))
        with torch.no_grad():
            case.model(case.x)
        handle.remove()
        right = to_grid(outputs[0])
        name = f"blocks.{number}"
        with warnings.catch_warnings(record=True) as caught, MeanActivation(case.model, name) as extractor:
            warnings.simplefilter("always")
            case.model(case.x)
            try:
                (grid,) = extractor.hook_a
            except ValueError:  # refused
                continue
        if not caught and not torch.equal(grid, right):
            kind = type(case.model.blocks[number]).__name__
            found.append(f"{seed}: {name} ({kind}) {tuple(outputs[0].shape)} of {tuple(case.x.shape)}: {grid.shape}")
    choice = candidates(case.model, case.x).choice
    if choice is not None and choice.startswith("blocks."):
        layout = next(one.layout for one in candidates(case.model, case.x) if one.name == choice)
        number = int(choice.split(".")[1])
        if choice.count(".") == 1:
            outputs = []
            handle = case.model.blocks[number].register_forward_hook(lambda _m, _a, out: outputs.append(out))
            with torch.no_grad():
                case.model(case.x)
            handle.remove()
            if not torch.equal(layout.to_grid(outputs[0]), case.to_grid[number](outputs[0])):
                found.append(f"{seed}: default {choice} {tuple(outputs[0].shape)} of {tuple(case.x.shape)}: {layout}")
    return found


def test_no_layer_is_misread() -> None:
    assert [line for seed in range(60) for line in misread(seed)] == []


@pytest.mark.zoo
def test_no_layer_of_2000_networks_is_misread() -> None:
    assert [line for seed in range(60, 2060) for line in misread(seed)] == []
