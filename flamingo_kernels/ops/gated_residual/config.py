"""How the Triton kernels of the gated residual are launched: in tiles of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..._backends.triton.config import Choice, Config, power_of_two

_WIDEST = 1024


@dataclass(frozen=True, kw_only=True)
class Rows(Config):
    """A program takes `block_n` rows at a time."""

    block_n: int = 1


def block_d(columns: int) -> int:
    """The width of a tile."""
    return min(power_of_two(columns), _WIDEST)


@cache
def forward(columns: int, dtype: torch.dtype) -> Choice[Rows]:
    """So many rows that each thread has a few loads of 16 bytes under way."""
    tiles = ((8192, 4), (4096, 4), (16384, 8))
    return Choice.of(*(_tile(*tile, columns, dtype) for tile in tiles), key=(columns, str(dtype)))


@cache
def backward(columns: int, dtype: torch.dtype) -> Choice[Rows]:
    """Few programs, which therefore load the next tiles early."""
    tiles = ((8192, 8, 3), (8192, 8, 2), (8192, 8, 1), (16384, 8, 2), (16384, 8, 1))
    loops = (_tile(size, warps, columns, dtype, stages) for size, warps, stages in tiles)
    return Choice.of(*loops, key=(columns, str(dtype)))


def rows_per_program(rows: int, step: int, blocks: int, programs: int) -> int:
    """How many rows a program of the backward pass adds up, a multiple of `step`: at most so many programs
    share the rows of all `blocks` of columns.
    """
    steps = -(-rows // step)
    return step * max(1, -(-steps // max(1, programs // max(1, blocks))))


def _tile(size: int, num_warps: int, columns: int, dtype: torch.dtype, num_stages: int = 1) -> Rows:
    """So many bytes of each tensor."""
    rows = max(1, size // (block_d(columns) * dtype.itemsize))
    return Rows(block_n=rows, num_warps=num_warps, num_stages=num_stages)
