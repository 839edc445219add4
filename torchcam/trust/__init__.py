"""Trust reports: trials of the maps of one prediction or of several, and in words whether to believe them."""

from torchcam._callable import make_callable

from ._report import PredictionTrust, TrustReport
from ._trials import trust
from ._verdicts import RELIABILITY, THRESHOLDS, Check, Reliability

__all__ = ["RELIABILITY", "THRESHOLDS", "Check", "PredictionTrust", "Reliability", "TrustReport", "trust"]

make_callable(__name__)
