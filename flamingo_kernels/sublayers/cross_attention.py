"""The cross-attention sublayer: `x + tanh(gate) * to_out(attention(to_q(norm(x)), k, v))`.

Oracle: `reference.py`. The backward pass keeps x, q before its own norm, the attention's output and two
numbers a row. It computes the normed x again; the branch before the gate is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import dispatch
from .._checks import (
    autocast,
    expect_floating_point,
    expect_head_groups,
    expect_same_device,
    expect_scale,
    expect_shape,
    expect_tensors,
    unit_stride,
    without_autocast,
)
from .._labels import PROJECTIONS, labelled
from .._predicates import needs_grad
from ..mask import MediaMask
from ..ops.masked_cross_attention.api import expect_media
from ..ops.masked_cross_attention.schema import BWD, FWD
from ..ops.once_differentiable import once_differentiable
from ..ops.weights import Linear, Norm, expect_gate, expect_linear, expect_norm, named_parameters
from . import gated_linear, normed_linear, reference
from . import norm as norms
from .arguments import CrossAttention
from .gated_linear import expect_one_dtype
from .gradients import in_order, learns, pair, unpack
from .norm import Statistics

_NAME = "gated_cross_attention"


@labelled(PROJECTIONS)
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

    The output projection applies the gate, so the branch is not stored. The backward pass computes the normed
    x again, takes the gate's gradient from the weights' (exact where the gate is 0), and skips the products
    of frozen parameters.

    Args:
        x: the text `[B, T, D]`, float32, bfloat16 or float16.
        k: keys of the media `[B, M, R, Hkv, d]`, same dtype.
        v: values, like k.
        mask: which media each row sees.
        norm: norm of x, before the queries; in any floating-point dtype, as the gate and q_norm.
        to_q: `[H * d, D]`, in the dtype of x, as all projections; H is a multiple of Hkv.
        to_out: `[D, H * d]`.
        gate: alpha before tanh, 1 element or D; None for a plain residual.
        q_norm: norm of each head's queries, its parameters `[d]`. Default: none. The keys come normed
            already.
        scale: factor on the scores. Default: `d ** -0.5`.
        backend: what computes the attention and the gate, "auto", "triton", "cpu" or "reference"; the matrix
            products are torch's.

    Returns:
        `[B, T, D]` in the dtype torch's promotion gives the sum.

    Raises:
        ValueError, TypeError, UnsupportedError: as `masked_cross_attention` and `gated_residual`.

    Limits: those of `masked_cross_attention`. Differentiable once in every tensor; for second derivatives:
    backend="reference", as there. As deterministic as the matrix products of torch. Under torch.autocast all
    products take its dtype, keys and values too; norms take the wider dtype of x and their parameters.

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
    _validate(x, k, v, mask, gate, CrossAttention(norm, to_q, to_out, q_norm))
    (k, v), to_q, to_out = autocast(k, v), to_q.autocast(), to_out.autocast()
    expect_one_dtype(_NAME, x, {"to_q": to_q, "to_out": to_out}, k=k, v=v)
    scale = expect_scale(_NAME, scale, k.shape[-1])
    parameters = (gate, norm.weight, norm.bias, *(q_norm or (None, None))[:2], *to_q[:2], *to_out[:2])
    backend = dispatch.resolve("masked_cross_attention", backend, x, k, v, *parameters)
    if backend == "reference" or 0 in to_q.weight.shape:  # without a feature there is nothing to fuse
        weights = CrossAttention(norm, to_q, to_out, q_norm)
        return reference.gated_cross_attention(x, k, v, mask, gate, weights, scale)
    options = _Options(
        backend,
        scale,
        immediate=mask.immediate,
        averages=mask.policy == "open_flamingo",
        norm=(norm.eps, norm.rms),
        q_norm=(q_norm.eps, q_norm.rms) if q_norm else None,
    )
    inputs = _Inputs(unit_stride(x), unit_stride(k), unit_stride(v), *mask.spans, *parameters)
    with without_autocast(x):
        if needs_grad(*inputs):
            return _GatedCrossAttention.apply(options, *inputs)
        return _forward(options, inputs)[0]


def _validate(
    x: Tensor, k: Tensor, v: Tensor, mask: MediaMask, gate: Tensor | None, weights: CrossAttention
) -> None:
    norm, to_q, to_out, q_norm = weights
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
    expect_gate(_NAME, "gate", gate, width)
    if q_norm is not None:
        expect_norm(_NAME, "q_norm", q_norm, head_dim)
    parameters = named_parameters(norm=norm, to_q=to_q, to_out=to_out, q_norm=q_norm)
    expect_floating_point(_NAME, x=x, k=k, v=v, **parameters, gate=gate)
    expect_same_device(_NAME, x=x, k=k, v=v, mask=mask.lo, **parameters, gate=gate)


@dataclass(frozen=True)
class _Options:
    """The arguments that are not tensors."""

    backend: str
    scale: float
    immediate: bool
    averages: bool
    norm: tuple[float, bool]  # eps and rms
    q_norm: tuple[float, bool] | None


class _Inputs(NamedTuple):
    """The tensors, in the order in which autograd passes them and takes their gradients."""

    x: Tensor
    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor
    start: Tensor
    stop: Tensor
    gate: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor | None
    q_norm_weight: Tensor | None
    q_norm_bias: Tensor | None
    q_weight: Tensor
    q_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None

    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lo, self.hi, self.start, self.stop

    def to_q(self) -> Linear:
        return Linear(self.q_weight, self.q_bias)

    def to_out(self) -> Linear:
        return Linear(self.out_weight, self.out_bias)

    def norm(self, options: _Options) -> Norm:
        return Norm(self.norm_weight, self.norm_bias, *options.norm)

    def q_norm(self, options: _Options) -> Norm | None:
        if options.q_norm is None or self.q_norm_weight is None:
            return None
        return Norm(self.q_norm_weight, self.q_norm_bias, *options.q_norm)


def _forward(options: _Options, t: _Inputs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """z, and what the backward pass needs besides the inputs."""
    batch, length, _ = t.x.shape
    x = t.x.flatten(0, -2)
    (u,), statistics = normed_linear.forward(x, t.norm(options), [t.to_q()])
    head_dim = t.k.shape[-1]
    u = u.view(batch, length, len(t.q_weight) // head_dim, head_dim)
    q, q_statistics = _queries(u, t.q_norm(options))
    attend = FWD[options.backend]
    out, softmax = attend(q, t.k, t.v, *t.spans(), options.immediate, options.averages, options.scale)
    z = gated_linear.forward(x, out.flatten(2).flatten(0, 1), t.to_out(), t.gate, options.backend)
    return z.view(t.x.shape), (u, out, softmax, *statistics, *q_statistics)


def _queries(u: Tensor, norm: Norm | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The queries from their projection u `[B, T, H, d]`, and the statistics of their norm, if any."""
    if norm is None:
        return u, ()
    q, statistics = norms.forward(u.flatten(0, 2), norm)
    return q.to(u.dtype).view(u.shape), statistics


