"""Backward of the gated residual with a norm in Triton. Oracle: autograd through `reference.py`.

    dx = dz + rstd * (weight * dn - mean(weight * dn) - zhat * mean(weight * dn * zhat))
    dy = tanh(gate) * dx        dgate = tanh'(gate) * sum(dx * y)
    dweight = sum(dn * zhat)    dbias = sum(dn)

zhat is `(z - mean) * rstd`; an RMSNorm subtracts neither mean nor mean(weight * dn). A program takes many
rows in turn and writes one partial sum a parameter; a second kernel adds these in order. Where a row's sums
would fill the registers, rows are cut into blocks of columns and another kernel makes their two means.
Bytes: dz, dn, y and z read once, dx and dy written once; where rows are cut, dn and z are read twice.
FLOPs: about 17 an element.
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
from ..gated_residual.config import rows_of_a_part
from ..gated_residual.triton_bwd import gate_partials, store_gate_partial, store_partial
from ..gated_residual.triton_fwd import check, load, load_gate, load_vector, store, strides_of, tile_of
from .config import BLOCK, backward, backward_means, block_of_columns, parts_of
from .triton_fwd import mean_of


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
    block = block_of_columns(columns, per_channel)
    blocks = triton.cdiv(columns, block)
    device = device_of(z.device)
    choice = backward(columns, block, z.dtype, device)
    part_rows = rows_of_a_part(rows, choice.default.rows, parts_of(block, blocks, device))
    parts = triton.cdiv(rows, part_rows)
    dx, dy = z.new_empty(z.shape), y.new_empty(y.shape)
    dgate = gate_partials(gate, parts, blocks)
    dweight, dbias = (weight.new_empty(parts, columns, dtype=torch.float32) for _ in range(2))
    gate, weight = gate.contiguous(), weight.contiguous()
    strides, unit = strides_of(dz, dn, y, z)
    launch(
        _gated_residual_norm_bwd_kernel,
        lambda _: parts * blocks,
        choice,
        *(dz, dn, y, gate, weight, z, mean, rstd),
        means_of_rows(dn, weight, z, mean, rstd) if blocks > 1 else None,
        *(dx, dy, dgate, dweight, dbias, strides, rows, part_rows),
        D=columns,
        COLUMNS=block,
        PER_CHANNEL=per_channel,
        RMS=rms,
        UNIT=unit,
    )
    return dx, dy, add_many_in_order(dgate), add_many_in_order(dweight), add_many_in_order(dbias)


def means_of_rows(dn: Tensor, weight: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:  # [2, N]
    """The means of `weight * dn` and of `weight * dn * zhat`, of rows that are cut into blocks."""
    rows, columns = z.shape
    means = z.new_empty(2, rows, dtype=torch.float32)
    strides, unit = strides_of(dn, z)
    launch(
        _gated_residual_norm_means_kernel,
        lambda config: triton.cdiv(rows, config.rows),
        backward_means(z.dtype, device_of(z.device)),
        *(dn, weight, z, mean, rstd, means, strides, rows),
        D=columns,
        COLUMNS=BLOCK,
        UNIT=unit,
    )
    return means


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _gated_residual_norm_bwd_kernel(
    dz,
    dn,
    y,
    gate,
    weight,
    z,
    mean,
    rstd,
    means,
    dx,
    dy,
    dgate,
    dweight,
    dbias,
    strides,
    rows,
    part_rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    num_stages: tl.constexpr,
):
    part, columns = tile_of(D, COLUMNS)
    alpha = load_gate(gate, columns, D, PER_CHANNEL)
    factor = tanh(alpha)
    scale = load_vector(weight, columns, D)
    gates = tl.zeros([ROWS, COLUMNS if PER_CHANNEL else COLUMNS // 4], tl.float32)
    weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    biases = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = part * part_rows
    end = tl.minimum(first + part_rows, rows)
    for start in tl.range(first, end, ROWS, num_stages=num_stages):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (columns < D)[None, :]
        outer = load(dn, row * UNIT, strides[1], columns, inside)
        inner = load(dz, row * UNIT, strides[0], columns, inside)
        branch = load(y, row * UNIT, strides[2], columns, inside)
        zhat, slope = load_zhat(z, mean, rstd, row, end, strides[3], columns, inside, UNIT)
        weights += outer * zhat
        biases += outer
        outer *= scale
        if means is None:
            mean_outer = mean_of(outer, D)
            mean_along = mean_of(outer * zhat, D)
        else:
            mean_outer = tl.load(means + row, mask=row < end, other=0.0)
            mean_along = tl.load(means + rows + row, mask=row < end, other=0.0)
        if not RMS:
            outer -= mean_outer[:, None]
        inner += (outer - zhat * mean_along[:, None]) * slope
        store(dx, row, D, columns, inside, inner)
        store(dy, row, D, columns, inside, inner * factor)
        gates += summed_by_thread(inner * branch, PER_CHANNEL)
    store_gate_partial(dgate, part, columns, gates * tanh_slope(alpha), D, PER_CHANNEL)
    store_partial(dweight, part, columns, weights, D)
    store_partial(dbias, part, columns, biases, D)


@triton.jit(do_not_specialize=["rows"])
def _gated_residual_norm_means_kernel(
    dn,
    weight,
    z,
    mean,
    rstd,
    means,
    strides,
    rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    num_stages: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outers = tl.zeros([ROWS, COLUMNS], tl.float32)
    alongs = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, D, COLUMNS, num_stages=num_stages):
        columns = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (columns < D)[None, :]
        outer = load(dn, row * UNIT, strides[0], columns, inside) * load_vector(weight, columns, D)
        zhat, _ = load_zhat(z, mean, rstd, row, rows, strides[1], columns, inside, UNIT)
        outers += outer
        alongs += outer * zhat
    tl.store(means + row, mean_of(outers, D), mask=row < rows)
    tl.store(means + rows + row, mean_of(alongs, D), mask=row < rows)


@triton.jit
def load_zhat(z, mean, rstd, row, end, stride, columns, inside, UNIT: tl.constexpr):
    """`(z - mean) * rstd`, and rstd."""
    centre = tl.load(mean + row, mask=row < end, other=0.0)[:, None]
    slope = tl.load(rstd + row, mask=row < end, other=0.0)[:, None]
    return (load(z, row * UNIT, stride, columns, inside) - centre) * slope, slope


@triton.jit
def summed_by_thread(tile, PER_CHANNEL: tl.constexpr):
    """A tile, or for one gate the sums of every four columns, which a thread has in its own registers."""
    if PER_CHANNEL:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 4]), 2)
