"""Flamingo's attention, gates and resampler, fast: operators, drop-in layers and a one-line swap."""

import sys
from typing import TYPE_CHECKING, Any

if "flamingo_kernels" in sys.orig_argv or (sys.argv and sys.argv[0].endswith("flamingo-kernels")):
    import flamingo.starting  # noqa: F401  the command, for which Ctrl-C is a line from here on

from ._backends.dispatch import UnsupportedError, available_backends, use_backend
from .fold import FoldReport, fold, unfold
from .mask import MediaMask
from .media_cache import MediaCache
from .ops import (
    GatedBlockWeights,
    Linear,
    Norm,
    gated_block_decode,
    gated_residual,
    linear,
    masked_cross_attention,
    perceiver_attention,
)
from .patch import PatchReport, patch, unpatch
from .quantize import QuantizeReport, quantize, unquantize

if TYPE_CHECKING:
    from .layers import GatedCrossAttentionBlock, MaskedCrossAttention, PerceiverAttention, PerceiverResampler

__version__ = "0.1.0"

__all__ = [
    "FoldReport",
    "GatedBlockWeights",
    "GatedCrossAttentionBlock",
    "Linear",
    "MaskedCrossAttention",
    "MediaCache",
    "MediaMask",
    "Norm",
    "PatchReport",
    "PerceiverAttention",
    "PerceiverResampler",
    "QuantizeReport",
    "UnsupportedError",
    "available_backends",
    "fold",
    "gated_block_decode",
    "gated_residual",
    "linear",
    "masked_cross_attention",
    "patch",
    "perceiver_attention",
    "quantize",
    "unfold",
    "unpatch",
    "unquantize",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # The layers derive from `flamingo`, which needs more than torch: imported when first asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import layers

    return getattr(layers, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
