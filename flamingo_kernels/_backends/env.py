"""Every environment variable of the library, read once, here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

BACKENDS = ("cuda", "triton", "cpu", "reference")
CPU_VARIANTS = ("portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "avx512_amx")


def _choice(name: str, default: str, legal: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in legal:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(legal)}.")
    return value


def _home() -> Path:
    """The user's folder; one for temporary files where he has none, as in a container under any number."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"home-of-{os.getuid()}")


# Which backend `backend="auto"` means; "auto" takes the first that supports the inputs.
BACKEND = _choice("FLAMINGO_KERNELS_BACKEND", "auto", ("auto", *BACKENDS))

# Which instruction set the C++ kernels use; "auto" takes the widest this processor has.
CPU_VARIANT = _choice("FLAMINGO_KERNELS_CPU_VARIANT", "auto", ("auto", *CPU_VARIANTS))

# Whether the Triton kernels measure their configurations on first use, and where they keep what they found.
AUTOTUNE = _choice("FLAMINGO_KERNELS_AUTOTUNE", "0", ("0", "1")) == "1"
CACHE = Path(os.environ.get("FLAMINGO_KERNELS_CACHE") or _home() / ".cache" / "flamingo_kernels")

# Triton's own: its kernels run in an interpreter, on the processor.
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# Other builds of the two extensions than those installed beside this package.
EXTENSION = os.environ.get("FLAMINGO_KERNELS_EXTENSION", "")
CUDA_EXTENSION = os.environ.get("FLAMINGO_KERNELS_CUDA_EXTENSION", "")
