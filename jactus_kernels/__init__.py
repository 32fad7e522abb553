"""Operators for low-rank layers and their calibration: tensors only, no layers, no models."""

from . import reference
from .errors import JactusError
from .ops import core_linear, covariance_update_, folded_linear, wide_product
from .pivots import narrow, widen
from .policy import explain
from .ranks import pad_rank, padded_rank
from .reference import symmetrize_
from .settings import use

__all__ = [
    "JactusError",
    "core_linear",
    "covariance_update_",
    "explain",
    "folded_linear",
    "narrow",
    "pad_rank",
    "padded_rank",
    "reference",
    "symmetrize_",
    "use",
    "wide_product",
    "widen",
]
