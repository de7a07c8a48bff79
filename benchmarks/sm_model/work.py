"""What is predicted: the kernels that the operators launch for named shapes on Hopper, in bfloat16.

Triton's are compiled by the operators' own host code (`tests/helpers/triton/compile.py`), the CUDA kernels by
nvcc. How often each loop runs is told here, and has to follow the kernels: `path.follow` refuses another
number of loops. Small kernels that only add what splits made are left out.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flamingo_kernels.testing import Case, MaskedCrossAttentionCase, PerceiverAttentionCase
from tests.helpers import ROOT
from tests.helpers.cuda_binary import tool

from . import machine_code, path
from .multiprocessor import Launch, resident_blocks

BF16 = {"latents": 64, "heads": 8, "head_dim": 64, "dtype": torch.bfloat16}
WIDTH = 8 * 64  # of all heads


class Work(NamedTuple):
    """A pass of an operator at a shape, and its kernels in order."""

    name: str
    launches: list[Launch]


def all_work(nvcc: str | None) -> Iterator[Work]:
    """Everything that has a prediction; of the CUDA kernels nothing without nvcc."""
    for batch, length, media in ((8, 1024, 8), (8, 1024, 32), (32, 2048, 32)):
        case = MaskedCrossAttentionCase(batch=batch, length=length, media=media, **BF16)
        yield from _triton_work(f"masked_cross_attention B{batch} T{length} M{media}", case)
    for clips, features in ((160, 256), (8, 7680)):
        case = PerceiverAttentionCase(clips=clips, features=features, queries=64, **BF16)
        yield from _triton_work(f"perceiver_attention {clips}x{features}", case)
    if nvcc:
        for width in (2048, 4096):
            yield Work(f"gated_block_decode D{width}", list(_decode(nvcc, width, integers=False)))
        yield Work("gated_block_decode D2048 int8", list(_decode(nvcc, 2048, integers=True)))


def _masked_bytes(case: Any, backward: bool) -> int:
    rows, keys = case.batch * case.length * WIDTH, case.batch * case.media * case.latents * WIDTH
    return 2 * (3 * rows + 4 * keys if backward else 2 * rows + 2 * keys)


def _perceiver_bytes(case: Any, backward: bool) -> int:
    rows, keys = case.clips * case.queries * WIDTH, case.clips * (case.features + case.latents) * WIDTH
    return 2 * (4 * rows + 4 * keys if backward else 2 * rows + 2 * keys)


def _blocks_of_split(case: Any, block_s: int, programs: int) -> int:
    blocks = math.ceil(case.features / block_s) + math.ceil(case.latents / block_s)
    return math.ceil(blocks * case.clips * case.heads / programs)


# Of each kernel: how often its loops run, by the case, its constants and its programs; the bytes it moves.
_TRITON: dict[str, tuple[Callable[[Any, dict[str, Any], int], list[int]], Callable[[Any, bool], int]]] = {
    "_masked_xattn_fwd_one_shot_kernel": (
        lambda case, constants, _: [max(1, constants["BLOCK_T"] * case.media // case.length)],
        _masked_bytes,
    ),
    "_masked_xattn_bwd_one_shot_kernel": (
        lambda case, constants, _: [math.ceil(case.length / case.media / constants["BLOCK_T"]), 1],
        _masked_bytes,
    ),
    "_perceiver_fwd_kernel": (
        lambda case, constants, programs: [_blocks_of_split(case, constants["BLOCK_S"], programs)],
        _perceiver_bytes,
    ),
    # no row is saturated, and all keys are real
    "_perceiver_bwd_queries_kernel": (
        lambda case, constants, programs: [0, _blocks_of_split(case, constants["BLOCK_S"], programs), 0],
        _perceiver_bytes,
    ),
}


def _triton_work(name: str, case: Case) -> Iterator[Work]:
    from tests.helpers.triton import compile as compiler  # it turns every later launch into a compilation

    for kernel, programs, constants, binary in _launched(compiler, case):
        if kernel in _TRITON:
            runs, moved = _TRITON[kernel]
            backward = "_bwd_" in kernel
            launch = _launch(
                kernel,
                binary.asm["cubin"],
                runs=runs(case, constants, programs),
                blocks=programs,
                warps=binary.metadata.num_warps,
                shared_bytes=binary.metadata.shared,
                moved=moved(case, backward),
            )
            yield Work(f"{name} {'backward' if backward else 'forward'}", [launch])


def _launched(compiler: Any, case: Case) -> list[tuple[str, int, dict[str, Any], Any]]:
    """The kernels of both passes as they are launched by default, compiled for sm_90."""
    from flamingo_kernels._backends.triton import launch, tuning
    from tests.helpers.triton.cases import TARGETS

    launched: list[tuple[str, int, dict[str, Any], Any]] = []

    def start(kernel: Any, count: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        binary = kernel.warmup(*arguments, **keywords, grid=(count,))
        launched.append((kernel.__name__, count, keywords, binary))

    compiler.prepare(TARGETS["sm_90"])
    launch.start, tuning.choose = start, lambda kernel, choice, run, device: choice.default
    compiler.run(case)
    return launched


_SPAN = 1024  # columns of a sum in linear.cu, `kSpan`
_VECTORS = 2048  # columns that a block of it takes at once, 8 a thread


def _decode(nvcc: str, width: int, integers: bool) -> Iterator[Launch]:
    """A token of one text that sees one of five images: norm, to_q, attention, to_out, norm, up, down."""
    linear = _compile(nvcc, "linear")
    yield _linear(linear, "to_q", width, WIDTH, normed=True, integers=integers)
    yield _launch(
        "attention",
        _compile(nvcc, "gated_block_decode"),
        kernel="decode_attention_kernel<.*bf16, 64, true>",
        runs=[1],
        blocks=8,
        warps=8,
        shared_bytes=4 * 128 + 8 * (4 * 32 + 8 * 32 + 4 * 128 + 16),
        moved=2 * 2 * 64 * WIDTH,
    )
    yield _linear(linear, "to_out", WIDTH, width, integers=integers)
    yield _linear(linear, "up", width, 4 * width, normed=True, integers=integers)
    yield _linear(linear, "down", 4 * width, width, integers=integers)


def _linear(
    cubin: bytes, name: str, columns: int, out: int, *, normed: bool = False, integers: bool = False
) -> Launch:
    chunk = math.ceil(columns / _SPAN) * _SPAN  # of one row, all columns are one chunk
    vectors, norm = math.ceil(chunk / _VECTORS), math.ceil(columns / _VECTORS) * normed
    pad = 8 if integers else 32
    return _launch(
        name,
        cubin,
        kernel=f"linear_fwd_kernel<.*bf16, .*{'signed char' if integers else 'bf16'}, .*bf16, 1, true>",
        # copying x, another chunk, two sums of the norm and its rows, spans, chunks
        runs=[vectors, 0, norm, norm, norm, max(1, columns // _SPAN), 1],
        taken={1, 2},  # no gated linear unit
        cached=5,
        blocks=math.ceil(out / 16),
        warps=8,
        shared_bytes=8 * (32 + 2) * 4 + (chunk + pad) * 2,
        moved=columns * out * (1 if integers else 2),
    )


@cache
def _compile(nvcc: str, name: str) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        flags = ["-std=c++20", "-O3", "-gencode=arch=compute_90,code=sm_90", "-cubin"]
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        subprocess.run([nvcc, *flags, "-o", file.name, str(source)], check=True)
        return Path(file.name).read_bytes()


def _launch(
    name: str,
    cubin: bytes,
    *,
    runs: Sequence[int],
    blocks: int,
    warps: int,
    shared_bytes: int,
    moved: float,
    kernel: str = "",
    taken: frozenset[int] | set[int] = frozenset(),
    cached: int = 0,
) -> Launch:
    """A launch; what its first `cached` loops read, L2 has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = machine_code.read(Path(file.name), kernel)
        registers = _registers(Path(file.name), kernel)
    near = {place for first, last in path.loops(code)[:cached] for place in range(first, last)}
    resident = resident_blocks(registers, shared_bytes, warps)
    return Launch(name, code, path.follow(code, runs, taken), blocks, warps, resident, moved, near)


def _registers(cubin: Path, kernel: str) -> int:
    """Of a thread."""
    usage = subprocess.run(
        [str(tool()), "-res-usage", str(cubin)], text=True, capture_output=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s*REG:(\d+)", usage)
    return next(int(registers) for name, registers in found if machine_code.is_named(name, kernel))
