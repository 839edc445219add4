"""Run the model again without side effects: on masked inputs, or with the output of a layer edited."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchcam._passes import Call, forwards_replaced, untouched
from torchcam._tensors import map_structure, map_tensors, tensors_in, to_float
from torchcam.layout import first_tensor, replace_tensors
from torchcam.targets import Selector

from ._folding import foldable, folded

__all__ = [
    "Edit",
    "Form",
    "RecordedLayer",
    "Replay",
    "VariantRunner",
    "fast_formats",
    "finite_number",
    "gaussian_noise",
    "in_format",
    "is_close",
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
        TypeError: if it is not a number
        ValueError: if it is not finite, or less
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value >= lowest):
        bound = "" if lowest == -math.inf else f", {lowest} or more"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {value}")
    return value if isinstance(value, (int, float)) else float(value)


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


class VariantRunner:
    """Runs a model on variants of its input, in the memory format in which its convolutions are fastest.

    Channels-last gives the same outputs, to float rounding, as what it is given: convolutions of many rows take less
    time on a CPU. A model that cannot take the format (some take views of what they get) gets its inputs as they come.

    Args:
        model: the model
        call: the recorded call, of which the other arguments are taken; None if the variants are all of the input
        compiled: the model as ``torch.compile`` gave it, to run in its place
    """

    def __init__(self, model: nn.Module, call: Call | None = None, compiled: Callable[..., Any] | None = None) -> None:
        self.call = call
        self._forward = model if compiled is None else compiled
        self._formats = fast_formats(model.modules())

    def __call__(self, image: Tensor, samples: Tensor) -> Any:
        """Run the model on ``image``, (B, C, *spatial), in place of the recorded one; row i is a variant of a sample.

        Args:
            image: variants of the input
            samples: the sample of the recorded batch that each variant belongs to, (B,)
        """
        formatted = in_format(image, self._formats)
        if formatted is not image:
            try:
                return self._run(formatted, samples)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # if it was not for the format, it comes again
                self._formats = {}
        return self._run(image, samples)

    def _run(self, image: Tensor, samples: Tensor) -> Any:
        args, kwargs = ((image,), {}) if self.call is None else self.call.with_image(image, samples)
        return self._forward(*args, **kwargs)


def fast_formats(modules: Iterable[nn.Module]) -> dict[int, torch.memory_format]:
    """Give the memory format, by the number of dimensions of a tensor, in which the convolutions are fastest.

    On a CPU that is channels-last for models of several convolutions. Elsewhere it is the format of the weights, which
    inputs need not be converted to.
    """
    weights = [module.weight for module in modules if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    on_cpu = [weight for weight in weights if isinstance(weight, Tensor) and weight.device.type == "cpu"]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats if len(on_cpu) > 1 else {}


def in_format(tensor: Tensor, formats: dict[int, torch.memory_format]) -> Tensor:
    """Give a batch of several rows in the format for its number of dimensions; others as they are."""
    if tensor.ndim not in formats or len(tensor) < 2 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.ndim])


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
        autocast: the type to run in where the hardware has it faster; None for the one of the recorded pass
        compiled: the model as ``torch.compile`` gave it, to be run on variants of the input
        fold_batch_norm: whether batch normalisation is folded into convolutions while variants of the input run
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        select: Selector,
        batch_size: int,
        *,
        progress: bool = False,
        description: str = "",
        autocast: torch.dtype | None = None,
        compiled: Callable[..., Any] | None = None,
        fold_batch_norm: bool = False,
    ) -> None:
        self.model = model
        self.call = call
        self.select = select
        self.batch_size = batch_size
        self.progress = progress
        self.description = description
        self.autocast = autocast
        self.fold_batch_norm = fold_batch_norm
        self._run = VariantRunner(model, call, compiled)

    def masked(self, variants: Callable[[slice], Tensor], samples: Tensor) -> Tensor:
        """Score variants of the input.

        Args:
            variants: builds the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)

        Returns:
            the scores, (V,)
        """
        return self.averaged(lambda chunk: [variants(chunk)], samples)

    def averaged(self, variants: Callable[[slice], Iterable[Tensor]], samples: Tensor) -> Tensor:
        """Score variants of the input, each of which has several forms: the mean of their scores.

        Args:
            variants: gives one form after the other of the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)

        Returns:
            the scores, (V,)
        """

        def evaluate(chunk: slice) -> Tensor:
            rows = samples[chunk]
            scores = [self.select(self._run(inputs, rows), rows) for inputs in variants(chunk)]
            return scores[0] if len(scores) == 1 else torch.stack(scores).to(to_float(scores[0]).dtype).mean(0)

        with self.running(), self._folded(samples):
            scores = torch.cat(self._chunks(evaluate, len(samples)))
        return scores.clone()

    @contextmanager
    def _folded(self, samples: Tensor) -> Iterator[None]:
        """Fold batch normalisation into convolutions, if asked to and if a sample's output stays the same."""
        if not self.fold_batch_norm:
            yield
            return
        one = samples[:1]
        image = self.call.image[one]
        with foldable(self.model) as pairs:
            expected = self._run(image, one)
        with folded(pairs):
            found = self._run(image, one)
        same = all(
            is_close(one, other) and bool(other.isfinite().all())
            for one, other in zip(tensors_in(found), tensors_in(expected), strict=True)
        )
        with folded(pairs if same else []):
            yield

    def edited(
        self,
        layer: nn.Module,
        edit: Edit,
        num_variants: int,
        *,
        batch: int = 0,
        chosen: Tensor | None = None,
        recorded: RecordedLayer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score the recorded inputs with the output of a layer replaced by edited copies.

        Where the score depends on the recorded output of the layer and nothing else that the input decides, what
        follows the layer runs on copies of that, and nothing else runs.

        Otherwise what comes before the layer runs once per sample, on that sample alone, and is answered from memory
        after; only what follows runs on the copies. Where that cannot take more rows than the input has (say, because a
        connection around the layer is concatenated with its output), the whole model runs on repeated inputs instead.

        Args:
            layer: the module whose output is edited, in its last call
            edit: from rows of the output (B, ...), which it may change, and the numbers of a variant of each (B,) to
                the edited ones (B, ...)
            num_variants: the number of variants V of each sample
            batch: which dimension of the output is the batch
            chosen: the variants to score, (N, V), by default all; the others get the score without an edit
            recorded: what a pass in evaluation mode recorded of the layer

        Returns:
            the scores without an edit, (N,), and those of the variants, (N, V)
        """
        with self.running():
            head = None if recorded is None else _Head(self, layer, recorded, batch)
            unedited = None if head is None else head.scores_if_all_that_counts()
            if head is not None and unedited is not None:
                edited = self._edited_alone(head, unedited, edit, num_variants, chosen)
            else:
                unedited, edited = self._edited_by_sample(layer, batch, edit, num_variants, chosen)
        return unedited.clone(), edited.clone()

    def _edited_alone(
        self, head: _Head, unedited: Tensor, edit: Edit, num_variants: int, chosen: Tensor | None
    ) -> Tensor:
        rows = torch.arange(len(unedited) * num_variants, device=unedited.device)
        rows = rows if chosen is None else rows[chosen.flatten()]
        owners, variants = rows.div(num_variants, rounding_mode="floor"), rows % num_variants

        def evaluate(chunk: slice) -> Tensor:
            return head.score(owners[chunk], lambda copies: edit(copies, variants[chunk]))

        edited = unedited.repeat_interleave(num_variants)
        edited[rows] = torch.cat([edited[:0], *self._chunks(evaluate, len(rows))])
        return edited.reshape(-1, num_variants)

    def _edited_by_sample(
        self, layer: nn.Module, batch: int, edit: Edit, num_variants: int, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = self.call.image.device
        variants = torch.arange(num_variants, device=device)
        unedited, edited = [], []
        head_only = True
        for sample in torch.arange(len(self.call.image), device=device).unsqueeze(1):
            memory = _Memory(self.model, layer)
            with memory.recording():
                reference = self.select(self._forward(self.call.image[sample], sample), sample)
            output = memory.layer_output
            head_only = head_only and self._takes_more_rows(memory, batch, output, sample, reference)
            score_copies = partial(self._score_copies, memory, batch, sample=sample, head_only=head_only)
            wanted = variants if chosen is None else variants[chosen[sample].squeeze(0)]

            def evaluate(
                chunk: slice,
                output: Tensor = output,
                score: Callable[[Tensor], Tensor] = score_copies,
                wanted: Tensor = wanted,
            ) -> Tensor:
                numbers = wanted[chunk]
                return score(edit(output.repeat_interleave(len(numbers), batch), numbers))

            scores = reference.repeat(num_variants)
            scores[wanted] = torch.cat([scores[:0], *self._chunks(evaluate, len(wanted))])
            unedited.append(reference)
            edited.append(scores)
        return torch.cat(unedited), torch.stack(edited)

    def _takes_more_rows(self, memory: _Memory, batch: int, output: Tensor, sample: Tensor, reference: Tensor) -> bool:
        """Find out whether the unedited output, as one row among others, still gets the score it has alone."""
        blank = torch.zeros_like(output)
        rows = [blank, output, blank][: self.batch_size] if self.batch_size > 1 else [output]
        try:
            scores = self._score_copies(memory, batch, torch.cat(rows, batch), sample, head_only=True)
        except (RuntimeError, ValueError, IndexError):
            return False
        return is_close(scores[len(rows) // 2].reshape(reference.shape), reference)

    def _score_copies(self, memory: _Memory, batch: int, copies: Tensor, sample: Tensor, head_only: bool) -> Tensor:
        rows = sample.expand(copies.shape[batch])
        inputs = sample if head_only else rows
        with memory.answering(copies, from_memory=head_only):
            return self.select(self._forward(self.call.image[inputs], inputs), rows)

    def _forward(self, image: Tensor, samples: Tensor) -> Any:
        args, kwargs = self.call.with_image(image, samples)
        return self.model(*args, **kwargs)

    def _chunks(self, evaluate: Callable[[slice], Tensor], total: int) -> list[Tensor]:
        return run_chunks(evaluate, total, self.batch_size, progress=self.progress, description=self.description)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model as every method here does."""
        # No inference mode: a module that keeps a tensor for later (a position table, say) must keep a usable one.
        with (
            untouched(self.model),
            torch.inference_mode(False),
            torch.no_grad(),
            self.call.as_recorded(),
            self._autocast(),
        ):
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.call.image.device.type, dtype=self.autocast)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Tell whether numbers are the same, up to what another order of the same operations makes of them."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps) ** 0.5
    scale = torch.where(expected.isfinite(), expected.abs(), 0.0).amax() if expected.numel() else 0.0
    near = (found - expected).abs() <= tolerance * scale
    return bool((near | (found.isnan() & expected.isnan())).all())


