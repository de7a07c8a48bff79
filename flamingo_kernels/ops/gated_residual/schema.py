"""Operations of the gated residual, and the shapes that they return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.library import define, fresh, shapes_of

FWD = define("gated_residual_fwd", "(Tensor x, Tensor y, Tensor gate) -> Tensor")
BWD = define("gated_residual_bwd", "(Tensor dz, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)")


def residual_dtype(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    """The dtype of `x + tanh(gate) * y` under torch's type promotion, 0-dimensional gates included."""
    product = torch.result_type(gate, y)
    return torch.promote_types(product, x.dtype)


@shapes_of("gated_residual_fwd")
def _(x, y, gate):
    return x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))


@shapes_of("gated_residual_bwd")
def _(dz, y, gate):
    return fresh(y), gate.new_empty(gate.shape, dtype=torch.float32)
