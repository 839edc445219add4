"""Tables as text, and numbers as JSON."""

from __future__ import annotations

import json
import math

from rich.text import Text

from torchcam._numbers import finite, to_json
from torchcam._tables import as_csv, as_text, make_table, printable


def test_json_has_no_nan() -> None:
    given = {"a": math.nan, "b": [1.5, -math.inf, (2, True)], "c": {"d": "ü", "e": None}}
    assert finite(given) == {"a": None, "b": [1.5, None, [2, True]], "c": {"d": "ü", "e": None}}
    assert json.loads(to_json(given)) == finite(given)
    assert "ü" in to_json(given)


def test_a_table_as_text() -> None:
    table = make_table(("name", "value"), [("a", "1.00"), (Text("long", style="bold"), "10.00")], right=[1])
    assert as_text(table, width=80).splitlines() == ["name  value", "─" * 11, "a      1.00", "long  10.00"]


def test_markup_is_printed_as_it_is() -> None:
    assert as_text(make_table(("[bold]",), [("[red]x[/red]",)]), width=80).splitlines()[2] == "[red]x[/red]"


def test_long_cells_are_folded() -> None:
    lines = as_text(make_table(("name", "layers"), [("a", "x" * 30)]), width=20).splitlines()
    assert max(map(len, lines)) <= 20
    assert "".join(lines).count("x") == 30


def test_a_terminal_obeys_no_name() -> None:
    assert printable("a\x1b[2Jb\u202ec\r") == "a\\x1b[2Jb\\u202ec\\r"
    assert printable("ñandú 🙂\nnext") == "ñandú 🙂\nnext"
    assert "\x1b" not in as_text(make_table(("name",), [("\x1b[31mred",)]), width=80)


def test_a_spreadsheet_computes_no_name() -> None:
    rows = [["=1+1", "+a", "@b", "-c", "plain"], ["-0.5", "+1e-3", -2, "=", ""]]
    assert as_csv(rows) == "'=1+1,'+a,'@b,'-c,plain\n-0.5,+1e-3,-2,'=,\n"
