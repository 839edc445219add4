"""Class activation map extractors, one class per method."""

from .activation import CAM, FEM, ISCAM, SSCAM, AblationCAM, GroupCAM, MeanActivation, RandomCAM, ReciproCAM, ScoreCAM
from .attention import AttentionRollout, LeGrad, TransformerAttribution
from .augmented import SESS, AugmentedCAM
from .composite import EigenSmoothedCAM, FinerCAM, RefineCAM
from .core import OutputTarget
from .decomposition import KPCACAM, DeepFeatureFactorization, EigenCAM, EigenGradCAM, SegEigenCAM
from .gradient import GradCAM, GradCAMElementWise, GradCAMpp, HiResCAM, LayerCAM, ShapleyCAM, SmoothGradCAMpp, XGradCAM
from .pixel import FullGrad, GuidedBackprop, GuidedGradCAM

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "KPCACAM",
    "SESS",
    "SSCAM",
    "AblationCAM",
    "AttentionRollout",
    "AugmentedCAM",
    "DeepFeatureFactorization",
    "EigenCAM",
    "EigenGradCAM",
    "EigenSmoothedCAM",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMpp",
    "GroupCAM",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "LayerCAM",
    "LeGrad",
    "MeanActivation",
    "OutputTarget",
    "RandomCAM",
    "ReciproCAM",
    "RefineCAM",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "SmoothGradCAMpp",
    "TransformerAttribution",
    "XGradCAM",
]
