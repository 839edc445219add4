"""The documentation: its code runs, its links lead somewhere, every public name is in the reference."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import torchcam
from tests import stand_ins
from torchcam.methods._diagnose import CODES

ROOT = Path(torchcam.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), DOCS / "llms.txt"])
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))

FENCE = re.compile(
    r"(?:<!-- no-run: (?P<reason>(?:(?!-->).)*) -->\s*\n)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\)")
DIRECTIVE = re.compile(r"^::: (torchcam[\w.]*)$", re.MULTILINE)
# What a page of others takes as given.
GIVEN = {
    "docs/guides/answers.md": """
from tests.tiny_llava import example
model, processor, picture = example()
""",
    "docs/evaluation.md": """
from torchcam.demo import load_model, sample_images
model = load_model()
loader = [(sample.to_tensor(), [sample.labels[0]]) for sample in sample_images()]
""",
}
PUBLIC_MODULES = [
    *(f"torchcam.{name}" for name in torchcam.__all__ if inspect.ismodule(getattr(torchcam, name))),
    "torchcam.explain",
    "torchcam.integrations.lightning",
    "torchcam.integrations.transformers",
    "torchcam.tasks.answers",
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    title: str = ""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        before = text[: match.start("code")]
        titles = re.findall(r"^#+ (.+)$", before, re.MULTILINE)
        yield Block(page, before.count("\n"), match["language"], code, match["reason"], titles[-1] if titles else "")


def needed(code: str) -> set[str]:
    """The packages that a piece of code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return {name.partition(".")[0] for name in found}


def without_code(text: str) -> str:
    """Blank out fenced blocks and inline code, which may look like links."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return re.sub(r"`[^`\n]*`", lambda match: "x" * len(match[0]), text)


# What pages and modules need beside the package.
NEEDS = {
    "docs/guides/answers.md": "transformers",
    "docs/guides/app.md": "gradio",
    "docs/guides/production.md": "onnxruntime",
    "torchcam.app._window": "gradio",
}

PYTHON = {page: [block for block in blocks(page) if block.language == "python"] for page in PAGES}
RECIPES = {block.title: block for block in PYTHON[DOCS / "recipes.md"]}
RUNNING = [
    page for page, found in PYTHON.items() if any(block.reason is None for block in found) and page.name != "recipes.md"
]


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory to write into, and as many threads and the random state as before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


class TestCode:
    def test_there_is_some(self) -> None:
        assert {"README.md", "docs/getting-started.md", "docs/guides/training.md"} <= set(map(name_of, RUNNING))

    @pytest.mark.parametrize("page", RUNNING, ids=name_of)
    def test_runs(
        self, page: Path, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if name_of(page) in NEEDS:
            pytest.importorskip(NEEDS[name_of(page)])
        stand_ins.place(monkeypatch)
        namespace: dict[str, object] = {"__name__": "__docs__"}
        exec(GIVEN.get(name_of(page), ""), namespace)
        for block in PYTHON[page]:
            if block.reason is None:
                # As long as the lines above it, so that a traceback names the line of the page.
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)

    @pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values:UserWarning")
    @pytest.mark.parametrize("title", RECIPES)
    def test_recipe_runs_alone(self, title: str, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
        block = RECIPES[title]
        for name in sorted(needed(block.code)):
            pytest.importorskip(name, reason=f"{name} is not installed")
        stand_ins.place(monkeypatch)
        namespace: dict[str, Any] = {"__name__": "__docs__"}
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), namespace)
        if "result" in namespace and hasattr(namespace["result"], "results"):
            maps = [cam for one in namespace["result"].maps.values() for cams in one.values() for cam in cams]
            assert maps
            assert all(cam.isfinite().all() for cam in maps)

    def test_recipes_are_whole(self) -> None:
        wanted = ["timm", "Hugging Face", "CLIP", "YOLO", "DETR", "Segmentation", "vision-language", "3D", "Audio"]
        wanted += ["Time series", "FastAPI", "ONNX", "custom model", "Negative evidence", "two checkpoints"]
        assert [sum(word in title for title in RECIPES) for word in wanted] == [1] * len(wanted)

    @pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found], ids=name_of)
    def test_what_does_not_run_is_python_and_says_why(self, page: Path) -> None:
        for block in PYTHON[page]:
            ast.parse(block.code)
            assert block.reason is None or len(block.reason) > 10

    def test_most_of_it_runs(self) -> None:
        kept = [block for found in PYTHON.values() for block in found if block.reason is not None]
        assert len(kept) <= 0.2 * sum(map(len, PYTHON.values()))

    def test_names_in_code_that_does_not_run_exist(self) -> None:
        imports = [
            node
            for found in PYTHON.values()
            for block in found
            for node in ast.walk(ast.parse(block.code))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchcam")
        ]
        missing = [
            f"{node.module}.{alias.name}"
            for node in imports
            for alias in node.names
            if not hasattr(importlib.import_module(str(node.module)), alias.name)
        ]
        assert not missing

    def test_commands_exist(self) -> None:
        """Each `torchcam ...` line of a shell block is one that the command line can read."""
        from torchcam.cli import make_parser

        lines = [
            line.removeprefix("$ ")
            for page in PAGES
            for block in blocks(page)
            if block.language in {"shell", "console"}
            for line in block.code.replace("\\\n", " ").splitlines()
            if re.match(r"(?:\$ )?torchcam ", line)
        ]
        assert len(lines) > 5
        for line in lines:
            make_parser().parse_args(line.split("#")[0].split()[1:])

    def test_a_block_that_fails_would_be_seen(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(
            "a\n\n```python\nx = 1\n```\n<!-- no-run: because -->\n```python\ny = 2\n```\n```text\nz\n```\n"
        )
        found = list(blocks(page))
        assert [(b.language, b.code, b.reason, b.line) for b in found] == [
            ("python", "x = 1\n", None, 3),
            ("python", "y = 2\n", "because", 7),
            ("text", "z\n", None, 10),
        ]


def modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages([str(ROOT / "torchcam")], "torchcam.")]
    return sorted(name for name in found if name != "torchcam.__main__")


class TestDocstrings:
    @pytest.mark.parametrize("name", modules())
    def test_examples_run(self, name: str, quiet: None) -> None:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        module = importlib.import_module(name)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        extra = {"torch": torch}
        report: list[str] = []
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=extra):
            runner.run(test, out=report.append)
        assert not runner.summarize(verbose=False).failed, "".join(report)

    def test_there_are_some(self) -> None:
        finder = doctest.DocTestFinder()
        names = [name for name in modules() if name not in NEEDS]
        tests = [test for name in names for test in finder.find(importlib.import_module(name), name)]
        assert sum(bool(test.examples) for test in tests) > 15


def slugs(title: str) -> set[str]:
    """The anchors of a heading, as MkDocs and as GitHub make them."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
    kept = re.sub(r"[^\w\s-]", "", plain)
    return {re.sub(r"[-\s]+", "-", kept).strip("-"), re.sub(r"\s", "-", kept)}


