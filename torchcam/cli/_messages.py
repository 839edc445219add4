"""Errors, warnings and results as the commands print them."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torchcam._names import closest
from torchcam._tables import printable

__all__ = [
    "BEST",
    "Parser",
    "UserError",
    "count_of",
    "library_errors",
    "one_line",
    "plain_messages",
    "print_json",
    "print_line",
    "print_marked",
    "print_table",
    "print_warning",
    "printable",
]

BEST = "bold green"
"""The style of the best of some numbers on a terminal."""

PIPE_WIDTH = 200  # of files and pipes, which have no width of their own
# What the library advises, and what a user of the command line can do.
ADVICE = {
    r"pass `reshape_transform`.*, or another": "name another",
    r"remove it to begin anew": "pass --restart to begin anew",
}
OPTIONS = re.compile(r"`(against|alpha|box|checkpoint|class_idx|colormap|metrics|target_layer|texts|threshold|top_k)`")


class UserError(Exception):
    """An error that the user can correct, printed in one line."""


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`; for an unknown choice it names the closest ones."""
        choice = re.fullmatch(r"(.*invalid choice: )'(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice is not None:
            there = re.findall(r"[\w-]+", choice[3])
            message = f"{choice[1]}'{choice[2]}'; {closest(choice[2], there)}"
        raise UserError(f"{message} (`{self.prog} --help` explains)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the arguments of a command; the error of an unknown option names the closest ones."""
        found, rest = super().parse_known_args(args, namespace)
        wrong = next((text.partition("=")[0] for text in rest if text.startswith("--")), None)
        if wrong is not None:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(rest)}; {closest(wrong, names)}")
        return found, rest


@contextmanager
def plain_messages() -> Iterator[None]:
    """Print each warning in one line, without its place in the code, and no log messages."""

    def show(message: Warning | str, *_: Any) -> None:
        print_warning(message)

    logger, handler = logging.getLogger("torchcam"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def library_errors(layers: Sequence[str] = ()) -> Iterator[None]:
    """Turn errors of the library into a `UserError` that names options in place of arguments.

    Args:
        layers: the target layers that the user named
    """
    try:
        yield
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "`" not in str(error):
            raise  # a bug: the library names the argument that has a wrong type
        message = str(error)
        if isinstance(error, AssertionError) and layers:
            named = ",".join(layers)
            message = f"the model does not run every layer of --target-layer {named} in evaluation mode: name another"
        for pattern, advice in ADVICE.items():
            message = re.sub(pattern, advice, message)
        message = OPTIONS.sub(lambda match: "--" + match[1].replace("_", "-"), message)
        notes = "; ".join(note.removeprefix("torchcam.evaluate: ") for note in getattr(error, "__notes__", []))
        raise UserError(f"{message} ({notes})" if notes else message) from error


def print_warning(message: object) -> None:
    """Print a warning in one line, above the bars that a terminal shows."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        print(f"torchcam: warning: {one_line(message)}", file=sys.stderr)


def print_line(text: str, style: str = "") -> None:
    """Print text without control characters, on a terminal in a style of rich; above the bars that it shows."""
    from rich.console import Console
    from rich.text import Text
    from tqdm import tqdm

    with tqdm.external_write_mode():
        if style and sys.stdout.isatty():
            Console(highlight=False, soft_wrap=True).print(Text(printable(text), style))
        else:
            print(printable(text), flush=True)


def print_marked(text: object, styles: Mapping[str, str]) -> None:
    """Print lines, on a terminal those that match a regular expression in its style of rich."""
    for line in str(text).splitlines():
        print_line(line, next((style for pattern, style in styles.items() if re.search(pattern, line)), ""))


def count_of(count: int, what: str) -> str:
    """Return a number with what it counts, in the singular or the plural."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def one_line(message: object) -> str:
    """Return a message without line breaks and control characters."""
    return printable(" ".join(str(message).split()))


def print_json(result: Any) -> None:
    """Print a result for other programs."""
    from torchcam._numbers import to_json

    print(to_json(result))


def print_table(table: Any) -> None:
    """Print a table of rich: with colours on a terminal, as plain text to a file or a pipe."""
    from rich.console import Console

    from torchcam._tables import as_text

    if sys.stdout.isatty():
        Console(highlight=False).print(table)
    else:
        print(as_text(table, width=PIPE_WIDTH))
