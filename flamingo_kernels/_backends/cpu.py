"""Finds and loads the compiled extension; a failure is kept as a reason, never raised at import."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from . import env
from .missing import why_missing


def path() -> Path:
    """Where the library is, or would be."""
    return Path(env.EXTENSION) if env.EXTENSION else Path(__file__).parents[1] / "_C.abi3.so"


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if why := why_missing(path(), "the C++ extension is", compiler="a C++ compiler", build="cpu"):
        return None, why
    try:
        library = ctypes.CDLL(str(path()))
        library.flamingo_kernels_select.argtypes = [ctypes.c_char_p]
        library.flamingo_kernels_variant.restype = ctypes.c_char_p
        library.flamingo_kernels_variants.restype = ctypes.c_char_p
        library.flamingo_kernels_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        library.flamingo_kernels_read.restype = ctypes.c_uint32
        library.flamingo_kernels_poison.argtypes = [ctypes.c_int]
        library.flamingo_kernels_threads_of_latest_run.restype = ctypes.c_int64
        torch.ops.load_library(str(path()))
    except (OSError, AttributeError) as error:
        return None, f"the C++ extension {path().name} does not load: {error}"
    if not library.flamingo_kernels_select(env.CPU_VARIANT.encode()):
        built = library.flamingo_kernels_variants().decode()
        return None, (
            f"FLAMINGO_KERNELS_CPU_VARIANT={env.CPU_VARIANT} is not built or this processor lacks it "
            f"(usable here: {built})"
        )
    return library, ""


def why_not() -> str:
    """Why the extension cannot be used, or an empty string."""
    return _REASON


def misplaced(tensor: torch.Tensor) -> str:
    """Why a tensor is not where the C++ kernels compute, or an empty string."""
    return "" if tensor.is_cpu else f"a tensor is on {tensor.device}, not on cpu"


def cpu_variant() -> str:
    """The instruction set the C++ kernels run with: one of `env.CPU_VARIANTS`, or "" without them."""
    library, _ = _load()
    return library.flamingo_kernels_variant().decode() if library else ""


def cpu_variants() -> list[str]:
    """The instruction sets that are built and that this processor has, narrowest first."""
    library, _ = _load()
    return library.flamingo_kernels_variants().decode().split(",") if library else []


def select(variant: str) -> None:
    """A test aid: run with another of `cpu_variants()` from now on."""
    library, _ = _load()
    if library:
        library.flamingo_kernels_select(variant.encode())


def poison(on: bool) -> None:
    """A test aid: outputs and working memory of the C++ kernels start as NaN."""
    library, _ = _load()
    if library:
        library.flamingo_kernels_poison(int(on))


def threads_of_latest_run() -> int:
    """A test aid: over how many threads the latest C++ kernel was spread."""
    library, _ = _load()
    return library.flamingo_kernels_threads_of_latest_run() if library else 0


READ_LOOPS = ("plain", "prefetched", "streamed")


def read(tensor: torch.Tensor, way: str = "plain") -> int:
    """For benchmarks: read a contiguous tensor by one of `READ_LOOPS`, and do next to nothing else.

    Returns:
        The sum of its blocks of 256 KiB as numbers of 32 bits; what is left behind the last is not read.

    Raises:
        ValueError: an unknown loop, or a tensor with gaps or on another device.
        RuntimeError: there are no C++ kernels.
    """
    if way not in READ_LOOPS:
        raise ValueError(f"read: expected a loop among {', '.join(READ_LOOPS)}, got {way!r}.")
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError("read: expected a contiguous tensor on cpu, got another; copy it first.")
    library, why = _load()
    if not library:
        raise RuntimeError(why)
    return int(library.flamingo_kernels_read(tensor.data_ptr(), tensor.nbytes, READ_LOOPS.index(way)))


# A module constant rather than a call, so that compiled graphs guard on a string.
_REASON = _load()[1]
