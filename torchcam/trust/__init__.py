"""Trust reports: trials of the maps of one prediction or of several, and in words whether to believe them."""

from torchcam._callable import make_callable

from ._report import PredictionTrust, TrustReport
from ._trials import trust
from ._verdicts import THRESHOLDS, Check

__all__ = ["THRESHOLDS", "Check", "PredictionTrust", "TrustReport", "trust"]

make_callable(__name__)
