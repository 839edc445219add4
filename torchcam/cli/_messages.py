"""What the commands say: errors that the user can mend, warnings as lines, JSON."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "Parser",
    "UserError",
    "add_command",
    "add_json",
    "add_outputs",
    "closest",
    "library_errors",
    "one_line",
    "percent",
    "plain_messages",
    "print_json",
]


class UserError(Exception):
    """What the user can mend: printed as one line."""


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments."""
        raise UserError(f"{message} (`{self.prog} --help` explains)")


def add_command(commands: Any, name: str, *, short: str, long: str, examples: str = "", run: Any) -> Parser:
    """Add a command to the parser."""
    parser: Parser = commands.add_parser(
        name, help=short, description=long, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: Any) -> None:
    """Add the option that every command has for other programs."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def add_outputs(result: Any, what: str) -> None:
    """Add the options of commands that can write their result to files; ``what`` says as what."""
    result.add_argument(
        "--output", metavar="FILE", type=Path, action="append", default=[], help=f"{what}; may be repeated"
    )
    result.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_json(result)


def print_json(result: Any) -> None:
    """Print a result for other programs."""
    print(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False))


@contextmanager
def plain_messages() -> Iterator[None]:
    """Print warnings as one line each, without a place in the code; log messages are for programs."""

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


def one_line(message: object) -> str:
    """Give a message without line breaks."""
    return " ".join(str(message).split())


def percent(probability: Any) -> str:
    """Print a probability."""
    return "<0.1%" if 0 < probability < 0.0005 else f"{probability:.1%}"


@contextmanager
def library_errors(layers: Sequence[str] = ()) -> Iterator[None]:
    """Turn what the library says of its arguments into what the user of the command line can mend."""
    try:
        yield
    except AssertionError as error:
        raise UserError(
            f"the model does not run every layer of --target-layer {','.join(layers)} in evaluation mode: name another"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "`target_layer`" not in str(error):
            raise  # no option has a type that the user could get wrong: a bug
        message = re.sub(
            r"pass `reshape_transform`.*, or another", "name another", str(error)
        )  # no option for a function
        message = re.sub(r"`(target_layer|alpha|colormap)`", lambda match: "--" + match[1].replace("_", "-"), message)
        raise UserError(message) from error


def closest(name: str, known: Sequence[str]) -> str:
    """Say which known names are meant, or else what there is."""
    by_case = {candidate.lower(): candidate for candidate in known}
    close = [by_case[match] for match in get_close_matches(name.lower(), by_case, n=3, cutoff=0.5)]
    return f"closest: {', '.join(close)}" if close else f"there are {', '.join(known)}"
