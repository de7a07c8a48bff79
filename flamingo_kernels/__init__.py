"""Flamingo's attention, gates and resampler, fast: operators, drop-in layers and a one-line swap."""

from ._dispatch import UnsupportedError, available_backends, use_backend
from .mask import MediaMask
from .ops import gated_residual, gated_residual_norm, masked_cross_attention, perceiver_attention

__version__ = "0.1.0"

__all__ = [
    "MediaMask",
    "UnsupportedError",
    "available_backends",
    "gated_residual",
    "gated_residual_norm",
    "masked_cross_attention",
    "perceiver_attention",
    "use_backend",
]
