"""The memory of a call: a process' peak from Linux' own high-water mark, a GPU's from torch's allocator.

Also what a call keeps for its backward pass, how much memory is free, and how large the caches are.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

_PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes of memory that `call` takes at its peak beyond what is taken before it. Results count.

    Run the call once before, so that thread pools and caches exist. On a cpu it is the resident memory of
    this process, after free memory went back to the system; None where that cannot be measured.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_gpu(call, device)
    try:
        before = _reset()
        result = call()
        peak = _kibibytes(_PROCESS / "status", "VmHWM")
        del result
    except OSError:
        return None
    return 1024 * max(peak - before, 0)


def peak_resident(call: Callable[[], object]) -> int | None:
    """Bytes of memory that this process holds at most during a call, with all that was there before it.

    None where that cannot be measured.
    """
    try:
        _reset()
        call()
        return 1024 * _kibibytes(_PROCESS / "status", "VmHWM")
    except OSError:
        return None


def _reset() -> int:
    """Has Linux count the peak anew, after free memory went back to the system; KiB that are resident."""
    gc.collect()
    with suppress(AttributeError):  # the C library may not be glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = _kibibytes(_PROCESS / "status", "VmRSS")
    (_PROCESS / "clear_refs").write_text("5")
    return before


def _peak_on_gpu(call: Callable[[], object], device: str | torch.device) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def saved_bytes(call: Callable[[], object], model: nn.Module) -> int:
    """Bytes that `call` keeps for its backward pass, beside the parameters of the model it calls.

    A storage counts once and as a whole, however many views of it are kept. What an `autograd.Function` keeps
    without `save_for_backward` is not seen.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def available(device: str | torch.device = "cpu") -> int | None:
    """Bytes of memory that are free on a device; None where that is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def last_level_cache() -> int | None:
    """Bytes of the processor's largest cache, which its cores may share; None where that is not known."""
    found = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    sizes = [int(text.strip()[:-1]) * units[text.strip()[-1]] for text in found if text.strip()[-1] in units]
    return max(sizes, default=None)


def copies_beyond_caches(tensor: Tensor) -> list[Tensor]:
    """A tensor and copies of it, together eight times the largest cache, or a quarter of the memory.

    Whoever walks over them finds none in a cache. A tensor of less than a mebibyte stays alone.
    """
    if tensor.nbytes < 2**20:
        return [tensor]
    room = min(8 * (last_level_cache() or 2**26), (available() or 2**32) // 4)
    return [tensor, *(tensor.detach().clone() for _ in range(max(1, room // tensor.nbytes)))]


def _kibibytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {field}")
