"""The two sublayers of a gated cross-attention block, each as one node of autograd.

cross_attention   norm, queries, masked attention, output projection, gate and residual
feed_forward      norm, hidden layer, activation, output layer, gate and residual
gated_linear      the projection that carries the gate, which both end with
norm              LayerNorm and RMSNorm
activation        what a hidden layer may apply
scratch           memory for what no one sees
reference         the same sublayers, operation by operation
"""

from .cross_attention import gated_cross_attention
from .feed_forward import gated_feed_forward
from .gated_linear import Linear
from .norm import Norm

__all__ = ["Linear", "Norm", "gated_cross_attention", "gated_feed_forward"]
