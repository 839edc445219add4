"""Grad-CAM, with no argument but the model, beyond classifiers: the sweep of `scripts/families.py`, and its judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts import families
from scripts._family import Family
from scripts._family_judge import judge

FEW = {
    "torch": [
        "Conv1d, 3 channels",
        "Conv1d, as many channels as positions",
        "EEGNet",
        "mel spectrogram as a picture",
        "torch.compile, of one layer",
        "DataParallel",
        "quantised, weights",
        "torch.jit.trace",
        "torch.jit.script",
        "torch.fx",
        "torch.export",
    ],
    "lightning": ["LightningModule"],
    "transformers": ["SegFormer", "OwlViT", "PatchTST, class token", "CLIP, 2 x 2 texts", "CLIP, 1 x 1 texts"],
}


def try_out(family: Family) -> families.Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say of their own code is not what is tested
        return families.try_out(family)


# The judge, on grids that are known: averages of 4 × 6 patches, and a little of everything, as global attention gives.


def patches(x: Tensor) -> Tensor:
    local = nn.functional.adaptive_avg_pool2d(x, (4, 6))
    return local + 0.1 * local.mean((2, 3), keepdim=True).sin()


def folded(x: Tensor, width: int) -> Tensor:
    return patches(x).flatten(2).unflatten(2, (-1, width))


READINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "as it is": (patches, ""),
    "later layers": (lambda x: patches(x).repeat_interleave(2, 3), ""),
    "a convolution": (lambda x: nn.functional.conv2d(x, torch.ones(2, 3, 5, 5), stride=4), ""),
    "mirrored": (lambda x: patches(x).flip(3), "axis 1 does not follow the input"),
    "transposed": (lambda x: patches(x).transpose(2, 3), "axis 0 follows axis 1"),
    "one token less": (
        lambda x: patches(x).flatten(2).roll(1, 2).view(1, -1, 4, 6),
        "axis 1 does not follow the input",
    ),
    "one token of many": (lambda x: x[..., ::3, ::4].flatten(2).roll(1, 2).view(1, -1, 8, 12), "are 1 further on"),
    "another width": (lambda x: folded(x, 8), "axis 1 does not follow the input"),
    "half the width": (lambda x: folded(x, 3), "axis 1 does not follow the input"),
    "features as positions": (lambda x: patches(x).flatten(2).transpose(1, 2).unflatten(2, (1, 3)), "axis 1 does not"),
    "queries": (lambda x: x.mean((2, 3)).tile(8).view(1, 1, 4, 6), "does not follow the input"),
    "frozen": (lambda x: torch.ones(1, 2, 4, 6), "axis 0 does not follow the input"),
    "one position": (lambda x: x.mean((2, 3), keepdim=True), "one position"),
    "a row": (lambda x: patches(x).flatten(2), "1 axes for 2 of the input"),
}


@pytest.mark.parametrize("name", READINGS)
def test_the_judge(name: str) -> None:
    read, fault = READINGS[name]
    (verdict,) = judge(lambda x: [read(x)], torch.zeros(1, 3, 24, 48), (2, 3))
    assert (fault in verdict.fault) if fault else not verdict.fault
    assert verdict.is_point == (name == "one position")


def test_the_judge_of_volumes_and_signals() -> None:
    volume = torch.zeros(2, 1, 10, 20, 30)
    verdicts = judge(lambda x: [x[:, :, ::2, ::5, ::6], x[:, :, ::2, ::5, ::6].transpose(2, 4)], volume, (2, 3, 4))
    assert [bool(verdict.fault) for verdict in verdicts] == [False, True]
    series = torch.zeros(1, 40, 5)  # (N, T, C)
    verdicts = judge(lambda x: [x.transpose(1, 2), x], series, (1,))
    assert [bool(verdict.fault) for verdict in verdicts] == [False, True]


# The verdicts on models that are known.


class Pooled(nn.Module):
    """Scores of a mean; `step` is what a forward pass adds to an attribute."""

    def __init__(self, step: float = 0.0, error: Exception | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.step = step
        self.error = error
        self.total = [0.0]
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls > 1:
            raise self.error
        self.total[0] += self.step
        scores: Tensor = self.conv(x).mean((2, 3)) + self.total[0]
        return scores


def test_right_and_untouched() -> None:
    outcome = try_out(Family("pooled", Pooled, other=(1, 3, 64, 96)))
    assert (outcome.verdict, outcome.layer, outcome.grid, outcome.trace) == ("right", "conv", "64 x 64", "")
    assert outcome.passed


def test_a_model_that_was_changed() -> None:
    """Here by the calls of the sweep itself; an explanation that leaves a trace looks the same."""
    outcome = try_out(Family("counts", lambda: Pooled(step=1.0)))
    assert outcome.trace == "in call 1 afterwards"
    assert not outcome.passed


def test_a_model_that_does_not_run() -> None:
    outcome = try_out(Family("raises", lambda: Pooled(error=KeyError("own"))))
    assert (outcome.verdict, outcome.detail) == ("broken", "KeyError: 'own'")
    assert not outcome.passed


@pytest.mark.parametrize(
    ("target", "verdict"),
    [(9, "refused"), (lambda output: output["none"], "crash"), (lambda output: output, "refused")],
    ids=["a class that does not exist", "an error of the target", "no scalar"],
)
def test_errors(target: Any, verdict: str) -> None:
    outcome = try_out(Family("pooled", Pooled, target=target))
    assert outcome.verdict == verdict
    assert outcome.passed == (verdict == "refused")


def test_the_table() -> None:
    outcomes = {
        "one": families.Outcome("right", "layer_1", "4 x 4", "0.90 x 0.80"),
        "two": families.Outcome("wrong", "layer_2", "4 x 4", "axis 0 | no", "in call 1 afterwards"),
    }
    text = families.table({"library": outcomes})
    assert "| library | one | right | `layer_1` | 4 x 4 | 0.90 x 0.80 |" in text
    assert "| two | **wrong** | `layer_2` | 4 x 4 | axis 0 / no; **output changed in call 1 afterwards** |" in text
    assert "1 of 2 changed" in text


# The sweep.


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in FEW.items() for name in names])
def test_a_few(library: str, name: str) -> None:
    (family,) = (family for family in families.families_of(library) if family.name == name)
    outcome = try_out(family)
    assert outcome.passed, outcome


@pytest.mark.zoo
@pytest.mark.parametrize("library", families.SOURCES)
def test_all(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    outcomes = {family.name: try_out(family) for family in families.families_of(library)}
    assert outcomes
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.passed} == {}
