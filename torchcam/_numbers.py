"""Numbers and results as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite", "to_json"]


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
