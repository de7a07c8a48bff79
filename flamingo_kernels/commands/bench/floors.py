"""What holds every kernel back: the bytes a call must move, and how fast this device moves bytes at all.

The bytes are counted as a roofline does, every tensor once a pass: inputs read, outputs written. The backward
pass of an attention counts its output among what it reads. One that makes the softmax anew does without, and
small tensors stay in the cache from one pass to the next, so a share of this floor may exceed 100%.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..measure.timing import Call, Clock, clock_of
from .shapes import Case, Mode

COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
GEMM_SIZE = {"cuda": 8192, "cpu": 512}


class Ceilings(NamedTuple):
    """What a device reaches in work that does nothing else."""

    copy_gb_s: float  # a large copy within the device, bytes read plus bytes written
    gemm_tflop_s: float  # a product of square bfloat16 matrices of random numbers

    def __str__(self) -> str:
        return f"copy {self.copy_gb_s:.0f} GB/s, bfloat16 matrix product {self.gemm_tflop_s:.3g} TFLOP/s"


def ceilings(device: str, clock: Clock | None = None) -> Ceilings:
    """Measure both on a device: medians of a few samples."""
    clock = clock or clock_of(device)
    return Ceilings(_copy(device, clock), _gemm(device, clock))


def _copy(device: str, clock: Clock) -> float:
    source = torch.randn(COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_ms(lambda: target.copy_(source), clock) / 1e6


def _gemm(device: str, clock: Clock) -> float:
    size = GEMM_SIZE[torch.device(device).type]
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / _median_ms(lambda: a @ b, clock) / 1e9


def _median_ms(call: Call, clock: Clock, samples: int = 21) -> float:
    call()
    return sorted(clock(call, None) for _ in range(samples))[samples // 2]


def least_bytes(case: Case) -> int | None:
    """The bytes a case must move to and from memory; None for a layer, whose floor is arithmetic."""
    passes = _PASSES.get(case.op)
    if passes is None:
        return None
    size = getattr(torch, case.dtype).itemsize
    counted = passes(**case.sizes)
    of_numbers = size * sum(counted[mode] for mode in _PARTS[case.mode])
    return of_numbers + (_bytes_of_integers(**case.sizes) if case.op == "linear, int8" else 0)


_PARTS: dict[Mode, tuple[Mode, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "forward+backward": ("forward", "backward"),
}


def _masked_cross_attention(*, B: int, T: int, M: int, R: int, H: int, d: int) -> dict[Mode, int]:
    rows, keys = B * T * H * d, B * M * R * H * d
    # q out, k v; q out dout dq, k v dk dv
    return {"forward": 2 * rows + 2 * keys, "backward": 4 * rows + 4 * keys}


def _perceiver_attention(*, N: int, S: int, R: int, H: int, d: int) -> dict[Mode, int]:
    rows, keys = N * R * H * d, N * (S + R) * H * d
    return {"forward": 2 * rows + 2 * keys, "backward": 4 * rows + 4 * keys}


def _gated_residual(*, rows: int, D: int) -> dict[Mode, int]:
    # x y out; dout y dy, as dx is dout
    return {"forward": 3 * rows * D, "backward": 3 * rows * D}


def _gated_block_decode(
    *, B: int, M: int, D: int, R: int, H: int, d: int, Hkv: int | None = None
) -> dict[Mode, int]:
    # the matrices, whose hidden layer is 4 D wide; one medium's k and v of each sequence; x out
    return {"forward": 2 * D * H * d + 8 * D * D + 2 * B * R * (Hkv or H) * d + 2 * B * D}


def _linear(*, rows: int, D: int, out: int) -> dict[Mode, int]:
    # x weight y; dy x weight dx dweight
    return {"forward": rows * (D + out) + D * out, "backward": rows * (out + 2 * D) + 2 * D * out}


def _rows_of_linear(*, rows: int, D: int, out: int) -> dict[Mode, int]:
    # x y; the weight is counted by itself
    return {"forward": rows * (D + out)}


def _bytes_of_integers(*, rows: int, D: int, out: int) -> int:
    # the weight, and its scales in float32
    return D * out + 4 * out


_PASSES: dict[str, Callable[..., dict[Mode, int]]] = {
    "masked_cross_attention": _masked_cross_attention,
    "perceiver_attention": _perceiver_attention,
    "gated_residual": _gated_residual,
    "gated_block_decode": _gated_block_decode,
    "linear": _linear,
    "linear, int8": _rows_of_linear,
}
