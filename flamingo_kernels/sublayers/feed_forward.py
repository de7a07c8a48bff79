"""The feed-forward sublayer: `x + tanh(gate) * down(act(up(norm(x))))`.

Oracle: `reference.py`. The backward pass keeps x, the input of the activation and two numbers a row. It
computes the normed x and the activation again; the branch before the gate is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import dispatch
from .._checks import (
    as_rows,
    expect_floating_point,
    expect_same_device,
    expect_tensors,
    without_autocast,
)
from .._labels import FEED_FORWARD, labelled
from .._predicates import needs_grad
from ..ops.once_differentiable import once_differentiable
from ..ops.weights import Linear, Norm, expect_gate, expect_linear, expect_norm, named_parameters
from . import gated_linear, normed_linear, reference
from .activation import ACTIVATIONS
from .gated_linear import expect_one_dtype
from .gradients import in_order, learns, pair, unpack
from .norm import Statistics
from .scratch import scratch

_NAME = "gated_feed_forward"


@labelled(FEED_FORWARD)
def gated_feed_forward(
    x: Tensor,  # [..., D]
    *,
    norm: Norm,
    up: Linear,  # [F, D]
    down: Linear,  # [D, F]
    gate: Tensor | None = None,
    activation: str = "gelu",
    gate_proj: Linear | None = None,  # [F, D]
    backend: str = "auto",
) -> Tensor:  # [..., D]
    r"""Norm, hidden layer, activation, output layer, gate and residual, as one node of autograd.

    ::

        n = norm(x)
        h = act(up(n))                          or  act(gate_proj(n)) * up(n), a gated linear unit
        z = x + tanh(gate) * down(h)

    The last projection applies the gate, so the branch is not stored. The backward pass computes n and h
    again, takes the gate's gradient from the weights' (exact where the gate is 0), and skips the products of
    frozen parameters.

    Args:
        x: `[..., D]`, float32, bfloat16 or float16.
        norm: norm of x, before the hidden layer; in any floating-point dtype, as the gate.
        up: `[F, D]`, in the dtype of x, as all projections.
        down: `[D, F]`.
        gate: alpha before tanh, 1 element or D; None for a plain residual, `x + down(h)`.
        activation: "gelu" (erf), "gelu_tanh", "relu", "squared_relu" or "silu".
        gate_proj: `[F, D]`, for a gated linear unit; with "silu" that is SwiGLU. Default: none.
        backend: what computes the gate, "auto", "triton", "cpu" or "reference"; the matrix products are
            torch's.

    Returns:
        `[..., D]` in the dtype torch's promotion gives the sum.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: arguments that are no Norm, Linear or dense floating-point tensor; projections in another
            dtype than x, without autocast.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: differentiable once in every tensor; for second derivatives: backend="reference", which "auto"
    takes under torch.func's transforms and in forward mode. As deterministic as the matrix products of torch.
    Under torch.autocast all products take its dtype; norms take the wider dtype of x and their parameters. On
    a CPU a thread keeps memory for one hidden layer from call to call.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4; SwiGLU: arXiv 2002.05202.

    Example:
        >>> from flamingo_kernels.sublayers import Linear, Norm, gated_feed_forward
        >>> layers = {"up": Linear(torch.randn(64, 16)), "down": Linear(torch.randn(16, 64))}
        >>> x, norm = torch.randn(2, 5, 16), Norm(torch.ones(16), torch.zeros(16))
        >>> torch.equal(gated_feed_forward(x, norm=norm, **layers, gate=torch.zeros(1)), x)
        True
    """
    _validate(x, norm, up, down, gate_proj, gate, activation)
    up, down, gate_proj = up.autocast(), down.autocast(), gate_proj and gate_proj.autocast()
    expect_one_dtype(_NAME, x, {"up": up, "down": down, "gate_proj": gate_proj})
    parameters = (gate, norm.weight, norm.bias, *up[:2], *down[:2], *(gate_proj or (None, None))[:2])
    backend = dispatch.resolve("gated_residual", backend, x, *parameters)
    if backend == "reference" or 0 in up.weight.shape:  # without a feature there is nothing to fuse
        return reference.gated_feed_forward(x, norm, up, down, gate, activation, gate_proj)
    options = _Options(backend, activation, (norm.eps, norm.rms))
    inputs = _Inputs(as_rows(x), *parameters)
    with without_autocast(x):
        if needs_grad(*inputs):
            return _GatedFeedForward.apply(options, *inputs).view(x.shape)
        return _infer(options, inputs).view(x.shape)


def _validate(
    x: Tensor,
    norm: Norm,
    up: Linear,
    down: Linear,
    gate_proj: Linear | None,
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
    expect_linear(_NAME, "up", up, ("F", width), "to match x")
    inner = up.weight.shape[0]
    expect_linear(_NAME, "down", down, (width, inner), "to match up.weight")
    if gate_proj is not None:
        expect_linear(_NAME, "gate_proj", gate_proj, (inner, width), "to match up.weight")
    expect_gate(_NAME, "gate", gate, width)
    parameters = named_parameters(norm=norm, up=up, down=down, gate_proj=gate_proj)
    expect_floating_point(_NAME, x=x, **parameters, gate=gate)
    expect_same_device(_NAME, x=x, **parameters, gate=gate)


@dataclass(frozen=True)
class _Options:
    """The arguments that are not tensors."""

    backend: str
    activation: str
    norm: tuple[float, bool]  # eps and rms


class _Inputs(NamedTuple):
    """The tensors, in the order in which autograd passes them and takes their gradients.

    What is made of them is a method each: torch 2.10 traces no property of a NamedTuple.
    """

    x: Tensor
    gate: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    gate_proj_weight: Tensor | None
    gate_proj_bias: Tensor | None

    def hidden(self) -> dict[str, Linear]:
        """The projections that read the norm by name, first the one whose result is activated."""
        linears = {"up": Linear(self.up_weight, self.up_bias)}
        if self.gate_proj_weight is None:
            return linears
        return {"gate_proj": Linear(self.gate_proj_weight, self.gate_proj_bias), **linears}

    def down(self) -> Linear:
        return Linear(self.down_weight, self.down_bias)

    def norm(self, options: _Options) -> Norm:
        return Norm(self.norm_weight, self.norm_bias, *options.norm)


def _infer(options: _Options, t: _Inputs) -> Tensor:
    """z, with the hidden layer in scratch memory."""
    with scratch(len(t.x), len(t.up_weight), like=t.up_weight) as memory:
        us, _ = normed_linear.forward(t.x, t.norm(options), [*t.hidden().values()], into=memory)
        h = _activate(options.activation, us, into=us[0])
        return gated_linear.forward(t.x, h, t.down(), t.gate, options.backend)


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *tensors):
        t = _Inputs(*tensors)
        us, statistics = normed_linear.forward(t.x, t.norm(options), [*t.hidden().values()])
        ctx.save_for_backward(*tensors, *statistics, *us)
        ctx.options, ctx.backend = options, options.backend
        with scratch(*us[0].shape, like=us[0]) as memory:
            h = _activate(options.activation, us, into=memory)
            return gated_linear.forward(t.x, h, t.down(), t.gate, options.backend)

    @staticmethod
    @once_differentiable(_NAME, batched=False)
    def backward(ctx, saved, dz):
        options = ctx.options
        t, needed, (mean, rstd, *us) = unpack(_Inputs, ctx, saved)

        with scratch(*us[0].shape, like=us[0]) as memory:
            last = gated_linear.backward(
                dz,
                _activate(options.activation, us, into=memory),
                t.down(),
                t.gate,
                options.backend,
                needs_weight=needed["down_weight"],
                needs_bias=needed["down_bias"],
                needs_gate=needed["gate"],
                into=memory,
            )
            first = normed_linear.backward(
                _activate_backward(options.activation, last.a, us),
                dz,
                t.x,
                t.norm(options),
                Statistics(mean, rstd),
                [*t.hidden().values()],
                needs_x=needed["x"],
                needs_norm=learns("norm", needed),
                needs_weights=[needed[f"{name}_weight"] for name in t.hidden()],
                needs_biases=[needed[f"{name}_bias"] for name in t.hidden()],
            )
        gradients = {
            "x": first.x,
            "gate": last.gate,
            **pair("norm", first.norm),
            **pair("down", last.linear),
        }
        for name, linear in zip(t.hidden(), first.linears, strict=True):
            gradients |= pair(name, linear)
        return None, *in_order(t, gradients)


def _activate(activation: str, us: list[Tensor], into: Tensor | None) -> Tensor:
    """`act(up)`, or `act(gate_proj) * up`, into a tensor, which may be the first, or into a new one."""
    act = ACTIVATIONS[activation]
    h = act.eager(us[0]) if into is None else act.forward(us[0], into)
    return h.mul_(us[1]) if len(us) > 1 else h


def _activate_backward(activation: str, dh: Tensor, us: list[Tensor]) -> list[Tensor]:
    """The gradients of what `_activate` read, the first in the memory of dh."""
    act = ACTIVATIONS[activation]
    if len(us) == 1:
        return [act.backward(dh, us[0])]
    dup = act.eager(us[0]).mul_(dh)
    return [act.backward(dh.mul_(us[1]), us[0]), dup]
