"""Times contenders side by side: round-robin in one process, so what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from .text import factor

SHORT_MS = 100.0  # a longer call has outgrown every cache
LONGEST_LEAD = 256  # readings through the cache before one sample

Call = Callable[[], object]


class Spread(NamedTuple):
    """Milliseconds: the median and the percentiles around it."""

    median: float
    p20: float
    p80: float

    def gain(self, after: Spread) -> str:
        """How many times as fast it is after, behind "~" where the two spreads overlap."""
        overlap = self.p20 <= after.p80 and after.p20 <= self.p80
        return f"{'~' * overlap}{factor(self.median / after.median)}"


class Clock(Protocol):
    """Takes one sample of a call."""

    def __call__(self, call: Call, last: float | None) -> float:
        """Milliseconds of one call; `last` is the sample before, None for the first."""


def host_clock(call: Call, last: float | None) -> float:
    """Wall time on warm caches.

    A short call is made once more before it is timed: the caches it finds are then its own, not what the
    contender before it left.
    """
    if last is not None and last < SHORT_MS:
        call()
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


class DeviceClock:
    """A GPU's time on cold caches, by events.

    Before every sample a buffer larger than the L2 cache is read, so a call finds nothing there, and nothing
    that is yet to be written back: overwriting would leave the cache full of that. The reading also keeps the
    device busy until the host has issued the whole call: what the host takes to do so is not
    counted, as it is not in a CUDA graph or behind a long queue. Where the device was done first, the sample
    is taken anew with a longer lead. Only a call that itself waits for the device cannot be issued ahead:
    after the longest lead its waiting counts.

    Args:
        buffer: is read; larger than the cache.
        new_event: makes a CUDA event that keeps time.
    """

    def __init__(self, buffer: torch.Tensor, new_event: Callable[[], Any]) -> None:
        self.buffer, self.new_event, self.lead = buffer, new_event, 1

    @classmethod
    def of(cls, device: torch.device) -> DeviceClock:
        """The clock of a GPU, which must be the current one."""
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        buffer = torch.zeros(max(4 * cache, 2**26) // 4, dtype=torch.int32, device=device)
        return cls(buffer, partial(torch.cuda.Event, enable_timing=True))

    def __call__(self, call: Call, last: float | None) -> float:
        while True:
            begin, end = self.new_event(), self.new_event()
            for _ in range(self.lead):
                self.buffer.amax()
            begin.record()
            call()
            end.record()
            overtaken = begin.query()
            end.synchronize()
            if not overtaken or self.lead >= LONGEST_LEAD:
                return begin.elapsed_time(end)
            self.lead *= 2


def clock_of(device: str | torch.device) -> Clock:
    """What keeps the time of calls that compute on a device.

    Raises:
        ValueError: neither a cpu nor a GPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return host_clock
    if device.type == "cuda":
        return DeviceClock.of(device)
    raise ValueError(f"clock_of: expected a device of type cpu or cuda, got {str(device)!r}.")


def interleave(
    calls: Mapping[str, Call], *, seconds: float, least_rounds: int = 5, clock: Clock = host_clock
) -> dict[str, Spread]:
    """Time every call once a round, in a rotating order, until `seconds` have passed.

    A result is dropped inside its own timing, as allocating and freeing it is part of its cost.

    Args:
        calls: name to a call that is warm already.
        seconds: how long to go on, all calls together.
        least_rounds: rounds to run however long they take.
        clock: takes the samples.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < least_rounds or time.perf_counter() < end:
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                taken = samples[name]
                taken.append(clock(calls[name], taken[-1] if taken else None))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _spread(taken) for name, taken in samples.items()}


def _spread(samples: list[float]) -> Spread:
    if len(samples) == 1:
        return Spread(*samples * 3)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3])
