"""Forward of the gated residual in Triton: `z = x + tanh(gate) * y`. Oracle: `reference.py`.

A program takes a tile of rows and columns. Bytes: x and y read once, z written once. FLOPs: 2 an element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.checks import Checks
from ..._backends.triton.language import tanh
from ..._backends.triton.launch import launch
from .config import block_d, forward
from .schema import residual_dtype


def gated_residual_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
) -> Tensor:  # z [N, D]
    check("gated_residual_fwd", "x", x, y, gate)
    rows, columns = x.shape
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    block = block_d(columns)
    strides, unit = row_strides(x, y)
    launch(
        _gated_residual_fwd_kernel,
        lambda config: triton.cdiv(rows, config.block_n) * triton.cdiv(columns, block),
        forward(columns, z.dtype),
        *((x, y), strides, gate.contiguous(), z, rows),
        D=columns,
        BLOCK_D=block,
        PER_CHANNEL=gate.numel() > 1,
        UNIT=unit,
    )
    return z


def check(operation: str, first_name: str, first: Tensor, y: Tensor, gate: Tensor) -> None:
    """The branch and its gate; `first` is what has the shape of the residual."""
    checks = Checks(operation, first_name, first, 2)
    checks.rows(first_name, first, first.shape)
    checks.rows("y", y, first.shape)
    checks.parameter("gate", gate, first.shape[1])


def row_strides(*tensors: Tensor) -> tuple[tuple[int, ...], int]:
    """Row strides in units, and the unit: where it is 8 elements, threads may move 16 bytes at once."""
    unit = 1 if any(tensor.stride(0) % 8 for tensor in tensors) else 8
    return tuple(tensor.stride(0) // unit for tensor in tensors), unit


@triton.jit(do_not_specialize=["N"])
def _gated_residual_fwd_kernel(
    inputs,  # x, y [N, D]
    strides,  # of each input's rows, in units
    gate_ptr,  # [1] or [D]
    z_ptr,  # [N, D]
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, columns = program_tile(D, BLOCK_D)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    x = load(inputs[0], rows * UNIT, strides[0], columns, inside)
    y = load(inputs[1], rows * UNIT, strides[1], columns, inside)
    gate = load_gate(gate_ptr, columns, D, PER_CHANNEL)
    store(z_ptr, rows, D, columns, inside, x + tanh(gate) * y)


@triton.jit
def program_tile(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's place among the rows, as a 64-bit number, and its columns: neighbours share rows."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    return (program // BLOCKS).to(tl.int64), program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def load(ptr, rows, stride, columns, inside):  # [rows, columns]
    """A tile in float32, 0 outside."""
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, rows, stride, columns, inside, tile):
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_gate(gate_ptr, columns, D: tl.constexpr, PER_CHANNEL: tl.constexpr):  # [1, columns] or [1, 1]
    at = columns if PER_CHANNEL else tl.arange(0, 1)
    return tl.load(gate_ptr + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
