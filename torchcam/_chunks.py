"""Long computations in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def run_chunks(
    evaluate: Callable[[slice], Any], total: int, batch_size: int, *, progress: bool = False, description: str = ""
) -> list[Any]:
    """Call ``evaluate`` on consecutive slices of ``range(total)``, each of ``batch_size`` at most; one may be empty.

    Where a CUDA device has too little memory for a chunk, the chunk is halved and tried again, with one warning.
    """
    results: list[Any] = []
    start, warned, bar = 0, False, None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=total, desc=description)
    try:
        while start < total or not results:
            size = min(batch_size, total - start)
            try:
                results.append(evaluate(slice(start, start + size)))
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            else:
                start += size
                if bar is not None:
                    bar.update(size)
                continue
            # Outside the `except` block: there, the exception would keep the chunk's tensors alive.
            batch_size = size // 2
            if not warned:
                warnings.warn(
                    f"out of memory on a chunk of {size}: going on with smaller ones; a smaller `batch_size` avoids it",
                    RuntimeWarning,
                    stacklevel=2,
                )
            warned = True
            torch.cuda.empty_cache()
    finally:
        if bar is not None:
            bar.close()
    return results
