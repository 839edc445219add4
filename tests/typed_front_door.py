"""What a type checker sees of `torchcam`: checked by mypy, never run."""

from typing import assert_type

from PIL import Image
from torch import Tensor, nn

import torchcam
import torchcam.explain as explain_module
from torchcam import GradCAM, evaluate, methods, overlay_mask
from torchcam import explain as either
from torchcam.evaluation import Evaluation
from torchcam.explain import Explanations, PredictionExplanation, explain
from torchcam.trust import TrustReport, trust


def of_one_input(model: nn.Module, x: Tensor) -> None:
    assert_type(explain(model, x), PredictionExplanation)
    assert_type(either(model, x), PredictionExplanation)
    assert_type(either.explain(model, x), PredictionExplanation)
    assert_type(explain_module.explain(model, x), PredictionExplanation)
    assert_type(torchcam.explain(model, x, method="Grad-CAM++", top_k=2), PredictionExplanation)
    assert_type(torchcam.explain.explain(model, x), PredictionExplanation)
    assert_type(trust(model, x), TrustReport)
    assert_type(torchcam.trust(model, x, batch_size=5), TrustReport)
    assert_type(torchcam.trust.trust(model, x), TrustReport)


def of_several(model: nn.Module, x: Tensor) -> None:
    assert_type(explain(model, [x, x]), Explanations)
    assert_type(torchcam.explain(model, [x, x]), Explanations)
    assert_type(torchcam.explain.explain(model, [x, x]), Explanations)
    assert_type(torchcam.evaluate(model, [(x, x)], "GradCAM"), Evaluation)
    assert_type(evaluate(model, [(x, x)], [GradCAM]), Evaluation)


def of_methods(model: nn.Module, x: Tensor, picture: Image.Image) -> None:
    with torchcam.GradCAM(model, "layer4") as extractor:
        assert_type(extractor, GradCAM)
        assert_type(extractor(0, model(x)), list[Tensor])
    assert_type(methods.GradCAM(model), GradCAM)
    assert_type(overlay_mask(picture, picture), Image.Image)


def of_errors(model: nn.Module, x: Tensor) -> None:
    # The checker complains about a comment that hides no error, so each of these is an error.
    torchcam.explain(model, x, topk=2)  # type: ignore[call-overload]
    torchcam.explain(x, x)  # type: ignore[call-overload]
    torchcam.trust(x, x)  # type: ignore[arg-type]
