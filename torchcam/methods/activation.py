"""Methods that need no gradient: CAM, and by import those that score masked inputs or edited activations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchcam.layers import TargetLayer, layer_name
from torchcam.targets import read_logits

from .core import _CAM, Request
from .edited import AblationCAM, ReciproCAM
from .masked import ISCAM, SSCAM, GroupCAM, ScoreCAM
from .summary import FEM, MeanActivation, RandomCAM

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "SSCAM",
    "AblationCAM",
    "GroupCAM",
    "MeanActivation",
    "RandomCAM",
    "ReciproCAM",
    "ScoreCAM",
]

logger = logging.getLogger(__name__)


class CAM(_CAM):
    r"""Class activation map (Zhou et al. 2016, arXiv:1512.04150): channels weighted by the linear classifier.

    .. math::
        M = \sum_k W_{c,k} A_k

    For models whose target layer is followed by global average pooling and one linear layer. The weights are read
    when the map is computed, so a head that was trained, replaced, moved or cast meanwhile is the one that counts.

    Cost: the user's forward pass.

    Args:
        model: the model to explain
        target_layer: the layer before the pooling
        fc_layer: the linear (or 1 x 1 convolution) classifier, as a module or its name; by default the last linear
            layer of the model
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        kwargs: arguments of the base class

    Raises:
        TypeError: if ``fc_layer`` is neither a module nor a string
        ValueError: if there are several target layers, or no linear classifier can be found
    """

    _options = ("target_layer",)

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        fc_layer: TargetLayer | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if isinstance(target_layer, (list, tuple)) and len(target_layer) > 1:
            raise ValueError(
                f"`target_layer` of CAM must be one layer, the one before the pooling, got {len(target_layer)} of them"
            )
        self._is_named = fc_layer is not None
        if fc_layer is None:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            if not linear:
                raise ValueError(f"{type(model).__name__} has no linear layer: name its classifier as `fc_layer`")
            fc_layer = linear[-1]
            logger.warning("no value was provided for `fc_layer`, thus set to '%s'.", fc_layer)
        self.fc_name = layer_name(model, fc_layer, "fc_layer")
        weight = getattr(model.get_submodule(self.fc_name), "weight", None)
        self._channels = weight.shape[1] if isinstance(weight, Tensor) and weight.ndim > 1 else None
        super().__init__(model, target_layer, input_shape, **kwargs)

    @staticmethod
    def weights(activation: Tensor, classifier: Tensor, classes: Tensor) -> Tensor:
        """Return the rows of the classifier's weights (K, C) for the samples' classes (N,): (N, C)."""
        return classifier[classes].to(activation)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        if request.targets is not None or request.class_idx is None:
            raise ValueError("CAM reads the classifier's weights of a class: pass `class_idx`, not `targets`")
        (activation,) = self._activations(request)
        weight = getattr(self.model.get_submodule(self.fc_name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape[2:].numel() != 1 or weight.ndim < 2:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else None
            raise ValueError(f"`fc_layer` '{self.fc_name}' has weights of shape {found}, not (classes, channels)")
        if weight.shape[1] != activation.shape[1]:
            raise ValueError(
                f"`fc_layer` '{self.fc_name}' takes {weight.shape[1]} channels, but `target_layer` "
                f"'{self.target_names[0]}' has {activation.shape[1]}: CAM needs the layer before the pooling"
            )
        if not self._is_named:
            self._check_is_classifier(len(weight), request.recorded.output)
        classifier = weight.detach().flatten(1)
        classes = self._selector(request).indices(classifier.mT)
        return [(activation, -classifier if request.relu == "negative" else classifier, classes)]

    def _check_is_classifier(self, rows: int, output: Any) -> None:
        """Check that the last linear layer makes as many numbers as the model gives class scores."""
        scores = read_logits(output) if isinstance(output, (Tensor, Mapping)) else None
        if scores is not None and scores.ndim == 2 and scores.shape[1] != rows:
            raise ValueError(
                f"CAM reads a linear classifier, but '{self.fc_name}', the last linear layer of "
                f"{type(self.model).__name__}, makes {rows} numbers, and the model {scores.shape[1]} scores: name the "
                "classifier as `fc_layer`, or take GradCAM, which needs none"
            )
