"""Look at the built documentation in a browser: what its search finds, and whether anything is cut off.

    mkdocs build --strict && python scripts/check_site.py site

Searches are those of the site itself. At 1280 pixels no line of code may be cut off; on a phone of 390 pixels no page
may be wider than the screen, and wide pictures must scroll in a size that can be read. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SEARCHES = {
    "YOLO": {"guides/detectors/", "recipes/"},
    "cite": {"faq/"},
    "production": {"guides/production/"},
    "Hugging Face": {"recipes/", "guides/transformers/"},
    "upload": {"guides/app/"},
    "Gradio": {"guides/app/", "reference/app/"},
    "ONNX": {"guides/production/", "recipes/", "reference/export/"},
    "Colab": {"faq/", "guides/app/"},
    "FAQ": {"faq/"},
    "ViT heatmap": {"recipes/", "guides/transformers/"},
    "custom model": {"recipes/"},
    "which layer": {"guides/layers/", "faq/", "guides/transformers/"},
}
CUT_OFF = """() => [...document.querySelectorAll('.md-content pre')]
    .filter((pre) => [pre, ...pre.children].some((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth))
    .map((pre) => pre.innerText.split('\\n').reduce((a, b) => (a.length > b.length ? a : b)))"""
ON_A_PHONE = """() => {
    const [page, shown] = [document.documentElement.scrollWidth, innerWidth];
    const small = [...document.querySelectorAll('.md-content p > img')]
        .filter((image) => image.clientWidth < Math.min(600, image.naturalWidth))
        .map((image) => `${image.getAttribute('src')} is ${image.clientWidth} wide`);
    return page > shown ? [`the page is ${page} wide`, ...small] : small;
}"""


class Quiet(SimpleHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a folder on this computer."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def found(page: Any, words: str) -> list[str]:
    """Return the pages that the search finds, the best first."""
    page.fill(".md-search__input", "")
    page.type(".md-search__input", words)  # the search hears keys
    page.wait_for_function("() => /match/.test(document.querySelector('.md-search-result__meta').textContent)")
    page.wait_for_timeout(500)
    links = page.eval_on_selector_all(".md-search-result__link", "all => all.map((one) => one.pathname)")
    return list(dict.fromkeys(link.lstrip("/") for link in links))


def problems_of(site: Path, browser: Any, address: str) -> Iterator[str]:
    """Yield what is wrong."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.click(".md-search__input")
    for words, wanted in SEARCHES.items():
        best = found(page, words)[:1]
        print(f"{words!r} finds {best[0] if best else 'nothing'}")
        if not wanted & set(best):
            yield f"the search for {words!r} finds {best}, not one of {sorted(wanted)}"
    pages = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    for name in pages:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{address}{name}/")
        for line in page.evaluate(CUT_OFF):
            yield f"{name}: at 1280 pixels code is cut off: {line.strip()}"
        page.set_viewport_size({"width": 390, "height": 844})
        for problem in page.evaluate(ON_A_PHONE):
            yield f"{name}: at 390 pixels {problem}"
    print(f"{len(pages)} pages")


def main() -> int:
    """Check a site, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder that `mkdocs build` has written")
    site = parser.parse_args().site

    from playwright.sync_api import sync_playwright

    path = next(
        (one for name in ("chromium", "chromium-browser", "google-chrome") if (one := shutil.which(name))), None
    )
    with served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        problems = list(problems_of(site, browser, address))
        browser.close()
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