@dataclass(frozen=True)
class Form:
    """What a tensor was like, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, output: Any) -> Any:
        """Give an output with the form of each tensor in its place; None if one holds no floating-point numbers."""
        if not all(tensor.is_floating_point() for tensor in tensors_in(output)):
            return None
        return map_tensors(lambda t: cls(tuple(t.shape), t.dtype, t.device), output)

    def unknown(self, old: int, new: int, nan: dict[tuple[torch.dtype, torch.device], Tensor]) -> Tensor:
        """Give a tensor of NaN of this form, with as many rows as ``new`` where there were as many as ``old``.

        ``nan`` keeps the one value that all elements of a tensor are.
        """
        batch = next((dimension for dimension, side in enumerate(self.shape[:2]) if side == old), None)
        shape = [new if dimension == batch else side for dimension, side in enumerate(self.shape)]
        kind = self.dtype, self.device
        if kind not in nan:
            nan[kind] = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
        filled = nan[kind].expand(shape)
        return filled.clone() if filled.numel() == 1 else filled  # of several, none can be written to


@dataclass(frozen=True)
class RecordedLayer:
    """What a pass in evaluation mode recorded of a layer that ran once, and returned one tensor.

    Attributes:
        output: what it returned
        before: the outermost modules that had finished when it started, in order, and the form of what each returned
        model_output: what the model returned
    """

    output: Tensor
    before: Sequence[tuple[nn.Module, Any]]
    model_output: Any


class _UnknownDecidesError(Exception):
    """A value that is not known would have decided something."""


class _UnknownWatched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Raises where NaN goes into an operation that does not hand it on: a comparison, an index, foreign code."""

    _HIDING = frozenset({"fmax", "fmin", "heaviside", "nan_to_num", "nanmedian", "nansum", "sgn", "sign"})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        hides = func.namespace != "aten" or name in self._HIDING
        if hides and _holds_nan((args, kwargs)):
            raise _UnknownDecidesError
        output = func(*args, **kwargs)
        results = output if isinstance(output, (tuple, list)) else [output]
        hides = any(not isinstance(one, Tensor) or not one.is_floating_point() for one in results if one is not None)
        if hides and _holds_nan((args, kwargs)):
            raise _UnknownDecidesError
        return output


