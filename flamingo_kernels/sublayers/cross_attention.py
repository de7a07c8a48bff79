"""The cross-attention sublayer: `x + tanh(gate) * to_out(attention(to_q(norm(x)), k, v))`.

Oracle: `reference.py`. Kept for the backward pass: x, q before its own norm, the attention's output and two
numbers a row. What was normed is made again, the branch before the gate is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import dispatch
from .._checks import (
    autocast,
    expect_floating_point,
    expect_head_groups,
    expect_same_device,
    expect_shape,
    expect_tensors,
    scale_of,
    unit_stride,
    without_autocast,
)
from .._predicates import needs_grad
from ..mask import MediaMask
from ..ops.masked_cross_attention.api import expect_media
from ..ops.masked_cross_attention.schema import BWD, FWD
from ..ops.once_differentiable import once_differentiable
from . import gated_linear, normed_linear, reference
from . import norm as norms
from .gated_linear import Linear, cast_like, expect_gate, expect_linear, expect_one_dtype, tensors_of
from .labels import PROJECTIONS, in_part
from .norm import Norm, Statistics, expect_norm

_NAME = "gated_cross_attention"


@in_part(PROJECTIONS)
def gated_cross_attention(
    x: Tensor,  # [B, T, D]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    *,
    norm: Norm,
    to_q: Linear,  # [H d, D]
    to_out: Linear,  # [D, H d]
    gate: Tensor | None = None,
    q_norm: Norm | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, T, D]
    r"""Norm, queries, masked attention, output projection, gate and residual, as one node of autograd.

    ::

        q = to_q(norm(x))                       or  q_norm(to_q(norm(x))), over each head
        z = x + tanh(gate) * to_out(masked_cross_attention(q, k, v, mask))

    The gate rides on the output projection, so the branch is not stored. The backward pass makes the normed x
    again, takes the gate's gradient from the weights' (exact where the gate is 0), and multiplies nothing for
    parameters that are frozen.

    Args:
        x: the text `[B, T, D]`, float32, bfloat16 or float16.
        k: keys of the media `[B, M, R, Hkv, d]`, same dtype.
        v: values, like k.
        mask: which media each row sees.
        norm: of x, before the queries; in any floating-point dtype, as the gate and q_norm.
        to_q: `[H * d, D]`, in the dtype of x, as all projections; H is a multiple of Hkv.
        to_out: `[D, H * d]`.
        gate: alpha before tanh, 1 element or D; None for a plain residual.
        q_norm: of each head's queries, its parameters `[d]`. Default: none. The keys come normed already.
        scale: factor on the scores. Default: `d ** -0.5`.
        backend: of the attention and the gate, "auto", "triton", "cpu" or "reference"; the products are
            torch's.

    Returns:
        `[B, T, D]` in the dtype torch's promotion gives the sum.

    Raises:
        ValueError, TypeError, UnsupportedError: as `masked_cross_attention` and `gated_residual`.

    Limits: those of `masked_cross_attention`. Differentiable once in every tensor; for second derivatives:
    backend="reference", as there. As deterministic as the matrix products of torch. Under torch.autocast it
    multiplies in its dtype, keys and values too, and norms in that of x and the norm.

    Source: Flamingo (arXiv 2204.14198), sections 2.2 and 2.3.

    Example:
        >>> from flamingo_kernels import MediaMask
        >>> from flamingo_kernels.sublayers import Linear, Norm, gated_cross_attention
        >>> x, kv = torch.randn(1, 3, 32), torch.randn(2, 1, 1, 64, 2, 8)
        >>> mask = MediaMask.last_preceding(torch.tensor([[0, 1, 0]]), num_media=1)
        >>> weights = {"to_q": Linear(torch.randn(16, 32)), "to_out": Linear(torch.randn(32, 16))}
        >>> norm = Norm(torch.ones(32), torch.zeros(32))
        >>> z = gated_cross_attention(x, *kv, mask, norm=norm, **weights, gate=torch.ones(1))
        >>> torch.equal(z[:, 0], x[:, 0]), z.shape
        (True, torch.Size([1, 3, 32]))
    """
    _validate(x, k, v, mask, norm, to_q, to_out, gate, q_norm)
    (k, v), to_q, to_out = autocast(k, v), to_q.autocast(), to_out.autocast()
    expect_one_dtype(_NAME, x, {"to_q": to_q, "to_out": to_out}, k=k, v=v)
    scale = scale_of(_NAME, scale, k.shape[-1])
    parameters = (gate, norm.weight, norm.bias, *(q_norm or (None, None))[:2], *to_q, *to_out)
    backend = dispatch.resolve("masked_cross_attention", backend, x, k, v, *parameters)
    if backend == "reference" or 0 in to_q.weight.shape:  # without a feature there is nothing to fuse
        return reference.gated_cross_attention(x, k, v, mask, norm, to_q, to_out, gate, q_norm, scale)
    of_q = (q_norm.eps, q_norm.rms) if q_norm else None
    how = _How(backend, scale, mask.immediate, mask.policy == "open_flamingo", norm.eps, norm.rms, of_q)
    tensors = _Tensors(x, unit_stride(k), unit_stride(v), *mask.spans, *parameters)
    with without_autocast(x):
        if needs_grad(*tensors):
            return _GatedCrossAttention.apply(how, *tensors)
        return _forward(how, tensors)[0]


def _validate(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MediaMask,
    norm: Norm,
    to_q: Linear,
    to_out: Linear,
    gate: Tensor | None,
    q_norm: Norm | None,
) -> None:
    expect_tensors(_NAME, x=x, k=k, v=v)
    expect_shape(_NAME, "x", x, ("B", "T", "D"), "")
    batch, length, width = x.shape
    expect_media(_NAME, k, v, mask, (batch, length, "d"), of="x")
    expect_norm(_NAME, "norm", norm, width)
    expect_linear(_NAME, "to_q", to_q, ("H * d", width), "to match x")
    inner, head_dim = to_q.weight.shape[0], k.shape[-1]
    if head_dim == 0 or inner % head_dim:
        raise ValueError(
            f"{_NAME}: expected to_q.weight to give a multiple of head_dim={head_dim} features, got {inner}."
        )
    expect_head_groups(_NAME, inner // head_dim, k.shape[3])
    expect_linear(_NAME, "to_out", to_out, (width, inner), "to match to_q.weight")
    expect_gate(_NAME, gate, width)
    if q_norm is not None:
        expect_norm(_NAME, "q_norm", q_norm, head_dim)
    parts = tensors_of(norm=norm, to_q=to_q, to_out=to_out, q_norm=q_norm)
    expect_floating_point(_NAME, x=x, k=k, v=v, **parts, gate=gate)
    expect_same_device(_NAME, x=x, k=k, v=v, mask=mask.lo, **parts, gate=gate)


@dataclass(frozen=True)
class _How:
    """What is no tensor."""

    backend: str
    scale: float
    immediate: bool
    averages: bool
    eps: float
    rms: bool
    q_norm: tuple[float, bool] | None  # eps and rms of the norm of q


class _Tensors(NamedTuple):
    """What goes in, or which of it wants a gradient, or its gradients."""

    x: Any
    k: Any
    v: Any
    lo: Any
    hi: Any
    start: Any
    stop: Any
    gate: Any
    norm_weight: Any
    norm_bias: Any
    q_norm_weight: Any
    q_norm_bias: Any
    q_weight: Any
    q_bias: Any
    out_weight: Any
    out_bias: Any

    @property
    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lo, self.hi, self.start, self.stop

    @property
    def to_q(self) -> Linear:
        return Linear(self.q_weight, self.q_bias)

    @property
    def to_out(self) -> Linear:
        return Linear(self.out_weight, self.out_bias)

    def norm(self, how: _How) -> Norm:
        return Norm(self.norm_weight, self.norm_bias, how.eps, how.rms)

    def q_norm(self, how: _How) -> Norm | None:
        return Norm(self.q_norm_weight, self.q_norm_bias, *how.q_norm) if how.q_norm else None


def _forward(how: _How, t: _Tensors) -> tuple[Any, ...]:
    """z, and what the backward pass needs besides the tensors."""
    batch, length, width = t.x.shape
    x = t.x.reshape(-1, width)
    (u,), statistics = normed_linear.forward(x, t.norm(how), [t.to_q])
    head_dim = t.k.shape[-1]
    u = u.view(batch, length, len(t.q_weight) // head_dim, head_dim)
    q, of_q = _queries(u, t.q_norm(how))
    attend = FWD[how.backend]
    out, softmax = attend(q, t.k, t.v, *t.spans, how.immediate, how.averages, how.scale)
    z = gated_linear.forward(x, out.flatten(2).flatten(0, 1), t.to_out, t.gate, how.backend)
    return z.view(t.x.shape), u, out, softmax, *statistics, *of_q


def _queries(u: Tensor, norm: Norm | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """q of what its projection gives, `[B, T, H, d]`, and the statistics of its norm if it has one."""
    if norm is None:
        return u, ()
    q, statistics = norms.forward(u.flatten(0, 2), norm)
    return q.to(u.dtype).view(u.shape), statistics


class _GatedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, *tensors):
        z, *kept = _forward(how, _Tensors(*tensors))
        ctx.save_for_backward(*tensors, *kept)
        ctx.how, ctx.backend = how, how.backend
        return z

    @staticmethod
    @once_differentiable(_NAME, batched=False)
    def backward(ctx, saved, dz):
        how, wanted = ctx.how, _Tensors(*ctx.needs_input_grad[1:])
        size = len(_Tensors._fields)
        t = _Tensors(*saved[:size])
        u, out, softmax, mean, rstd, *of_q = saved[size:]
        q_norm = t.q_norm(how)
        x, dz = (unit_stride(each.reshape(-1, each.shape[-1])) for each in (t.x, dz))

        last = gated_linear.backward(
            dz,
            out.flatten(2).flatten(0, 1),
            t.to_out,
            t.gate,
            how.backend,
            of_weights=wanted.out_weight,
            of_gate=wanted.gate,
        )
        attend = BWD[how.backend]
        options = (how.immediate, how.averages, how.scale)
        dout = last.a.view(out.shape)
        q, _ = _queries(u, q_norm)
        du, dk, dv = attend(dout, q, t.k, t.v, out, softmax, *t.spans, *options)
        of_q_norm: list[Any] = [None, None]
        if q_norm:
            du, *of_q_norm = norms.backward(
                du.flatten(0, 2), u.flatten(0, 2), q_norm, Statistics(*of_q), wanted.q_norm_weight
            )
        first = normed_linear.backward(
            [du.to(u.dtype).view(len(x), len(t.q_weight))],
            dz,
            x,
            t.norm(how),
            Statistics(mean, rstd),
            [t.to_q],
            of_x=wanted.x,
            of_norm=wanted.norm_weight,
            of_linears=[wanted.q_weight],
        )
        dx = None if first.x is None else first.x.view(t.x.shape)
        parameters = (last.gate, *first.norm, *of_q_norm, *first.linears[0], *last.linear)
        gradients = _Tensors(dx, dk, dv, None, None, None, None, *parameters)
        return None, *(cast_like(each, of) for each, of in zip(gradients, t, strict=True))
