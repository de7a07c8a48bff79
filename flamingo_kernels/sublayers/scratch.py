"""Memory for what lives within one call: on a CPU fresh pages cost more than what is computed into them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._predicates import is_eager

_LEAST = 2**20  # bytes; smaller pieces the allocator of the C library has at hand
_kept = threading.local()


@contextmanager
def scratch(*shape: int, like: Tensor) -> Iterator[Tensor | None]:
    """Uninitialised memory that is the caller's until the end of the block, or None: let torch allocate.

    On a CPU a thread keeps the pieces for its next calls; `release` gives them back. The allocators of other
    devices do that already, a compiler plans its memory itself, and a fake tensor has none: they get None.

    Args:
        shape: of the tensor.
        like: a tensor whose dtype and device it gets.
    """
    size = math.prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or size < _LEAST or not is_eager(like):
        yield None
        return
    memory = _take(size)
    try:
        yield memory[:size].view(like.dtype).view(shape)
    finally:
        _pool().append(memory)


def release() -> None:
    """Give back what this thread has kept."""
    _pool().clear()


def _take(size: int) -> Tensor:
    """The least of the kept pieces that is large enough; else a new one in place of the largest."""
    pool = sorted(_pool(), key=Tensor.numel)
    fitting = next((piece for piece in pool if piece.numel() >= size), None)
    if fitting is None:
        pool = pool[:-1]
        with torch.inference_mode(False):  # what is made in inference mode serves no training
            fitting = torch.empty(size, dtype=torch.uint8)
    _kept.pool = [piece for piece in pool if piece is not fitting]
    return fitting


def _pool() -> list[Tensor]:
    if not hasattr(_kept, "pool"):
        _kept.pool = []
    return _kept.pool
