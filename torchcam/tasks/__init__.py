"""Questions beyond one class: why this box."""

__all__: list[str] = []
