"""The gated sublayers, operation by operation: the specification of the fused ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._labels import ATTENTION, GATE, labelled
from ..mask import MediaMask
from ..ops.gated_residual.api import gated_residual
from ..ops.masked_cross_attention.api import masked_cross_attention
from ..ops.weights import Linear, Norm
from .activation import ACTIVATIONS
from .arguments import CrossAttention

_attend = labelled(ATTENTION)(masked_cross_attention)
_add = labelled(GATE)(gated_residual)


def gated_cross_attention(
    x: Tensor,  # [B, T, D]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    gate: Tensor | None,
    weights: CrossAttention,
    scale: float,
) -> Tensor:  # [B, T, D]
    norm, to_q, to_out, q_norm = weights
    q = F.linear(norm.normed(x), *to_q[:2]).unflatten(-1, (-1, k.shape[-1]))  # [B, T, H, d]
    q = q if q_norm is None else q_norm.normed(q)
    out = _attend(q, k, v, mask, scale=scale, backend="reference")
    y = F.linear(out.flatten(2), *to_out[:2])
    return x + y if gate is None else _add(x, y, gate, backend="reference")


def gated_feed_forward(
    x: Tensor,  # [..., D]
    norm: Norm,
    up: Linear,
    down: Linear,
    gate: Tensor | None,
    activation: str,
    gate_proj: Linear | None,
) -> Tensor:  # [..., D]
    n = norm.normed(x)
    act = ACTIVATIONS[activation].eager
    h = F.linear(n, *up[:2])
    h = act(h) if gate_proj is None else act(F.linear(n, *gate_proj[:2])) * h
    y = F.linear(h, *down[:2])
    return x + y if gate is None else _add(x, y, gate, backend="reference")
