import gc

import pytest

from flamingo_kernels.bench import timing
from flamingo_kernels.bench.timing import Spread, _spread, interleave


def test_round_robin_rotates_the_order():
    order = []
    interleave({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0, least_rounds=4)
    assert "".join(order) == "abcbbccaaccaabbaabbcc"


def test_a_long_call_is_not_made_twice(monkeypatch):
    monkeypatch.setattr(timing, "SHORT_MS", 0.0)
    calls = []
    interleave({"a": lambda: calls.append(1)}, seconds=0, least_rounds=3)
    assert len(calls) == 3


def test_percentiles_of_known_samples():
    assert _spread([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == Spread(median=2.5, p20=1.0, p80=4.0)
    assert _spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_goes_on_until_the_time_is_over():
    calls = []
    interleave({"a": lambda: calls.append(gc.isenabled())}, seconds=0.02, least_rounds=1)
    assert len(calls) > 1
    assert not any(calls), "garbage was collected while timing"
    assert gc.isenabled()


def test_refuses_a_device_without_a_clock():
    with pytest.raises(ValueError, match="expected device 'cpu', got 'cuda'"):
        interleave({}, seconds=0, device="cuda")
