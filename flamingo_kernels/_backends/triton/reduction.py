"""Adds partial results in float32 and in a fixed order: few parts one after the other, many in blocks.

Oracle: `partials.sum(0)`. Bytes: each partial sum read once, each total written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Choice, Config
from .launch import launch


@dataclass(frozen=True, kw_only=True)
class Columns(Config):
    block: int = 256


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(partials, total, parts, size, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    sums = tl.zeros([BLOCK], tl.float32)
    at = partials + columns
    for _ in range(parts):
        sums += tl.load(at, mask=inside, other=0.0)
        at += size
    tl.store(total + columns, sums.to(total.dtype.element_ty), mask=inside)


CHOICE = Choice.of(Columns(num_stages=4), key=())


def add_in_order(partials: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`partials[0] + partials[1] + ...` of contiguous float32 partials, rounded once to `dtype`."""
    total = partials.new_empty(partials.shape[1:], dtype=dtype or partials.dtype)
    size = total.numel()
    launch(
        _sum_kernel, lambda c: triton.cdiv(size, c.block), CHOICE, partials, total, partials.shape[0], size
    )
    return total


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    parts: int = 64
    block: int = 32


@triton.jit(do_not_specialize=["parts"])
def _sum_many_kernel(partials, total, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS).to(tl.int64)
        inside = (part < parts)[:, None] & (columns < size)[None, :]
        sums += tl.load(partials + part[:, None] * size + columns[None, :], mask=inside, other=0.0)
    tl.store(total + columns, tl.sum(sums, 0), mask=columns < size)


MANY = Choice.of(Tile(), key=())


def add_many_in_order(partials: Tensor) -> Tensor:
    """The sum of many parts of few numbers each: so many are read at once that latency does not add up."""
    total = partials.new_empty(partials.shape[1:])
    size = total.numel()
    launch(
        _sum_many_kernel, lambda c: triton.cdiv(size, c.block), MANY, partials, total, partials.shape[0], size
    )
    return total
