"""Run the model again without side effects: on masked inputs, or with the output of a layer edited."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchcam._chunks import run_chunks
from torchcam._passes import Call, forwards_replaced
from torchcam._replica import KeptReplica, has_hooks, modules_of, normal_mode, replicated
from torchcam._tensors import map_tensors, tensors_in, to_float
from torchcam.layout import first_tensor, replace_tensors
from torchcam.targets import Selector

from ._repeated import TF32, is_close, recorded_scores, warn_unless_repeated
from ._running import warn

Edit = Callable[[Tensor, Tensor], Tensor]

_SHORT = frozenset({torch.bfloat16, torch.float16})  # scores of these types round away what variants differ by
_LITTLE = 0.01  # of the largest effect of a variant: no map shows it


class VariantRunner:
    """Runs a model on variants of its input, in the memory format in which its convolutions are fastest.

    Outputs are the same, to float rounding. A model that cannot take the format (some take views of what they get) gets
    its inputs as they come.

    Args:
        model: the model
        call: the recorded call, of which the other arguments are taken
        formats: the memory format by the number of dimensions; by default the fastest ones
    """

    def __init__(self, model: nn.Module, call: Call, formats: dict[int, torch.memory_format] | None = None) -> None:
        self.call = call
        call.prove_rows(model)
        self.model: Callable[..., Any] = model
        self._formats = fast_formats(modules_of(model)) if formats is None else formats

    def __call__(self, image: Tensor, samples: Tensor) -> Any:
        """Run the model on ``image``, (B, C, *spatial), in place of the recorded one; row i is a variant of a sample.

        Args:
            image: variants of the input
            samples: the sample of the recorded batch that each variant belongs to, (B,)
        """
        formatted = in_format(image, self._formats)
        args, kwargs = self.call.with_image(formatted, samples)
        try:
            return self.model(*args, **kwargs)
        except RuntimeError as error:
            if formatted is image or isinstance(error, torch.OutOfMemoryError):
                raise
            self._formats = {}  # if it was not for the format, the error comes again
        return self(image, samples)

    def check(self, extractor: Any, recorded: Any, select: Selector) -> None:
        """Warn if the first sample as it is does not get its recorded score.

        Args:
            extractor: the extractor that recorded
            recorded: the recorded pass
            select: the explained scores
        """
        expected = recorded_scores(modules_of(extractor.model), recorded.output, select)
        if expected is None or not len(expected):
            return
        first = torch.zeros(1, dtype=torch.long, device=self.call.image.device)
        warn_unless_repeated(extractor, select.of(first)(self(self.call.image[:1], first)), expected[:1])


def fast_formats(modules: Iterable[nn.Module]) -> dict[int, torch.memory_format]:
    """Return the memory format, by the number of dimensions of a tensor, in which convolutions on a CPU are fastest.

    That is channels-last for models of several convolutions.
    """
    convolutions = [module for module in modules if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    return {4: torch.channels_last, 5: torch.channels_last_3d} if len(convolutions) > 1 else {}


def in_format(tensor: Tensor, formats: dict[int, torch.memory_format]) -> Tensor:
    """Return a batch of several rows on a CPU in the format for its number of dimensions; others as they are."""
    if tensor.ndim not in formats or not tensor.is_cpu or tensor.shape[0] < 2 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.ndim])


@dataclass
class Replay:
    """Scores of variants of a recorded pass.

    A replica of the model runs, in evaluation mode and without gradients, on ``batch_size`` variants at most.

    Args:
        model: the model
        call: the recorded call
        select: the explained score
        batch_size: largest number of variants in one pass
        progress: whether to show a progress bar
        description: its title
        autocast: the type to run in where the hardware has it faster; None for the one of the recorded pass
        compiled: whether variants of the input run as ``torch.compile`` makes the model
        output: what the model returned in the recorded pass: the first sample, run again as it is beside variants, must
            get the score that it has there; None if that is not known
        kept: replicas of the model that ran before, one of which may run again

    Attributes:
        image: the image-like input of the call, (N, C, *spatial)
    """

    model: nn.Module
    call: Call
    select: Selector
    batch_size: int
    _: KW_ONLY
    progress: bool = False
    description: str = ""
    autocast: torch.dtype | None = None
    compiled: bool = False
    output: Any = None
    kept: list[KeptReplica] | None = None
    _is_proven: bool = field(default=False, init=False)
    _is_disproven: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.image = self.call.image_now  # each run checks that it was not modified

    def masked(self, variants: Callable[[slice], Tensor], samples: Tensor) -> Tensor:
        """Score variants of the input, (V,).

        Args:
            variants: builds the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)
        """
        return self.averaged(lambda chunk: [variants(chunk)], samples)

    def averaged(self, variants: Callable[[slice], Iterable[Tensor]], samples: Tensor) -> Tensor:
        """Score variants of the input, each of which has several forms: the mean of their scores, (V,).

        Args:
            variants: yields one form after the other of the inputs (B, C, *spatial) of a slice of the variants
            samples: the sample of the recorded batch that each variant belongs to, (V,)
        """
        with (
            replicated(self.model, self.kept) as replica,
            normal_mode(graph=False),
            self.call.as_recorded(self.autocast),
        ):
            modules = modules_of(self.model)
            run = VariantRunner(replica, self.call, fast_formats(modules))
            if self.compiled:
                run.model = torch.compile(replica)

            def evaluate(chunk: slice, unchanged: int) -> Tensor:
                owners = torch.constant_pad_nd(samples[chunk], (unchanged, 0))
                scores: list[Tensor] = []
                for inputs in variants(chunk) if chunk.stop > chunk.start else [self.image[:0]]:
                    if scores:  # one form of the variants is enough to see the first sample as it is
                        owners = samples[chunk]
                    elif unchanged:
                        inputs = torch.cat([self.image[:1], inputs])
                    scores.append(self.select(run(inputs, owners), owners))
                if len(scores) == 1:
                    return scores[0]
                own, scores[0] = scores[0][:unchanged], scores[0][unchanged:]
                return torch.cat([own, torch.stack(scores).to(to_float(scores[0]).dtype).mean(0)])

            expected = None
            # Once is enough; and a chunk of another size would be compiled again.
            if not self._is_proven and not (self.compiled and samples.shape[0] % self.batch_size == 0):
                expected = self._recorded_score(modules)
                if expected is None and self.output is not None:
                    first = samples.new_zeros(1)
                    expected = self.select(run(self.image[:1], first), first)
                self._is_proven = True
            return self._proven(evaluate, samples, expected)

    def edited(
        self, layer: str, edit: Edit, num_variants: int, *, batch: int = 0, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the recorded inputs with the output of a layer replaced by edited copies.

        What follows the layer runs on copies of its output: first with NaN in the place of everything else that the
        input decides, which shows whether the score depends on it, then with the outputs of the modules before the
        layer. Scores in bfloat16 or float16 round away what variants differ by: there, that runs in float32, if it can.
        Where neither gives the score of the unedited output, or a hook of the user's is on the model, which must see
        nothing but real rows, the whole model runs on repeated inputs.

        Args:
            layer: the name of the module whose output is edited, in its last call
            edit: from rows of the output (B, ...), which it may change, and the numbers of a variant of each (B,) to
                the edited ones (B, ...)
            num_variants: the number of variants V of each sample
            batch: which dimension of the output is the batch
            chosen: the variants to score, (N, V), by default all; the others get the score without an edit

        Returns:
            the scores without an edit, (N,), and those of the variants, (N, V)
        """
        with (
            replicated(self.model, self.kept) as replica,
            normal_mode(graph=False),
            self.call.as_recorded(self.autocast),
        ):
            self.call.prove_rows(replica)
            unedited, scorer = self._scorer(replica, replica.get_submodule(layer), batch)
            rows = torch.arange(len(unedited) * num_variants, device=unedited.device)
            rows = rows if chosen is None else rows[chosen.flatten()]
            owners, variants = rows.div(num_variants, rounding_mode="floor"), rows % num_variants

            def evaluate(chunk: slice, unchanged: int) -> Tensor:
                own = owners[chunk]

                def edit_rest(copies: Tensor) -> Tensor:
                    kept, rest = torch.split(copies, [unchanged, len(own)], batch)
                    edited = edit(rest, variants[chunk]) if len(own) else rest
                    return torch.cat([kept, edited], batch) if unchanged else edited

                return scorer.score(torch.cat([owners.new_zeros(unchanged), own]), edit_rest)

            edited = unedited.repeat_interleave(num_variants)
            scores = self._proven(evaluate, owners, None if isinstance(scorer, _Head) else unedited[:1])
            edited[rows] = scores.to(edited)
            recorded = self._recorded_score(modules_of(self.model))
            if recorded is not None and not is_close(unedited[:1], recorded):
                self._compare(unedited[:1], recorded, edited[:num_variants])
        return unedited, edited.reshape(-1, num_variants)

    def _recorded_score(self, modules: Iterable[nn.Module]) -> Tensor | None:
        """Return the recorded score of the first sample, (1,); None if it is not known, or of another mode."""
        scores = recorded_scores(modules, self.output, self.select)
        return None if scores is None else scores[:1]

    def _compare(self, found: Tensor, expected: Tensor, variants: Tensor) -> None:
        """Warn, once, if the first sample as it is does not get the expected score, by more than no map would show.

        Args:
            found: its score in a repeated pass, (1,)
            expected: its score before, (1,)
            variants: the scores of its variants
        """
        kinds = [self.autocast, self.call.autocast, self.image.dtype]
        eps = max(torch.finfo(kind).eps for kind in kinds if kind is not None)
        eps = max(eps, TF32) if found.is_cuda else eps
        effect = (variants - expected).abs().nan_to_num(0.0).amax()
        rounding = eps**0.5 * torch.maximum(expected.abs(), effect)
        differs = (found - expected).abs() > torch.maximum(rounding, _LITTLE * effect)
        if self._is_disproven or not bool(differs.any()):
            return
        self._is_disproven = True
        warn(
            f"the score of an input as it is was {float(expected):.4g}, and is {float(found):.4g} when the model runs "
            "again: what changes the score is not the change of the input alone, and the map is made of both. If the "
            "model draws random numbers, turn that off; if its samples depend on each other, explain one at a time, "
            "with `batch_size=1`; or take a method that runs the model once, such as GradCAM",
            stacklevel=2,
        )

    def _proven(self, evaluate: Callable[[slice, int], Tensor], samples: Tensor, expected: Tensor | None) -> Tensor:
        """Score variants in chunks, (V,), with the first sample as it is as one row more in the first chunk.

        Args:
            evaluate: from a slice of the variants, and how many rows of the first sample as it is (0 or 1) come before
                them, to the scores of both
            samples: the sample that each variant belongs to, (V,)
            expected: the score that the first sample must get, (1,); None if nothing is to be proven
        """
        total = samples.shape[0]
        more = int(expected is not None and total > 0)
        chunks = run_chunks(
            lambda chunk: evaluate(slice(max(chunk.start - more, 0), chunk.stop - more), int(chunk.start < more)),
            total + more,
            self.batch_size,
            progress=self.progress,
            description=self.description,
        )
        scores = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        if expected is not None and more:
            found, scores = torch.split_with_sizes(scores, (1, total))
            if not is_close(found, expected):
                self._compare(found, expected, torch.where(samples == 0, scores, expected.to(scores)))
        return scores

    def _scorer(self, replica: nn.Module, layer: nn.Module, batch: int) -> tuple[Tensor, _Head | _WholeModel]:
        """Return the scores of the unedited outputs, (N,), and what scores edited ones."""
        recorded = _Record.of(self, replica, layer, batch, known=False)
        if recorded.layer_calls == 1 and isinstance(recorded.layer_output, Tensor) and not has_hooks(replica):
            rounded = self.autocast is None and recorded.scores.dtype in _SHORT
            for known in (False, True):
                record = _Record.of(self, replica, layer, batch, known=True) if known else recorded
                for widened in (True, False) if rounded else (False,):
                    head = _Head(self, replica, layer, record, batch, widened)
                    unedited = head.proven()
                    if unedited is not None:
                        return unedited if widened else recorded.scores, head
        return recorded.scores, _WholeModel(self, replica, layer, recorded.layer_calls)


