"""A model and the maps of a method as one graph, proven, and the files it is written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from torchcam import __version__
from torchcam._checks import torch_module
from torchcam._choice import as_class_names
from torchcam._methods import find_method, method_names
from torchcam._recipes import as_recipes, extractors_on
from torchcam._replica import freeze, replicated
from torchcam._tensors import is_finite
from torchcam.layers import TargetLayer
from torchcam.methods import CAM, KPCACAM, EigenSmoothedCAM, FinerCAM, GradCAMpp, RandomCAM, RefineCAM, ShapleyCAM
from torchcam.methods._running import quietly
from torchcam.methods.core import _CAM
from torchcam.methods.gradient import _GradientCAM
from torchcam.targets import as_class_indices

from ._browser import write_page
from ._formats import Run, write_files, write_onnx, write_package, write_program
from ._preprocessing import read_preprocessing
from ._proof import Case, check, make_cases
from ._trace import ExplainedModel, Question, check_torch, trace

# What can be exported: methods whose evidence is what one pass left behind, and whose formulas are traced.
_EVIDENCE = {method._evidence for method in (_CAM, _GradientCAM, CAM, GradCAMpp, ShapleyCAM)}
_MAPS = {method._raw_maps for method in (_CAM, EigenSmoothedCAM, FinerCAM, RefineCAM)}
_NOT_TRACED = (KPCACAM, RandomCAM)  # eigenvalues of both signs, random numbers


def _is_exportable(kind: type[Any]) -> bool:
    traced = issubclass(kind, _CAM) and not issubclass(kind, _NOT_TRACED) and kind._get_weights is _CAM._get_weights
    return traced and kind._raw_maps in _MAPS and kind._evidence in _EVIDENCE


EXPORTABLE = sorted(name for name in method_names() if _is_exportable(find_method(name)))


class Exported:
    """A model and the maps of a method as one graph. Returned by :func:`export`.

    Called with images (N, C, *spatial) and, where classes are an input, the class of each (N,), it returns the scores
    of the model and the maps (N, *grid) in float32 (float64 for a model in float64). The map of a sample that is not
    finite is NaN.

    Attributes:
        program: the graph, as ``torch.export`` has it
        metadata: what is in the files: method, layers, names of classes, preprocessing, versions
        error: the largest error of a map, of the graph and of files so far, as a share of the largest contribution
    """

    def __init__(self, program: ExportedProgram, metadata: Mapping[str, Any], cases: Sequence[Case]) -> None:
        self.program = program
        self.metadata = dict(metadata)
        self._cases = list(cases)
        self._run: Run = program.module()
        self.error = check(self._run, self._cases, "the graph")

    def __call__(self, images: Tensor, classes: Any = None) -> tuple[Tensor, Tensor]:
        """Run the graph in PyTorch.

        Args:
            images: the images, (N, C, *spatial)
            classes: the class of each image, or one for all, where classes are an input

        Returns:
            the scores of the model, and the maps (N, *grid)

        Raises:
            ValueError: if classes are missing, are no input, or do not exist
        """
        if self.metadata["classes"] != "input":
            if classes is not None:
                raise ValueError(f"`classes` are no input of this graph: it explains {self.metadata['classes']}")
            return self._run(images)
        if classes is None:
            raise ValueError("`classes` is missing: name the class of each image")
        return self._run(
            images, as_class_indices(classes, len(images), self.metadata["num_classes"], images.device).contiguous()
        )

    def save(self, path: str | os.PathLike[str], *, runtime: str | os.PathLike[str] | None = None) -> Path:
        """Write the graph to a file, in the format that its suffix names, once what the file computes is proven.

        ====================  ====================================================================================
        ``.onnx``             for ONNX Runtime and whatever else reads ONNX; weights above 2 GB go to a file beside it
        ``.pt2``              for ``torch.export.load``
        ``.aoti.pt2``         compiled for this kind of machine, for C++ and ``torch._inductor.aoti_load_package``
        ``.html``             one page that runs the model in a browser; needs ``runtime``
        ====================  ====================================================================================

        Args:
            path: where to write
            runtime: for a page, the folder of the npm package ``onnxruntime-web``, whose script and binary go into it

        Returns:
            the path

        Raises:
            ImportError: if the extra ``export`` is not installed, for ``.onnx`` and ``.html``
            FileNotFoundError: if ``runtime`` does not hold the package
            RuntimeError: if an operation has no translation
            ValueError: if the suffix is unknown, or the file does not compute what the extractor does
        """
        path = Path(path)
        name = path.name.lower()
        writers: dict[str, Callable[[Path], Run]] = {
            ".onnx": partial(write_onnx, self.program, self.metadata),
            ".aoti.pt2": partial(write_package, self.program, self.metadata, self._cases[1].arguments),
            ".pt2": partial(write_program, self.program, self.metadata),
            ".html": partial(write_page, self.program, self.metadata, Path(runtime or "")),
        }
        suffix = next((suffix for suffix in writers if name.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(f"`path` '{path}' must end with one of {', '.join(writers)}")
        if suffix == ".html" and runtime is None:
            raise ValueError("a page needs `runtime`, the folder of the npm package onnxruntime-web")
        error = write_files(path, writers[suffix], partial(check, cases=self._cases, what=f"'{path.name}'"))
        self.error = max(self.error, error)
        return path

    def __repr__(self) -> str:
        about = self.metadata
        return f"Exported({about['method']} of {', '.join(about['target_layers'])} of {about['model']})"


def export(
    model: nn.Module,
    method: type[Any] | str = "GradCAM",
    target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
    *,
    example: Tensor,
    method_kwargs: Mapping[str, Any] | None = None,
    relu: bool | Literal["negative"] | None = None,
    normalized: bool = True,
    top_class: bool = False,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    transform: Any = None,
    class_names: Sequence[str] | None = None,
) -> Exported:
    """Trace a model and the maps of a method, forward and backward pass, into one graph.

    The graph computes what the extractor computes, by the same pure functions. Before it is returned it is run beside
    the extractor: on one sample, on several, with other classes, with a sample that is not finite, and, where these are
    dynamic, on images of other sizes. The model is left as it was; the graph has a copy of its weights.

    Example:
        >>> from torchcam.demo import load_model, sample_images
        >>> batch = sample_images()[0].to_tensor()
        >>> exported = export(load_model(), "GradCAM", "layer4", example=batch)
        >>> scores, maps = exported(batch, 6)
        >>> scores.shape, maps.shape
        (torch.Size([1, 10]), torch.Size([1, 12, 12]))

    Args:
        model: the model, called with one tensor of images; exported in evaluation mode
        method: the method, or its name
        target_layer: the layer(s) to look at, by default the last one with positions; the maps of several are fused
        example: images (N, C, *spatial) that the model takes, on its device: the shape is traced, and the proof is run
            on them
        method_kwargs: arguments of the method, and options of its call such as ``eps``
        relu: what is kept of the evidence, as a call of the method takes it
        normalized: whether maps are scaled, as a call of the method does
        top_class: whether the class with the highest score is explained, in place of classes as an input
        dynamic_batch: whether the graph takes batches of any size; that of the example otherwise
        dynamic_size: whether the graph takes images of any size that the model takes
        transform: the transform that makes an input of an image, as of torchvision's weights or timm, for the metadata:
            its resizing, crop and normalisation; by default images are resized to those of the example and scaled to
            [0, 1]
        class_names: the names of the classes, for the metadata

    Returns:
        the graph, to call or to save

    Raises:
        NotImplementedError: if the method cannot be exported; the message lists those that can
        RuntimeError: if torch is too old, the model cannot be traced, or an operation has no translation
        TypeError: if an argument has the wrong type
        ValueError: if the model fixes a size that is to be dynamic, or the graph is not right
    """
    check_torch()
    torch_module("model", model)
    if not isinstance(example, Tensor):
        raise TypeError(f"`example` must be a tensor of images (N, C, *spatial), got {type(example).__name__}")
    if example.ndim < 3 or not example.is_floating_point() or not len(example):
        raise ValueError(f"`example` must be images (N, C, *spatial), got {example.dtype} of {tuple(example.shape)}")
    names = as_class_names(class_names)
    try:
        preprocessing = read_preprocessing(transform, example.shape[1:])
    except ValueError as error:  # a page has to follow it, other files do not
        preprocessing = {"unknown": str(error)}
    (recipe,) = as_recipes(method, target_layer, method_kwargs, relu)
    _check_method(recipe.method)
    options = dict(recipe.call_options)
    kept = options.pop("relu", None)
    example = example.detach()
    with replicated(model) as replica:
        freeze(replica, Tensor.clone)
        with extractors_on(replica, model, [recipe], tuple(example.shape[1:])) as (extractor,):
            for one in _bases(extractor):
                _check_method(type(one))
                if one.gradients == "balanced":
                    raise NotImplementedError("`gradients='balanced'` cannot be exported: leave it out for plain ones")
            class_input = not (top_class or extractor.class_agnostic)
            question = Question(extractor, options, kept, normalized, class_input)
            cases = make_cases(question, example, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
            layouts = extractor._recorder.find().layouts
            _check_size(layouts, dynamic_size)
            extractor.remove_hooks()
            for one in _bases(extractor):
                one._default = None  # the layer was chosen, and looked at, in the proof's passes
            breaks = not bool(is_finite(cases[2].cam)[-1])
            explained = ExplainedModel(question, layouts, checks_input=breaks)
            images = example[:1].expand(2, *example.shape[1:]) if dynamic_batch else example
            with quietly():
                program = trace(explained, images, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
            metadata = {
                "torchcam": __version__,
                "torch": torch.__version__,
                "model": type(model).__name__,
                "method": recipe.method.__name__,
                "options": recipe.plain_options,
                "target_layers": extractor.target_names,
                "classes": "input"
                if class_input
                else "the same for every class"
                if not top_class
                else "the highest score",
                "num_classes": cases[0].scores.shape[1] if cases[0].scores.ndim > 1 else 1,
                "class_names": None if names is None else list(names),
                "normalized": normalized,
                "preprocessing": preprocessing,
                "input": {
                    "shape": list(example.shape[1:]),
                    "dtype": str(example.dtype).removeprefix("torch."),
                    "dynamic_batch": dynamic_batch,
                    "dynamic_size": dynamic_size,
                },
            }
    return Exported(program, metadata, cases)


def _check_method(kind: type[Any]) -> None:
    """Raise a ``NotImplementedError`` if the maps are not a function of what one pass left behind."""
    if not _is_exportable(kind):
        raise NotImplementedError(
            f"{kind.__name__} cannot be exported: its maps are not a function of the activations and gradients of one "
            f"pass that other runtimes can compute. These can be: {', '.join(EXPORTABLE)}"
        )


def _bases(extractor: Any) -> Iterator[Any]:
    """Yield an extractor and those that it asks, one after the other."""
    while extractor is not None:
        yield extractor
        extractor = getattr(extractor, "base_cam", None)


def _check_size(layouts: Mapping[str, Any], dynamic_size: bool) -> None:
    """Raise a ``ValueError`` if images of any size are wanted, but tokens of a layer form a grid of one size."""
    for name, layout in layouts.items():
        if dynamic_size and len(layout.positions) < len(layout.grid):
            raise ValueError(
                f"`dynamic_size`: the output of '{name}' is a row of tokens, whose grid fits images of one size: "
                "leave it out"
            )
