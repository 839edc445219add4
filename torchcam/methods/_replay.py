"""Run the model again without side effects: on masked inputs, or with the output of a layer edited."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._passes import Call, untouched
from torchcam._tensors import map_tensors
from torchcam.layout import first_tensor, replace_tensors
from torchcam.targets import Selector

__all__ = [
    "Edit",
    "Replay",
    "finite_number",
    "forwards_replaced",
    "gaussian_noise",
    "positive_integer",
    "run_chunks",
    "seeded",
]

Edit = Callable[[Tensor, Tensor], Tensor]


def positive_integer(name: str, value: int) -> int:
    """Check an argument that counts something.

    Raises:
        TypeError: if it is not an integer
        ValueError: if it is not positive
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
    return value


def finite_number(name: str, value: float, lowest: float = -math.inf) -> float:
    """Check an argument that is a finite number, ``lowest`` or more.

    Raises:
        ValueError: if it is not
    """
    if not (math.isfinite(value) and value >= lowest):
        bound = "" if lowest == -math.inf else f", {lowest} or more"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {value}")
    return value


def seeded(generator: torch.Generator | int, device: torch.device) -> torch.Generator:
    """Give the generator, or make one on ``device`` from a seed."""
    return torch.Generator(device).manual_seed(generator) if isinstance(generator, int) else generator


def gaussian_noise(shape: tuple[int, ...], like: Tensor, std: float, generator: torch.Generator | int) -> Tensor:
    """Draw normal noise of standard deviation ``std`` on the device and in the type of ``like``.

    ``generator`` may be a seed. The global random state is untouched, unless the generator is the global one.
    """
    generator = seeded(generator, like.device)
    return std * torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def run_chunks(
    evaluate: Callable[[slice], Any], total: int, batch_size: int, *, progress: bool = False, description: str = ""
) -> list[Any]:
    """Call ``evaluate`` on consecutive slices of ``range(total)``, each of ``batch_size`` at most.

    Where a CUDA device has too little memory for a chunk, the chunk is halved and tried again, with one warning.
    """
    results, start, warned = [], 0, False
    with _progress_bar(total, description, progress) as advance:
        while start < total:
            size = min(batch_size, total - start)
            try:
                results.append(evaluate(slice(start, start + size)))
            except torch.OutOfMemoryError:
                if size == 1:
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


