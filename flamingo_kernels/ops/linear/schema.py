"""The operation of the kernels, for few rows or for weights of 8 bits, and the shape that it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.library import define, shapes_of

# `activation` is a place in `ACTIVATIONS`. With a scale the weight is int8.
FWD = define(
    "linear_fwd",
    "(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, int activation, Tensor? gate, "
    "Tensor? residual) -> Tensor",
)

# As `Activation` in csrc/views.h counts them.
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "squared_relu", "silu")


def result_dtype(x: Tensor, gate: Tensor | None, residual: Tensor | None) -> torch.dtype:
    """The dtype of `residual + tanh(gate) * y` under torch's type promotion, where y is in that of x."""
    branch = x.dtype if gate is None else torch.result_type(gate, x)
    return branch if residual is None else torch.promote_types(residual.dtype, branch)


@shapes_of("linear_fwd")
def _(x, weight, weight_scale, bias, activation, gate, residual):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=result_dtype(x, gate, residual))
