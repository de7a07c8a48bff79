"""Times contenders side by side: round-robin in one process, so what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

SHORT_MS = 100.0  # a longer call has outgrown every cache


class Spread(NamedTuple):
    """Milliseconds: the median and the percentiles around it."""

    median: float
    p20: float
    p80: float


def interleave(
    calls: dict[str, Callable[[], object]], *, seconds: float, least_rounds: int = 5, device: str = "cpu"
) -> dict[str, Spread]:
    """Time every call once a round, in a rotating order, until `seconds` have passed.

    A short call is made once more before it is timed: the caches it finds are then its own, not what the
    contender before it left. A result is dropped inside its own timing, as allocating and freeing it is part
    of its cost.

    Args:
        calls: name to a call that is warm already.
        seconds: how long to go on, all calls together.
        least_rounds: rounds to run however long they take.
        device: where the calls compute; only "cpu" has a clock so far.

    Raises:
        ValueError: another device.
    """
    if device != "cpu":
        raise ValueError(f"interleave: expected device 'cpu', got {device!r}; time that with its own events.")
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
                if samples[name] and samples[name][-1] < SHORT_MS:
                    calls[name]()
                samples[name].append(_milliseconds(calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _spread(taken) for name, taken in samples.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def _spread(samples: list[float]) -> Spread:
    if len(samples) == 1:
        return Spread(*samples * 3)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3])
