"""Operations of perceiver attention, and the shapes that they return.

`softmax` is what makes every row's weights anew, see `masked_cross_attention.schema`.
"""

from __future__ import annotations

import torch

from ..._backends.library import define, fresh, shapes_of

FWD = define(
    "perceiver_attention_fwd",
    "(Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, "
    "Tensor? media_lengths, float scale) -> (Tensor out, Tensor softmax)",
)
BWD = define(
    "perceiver_attention_bwd",
    "(Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, "
    "Tensor out, Tensor softmax, Tensor? media_lengths, float scale) "
    "-> (Tensor dq, Tensor dk_media, Tensor dv_media, Tensor dk_latents, Tensor dv_latents)",
)


@shapes_of("perceiver_attention_fwd")
def _(q, k_media, v_media, k_latents, v_latents, media_lengths, scale):
    batch, latents, heads, _ = q.shape
    return fresh(q), q.new_empty(2, batch, heads, latents, dtype=torch.float32)


@shapes_of("perceiver_attention_bwd")
def _(dout, q, k_media, v_media, k_latents, v_latents, out, softmax, media_lengths, scale):
    return tuple(fresh(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents))
