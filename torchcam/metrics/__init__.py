"""Metrics of maps over a data set: faithfulness, localisation, stability and sanity checks."""

from .coherency import ADCC, ARCC
from .faithfulness import ROAD, ClassificationMetric, DeletionInsertionMetric
from .localization import Localization
from .sanity import SanityCheck
from .sensitivity import Sensitivity

__all__ = [
    "ADCC",
    "ARCC",
    "ROAD",
    "ClassificationMetric",
    "DeletionInsertionMetric",
    "Localization",
    "SanityCheck",
    "Sensitivity",
]
