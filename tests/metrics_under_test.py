"""What the tests of the metrics share: small models, inputs, other people's extractors, and what must not change."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn

from tests.snapshots import own_attributes

SOFTMAX = partial(torch.softmax, dim=-1)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (13,), 2: (9, 7), 3: (5, 4, 6)}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def cnn(dim: int = 2, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small network with a state to disturb, in training mode."""
    generator = torch.Generator().manual_seed(dim)
    model = nn.Sequential(
        CONV[dim](3, 6, 3, padding=1),
        NORM[dim](6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        CONV[dim](6, 8, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        Mean(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.to(device, dtype)


def images(batch_size: int = 3, dim: int = 2, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch_size, 3, *SHAPES[dim]), generator=generator, dtype=torch.float64).to(device)


class Given:
    """A third party's extractor: maps that are given, and nothing but what a metric may ask for."""

    def __init__(self, model: nn.Module, *maps: Tensor) -> None:
        self.model = model
        self.maps = list(maps)

    def __call__(self, class_idx: Any = None, scores: Any = None, *, targets: Any = None) -> list[Tensor]:
        return self.maps

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return torch.stack(cams).amax(0)


class Line(nn.Module):
    """One score, (N, 1): the sum of the input plus a constant."""

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) + self.constant


def states(metric: Any) -> dict[str, Any]:
    """The public states: numbers, or lists of them."""
    return {name: getattr(metric, name).tolist() for name in metric._defaults if not name.startswith("_")}


def assert_close(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-9) -> None:
    """Compare states."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), name


def snapshot(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "training": [module.training for module in modules],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "versions": [tensor._version for tensor in model.state_dict().values()],
        "grad": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "attributes": [own_attributes(module) for module in modules],
        "rng": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for left, right in zip(before, after, strict=True):
            assert_same(left, right)
    else:
        assert before == after


class Backward(Given):
    """A third party's extractor that hooks a model and calls ``backward()``."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model)
        self.shapes: list[torch.Size] = []
        layer.register_forward_hook(self.record)

    def record(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self.shapes.append(output.shape)
        if output.requires_grad:
            output.retain_grad()
        self.activation = output
        return output.clone()  # as what follows is in place

    def __call__(self, class_idx: Any = None, scores: Any = None, *, targets: Any = None) -> list[Tensor]:
        scores[range(len(scores)), class_idx].sum().backward()
        gradient = self.activation.grad
        cam = (gradient.flatten(2).mean(-1)[..., None, None] * self.activation).sum(1).relu()
        cam = cam - cam.amin((1, 2), keepdim=True)
        return [cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)]


# By how many coordinates a neighbour differs: the paper's weights, and ours for lines and volumes.
WEIGHTS = {1: {1: 1 / 2}, 2: {1: 1 / 6, 2: 1 / 12}, 3: {1: 4 / 56, 2: 2 / 56, 3: 1 / 56}}


def direct_imputation(image: Tensor, removed: Tensor) -> Tensor:
    """Fill (C, *spatial) where ``removed`` says so, by one equation for each removed position."""
    shape, gone = np.array(removed.shape), removed.numpy()
    places = np.argwhere(gone)
    number = np.full(gone.shape, -1)
    number[gone] = np.arange(len(places))
    flat = image.double().numpy()
    rows, columns, values = [], [], []
    right = np.zeros((len(places), len(flat)))
    for offset in itertools.product((-1, 0, 1), repeat=len(shape)):
        if not any(offset):
            continue
        weight = WEIGHTS[len(shape)][sum(map(abs, offset))]
        there = places + np.array(offset)
        exists = ((there >= 0) & (there < shape)).all(1)
        row, there = np.flatnonzero(exists), tuple(there[exists].T)
        rows += [row, row]  # u_i - u_j, weighted
        columns += [row, number[there]]
        values += [np.full(len(row), weight), np.full(len(row), -weight)]
        known = number[there] < 0
        np.add.at(right, row[known], weight * flat[(slice(None), *(axis[known] for axis in there))].T)
        rows[-1], columns[-1], values[-1] = (each[~known] for each in (rows[-1], columns[-1], values[-1]))
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    solved = spsolve(coo_matrix(entries, shape=(len(places), len(places))).tocsc(), right)
    filled = flat.copy()
    filled[:, gone] = solved.reshape(len(places), -1).T
    return torch.from_numpy(filled)