def _rows(tensor: Tensor, dimension: int | None, samples: Tensor) -> Tensor:
    """Return the rows of samples in ascending order along a dimension, as copies.

    Without a dimension, the tensor is of all samples. One on the device ``meta`` is unknown: that is NaN. Rows of one
    sample alone share their memory.
    """
    shape = [len(samples) if axis == dimension else side for axis, side in enumerate(tensor.shape)]
    if tensor.is_meta:
        if not tensor.is_floating_point():
            raise _UnknownDecidesError
        return torch.full((), torch.nan, dtype=tensor.dtype, device=samples.device).expand(shape)
    if dimension is None:
        return tensor.clone()
    if len(samples) < 2 or int(samples[0]) != int(samples[-1]):
        return tensor.index_select(dimension, samples)
    return tensor.narrow(dimension, int(samples[0]), 1).expand(shape)


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


@dataclass(frozen=True)
class _Record:
    """What passes of a replica over the recorded input show of a layer.

    Attributes:
        before: the outermost modules that had finished when the layer started, in order, and what each returned; empty
            if other modules run from chunk to chunk
        layer_output: what the layer returned last; None of several chunks that cannot be joined
        layer_calls: how often it ran
        scores: the scores of the samples, (N,)
        known: whether the outputs before the layer have values; else they are on the device ``meta``
    """

    before: list[tuple[nn.Module, Any]]
    layer_output: Any
    layer_calls: int
    scores: Tensor
    known: bool

    @classmethod
    def of(cls, replay: Replay, replica: nn.Module, layer: nn.Module, batch: int, *, known: bool) -> _Record:
        """Run a replica on the recorded input, in chunks."""
        samples = torch.arange(len(replay.image), device=replay.image.device)
        chunks: list[_Record] = run_chunks(
            lambda chunk: cls._of_rows(replay, replica, layer, samples[chunk], known), len(samples), replay.batch_size
        )
        if not all(chunk.layer_calls for chunk in chunks):
            raise RuntimeError(
                f"the target layer {type(layer).__name__} was not reached in a repeated pass, so its output cannot be "
                "edited: the model may call it through an object that is no module"
            )
        if len(chunks) == 1:
            return chunks[0]
        outputs = [chunk.layer_output for chunk in chunks]
        counts = [len(chunk.scores) for chunk in chunks]
        modules = [[module for module, _ in chunk.before] for chunk in chunks]
        same = all(isinstance(one, Tensor) for one in outputs) and all(one == modules[0] for one in modules)
        steps = zip(*(chunk.before for chunk in chunks), strict=True) if same else ()
        return cls(
            [(step[0][0], _joined([output for _, output in step], counts)) for step in steps],
            torch.cat(outputs, batch) if same else None,
            max(chunk.layer_calls for chunk in chunks),
            torch.cat([chunk.scores for chunk in chunks]),
            known,
        )

    @classmethod
    def _of_rows(cls, replay: Replay, replica: nn.Module, layer: nn.Module, rows: Tensor, known: bool) -> _Record:
        before: list[tuple[nn.Module, Any]] = []
        outputs: list[Any] = []

        def note(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                count = len(before)
                output = forward(*args, **kwargs)
                if not outputs:  # in the place of the modules inside
                    kept = map_tensors(Tensor.clone if known else _without_values, output)
                    before[count:] = [] if module is layer else [(module, kept)]
                return output

            return noted

        handle = layer.register_forward_hook(  # behind the hooks of the user's, which may change the output
            lambda _module, _args, output: outputs.append(map_tensors(Tensor.clone, output))
        )
        inner = [module for module in replica.modules() if module is not replica]
        try:
            with forwards_replaced(dict.fromkeys(inner, note)):
                args, kwargs = replay.call.with_image(replay.image[rows], rows)
                scores = replay.select(replica(*args, **kwargs), rows)
        finally:
            handle.remove()
        return cls(before, outputs[-1] if outputs else None, len(outputs), scores, known)


def _without_values(tensor: Tensor) -> Tensor:
    """Return the shape of a tensor of any layout, and its type if NaN is of that."""
    dtype = tensor.dtype if tensor.is_floating_point() else torch.bool
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _joined(parts: list[Any], counts: list[int]) -> Any:
    """Join what a module returned for several chunks, with so many samples each, along the dimension of these."""

    def join(*pieces: Tensor) -> Tensor:
        for axis in range(min(2, pieces[0].ndim)):
            others = {(*piece.shape[:axis], *piece.shape[axis + 1 :]) for piece in pieces}
            if len(others) == 1 and [piece.shape[axis] for piece in pieces] == counts:
                return torch.cat(pieces, axis)
        return pieces[0]

    found = [list(tensors_in(part)) for part in parts]
    if len({len(tensors) for tensors in found}) > 1:
        return parts[0]
    joined = map(join, *found)
    return map_tensors(lambda _: next(joined), parts[0])


def _widened(value: Any) -> Any:
    """Return a tensor or parameter of a short type in float32; other values as they are."""
    if not isinstance(value, Tensor) or value.dtype not in _SHORT:
        return value
    wide = value.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide


@dataclass
class _Head:
    """What follows a layer, run on rows of its recorded output with the record in the place of what came before.

    Where it is ``widened``, it runs in float32 in the place of a short type.
    """

    replay: Replay
    replica: nn.Module
    layer: nn.Module
    recorded: _Record
    batch: int
    widened: bool

    def __post_init__(self) -> None:
        done = {inner for module, _ in self.recorded.before for inner in module.modules()} | set(self.layer.modules())
        after = [module for module in self.replica.modules() if module not in done]
        self._formats = fast_formats(after)
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (v, dict(v)) for module in after if self.widened for v in (module._parameters, module._buffers)
        ]
        for values, kept in self._kept:
            values.update({name: _widened(value) for name, value in kept.items()})

    def proven(self) -> Tensor | None:
        """Return the scores of the outputs as they are, (N,), if they are those of the pass; else leave the replica."""
        samples = torch.arange(len(self.recorded.scores), device=self.recorded.layer_output.device)
        tried, found = min(3, self.replay.batch_size), None
        try:
            if all(run_chunks(lambda chunk: self._scores_alike(samples[:1], chunk), tried, tried)):
                chunks = run_chunks(lambda chunk: self.score(samples[chunk]), len(samples), self.replay.batch_size)
                found = torch.cat(chunks)
                found = found if is_close(found, self.recorded.scores) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever a model raises at what is not like its input
            found = None
        if found is None:
            for values, kept in self._kept:
                values.update(kept)
        return found

    def _scores_alike(self, sample: Tensor, chunk: slice) -> bool:
        """Check whether a row gets the same score alone and among blank ones, and whether a NaN decides anything."""
        count = chunk.stop - chunk.start

        def blank_others(rows: Tensor) -> Tensor:
            others = [row for row in range(count) if row != count // 2]
            return rows.index_fill_(self.batch, torch.tensor(others, device=rows.device), 0)

        with nullcontext() if self.recorded.known else _UnknownWatched():  # type: ignore[no-untyped-call]
            first = self.score(sample)
            among = self.score(sample.expand(count), blank_others) if count > 1 else first
        return is_close(among[count // 2 : count // 2 + 1], first)

    def score(self, samples: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Score the outputs of samples, (B,), as they are or edited."""
        call = self.replay.call
        copies = self._typed(self.recorded.layer_output.index_select(self.batch, samples))
        copies = copies if edit is None else edit(copies)
        if self.batch == 0:
            copies = in_format(copies, self._formats)
        image, count = self.replay.image, len(self.recorded.scores)
        rows = _rows(image if self.recorded.known else _without_values(image), 0, samples)
        args, kwargs = map_tensors(self._typed, call.with_image(rows, samples))
        answers: defaultdict[nn.Module, deque[Any]] = defaultdict(deque)
        for module, output in self.recorded.before:
            answers[module].append(output)

        def fill(part: Tensor) -> Tensor:
            dimension = next((axis for axis, side in enumerate(part.shape[:2]) if side == count), None)
            return self._typed(_rows(part, dimension, samples))

        def answer(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                return map_tensors(fill, answers[module].popleft()) if answers[module] else forward(*args, **kwargs)

            return answered

        wrappers = dict.fromkeys(answers, answer)
        full = torch.autocast(call.device.type, enabled=False) if self.widened else nullcontext()
        with forwards_replaced({**wrappers, self.layer: lambda *_: lambda *_args, **_kwargs: copies}), full:
            return self.replay.select(self.replica(*args, **kwargs), samples)

    def _typed(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the type that the head runs in."""
        wide: Tensor = _widened(tensor) if self.widened else tensor
        return wide


@dataclass
class _WholeModel:
    """The whole model, run on repeated inputs with the last output of a layer edited."""

    replay: Replay
    replica: nn.Module
    layer: nn.Module
    layer_calls: int

    def __post_init__(self) -> None:
        # A run that fails in another format is repeated: that would count the calls of the layer twice.
        self._run = VariantRunner(self.replica, self.replay.call, formats=None if self.layer_calls == 1 else {})

    def score(self, samples: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Score the edited outputs of samples, (B,)."""
        calls = 0

        def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            tensor = first_tensor(output)
            if calls % self.layer_calls or tensor is None:
                return None
            return replace_tensors(output, [(tensor, edit(tensor.clone()))])

        handle = self.layer.register_forward_hook(replace)
        try:
            return self.replay.select(self._run(self.replay.image[samples], samples), samples)
        finally:
            handle.remove()
