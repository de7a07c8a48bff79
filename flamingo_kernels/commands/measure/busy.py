"""How busy others keep this machine, by Linux' own count of what its cores did."""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET = 0.25  # of a core: what a desktop takes
_STAT = Path("/proc/stat")


def busy_cores(seconds: float = 0.3) -> float | None:
    """How many cores other processes take while this one sleeps; None where that is not known."""
    try:
        before = _busy()
        time.sleep(seconds)
        return max(_busy() - before, 0) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError, IndexError):
        return None


def _busy() -> int:
    """Ticks of all cores in which one did something, or was taken away from a virtual machine."""
    ticks = [int(text) for text in _STAT.read_text().splitlines()[0].split()[1:9]]
    _, _, _, idle, waiting, *_ = ticks
    return sum(ticks) - idle - waiting
