"""Device functions that the kernels share.

A tile of attention is `[rows, BLOCK_D]`: rows of one head, whose elements lie side by side. BLOCK_D is the
power of two that holds D; what lies beyond D, and rows that are masked out, read as 0. Batch and head are
64-bit numbers, for offsets past 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import env
from . import config

INTERPRET = tl.constexpr(env.INTERPRET)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum starts with it: from -inf, -inf is NaN

power_of_two = triton.constexpr_function(config.power_of_two)


@triton.jit
def load_tile(base_ptr, rows, stride, mask, D: tl.constexpr):  # [rows, BLOCK_D]
    columns = tl.arange(0, power_of_two(D))
    ptrs = base_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(ptrs, mask=mask[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(base_ptr, rows, stride, tile, mask, D: tl.constexpr):
    columns = tl.arange(0, power_of_two(D))
    ptrs = base_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask[:, None] & (columns < D)[None, :])


@triton.jit
def head_ptr(ptr, strides, batch, head):
    """Where a head begins in `[batch, rows, heads, d]` with any strides."""
    return ptr + batch * strides[0] + head * strides[2]


@triton.jit
def load_head(ptr, strides, batch, rows, head, mask, D: tl.constexpr):  # [rows, BLOCK_D]
    """Rows of a head from `[batch, rows, heads, d]` with any strides."""
    return load_tile(head_ptr(ptr, strides, batch, head), rows, strides[1], mask, D)


@triton.jit
def load_rows(ptr, batch, rows, head, mask, length, H, D: tl.constexpr):  # [rows, BLOCK_D]
    """Rows of a head from contiguous `[batch, length, H, d]`."""
    return load_tile(ptr + (batch * length * H + head) * D, rows, H * D, mask, D)


@triton.jit
def store_rows(ptr, batch, rows, head, tile, mask, length, H, D: tl.constexpr):
    """Rows of a head to contiguous `[batch, length, H, d]`."""
    store_tile(ptr + (batch * length * H + head) * D, rows, H * D, tile, mask, D)


@triton.jit
def row_index(batch, rows, head, length, H):
    """The place of each row in contiguous `[batch, H, length]`."""
    return (batch * H + head) * length + rows


@triton.jit
def load_softmax(row_max_ptr, row_sum_ptr, batch, rows, head, mask, length, H, sign):
    """The maximum of each row's scores, times the scale's sign, and the sum of its weights; else 0 and 1."""
    index = row_index(batch, rows, head, length, H)
    row_max = tl.load(row_max_ptr + index, mask=mask, other=0.0) * sign
    return row_max, tl.load(row_sum_ptr + index, mask=mask, other=1.0)


@triton.jit
def store_softmax(row_max_ptr, row_sum_ptr, batch, rows, head, row_max, row_sum, length, H, sign):
    index = row_index(batch, rows, head, length, H)
    tl.store(row_max_ptr + index, row_max * sign, mask=rows < length)
    tl.store(row_sum_ptr + index, row_sum, mask=rows < length)


@triton.jit
def scores(q, k, seen, sign, PRECISION: tl.constexpr):  # [rows of q, rows of k]
    """`q k^T`, not scaled yet, but turned so that the highest weighs the most; -inf where it is not seen."""
    return tl.where(seen, dot(q, tl.trans(k), PRECISION) * sign, float("-inf"))


@triton.jit
def scaled_exp2(s, row_max, scale_log2):
    """`2 ** (scale_log2 * (s - row_max))`: scaled after the subtraction, so that the highest score weighs
    exactly 1, however large it is.
    """
    return tl.exp2((s - row_max) * scale_log2)


@triton.jit
def scaled_exp2_saved(s, row_max, scale_log2):
    """The same with a maximum that the forward pass has saved. Its products may have been summed in another
    order, so a score may lie above it, and counts as the maximum.
    """
    below = tl.minimum(s - row_max, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(below * scale_log2)


@triton.jit
def online_softmax(acc, row_max, row_sum, s, v, here, scale_log2, PRECISION: tl.constexpr):
    """Takes a tile of keys, by its scores `[rows, keys]` and its values, into the online softmax of the rows
    that are `here`, or of all where that is None.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    if here is not None:
        new_max = tl.where(here, new_max, row_max)
    alpha = scaled_exp2(row_max, new_max, scale_log2)
    p = scaled_exp2(s, new_max[:, None], scale_log2)
    new_acc = acc * alpha[:, None] + dot(p.to(v.dtype), v, PRECISION)
    new_sum = row_sum * alpha + tl.sum(p, 1)
    if here is not None:
        new_acc = tl.where(here[:, None], new_acc, acc)
        new_sum = tl.where(here, new_sum, row_sum)
    return new_acc, new_max, new_sum


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32. The interpreter sums as numpy does, which depends on the processor and on the shape
    of a tile, and has no product of bfloat16: in float64 every kernel gets the same numbers, as on a GPU.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tanh(a):
    """Accurate near 0 too, where `1 - exp(-2a)` would cancel."""
    t = tl.exp(-2 * tl.abs(a))
    far = (1 - t) / (1 + t)
    far = tl.where(a < 0, -far, far)
    s = a * a  # the continued fraction of tanh, cut where it is exact to float32 for |a| < 0.6
    near = a * (10395 + s * (1260 + s * 21)) / (10395 + s * (4725 + s * (210 + s)))
    return tl.where(tl.abs(a) < 0.6, near, far)


@triton.jit
def dtanh(a):
    """The derivative `1 - tanh(a) ** 2`, without the cancellation where tanh is near 1."""
    t = tl.exp(-2 * tl.abs(a))
    return 4 * t / ((1 + t) * (1 + t))


@triton.jit
def wide(index):
    """An index in 64 bits, for offsets past 2^31."""
    return tl.cast(index, tl.int64)


@triton.jit
def is_saturated(seen, row_sum):
    """Rows in which one key weighs more than all others: in `row_sum` the heaviest weighs 1."""
    return seen & (row_sum < 2)


@triton.jit
def row_dot(a, b):  # [rows]
    """`rowsum(a * b)`, in double for float32: what is left of it after a subtraction must still be right."""
    if a.dtype == tl.float32:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), 1).to(tl.float32)
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
