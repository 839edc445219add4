"""A page that runs a graph in a browser: one file that fetches nothing."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from torchcam._page import color_table
from torchcam._pictures import base64_text
from torchcam._templates import render

from ._formats import Run, needs, onnx_model, onnx_runner

_SCRIPT, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"


def write_page(program: ExportedProgram, metadata: Mapping[str, Any], runtime: Path, path: Path) -> Run:
    """Write a page, and return what runs the graph in it (by ONNX Runtime outside of the browser)."""
    needs("onnx", "onnxscript", "onnxruntime")
    import onnx_ir

    shape = metadata["input"]["shape"]
    if len(shape) != 3 or shape[0] not in {1, 3} or metadata["input"]["dtype"] != "float32":
        found = f"{metadata['input']['dtype']} of shape {tuple(shape)}"
        raise ValueError(f"a page runs models of colour or grey images (C, H, W) in float32, this one takes {found}")
    if not metadata["normalized"] or metadata["options"].get("relu") is False:
        raise ValueError("a page shows maps in [0, 1]: export with `normalized=True` and without `relu=False`")
    if "unknown" in metadata["preprocessing"]:
        raise ValueError(metadata["preprocessing"]["unknown"])
    script, wasm = _runtime(runtime)
    model: bytes = onnx_ir.to_proto(onnx_model(program, metadata)).SerializeToString(deterministic=True)
    facts = [
        ("Model", metadata["model"]),
        ("Method", metadata["method"]),
        ("Layers", ", ".join(metadata["target_layers"])),
        ("Made by", f"torchcam {metadata['torchcam']}"),
    ]
    page = render(
        "export/_page.html",
        title=f"{metadata['method']} of {metadata['model']}",
        data={"about": metadata, "facts": facts, "colours": color_table(None, signed=False)},
        wasm=_packed(wasm),
        model=_packed(model),
        runtime=script,
    )
    path.write_text(page, encoding="utf-8")
    return onnx_runner(model)


def _packed(data: bytes) -> str:
    return base64_text(gzip.compress(data, mtime=0))


def _runtime(folder: Path) -> tuple[str, bytes]:
    """Read ONNX Runtime Web from the folder of its npm package: its script, and its binary.

    Raises:
        FileNotFoundError: if a file is missing
        ValueError: if the script does not end as those that are known
    """
    place = next((one for one in (folder / "dist", folder) if (one / _SCRIPT).is_file()), folder)
    missing = [name for name in (_SCRIPT, _WASM) if not (place / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`runtime` '{folder}' has no {missing[0]}: name the folder of the npm package onnxruntime-web "
            "(`npm pack onnxruntime-web`, unpacked)"
        )
    script = (place / _SCRIPT).read_text(encoding="utf-8")
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)
    exported = re.search(r"export\s*\{([^{}]*)\};?\s*$", script)
    if exported is None:
        raise ValueError(f"`runtime` '{place / _SCRIPT}' is not a script of onnxruntime-web that is known: try 1.30")
    names = [entry.split(" as ") for entry in exported[1].split(",")]
    entries = ", ".join(f"{one[-1].strip()}: {one[0].strip()}" for one in names)
    script = f"{script[: exported.start()]}globalThis.torchcamRuntime = {{{entries}}};"
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--"), (place / _WASM).read_bytes()
