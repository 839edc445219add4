"""The files that a graph is written to."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from torchcam._extras import extra
from torchcam._files import atomic_write

if TYPE_CHECKING:
    import onnx_ir

METADATA = "torchcam"  # the key of the metadata, a JSON text
_LARGEST_FILE = 1 << 31  # of protobuf; weights of larger models are in a file of their own

Run = Callable[..., tuple[Tensor, Tensor]]


def needs(*modules: str) -> None:
    """Raise an ``ImportError`` that names the extra if one of its modules is not installed."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: {extra('export')}")


def write_files(path: Path, write: Callable[[Path], Run], prove: Callable[[Run], float]) -> float:
    """Write a file in a temporary folder, prove it there, and move it, with what was written beside it, to ``path``.

    Args:
        path: where the file goes
        write: writes to a path, and returns what runs the file that it has written
        prove: returns the error of that, or raises an exception if it is too large
    """
    with tempfile.TemporaryDirectory(prefix="torchcam-", ignore_cleanup_errors=True) as folder:
        written = Path(folder, path.name)
        error = prove(write(written))
        with ExitStack() as stack:  # the file itself is moved last
            for file in sorted(Path(folder).iterdir(), key=lambda file: file != written):
                part = stack.enter_context(atomic_write(path.with_name(file.name)))
                shutil.copyfile(file, part)
    return error


# ONNX.


def write_onnx(program: ExportedProgram, metadata: Mapping[str, Any], path: Path) -> Run:
    """Write an ONNX file."""
    needs("onnx", "onnxscript", "onnxruntime")
    import onnx_ir

    model = onnx_model(program, metadata)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGEST_FILE * 0.95 else None)
    return onnx_runner(path)


def onnx_model(program: ExportedProgram, metadata: Mapping[str, Any]) -> onnx_ir.Model:
    """Translate a graph to ONNX, without names of files and lines of the machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    names = ["images", "classes"][: len(program.graph_signature.user_inputs)]
    found = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=names, output_names=["scores", "map"], optimize=True
    )
    assert found is not None  # noqa: S101 - for the type checker
    model: onnx_ir.Model = found.model
    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        made = [value for node in graph for value in node.outputs]
        for value in [*graph.inputs, *graph.initializers.values(), *made]:
            value.metadata_props.clear()
    _name_sizes(model)
    model.metadata_props.clear()
    model.metadata_props[METADATA] = json.dumps(metadata)
    model.producer_name, model.producer_version = "torchcam", str(metadata["torchcam"])
    return model


def _name_sizes(model: onnx_ir.Model) -> None:
    """Name the sizes that are dynamic as users expect, in place of torch's symbols."""
    sizes = (model.graph.inputs[0].shape or ())[:1] + (model.graph.inputs[0].shape or ())[2:]
    wanted = ("batch", *("depth", "height", "width")[4 - len(sizes) :])
    names = {str(size): name for size, name in zip(sizes, wanted, strict=True) if not isinstance(size, int)}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:  # sizes that are not known stay apart
                value.shape[axis] = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(size))  # type: ignore[index]


def onnx_runner(model: Path | bytes) -> Run:
    """Return what runs an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, arguments, strict=True)}
        scores, cam = session.run(None, feed)
        return torch.from_numpy(scores), torch.from_numpy(cam)

    return run


# Formats of torch.


def write_program(program: ExportedProgram, metadata: Mapping[str, Any], path: Path) -> Run:
    """Write a graph that ``torch.export.load`` reads."""
    torch.export.save(program, path, extra_files={f"{METADATA}.json": json.dumps(metadata)})
    run: Run = torch.export.load(path).module()
    return run


def write_package(program: ExportedProgram, metadata: Mapping[str, Any], example: Sequence[Tensor], path: Path) -> Run:
    """Compile a graph ahead of time, to a package that a C++ program and ``torch._inductor.aoti_load_package`` read."""
    import torch._inductor

    program.example_inputs = tuple(map(torch.zeros_like, example)), {}
    options = {"aot_inductor.metadata": {METADATA: json.dumps(metadata)}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    finally:
        program.example_inputs = None
    run: Run = torch._inductor.aoti_load_package(str(path))
    return run
