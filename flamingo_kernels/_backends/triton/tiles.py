"""Loads and stores of the attention kernels.

A tile is `[rows, BLOCK_D]`: rows of one head, whose elements lie side by side. BLOCK_D is the power of two
that holds D; what lies beyond D, and rows that are masked out, read as 0. A batch is a 64-bit number, for
offsets past 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import power_of_two, wide


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
    return ptr + batch * strides[0] + wide(head) * strides[2]


@triton.jit
def load_head(ptr, strides, batch, rows, head, mask, D: tl.constexpr):  # [rows, BLOCK_D]
    """Rows of a head from `[batch, rows, heads, d]` with any strides."""
    return load_tile(head_ptr(ptr, strides, batch, head), rows, strides[1], mask, D)


@triton.jit
def load_q_and_dout(inputs, strides, batch, rows, head, mask, D: tl.constexpr):  # [rows, BLOCK_D] each
    """Rows of a head from q and dout, the first and the last of a backward kernel's inputs."""
    q = load_head(inputs[0], strides[0], batch, rows, head, mask, D)
    return q, load_head(inputs[3], strides[3], batch, rows, head, mask, D)


@triton.jit
def load_rows(ptr, batch, rows, head, mask, length, H, D: tl.constexpr):  # [rows, BLOCK_D]
    """Rows of a head from contiguous `[batch, length, H, d]`."""
    return load_tile(ptr + (batch * length * H + head) * D, rows, H * D, mask, D)


@triton.jit
def store_rows(ptr, batch, rows, head, tile, mask, length, H, D: tl.constexpr):
    """Rows of a head to contiguous `[batch, length, H, d]`."""
    store_tile(ptr + (batch * length * H + head) * D, rows, H * D, tile, mask, D)
