import numpy as np
import pytest

from flamingo_kernels.bench.memory import peak_growth

MIB = 2**20


def test_peak_counts_what_is_freed_again():
    def call():
        return np.ones(32 * MIB, np.uint8).sum()  # allocated, touched and freed

    call()
    growth = peak_growth(call)
    if growth is None:
        pytest.skip("this system has no resettable high-water mark")
    assert growth == pytest.approx(32 * MIB, rel=0.2)
    assert peak_growth(lambda: None) < MIB
