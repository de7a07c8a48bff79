"""What the gated residual with a norm behind it computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor]:
    z = x + torch.tanh(gate) * y
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = z.to(dtype, copy=True)  # so that its own gradients, which may cancel, are added up first
    centred = rows if norm == "rms" else rows - rows.mean(-1, keepdim=True)
    n = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return z, (n if bias is None else n + bias.to(dtype)).to(z.dtype)
