"""Backward passes by kernels have no derivative: asking for one raises an error and gives no wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._backends.dispatch import UnsupportedError
from .._checks import unit_stride, without_autocast
from .._predicates import has_tangent, is_batched

Backward = Callable[..., tuple[Any, ...]]


def once_differentiable(operator: str, batched: bool = True) -> Callable[[Backward], Any]:
    """Make `backward(ctx, saved, *douts)` the backward pass of an operator whose `ctx.backend` has a kernel.

    torch's decorator of this name ties its error to the incoming gradients, so `torch.autograd.grad` with
    respect to anything else misses it. Here the error depends on all inputs of the backward pass.

    Args:
        operator: its name.
        batched: whether `is_grads_batched=True` may call it; it may not if it writes into scratch memory.
    """

    def decorate(backward: Backward) -> Any:
        @functools.wraps(backward)
        def once(ctx: Any, *douts: Any) -> Any:
            if not torch.compiler.is_compiling():
                mapped = any(map(is_batched, douts))  # torch keeps no graph of these
                if any(map(has_tangent, douts)) or (mapped and torch.is_grad_enabled()):
                    raise _refusal(operator, ctx.backend, "cannot be differentiated again")
                if mapped and not batched:
                    raise _refusal(operator, ctx.backend, "cannot be computed for a batch of them")
            saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at the first access
            # Within the next context torch.compile would lose the state of autocast where a stride is read.
            douts = tuple(map(unit_stride, douts))
            with torch.no_grad(), without_autocast(douts[0]):  # so it uses the dtypes of the forward pass
                gradients = backward(ctx, saved, *douts)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            return _Once.apply(operator, ctx.backend, len(gradients), *gradients, *douts, *saved)

        return once

    return decorate


class _Once(torch.autograd.Function):
    """Returns gradients unchanged, but recorded as functions of everything they depend on."""

    @staticmethod
    def forward(ctx, operator, backend, count, *tensors):
        ctx.operator, ctx.backend = operator, backend
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise _refusal(ctx.operator, ctx.backend, "cannot be differentiated again")


def _refusal(operator: str, backend: str, what: str) -> UnsupportedError:
    reason = (
        f'the gradients of backend="{backend}" {what}; call it with backend="reference", or a model under '
        'use_backend("reference")'
    )
    return UnsupportedError(f"{operator}: {reason}.", {backend: [reason]})
