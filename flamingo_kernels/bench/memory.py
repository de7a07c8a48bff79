"""How far a call drives the memory of this process up, read from Linux' own high-water mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes of resident memory that `call` takes at its peak beyond what is resident before it.

    Free memory goes back to the system first, then the high-water mark is reset. Results count.
    Run the call once before, so that thread pools and caches exist. None where this cannot be measured.
    """
    try:
        with suppress(AttributeError):  # the C library may not be glibc
            ctypes.CDLL(None).malloc_trim(0)
        gc.collect()
        before = _kibibytes("VmRSS")
        (_PROCESS / "clear_refs").write_text("5")
        result = call()
        peak = _kibibytes("VmHWM")
        del result
    except OSError:
        return None
    return 1024 * max(peak - before, 0)


def _kibibytes(field: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
