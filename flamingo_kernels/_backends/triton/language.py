"""Device functions that Triton's own language lacks, or has with other numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import env
from . import config

INTERPRET = tl.constexpr(env.INTERPRET)

power_of_two = triton.constexpr_function(config.power_of_two)


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
def row_dot(a, b):  # [rows]
    """`rowsum(a * b)`, in double for float32: what is left of it after a subtraction must still be right."""
    if a.dtype == tl.float32:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), 1).to(tl.float32)
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
