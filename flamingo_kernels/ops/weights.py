"""The parameters of a linear layer and of a norm, as operators over whole layers are given them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as checks
from .._labels import NORM, labelled
from .linear.products import PRODUCTS, fastest


class Linear(NamedTuple):
    """A projection `a @ weight.T + bias`.

    Args:
        weight: `[out, in]`; of 8-bit integers with a scale.
        bias: `[out]`, or None.
        scale: float32 `[out]`, by which integers are multiplied; None for other weights.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    def autocast(self) -> Linear:
        """The same projection with its parameters in the dtype of torch.autocast, if that is on."""
        if self.scale is None:
            return Linear(*checks.autocast(*(each for each in self[:2] if each is not None)))
        return self if self.bias is None else self._replace(bias=checks.autocast(self.bias)[0])

    def project(self, a: Tensor, into: Tensor | None = None) -> Tensor:  # [N, out]
        """The projection by the fastest product, which may write `into` a tensor; not of integers."""
        by = fastest("forward", a, self.weight, self.weight.numel())
        if by != "torch":
            return PRODUCTS[by].forward(a, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(a, self.weight.t(), out=into)
        return torch.addmm(self.bias, a, self.weight.t(), out=into)


class Norm(NamedTuple):
    """A LayerNorm or an RMSNorm with its parameters.

    Args:
        weight: `[D]`.
        bias: `[D]`, or None; an RMSNorm has none.
        eps: added to the variance, or to the mean square.
        rms: RMSNorm rather than LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    rms: bool = False

    @labelled(NORM)
    def normed(self, x: Tensor) -> Tensor:
        """The normed rows."""
        shape = x.shape[-1:]
        if self.rms:
            return F.rms_norm(x, shape, self.weight, self.eps)
        return F.layer_norm(x, shape, self.weight, self.bias, self.eps)


def expect_linear(operator: str, name: str, linear: Any, shape: tuple[int | str, int], why: str) -> None:
    """Raise TypeError or ValueError unless it is a Linear whose weight has this shape."""
    if not isinstance(linear, Linear):
        raise TypeError(f"{operator}: expected {name} to be a Linear, got {type(linear).__name__}.")
    checks.expect_tensors(operator, **{f"{name}.weight": linear.weight, **named_parameters(**{name: linear})})
    checks.expect_shape(operator, f"{name}.weight", linear.weight, shape, why)
    for field in ("bias", "scale"):
        if (vector := getattr(linear, field)) is not None:
            like = f"to match {name}.weight"
            checks.expect_shape(operator, f"{name}.{field}", vector, tuple(linear.weight.shape[:1]), like)


def expect_norm(operator: str, name: str, norm: Any, width: int) -> None:
    """Raise TypeError or ValueError unless it is a Norm over this width."""
    if not isinstance(norm, Norm):
        raise TypeError(f"{operator}: expected {name} to be a Norm, got {type(norm).__name__}.")
    if norm.rms and norm.bias is not None:
        raise ValueError(f"{operator}: expected no {name}.bias with rms=True.")
    parameters = {f"{name}.weight": norm.weight, **named_parameters(**{name: norm})}
    checks.expect_tensors(operator, **parameters)
    for field, parameter in parameters.items():
        checks.expect_shape(operator, field, parameter, (width,), "to match what it norms")
    checks.expect_number(operator, f"{name}.eps", norm.eps, least=0)


def expect_gate(operator: str, name: str, gate: Any, width: int) -> None:
    """Raise TypeError or ValueError unless it is a gate of 1 or D elements, or None."""
    if gate is None:
        return
    checks.expect_tensors(operator, **{name: gate})
    if gate.numel() not in (1, width):
        shape = tuple(gate.shape)
        raise ValueError(f"{operator}: expected a {name} of 1 or D={width} elements, got {shape}.")


def named_parameters(**owners: Linear | Norm | None) -> dict[str, Tensor]:
    """The parameters of projections and norms by name, as "to_q.weight"."""
    return {
        f"{name}.{field}": getattr(owner, field)
        for name, owner in owners.items()
        for field in ("weight", "bias", "scale")
        if getattr(owner, field, None) is not None
    }
