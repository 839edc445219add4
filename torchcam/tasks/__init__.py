"""Questions beyond one class: which part of the image fits a text, and why a box is there."""

__all__: list[str] = []
