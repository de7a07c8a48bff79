"""How the Triton kernels of perceiver attention are launched.

A program keeps one tile and goes through many: the forward pass and one kernel of the backward pass keep
queries, the other keeps keys. No choice here spills registers on the GPUs of `tests/helpers/triton/cases.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..._backends.triton.config import Choice, Config, Device, count_splits, power_of_two

_TILE = 16384  # bytes of the largest tile that a program keeps; those it goes through are half as large
_LEAST_KEYS = 256  # of a split: with fewer, what it reads and writes besides outweighs its keys


@dataclass(frozen=True, kw_only=True)
class Queries(Config):
    """A program takes a block of queries."""

    block_r: int = 16


@dataclass(frozen=True, kw_only=True)
class Tiles(Queries):
    """A program takes blocks of queries and blocks of keys."""

    block_s: int = 16


def count_key_splits(programs: int, keys: int, tiles: Tiles, device: Device) -> int:
    """Among how many programs to split the keys of a clip."""
    resident = 3 if device.architecture == "sm_90" and tiles.num_warps <= 4 else 2
    return count_splits(programs, keys // _LEAST_KEYS, device, resident)


def is_whole(queries: int, head_dim: int, dtype: torch.dtype, group: int) -> bool:
    """Whether one backward program can keep all queries that read its keys."""
    return group == 1 and power_of_two(queries) <= _kept(256 // dtype.itemsize, head_dim, dtype)


@cache
def forward(queries: int, head_dim: int, dtype: torch.dtype, device: Device) -> Choice[Tiles]:
    kept = min(power_of_two(queries), _kept(64, head_dim, dtype))
    tiles = Tiles(
        block_r=kept,
        block_s=_passing(64, head_dim, dtype, device),
        num_warps=_warps(kept, head_dim, dtype, device),
    )
    key = (queries, head_dim, str(dtype))
    if dtype == torch.float32:
        return Choice.of(tiles, key=key)
    deep = replace(tiles, num_stages=3)
    return Choice.of(deep, tiles, replace(deep, block_s=max(tiles.block_s // 2, 16)), key=key)


@cache
def backward_queries(
    whole: bool, queries: int, head_dim: int, dtype: torch.dtype, device: Device
) -> Choice[Tiles]:
    """The kernel that keeps queries; where it keeps all, the gradients of the keys need room too."""
    kept = power_of_two(queries) if whole else min(power_of_two(queries), _kept(64, head_dim, dtype))
    tiles = Tiles(
        block_r=kept,
        block_s=_passing(32 if whole else 64, head_dim, dtype, device),
        num_warps=_warps(kept, head_dim, dtype, device),
    )
    key = (whole, queries, head_dim, str(dtype))
    if dtype == torch.float32 and whole and head_dim <= 64:
        return Choice.of(replace(tiles, num_stages=1), key=key)  # loads ahead would spill
    if device.architecture in ("sm_80", "sm_89") and not whole and dtype != torch.float32:
        return Choice.of(replace(tiles, num_stages=3), key=key)  # fewer loads ahead may spill
    if dtype == torch.float32 or not whole:
        return Choice.of(tiles, key=key)
    factor = 2 if kept >= 64 and device.architecture in _FROM_SHARED_MEMORY else 1
    more_keys = replace(tiles, block_s=factor * tiles.block_s)
    if device.architecture == "sm_100" and head_dim > 64:  # without loads ahead these spill
        return Choice.of(tiles, more_keys, key=key)
    return Choice.of(tiles, replace(tiles, num_stages=1), more_keys, key=key)


@cache
def backward_keys(head_dim: int, dtype: torch.dtype, device: Device) -> Choice[Tiles]:
    """The kernel that keeps keys, where no program keeps all queries."""
    kept = _kept(64, head_dim, dtype)
    tiles = Tiles(
        block_r=_passing(32, head_dim, dtype, device),
        block_s=kept,
        num_warps=_warps(kept, head_dim, dtype, device),
    )
    return Choice.of(tiles, key=(head_dim, str(dtype)))


COMBINE = Choice.of(Queries(), key=())
_FROM_SHARED_MEMORY = ("sm_90", "sm_100")  # where dots of 64 rows read both factors, which saves registers


def _kept(most: int, head_dim: int, dtype: torch.dtype) -> int:
    """The rows of the tile that a program keeps."""
    return min(most, _TILE // _bytes(head_dim, dtype))


def _passing(most: int, head_dim: int, dtype: torch.dtype, device: Device) -> int:
    """The rows of the tiles it goes through, at most so many of 16 bits; half where registers are scarce."""
    most = most * 2 // dtype.itemsize // (2 if device.architecture.startswith("gfx") else 1)
    return max(min(most, _TILE // 2 // _bytes(head_dim, dtype)), 16)


def _warps(kept: int, head_dim: int, dtype: torch.dtype, device: Device) -> int:
    if head_dim <= 64:
        return 4 if kept * _bytes(head_dim, dtype) <= _TILE // 2 else 8
    return 16 if dtype == torch.float32 and device.architecture == "sm_89" else 8


def _bytes(head_dim: int, dtype: torch.dtype) -> int:
    return power_of_two(head_dim) * dtype.itemsize
