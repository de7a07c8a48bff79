"""A norm and the projections that read it: `u = norm(x) @ weight.T + bias`, for one projection or two.

The normed x is made again in the backward pass: it costs a pass over x, and to keep it costs as much memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import norm as norms
from .gated_linear import Linear, outer
from .norm import Norm, Statistics
from .scratch import scratch


class Gradients(NamedTuple):
    x: Tensor | None  # [N, D]
    norm: tuple[Tensor | None, Tensor | None]  # weight, bias
    linears: list[tuple[Tensor | None, Tensor | None]]  # weight, bias of each


def forward(
    x: Tensor,  # [N, D]
    norm: Norm,
    linears: list[Linear],
    into: Tensor | None = None,
) -> tuple[list[Tensor], Statistics]:
    """What each projection gives, the first `into` a tensor, and the statistics of the norm."""
    with scratch(*x.shape, like=x) as memory:
        n, statistics = norms.forward(x, norm, memory)
        n = n.to(linears[0].weight.dtype)
        first, *others = linears
        return [first(n, into), *(linear(n) for linear in others)], statistics


def backward(
    dus: list[Tensor],  # [N, out] each
    dz: Tensor,  # [N, D], of the residual beside the branch
    x: Tensor,  # [N, D]
    norm: Norm,
    statistics: Statistics,
    linears: list[Linear],
    *,
    of_x: bool,
    of_norm: bool,
    of_linears: list[bool],
) -> Gradients:
    """All gradients; that of x with the residual's added. What nobody wants is not computed."""
    of_each: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(linears)
    if any(of_linears):
        with scratch(*x.shape, like=x) as memory:
            n, _ = norms.forward(x, norm, memory)
            of_each = [
                _of_linear(du, n.to(du.dtype), linear) if wanted else (None, None)
                for du, linear, wanted in zip(dus, linears, of_linears, strict=True)
            ]
    if not of_x and not of_norm:
        return Gradients(None, (None, None), of_each)
    with scratch(*x.shape, like=dus[0]) as memory:
        dn = torch.mm(dus[0], linears[0].weight, out=memory)
        for du, linear in zip(dus[1:], linears[1:], strict=True):
            dn.addmm_(du, linear.weight)
        dx, dweight, dbias = norms.backward(dn, x, norm, statistics, of_norm)
    dx = dx.add_(dz) if dx.dtype == dz.dtype else dx + dz
    return Gradients(dx, (dweight, dbias), of_each)


def _of_linear(du: Tensor, n: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
    return outer(du, n), None if linear.bias is None else du.sum(0)
