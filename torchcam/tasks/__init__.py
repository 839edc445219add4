"""Questions beyond one class: which part of the image fits a text, and why a model answers with a word."""

__all__: list[str] = []
