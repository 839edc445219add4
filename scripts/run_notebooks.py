"""Execute the notebooks of the docs, each in a fresh kernel, and fail if one does.

python scripts/run_notebooks.py                                       # execute all
python scripts/run_notebooks.py docs/notebooks/shortcut.ipynb --write  # and keep the outputs
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
BUDGET = 250_000  # what the pictures of a notebook may take, in characters
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def execute(path: Path, timeout: int) -> tuple[Any, float]:
    """Execute a notebook in a fresh kernel and an empty folder; return it with its outputs, and the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        start = time.perf_counter()
        client.execute()
    return notebook, time.perf_counter() - start


def tidy(notebook: Any) -> Any:
    """Leave nothing in a notebook that another run on the same machine would change without need."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    pictures: list[Any] = []
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = {}
            data = output.get("data", {})
            if isinstance(text := data.get("text/plain"), str):
                data["text/plain"] = ADDRESS.sub("", text)
            if "image/png" in data:
                data.pop("image/jpeg", None)
                data.pop("text/html", None)
                pictures.append(data)
    pictures.sort(key=lambda data: len(data["image/png"]), reverse=True)
    total = sum(len(data["image/png"]) for data in pictures)
    for data in pictures:  # the largest first, and no more than it takes
        png = data["image/png"]
        if total > BUDGET and len(jpeg := as_jpeg(png)) < len(png):
            data["image/jpeg"] = jpeg
            del data["image/png"]
            total += len(jpeg) - len(png)
    return notebook


def as_jpeg(png: str) -> str:
    """Turn a picture into a smaller one that looks the same."""
    smaller = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
        flat.save(smaller, format="JPEG", quality=75, subsampling=0, optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main() -> int:
    """Execute the notebooks and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="the notebooks (default: all in docs/notebooks)")
    parser.add_argument("--write", action="store_true", help="write the outputs back, without what changes each time")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one cell (default: %(default)s)")
    options = parser.parse_args()
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebooks in {FOLDER}")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the debugger of the kernel writes to stderr
    failed = []
    for path in paths:
        try:
            notebook, seconds = execute(path, options.timeout)
        except CellExecutionError as error:
            failed.append(path)
            print(f"{path.name}: failed\n{error}", file=sys.stderr)
            continue
        if options.write:
            nbformat.write(tidy(notebook), path)
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
