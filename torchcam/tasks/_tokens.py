"""The tokens of an answer: their texts, and which of them are explained together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token of an answer; joined, they are the answer.

    A token that ends within a letter of several bytes is empty, and the next one holds the letter.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text: str = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        whole = whole if whole.startswith(before) else before
        pieces.append(whole[len(before) :])
        before = whole
    return pieces


def words_of(pieces: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the words of an answer, as the tokens that they are made of: a word begins after white space."""
    words: list[list[int]] = []
    begins = True
    for place, piece in enumerate(pieces):
        if begins or piece[:1].isspace():
            words.append([])
        words[-1].append(place)
        begins = bool(piece) and piece[-1].isspace()
    return [tuple(word) for word in words]


def choose(pieces: Sequence[str], tokens: Any, per: str) -> tuple[tuple[int, ...], ...]:
    """Find the tokens that are explained.

    Args:
        pieces: the texts of an answer's tokens
        tokens: an index, several, a part of the answer's text, or None for all
        per: whether a map is for a "token", a "word" or the "answer"

    Returns:
        the tokens of each map, by their indices

    Raises:
        TypeError: if ``tokens`` is none of these
        ValueError: if a token is outside the answer
    """
    chosen = _chosen(pieces, tokens)
    if per == "answer":
        return (tuple(chosen),)
    if per == "word":
        return tuple(word for word in words_of(pieces) if set(word) & set(chosen))
    return tuple((place,) for place in chosen)


def _chosen(pieces: Sequence[str], tokens: Any) -> list[int]:
    """Return the indices of chosen tokens."""
    count = len(pieces)
    if tokens is None:
        return list(range(count))
    if isinstance(tokens, str):
        return _within(pieces, tokens)
    wanted = [tokens] if isinstance(tokens, int) else list(tokens) if isinstance(tokens, (list, tuple, range)) else []
    if not wanted or not all(isinstance(one, int) and not isinstance(one, bool) for one in wanted):
        raise TypeError(f"`tokens` must be an index, a list of indices, or a part of the answer, got {tokens!r}")
    outside = [one for one in wanted if not -count <= one < count]
    if outside:
        raise ValueError(
            f"`tokens` names {outside[0]}, but the answer {''.join(pieces).strip()!r} has {count} tokens: 0 to "
            f"{count - 1}, or from the end -1 to {-count}"
        )
    return sorted({one % count for one in wanted})


def _within(pieces: Sequence[str], text: str) -> list[int]:
    """Return the tokens that a part of an answer is made of."""
    answer = "".join(pieces)
    wanted = text.strip()
    start = answer.find(wanted)
    if not wanted or start < 0:
        raise ValueError(f"`tokens` names {text!r}, which is not in the answer {answer.strip()!r}")
    end, place, found = start + len(wanted), 0, []
    for number, piece in enumerate(pieces):
        if place < end and place + len(piece) > start and piece.strip():
            found.append(number)
        place += len(piece)
    return found


def token_id(tokenizer: Any, token: Any) -> Any:
    """Return the id of a token that is given by its id or text; None and "others" stay as they are.

    Raises:
        TypeError: if it is neither
        ValueError: if there is no such token, or the text is several
    """
    if token in (None, "others"):
        return token
    size = len(tokenizer)
    if isinstance(token, int) and not isinstance(token, bool):
        if not 0 <= token < size:
            raise ValueError(f"`against` must be a token id in [0, {size}), got {token}")
        return token
    if not isinstance(token, str):
        raise TypeError(f'`against` must be a token\'s id or text, or "others", got {token!r}')
    tried = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (token, " " + token)]
    for ids in tried:
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    parts = [tokenizer.decode([one]) for one in tried[0]]
    raise ValueError(f"`against` {token!r} is not one token but {parts}: pass the id of one token")
