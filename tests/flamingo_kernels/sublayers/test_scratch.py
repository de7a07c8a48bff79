"""What memory a thread keeps between calls."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.sublayers import scratch

LIKE = torch.zeros(1)
LEAST = scratch._LEAST // 4  # elements in float32


@pytest.fixture(autouse=True)
def empty():
    scratch.release()
    yield
    scratch.release()


def kept() -> list[int]:
    """Elements of the pieces, in float32."""
    return sorted(piece.numel() // 4 for piece in scratch._pool())


def use(size: int) -> None:
    with scratch.scratch(size, like=LIKE) as memory:
        assert memory.shape == (size,)
        assert memory.dtype == torch.float32


def test_small_tensors_take_none():
    with scratch.scratch(LEAST - 1, like=LIKE) as memory:
        assert memory is None
    use(LEAST)


def test_a_larger_piece_replaces_the_largest():
    for size in (LEAST, LEAST + 5, LEAST, 2 * LEAST):
        use(size)
    assert kept() == [2 * LEAST]


def test_as_many_are_kept_as_were_used_at_once():
    with scratch.scratch(2 * LEAST, like=LIKE) as one, scratch.scratch(LEAST, like=LIKE) as other:
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert kept() == [LEAST, 2 * LEAST]
    with scratch.scratch(LEAST, like=LIKE):
        assert kept() == [2 * LEAST]  # the smallest that fits was taken


def test_an_error_gives_it_back():
    with pytest.raises(RuntimeError, match="broken"), scratch.scratch(LEAST, like=LIKE):
        raise RuntimeError("broken")
    assert kept() == [LEAST]
