"""Forward of the gated residual with a norm in Triton: `z = x + tanh(gate) * y`, and its norm n.

Oracle: `reference.py`. A program takes whole rows, which stay in its registers. Bytes: x and y read once,
z and n written once, and two numbers a row. FLOPs: about 9 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of, power_of_two
from ..._backends.triton.launch import launch
from ..gated_residual.schema import residual_dtype
from ..gated_residual.triton_fwd import check, gated_sum, load_vector, store, strides_of
from .config import forward


def gated_residual_norm_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    gate: Tensor,  # 1 or D elements
    weight: Tensor,  # [D]
    bias: Tensor | None,  # [D]
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # z [N, D], n [N, D], mean [N], rstd [N]
    checks = check("gated_residual_norm_fwd", "x", x, y, gate)
    rows, columns = x.shape
    checks.parameter("weight", weight, columns)
    if bias is not None:
        checks.parameter("bias", bias, columns)
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    n = torch.empty_like(z)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if columns == 0:  # no channels have no mean
        return z, n, mean, rstd
    strides, unit = strides_of(x, y)
    launch(
        _gated_residual_norm_fwd_kernel,
        lambda config: triton.cdiv(rows, config.rows),
        forward(columns, z.dtype, device_of(z.device)),
        *(x, y, gate.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()),
        *(z, n, mean, rstd, strides, rows, eps),
        D=columns,
        COLUMNS=power_of_two(columns),
        PER_CHANNEL=gate.numel() > 1,
        RMS=rms,
        UNIT=unit,
    )
    return z, n, mean, rstd


@triton.jit(do_not_specialize=["rows"])
def _gated_residual_norm_fwd_kernel(
    x,
    y,
    gate,
    weight,
    bias,
    z,
    n,
    mean,
    rstd,
    strides,
    rows,
    eps,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (columns < D)[None, :]
    total = gated_sum(x, y, gate, strides, row * UNIT, columns, inside, D, PER_CHANNEL)
    total = total.to(z.dtype.element_ty)
    store(z, row, D, columns, inside, total)
    centre, centred, scale = normalise(total.to(tl.float32), columns, eps, D, RMS)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)
    normed = centred * scale[:, None] * load_vector(weight, columns, D)
    if bias is not None:
        normed += load_vector(bias, columns, D)
    store(n, row, D, columns, inside, normed)


@triton.jit
def normalise(rows, columns, eps, D: tl.constexpr, RMS: tl.constexpr):
    """The mean of each row (of an RMSNorm 0), the row without it, and one over its standard deviation."""
    if RMS:
        mean = tl.zeros([rows.shape[0]], tl.float32)
        variance = mean_of(rows * rows, D)
    else:
        rough = mean_of(rows, D)
        rows = tl.where((columns < D)[None, :], rows - rough[:, None], 0.0)
        # what the rough mean missed: a large mean loses the low bits of its sum
        rest = mean_of(rows, D)
        mean = rough + rest
        variance = mean_of(rows * rows, D) - rest * rest
        rows -= rest[:, None]
    return mean, rows, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def mean_of(rows, D: tl.constexpr):
    return tl.sum(rows, 1) * (1 / D)
