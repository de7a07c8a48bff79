"""Gradients by name, and in the order that autograd expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


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
