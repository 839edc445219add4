"""Set-up and fixtures shared by all tests."""

import os

import pytest
import torch


def pytest_configure() -> None:
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to test on: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
