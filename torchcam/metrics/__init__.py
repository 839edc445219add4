"""Which explanation can be trusted: how faithful, how local and how stable maps are, over a whole data set."""

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
