"""What a backward pass takes from autograd by name, and gives to it in the order of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def unpack(kind: Any, ctx: Any, saved: Sequence[Any]) -> tuple[Any, dict[str, bool], Sequence[Any]]:
    """The inputs, which of them need a gradient by name, and what the forward pass saved behind the inputs.

    Args:
        kind: the NamedTuple of the tensors that follow the first argument of `apply`.
        ctx: the context of the autograd function.
        saved: the tensors it has saved, the inputs first.
    """
    names = kind._fields
    needed = dict(zip(names, ctx.needs_input_grad[1:], strict=True))
    return kind(*saved[: len(names)]), needed, saved[len(names) :]


def learns(name: str, needed: Mapping[str, bool]) -> bool:
    """Whether the weight or the bias of this name needs a gradient."""
    return needed[f"{name}_weight"] or needed[f"{name}_bias"]


def pair(name: str, gradients: Iterable[Tensor | None]) -> dict[str, Tensor | None]:
    """The gradients of a weight and a bias by name, as "q_weight" and "q_bias"."""
    weight, bias = gradients
    return {f"{name}_weight": weight, f"{name}_bias": bias}


def in_order(inputs: Any, gradients: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """One gradient for every field of a NamedTuple of tensors, in its dtype; None where there is none.

    Args:
        inputs: the NamedTuple.
        gradients: by the names of its fields.
    """
    return tuple(
        _cast_like(gradients.get(name), tensor) for name, tensor in zip(inputs._fields, inputs, strict=True)
    )


def _cast_like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or tensor is None else gradient.to(tensor.dtype)
