"""A projection that carries a gate and a residual: `z = x + tanh(gate) * (a @ weight.T + bias)`.

The branch y = a @ weight.T + bias is never stored. The gate's gradient, `tanh'(gate) * sum(dz * y)`, comes
from a product over the rows or over the weights, whichever is smaller:

    sum(dz * y) = sum((dz @ weight) * a) = sum((dz.T @ a) * weight)        (+ sum(dz) * bias)

The gradient of a, or of the weight, is `tanh(gate)` times the same product. All of it is exact where the gate
is 0. The backward kernel of a gated residual computes just this sum and this factor, so it serves here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import expect_same_dtype, unit_stride
from .._labels import GATE, labelled
from .._predicates import autocast_dtype, is_eager
from ..ops.gated_residual.schema import BWD, FWD, residual_dtype
from ..ops.linear.products import PRODUCTS, by_kernel, fastest
from ..ops.weights import Linear, named_parameters
from .scratch import scratch


def expect_one_dtype(operator: str, x: Tensor, linears: dict[str, Linear | None], **media: Tensor) -> None:
    """Raise TypeError unless everything in a matrix product has the dtype of x; autocast casts x itself."""
    for name, linear in linears.items():
        if linear is not None and linear.scale is not None:
            raise TypeError(f"{operator}: expected {name} without a scale, got one; `linear` takes integers.")
    text = {} if autocast_dtype(x.device) else {"x": x}
    expect_same_dtype(operator, **text, **named_parameters(**linears), **media)


class Gradients(NamedTuple):
    a: Tensor  # [N, in]
    linear: tuple[Tensor | None, Tensor | None]  # weight, bias
    gate: Tensor | None


def forward(x: Tensor, a: Tensor, linear: Linear, gate: Tensor | None, backend: str) -> Tensor:  # [N, D]
    """z. The product applies the gate itself if all dtypes are equal and, on a CPU, there is one gate.

    A gate of None stands for a factor of 1.
    """
    by = fastest("forward", a, linear.weight, linear.weight.numel())
    if by == "cpu":
        return by_kernel(a, linear.weight, linear.bias, gate=gate, residual=x)
    if by != "torch" or not is_eager(x) or linear.bias is not None or not _in_one_dtype(x, a, gate):
        return x + linear.project(a) if gate is None else FWD[backend](x, linear.project(a), gate)
    if gate is None:
        return torch.addmm(x, a, linear.weight.t())
    if x.device.type != "cpu":
        return torch.addmm(x, a, _gated(linear.weight, gate).t())
    if gate.numel() == 1 and (factor := float(gate.tanh())):
        return torch.addmm(x, a, linear.weight.t(), alpha=factor)
    # A gate of 0, as before training: with alpha=0 torch's product in bfloat16 takes 30 times as long.
    return FWD[backend](x, linear.project(a), gate)


def _in_one_dtype(x: Tensor, a: Tensor, gate: Tensor | None) -> bool:
    return x.dtype == a.dtype and (gate is None or residual_dtype(x, a, gate) == x.dtype)


def backward(
    dz: Tensor,  # [N, D]
    a: Tensor,  # [N, in]
    linear: Linear,
    gate: Tensor | None,
    backend: str,
    *,
    needs_weight: bool,
    needs_bias: bool,
    needs_gate: bool,
    into: Tensor | None = None,
) -> Gradients:
    """The gradients that are needed, without that of x, which is dz.

    The gradient of a may go `into` a tensor, which may be a itself.
    """
    with scratch(*dz.shape, like=dz) as memory:
        dy = (dz if gate is None else _times_gate(dz, gate, memory)).to(a.dtype)
        dbias = dy.sum(0) if needs_bias else None
        if gate is None or not needs_gate:
            dweight = outer(dy, a) if needs_weight else None
            return Gradients(times(dy, linear.weight, into), (dweight, dbias), None)
        if gate.numel() == 1 and (len(dz) < len(linear.weight) or not needs_weight):
            da, dgate = _gate_by_rows(dz.to(a.dtype), a, linear.weight, gate, backend)
            dweight = outer(dy, a) if needs_weight else None
        else:
            dweight, dgate = _gate_by_weights(dz.to(a.dtype), a, linear.weight, gate, backend)
            da = times(dy, linear.weight, into)
    if linear.bias is not None:
        along = dz.sum(0, dtype=torch.float32) * linear.bias
        dgate = dgate + _dtanh(gate) * (along.sum() if gate.numel() == 1 else along).view(gate.shape)
    return Gradients(da, (dweight if needs_weight else None, dbias), dgate)


def _gate_by_rows(
    dz: Tensor, a: Tensor, weight: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor]:  # da, dgate
    with scratch(*a.shape, like=a) as memory:
        return BWD[backend](times(dz, weight, memory), a, gate)


def _gate_by_weights(
    dz: Tensor, a: Tensor, weight: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor]:  # dweight, dgate
    with scratch(*weight.shape, like=weight) as memory:
        product = outer(dz, a, memory)
        if gate.numel() == 1:
            return BWD[backend](product, unit_stride(weight), gate)
        along = torch.bmm(product.unsqueeze(1), weight.unsqueeze(2)).float().view(gate.shape)
        return _gated(product, gate), _dtanh(gate) * along


def times(dy: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """`dy @ weight`, the gradient of what the weight read, by the fastest product.

    It may write `into` a tensor.
    """
    by = fastest("dx", dy, weight, weight.numel())
    return torch.mm(dy, weight, out=into) if by == "torch" else PRODUCTS[by].dx(dy, weight)


def outer(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """`a.T @ b`, the gradient of a weight, by the fastest product; it may write `into` a tensor.

    In bfloat16 on a CPU a transposed copy of a makes torch's faster.
    """
    by = fastest("dw", a, b, a.shape[1] * b.shape[1])
    if by != "torch":
        return PRODUCTS[by].dw(a, b)
    if a.dtype != torch.bfloat16:
        return torch.mm(a.t(), b, out=into)
    with scratch(*reversed(a.shape), like=a) as memory:
        return torch.mm(a.t() if memory is None else memory.copy_(a.t()), b, out=into)


@labelled(GATE)
def _times_gate(dz: Tensor, gate: Tensor, into: Tensor | None) -> Tensor:
    """`tanh(gate) * dz`, in the dtype of dz."""
    return torch.mul(dz, gate.flatten().tanh().to(dz.dtype), out=into)


@labelled(GATE)
def _gated(weight: Tensor, gate: Tensor) -> Tensor:
    """`tanh(gate) * weight`, row by row if each channel has a gate."""
    return (weight * gate.reshape(-1, 1).tanh()).to(weight.dtype)


@labelled(GATE)
def _dtanh(gate: Tensor) -> Tensor:
    """`tanh'(gate)` as `1 / cosh(gate) ** 2`, since `1 - tanh(gate) ** 2` cancels where tanh is near 1."""
    return gate.float().cosh().square().reciprocal()
