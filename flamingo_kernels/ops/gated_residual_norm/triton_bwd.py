"""Backward of the gated residual with a norm in Triton. Oracle: autograd through `reference.py`.

    zhat = (z - mean) * rstd    wdn = weight * dn    c1 = mean(wdn * zhat)    c2 = mean(wdn)
    dx = dz + rstd * (wdn - zhat * c1 - c2)
    dy = tanh(gate) * dx        dgate = tanh'(gate) * sum(dx * y)
    dweight = sum(dn * zhat)    dbias = sum(dn)

An RMSNorm subtracts neither mean nor c2. A program takes many rows in turn and writes one partial sum a
parameter; a second kernel adds these in order. Where a row's sums would fill the registers, rows are cut into
blocks of columns and another kernel makes c1 and c2.

Bytes: dz, dn, y and z read once, dx and dy written once; where rows are cut, dn and z are read twice.
FLOPs: about 17 an element.
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
from ..gated_residual.config import rows_per_program
from ..gated_residual.triton_bwd import gate_partials, rows_from, rows_of_program, store_dgate, store_partial
from ..gated_residual.triton_fwd import (
    check,
    load,
    load_gate,
    load_vector,
    program_tile,
    row_strides,
    store,
)
from .config import BLOCK, backward, backward_means, block_d, most_programs
from .triton_fwd import row_mean


def gated_residual_norm_bwd(
    dz: Tensor,  # [N, D]
    dn: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
    weight: Tensor,  # [D]
    z: Tensor,  # [N, D]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # dx, dy [N, D], dgate like gate, dweight, dbias [D]
    checks = check("gated_residual_norm_bwd", "z", z, y, gate)
    rows, columns = z.shape
    for name, tensor in (("dz", dz), ("dn", dn)):
        checks.rows_like_first(name, tensor, z.shape)
    checks.parameter("weight", weight, columns)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        checks.whole(name, tensor, (rows,), torch.float32)
    per_channel = gate.numel() > 1
    block = block_d(columns, per_channel)
    blocks = triton.cdiv(columns, block)
    device = device_of(z.device)
    choice = backward(columns, block, z.dtype, device)
    program_rows = rows_per_program(rows, choice.default.block_n, blocks, most_programs(block, device))
    programs = triton.cdiv(rows, program_rows)  # for each block of columns
    dx, dy = z.new_empty(z.shape), y.new_empty(y.shape)
    partial_dgate = gate_partials(gate, programs, blocks)
    partial_dweight, partial_dbias = (
        weight.new_empty(programs, columns, dtype=torch.float32) for _ in range(2)
    )
    gate, weight = gate.contiguous(), weight.contiguous()
    strides, unit = row_strides(dz, dn, y, z)
    launch(
        _gated_residual_norm_bwd_kernel,
        lambda _: programs * blocks,
        choice,
        *((dz, dn, y, z), strides, gate, weight, (mean, rstd)),
        row_means(dn, z, weight, mean, rstd) if blocks > 1 else None,
        *((dx, dy, partial_dgate, partial_dweight, partial_dbias), rows, program_rows),
        D=columns,
        BLOCK_D=block,
        PER_CHANNEL=per_channel,
        RMS=rms,
        UNIT=unit,
    )
    dgate, dweight, dbias = map(add_many_in_order, (partial_dgate, partial_dweight, partial_dbias))
    return dx, dy, dgate, dweight, dbias


def row_means(dn: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:  # [2, N]
    """c1 and c2 of rows that are cut into blocks of columns."""
    rows, columns = z.shape
    means = z.new_empty(2, rows, dtype=torch.float32)
    strides, unit = row_strides(dn, z)
    launch(
        _gated_residual_norm_bwd_means_kernel,
        lambda config: triton.cdiv(rows, config.block_n),
        backward_means(z.dtype, device_of(z.device)),
        *((dn, z), strides, weight, (mean, rstd), means, rows),
        D=columns,
        BLOCK_D=BLOCK,
        UNIT=unit,
    )
    return means


@triton.jit(do_not_specialize=["N", "program_rows"])
def _gated_residual_norm_bwd_kernel(
    inputs,  # dz, dn, y, z [N, D]
    strides,  # of each input's rows, in units
    gate_ptr,  # [1] or [D]
    weight_ptr,  # [D]
    stats,  # mean, rstd [N]
    means_ptr,  # c1, c2 [2, N] or None
    grads,  # dx, dy [N, D]; sums of each program: dgate [programs, 1 or D], dweight, dbias [programs, D]
    N,
    program_rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    num_stages: tl.constexpr,
):
    dz_ptr, dn_ptr, y_ptr, z_ptr = inputs
    dx_ptr, dy_ptr, dgate_ptr, dweight_ptr, dbias_ptr = grads
    program, columns = program_tile(D, BLOCK_D)
    gate = load_gate(gate_ptr, columns, D, PER_CHANNEL)
    tanh_gate = tanh(gate)
    weight = load_vector(weight_ptr, columns, D)
    dgate = tl.zeros([BLOCK_N, BLOCK_D if PER_CHANNEL else BLOCK_D // 4], tl.float32)
    dweight = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = rows_of_program(program, program_rows, N)
    for first in tl.range(begin, end, BLOCK_N, num_stages=num_stages):
        rows, inside = rows_from(first, end, columns, D, BLOCK_N)
        dn = load(dn_ptr, rows * UNIT, strides[1], columns, inside)
        dx = load(dz_ptr, rows * UNIT, strides[0], columns, inside)
        zhat, rstd = load_zhat(z_ptr, stats, rows, end, strides[3], columns, inside, UNIT)
        dweight += dn * zhat
        dbias += dn
        wdn = dn * weight
        if means_ptr is None:
            c1 = row_mean(wdn * zhat, D)
            c2 = row_mean(wdn, D)
        else:
            c1 = tl.load(means_ptr + rows, mask=rows < end, other=0.0)
            c2 = tl.load(means_ptr + N + rows, mask=rows < end, other=0.0)
        if not RMS:
            wdn -= c2[:, None]
        dx += (wdn - zhat * c1[:, None]) * rstd
        y = load(y_ptr, rows * UNIT, strides[2], columns, inside)  # late, as registers are few
        store(dx_ptr, rows, D, columns, inside, dx)
        store(dy_ptr, rows, D, columns, inside, dx * tanh_gate)
        dgate += sum_by_thread(dx * y, PER_CHANNEL)
    store_dgate(dgate_ptr, program, columns, dgate * dtanh(gate), D, PER_CHANNEL)
    store_partial(dweight_ptr, program, columns, dweight, D)
    store_partial(dbias_ptr, program, columns, dbias, D)


@triton.jit(do_not_specialize=["N"])
def _gated_residual_norm_bwd_means_kernel(
    inputs,  # dn, z [N, D]
    strides,  # of each input's rows, in units
    weight_ptr,  # [D]
    stats,  # mean, rstd [N]
    means_ptr,  # c1, c2 [2, N]
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    num_stages: tl.constexpr,
):
    dn_ptr, z_ptr = inputs
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=num_stages):
        columns = first + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        wdn = load(dn_ptr, rows * UNIT, strides[0], columns, inside) * load_vector(weight_ptr, columns, D)
        zhat, _ = load_zhat(z_ptr, stats, rows, N, strides[1], columns, inside, UNIT)
        acc1 += wdn * zhat
        acc2 += wdn
    tl.store(means_ptr + rows, row_mean(acc1, D), mask=rows < N)
    tl.store(means_ptr + N + rows, row_mean(acc2, D), mask=rows < N)


@triton.jit
def load_zhat(z_ptr, stats, rows, end, stride, columns, inside, UNIT: tl.constexpr):
    """`(z - mean) * rstd`, and rstd."""
    mean = tl.load(stats[0] + rows, mask=rows < end, other=0.0)[:, None]
    rstd = tl.load(stats[1] + rows, mask=rows < end, other=0.0)[:, None]
    return (load(z_ptr, rows * UNIT, stride, columns, inside) - mean) * rstd, rstd


@triton.jit
def sum_by_thread(tile, PER_CHANNEL: tl.constexpr):
    """A tile, or for one gate the sums of every four columns, which a thread has in its own registers."""
    if PER_CHANNEL:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 4]), 2)
