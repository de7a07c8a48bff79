"""How the Triton kernels of masked cross-attention are launched.

The numbers are those that compile without a spilled register on the GPUs of `tests/helpers/triton/cases.py`,
but for what a cap on the registers puts aside before a loop. On Hopper they have the least predicted time
(`benchmarks/sm_model`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..._backends.triton.config import Choice, Config, Device, power_of_two

FEW_ROWS = 16  # as in decoding


@dataclass(frozen=True, kw_only=True)
class Rows(Config):
    """A program takes `block_t` text rows at a time."""

    block_t: int = 64


@dataclass(frozen=True)
class Static:
    """What a launch depends on. `few_rows` is all that it knows of the length of the text."""

    latents: int
    head_dim: int
    dtype: torch.dtype
    few_rows: bool
    device: Device

    @property
    def exact(self) -> bool:
        """Products in true float32: no tensor cores, and operands in registers, so tiles must be small."""
        return self.dtype == torch.float32

    @property
    def wide_tiles(self) -> bool:
        """Tensor cores that take their operands from shared memory leave registers for larger tiles."""
        return self.device.architecture in ("sm_90", *_BLACKWELL)

    @property
    def small_on_hopper(self) -> bool:
        """Tiles whose kernels fit three or four times on a multiprocessor, if their registers are capped."""
        fits = self.latents <= 64 and self.head_dim <= 64 and not self.exact
        return fits and self.device.architecture == "sm_90"

    @property
    def amd(self) -> bool:
        """Warps have 64 threads, so half as many do; loads ahead would lie in registers, so none are."""
        return self.device.architecture.startswith("gfx")


def is_one_shot(immediate: bool, latents: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a row's softmax is one tile: it sees one medium, whose keys a program holds in one piece."""
    return immediate and power_of_two(latents) <= _most_keys(head_dim, dtype)


def block_r(latents: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many keys of a medium make a tile, where its softmax is no single one."""
    return min(power_of_two(latents), 64, _most_keys(head_dim, dtype))


def _most_keys(head_dim: int, dtype: torch.dtype) -> int:
    """So many that the two gradients of a tile of keys fit in the registers of a program."""
    return (4096 if dtype == torch.float32 else 8192) // power_of_two(head_dim)


@cache
def forward(static: Static, one_shot: bool) -> Choice[Rows]:
    """Small tiles, as a tile multiplies every medium that its rows name with all of them."""
    if static.amd:
        return _choose(static, *([] if static.exact else [replace(_AMD, block_t=64, num_warps=2)]), _AMD)
    if static.exact:
        return _choose(static, Rows(block_t=16, num_warps=8))
    if static.few_rows:
        return _choose(static, Rows(block_t=16), Rows(block_t=16, num_warps=2))
    if one_shot and static.small_on_hopper:
        return _choose(static, Rows(block_t=64, maxnreg=128), Rows(block_t=64), Rows(block_t=32))
    if static.head_dim <= 64:
        tall = [] if one_shot and static.latents > 64 and not static.wide_tiles else [Rows(block_t=64)]
        return _choose(static, *tall, Rows(block_t=32), Rows(block_t=32, num_warps=8))
    if static.head_dim <= 128 and static.wide_tiles:
        return _choose(static, Rows(block_t=64, num_warps=8), Rows(block_t=32, num_warps=8))
    if static.head_dim > 128 and static.device.architecture == "sm_90" and not one_shot:  # eight warps spill
        return _choose(static, Rows(block_t=32, num_warps=4), Rows(block_t=16))
    return _choose(static, Rows(block_t=32, num_warps=8), Rows(block_t=16))


@cache
def backward_rows(static: Static) -> Choice[Rows]:
    """The kernel that owns rows, where they see several media."""
    if static.exact and not static.amd:
        many = 64 if static.device.architecture == "sm_89" else 128  # beyond it eight warps spill
        return _choose(static, Rows(block_t=16, num_warps=16 if static.head_dim > many else 8))
    many = 64 if static.amd else 128
    if static.head_dim > many and not static.exact:  # 32 rows for 128 threads: more of either spill
        least = _AMD if static.amd else Rows(block_t=16)
        tile = replace(least, block_t=32, num_warps=2 if static.amd else 4)
        return _choose(static, *([] if static.few_rows else [tile]), least)
    return forward(static, one_shot=False)


@cache
def backward_keys(static: Static, one_shot: bool) -> Choice[Rows]:
    """The kernels that own keys: dk and dv stay in registers, which leaves the fewer for the rows."""
    small, architecture = static.head_dim <= 64, static.device.architecture
    if static.amd:
        fast = small and not static.exact and not (one_shot and static.latents > 64)
        return _choose(static, *([replace(_AMD, block_t=64), replace(_AMD, num_warps=2)] if fast else [_AMD]))
    if static.exact and one_shot:
        return _choose(static, Rows(block_t=16, num_warps=8))
    if static.exact:  # without loads ahead, for which there are no registers
        return _choose(static, Rows(block_t=16, num_warps=8 if small else 16, num_stages=1))
    if architecture in _BLACKWELL:
        least = Rows(block_t=16, num_warps=4 if static.head_dim <= 128 else 8)
        return _choose(static, Rows(block_t=32, num_warps=4 if small else 8), least)
    if one_shot and static.small_on_hopper and not static.few_rows:
        # Loads ahead would only cost registers: most media have one or two tiles of rows.
        full = Rows(block_t=64, num_stages=1, maxnreg=168)
        return _choose(static, full, Rows(block_t=64), replace(full, block_t=32), replace(full, maxnreg=None))
    if architecture == "sm_90" and small and not static.few_rows and not (one_shot and static.latents > 64):
        return _choose(static, Rows(block_t=64), Rows(block_t=32), Rows(block_t=32, num_warps=8))
    return _choose(static, Rows(block_t=32, num_warps=8), Rows(block_t=16, num_warps=8))


def _choose(static: Static, default: Rows, *others: Rows) -> Choice[Rows]:
    key = (static.latents, static.head_dim, str(static.dtype), static.few_rows)
    return Choice.of(default, *others, key=key)


_AMD = Rows(block_t=16, num_stages=1)
_BLACKWELL = ("sm_100", "sm_103")
AVERAGES = Choice.of(Rows(block_t=64), key=())
