"""Operators for low-rank layers and their calibration: tensors only, no layers, no models."""

from . import reference
from .errors import JactusError
from .ops import core_linear, covariance_update_, folded_linear
from .reference import symmetrize_

__all__ = [
    "JactusError",
    "core_linear",
    "covariance_update_",
    "folded_linear",
    "reference",
    "symmetrize_",
]
