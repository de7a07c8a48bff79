"""One folder an operator, the same files in each."""

from .gated_block_decode import GatedBlockWeights, gated_block_decode
from .gated_residual import gated_residual
from .linear import linear
from .masked_cross_attention import masked_cross_attention
from .perceiver_attention import perceiver_attention
from .weights import Linear, Norm

__all__ = [
    "GatedBlockWeights",
    "Linear",
    "Norm",
    "gated_block_decode",
    "gated_residual",
    "linear",
    "masked_cross_attention",
    "perceiver_attention",
]
