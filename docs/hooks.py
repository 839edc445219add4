"""What the build of the documentation does beyond MkDocs and its plugins.

Docstrings are written for Python's `help` and have their formulas and references in reStructuredText; the site is
Markdown. Formulas become MathML, which browsers draw by themselves: no script, nothing fetched. And the help of the
command line is put where a page asks for it.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension
from latex2mathml.converter import convert

import torchcam.cli

MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
HELP = re.compile(r"<!-- help: (\w+) -->")
ROLE = re.compile(r":(?:class|meth|mod|func|data|attr):`~?([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
DISPLAY_MATH = re.compile(r"^([ ]*)\.\. math::\n((?:\1[ ]+.*\n?|[ ]*\n)+)", re.MULTILINE)
HOME = "torchcam."  # where a bare name in a reference is looked for


class RestructuredText(Extension):  # type: ignore[misc, unused-ignore]
    """Turn what is reStructuredText in docstrings into Markdown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of whatever Griffe has found."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: Any) -> str:
    """Rewrite a docstring: formulas, references, literal stars, and the heading of examples."""

    def display(match: re.Match[str]) -> str:
        formula = " ".join(match[2].split())
        return f"\n{match[1]}\\[ {formula} \\]\n\n"

    def role(match: re.Match[str]) -> str:
        target = match[1]
        if target.startswith(("torch.", "torchmetrics.")):
            return f"`{target}`"
        return f"[`{target.removeprefix(HOME).split('.')[-1]}`][{_full_name(target, obj)}]"

    text = DISPLAY_MATH.sub(display, text)
    text = INLINE_MATH.sub(lambda match: f"\\({' '.join(match[1].split())}\\)", text)
    text = ROLE.sub(role, text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"(?<=[, (])\*(?=\w)", r"\\*", text)  # (N, *spatial) begins no emphasis


def _full_name(target: str, obj: Any) -> str:
    """Give the path that a reference means: a full one as it is, a bare one beside the object it stands in."""
    if target.startswith(HOME):
        return target
    if target.startswith("_CAM"):
        return f"torchcam.methods.core.{target}"
    owner = obj if obj.is_class or obj.is_module else obj.parent
    while owner is not None:
        if target.split(".", maxsplit=1)[0] in owner.members:
            return f"{_public(owner.path)}.{target}"
        owner = owner.parent
    return target


def _public(path: str) -> str:
    """Give the package in place of its private modules, which is where the reference has the names."""
    return re.sub(r"\.(?:activation|attention|composite|decomposition|gradient|pixel|_\w+)(?=\.|$)", "", path)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of commands where a page asks for it."""
    return HELP.sub(lambda match: f"```text\n{_help_of(match[1])}\n```", markdown)


def _help_of(command: str) -> str:
    os.environ["COLUMNS"] = "82"  # argparse leaves two of them free
    parser = torchcam.cli.make_parser()
    subcommands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return textwrap.dedent(subcommands.choices[command].format_help()).rstrip()


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas."""

    def draw(match: re.Match[str]) -> str:
        block = match[2] == "["
        formula = convert(html.unescape(match[3]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return MATH.sub(draw, content)


def on_post_build(config: Any, **_: Any) -> None:
    """Let `llms.txt` link the pages of the site, in place of their sources."""
    path = Path(config["site_dir"]) / "llms.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"\]\(([\w/-]+?)(?:(?<=/)index)?\.md\)", lambda m: f"]({m[1].rstrip('/')}/)", text), encoding="utf-8"
    )
