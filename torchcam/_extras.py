"""How to install what a part of the package needs."""

from __future__ import annotations


def extra(name: str) -> str:
    """Return the command that installs an extra. The name "torchcam" of the package index is another project's."""
    return f'pip install -e ".[{name}]" in a clone of torchcam'
