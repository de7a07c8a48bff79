"""Forward of the gated residual with a norm in Triton: `z = x + tanh(gate) * y`, and its norm n.

Oracle: `reference.py`. A program takes whole rows, which stay in its registers. Bytes: x and y read once,
z and n written once, and two numbers a row. FLOPs: about 9 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of
from ..._backends.triton.language import power_of_two
from ..._backends.triton.launch import launch
from ..gated_residual.schema import residual_dtype
from ..gated_residual.triton_fwd import check, gated_sum, load_vector, row_strides, store
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
    strides, unit = row_strides(x, y)
    launch(
        _gated_residual_norm_fwd_kernel,
        lambda config: triton.cdiv(rows, config.block_n),
        forward(columns, z.dtype, device_of(z.device)),
        *((x, y), strides, gate.contiguous()),
        *(weight.contiguous(), None if bias is None else bias.contiguous()),
        *((z, n, mean, rstd), rows, eps),
        D=columns,
        PER_CHANNEL=gate.numel() > 1,
        RMS=rms,
        UNIT=unit,
    )
    return z, n, mean, rstd


@triton.jit(do_not_specialize=["N"])
def _gated_residual_norm_fwd_kernel(
    inputs,  # x, y [N, D]
    strides,  # of each input's rows, in units
    gate_ptr,  # [1] or [D]
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    outputs,  # z, n [N, D]; mean, rstd [N]
    N,
    eps,
    D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    z_ptr, n_ptr, mean_ptr, rstd_ptr = outputs
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, power_of_two(D))
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    z = gated_sum(inputs, strides, gate_ptr, rows * UNIT, columns, inside, D, PER_CHANNEL)
    z = z.to(z_ptr.dtype.element_ty)
    store(z_ptr, rows, D, columns, inside, z)
    mean, centred, rstd = normalise(z.to(tl.float32), columns, eps, D, RMS)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    n = centred * rstd[:, None] * load_vector(weight_ptr, columns, D)
    if bias_ptr is not None:
        n += load_vector(bias_ptr, columns, D)
    store(n_ptr, rows, D, columns, inside, n)


@triton.jit
def normalise(z, columns, eps, D: tl.constexpr, RMS: tl.constexpr):
    """The mean of each row (0 for an RMSNorm), the row without it, and one over its standard deviation."""
    if RMS:
        mean = tl.zeros([z.shape[0]], tl.float32)
        variance = row_mean(z * z, D)
    else:
        rough = row_mean(z, D)
        z = tl.where((columns < D)[None, :], z - rough[:, None], 0.0)
        # what the rough mean missed: a large mean loses the low bits of its sum
        rest = row_mean(z, D)
        mean = rough + rest
        variance = row_mean(z * z, D)
        # of infinities there is no difference
        variance = tl.where(variance == float("inf"), variance, variance - rest * rest)
        z -= rest[:, None]
    return mean, z, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def row_mean(tile, D: tl.constexpr):  # [rows]
    return tl.sum(tile, 1) * (1 / D)
