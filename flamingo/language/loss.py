"""The loss of the next token, of logits or of hidden states whose logits never exist all at once.

`F.linear_cross_entropy`, in torch from 2.13 on, is not used: it adds the losses of bfloat16 in bfloat16 and
takes a head of one matrix, but new tokens have rows of their own. `docs/DESIGN.md` has the numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

IGNORED = -100  # the label of a token that is not learned
PIECE = 2**24  # logits at once: 64 MiB in float32


def sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens of `-log softmax(logits[t])[labels[t + 1]]`, in float32 or wider.

    Args:
        logits: `[B, T, V]`.
        labels: int64 `[B, T]`, the tokens, -100 where one is not to be learned.
    """
    return _sum(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sum_of_losses_in_pieces(
    to_logits: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """`sum_of_losses(to_logits(x), labels)`, a piece of the tokens at a time.

    ::

        for each piece of x:   logits -> loss -> gradients of the piece and of the parameters
        backward pass:         these gradients, scaled

    Each piece is differentiated at once, so its logits are gone before those of the next piece are made, and
    no product is computed twice. Tokens that are not learned have no logits.

    Args:
        to_logits: hidden states `[n, D]` to logits `[n, V]`, each row by itself.
        x: hidden states `[B, T, D]`.
        labels: int64 `[B, T]`, see `sum_of_losses`.
        vocab_size: V.
        parameters: those that `to_logits` uses; one that takes a gradient and is not here has none.

    Returns:
        The sum, float32 or wider.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.

    Limits: differentiable once. While `torch.compile` traces, and for parameters with hooks, which would see
    a gradient a piece, all logits are made.

    Determinism: how many rows a piece has depends on the head alone, and pieces are added in order.

    >>> x, head = torch.randn(1, 5, 8), nn.Linear(8, 100)
    >>> labels = torch.tensor([[1, 2, -100, 4, 5]])
    >>> loss = sum_of_losses_in_pieces(
    ...     head, x, labels, vocab_size=100, parameters=list(head.parameters())
    ... )
    >>> torch.allclose(loss, sum_of_losses(head(x), labels))
    True
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.compiler.is_compiling() or any(parameter._backward_hooks for parameter in trained):
        return sum_of_losses(to_logits(x), labels)
    x, labels = x[:, :-1], labels[:, 1:]
    learned = labels != IGNORED
    x, labels = x[learned], labels[learned]
    # A trained head has a gradient of its own size for each piece: few, then, that are as large.
    rows = max(1, max([PIECE, *map(Tensor.numel, trained)]) // vocab_size)
    if torch.is_grad_enabled() and (x.requires_grad or trained):
        return _Pieces.apply(to_logits, rows, x, labels, *trained)
    pieces = zip(x.split(rows), labels.split(rows), strict=True)
    losses = (_sum(to_logits(piece), targets) for piece, targets in pieces)
    return sum(losses, x.new_zeros((), dtype=_wide(x)))


def is_plain_linear(module: nn.Module, *, hooks: int = 0) -> bool:
    """Whether calling a module is a linear layer, and nobody but so many hooks of ours sees it.

    A layer whose forward is a faster copy says so: its attribute `same_as`.
    """
    cls = type(module)
    is_linear = cls is nn.Linear or getattr(cls.forward, "same_as", None) is nn.Linear.forward
    return is_linear and not is_watched(module, hooks=hooks)


def is_watched(module: nn.Module, *, hooks: int = 0) -> bool:
    """Whether more than so many hooks see the calls of a module, or it has a forward of its own."""
    found = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return sum(map(len, found)) > hooks or "forward" in vars(module) or _has_any_global_hook()


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Of rows and the targets that they predict."""
    return F.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=IGNORED, reduction="sum")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Pieces(torch.autograd.Function):
    """The sum of the losses of all rows, and in the same pass its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        to_logits: Callable[[Tensor], Tensor],
        rows: int,
        x: Tensor,
        targets: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = x.new_zeros((), dtype=_wide(x))
        of_x = torch.empty_like(x)
        sums: list[Tensor] = []
        for start in range(0, max(1, len(x)), rows):
            place = slice(start, start + rows)
            piece = x[place].detach().requires_grad_()
            with torch.enable_grad():
                loss = _sum(to_logits(piece), targets[place])
            of_x[place], *gradients = torch.autograd.grad(loss, (piece, *parameters))
            wide = [gradient.to(_wide(gradient)) for gradient in gradients]
            sums = [a.add_(b) for a, b in zip(sums, wide, strict=True)] if start else wide
            total += loss.detach()
        ctx.save_for_backward(of_x, *sums)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sum_of_losses_in_pieces: expected a backward pass without create_graph=True, got one with "
                "it. For a second derivative take the loss of all logits: loss_only=False."
            )
        of_x, *sums = ctx.saved_tensors
        scaled = [(each * of_total).to(dtype) for each, dtype in zip(sums, ctx.dtypes, strict=True)]
        return None, None, of_x * of_total, None, *scaled