class _GatedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *tensors):
        z, kept = _forward(options, _Inputs(*tensors))
        ctx.save_for_backward(*tensors, *kept)
        ctx.options, ctx.backend = options, options.backend
        return z

    @staticmethod
    @once_differentiable(_NAME, batched=False)
    def backward(ctx, saved, dz):
        options = ctx.options
        t, needed, kept = unpack(_Inputs, ctx, saved)
        u, out, softmax, mean, rstd, *q_statistics = kept
        q_norm = t.q_norm(options)
        x, dz = t.x.flatten(0, -2), dz.flatten(0, -2)

        last = gated_linear.backward(
            dz,
            out.flatten(2).flatten(0, 1),
            t.to_out(),
            t.gate,
            options.backend,
            needs_weight=needed["out_weight"],
            needs_bias=needed["out_bias"],
            needs_gate=needed["gate"],
        )
        attend = BWD[options.backend]
        dout = last.a.view(out.shape)
        q, _ = _queries(u, q_norm)
        du, dk, dv = attend(
            *(dout, q, t.k, t.v, out, softmax, *t.spans()),
            *(options.immediate, options.averages, options.scale),
        )
        dq_norm: list[Tensor | None] = [None, None]
        if q_norm:
            du, *dq_norm = norms.backward(
                du.flatten(0, 2), u.flatten(0, 2), q_norm, Statistics(*q_statistics), learns("q_norm", needed)
            )
        first = normed_linear.backward(
            [du.to(u.dtype).view(len(x), len(t.q_weight))],
            dz,
            x,
            t.norm(options),
            Statistics(mean, rstd),
            [t.to_q()],
            needs_x=needed["x"],
            needs_norm=learns("norm", needed),
            needs_weights=[needed["q_weight"]],
            needs_biases=[needed["q_bias"]],
        )
        gradients = {
            "x": None if first.x is None else first.x.view(t.x.shape),
            **{"k": dk, "v": dv, "gate": last.gate},
            **pair("norm", first.norm),
            **pair("q_norm", dq_norm),
            **pair("q", first.linears[0]),
            **pair("out", last.linear),
        }
        return None, *in_order(t, gradients)
