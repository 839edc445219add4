"""Set-up and fixtures shared by all tests."""

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchcam.methods import _gradients


def pytest_configure() -> None:
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that what extensions hold is let go of, as they would complain otherwise


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Leave what is there, imported libraries above all, out of the garbage collections of a module's tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to test on: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets longer by one with each backward pass."""
    passes: list[int] = []

    def counted(run: Any) -> Any:
        return lambda *args, **kwargs: passes.append(1) or run(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted(torch.autograd.grad))
    engine = SimpleNamespace(run_backward=counted(_gradients._engine.run_backward))
    monkeypatch.setattr(_gradients, "_engine", engine)
    return passes