class Replay:
    """Scores of variants of a recorded pass.

    Every method runs the model in evaluation mode and without gradients, without hooks of extractors, and leaves it as
    it was. No more than ``batch_size`` variants are in memory at a time.

    Args:
        model: the model
        call: the recorded call
        select: the explained score
        batch_size: largest number of variants in one pass
        progress: whether to show a progress bar
        description: its title
    """

    def __init__(
        self, model: nn.Module, call: Call, select: Selector, batch_size: int, *, progress: bool, description: str
    ) -> None:
        self.model = model
        self.call = call
        self.select = select
        self.batch_size = batch_size
        self.progress = progress
        self.description = description

    def masked(self, variants: Callable[[slice], Tensor], samples: Tensor) -> Tensor:
        """Score variants of the input.

        Args:
            variants: builds the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)

        Returns:
            the scores, (V,)
        """

        def evaluate(chunk: slice) -> Tensor:
            rows = samples[chunk]
            return self.select(self._forward(variants(chunk), rows), rows)

        with self._running():
            scores = torch.cat(self._chunks(evaluate, len(samples)))
        return scores.clone()

    def edited(self, layer: nn.Module, edit: Edit, num_variants: int) -> tuple[Tensor, Tensor]:
        """Score the recorded inputs with the output of a layer replaced by edited copies.

        What comes before the layer runs once per sample, on that sample alone, and is answered from memory after; only
        what follows runs on the copies. Where that cannot take more rows than the input has (say, because a connection
        around the layer is concatenated with its output), the whole model runs on repeated inputs instead.

        Args:
            layer: the module whose output is edited, in its last call
            edit: from the output for one sample (1, ...) and the numbers of B variants (B,) to their outputs (B, ...)
            num_variants: the number of variants V of each sample

        Returns:
            the scores without an edit, (N,), and those of the variants, (N, V)
        """
        device = self.call.image.device
        unedited, edited = [], []
        head_only = True
        with self._running():
            for sample in torch.arange(len(self.call.image), device=device).unsqueeze(1):
                memory = _Memory(self.model, layer)
                with memory.recording():
                    reference = self.select(self._forward(self.call.image[sample], sample), sample)
                output = memory.layer_output
                head_only = head_only and self._takes_more_rows(memory, output, sample, reference)
                score_copies = partial(self._score_copies, memory, sample=sample, head_only=head_only)

                def evaluate(
                    chunk: slice, output: Tensor = output, score: Callable[[Tensor], Tensor] = score_copies
                ) -> Tensor:
                    return score(edit(output, torch.arange(chunk.start, chunk.stop, device=device)))

                unedited.append(reference)
                edited.append(torch.cat(self._chunks(evaluate, num_variants)))
        return torch.cat(unedited).clone(), torch.stack(edited).clone()

    def _takes_more_rows(self, memory: _Memory, output: Tensor, sample: Tensor, reference: Tensor) -> bool:
        """Find out whether the unedited output, as one row among others, still gets the score it has alone."""
        blank = torch.zeros_like(output)
        rows = [blank, output, blank][: self.batch_size] if self.batch_size > 1 else [output]
        try:
            scores = self._score_copies(memory, torch.cat(rows), sample, head_only=True)
        except (RuntimeError, ValueError, IndexError):
            return False
        tolerance = torch.finfo(scores.dtype).eps ** 0.5
        found = scores[len(rows) // 2].reshape(reference.shape)
        return torch.allclose(found, reference, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _score_copies(self, memory: _Memory, copies: Tensor, sample: Tensor, head_only: bool) -> Tensor:
        rows = sample.expand(len(copies))
        inputs = sample if head_only else rows
        with memory.answering(copies, from_memory=head_only):
            return self.select(self._forward(self.call.image[inputs], inputs), rows)

    def _forward(self, image: Tensor, samples: Tensor) -> Any:
        args, kwargs = self.call.with_image(image, samples)
        return self.model(*args, **kwargs)

    def _chunks(self, evaluate: Callable[[slice], Tensor], total: int) -> list[Tensor]:
        return run_chunks(evaluate, total, self.batch_size, progress=self.progress, description=self.description)

    @contextmanager
    def _running(self) -> Iterator[None]:
        # No inference mode: a module that keeps a tensor for later (a position table, say) must keep a usable one.
        with untouched(self.model), torch.inference_mode(False), torch.no_grad(), self.call.as_recorded():
            yield


class _Memory:
    """What the modules of a model returned before a layer started, to be given again without computing it.

    Only the outermost modules are remembered: those that are not called by another that has finished as well.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model = model
        self.layer = layer
        self._answers: list[tuple[nn.Module, Any]] = []
        self._layer_calls = 0
        self._layer_returned: Any = None

    @property
    def layer_output(self) -> Tensor:
        """The tensor the layer returned."""
        output = first_tensor(self._layer_returned)
        if output is None:
            raise RuntimeError(f"the target layer {type(self.layer).__name__} was not reached in a repeated pass")
        return output

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what the modules return in the pass that runs inside the block."""

        def remember(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                before = len(self._answers)
                output = forward(*args, **kwargs)
                if module is self.layer:
                    self._layer_calls += 1
                    self._layer_returned = map_tensors(Tensor.clone, output)
                    del self._answers[before:]
                elif not self._layer_calls:
                    self._answers[before:] = [(module, map_tensors(Tensor.clone, output))]
                return output

            return recorded

        inner = (module for module in self.model.modules() if module is not self.model)
        with forwards_replaced(dict.fromkeys([*inner, self.layer], remember)):
            yield
        if self._layer_calls > 1:  # only the last call is edited, so those before it have to be computed
            self._answers.clear()

    @contextmanager
    def answering(self, copies: Tensor, *, from_memory: bool) -> Iterator[None]:
        """Let the layer return ``copies`` in the pass that runs inside the block, the others what they returned."""
        answers: defaultdict[nn.Module, deque[Any]] = defaultdict(deque)
        for module, output in self._answers if from_memory else []:
            answers[module].append(output)
        calls = 0

        def answer(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                if answers[module]:
                    return map_tensors(Tensor.clone, answers[module].popleft())
                return forward(*args, **kwargs)

            return answered

        def give_copies(_layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def edited(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls < self._layer_calls:
                    return forward(*args, **kwargs)
                return replace_tensors(self._layer_returned, [(self.layer_output, copies)])

            return edited

        with forwards_replaced({**dict.fromkeys(answers, answer), self.layer: give_copies}):
            yield


@contextmanager
def forwards_replaced(
    wrappers: dict[nn.Module, Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]],
) -> Iterator[None]:
    """Put a wrapper in the place of each module's ``forward`` inside the block."""
    own = {module: vars(module).get("forward") for module in wrappers}
    try:
        for module, wrap in wrappers.items():
            vars(module)["forward"] = wrap(module, module.forward)
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
