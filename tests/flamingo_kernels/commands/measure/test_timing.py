import gc

import pytest

from flamingo_kernels.commands.measure import timing
from flamingo_kernels.commands.measure.timing import (
    DeviceClock,
    Spread,
    _spread,
    clock_of,
    host_clock,
    interleave,
)


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


def test_any_clock_may_keep_the_time():
    readings = iter([5.0, 1.0, 3.0, 2.0])
    taken = interleave(
        {"a": int, "b": int}, seconds=0, least_rounds=2, clock=lambda call, last: next(readings)
    )
    assert (taken["a"].median, taken["b"].median) == (3.5, 2.0)  # 5 and 2, 1 and 3


class Device:
    """A device with a queue, beside a host that fills it; both count in milliseconds."""

    def __init__(self):
        self.host, self.done = 0.0, 0.0

    def amax(self):
        self.work(1.0)

    def work(self, milliseconds):
        self.done = max(self.done, self.host) + milliseconds

    def call(self):
        """One kernel, which the host takes long to issue."""
        self.host += 3.0
        self.work(5.0)

    def waiting_call(self):
        self.call()
        self.host = self.done
        self.work(2.0)

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.done, self.device.host)

    def query(self):
        return self.at <= self.device.host

    def synchronize(self):
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


def test_what_the_host_takes_to_issue_a_call_is_not_counted():
    device = Device()
    clock = DeviceClock(device, device.event)
    assert clock(device.call, None) == 5.0
    assert clock.lead == 4, "1 and 2 ms of reading do not cover 3 of issuing"
    began = device.done
    assert clock(device.call, 5.0) == 5.0
    assert device.done == began + 4 + 5, "the lead is kept"


def test_a_call_that_waits_for_the_device_is_timed_with_its_waiting():
    device = Device()
    clock = DeviceClock(device, device.event)
    assert clock(device.waiting_call, None) == 7.0
    assert clock.lead == timing.LONGEST_LEAD


def test_refuses_a_device_without_a_clock():
    assert clock_of("cpu") is host_clock
    with pytest.raises(ValueError, match="expected a device of type cpu or cuda, got 'meta'"):
        clock_of("meta")
