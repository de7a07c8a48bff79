"""Adds partial results in float32 and in a fixed order: few of them one after the other, many in blocks.

Oracle: `partials.sum(0)`. Bytes: every partial result read once, every sum written once. FLOPs: 1 a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Choice, Config
from .launch import launch


@dataclass(frozen=True, kw_only=True)
class Columns(Config):
    """A program takes `block_d` columns."""

    block_d: int = 256


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(partials_ptr, out_ptr, count, D, BLOCK_D: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    ptrs = partials_ptr + columns
    for _ in range(count):
        acc += tl.load(ptrs, mask=inside, other=0.0)
        ptrs += D
    tl.store(out_ptr + columns, acc.to(out_ptr.dtype.element_ty), mask=inside)


FEW = Choice.of(Columns(num_stages=4), key=())


def add_in_order(partials: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`partials[0] + partials[1] + ...` of contiguous float32 partials, rounded once to `dtype`."""
    return _launch(_sum_kernel, FEW, partials, dtype or partials.dtype)


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    """A program takes `block_n` partial results of `block_d` columns at a time."""

    block_n: int = 64
    block_d: int = 32


@triton.jit(do_not_specialize=["count"])
def _sum_many_kernel(partials_ptr, out_ptr, count, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = (rows < count)[:, None] & (columns < D)[None, :]
        acc += tl.load(partials_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + columns, tl.sum(acc, 0), mask=columns < D)


MANY = Choice.of(Tile(), key=())


def add_many_in_order(partials: Tensor) -> Tensor:
    """The sum of many partials of few numbers each: so many are read at once that latency does not add up."""
    return _launch(_sum_many_kernel, MANY, partials, partials.dtype)


def _launch(kernel: Any, choice: Choice[Any], partials: Tensor, dtype: torch.dtype) -> Tensor:
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    D = out.numel()
    launch(kernel, lambda config: triton.cdiv(D, config.block_d), choice, partials, out, len(partials), D)
    return out
