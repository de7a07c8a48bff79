"""What perceiver attention computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def perceiver_attention(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    *,
    media_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k_media.shape[2]
    if media_lengths is not None:
        # Blanked rather than only masked out: 0 * NaN is NaN.
        beyond = torch.arange(k_media.shape[1], device=q.device) >= media_lengths[:, None]  # [N, S]
        k_media, v_media = (t.masked_fill(beyond[..., None, None], 0) for t in (k_media, v_media))
    keys = torch.cat([k_media, k_latents], dim=1).to(dtype).repeat_interleave(groups, dim=2)
    values = torch.cat([v_media, v_latents], dim=1).to(dtype).repeat_interleave(groups, dim=2)
    scores = einsum("nrhd,nshd->nrhs", q.to(dtype) * scale, keys)
    if media_lengths is not None:
        always = beyond.new_zeros(beyond.shape[0], k_latents.shape[1])
        scores = scores.masked_fill(torch.cat([beyond, always], dim=1)[:, None, None], -torch.inf)
    return einsum("nrhs,nshd->nrhd", scores.softmax(-1), values).to(q.dtype)
