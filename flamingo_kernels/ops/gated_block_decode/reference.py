"""What a gated block computes for one token of each sequence, in plain PyTorch: the oracle of its kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...mask import MediaMask
from ..linear import reference as linears
from ..masked_cross_attention.reference import masked_cross_attention

if TYPE_CHECKING:
    from ..weights import Linear, Norm
    from .weights import GatedBlockWeights


def gated_block_decode(
    x: Tensor,  # [B, D]
    k: Tensor,  # [S, M, R, Hkv, d]
    v: Tensor,  # [S, M, R, Hkv, d]
    mask: MediaMask,  # of S sequences, B / S rows each
    weights: GatedBlockWeights,
    scale: float,
) -> Tensor:  # [B, D]
    w = weights
    q = _linear(_norm(x, w.norm, k), w.to_q).unflatten(-1, (-1, k.shape[-1]))  # [B, H, d]
    q = q if w.q_norm is None else _norm(q, w.q_norm, k)
    q = q.unflatten(0, mask.lo.shape)  # [S, B / S, H, d]
    attended = masked_cross_attention(q, k, v, mask, scale).flatten(0, 1).flatten(1)  # [B, H * d]
    z = _add(x, _linear(attended, w.to_out), w.gate)
    n = _norm(z, w.ff_norm, k)
    h = _linear(n, w.up, w.activation if w.gate_proj is None else None)
    h = h if w.gate_proj is None else _linear(n, w.gate_proj, w.activation) * h
    return _add(z, _linear(h, w.down), w.ff_gate)


def _add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return linears.follow(y, None, gate.flatten() if gate is not None and gate.ndim > 1 else gate, x)


def _norm(x: Tensor, norm: Norm, like: Tensor) -> Tensor:
    """The normed rows, in the dtype of the products."""
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return norm._replace(weight=norm.weight.to(x.dtype), bias=bias).normed(x).to(like.dtype)


def _linear(x: Tensor, linear: Linear, activation: str | None = None) -> Tensor:
    return linears.linear(x, linear.weight, linear.bias, activation, weight_scale=linear.scale)
