"""One token through a gated block by `gated_block_decode`, if its kernels can compute the whole block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import dispatch
from ..mask import MediaMask
from ..ops import GatedBlockWeights, gated_block_decode
from ..ops.gated_block_decode.weights import ACTIVATIONS
from ..sublayers.arguments import CrossAttention, FeedForward


def may_decode(x: Tensor) -> bool:
    """Whether x is one token a sequence, without gradients and autocast, on a device with these kernels."""
    alone = x.shape[1] == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    return alone and dispatch.is_chosen("gated_block_decode", "cuda")


def decode(
    x: Tensor,  # [B, 1, D]
    k: Tensor,  # [B, M, R, H, d]
    v: Tensor,  # [B, M, R, H, d]
    mask: MediaMask,
    attn: CrossAttention,
    ff: FeedForward,
    gates: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor | None:  # [B, 1, D]
    """The result of a block with these arguments, or None if the operator cannot compute exactly that."""
    linears = (attn.to_q, attn.to_out, ff.up, ff.down)
    weights = GatedBlockWeights(
        norm=attn.norm.weight,
        norm_bias=attn.norm.bias,
        to_q=attn.to_q.weight,
        to_out=attn.to_out.weight,
        gate=gates[0],
        ff_norm=ff.norm.weight,
        ff_norm_bias=ff.norm.bias,
        up=ff.up.weight,
        down=ff.down.weight,
        ff_gate=gates[1],
    )
    tensors = (x[:, 0], k, v, *weights)
    if (
        attn.q_norm is not None
        or ff.gate_proj is not None
        or attn.norm.rms
        or ff.norm.rms
        or attn.norm.eps != ff.norm.eps
        or ff.activation not in ACTIVATIONS
        or any(linear.bias is not None or not linear.weight.is_contiguous() for linear in linears)
        or any(tensor is not None and tensor.dtype != x.dtype for tensor in tensors)
        or not dispatch.is_chosen("gated_block_decode", "cuda", *tensors)
    ):
        return None
    options: dict[str, Any] = {"scale": scale, "eps": ff.norm.eps, "activation": ff.activation}
    return gated_block_decode(x[:, 0], k, v, mask, weights, **options)[:, None]
