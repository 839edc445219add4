"""Evaluation of many methods by many metrics over a data set, in one table."""

from ._contestants import find_class
from ._result import Evaluation, MethodResult, check_format
from ._run import discard_checkpoint, evaluate

__all__ = ["Evaluation", "MethodResult", "check_format", "discard_checkpoint", "evaluate", "find_class"]
