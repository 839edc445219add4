"""A model and the maps of a method as one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcam.layout import Layout, primary_tensors, replace_tensors
from torchcam.methods._recorder import Pass
from torchcam.methods.core import _CAM, Request
from torchcam.targets import Selector, class_scores, read_logits

from . import _shortcuts
from ._operations import KEPT, RULES, Rewritten

OLDEST_TORCH = (2, 13)
_LARGEST_BATCH = 65536


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    Attributes:
        extractor: the method
        options: options of its call
        relu: what is kept of the evidence, as a call takes it
        normalized: whether maps are scaled
        class_input: whether the classes are an input; the ones with the highest score otherwise
    """

    extractor: _CAM
    options: Mapping[str, Any]
    relu: Any = None
    normalized: bool = True
    class_input: bool = True


class ClassInput(Selector):
    """The score of the class that a tensor names, one of each sample, which has no values yet."""

    def __init__(self, classes: Tensor) -> None:
        super().__init__(classes, None, 0)

    def indices(self, logits: Tensor) -> Tensor:
        """Return the classes (N,); one that does not exist as the nearest that does."""
        classes: Tensor = self.class_idx  # type: ignore[assignment]
        return classes.clamp(0, _num_classes(logits) - 1)

    def by_class(self, logits: Tensor, _samples: Tensor | None) -> Tensor:
        """Score logits (N, K), (N, K, *S) or (N,), so that the backward pass needs no scatter operation."""
        logits = logits.reshape(-1, 1) if logits.ndim < 2 else logits
        logits = logits.flatten(2).sum(-1) if logits.ndim > 2 else logits
        columns = torch.arange(logits.shape[1], device=logits.device)
        return torch.where(self.indices(logits).unsqueeze(1) == columns, logits, 0.0).sum(1)

    def exists(self, logits: Tensor) -> Tensor:
        """Check which samples' classes exist, (N,)."""
        classes: Tensor = self.class_idx  # type: ignore[assignment]
        return (classes >= 0) & (classes < _num_classes(logits))


def _num_classes(logits: Tensor) -> int:
    return logits.shape[1] if logits.ndim > 1 else 1


