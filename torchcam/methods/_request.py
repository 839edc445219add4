"""What is asked of a recorded pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchcam.targets import Selector

from ._recorder import Pass

__all__ = ["Request"]


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
        made = next((given for given in (self.class_idx, self.targets) if isinstance(given, Selector)), None)
        one = Selector(self.class_idx, self.targets, batch_size) if made is None else made
        return one.negative() if self.relu == "negative" else one
