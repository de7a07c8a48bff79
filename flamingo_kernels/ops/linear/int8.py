"""Weights of 8 bits with a scale for each output: how they are made, and products with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as checks
from ..._backends import cpu, dispatch
from ..._predicates import is_batched, needs_grad, transform
from .products import KERNELS, by_kernel
from .reference import dequantize

MOST = 127
_LEAST_SCALE = 2.0**-100  # what is smaller has no inverse in float32
_PIECE = 2**20  # numbers of a weight that are converted at once
# On a GPU, of x: beyond so many the bytes that a kernel saves are few beside the time of its products.
# Reckoned from an H200's memory and its rate of products, and measured by nobody.
_FEW_ROWS = 64


def quantize_weight(
    weight: Tensor,  # [out, in]
) -> tuple[Tensor, Tensor]:  # int8 [out, in], float32 [out]
    """The integers and scales of a weight: `weight` is about `scale * integers`, to half a scale.

    Symmetric: the largest magnitude of a row becomes 127. A piece of the weight is converted at a time.

    Raises:
        ValueError: a number that is not finite.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for some in _pieces(weight):
        rows = weight[some].detach().float()
        largest = rows.abs().amax(1) if weight.shape[1] else rows.new_zeros(len(rows))
        if not largest.isfinite().all():
            raise ValueError("quantize_weight: expected finite numbers, got infinite ones or NaN.")
        scale[some] = (largest / MOST).clamp_min(_LEAST_SCALE)
        integers[some] = (rows / scale[some, None]).round()
    return integers, scale


def largest_error(weight: Tensor, integers: Tensor, weight_scale: Tensor) -> float:
    """The largest difference between a weight and what stands for it."""
    errors = (
        (weight[some].float() - dequantize(integers[some], weight_scale[some], torch.float32)).abs().max()
        for some in _pieces(weight)
        if weight.numel()
    )
    return max(map(float, errors), default=0.0)


def multiply(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in], int8
    weight_scale: Tensor,  # [out]
    bias: Tensor | None = None,  # [out]
    backend: str = "auto",
) -> Tensor:  # [..., out]
    """`x @ (scale * weight).T + bias`, for layers: it asks little, as a decoding step calls it often."""
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        x, *others = checks.autocast(x, *([] if bias is None else [bias]))
        bias = others[0] if others else None
    if transform():
        return _by_torch(x, weight, weight_scale, bias)
    product = _Multiply.apply if needs_grad(x, bias) else _product
    return product(x, weight, weight_scale, bias, backend)


def fastest(x: Tensor) -> str:
    """The backend whose kernel multiplies this x the fastest, or "reference": torch's product."""
    plain = type(x) in (Tensor, nn.Parameter) or not dispatch.decides_itself(x)
    if not plain or x.dtype not in dispatch.KERNEL_DTYPES or transform():
        return "reference"
    if x.is_cpu:
        return "reference" if cpu.why_not() else "cpu"
    if not x.is_cuda or x.numel() > _FEW_ROWS * x.shape[-1]:
        return "reference"
    return next((name for name in ("triton", "cuda") if not KERNELS[name].why_not(x.dtype)), "reference")


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if backend == "auto":
        backend = dispatch.default_backend
    by = fastest(x) if backend == "auto" else backend
    if by in KERNELS:
        return by_kernel(x, weight, bias, weight_scale=weight_scale, backend=by)
    return _by_torch(x, weight, weight_scale, bias)


def _by_torch(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(weight, weight_scale, x.dtype), bias)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, weight_scale, bias, backend):
        return _product(x, weight, weight_scale, bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, weight_scale, *_ = inputs
        ctx.save_for_backward(weight, weight_scale)

    @staticmethod
    def backward(ctx, dy):
        weight, weight_scale = ctx.saved_tensors
        needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
        dx = _times(dy, weight, weight_scale) if needs_x else None
        dbias = dy.flatten(0, -2).sum(0) if needs_bias and dy.ndim > 1 else dy
        return dx, None, None, dbias if needs_bias else None, None


def _times(dy: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """`dy @ (scale * weight)`, a piece of the weight at a time where no graph is kept of it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_batched(dy) or transform():
        return dy @ dequantize(weight, weight_scale, dy.dtype)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = rows.new_zeros(len(rows), weight.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    for some in _pieces(weight):
        dx += rows[:, some] @ dequantize(weight[some], weight_scale[some], dy.dtype)
    return dx.to(dy.dtype).view(*dy.shape[:-1], weight.shape[1])


def _pieces(weight: Tensor) -> Iterator[slice]:
    """Some rows after the other, of a few million numbers."""
    step = max(1, _PIECE // max(1, weight.shape[1]))
    return (slice(first, first + step) for first in range(0, len(weight), step))
