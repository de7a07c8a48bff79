"""The operation of a block's decoding step, for inference alone, and the shape that it returns."""

from __future__ import annotations

from ..._backends.library import define, fresh, shapes_of

# `activation` is a place in `weights.ACTIVATIONS`.
STEP = define(
    "gated_block_decode",
    "(Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor norm, "
    "Tensor? norm_bias, Tensor to_q, Tensor to_out, Tensor gate, Tensor ff_norm, Tensor? ff_norm_bias, "
    "Tensor up, Tensor down, Tensor ff_gate, int heads, float scale, float eps, int activation) -> Tensor",
    backends=("cuda",),
)


@shapes_of("gated_block_decode")
def _(x, *others):
    return fresh(x)
