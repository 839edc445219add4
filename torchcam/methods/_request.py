"""What is asked of a recorded pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcam._tensors import map_tensors, tensors_in
from torchcam.targets import Selector

from ._recorder import Pass
from ._repeated import is_repeated


@dataclass(slots=True)
class Request:
    """What is asked of a pass.

    Attributes:
        recorded: the pass
        class_idx: the class to explain, as it was given, or a selector that reads it
        scores: the output that was handed over, if it was
        targets: what is explained in place of a class, as it was given
        relu: whether the evidence for a score is kept (True), that against it (``"negative"``) or both (False); None
            for what the method does by itself
        create_graph: whether the maps can be differentiated
        retain_graph: whether the graph is kept for another backward pass
        num_classes: how many classes of each sample are explained at once
    """

    recorded: Pass
    class_idx: Any = None
    scores: Any = None
    targets: Any = None
    relu: bool | str | None = None
    create_graph: bool = False
    retain_graph: bool = False
    num_classes: int = 1

    def selector(self, batch_size: int) -> Selector:
        """Return the explained score, as a function of the model's output."""
        asked = self.class_idx if self.targets is None else self.targets
        one = asked if isinstance(asked, Selector) else Selector(self.class_idx, self.targets, batch_size)
        return one.negative() if self.relu == "negative" else one

    def attached(self) -> Any:
        """Return the output with its graph: the one handed over, or else the one of the recorded pass."""
        recorded, scores = self.recorded, self.scores
        if recorded.output is not None and (scores is None or recorded.has_returned(scores)):
            if recorded.private:
                recorded.check_output()
            return recorded.output
        if any(tensor.requires_grad for tensor in tensors_in(scores)):
            return scores
        if recorded.output is None:
            raise RuntimeError("no output of the model was recorded: call the model itself, or pass `scores`")
        self.check_recorded()
        return recorded.output

    def check_scores(self, batch_size: int, differentiated: bool) -> None:
        """Check that other scores than the recorded output are equal to it, or carry a graph that is differentiated."""
        scores = self.scores
        if isinstance(scores, Tensor) and scores.ndim and scores.shape[0] != batch_size:
            raise ValueError(
                f"`scores` has shape {tuple(scores.shape)}, but the recorded pass had a batch of {batch_size}"
            )
        if not (differentiated and any(tensor.requires_grad for tensor in tensors_in(scores))):
            self.check_recorded()

    def check_recorded(self) -> None:
        """Check that the scores that were handed over are the recorded output.

        Raises:
            RuntimeError: if they are not, and carry no graph to tell what they are
        """
        known = list(tensors_in(self.recorded.output))
        for tensor in tensors_in(self.scores):
            if any(tensor is returned() for returned in self.recorded.returned):
                continue
            if not any(tensor.shape == one.shape and _are_equal(tensor.to(one), one) for one in known):
                raise RuntimeError(
                    f"`scores` of shape {tuple(tensor.shape)} carry no graph and are not the output of the recorded "
                    "pass: pass that output as it came, leave `scores` out, or compute them with gradients on"
                )

    def check_repeated(self, score: Tensor | None, select: Selector) -> None:
        """Check that a second pass, with a graph from the input on, has given the recorded score.

        Raises:
            RuntimeError: if it has not, or could not be differentiated
        """
        recorded = self.recorded
        if score is None or not is_repeated(score, select(map_tensors(Tensor.detach, recorded.output))):
            raise RuntimeError(
                f"what {', '.join(recorded.names)} returned reaches the score on a way without gradients, and a second "
                "pass, in evaluation mode and with gradients, does not give the recorded score: run the forward pass "
                "with gradients on, on an input that requires them"
            )


def _are_equal(tensor: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(tensor, other, rtol=0, atol=0, equal_nan=other.is_floating_point()).all())
