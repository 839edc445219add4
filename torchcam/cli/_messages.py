"""Errors, warnings and results as the commands print them."""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torchcam._tables import printable

__all__ = [
    "HelpFormatter",
    "Parser",
    "UserError",
    "library_errors",
    "one_line",
    "plain_messages",
    "print_json",
    "print_table",
    "printable",
]

PIPE_WIDTH = 200  # of files and pipes, which have no width of their own
# What the library advises, and what a user of the command line can do.
ADVICE = {
    r"pass `reshape_transform`.*, or another": "name another",
    r"remove it to begin anew": "pass --restart to begin anew",
}
OPTIONS = re.compile(r"`(alpha|checkpoint|class_idx|colormap|target_layer|top_k)`")


class UserError(Exception):
    """An error that the user can correct, printed in one line."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps what is too wide for the terminal between words: lines of one indentation together, but for commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        found = []
        for (depth, is_text), block in itertools.groupby(text.splitlines(), _depth):
            lines = list(block)
            if not is_text or max(map(len, lines)) <= width:
                found += lines
                continue
            is_commands = any(line.lstrip().startswith("torchcam ") for line in lines)
            for part in lines if is_commands else [" ".join(line.strip() for line in lines)]:
                start, more = " " * depth, " " * (depth + (4 if is_commands else 0))
                found.append(
                    textwrap.fill(
                        part.strip(), width, initial_indent=start, subsequent_indent=more, break_on_hyphens=False
                    )
                )
        return "\n".join(indent + line for line in found)


def _depth(line: str) -> tuple[int, bool]:
    return len(line) - len(line.lstrip()), bool(line.strip())


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of the arguments."""
        raise UserError(f"{message} (`{self.prog} --help` explains)")


@contextmanager
def plain_messages() -> Iterator[None]:
    """Print each warning in one line, without its place in the code, and no log messages."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"torchcam: warning: {one_line(message)}", file=sys.stderr)

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
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
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
