"""How the Triton kernel of a linear layer is launched: in tiles of outputs and rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..._backends.triton.config import Choice, Config, Device

# Few rows: so many programs that together they keep the memory busy.
FEW_ROWS = 16
# Beyond them, and up to here, a program takes all rows: each weight is still read once.
SOME_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Tiles(Config):
    """A program takes `block_out` outputs of `block_rows` rows, `block_in` inputs at a time."""

    block_out: int = 16
    block_rows: int = 16
    block_in: int = 256


def forward(rows: int, width: int, out: int, dtype: torch.dtype, device: Device) -> Choice[Tiles]:
    """What is known of the rows is whether they are few, some or many."""
    few = next((most for most in (FEW_ROWS, SOME_ROWS) if rows <= most), 0)
    return _forward(few, width, out, dtype, device)


@cache
def _forward(few: int, width: int, out: int, dtype: torch.dtype, device: Device) -> Choice[Tiles]:
    if dtype == torch.float32:  # true products, whose factors lie in registers
        tiles = _exact(few)
    elif device.architecture.startswith("gfx"):
        tiles = _amd(few)
    else:
        tiles = _fast(few)
    return Choice.of(*tiles, key=(few, width, out, str(dtype)))


def _fast(few: int) -> list[Tiles]:
    if few == FEW_ROWS:
        return [
            Tiles(block_in=512, num_stages=3),
            Tiles(block_in=256, num_stages=3),
            Tiles(block_out=32, block_in=256, num_stages=3),
        ]
    if few == SOME_ROWS:
        return [
            Tiles(block_out=32, block_rows=64, block_in=128, num_stages=3),
            Tiles(block_out=16, block_rows=64, block_in=128, num_stages=3),
        ]
    return [
        Tiles(block_out=64, block_rows=64, block_in=64, num_stages=3),
        Tiles(block_out=128, block_rows=64, block_in=64, num_stages=3, num_warps=8),
    ]


def _exact(few: int) -> list[Tiles]:
    if few == FEW_ROWS:
        return [Tiles(block_in=256, num_warps=8)]
    return [Tiles(block_out=32, block_rows=32, block_in=64, num_warps=8)]


def _amd(few: int) -> list[Tiles]:
    """Warps have 64 threads, and loads ahead would lie in registers."""
    if few == FEW_ROWS:
        return [Tiles(num_stages=1)]
    return [Tiles(block_out=32, block_rows=32, block_in=64, num_stages=1)]
