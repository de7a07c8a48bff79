"""The tanh-gated residual of Flamingo's cross-attention and feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import needs_grad
from ..once_differentiable import once_differentiable
from . import reference
from .schema import BWD, FWD

_NAME = "gated_residual"


def gated_residual(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # [1] or [D]
    *,
    backend: str = "auto",
) -> Tensor:  # [..., D]
    """Add a branch to the residual stream through a learnt gate, in one pass: `x + tanh(gate) * y`.

    Args:
        x: residual stream `[..., D]`, float32, bfloat16 or float16 (the reference takes float64 too).
        y: the branch, same shape; its dtype may differ.
        gate: alpha before tanh, 1 element (Flamingo) or D (one a channel; Idefics' vector gate).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `[..., D]` in the dtype torch's promotion gives `x + tanh(gate) * y`, contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, or a gate of another size.
        TypeError: an argument that is no dense floating-point tensor.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: any strides (a non-contiguous last dimension is copied). Computes in float32 and rounds
    once. Differentiable once in x, y and gate; the gradient of x is that of the output, uncopied. For second
    derivatives: backend="reference", which "auto" takes under torch.func's transforms and in forward mode.
    Bitwise deterministic, for any number of threads.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4.

    Example:
        >>> x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> torch.equal(gated_residual(x, y, torch.zeros(1)), x)
        True
    """
    _validate(x, y, gate)
    backend = dispatch.resolve(_NAME, backend, x, y, gate)
    if backend == "reference" or x.shape[-1] == 0:  # without a channel kernels have nothing to do
        return reference.gated_residual(x, y, gate.flatten() if gate.ndim > 1 else gate).contiguous()
    rows = checks.as_rows(x), checks.as_rows(y)
    if needs_grad(x, y, gate):
        return _GatedResidual.apply(backend, *rows, gate).view(x.shape)
    return FWD[backend](*rows, gate).view(x.shape)


def _validate(x: Tensor, y: Tensor, gate: Tensor) -> None:
    checks.expect_tensors(_NAME, x=x, y=y, gate=gate)
    if x.ndim == 0:
        raise ValueError(f"{_NAME}: expected x with shape (..., D), got ().")
    checks.expect_shape(_NAME, "y", y, tuple(x.shape), "to match x")
    if gate.numel() not in (1, x.shape[-1]) or gate.shape[:-1].numel() != 1:
        raise ValueError(
            f"{_NAME}: expected a gate of 1 or D={x.shape[-1]} elements, got {tuple(gate.shape)}."
        )
    checks.expect_floating_point(_NAME, x=x, y=y, gate=gate)
    checks.expect_same_device(_NAME, x=x, y=y, gate=gate)


dispatch.register(_NAME, sizes=lambda *_: {}, cuda={}, triton={}, cpu={}, reference={})


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, y, gate):
        ctx.save_for_backward(y, gate)
        ctx.backend, ctx.dtype = backend, x.dtype
        return FWD[backend](x, y, gate)

    @staticmethod
    @once_differentiable(_NAME)
    def backward(ctx, saved, dz):
        y, gate = saved
        dy, dgate = BWD[ctx.backend](dz, y, gate)
        return None, dz.to(ctx.dtype), dy, dgate.to(gate.dtype)
