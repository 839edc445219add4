"""Explanations that leave Python: a model and its maps as one graph, for ONNX Runtime, a browser or C++."""

from ._exported import Exported, export

__all__ = ["Exported", "export"]
