"""Class activation maps for PyTorch: which regions of an input made a model's score.

All names load at first use, so that `import torchcam` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from torchcam import (
        app,
        demo,
        evaluation,
        export,
        integrations,
        layers,
        layout,
        methods,
        metrics,
        monitor,
        targets,
        tasks,
        utils,
    )
    from torchcam.evaluation import evaluate
    from torchcam.explain import ExplainFunction
    from torchcam.methods import *
    from torchcam.tasks.answers import explain_answer
    from torchcam.trust import trust as _trust
    from torchcam.utils import overlay_map, overlay_mask

    # A type checker knows no modules that can be called; it sees objects with the function as a call and an attribute.
    class _ExplainModule(ModuleType):
        __call__: ExplainFunction
        explain: ExplainFunction

    class _TrustModule(ModuleType):
        __call__ = staticmethod(_trust)
        trust = staticmethod(_trust)

    explain: _ExplainModule
    trust: _TrustModule

__version__ = "0.1.0"

_FUNCTIONS = {  # and their modules
    "evaluate": "evaluation",
    "explain_answer": "tasks.answers",
    "overlay_map": "utils",
    "overlay_mask": "utils",
}

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "KPCACAM",
    "SESS",
    "SSCAM",
    "AblationCAM",
    "AttentionRollout",
    "AugmentedCAM",
    "DeepFeatureFactorization",
    "EigenCAM",
    "EigenGradCAM",
    "EigenSmoothedCAM",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMpp",
    "GroupCAM",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "LayerCAM",
    "LeGrad",
    "MeanActivation",
    "RandomCAM",
    "ReciproCAM",
    "RefineCAM",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "SmoothGradCAMpp",
    "TransformerAttribution",
    "XGradCAM",
    "__version__",
    "app",
    "demo",
    "evaluate",
    "evaluation",
    "explain",
    "explain_answer",
    "export",
    "integrations",
    "layers",
    "layout",
    "methods",
    "metrics",
    "monitor",
    "overlay_map",
    "overlay_mask",
    "targets",
    "tasks",
    "trust",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.islower() and name not in _FUNCTIONS:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_FUNCTIONS.get(name, 'methods')}"), name)


def __dir__() -> list[str]:
    return list(__all__)
