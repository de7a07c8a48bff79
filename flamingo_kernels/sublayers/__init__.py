"""The two sublayers of a gated cross-attention block, each as one node of autograd.

cross_attention   norm, queries, masked attention, output projection, gate and residual
feed_forward      norm, hidden layer, activation, output layer, gate and residual
normed_linear     a norm and the projections that read it: the beginning of both
gated_linear      a projection with a gate and a residual: the end of both
norm              LayerNorm and RMSNorm
activation        functions of a hidden layer
gradients         gradients by name, and in the order of autograd
scratch           memory for tensors that live within one call
arguments         modules as arguments of the sublayers
reference         the same sublayers, operation by operation
"""

from ..ops.weights import Linear, Norm
from .cross_attention import gated_cross_attention
from .feed_forward import gated_feed_forward

__all__ = ["Linear", "Norm", "gated_cross_attention", "gated_feed_forward"]
