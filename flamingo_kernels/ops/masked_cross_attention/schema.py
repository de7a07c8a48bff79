"""Operations of masked cross-attention, and the shapes that they return.

`softmax` is what makes every row's weights anew, `[2, B, H, T]`: the score of its heaviest key, not scaled
but of the scale's sign, and the sum of the weights relative to that key's. Their logarithm in one float would
round all weights of a row alike. It is empty where the backward pass makes the softmax anew.
"""

from __future__ import annotations

import torch

from ..._backends import cuda
from ..._backends.library import define, fresh, shapes_of
from .config import is_one_shot

FWD = define(
    "masked_cross_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, "
    "bool averages, float scale) -> (Tensor out, Tensor softmax)",
)
BWD = define(
    "masked_cross_attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, "
    "Tensor start, Tensor stop, bool immediate, bool averages, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
)


_PACKED_AT_ONCE = 256  # keys of a medium, by the C++ kernels; csrc/cpu/params.h says the same


def makes_anew(backend, immediate, k):
    """Whether the backward pass makes the softmax of k `[B, M, R, Hkv, d]` anew, so that none is kept."""
    if backend == "triton":
        return is_one_shot(immediate, k.shape[2], k.shape[-1], k.dtype)
    if backend == "cuda":
        return cuda.is_one_shot(immediate, k.shape[2], k.dtype)
    return immediate and k.shape[2] <= _PACKED_AT_ONCE


@shapes_of("masked_cross_attention_fwd", "cpu")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    return _forward(q, makes_anew("cpu", immediate, k))


@shapes_of("masked_cross_attention_fwd", "triton")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    return _forward(q, makes_anew("triton", immediate, k))


@shapes_of("masked_cross_attention_fwd", "cuda")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    return _forward(q, makes_anew("cuda", immediate, k))


def _forward(q, anew):
    """The output, and the softmax unless the backward pass makes it anew."""
    batch, length, heads, _ = q.shape
    return fresh(q), q.new_empty(2, batch, heads, 0 if anew else length, dtype=torch.float32)


@shapes_of("masked_cross_attention_bwd")
def _(dout, q, k, v, out, softmax, lo, hi, start, stop, immediate, averages, scale):
    return fresh(q), fresh(k), fresh(v)
