"""Prompts and answers as a model's inputs: generated, grown for one pass over both, and proven to be the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._passes import to_model
from torchcam._tensors import to_float

# How far logits of a cached step may be from those of one pass, as a share of their range.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Answers:
    """The answers to the prompts of a batch.

    Attributes:
        ids: the tokens, (B, K); what is after an answer does not count
        lengths: the number of tokens of each answer
        logits: the logits that the model's own generation had for the first tokens, (B, M, V) with M ≤ K
    """

    ids: Tensor
    lengths: Sequence[int]
    logits: Tensor


# Prompts.


def encode(
    model: nn.Module, processor: Any, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the inputs that a processor makes of pictures and prompts, and the prompts as they are.

    Args:
        model: the model, for its device and type
        processor: the processor
        images: the pictures of each prompt
        prompts: each a text, or a conversation for the processor's chat template

    Raises:
        ValueError: if the places for pictures in a prompt are not as many as its pictures, or the processor fails
    """
    texts = [_text(processor, prompt, len(own)) for prompt, own in zip(prompts, images, strict=True)]
    for number, (text, own) in enumerate(zip(texts, images, strict=True)):
        marks = [mark for mark in _marks(processor) if mark in text]
        places = text.count(marks[0]) if marks else None
        if places not in {None, len(own)}:
            raise ValueError(
                f"`images` holds {len(own)} picture(s) for prompt {number}, but `prompt` has {places} place(s) "
                f"{marks[0]!r} for them"
            )
    options = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
    with _named_errors(model, processor):
        made = processor(images=[list(own) for own in images], text=texts, return_tensors="pt", **options)
    inputs = {name: value for name, value in made.items() if name != "labels"}
    if "input_ids" not in inputs:
        raise ValueError(f"`processor` must make `input_ids` of a prompt, {type(processor).__name__} made {list(made)}")
    return to_model(model, inputs), texts


def _marks(processor: Any) -> list[str]:
    """Return the texts that stand for a picture in a prompt."""
    names = ("boi_token", "image_token")
    return [mark for name in names if isinstance(mark := getattr(processor, name, None), str) and mark]


def _text(processor: Any, prompt: Any, count: int) -> str:
    """Return a prompt as text; a question without a place for pictures goes through the chat template, if any."""
    if isinstance(prompt, str):
        marks = _marks(processor)
        if not getattr(processor, "chat_template", None) or any(mark in prompt for mark in marks):
            return prompt
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return text


@contextmanager
def _named_errors(model: nn.Module, processor: Any) -> Iterator[None]:
    """Say which arguments may not fit where a processor or a model fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`processor`, `images` and `prompt` make no input that {type(model).__name__} takes: pass the processor "
            f"of this model (this one is a {type(processor).__name__}), and a prompt with a place for each picture "
            f"({type(error).__name__}: {error})"
        ) from error


# Answers.


def generate(model: Any, processor: Any, inputs: dict[str, Any], options: Mapping[str, Any]) -> Answers:
    """Let a model answer.

    Raises:
        ValueError: if an answer is empty, or the model does not take the inputs or options
    """
    made = _generated(model, processor, inputs, options)
    prompts, start = inputs["input_ids"].shape
    ids = made.sequences[:: len(made.sequences) // prompts, start:]  # of several sequences, the first of each prompt
    lengths = [_length(row, model) for row in ids.tolist()]
    if min(lengths) == 0:
        raise ValueError(
            f"the answer to prompt {lengths.index(0)} is empty (the model ends it at once): pass another `prompt`, or "
            "an `answer`"
        )
    if len(made.logits[0]) != prompts:  # those of beams, or of several sequences
        return force(model, processor, inputs, [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)])
    ids = ids[:, : max(lengths)]
    return Answers(ids, lengths, torch.stack(made.logits[: ids.shape[1]], 1))


def _generated(model: Any, processor: Any, inputs: dict[str, Any], options: Mapping[str, Any]) -> Any:
    with _named_errors(model, processor):
        return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


def _length(ids: list[int], model: Any) -> int:
    """Return the number of tokens of an answer before its end."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return next((place for place, token in enumerate(ids) if token in ends), len(ids))


def force(model: Any, processor: Any, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> Answers:
    """Return answers that are given, with the logits that a model's own generation has for their first tokens.

    Two tokens are generated: one from the prompt, one from what the model keeps of it.
    """
    lengths = [len(answer) for answer in answers]
    rows = [[*answer, *[answer[-1]] * (max(lengths) - len(answer))] for answer in answers]
    start, ids = inputs["input_ids"].shape[1], torch.tensor(rows, device=inputs["input_ids"].device)
    steps = min(2, ids.shape[1])

    def forced(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, input_ids.shape[1] - start, None], 0.0)

    options = {"max_new_tokens": steps, "num_beams": 1, "do_sample": False, "logits_processor": [forced]}
    made = _generated(model, processor, inputs, options)
    return Answers(ids, lengths, torch.stack(made.logits[:steps], 1))


# One pass over both.


def grown(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Return the inputs of one pass over prompts and answers: what is as long as a prompt grows as `generate` grows it.

    Args:
        model: the model
        inputs: the inputs for the prompts, ``input_ids`` (B, T) among them
        ids: the tokens of the answers, (B, K)
    """
    from transformers.utils import generic

    output: Any = generic.ModelOutput  # untyped
    kept = dict(inputs)
    for _ in range(ids.shape[1]):
        kept = model._update_model_kwargs_for_generation(output(), kept, is_encoder_decoder=False, num_new_tokens=1)
    full = {name: kept.get(name, value) for name, value in inputs.items()}
    full["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    full["use_cache"] = False
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        full["logits_to_keep"] = ids.shape[1] + 1
    return full


def check_logits(model: nn.Module, logits: Tensor, answers: Answers) -> None:
    """Check that one pass over prompts and answers has the logits of the model's own generation.

    Args:
        model: the model
        logits: those of one pass, (B, K, V)
        answers: the answers

    Raises:
        RuntimeError: if they differ by more than rounding
    """
    own = answers.logits
    steps = own.shape[1]
    found, own = to_float(logits[:, :steps].detach()), to_float(own)
    own, found = (torch.where(own.isfinite(), one, 0.0) for one in (own, found))
    spread = (own - own.mean(-1, keepdim=True)).abs().amax(-1)
    share = (found - own).abs().amax(-1) / spread  # (B, M)
    lengths = torch.tensor(answers.lengths, device=share.device)
    counts = torch.arange(steps, device=share.device) < lengths.unsqueeze(1)
    worst = float(torch.where(counts, share, 0.0).amax())
    tolerance = _TOLERANCES.get(logits.dtype, _TOLERANCES[torch.bfloat16])
    if not worst <= tolerance:
        raise RuntimeError(
            f"one pass of {type(model).__name__} over prompt and answer has other logits than its generation: they "
            f"differ by {worst:.2g} of their range, more than rounding in {logits.dtype} explains ({tolerance}). So a "
            "map would explain another computation: run the model in float32, and if they still differ, its inputs "
            "do not grow with the answer in the way that `generate` lets them"
        )
