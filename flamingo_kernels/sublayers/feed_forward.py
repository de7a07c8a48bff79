"""The feed-forward sublayer: `x + tanh(gate) * output(act(hidden(norm(x))))`.

Oracle: `reference.py`. Kept for the backward pass: x, what goes into the activation and two numbers a row.
The normed x and the activation are made again, the branch before the gate is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import dispatch
from .._checks import (
    as_rows,
    expect_floating_point,
    expect_same_device,
    expect_tensors,
    unit_stride,
    without_autocast,
)
from .._predicates import needs_grad
from ..ops.once_differentiable import once_differentiable
from . import gated_linear, normed_linear, reference
from .activation import ACTIVATIONS
from .gated_linear import Linear, cast_like, expect_gate, expect_linear, expect_one_dtype, tensors_of
from .labels import FEED_FORWARD, in_part
from .norm import Norm, Statistics, expect_norm
from .scratch import scratch

_NAME = "gated_feed_forward"


@in_part(FEED_FORWARD)
def gated_feed_forward(
    x: Tensor,  # [..., D]
    *,
    norm: Norm,
    hidden: Linear,  # [F, D]
    output: Linear,  # [D, F]
    gate: Tensor | None = None,
    activation: str = "gelu",
    factor: Linear | None = None,  # [F, D]
    backend: str = "auto",
) -> Tensor:  # [..., D]
    r"""Norm, hidden layer, activation, output layer, gate and residual, as one node of autograd.

    ::

        n = norm(x)
        h = act(hidden(n))                      or  act(hidden(n)) * factor(n), a gated linear unit
        z = x + tanh(gate) * output(h)

    The gate rides on the output layer, so the branch is not stored. The backward pass makes n and h again,
    takes the gate's gradient from the weights' (exact where the gate is 0), and multiplies nothing for
    parameters that are frozen.

    Args:
        x: `[..., D]`, float32, bfloat16 or float16.
        norm: of x, before the hidden layer; in any floating-point dtype, as the gate.
        hidden: `[F, D]`, in the dtype of x, as all projections.
        output: `[D, F]`.
        gate: alpha before tanh, 1 element or D; None for a plain residual, `x + output(h)`.
        activation: "gelu" (erf), "gelu_tanh", "relu", "squared_relu" or "silu".
        factor: `[F, D]`, for a gated linear unit; "silu" with it is SwiGLU.
        backend: of the gate, "auto", "triton", "cpu" or "reference"; the products are torch's.

    Returns:
        `[..., D]` in the dtype torch's promotion gives the sum.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: parts that are no Norm, Linear or dense floating-point tensor; projections in another dtype
            than x, without autocast.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: differentiable once in every tensor; for second derivatives: backend="reference", which "auto"
    takes under torch.func's transforms and in forward mode. As deterministic as the matrix products of torch.
    Under torch.autocast it multiplies in its dtype, and norms in that of x and the norm. On a CPU a thread
    keeps memory for one hidden layer from call to call.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4; SwiGLU: arXiv 2002.05202.

    Example:
        >>> from flamingo_kernels.sublayers import Linear, Norm, gated_feed_forward
        >>> layers = {"hidden": Linear(torch.randn(64, 16)), "output": Linear(torch.randn(16, 64))}
        >>> x, norm = torch.randn(2, 5, 16), Norm(torch.ones(16), torch.zeros(16))
        >>> torch.equal(gated_feed_forward(x, norm=norm, **layers, gate=torch.zeros(1)), x)
        True
    """
    _validate(x, norm, hidden, output, factor, gate, activation)
    hidden, output, factor = hidden.autocast(), output.autocast(), factor and factor.autocast()
    expect_one_dtype(_NAME, x, {"hidden": hidden, "output": output, "factor": factor})
    parameters = (gate, norm.weight, norm.bias, *hidden, *output, *(factor or (None, None)))
    backend = dispatch.resolve("gated_residual", backend, x, *parameters)
    if backend == "reference" or 0 in hidden.weight.shape:  # without a feature there is nothing to fuse
        return reference.gated_feed_forward(x, norm, hidden, output, gate, activation, factor)
    how = _How(backend, activation, norm.eps, norm.rms)
    tensors = _Tensors(as_rows(x), *parameters)
    with without_autocast(x):
        run = _GatedFeedForward.apply if needs_grad(*tensors) else _infer
        return run(how, *tensors).view(x.shape)


def _validate(
    x: Tensor,
    norm: Norm,
    hidden: Linear,
    output: Linear,
    factor: Linear | None,
    gate: Tensor | None,
    activation: str,
) -> None:
    if activation not in tuple(ACTIVATIONS):
        raise ValueError(
            f"{_NAME}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    expect_tensors(_NAME, x=x)
    if x.ndim == 0:
        raise ValueError(f"{_NAME}: expected x with shape (..., D), got ().")
    width = x.shape[-1]
    expect_norm(_NAME, "norm", norm, width)
    expect_linear(_NAME, "hidden", hidden, ("F", width), "to match x")
    inner = hidden.weight.shape[0]
    expect_linear(_NAME, "output", output, (width, inner), "to match hidden.weight")
    if factor is not None:
        expect_linear(_NAME, "factor", factor, (inner, width), "to match hidden.weight")
    expect_gate(_NAME, gate, width)
    parts = tensors_of(norm=norm, hidden=hidden, output=output, factor=factor)
    expect_floating_point(_NAME, x=x, **parts, gate=gate)
    expect_same_device(_NAME, x=x, **parts, gate=gate)


@dataclass(frozen=True)
class _How:
    """What is no tensor."""

    backend: str
    activation: str
    eps: float
    rms: bool


class _Tensors(NamedTuple):
    """What goes in, or which of it wants a gradient, or its gradients."""

    x: Any
    gate: Any
    norm_weight: Any
    norm_bias: Any
    hidden_weight: Any
    hidden_bias: Any
    output_weight: Any
    output_bias: Any
    factor_weight: Any
    factor_bias: Any

    @property
    def hidden(self) -> list[Linear]:
        """The projections that read the norm: one, or two of a gated linear unit."""
        both = [Linear(self.hidden_weight, self.hidden_bias), Linear(self.factor_weight, self.factor_bias)]
        return both if self.factor_weight is not None else both[:1]

    @property
    def output(self) -> Linear:
        return Linear(self.output_weight, self.output_bias)

    def norm(self, how: _How) -> Norm:
        return Norm(self.norm_weight, self.norm_bias, how.eps, how.rms)


def _infer(how: _How, *tensors: Tensor | None) -> Tensor:
    """z, with the hidden layer in scratch memory."""
    t = _Tensors(*tensors)
    with scratch(len(t.x), len(t.hidden_weight), like=t.hidden_weight) as u:
        us, _ = normed_linear.forward(t.x, t.norm(how), t.hidden, into=u)
        return gated_linear.forward(t.x, _activate(how, us, into=us[0]), t.output, t.gate, how.backend)


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, *tensors):
        t = _Tensors(*tensors)
        us, statistics = normed_linear.forward(t.x, t.norm(how), t.hidden)
        ctx.save_for_backward(*tensors, *statistics, *us)
        ctx.how, ctx.backend = how, how.backend
        with scratch(*us[0].shape, like=us[0]) as h:
            return gated_linear.forward(t.x, _activate(how, us, into=h), t.output, t.gate, how.backend)

    @staticmethod
    @once_differentiable(_NAME, batched=False)
    def backward(ctx, saved, dz):
        how, wanted = ctx.how, _Tensors(*ctx.needs_input_grad[1:])
        size = len(_Tensors._fields)
        t = _Tensors(*saved[:size])
        mean, rstd, *us = saved[size:]
        dz = unit_stride(dz)

        with scratch(*us[0].shape, like=us[0]) as h:
            last = gated_linear.backward(
                dz,
                _activate(how, us, into=h),
                t.output,
                t.gate,
                how.backend,
                of_weights=wanted.output_weight,
                of_gate=wanted.gate,
                into=h,
            )
            first = normed_linear.backward(
                _activate_backward(how, last.a, us),
                dz,
                t.x,
                t.norm(how),
                Statistics(mean, rstd),
                t.hidden,
                of_x=wanted.x,
                of_norm=wanted.norm_weight,
                of_linears=[wanted.hidden_weight, wanted.factor_weight][: len(us)],
            )
        of_factor = first.linears[1] if len(us) > 1 else (None, None)
        gradients = _Tensors(first.x, last.gate, *first.norm, *first.linears[0], *last.linear, *of_factor)
        return None, *(cast_like(each, of) for each, of in zip(gradients, t, strict=True))


def _activate(how: _How, us: list[Tensor], into: Tensor | None) -> Tensor:
    """`act(u)`, or `act(u) * factor`, into a tensor, which may be u, or into a new one."""
    activation = ACTIVATIONS[how.activation]
    h = activation.eager(us[0]) if into is None else activation.forward(us[0], into)
    return h.mul_(us[1]) if len(us) > 1 else h


def _activate_backward(how: _How, dh: Tensor, us: list[Tensor]) -> list[Tensor]:
    """The gradients of what `_activate` read, the first in the memory of dh."""
    activation = ACTIVATIONS[how.activation]
    if len(us) == 1:
        return [activation.backward(dh, us[0])]
    dfactor = activation.eager(us[0]).mul_(dh)
    return [activation.backward(dh.mul_(us[1]), us[0]), dfactor]
