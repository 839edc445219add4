"""Long computations in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def run_chunks(
    evaluate: Callable[[slice], Any], total: int, batch_size: int, *, progress: bool = False, description: str = ""
) -> list[Any]:
    """Call ``evaluate`` on consecutive slices of ``range(total)``, each of ``batch_size`` at most; one may be empty.

    Where a CUDA device has too little memory for a chunk, the chunk is halved and tried again, with one warning.
    """
    results: list[Any] = []
    start, warned = 0, False
    with _progress_bar(total, description, progress) as advance:
        while start < total or not results:
            size = min(batch_size, total - start)
            try:
                results.append(evaluate(slice(start, start + size)))
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            else:
                start += size
                advance(size)
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
    return results


@contextmanager
def _progress_bar(total: int, description: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    if not shown:
        yield lambda _done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description) as bar:
        yield bar.update
