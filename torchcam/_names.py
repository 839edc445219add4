"""Names as people write them: in any case, with or without hyphens, Grad-CAM++ for GradCAMpp; and lists of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def match_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that ``name`` spells, or None. Only letters and digits count, in any case."""
    known = list(names)
    if name in known:
        return name
    return {_simplified(entry): entry for entry in reversed(known)}.get(_simplified(name))


def closest(name: str, names: Iterable[str], otherwise: Iterable[str] | None = None) -> str:
    """Return the end of an error message: the names that are most like ``name``, as a question, or else all names.

    Args:
        name: a name that is none of ``names``
        names: the names that there are
        otherwise: the names to list if none is alike; by default all
    """
    known = {_simplified(entry): entry for entry in names if entry}
    matches = [known[match] for match in get_close_matches(_simplified(name), known, n=3, cutoff=0.5)]
    if matches:
        return f"did you mean {' or '.join(map(repr, matches))}?"
    return f"there are {', '.join(known.values() if otherwise is None else otherwise)}"


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def moved(name: str, names: Iterable[str], module: str) -> Any:
    """Return a method that an earlier release, or TorchCAM, has in another module of `torchcam.methods`.

    Raises:
        AttributeError: if the name is none of ``names``, the methods that were in this module
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(import_module("torchcam.methods"), name)


def _simplified(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower().replace("plusplus", "pp").replace("+", "p"))
