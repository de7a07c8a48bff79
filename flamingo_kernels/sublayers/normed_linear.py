"""A norm and the projections that read it: `u = norm(x) @ weight.T + bias`, for one projection or two.

The backward pass computes the normed x again: that costs one pass over x, and keeping it costs as much memory
as x.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops.weights import Linear, Norm
from . import norm as norms
from .gated_linear import outer, times
from .norm import Statistics
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
    """The result of each projection, the first one `into` a tensor, and the statistics of the norm."""
    with scratch(*x.shape, like=x) as memory:
        n, statistics = norms.forward(x, norm, memory)
        n = n.to(linears[0].weight.dtype)
        first, *others = linears
        return [first.project(n, into), *(linear.project(n) for linear in others)], statistics


def backward(
    dus: list[Tensor],  # [N, out] each
    dz: Tensor,  # [N, D], the gradient of the residual beside the branch
    x: Tensor,  # [N, D]
    norm: Norm,
    statistics: Statistics,
    linears: list[Linear],
    *,
    needs_x: bool,
    needs_norm: bool,
    needs_weights: list[bool],
    needs_biases: list[bool],
) -> Gradients:
    """The gradients that are needed; that of x includes the residual's."""
    dweights: list[Tensor | None] = [None] * len(linears)
    if any(needs_weights):
        with scratch(*x.shape, like=x) as memory:
            n, _ = norms.forward(x, norm, memory)
            n = n.to(dus[0].dtype)
            dweights = [
                outer(du, n) if needed else None for du, needed in zip(dus, needs_weights, strict=True)
            ]
    dbiases = [du.sum(0) if needed else None for du, needed in zip(dus, needs_biases, strict=True)]
    dlinears = list(zip(dweights, dbiases, strict=True))
    if not needs_x and not needs_norm:
        return Gradients(None, (None, None), dlinears)
    with scratch(*x.shape, like=dus[0]) as memory:
        dn = times(dus[0], linears[0].weight, memory)
        for du, linear in zip(dus[1:], linears[1:], strict=True):
            dn.add_(times(du, linear.weight))
        dx, dweight, dbias = norms.backward(dn, x, norm, statistics, needs_norm)
    dx = dx.add_(dz) if dx.dtype == dz.dtype else dx + dz
    return Gradients(dx, (dweight, dbias), dlinears)
