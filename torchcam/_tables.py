"""Tables for a terminal or a text file."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def make_table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> Table:
    """Make a table with a line below its header.

    Args:
        header: the titles of the columns
        rows: the cells of each row: strings, or texts of rich
        right: the numbers of the columns that are aligned to the right
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    aligned = set(right)
    for column, title in enumerate(header):
        table.add_column(Text(title), justify="right" if column in aligned else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return table


def printable(text: object) -> str:
    """Replace the control characters of names, which a terminal would obey, with their codes; lines stay lines."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in {"Cc", "Cf"} and character not in "\n\t\u200d"
        else character
        for character in str(text)
    )


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV; a text that a spreadsheet would compute, such as ``=1+1``, gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row])
    return text.getvalue()


def _is_formula(cell: str) -> bool:
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def as_text(*parts: Any, width: int) -> str:
    """Return what rich would print, without colours and without spaces at the ends of lines."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(*parts)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
