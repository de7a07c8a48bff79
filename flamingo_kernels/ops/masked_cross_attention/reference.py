"""What masked cross-attention computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from ...mask import MediaMask


def masked_cross_attention(
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    scale: float,
) -> Tensor:  # [B, T, H, d]
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[3]  # query heads that share a head of k and v
    queries = q.to(dtype) * scale  # [B, T, H, d]
    keys, values = (t.to(dtype).repeat_interleave(group, dim=3) for t in (k, v))  # [B, M, R, H, d]
    out = queries.masked_fill(mask.lo[..., None, None] >= 0, 0)  # [B, T, H, d]: zeros, in the graph of q
    if mask.num_media == 0:
        return (out + keys.sum() + values.sum()).to(q.dtype)

    # Rows are blanked before and after every product with a medium they do not see: 0 * NaN is NaN.
    sees = [mask.sees(m)[..., None, None] for m in range(mask.num_media)]  # M times [B, T, 1, 1]
    scores = [  # M times [B, T, H, R]
        einsum("bthd,brhd->bthr", queries.where(seen, 0), keys[:, m]).where(seen, -torch.inf)
        for m, seen in enumerate(sees)
    ]
    p = _softmax(torch.cat(scores, dim=-1)).chunk(mask.num_media, dim=-1)  # M times [B, T, H, R]
    for m, seen in enumerate(sees):
        product = einsum("bthr,brhd->bthd", p[m].where(seen, 0), values[:, m])  # [B, T, H, d]
        out = out + product.where(seen, 0)
    average = values.mean(dim=(1, 2))[:, None]  # [B, 1, H, d]
    return torch.where(mask.averages()[..., None, None], average, out).to(q.dtype)


def _softmax(scores: Tensor) -> Tensor:  # [..., M * R]
    """Softmax over the last dimension, 0 where all scores are -inf."""
    blind = scores.amax(-1, keepdim=True) == -torch.inf  # [..., 1]
    return torch.softmax(scores.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)
