"""The operation of a block's decoding step, for inference alone, and the shape that it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.library import define, shapes_of
from ..linear.schema import result_dtype
from .weights import TENSORS

# `weights` are those of `GatedBlockWeights.tensors`, and eps, rms and activation are its options.
FWD = define(
    "gated_block_decode_fwd",
    "(Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor[] weights, int heads, float scale, "
    "float[] eps, int[] rms, int activation) -> Tensor",
)


def dtypes(
    x: Tensor, k: Tensor, gate: Tensor | None, ff_gate: Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """Those of the residual stream behind the attention and behind the block; products have that of k."""
    z = x.new_empty(0, dtype=result_dtype(k, gate, x))
    return z.dtype, result_dtype(k, ff_gate, z)


@shapes_of("gated_block_decode_fwd")
def _(x, k, v, lo, hi, weights, *options):
    gates = (weights[TENSORS.index(name)] for name in ("gate", "ff_gate"))
    return x.new_empty(x.shape, dtype=dtypes(x, k, *(gate if gate.numel() else None for gate in gates))[1])
