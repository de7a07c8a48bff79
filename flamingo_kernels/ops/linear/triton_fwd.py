"""A linear layer and what follows it in Triton: `y = residual + tanh(gate) * act(x @ weight.T + bias)`.

Oracle: `reference.py`. A program takes a block of outputs of a block of rows. The weight is the first factor
of its products and x the second, so that few rows waste little. Integers become numbers in the dtype of x in
registers, and their scale multiplies the sum. With a second layer it is a gated linear unit,
`act(x @ gate_proj.T + bias) * (x @ weight.T + bias)`.

Bytes: weight, x and residual read once from memory, y written once; blocks of rows find the weight in the
cache, and blocks of outputs x. FLOPs: 2 a weight and row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.checks import Checks
from ..._backends.triton.config import device_of
from ..._backends.triton.language import dot, tanh, wide
from ..._backends.triton.launch import launch, precision
from ..weights import Linear
from .schema import ACTIVATIONS, result_dtype
from .triton_activation import activate
from .triton_config import forward


def linear_fwd(
    x: Tensor,  # [N, in]
    weight: Tensor,  # [out, in]
    weight_scale: Tensor | None,  # [out], of a weight of int8
    bias: Tensor | None,  # [out]
    activation: int,
    gate: Tensor | None,  # 1 or out elements
    residual: Tensor | None,  # [N, out]
) -> Tensor:  # y [N, out]
    layer = Linear(weight, bias, weight_scale)
    checks = Checks("linear_fwd", "x", x, 2)
    checks.dimensions("weight", weight, 2)
    rows, out = len(x), len(weight)
    checks.rows("x", x, x.shape)
    checks.layer(("weight", "bias", "weight_scale"), layer, (out, x.shape[1]))
    checks.place("activation", activation, len(ACTIVATIONS))
    if gate is not None:
        checks.parameter("gate", gate, out)
    if residual is not None:
        checks.rows("residual", residual, (rows, out))
    y = x.new_empty(rows, out, dtype=result_dtype(x, gate, residual))
    return multiply(x, layer, y, activation, gate, residual)


def multiply(
    x: Tensor,  # [N, in]
    layer: Linear,  # in -> out
    y: Tensor,  # [N, out]
    activation: int = 0,
    gate: Tensor | None = None,  # 1 or out elements
    residual: Tensor | None = None,  # [N, out]
    gate_proj: Linear | None = None,  # in -> out, of a gated linear unit
) -> Tensor:  # y
    """Writes y, which is contiguous; of arguments that fit."""
    (rows, width), out = x.shape, y.shape[1]
    launch(
        _linear_fwd_kernel,
        lambda tiles: triton.cdiv(rows, tiles.block_rows) * triton.cdiv(out, tiles.block_out),
        forward(rows, width, out, x.dtype, device_of(x.device)),
        (x, residual, y),
        (x.stride(0), 0 if residual is None else residual.stride(0)),
        *(_operand(layer), _operand(gate_proj)),
        *(None if gate is None else gate.contiguous(), rows),
        IN=width,
        OUT=out,
        ACTIVATION=activation,
        PER_OUTPUT=gate is not None and gate.numel() > 1,
        PRECISION=precision(x),
    )
    return y


def _operand(layer: Linear | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """Weight, bias, scale and the stride of the weight's rows; no weight where there is no layer."""
    if layer is None:
        return None, None, None, 0
    bias, scale = (None if each is None else each.contiguous() for each in layer[1:])
    return layer.weight, bias, scale, layer.weight.stride(0)


@triton.jit(do_not_specialize=["N"])
def _linear_fwd_kernel(
    rows_ptrs,  # x [N, IN]; residual [N, OUT] or None; y [N, OUT]
    strides,  # of the rows of x and residual
    layer,  # weight [OUT, IN], bias [OUT] or None, scale [OUT] or None, stride of the weight's rows
    gate_proj,  # the same, or no weight
    gate_ptr,  # [1] or [OUT], or None
    N,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    x_ptr, residual_ptr, y_ptr = rows_ptrs
    blocks = tl.cdiv(N, BLOCK_ROWS)  # programs that share weights are neighbours
    rows = wide(tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    outs = wide(tl.program_id(0) // blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    inside = (outs < OUT) & (rows < N)

    x_ptrs = x_ptr + rows * strides[0]
    y = product(x_ptrs, layer, rows < N, outs, IN, OUT, PRECISION, BLOCK_OUT, BLOCK_ROWS, BLOCK_IN)
    if gate_proj[0] is None:
        y = activate(y, ACTIVATION)
    else:
        g = product(x_ptrs, gate_proj, rows < N, outs, IN, OUT, PRECISION, BLOCK_OUT, BLOCK_ROWS, BLOCK_IN)
        y *= activate(g, ACTIVATION)
    if gate_ptr is not None:
        y *= tanh(load_vector(gate_ptr, outs * PER_OUTPUT, OUT))
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows * strides[1] + outs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * OUT + outs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(
    x_ptrs,  # [1, rows]
    layer,
    real,  # [1, rows]
    outs,  # [outs, 1]
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # [outs, rows]
    """`weight @ x.T + bias` in float32."""
    weight_ptr, bias_ptr, scale_ptr, stride = layer
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for first in range(0, IN, BLOCK_IN):
        columns = first + tl.arange(0, BLOCK_IN)
        mask = (outs < OUT) & (columns < IN)[None, :]
        weight = tl.load(weight_ptr + outs * stride + columns[None, :], mask=mask, other=0)
        x = tl.load(x_ptrs + columns[:, None], mask=(columns < IN)[:, None] & real, other=0.0)
        acc += dot(weight if scale_ptr is None else weight.to(tl.float32).to(x.dtype), x, PRECISION)
    if scale_ptr is not None:
        acc *= load_vector(scale_ptr, outs, OUT)
    if bias_ptr is not None:
        acc += load_vector(bias_ptr, outs, OUT)
    return acc


@triton.jit
def load_vector(ptr, at, size: tl.constexpr):
    return tl.load(ptr + at, mask=at < size, other=0.0).to(tl.float32)
