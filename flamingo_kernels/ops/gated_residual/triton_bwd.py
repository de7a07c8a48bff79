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
from ..._backends.triton.language import dtanh, tanh
from ..._backends.triton.launch import launch
from ..._backends.triton.reduction import add_many_in_order
from .config import backward, block_d, rows_per_program
from .triton_fwd import check, load, load_gate, program_tile, row_strides, store


def gated_residual_bwd(
    dz: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
) -> tuple[Tensor, Tensor]:  # dy [N, D], dgate like gate
    check("gated_residual_bwd", "dz", dz, y, gate)
    rows, columns = y.shape
    dy = y.new_empty(y.shape)
    block = block_d(columns)
    blocks = triton.cdiv(columns, block)
    choice = backward(columns, y.dtype)
    most = 2 * device_of(y.device).multiprocessors
    program_rows = rows_per_program(rows, choice.default.block_n, blocks, most)
    programs = triton.cdiv(rows, program_rows)  # for each block of columns
    # one gate for all columns has a sum from each block too
    count = programs if gate.numel() > 1 else programs * blocks
    partial_dgate = gate.new_empty(count, *gate.shape, dtype=torch.float32)
    strides, unit = row_strides(dz, y)
    launch(
        _gated_residual_bwd_kernel,
        lambda _: programs * blocks,
        choice,
        *((dz, y), strides, gate.contiguous(), (dy, partial_dgate), rows, program_rows),
        D=columns,
        BLOCK_D=block,
        PER_CHANNEL=gate.numel() > 1,
        UNIT=unit,
    )
    return dy, add_many_in_order(partial_dgate)


@triton.jit(do_not_specialize=["N", "program_rows"])
def _gated_residual_bwd_kernel(
    inputs,  # dz, y [N, D]
    strides,  # of each input's rows, in units
    gate_ptr,  # [1] or [D]
    grads,  # dy [N, D]; sums of each program: dgate [programs, 1 or D]
    N,
    program_rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    num_stages: tl.constexpr,
):
    dz_ptr, y_ptr = inputs
    dy_ptr, dgate_ptr = grads
    program, columns = program_tile(D, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    gate = load_gate(gate_ptr, columns, D, PER_CHANNEL)
    tanh_gate = tanh(gate)
    begin = program * program_rows
    end = tl.minimum(begin + program_rows, N)
    for first in tl.range(begin, end, BLOCK_N, num_stages=num_stages):
        rows = first + tl.arange(0, BLOCK_N)
        inside = (rows < end)[:, None] & (columns < D)[None, :]
        dz = load(dz_ptr, rows * UNIT, strides[0], columns, inside)
        y = load(y_ptr, rows * UNIT, strides[1], columns, inside)
        store(dy_ptr, rows, D, columns, inside, dz * tanh_gate)
        acc += dz * y
    acc *= dtanh(gate)
    if PER_CHANNEL:
        tl.store(dgate_ptr + program * D + columns, tl.sum(acc, 0), mask=columns < D)
    else:
        tl.store(dgate_ptr + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0))
