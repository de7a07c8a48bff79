"""Loops that read memory and do nothing else, for benchmarks: each reads all, by any instruction set."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels._backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason=cpu.why_not())
BLOCK = 2**18 // 4  # numbers


@pytest.fixture(params=cpu.cpu_variants())
def variant(request):
    before = cpu.cpu_variant()
    cpu.select(request.param)
    yield request.param
    cpu.select(before)


@pytest.mark.parametrize("way", cpu.READ_LOOPS)
@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_its_sum_is_that_of_every_number(variant, way, blocks):
    numbers = torch.randint(-(2**31), 2**31 - 1, (blocks * BLOCK,), dtype=torch.int32)
    assert cpu.read(numbers, way) == int(numbers.sum()) % 2**32


def test_what_is_left_behind_the_last_block_is_not_read():
    numbers = torch.ones(BLOCK + 5, dtype=torch.int32)
    assert cpu.read(numbers) == BLOCK


def test_an_unknown_loop_is_refused():
    with pytest.raises(ValueError, match="expected a loop among plain, prefetched, streamed, got 'fast'"):
        cpu.read(torch.ones(4), "fast")


def test_a_tensor_with_gaps_is_refused():
    with pytest.raises(ValueError, match="expected a contiguous tensor on cpu"):
        cpu.read(torch.ones(4, 4)[:, :2])
