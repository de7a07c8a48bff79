"""How the Triton kernels of a block's decoding step are launched, but for its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..._backends.triton.config import Choice, Config, Device, count_splits, power_of_two

BLOCK_H = 16  # query heads of a program: as many as the smallest product has rows
_LEAST_KEYS = 64  # of a split: with fewer, what it writes weighs more than a few of its keys
_MOST_SPLITS = 64  # the program that merges them holds all at once
_TILE = 8192  # bytes of a tile of keys


@dataclass(frozen=True, kw_only=True)
class Keys(Config):
    """A program takes `block_n` keys at a time."""

    block_n: int = 64


def count_key_splits(programs: int, keys: int, device: Device) -> int:
    """Among how many programs to split the keys of a text: by sizes alone, never by what it sees."""
    return count_splits(programs, min(-(-keys // _LEAST_KEYS), _MOST_SPLITS), device)


@cache
def attention(head_dim: int, dtype: torch.dtype, device: Device) -> Choice[Keys]:
    most = max(16, min(64, _TILE // (power_of_two(head_dim) * dtype.itemsize)))
    if device.architecture.startswith("gfx"):  # loads ahead would lie in registers
        return Choice.of(Keys(block_n=max(most // 2, 16), num_stages=1), key=(head_dim, str(dtype)))
    keys = Keys(block_n=most, num_warps=8 if dtype == torch.float32 else 4)
    return Choice.of(keys, key=(head_dim, str(dtype)))


@cache
def norm(width: int) -> Choice[Config]:
    """A thread holds about 16 numbers of a row."""
    return Choice.of(Config(num_warps=max(1, min(16, power_of_two(width) // 512))), key=())


MERGE = Choice.of(Config(), key=())
