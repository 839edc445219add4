"""The processes that share an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """The processes of the default process group, or this one alone.

    The processes go through their batches in step: after each, they exchange whether they have work left and whether
    one has failed, so that an error in one ends all of them and none waits.

    Args:
        together: whether the processes work together; by default they do if there is a process group
    """

    def __init__(self, together: bool | None = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if together and not there:
            raise ValueError(
                "`distributed` is True, but there is no process group: call torch.distributed.init_process_group first"
            )
        self.together = there and together is not False and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.together else 0
        self.size = dist.get_world_size() if self.together else 1
        on_cuda = self.together and dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """Add up tensors of the same shape over the processes."""
        return self._reduced(values, "sum")

    def agree(self, number: int) -> bool:
        """Check whether all processes hold the same number."""
        both = self._reduced(torch.tensor([number, -number], dtype=torch.int64), "max")
        return int(both[0]) == -int(both[1])

    def step(self, *, working: bool, failed: bool) -> bool:
        """Exchange the states of the processes: whether there is work left, and whether one has failed.

        Returns:
            whether any process has work left

        Raises:
            RuntimeError: if another process has failed
        """
        if not self.together:
            return working
        mine = torch.tensor([working, (self.rank + 1) * failed], dtype=torch.int64)
        any_working, last_failed = self._reduced(mine, "max").tolist()
        if last_failed and not failed:
            raise RuntimeError(f"process {last_failed - 1} of {self.size} has failed, see its message; this one stops")
        return bool(any_working)

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Report an error in the block to the other processes, at their next step."""
        try:
            yield
        except Exception:
            with suppress(RuntimeError):  # this error says more than that of the other processes
                self.step(working=False, failed=True)
            raise

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if not self.together:
            return values
        shared = values.to(self.device, copy=True)
        with self.watching():
            dist.all_reduce(shared, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return shared.cpu()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise an error with a plain message if the other processes do not answer."""
        try:
            yield
        except RuntimeError as error:
            if not self.together:
                raise
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"another process of the evaluation has ended or does not answer ({reason})") from error
