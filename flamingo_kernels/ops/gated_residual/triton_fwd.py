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
from .config import block_of_columns, forward
from .schema import residual_dtype


def gated_residual_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
) -> Tensor:  # z [N, D]
    check("gated_residual_fwd", "x", x, y, gate)
    rows, columns = x.shape
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    block = block_of_columns(columns)
    strides, unit = strides_of(x, y)
    launch(
        _gated_residual_fwd_kernel,
        lambda config: triton.cdiv(rows, config.rows) * triton.cdiv(columns, block),
        forward(columns, z.dtype),
        *(x, y, gate.contiguous(), z, strides, rows),
        D=columns,
        COLUMNS=block,
        PER_CHANNEL=gate.numel() > 1,
        UNIT=unit,
    )
    return z


def check(operation: str, first_name: str, first: Tensor, y: Tensor, gate: Tensor) -> Checks:
    """The branch and its gate; `first` is what has the shape of the residual."""
    checks = Checks(operation, first_name, first, 2)
    checks.rows(first_name, first, first.shape)
    checks.rows("y", y, first.shape)
    checks.parameter("gate", gate, first.shape[1], one_for_all=True)
    return checks


def strides_of(*tensors: Tensor) -> tuple[tuple[int, ...], int]:
    """Row strides in units, and the unit: where it is 8 elements, threads may move 16 bytes at once."""
    unit = 1 if any(tensor.stride(0) % 8 for tensor in tensors) else 8
    return tuple(tensor.stride(0) // unit for tensor in tensors), unit


@triton.jit(do_not_specialize=["rows"])
def _gated_residual_fwd_kernel(
    x,
    y,
    gate,
    z,
    strides,
    rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, columns = tile_of(D, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (columns < D)[None, :]
    total = gated_sum(x, y, gate, strides, row * UNIT, columns, inside, D, PER_CHANNEL)
    store(z, row, D, columns, inside, total)


@triton.jit
def gated_sum(x, y, gate, strides, row, columns, inside, D: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """A tile of `x + tanh(gate) * y`."""
    residual = load(x, row, strides[0], columns, inside)
    branch = load(y, row, strides[1], columns, inside)
    return residual + tanh(load_gate(gate, columns, D, PER_CHANNEL)) * branch


@triton.jit
def tile_of(D: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's place among the rows, as a 64-bit number, and its columns: neighbours share rows."""
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    return (program // BLOCKS).to(tl.int64), program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def load(base, rows, stride, columns, inside):  # [rows, columns]
    """A tile in float32, 0 outside."""
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(base, rows, stride, columns, inside, tile):
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_gate(gate, columns, D: tl.constexpr, PER_CHANNEL: tl.constexpr):  # [1, columns] or [1, 1]
    return load_vector(gate, columns if PER_CHANNEL else tl.arange(0, 1), D)


@triton.jit
def load_vector(vector, columns, D: tl.constexpr):  # [1, columns]
    return tl.load(vector + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
