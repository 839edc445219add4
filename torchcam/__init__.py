"""Class activation maps for PyTorch: which regions of an input made a model's score.

The submodules load at first use, so that `import torchcam` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchcam import (
        demo,
        evaluation,
        explain,
        integrations,
        layers,
        layout,
        methods,
        metrics,
        monitor,
        targets,
        trust,
        utils,
    )
    from torchcam.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "demo",
    "evaluate",
    "evaluation",
    "explain",
    "integrations",
    "layers",
    "layout",
    "methods",
    "metrics",
    "monitor",
    "targets",
    "trust",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # the one function that is at home here
        return import_module(f"{__name__}.evaluation").evaluate
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
