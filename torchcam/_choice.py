"""The classes or targets to explain of each input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ._checks import callable_object, integer
from ._names import closest
from .targets import OutputTarget

T = TypeVar("T")

_LISTS = (list, tuple, range)


class Choice:
    """The classes or targets to explain of each input.

    Args:
        count: the number of inputs
        is_batch: whether they are a batch, if only of one
        class_idx: the classes, see `explain`
        expected_class_idx: the expected classes
        top_k: how many classes with the highest scores
        targets: the targets in place of classes
        class_names: the names of the classes, if they are known
    """

    def __init__(
        self,
        count: int,
        is_batch: bool,
        class_idx: Any,
        expected_class_idx: Any,
        top_k: int | None,
        targets: Any,
        class_names: tuple[str, ...] | None,
    ) -> None:
        self.class_names = class_names
        expected = _plain(named(expected_class_idx, class_names))
        self.expected = _per_input("expected_class_idx", expected, count, _expected)
        classes = _plain(named(class_idx, class_names))
        nested = isinstance(classes, _LISTS) and any(isinstance(one, _LISTS) for one in classes)
        self.classes: list[list[int]] = [[]] * count
        if classes is not None:
            self.classes = _per_input("class_idx", classes, count, _classes, is_own=not is_batch and not nested)
        self.top_k = top_k if top_k is not None else int(class_idx is None)
        self.targets: list[dict[str, OutputTarget]] | None = None
        if targets is not None:
            self.targets = _per_input("targets", targets, count, _named_targets, is_own=not is_batch)
            for name, given in (("class_idx", class_idx), ("expected_class_idx", expected_class_idx), ("top_k", top_k)):
                if given is not None:
                    raise ValueError(f"give `targets` or `{name}`, not both: targets take the place of classes")

    def keys(self, logits: Tensor, samples: slice) -> list[list[int]]:
        """Return the classes to explain of each input in ``samples``, from their scores (n, classes)."""
        num_classes = logits.shape[1]
        if self.class_names is not None and len(self.class_names) != num_classes:
            raise ValueError(
                f"`class_names` has {len(self.class_names)} names, but the model gives scores of {num_classes} classes"
                "; the names may be those of `weights`: then pass `transform=weights.transforms()` in their place"
            )
        if self.top_k > num_classes:
            raise ValueError(
                f"`top_k` must lie between 1 and {num_classes} for the {num_classes} classes of the model, got "
                f"{self.top_k}"
            )
        highest = logits.topk(max(self.top_k, 1)).indices.tolist()
        chosen = []
        for best, named, expected in zip(highest, self.classes[samples], self.expected[samples], strict=True):
            for argument, indices in (("class_idx", named), ("expected_class_idx", [expected])):
                wrong = [index for index in indices if index is not None and not 0 <= index < num_classes]
                if wrong:
                    raise ValueError(
                        f"`{argument}` must lie between 0 and {num_classes - 1} for the {num_classes} classes of the "
                        f"model, got {wrong[0]}"
                    )
            extra = [] if expected is None else [expected]
            chosen.append(list(dict.fromkeys([*best[: self.top_k], *named, *extra])))
        return chosen


def named(given: Any, class_names: Sequence[str] | None) -> Any:
    """Replace the names of classes by their numbers, in lists as well.

    Raises:
        ValueError: if there is no class of that name, or several, or the names are not known
    """
    if isinstance(given, (list, tuple)):
        return [named(one, class_names) for one in given]
    return find_class(given, class_names) if isinstance(given, str) else given


def find_class(name: str, class_names: Sequence[str] | None) -> int:
    """Return the number of a class; capital letters make no difference where one class alone is meant.

    Raises:
        ValueError: if there is no class of that name, or several, or the names are not known
    """
    if class_names is None:
        raise ValueError(f"`class_idx` is {name!r}, but the names of the classes are not known: pass `class_names`")
    found = [index for index, one in enumerate(class_names) if one == name]
    found = found or [index for index, one in enumerate(class_names) if one.casefold() == name.casefold()]
    if len(found) > 1:
        raise ValueError(
            f"`class_idx` is {name!r}, which is the name of the classes {found}: pass one of these numbers"
        )
    if not found:
        others = [*class_names[:3], "…"] if len(class_names) > 12 else class_names
        raise ValueError(f"`class_idx` is {name!r}, and no class has that name; {closest(name, class_names, others)}")
    return found[0]


def _plain(given: Any) -> Any:
    """Return tensors and arrays as numbers and lists."""
    return given.tolist() if hasattr(given, "tolist") else given


def _per_input(argument: str, given: Any, count: int, read: Callable[[Any], T], *, is_own: bool = False) -> list[T]:
    """Read what is asked of each input: one answer for all, or a list of one for each.

    Args:
        argument: the name of the argument
        given: its value
        count: the number of inputs
        read: reads what is asked of one input
        is_own: whether a list is what is asked of the only input
    """
    if is_own or not isinstance(given, _LISTS):
        return [read(given)] * count
    if len(given) != count:
        raise ValueError(
            f"`{argument}` must be one for all inputs, or a list with an entry for each of the {count} inputs, got "
            f"{len(given)}"
        )
    return [read(one) for one in given]


def _expected(given: Any) -> int | None:
    return None if given is None else integer("expected_class_idx", given)


def _classes(given: Any) -> list[int]:
    """Read one class, or several."""
    found = [*given] if isinstance(given, _LISTS) else [given]
    if not found or any(one is None for one in found):
        raise ValueError("`class_idx` names no class; leave it out to explain the predicted one")
    return [integer("class_idx", one) for one in found]


def _named_targets(given: Any) -> dict[str, OutputTarget]:
    if isinstance(given, Mapping):
        named = {str(name): target for name, target in given.items()}
    else:
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        names = [_name_of_target(target) for target in several]
        named = {
            name if names.count(name) == 1 else f"{name} {names[:place].count(name) + 1}": target
            for place, (name, target) in enumerate(zip(names, several, strict=True))
        }
    if not named:
        raise ValueError("`targets` names no target")
    for target in named.values():
        callable_object("targets", target)
    return named


def _name_of_target(target: Any) -> str:
    name = getattr(target, "__name__", type(target).__name__)
    class_idx = getattr(target, "class_idx", None)
    return name if class_idx is None else f"{name}({class_idx})"


def as_class_names(class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError("`class_names` must be a sequence of strings, one per class")
    return tuple(class_names)
