"""Numbers and results as JSON, and what they were made with."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from typing import Any

from . import __version__


def finite(value: Any) -> Any:
    """Return nested plain values with every number that JSON lacks, NaN or infinite, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def to_json(value: Any) -> str:
    """Write nested plain values as JSON, NaN and infinity as null."""
    return json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and torchcam."""
    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchcam": __version__}
