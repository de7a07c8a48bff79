"""Finds the CUDA kernels and loads them when first asked for; a failure is kept as a reason, never raised.

A build for tests emulates CUDA on the processor (`csrc/cuda/host`): it takes tensors on the CPU, and runs
only where FLAMINGO_KERNELS_CUDA_EXTENSION names it.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import torch

from .._constant import constant
from . import env
from .missing import why_missing

OLDEST_CAPABILITY = (8, 0)
TORCH_FOLDER = Path(torch.__file__).with_name("lib")
# In the file as text, so that a library which does not load here says what it holds, too.
_BUILD = re.compile(rb"flamingo_kernels_cuda_build: ([ -~]+)")


def path() -> Path:
    """Where the library is, if it is built."""
    given = env.CUDA_EXTENSION
    return Path(given) if given else Path(__file__).parents[1] / "_C_cuda.abi3.so"


@cache
def build() -> str:
    """What the library was built with and for, or an empty string."""
    found = _BUILD.search(path().read_bytes()) if path().exists() else None
    return found[1].decode() if found else ""


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if why := why_missing(path(), "the CUDA kernels are", compiler="nvcc", build="cuda"):
        return None, why
    if not env.CUDA_EXTENSION and (why := _no_gpu()):
        return None, why
    try:
        _open_torch()
        library = ctypes.CDLL(str(path()))
        library.flamingo_kernels_cuda_poison.argtypes = [ctypes.c_int]
        library.flamingo_kernels_cuda_emulated.restype = ctypes.c_int
        torch.ops.load_library(str(path()))
    except (OSError, AttributeError) as error:
        return None, f"the CUDA kernels {path().name} do not load: {error}"
    if not library.flamingo_kernels_cuda_emulated() and (why := _no_gpu()):
        return None, why
    return library, ""


def _open_torch() -> None:
    """Python loads torch's libraries privately, and a build beside a torch for the CPU names none of CUDA."""
    library = TORCH_FOLDER / "libtorch_cuda.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _no_gpu() -> str:
    """Why no GPU here runs the kernels, or an empty string."""
    if torch.version.hip:
        return "this torch is for AMD GPUs"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    found = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if found < OLDEST_CAPABILITY:
        return "a GPU has compute capability {}.{}, below {}.{}".format(*found, *OLDEST_CAPABILITY)
    return ""


@constant
def why_not() -> str:
    """Why no CUDA kernel can run in this process, or an empty string."""
    return _load()[1]


@constant
def emulated() -> bool:
    """Whether the kernels run on the processor."""
    library, _ = _load()
    return library is not None and library.flamingo_kernels_cuda_emulated() != 0


def misplaced(tensor: torch.Tensor) -> str:
    """Why a tensor is not where the kernels compute, or an empty string."""
    if tensor.is_cpu if emulated() else tensor.is_cuda:
        return ""
    return f"a tensor is on {tensor.device}, not on {'cpu' if emulated() else 'cuda'}"


def is_one_shot(immediate: bool, latents: int, dtype: torch.dtype) -> bool:
    """Whether a row's softmax is one tile of masked_cross_attention; `kernels::is_one_shot` says the same."""
    return immediate and latents <= (32 if dtype == torch.float32 else 64)


def poison(on: bool) -> None:
    """A test aid: outputs and working memory of the kernels start as NaN."""
    library, _ = _load()
    if library:
        library.flamingo_kernels_cuda_poison(int(on))
