"""LayerNorm and RMSNorm over the last dimension; the backward pass keeps two numbers a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._labels import NORM, labelled
from ..ops.weights import Norm
from .scratch import scratch


class Statistics(NamedTuple):
    """What each row was normed with.

    Attributes:
        mean: of a LayerNorm; None for an RMSNorm.
        rstd: one over the standard deviation, or over the root mean square.
    """

    mean: Tensor | None
    rstd: Tensor


@labelled(NORM)
def forward(x: Tensor, norm: Norm, into: Tensor | None = None) -> tuple[Tensor, Statistics]:
    """The normed rows `[N, D]`, into a tensor or a new one, and their statistics."""
    if norm.rms:
        return _rms_forward(x, norm, into)
    x, norm = _in_one_dtype(x, norm)
    arguments = (x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if into is None or into.dtype != x.dtype:
        n, mean, rstd = torch.native_layer_norm(*arguments)
    else:
        # This overload copies once, which is still faster than fresh pages for the product that follows.
        numbers = [into.new_empty(len(x), 1) for _ in range(2)]
        n, mean, rstd = torch.ops.aten.native_layer_norm.out(
            *arguments, out0=into, out1=numbers[0], out2=numbers[1]
        )
    return n, Statistics(mean, rstd)


@labelled(NORM)
def backward(
    dn: Tensor, x: Tensor, norm: Norm, statistics: Statistics, needs_parameters: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, of the weight and of the bias.

    LayerNorm:  dx = rstd (g - mean(g) - xhat mean(g xhat)),  g = weight dn
    RMSNorm:    dx = rstd (g - xhat mean(g xhat))
    """
    if norm.rms:
        return _rms_backward(dn, x, norm, statistics, needs_parameters)
    x, norm = _in_one_dtype(x, norm)
    if not (needs_parameters and x.is_cpu and x.dtype in _NARROW):
        return _layer_backward(dn.to(x.dtype), x, norm, statistics, needs_parameters)
    # On a CPU torch adds up the parameters' gradients in the dtype of x.
    assert statistics.mean is not None
    moments = Statistics(statistics.mean.float(), statistics.rstd.float())
    with scratch(2, *x.shape, like=moments.rstd) as memory:
        wide = (dn.float(), x.float()) if memory is None else (memory[0].copy_(dn), memory[1].copy_(x))
        bias = None if norm.bias is None else norm.bias.float()
        found = _layer_backward(*wide, Norm(norm.weight.float(), bias), moments, needs_parameters)
    dx, dweight, dbias = (each if each is None else each.to(x.dtype) for each in found)
    assert dx is not None
    return dx, dweight, dbias


_NARROW = (torch.bfloat16, torch.float16)


def _layer_backward(
    dn: Tensor, x: Tensor, norm: Norm, statistics: Statistics, needs_parameters: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    needed = [True, needs_parameters, needs_parameters and norm.bias is not None]
    moments = statistics.mean, statistics.rstd
    return torch.ops.aten.native_layer_norm_backward(
        dn, x, x.shape[-1:], *moments, norm.weight, norm.bias, needed
    )


def _in_one_dtype(x: Tensor, norm: Norm) -> tuple[Tensor, Norm]:
    """x and the parameters in the wider dtype of the two, so that neither is rounded."""
    dtype = torch.promote_types(x.dtype, norm.weight.dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return x.to(dtype), norm._replace(weight=norm.weight.to(dtype), bias=bias)


def _rms_forward(x: Tensor, norm: Norm, into: Tensor | None) -> tuple[Tensor, Statistics]:
    """An RMSNorm pass by pass. On a CPU, in scratch memory, that takes a seventh of torch's own time."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = torch.rsqrt(length.square() / x.shape[-1] + norm.eps)
    with scratch(*x.shape, like=rstd) as memory:
        narrow = x.dtype != torch.float32
        n = torch.mul(x, rstd, out=memory if narrow else into)
        n = torch.mul(n, norm.weight, out=into) if into is not None else (n * norm.weight).to(x.dtype)
    return n, Statistics(None, rstd)


def _rms_backward(
    dn: Tensor, x: Tensor, norm: Norm, statistics: Statistics, needs_parameters: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rstd = statistics.rstd
    with scratch(2, *x.shape, like=rstd) as memory:
        first, second = (None, None) if memory is None else memory
        xhat = torch.mul(x, rstd, out=first)
        dweight = torch.mul(xhat, dn, out=second).sum(0) if needs_parameters else None
        outer = torch.mul(dn.float(), norm.weight, out=second)
        along = torch.linalg.vecdot(outer, xhat).unsqueeze(-1) / x.shape[-1]
        dx = torch.addcmul(outer, xhat, along, value=-1) * rstd
    return dx, dweight, None
