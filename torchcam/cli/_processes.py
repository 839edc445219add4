"""The processes that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ._messages import UserError
from ._models import find_device


@contextmanager
def processes(device: str, timeout: float) -> Iterator[int]:
    """Join the processes that torchrun has started, if any, and yield this one's number; each has a GPU of its own."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    found = find_device(device)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        on_gpu = found.type == "cuda"
        if on_gpu and found.index is None:
            local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= count:
                raise UserError(f"--device cuda: there are {count} GPUs for more processes than that")
            found = torch.device("cuda", local)
            torch.cuda.set_device(found)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(minutes=timeout),
                device_id=found if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the other processes cannot be reached: {error}") from error
    yield dist.get_rank() if dist.is_initialized() else 0
    if joins:
        dist.destroy_process_group()  # not after an error: the others may have ended, and this process ends anyway


def wait_for_all() -> None:
    """Wait until all processes are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
