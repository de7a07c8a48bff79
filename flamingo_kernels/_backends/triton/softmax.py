"""The softmax of the attention kernels.

`stats` make the weights of rows anew, each contiguous `[batch, H, length]`: row_max, the score of the
heaviest key, not scaled but of the scale's sign; row_sum, the sum of the weights relative to that key's; and
delta in a backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .language import dot, power_of_two

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum starts with it: from -inf, -inf is NaN


@triton.jit
def row_index(batch, rows, head, length, H):
    """The place of each row in contiguous `[batch, H, length]`."""
    return (batch * H + head) * length + rows


@triton.jit
def load_softmax(stats, batch, rows, head, mask, length, H, sign):  # row_max, row_sum
    """The maximum as `scores` turns it; rows that are masked out have 0 and 1."""
    index = row_index(batch, rows, head, length, H)
    row_max = tl.load(stats[0] + index, mask=mask, other=0.0) * sign
    return row_max, tl.load(stats[1] + index, mask=mask, other=1.0)


@triton.jit
def store_softmax(stats, batch, rows, head, row_max, row_sum, length, H, sign):
    index = row_index(batch, rows, head, length, H)
    tl.store(stats[0] + index, row_max * sign, mask=rows < length)
    tl.store(stats[1] + index, row_sum, mask=rows < length)


@triton.jit
def load_stats(stats, batch, rows, head, mask, length, H, sign):  # row_max, row_sum, delta
    row_max, row_sum = load_softmax(stats, batch, rows, head, mask, length, H, sign)
    index = row_index(batch, rows, head, length, H)
    return row_max, row_sum, tl.load(stats[2] + index, mask=mask, other=0.0)


@triton.jit
def store_delta(stats, batch, rows, head, delta, length, H):
    tl.store(stats[2] + row_index(batch, rows, head, length, H), delta, mask=rows < length)


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
def empty_softmax(ROWS: tl.constexpr, D: tl.constexpr):  # acc [ROWS, BLOCK_D], row_max, row_sum [ROWS]
    """The online softmax of rows that have seen no key yet."""
    acc = tl.zeros([ROWS, power_of_two(D)], tl.float32)
    return acc, tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)


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
def is_saturated(seen, row_sum):
    """Rows in which one key weighs more than all others: in `row_sum` the heaviest weighs 1."""
    return seen & (row_sum < 2)
