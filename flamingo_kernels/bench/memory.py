"""The peak memory of a call: a process' from Linux' own high-water mark, a GPU's from torch's allocator."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes of memory that `call` takes at its peak beyond what is taken before it. Results count.

    Run the call once before, so that thread pools and caches exist. On a cpu it is the resident memory of
    this process, after free memory went back to the system; None where that cannot be measured.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_gpu(call, device)
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


def _peak_on_gpu(call: Callable[[], object], device: str | torch.device) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def _kibibytes(field: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
