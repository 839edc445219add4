"""The wrapper around a module's call that extractors share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from torchcam._replica import replicate
from torchcam.methods import FullGrad, GradCAM, ScoreCAM


def test_an_extractor_that_is_collected_while_another_is_made() -> None:
    """The collector may run anywhere: also where the new extractor has found the wrapper of the old one."""
    from torchcam.methods import _fused

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    old = GradCAM(model, "0")
    kept = [old]
    kept.append(kept)  # a cycle: only the collector finds it
    del old, kept

    class Collecting(tuple[Any, ...]):
        __slots__ = ()

        def __iter__(self) -> Iterator[Any]:
            gc.collect()
            return super().__iter__()

    wrapper = vars(model)["_compiled_call_impl"]
    assert isinstance(wrapper, _fused.SharedWrapper)
    wrapper.members = Collecting(wrapper.members)
    with GradCAM(model, "0") as extractor, torch.no_grad():
        model(torch.rand(1, 3, 8, 8))
        assert extractor(0)[0].shape == (1, 6, 6)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # and still in use
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.rand(1, 3, 8, 8))])
@pytest.mark.parametrize("method", [GradCAM, FullGrad])
def test_a_model_of_torchscript(make: Any, method: Any) -> None:
    """Its layers run no hooks: maps of what was recorded around it would be silently wrong."""
    model = make(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval())
    with pytest.raises(TypeError, match="`model` is one of TorchScript"):
        method(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.rand(1, 3, 8, 8))])
def test_a_part_of_torchscript_in_training_mode(make: Any) -> None:
    part = make(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).train())
    model = nn.Sequential(part, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(1, 3, 8, 8)
    with ScoreCAM(model, "1") as extractor, torch.no_grad():
        model(x)
        extractor(0)
    assert part.training
    replica: Any = replicate(model)
    assert not replica[0].training
    assert torch.equal(replica(x), model(x))
