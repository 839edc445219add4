"""Why this word: which regions of its pictures made a generative vision-language model say what it said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor, nn

from torchcam._checks import one_of, torch_module
from torchcam._inputs import as_rgb, read_picture
from torchcam._numbers import versions
from torchcam._replica import freeze, normal_mode, random_states_kept, replicated
from torchcam.layout import Cells
from torchcam.targets import token_scores

from ._answer import AnswerExplanation
from ._cells import find_cells
from ._streams import VisualStreams
from ._teacher import check_logits, encode, force, generate, grown
from ._tokens import choose, pieces_of, token_id

__all__ = ["AnswerExplanation", "explain_answer"]

Score = Literal["logit", "logprob"]
Per = Literal["token", "word", "answer"]


@overload
def explain_answer(
    model: nn.Module, processor: Any, images: Any, prompt: str, answer: str | None = None, **options: Any
) -> AnswerExplanation: ...


@overload
def explain_answer(
    model: nn.Module, processor: Any, images: Any, prompt: Any, answer: Any = None, **options: Any
) -> Any: ...


def explain_answer(
    model: nn.Module,
    processor: Any,
    images: Any,
    prompt: Any,
    answer: Any = None,
    tokens: int | Sequence[int] | str | None = None,
    score: Score = "logit",
    against: int | str | None = None,
    *,
    per: Per = "token",
    checkpointing: bool = False,
    positions: Any = None,
    cells: Any = None,
    **generation: Any,
) -> Any:
    r"""Explain each word of a vision-language model's answer by the regions of its pictures.

    The model answers by its own ``generate``, without hooks. Then one pass over prompt and answer gives the logits of
    all tokens at once; they are proven to be those of the generation, or else an error is raised. The maps are
    activation × gradient of a token's score, with the embeddings of the pictures as the decoder gets them (of models
    that add features of pictures to later layers as well, summed over all), and with balanced gradients: the
    denominators of normalisations and the probabilities of attention are constants, and of a product of two paths each
    gets half. All runs on a replica, so that nothing of the model changes.

    Example:
        >>> answer = torchcam.explain_answer(model, processor, "cat.jpg", "What is this?")  # doctest: +SKIP
        >>> answer.overlay("cat")  # doctest: +SKIP
        >>> answer.to_html("answer.html")  # doctest: +SKIP

    Args:
        model: a generative vision-language model of transformers
        processor: its processor
        images: the picture (a path, a PIL image or an array), or a list of all pictures of the prompt. For several
            prompts a list with an entry for each.
        prompt: the prompt with its places for pictures, as the processor takes it. A question without such a place
            goes through the processor's chat template. Conversations (lists of messages) are prompts as well. A list
            of prompts is a batch; they are padded on the left.
        answer: a text to explain in the place of the generated one, or its token ids; for several prompts a list
        tokens: which tokens of the answer are explained: an index, several, or a part of its text; by default all
        score: what is explained of a token: its ``"logit"``, or its ``"logprob"`` (log-probability)
        against: a token (its id or text) whose score is subtracted: why the one and not the other; ``"others"`` for
            the mean of all other logits
        per: whether there is a map for each ``"token"``, each ``"word"`` or the whole ``"answer"``. Each map takes a
            backward pass of its own.
        checkpointing: compute each layer of the decoder again when its gradient is: this needs the memory of one layer
            in the place of that of all, and the time of one more forward pass
        positions: which positions of the prompt hold visual tokens, (T,) or (B, T) booleans, for models where they are
            not found
        cells: where these tokens are: a :class:`torchcam.layout.Cells` for each picture, for models of families whose
            places are not known
        generation: further arguments of ``model.generate``, such as ``max_new_tokens``

    Returns:
        the explanation, an :class:`AnswerExplanation`; for several prompts a list of them

    Raises:
        RuntimeError: if one pass over prompt and answer does not have the logits of the generation, or a score does not
            depend on the pictures
        TypeError: if an argument has the wrong type
        ValueError: if the pictures do not fit the prompt or the processor the model, a token is outside the answer, the
            answer is empty, or the places of the visual tokens are not known
    """
    torch_module("model", model)
    one_of("score", score, ("logit", "logprob"))
    one_of("per", per, ("token", "word", "answer"))
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"`model` must be a generative model of transformers, {type(model).__name__} cannot generate")
    if not callable(processor) or getattr(processor, "tokenizer", None) is None:
        raise TypeError(
            "`processor` must be the processor of a vision-language model (with its image processor and tokenizer), "
            f"got {type(processor).__name__}: `AutoProcessor.from_pretrained(...)` loads it"
        )
    if answer is not None and generation:
        raise ValueError(f"`answer` is given, so nothing is generated: leave out {', '.join(generation)}")
    is_batch = isinstance(prompt, (list, tuple)) and not all(isinstance(item, dict) for item in prompt)
    prompts = list(prompt) if is_batch else [prompt]
    count = len(prompts) if is_batch else None
    pictures = _pictures(_per_prompt("images", images, count))
    given = None if answer is None else _given(processor, _per_prompt("answer", answer, count))

    with random_states_kept(), normal_mode(), replicated(model) as replica:
        freeze(replica)
        inputs, texts = encode(replica, processor, pictures, prompts)
        if given is None:
            answers = generate(replica, processor, inputs, generation)
        else:
            answers = force(replica, processor, inputs, given)
        pieces = [
            pieces_of(processor.tokenizer, ids[:length])
            for ids, length in zip(answers.ids.tolist(), answers.lengths, strict=True)
        ]
        choices = [choose(own, tokens, per) for own in pieces]
        other = token_id(processor.tokenizer, against)
        mask = _grown_positions(positions, inputs["input_ids"], answers.ids.shape[1])
        streams = VisualStreams(replica, mask, checkpointing)
        logits = streams.run(grown(replica, inputs, answers.ids))[:, -answers.ids.shape[1] - 1 : -1]
        check_logits(replica, logits, answers)
        assert streams.mask is not None  # noqa: S101 - for the type checker: the pass has set it
        counts = streams.mask.sum(1).tolist()
        if cells is None:
            places = find_cells(replica, processor, inputs, pictures, counts)
        else:
            places = _given_cells(_per_prompt("cells", cells, count), pictures, counts)
        scores = token_scores(logits, answers.ids, other, score == "logprob")  # (B, K)
        sums = [torch.stack([row[[*group]].sum() for group in own]) for row, own in zip(scores, choices, strict=True)]
        explained = nn.utils.rnn.pad_sequence(sums, batch_first=True)  # (B, G)
        maps = streams.relevance(explained.sum(0))  # (G, V): the samples do not depend on each other
        probabilities = token_scores(logits.detach(), answers.ids, None, is_log=True).exp()
    if not bool(maps.isfinite().all()):
        warnings.warn(
            f"some relevance of {type(model).__name__}'s visual tokens is not finite: run it in bfloat16 or float32",
            UserWarning,
            stacklevel=2,
        )
    parts = torch.split(maps, counts, 1)
    made_by = {**versions(), "transformers": import_module("transformers").__version__}
    found = [
        AnswerExplanation(
            prompt=texts[b],
            answer="".join(pieces[b]).strip(),
            tokens=tuple(pieces[b]),
            token_ids=tuple(answers.ids[b, : answers.lengths[b]].tolist()),
            probabilities=probabilities[b, : answers.lengths[b]].cpu(),
            explained=choices[b],
            scores=explained[b, : len(choices[b])].detach().cpu(),
            maps=parts[b][: len(choices[b])].detach().cpu(),
            cells=places[b],
            images=tuple(pictures[b]),
            model=f"{type(model).__module__}.{type(model).__name__}",
            question=_question(processor, score, other, against),
            unbalanced=tuple(sorted(streams.unbalanced)),
            versions=made_by,
        )
        for b in range(len(prompts))
    ]
    return found if is_batch else found[0]


def _per_prompt(argument: str, given: Any, prompts: int | None) -> list[Any]:
    """Return what is given for each prompt; None for one prompt without a list around it."""
    if prompts is None:
        return [given]
    if not isinstance(given, (list, tuple)) or len(given) != prompts:
        found = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(f"`{argument}` must be a list with an entry for each of the {prompts} prompts, got {found}")
    return list(given)


def _pictures(images: Sequence[Any]) -> list[list[Image.Image]]:
    """Return the pictures of each prompt."""
    entries = [list(one) if isinstance(one, (list, tuple)) else [one] for one in images]
    if not all(entries):
        raise ValueError("`images` is empty: there is nothing to explain an answer by")
    return [[as_rgb(read_picture(one)) for one in entry] for entry in entries]


def _given(processor: Any, answers: Sequence[Any]) -> list[list[int]]:
    """Return the token ids of given answers."""
    found = []
    for one in answers:
        ids = processor.tokenizer(one, add_special_tokens=False)["input_ids"] if isinstance(one, str) else one
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        size = len(processor.tokenizer)
        is_list = isinstance(ids, (list, tuple))
        if not is_list or not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise ValueError(f"`answer` must be a text, or token ids in [0, {size}), got {one!r}")
        if not ids:
            raise ValueError("`answer` is empty: pass a text with a word at least, or leave it out")
        found.append(list(ids))
    return found


def _grown_positions(positions: Any, ids: Tensor, more: int) -> Tensor | None:
    """Return which positions of prompt and answer hold visual tokens, (B, T + K)."""
    if positions is None:
        return None
    mask = torch.as_tensor(positions, device=ids.device)
    mask = mask.unsqueeze(0) if mask.ndim == 1 else mask
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise ValueError(
            f"`positions` must say of each position of the prompt whether it holds a visual token, as booleans "
            f"{tuple(ids.shape)}, got {tuple(mask.shape)} of {mask.dtype}"
        )
    return torch.cat([mask, mask.new_zeros(len(ids), more)], 1)


def _given_cells(
    cells: Sequence[Any], pictures: Sequence[Sequence[Image.Image]], counts: Sequence[int]
) -> list[tuple[Cells, ...]]:
    """Return the given cells of each picture of each prompt."""
    found = [tuple(one) if isinstance(one, (list, tuple)) else (one,) for one in cells]
    for number, (own, images, count) in enumerate(zip(found, pictures, counts, strict=True)):
        if len(own) != len(images) or not all(isinstance(one, Cells) for one in own):
            raise ValueError(f"`cells` must hold a `Cells` for each of the {len(images)} pictures of prompt {number}")
        places = sum(len(one.boxes) for one in own)
        if places != count:
            raise ValueError(f"`cells` has {places} places for the {count} visual tokens of prompt {number}")
    return found


def _question(processor: Any, score: str, other: Any, against: Any) -> str:
    """Return what is explained of each token, in words."""
    what = {"logit": "the token's logit", "logprob": "the token's log-probability"}[score]
    if against is None:
        return what
    if other == "others":
        return f"{what} less the mean of all others'"
    return f"{what} less that of {processor.tokenizer.decode([other])!r}"
