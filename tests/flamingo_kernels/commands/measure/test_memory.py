from statistics import median

import numpy as np
import pytest
import torch

from flamingo_kernels.commands.measure import memory
from flamingo_kernels.commands.measure.memory import available, peak_growth, saved_bytes

MIB = 2**20


def test_peak_counts_what_is_freed_again():
    def call():
        return np.ones(32 * MIB, np.uint8).sum()  # allocated, touched and freed

    call()
    growths = [peak_growth(call) for _ in range(5)]
    if None in growths:
        pytest.skip("this system has no resettable high-water mark")
    # the system may take pages of files from this process meanwhile, which count as well
    assert median(growths) == pytest.approx(32 * MIB, rel=0.2)
    assert median(peak_growth(lambda: None) for _ in range(5)) < MIB


def test_on_a_gpu_torchs_allocator_is_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert peak_growth(lambda: seen.append("called"), "cuda:0") == 250
    assert seen == ["reset", "called"]


def test_saved_storages_count_once_and_parameters_not_at_all():
    linear, x = torch.nn.Linear(4, 8, bias=False), torch.ones(2, 4, requires_grad=True)
    assert saved_bytes(lambda: linear(x), linear) == x.nbytes
    assert saved_bytes(lambda: linear(x) * linear(x), linear) == x.nbytes + 2 * 2 * 8 * 4
    halves = x[:1], x[1:]
    assert saved_bytes(lambda: [linear(half) for half in halves], linear) == x.nbytes, "views of one storage"
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x), linear) == 0


def test_available_memory_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 10))
    assert available("cuda:0") == 7
    assert available() is None or MIB < available() < 2**50


def test_copies_are_beyond_the_caches_and_within_the_memory(monkeypatch):
    large, small = torch.randn(2**18), torch.randn(8)
    monkeypatch.setattr(memory, "last_level_cache", lambda: 2**20)
    copies = memory.copies_beyond_caches(large)
    assert len(copies) == 1 + 8
    assert len({each.data_ptr() for each in copies}) == len(copies)
    assert all(torch.equal(each, large) for each in copies)
    assert memory.copies_beyond_caches(small) == [small]
    monkeypatch.setattr(memory, "available", lambda: 8 * 2**20)
    assert len(memory.copies_beyond_caches(large)) == 1 + 2