def _holds_nan(arguments: Any) -> bool:
    return any(bool(tensor.isnan().any()) for tensor in tensors_in(arguments) if tensor.is_floating_point())


class _Head:
    """What follows a layer, run on rows of its recorded output.

    All that the input decides, but for that output, is made NaN: whatever depends on it shows.
    """

    def __init__(self, replay: Replay, layer: nn.Module, recorded: RecordedLayer, batch: int) -> None:
        self.replay = replay
        self.layer = layer
        self.recorded = recorded
        self.batch = batch
        self._nan: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        done = {inner for module, _ in recorded.before for inner in module.modules()} | set(layer.modules())
        self._formats = fast_formats(module for module in replay.model.modules() if module not in done)

    def scores_if_all_that_counts(self) -> Tensor | None:
        """Score the outputs as they are, (N,); None if something else than a row's output counts for its score.

        The scores must be those of the recorded pass, and those of a row the same among others.
        """
        batch_size, num_samples = self.replay.batch_size, len(self.replay.call.image)
        samples = torch.arange(num_samples, device=self.recorded.output.device)
        count = min(3, batch_size)

        def blank_others(rows: Tensor) -> Tensor:
            others = [row for row in range(count) if row != count // 2]
            return rows.index_fill_(self.batch, torch.tensor(others, device=rows.device), 0)

        if any(form is None for _, form in self.recorded.before):
            return None
        try:
            expected = self.replay.select(self.recorded.model_output, samples)
            with _UnknownWatched():  # type: ignore[no-untyped-call]
                first = self.score(samples[:1])
                among = self.score(samples[:1].expand(count), blank_others) if count > 1 else first
            if not is_close(among[count // 2 : count // 2 + 1], first):
                return None
            found = torch.cat(run_chunks(lambda chunk: self.score(samples[chunk]), num_samples, batch_size))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever a model raises at what is not like its input
            return None
        return found if is_close(found, expected) else None

    def score(self, samples: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Score the outputs of samples, (B,), as they are or edited."""
        call, select = self.replay.call, self.replay.select
        copies = self.recorded.output.index_select(self.batch, samples)
        copies = copies if edit is None else edit(copies)
        if self.batch == 0:
            copies = in_format(copies, self._formats)
        image = call.image
        unknown = Form(tuple(image.shape), image.dtype, image.device).unknown(len(image), len(samples), self._nan)
        args, kwargs = call.with_image(unknown, samples)
        answers: defaultdict[nn.Module, deque[Any]] = defaultdict(deque)
        for module, form in self.recorded.before:
            answers[module].append(form)

        def fill(part: Any) -> Any:
            return part.unknown(len(image), len(samples), self._nan) if isinstance(part, Form) else NotImplemented

        def answer(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                return map_structure(fill, answers[module].popleft()) if answers[module] else forward(*args, **kwargs)

            return answered

        wrappers = dict.fromkeys(answers, answer)
        with forwards_replaced({**wrappers, self.layer: lambda *_: lambda *_args, **_kwargs: copies}):
            return select(self.replay.model(*args, **kwargs), samples)


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
