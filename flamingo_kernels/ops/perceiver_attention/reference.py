"""What perceiver attention computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def perceiver_attention(
    q: Tensor,  # [N, R, H, d]
    k_media: Tensor,  # [N, S, Hkv, d]
    v_media: Tensor,  # [N, S, Hkv, d]
    k_latents: Tensor,  # [N, L, Hkv, d]
    v_latents: Tensor,  # [N, L, Hkv, d]
    *,
    media_lengths: Tensor | None,  # [N]
    scale: float,
) -> Tensor:  # [N, R, H, d]
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k_media.shape[2]  # query heads that share a head of k and v
    if media_lengths is not None:
        # Blanked rather than only masked out: 0 * NaN is NaN.
        beyond = torch.arange(k_media.shape[1], device=q.device) >= media_lengths[:, None]  # [N, S]
        k_media, v_media = (t.masked_fill(beyond[..., None, None], 0) for t in (k_media, v_media))
    k = torch.cat([k_media, k_latents], dim=1).to(dtype).repeat_interleave(group, dim=2)  # [N, S + L, H, d]
    v = torch.cat([v_media, v_latents], dim=1).to(dtype).repeat_interleave(group, dim=2)  # [N, S + L, H, d]
    scores = einsum("nrhd,nshd->nrhs", q.to(dtype) * scale, k)  # [N, R, H, S + L]
    if media_lengths is not None:
        never = beyond.new_zeros(beyond.shape[0], k_latents.shape[1])  # [N, L]
        masked = torch.cat([beyond, never], dim=1)[:, None, None]  # [N, 1, 1, S + L]
        scores = scores.masked_fill(masked, -torch.inf)
    return einsum("nrhs,nshd->nrhd", scores.softmax(-1), v).to(q.dtype)
