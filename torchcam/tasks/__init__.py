"""Questions beyond one class: which part of the image fits a text."""

__all__: list[str] = []
