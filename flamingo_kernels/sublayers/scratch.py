"""Memory for tensors that live within one call: on a CPU, fresh pages cost more than the computation."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._predicates import is_eager

_LEAST = 2**20  # bytes; smaller pieces come from the C library's allocator without new pages
_kept = threading.local()


@contextmanager
def scratch(*shape: int, like: Tensor) -> Iterator[Tensor | None]:
    """Uninitialised memory for the caller until the end of the block, or None where torch should allocate.

    On a CPU a thread keeps the pieces for its next calls; `release` gives them back. It is None on other
    devices, whose allocators do the same, under a compiler, which plans its memory itself, and for fake
    tensors, which have none.

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
    """Free the pieces that this thread has kept."""
    _pool().clear()


def _take(size: int) -> Tensor:
    """The smallest kept piece that is large enough, or a new one, which replaces the largest kept piece."""
    pool = sorted(_pool(), key=Tensor.numel)
    fitting = next((piece for piece in pool if piece.numel() >= size), None)
    if fitting is None:
        pool = pool[:-1]
        with torch.inference_mode(False):  # a tensor made in inference mode could not serve training
            fitting = torch.empty(size, dtype=torch.uint8)
    _kept.pool = [piece for piece in pool if piece is not fitting]
    return fitting


def _pool() -> list[Tensor]:
    if not hasattr(_kept, "pool"):
        _kept.pool = []
    return _kept.pool
