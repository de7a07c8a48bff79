"""What a linear layer and all that may follow it compute, in plain PyTorch: the oracle of every product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda y: F.relu(y).square(),
    "silu": F.silu,
}


def linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    activation: str | None = None,
    gate: Tensor | None = None,  # [], [1] or [out]
    residual: Tensor | None = None,  # [..., out]
    weight_scale: Tensor | None = None,  # [out]
) -> Tensor:  # [..., out]
    weight = weight if weight_scale is None else dequantize(weight, weight_scale, x.dtype)
    return follow(F.linear(x, weight, bias), activation, gate, residual)


def dequantize(
    weight: Tensor,  # [out, in], integers
    weight_scale: Tensor,  # [out]
    dtype: torch.dtype,
) -> Tensor:  # [out, in]
    """The numbers that integers and their scales stand for, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * weight_scale.to(wide)[:, None]).to(dtype)


def follow(y: Tensor, activation: str | None, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    """What follows the product: `residual + tanh(gate) * act(y)`."""
    y = ACTIVATIONS[activation](y)
    if gate is not None:
        y = torch.tanh(gate) * y
    return y if residual is None else residual + y
