"""What a gated block computes for one token of each sequence, in plain PyTorch: the oracle of its kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import MediaMask
from ..masked_cross_attention.reference import masked_cross_attention

if TYPE_CHECKING:
    from .weights import GatedBlockWeights

ACTIVATIONS = {"gelu": F.gelu, "squared_relu": lambda x: F.relu(x) ** 2, "relu": F.relu}


def gated_block_decode(
    x: Tensor,  # [B, D]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    weights: GatedBlockWeights,
    scale: float,
    eps: float,
    activation: str,
) -> Tensor:  # [B, D]
    w = weights
    q = _norm(x, w.norm, w.norm_bias, eps) @ w.to_q.T  # [B, H * d]
    q = q.unflatten(-1, (-1, k.shape[-1]))[:, None]  # [B, 1, H, d]
    attended = masked_cross_attention(q, k, v, mask, scale).flatten(1)  # [B, H * d]
    z = _add(x, attended @ w.to_out.T, w.gate)  # [B, D]
    hidden = ACTIVATIONS[activation](_norm(z, w.ff_norm, w.ff_norm_bias, eps) @ w.up.T)  # [B, F]
    return _add(z, hidden @ w.down.T, w.ff_gate)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:  # [B, D]
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def _add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:  # [B, D]
    return (x + torch.tanh(gate.flatten()) * y).to(x.dtype)
