"""What the gated residual with a norm behind it computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual_norm(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # [], [1] or [D]
    weight: Tensor,  # [D]
    bias: Tensor | None,  # [D]
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:  # z, n [..., D]
    z = x + torch.tanh(gate) * y  # [..., D]
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = z.to(dtype, copy=True)  # [..., D]: its own gradients, which may cancel, are added up first
    centred = rows if norm == "rms" else rows - rows.mean(-1, keepdim=True)  # [..., D]
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)  # [..., 1]
    n = centred * rstd * weight.to(dtype)  # [..., D]
    return z, (n if bias is None else n + bias.to(dtype)).to(z.dtype)