def anchors(page: Path) -> set[str]:
    """The anchors that work on the site and on GitHub alike: headings where the two agree, and explicit ones."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [match[1] for match in re.finditer(r"^#{1,6} (.+?)\s*#*$", text, re.MULTILINE)]
    agreed = {slug for title in titles if len(found := slugs(title)) == 1 for slug in found}
    return agreed | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def broken(page: Path) -> list[str]:
    found = []
    for match in LINK.finditer(without_code(page.read_text(encoding="utf-8"))):
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            if not target.startswith(("https://", "mailto:")):
                found.append(target)
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.is_file() or (DOCS in page.parents and DOCS not in there.parents):
            found.append(target)  # on the site, there is nothing beside the folder of the docs
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            found.append(target)
    return found


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_lead_somewhere(self, page: Path) -> None:
        assert broken(page) == []

    def test_broken_ones_are_found(self, tmp_path: Path) -> None:
        (tmp_path / "b.md").write_text("# One two\n\n## `x`: what, and why\n\n## A / B\n")
        page = tmp_path / "a.md"
        page.write_text(
            "[a](b.md) [b](b.md#one-two) [c](b.md#x-what-and-why) ![d](no.png) [e](b.md#two) [f](b.md#a-b) "
            "[g](#none) [`h`](c.md) `[i](d.md)` [j](https://example.org) [k](http://example.org)\n"
            "```text\n[l](e.md)\n```\n"
        )
        assert broken(page) == ["no.png", "b.md#two", "b.md#a-b", "#none", "c.md", "http://example.org"]

    def test_every_page_is_in_the_navigation(self) -> None:
        text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        listed = re.findall(r": ([\w/.-]+\.(?:md|ipynb))$", text, re.MULTILINE)
        there = {path.relative_to(DOCS).as_posix() for path in [*DOCS.rglob("*.md"), *NOTEBOOKS]}
        assert sorted(listed) == sorted(there)

    def test_no_address_is_made_up(self) -> None:
        """The project has no home on the net yet; whoever gives it one adds it here."""
        hosts: dict[str, set[str]] = {}
        for page in [*PAGES, *(ROOT / name for name in ("mkdocs.yml", "CITATION.cff"))]:
            for host in re.findall(r"https?://([^/\s)>\"'`]+)", page.read_text(encoding="utf-8")):
                hosts.setdefault(host, set()).add(name_of(page))
        known = {
            "arxiv.org",
            "github.com",  # TorchCAM and pytorch-grad-cam
            "keepachangelog.com",
            "lightning.ai",
            "semver.org",
            "www.contributor-covenant.org",
        }
        assert hosts.keys() <= known, {host: pages for host, pages in hosts.items() if host not in known}


class TestReference:
    def test_every_public_name_is_on_a_page(self) -> None:
        pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md")]
        named = [name for page in pages for name in DIRECTIVE.findall(page)]
        assert len(named) == len(set(named)), "a name is there twice"
        wanted = {
            f"{module}.{name}"
            for module in PUBLIC_MODULES
            for name in importlib.import_module(module).__all__
            if not inspect.ismodule(getattr(importlib.import_module(module), name))
        }
        assert len(wanted) > 100
        assert wanted - set(named) == set()

    def test_every_name_on_a_page_exists(self) -> None:
        for page in DOCS.glob("reference/*.md"):
            for name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
                module, _, attribute = name.rpartition(".")
                assert hasattr(importlib.import_module(module), attribute), name

    def test_every_command_is_there(self) -> None:
        from torchcam.cli import COMMANDS

        text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
        names = {module.__name__.split(".")[-1] for module in COMMANDS}
        assert set(re.findall(r"<!-- help: (\w+) -->", text)) == names
        assert set(re.findall(r"^## torchcam (\w+)$", text, re.MULTILINE)) == names

    def test_every_symptom_is_in_troubleshooting(self) -> None:
        text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
        assert set(re.findall(r"^### `(\w+)`:", text, re.MULTILINE)) == set(CODES)

    def test_every_method_is_in_the_table_and_the_readme(self) -> None:
        from torchcam import methods

        names = set(methods.__all__) - {"OutputTarget"}
        for page in (DOCS / "methods.md", ROOT / "README.md"):
            assert names <= set(re.findall(r"`(\w+)`", page.read_text(encoding="utf-8"))), page.name
