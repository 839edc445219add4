"""More passes than the recorded one: batch after batch, and to find out why a map is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcam._passes import model_device
from torchcam._tensors import map_tensors
from torchcam.targets import ClassIndex, OutputTarget, class_scores

from ._diagnose import Diagnosis, diagnose
from ._replicas import on_replica


class Repeats:
    """What an extractor does with more passes than the recorded one."""

    def stream(
        self: Any,
        batches: Iterable[Any],
        class_idx: ClassIndex | Callable[[Any], ClassIndex] | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> Iterator[list[Tensor]]:
        """Run the model on batches, in evaluation mode and without gradients, and yield the maps of each.

        Nothing of a batch is kept when the next one is asked for: memory stays the same over any number of them. A pass
        that was recorded before is still there afterwards.

        Example:
            >>> from torchcam.methods import GradCAM
            >>> from torchvision.models import resnet18
            >>> model = resnet18().eval()
            >>> loader = [torch.rand(2, 3, 64, 64) for _ in range(3)]
            >>> with GradCAM(model, "layer4") as extractor:
            ...     peaks = [cam.flatten(1).argmax(1) for (cam,) in extractor.stream(loader)]
            >>> len(peaks)
            3

        Args:
            batches: the model's inputs, say a ``DataLoader``: a tensor each, a tuple or list that begins with it (the
                rest is not looked at), or a mapping of the model's keyword arguments (but for ``label`` and
                ``labels``); moved to the model's device
            class_idx: the class to explain, as a call takes it, or a function from the model's output to that; by
                default the one with the highest score of each sample
            targets: in place of ``class_idx``, what a call takes
            kwargs: what else a call takes

        Yields:
            the maps of each batch, as a call returns them

        Raises:
            ValueError: if both ``class_idx`` and ``targets`` are given, and for what a call raises it
        """
        if class_idx is not None and targets is not None:
            raise ValueError("give `class_idx` or `targets`, not both")
        device = model_device(self.model)
        for batch in batches:
            args, options = batch_arguments(batch, device)
            with on_replica(self) as watching:
                with torch.inference_mode():
                    output = watching.model(*args, **options)
                    asked = _asked(self, class_idx, targets, output)
                maps = watching(scores=output, **asked, **kwargs)
            del args, options, output, asked, watching, batch  # nothing of a batch stays while its maps are looked at
            yield maps
            del maps

    def diagnose(
        self,
        class_idx: ClassIndex | None = None,
        *,
        targets: OutputTarget | Sequence[OutputTarget] | None = None,
    ) -> Diagnosis:
        """Find out why a map is blank, constant, NaN, inverted, the same for every class or too coarse.

        The recorded pass is repeated in evaluation mode, and left as it was.

        Args:
            class_idx: the class whose map is wrong, for the whole batch or one per sample; by default the one with the
                highest score
            targets: in place of ``class_idx``, a callable (or one per sample) from one sample's output to a scalar

        Returns:
            the findings, each with what to do: a sequence that prints as a report, empty if nothing wrong was found

        Raises:
            TypeError: if an argument has the wrong type
            ValueError: if a class does not exist, there are several per sample, or both arguments are given
        """
        return diagnose(self, class_idx, targets=targets)


def batch_arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the model is called with: of a tuple or list, as loaders of data sets give, the first entry."""
    args: tuple[Any, ...] = (batch,)
    options: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        args, options = (), {key: value for key, value in batch.items() if key not in {"label", "labels"}}
    elif isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("`batches` holds an empty batch: each is the model's input, or begins with it")
        args = (batch[0],)
    moved: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors(
        lambda t: t.to(device, non_blocking=True), (args, options)
    )
    return moved


def _asked(extractor: Any, class_idx: Any, targets: Any, output: Any) -> dict[str, Any]:
    if targets is not None:
        return {"targets": targets}
    if class_idx is None:
        return {} if getattr(extractor, "class_agnostic", False) else {"class_idx": class_scores(output).argmax(1)}
    return {"class_idx": class_idx(output) if callable(class_idx) else class_idx}
