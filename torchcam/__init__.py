"""Class activation maps for PyTorch: which regions of an input made a model's score.

The submodules load at first use, so that `import torchcam` alone costs nothing.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchcam import demo, explain, layers, layout, methods, metrics, targets, utils

__version__ = "0.1.0"

__all__ = ["__version__", "demo", "explain", "layers", "layout", "methods", "metrics", "targets", "utils"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
