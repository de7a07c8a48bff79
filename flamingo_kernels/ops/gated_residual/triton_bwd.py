"""Backward of the gated residual in Triton: `dy = tanh(gate) * dz` and `dgate = tanh'(gate) * sum(dz * y)`.

dx is dz itself. Oracle: autograd through `reference.py`. A program takes many rows of a block of columns in
turn and writes one partial sum a gate; a second kernel adds these in order. Bytes: dz and y read once, dy
written once. FLOPs: 3 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of
from ..._backends.triton.language import tanh, tanh_slope
from ..._backends.triton.launch import launch
from ..._backends.triton.reduction import add_many_in_order
from .config import backward, block_of_columns, parts_of, rows_of_a_part
from .triton_fwd import check, load, load_gate, store, strides_of, tile_of


def gated_residual_bwd(
    dz: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
) -> tuple[Tensor, Tensor]:  # dy [N, D], dgate like gate
    check("gated_residual_bwd", "dz", dz, y, gate)
    rows, columns = y.shape
    dy = y.new_empty(y.shape)
    block = block_of_columns(columns)
    blocks = triton.cdiv(columns, block)
    choice = backward(columns, y.dtype)
    part_rows = rows_of_a_part(rows, choice.default.rows, parts_of(blocks, device_of(y.device)))
    parts = triton.cdiv(rows, part_rows)
    dgate = gate_partials(gate, parts, blocks)
    strides, unit = strides_of(dz, y)
    launch(
        _gated_residual_bwd_kernel,
        lambda _: parts * blocks,
        choice,
        *(dz, y, gate.contiguous(), dy, dgate, strides, rows, part_rows),
        D=columns,
        COLUMNS=block,
        PER_CHANNEL=gate.numel() > 1,
        UNIT=unit,
    )
    return dy, add_many_in_order(dgate)


def gate_partials(gate: Tensor, parts: int, blocks: int) -> Tensor:  # [parts or programs, *gate.shape]
    """Where programs write their shares of the gradient; of one gate for all columns each program has one."""
    count = parts if gate.numel() > 1 else parts * blocks
    return gate.new_empty(count, *gate.shape, dtype=torch.float32)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _gated_residual_bwd_kernel(
    dz,
    y,
    gate,
    dy,
    dgate,
    strides,
    rows,
    part_rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    num_stages: tl.constexpr,
):
    part, columns = tile_of(D, COLUMNS)
    alpha = load_gate(gate, columns, D, PER_CHANNEL)
    factor = tanh(alpha)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = part * part_rows
    end = tl.minimum(first + part_rows, rows)
    for start in tl.range(first, end, ROWS, num_stages=num_stages):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (columns < D)[None, :]
        gradient = load(dz, row * UNIT, strides[0], columns, inside)
        branch = load(y, row * UNIT, strides[1], columns, inside)
        store(dy, row, D, columns, inside, gradient * factor)
        sums += gradient * branch
    store_gate_partial(dgate, part, columns, sums * tanh_slope(alpha), D, PER_CHANNEL)


@triton.jit
def store_gate_partial(dgate, part, columns, sums, D: tl.constexpr, PER_CHANNEL: tl.constexpr):
    if PER_CHANNEL:
        store_partial(dgate, part, columns, sums, D)
    else:
        tl.store(dgate + tl.program_id(0), tl.sum(tl.sum(sums, 1), 0))


@triton.jit
def store_partial(partials, part, columns, sums, D: tl.constexpr):
    """The sums over the rows of a tile."""
    tl.store(partials + part * D + columns, tl.sum(sums, 0), mask=columns < D)
