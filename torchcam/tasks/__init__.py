"""Questions beyond one class: what fits a text, why a box is there, and why a model answers with a word."""

__all__: list[str] = []
