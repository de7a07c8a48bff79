"""Device functions that the kernels share.

Attention tiles are `[rows, COLUMNS]` blocks of a matrix with a unit stride along its columns. COLUMNS is the
power of two that holds D; what lies beyond D, and rows that are masked out, read as 0. Batch and head are
64-bit numbers, for offsets past 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import env

INTERPRET = tl.constexpr(env.INTERPRET)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum starts with it: from -inf, -inf is NaN


@triton.jit
def load_tile(base, rows, stride, mask, D: tl.constexpr, COLUMNS: tl.constexpr):  # [rows, COLUMNS]
    columns = tl.arange(0, COLUMNS)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=mask[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, stride, tile, mask, D: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask[:, None] & (columns < D)[None, :])


@triton.jit
def head_of(tensor, strides, batch, head):
    """Where a head begins in `[batch, rows, heads, d]` with any strides."""
    return tensor + batch * strides[0] + head * strides[2]


@triton.jit
def load_head(tensor, strides, batch, rows, head, mask, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head from `[batch, rows, heads, d]` with any strides."""
    return load_tile(head_of(tensor, strides, batch, head), rows, strides[1], mask, D, COLUMNS)


@triton.jit
def load_rows(tensor, batch, rows, head, mask, length, H, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head from contiguous `[batch, length, H, d]`."""
    return load_tile(tensor + (batch * length * H + head) * D, rows, H * D, mask, D, COLUMNS)


@triton.jit
def store_rows(tensor, batch, rows, head, tile, mask, length, H, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head to contiguous `[batch, length, H, d]`."""
    store_tile(tensor + (batch * length * H + head) * D, rows, H * D, tile, mask, D, COLUMNS)


@triton.jit
def row_of(batch, rows, head, length, H):
    """Where the one number that a row has lies in `[batch, H, length]`."""
    return (batch * H + head) * length + rows


@triton.jit
def load_softmax(softmax_max, softmax_sum, batch, rows, head, mask, length, H, SIGN: tl.constexpr):
    """The highest score of each row, turned by SIGN, and the sum of its weights; 0 and 1 where masked out."""
    at = row_of(batch, rows, head, length, H)
    highest = tl.load(softmax_max + at, mask=mask, other=0.0) * SIGN
    return highest, tl.load(softmax_sum + at, mask=mask, other=1.0)


@triton.jit
def store_softmax(softmax_max, softmax_sum, batch, rows, head, highest, total, length, H, SIGN: tl.constexpr):
    at = row_of(batch, rows, head, length, H)
    tl.store(softmax_max + at, highest * SIGN, mask=rows < length)
    tl.store(softmax_sum + at, total, mask=rows < length)


@triton.jit
def power_below(scores, highest, base2_scale):
    """The weights `2 ** (base2_scale * (scores - highest))`. Scores are scaled after the subtraction, so that
    the highest weighs exactly 1, however large it is.
    """
    return tl.exp2((scores - highest) * base2_scale)


@triton.jit
def kept_weights(scores, highest, base2_scale):
    """The weights of a row whose highest score was kept. A score above it, as the forward pass has summed in
    another order, counts as the highest.
    """
    below = tl.minimum(scores - highest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(below * base2_scale)


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
def tanh_slope(a):
    """`1 - tanh(a) ** 2`, without the cancellation where tanh is near 1."""
    t = tl.exp(-2 * tl.abs(a))
    return 4 * t / ((1 + t) * (1 + t))


@triton.jit
def wide(index):
    """An index in 64 bits, for offsets past 2^31."""
    return tl.cast(index, tl.int64)


@triton.jit
def is_saturated(seen, total):
    """Rows in which one key weighs more than all others: `total` is relative to the weight of the highest."""
    return seen & (total < 2)


@triton.jit
def row_dot(a, b):  # [rows]
    """`rowsum(a * b)`, in double for float32: what is left of it after a subtraction must still be right."""
    if a.dtype == tl.float32:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), 1).to(tl.float32)
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
