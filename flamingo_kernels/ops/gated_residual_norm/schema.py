"""Operations of the gated residual with the norm behind it, and the shapes that they return."""

from __future__ import annotations

import torch

from ..._backends.library import define, fresh, shapes_of
from ..gated_residual.schema import residual_dtype

FWD = define(
    "gated_residual_norm_fwd",
    "(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor? bias, float eps, bool rms) "
    "-> (Tensor z, Tensor n, Tensor mean, Tensor rstd)",
)
BWD = define(
    "gated_residual_norm_bwd",
    "(Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, Tensor mean, Tensor rstd, "
    "bool rms) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dweight, Tensor dbias)",
)


@shapes_of("gated_residual_norm_fwd")
def _(x, y, gate, weight, bias, eps, rms):
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    rows = x.shape[:-1]
    return z, torch.empty_like(z), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@shapes_of("gated_residual_norm_bwd")
def _(dz, dn, y, gate, weight, z, mean, rstd, rms):
    sums = (tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (gate, weight, weight))
    return fresh(z), fresh(y), *sums
