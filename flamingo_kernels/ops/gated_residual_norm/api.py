"""The tanh-gated residual and the norm that follows it, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import needs_grad
from ..gated_residual.api import expect_branch
from ..once_differentiable import once_differentiable
from . import reference
from .schema import BWD, FWD

_NAME = "gated_residual_norm"
_WIDEST = 32768  # D that a Triton program holds in one piece
_WIDEST_OF_CUDA = 24576  # D that fits in float32 into the shared memory of every device


def gated_residual_norm(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # [1] or [D]
    weight: Tensor,  # [D]
    bias: Tensor | None = None,  # [D]
    *,
    eps: float = 1e-5,
    norm: Literal["layer", "rms"] = "layer",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [..., D], [..., D]
    """Gate a branch into the residual stream and normalise the sum for the next layer, in one pass::

        z = x + tanh(gate) * y
        n = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias         norm="layer"
        n = z / sqrt(mean(z ** 2) + eps) * weight                      norm="rms"

    Args:
        x: residual stream `[..., D]`, float32, bfloat16 or float16 (the reference takes float64 too).
        y: the branch, same shape; its dtype may differ.
        gate: alpha before tanh, 1 element or D.
        weight: scale of the norm `[D]`.
        bias: offset of the LayerNorm `[D]`, or None. Default: None.
        eps: added to the variance. Default: 1e-5.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm, without bias). Default: "layer".
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(z, n)`, both `[..., D]` in the dtype torch's promotion gives `x + tanh(gate) * y`. n is the norm
        of z as rounded to that dtype.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown norm, a bias with norm="rms", eps < 0.
        TypeError: an argument that is no dense floating-point tensor, or an eps that is no number.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: triton takes D up to 32768; any strides (a non-contiguous last dimension is copied). Computes in
    float32. Differentiable once in x, y, gate, weight and bias; for second derivatives: backend="reference",
    which "auto" takes under torch.func's transforms and in forward mode. Bitwise deterministic, for any
    number of threads.

    Source: Flamingo (arXiv 2204.14198), section 2.2; RMSNorm: arXiv 1910.07467.

    Example:
        >>> x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> z, n = gated_residual_norm(x, y, torch.ones(1), torch.ones(16))
        >>> n.mean(-1).abs().max().item() < 1e-6
        True
    """
    _validate(x, y, gate, weight, bias, norm)
    eps = checks.expect_number(_NAME, "eps", eps, least=0)
    backend = dispatch.resolve(_NAME, backend, x, y, gate, weight, bias)
    if backend == "reference" or x.shape[-1] == 0:  # without a channel kernels have nothing to do
        gate = gate.flatten() if gate.ndim > 1 else gate
        z, n = reference.gated_residual_norm(x, y, gate, weight, bias, eps, norm)
        return z.contiguous(), n.contiguous()
    inputs = (checks.as_rows(x), checks.as_rows(y), gate, weight, bias, eps, norm == "rms")
    if needs_grad(x, y, gate, weight, bias):
        z, n = _GatedResidualNorm.apply(backend, *inputs)
    else:
        z, n, *_ = FWD[backend](*inputs)
    return z.view(x.shape), n.view(x.shape)


def _validate(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, norm: str) -> None:
    expect_branch(_NAME, x, y, gate)
    if norm not in ("layer", "rms"):
        raise ValueError(f"{_NAME}: norm={norm!r} is not one of 'layer', 'rms'.")
    checks.expect_tensors(_NAME, weight=weight, **({} if bias is None else {"bias": bias}))
    checks.expect_shape(_NAME, "weight", weight, (x.shape[-1],), "to match x[..., D]")
    if bias is not None:
        if norm == "rms":
            raise ValueError(f"{_NAME}: expected no bias with norm='rms', got {tuple(bias.shape)}.")
        checks.expect_shape(_NAME, "bias", bias, (x.shape[-1],), "to match x[..., D]")
    checks.expect_floating_point(_NAME, weight=weight, bias=bias)
    checks.expect_same_device(_NAME, x=x, weight=weight, bias=bias)


dispatch.register(
    _NAME,
    sizes=lambda x, *_: {"D": x.shape[-1]},
    cuda={"D": _WIDEST_OF_CUDA},
    triton={"D": _WIDEST},
    cpu={},
    reference={},
)


class _GatedResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, y, gate, weight, bias, eps, rms):
        z, n, mean, rstd = FWD[backend](x, y, gate, weight, bias, eps, rms)
        ctx.save_for_backward(y, gate, weight, z, mean, rstd)
        ctx.backend, ctx.rms, ctx.dtype = backend, rms, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return z, n

    @staticmethod
    @once_differentiable(_NAME)
    def backward(ctx, saved, dz, dn):
        _, gate, weight, *_ = saved
        dx, dy, dgate, dweight, dbias = BWD[ctx.backend](dz, dn, *saved, ctx.rms)
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return None, dx.to(ctx.dtype), dy, dgate.to(gate.dtype), dweight.to(weight.dtype), dbias, None, None
