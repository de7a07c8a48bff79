"""Counts the bytes that Triton kernels touch, in the interpreter.

For every launch the distinct bytes that were read and written: what must come from memory and go to it,
however often a cache is asked for it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import interpreter_builder

from flamingo_kernels._backends.triton import launch


@dataclass
class Traffic:
    """What one launch touched."""

    kernel: str
    reads: list[np.ndarray] = field(default_factory=list, repr=False)
    writes: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def read(self) -> int:
        return _distinct(self.reads)

    @property
    def written(self) -> int:
        return _distinct(self.writes)

    @property
    def written_twice(self) -> int:
        """Bytes written more often than once."""
        return sum(map(len, self.writes)) - self.written


def _distinct(addresses: list[np.ndarray]) -> int:
    return len(np.unique(np.concatenate(addresses))) if addresses else 0


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """The launches within the block."""
    launches: list[Traffic] = []
    load, store, start = (
        interpreter_builder.create_masked_load,
        interpreter_builder.create_masked_store,
        launch.start,
    )

    def counting_start(kernel: Any, *arguments: Any) -> None:
        launches.append(Traffic(kernel.__name__))
        start(kernel, *arguments)

    def counting_load(pointers: Any, mask: Any, *arguments: Any) -> Any:
        launches[-1].reads.append(_bytes(pointers, mask))
        return load(pointers, mask, *arguments)

    def counting_store(pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        launches[-1].writes.append(_bytes(pointers, mask))
        return store(pointers, value, mask, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", counting_load)
        patch.setattr(interpreter_builder, "create_masked_store", counting_store)
        patch.setattr(launch, "start", counting_start)
        yield launches


def _bytes(pointers: Any, mask: Any) -> np.ndarray:
    """The addresses of all bytes behind the pointers that are not masked out."""
    size = pointers.get_element_ty().primitive_bitwidth // 8
    first = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
    first = first[np.broadcast_to(mask.data, first.shape)]
    return (first[:, None] + np.arange(size, dtype=first.dtype)).ravel()