class ExplainedModel(nn.Module):
    """A model that returns a map beside its scores, to be traced.

    Args:
        question: what is asked; the extractor has no hooks, and a model that nobody else uses
        layouts: the layouts of the layers' outputs, by name
        checks_input: whether samples that are not finite are marked by their input as well
    """

    def __init__(self, question: Question, layouts: Mapping[str, Layout], *, checks_input: bool = True) -> None:
        super().__init__()
        self.model = question.extractor.model
        self.question = question
        self._layouts = dict(layouts)
        self._checks_input = checks_input
        self.eval()

    def forward(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the scores of images (N, C, *spatial) and the maps (N, *grid) of a class of each, (N,)."""
        question, extractor = self.question, self.question.extractor
        recorded = self._recorded(images)
        scores = read_logits(recorded.output)
        if classes is None and not extractor.class_agnostic:
            classes = class_scores(scores).argmax(1)
        select = None if classes is None else ClassInput(classes)
        request = Request(recorded, select, relu=question.relu)
        raw = extractor._raw_maps(request, **question.options)
        cam = fused_map(extractor, extractor._finished(raw, request, question.normalized))

        # Runtimes lose NaN on the way, in a ReLU or a maximum: samples are marked at the end.
        known = _finite_images(images)
        finite = torch.ones_like(known) if select is None else select.exists(scores)
        gradients = extractor._gradient_grids(recorded)
        for tensor in [*extractor._activations(request), *gradients, *raw]:
            finite = finite & _finite(tensor)
        scores = scores.detach()
        if self._checks_input:
            finite = finite & known
            scores = _marked(scores, known)
        return scores, _marked(cam.detach(), finite)

    def _recorded(self, images: Tensor) -> Pass:
        """Run the model and return the pass, whose graph begins at the first target layer."""
        extractor = self.question.extractor
        recorded = Pass(extractor._recorder, (images,), {}, private=True)
        recorded.layouts = dict(self._layouts)

        def start(output: Any) -> Any:
            tensors = [tensor for tensor in primary_tensors(output).values() if not tensor.requires_grad]
            return replace_tensors(output, [(tensor, tensor.detach().requires_grad_()) for tensor in tensors])

        def keep(index: int, output: Any) -> Any:
            found = primary_tensors(output)
            recorded.layers[index] = {level: (tensor, tensor) for level, tensor in found.items()}
            return replace_tensors(output, [(tensor, tensor.clone()) for tensor in found.values()])

        with ExitStack() as stack:
            for index, name in enumerate(extractor.target_names):
                layer = self.model.get_submodule(name)
                hooks = [layer.register_forward_hook(lambda _layer, _args, output, index=index: keep(index, output))]
                if extractor.differentiates:  # before hooks of the model, which may hand the output on by other ways
                    hooks += [layer.register_forward_hook(lambda _layer, _args, output: start(output), prepend=True)]
                for hook in hooks:
                    stack.callback(hook.remove)
            stack.enter_context(torch.enable_grad() if extractor.differentiates else torch.no_grad())
            recorded.finish(self.model(images), None)
        return recorded


def _finite(tensor: Tensor) -> Tensor:
    """Check which samples (N, ...) are finite, by sums over the axes that there are: `_shortcuts` finds them again."""
    return (tensor * 0).sum(tuple(range(1, tensor.ndim))) == 0


def _finite_images(images: Tensor) -> Tensor:
    """Check which images (N, C, *spatial) are finite, by a matrix product: a runtime reads them once."""
    return torch.matmul(images, images.new_zeros(images.shape[-1], 1)).flatten(1).sum(1) == 0


def _marked(tensor: Tensor, finite: Tensor) -> Tensor:
    """Set samples (N, ...) that are not finite to NaN."""
    return torch.where(finite.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, torch.nan)


def fused_map(extractor: _CAM, maps: list[Tensor]) -> Tensor:
    """Return the one map of all target layers."""
    return maps[0] if len(maps) == 1 else extractor.fuse_cams(maps)


def trace(explained: ExplainedModel, images: Tensor, *, dynamic_batch: bool, dynamic_size: bool) -> ExportedProgram:
    """Trace a model and its maps, forward and backward, into a graph of operations that other runtimes have.

    Raises:
        RuntimeError: if this version of torch is too old, the model cannot be traced, or the graph holds a backward
            operation that has no translation
        ValueError: if the model fixes a size that is to be dynamic
    """
    images = torch.zeros_like(images)
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=_LARGEST_BATCH)} if dynamic_batch else {}
    arguments: tuple[Tensor, ...] = (images,)
    dynamic: tuple[dict[int, Any], ...] = (shapes | {axis: Dim.AUTO for axis in range(2, images.ndim) if dynamic_size},)
    if explained.question.class_input:
        arguments += (torch.zeros(images.shape[0], dtype=torch.long, device=images.device),)
        dynamic += (shapes,)
    name = type(explained.model).__name__
    try:
        # The backward operation of fused attention would stay, and its forward be another one.
        with Rewritten(), sdpa_kernel(SDPBackend.MATH):
            captured = _export(explained, arguments, dynamic)
            program: ExportedProgram = captured.run_decompositions(_table())
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "specialized it to be a constant" in str(error) or "Constraints violated" in str(error):
            raise ValueError(
                f"{name} fixes the size of its batch while it is traced: export it with `dynamic_batch=False` for the "
                f"batch of the example ({reason})"
            ) from error
        raise RuntimeError(f"{name} cannot be traced: {reason}") from error
    _shortcuts.shorten(program.graph)
    program.graph_module.recompile()
    mutated = sorted(program.graph_signature.buffers_to_mutate.values())
    if mutated:
        raise RuntimeError(f"{name} cannot be traced: it changes its buffer '{mutated[0]}' in evaluation mode")
    if dynamic_size and not all(isinstance(side, torch.SymInt) for side in _placeholder_shape(program)[2:]):
        raise ValueError(f"{name} fixes the size of its images while it is traced: export it without `dynamic_size`")
    left = sorted({str(node.target) for node in program.graph.nodes if "backward" in str(node.target)})
    if left:
        raise RuntimeError(
            f"the graph of {name} holds {', '.join(left)}, which other runtimes do not have: choose a `target_layer` "
            "behind that operation"
        )
    _strip(program)
    return program


def check_torch() -> None:
    """Raise a ``RuntimeError`` if this version of torch cannot trace backward passes."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise RuntimeError(f"`torchcam.export` needs torch {oldest} or newer, this is {torch.__version__}")


def _export(module: nn.Module, example: tuple[Tensor, ...], dynamic: Sequence[Any]) -> ExportedProgram:
    """Capture forward and backward pass. The public ``torch.export.export`` loses what autograd saves."""
    from torch.export._trace import _export as export_

    shapes, run = tuple(dynamic), cast("Callable[..., ExportedProgram]", export_)
    return run(module, example, dynamic_shapes=shapes, strict=False, pre_dispatch=False)


def _table() -> dict[Any, Any]:
    table = {**torch.export.default_decompositions(), **RULES}
    return {operation: rule for operation, rule in table.items() if operation not in (*KEPT, *_shortcuts.KEPT)}


def _placeholder_shape(program: ExportedProgram) -> Sequence[Any]:
    name = program.graph_signature.user_inputs[0]
    node = next(node for node in program.graph.nodes if node.name == name)
    shape: Sequence[Any] = node.meta["val"].shape
    return shape


def _strip(program: ExportedProgram) -> None:
    """Remove what tells of the machine: lines of source code with their paths, and the example."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "from_node", "source_fn_stack"):
            node.meta.pop(key, None)
    program.example_inputs = None
