"""What masked cross-attention computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from ...mask import MediaMask


def masked_cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: MediaMask, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[3]
    queries = q.to(dtype) * scale
    keys, values = (t.to(dtype).repeat_interleave(groups, dim=3) for t in (k, v))  # [B, M, R, H, d]
    out = queries.masked_fill(mask.lo[..., None, None] >= 0, 0)  # zeros, in the graph of q
    if mask.num_media == 0:
        return (out + keys.sum() + values.sum()).to(q.dtype)

    # Rows are blanked before and after every product with a medium they do not see: 0 * NaN is NaN.
    rows = [mask.sees(m)[..., None, None] for m in range(mask.num_media)]  # [B, T, 1, 1] each
    scores = [
        einsum("bthd,brhd->bthr", queries.where(sees, 0), keys[:, m]).where(sees, -torch.inf)
        for m, sees in enumerate(rows)
    ]
    probabilities = _softmax(torch.cat(scores, dim=-1)).chunk(mask.num_media, dim=-1)
    for m, sees in enumerate(rows):
        product = einsum("bthr,brhd->bthd", probabilities[m].where(sees, 0), values[:, m])
        out = out + product.where(sees, 0)
    average = values.mean(dim=(1, 2))[:, None]  # [B, 1, H, d]
    return torch.where(mask.averages()[..., None, None], average, out).to(q.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, 0 where all scores are -inf."""
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(scores.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)
