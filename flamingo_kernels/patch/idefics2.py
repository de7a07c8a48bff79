"""Idefics2 of transformers: the attention of its resampler, with grouped heads and padding among the patches.

The order of its keys does not matter, so the visible patches of an image move to the front and become a
length; in a compiled model an operator does that when it runs. The original's forward computes masks that
differ between the latents of an image, dropout in training, and other attention implementations than "eager"
and "sdpa".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._anatomy import Linear
from ..ops import perceiver_attention
from .dense import in_order, media_first, reads_padding_when_run
from .dense_attention import dense_perceiver_attention
from .family import TRANSFORMERS, Family
from .softmax import GroupedAttention, is_sdpa


class Idefics2PerceiverAttention(GroupedAttention):
    anatomy = {
        **GroupedAttention.anatomy,
        "k_proj": Linear("D", "G*d"),
        "v_proj": Linear("D", "G*d"),
    }

    attention_dropout: float
    cache_keyword: str
    is_causal: bool  # False, unless somebody changes it; with a mask, transformers 4 adds it and 5 drops it

    def forward(
        self,
        latents: Tensor,  # [N, R, D]
        context: Tensor,  # [N, S, D]
        attention_mask: Tensor | None = None,  # [N, 1, R, S + R]
        position_ids: Tensor | None = None,  # not used
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # [N, R, D], and no weights
        first, late, sdpa = None, False, is_sdpa(self)
        cached = cache is not None or getattr(self, self.cache_keyword, None) is not None
        stays = self.is_causal or cached or self.must_stay(self.attention_dropout, kwargs)
        if attention_mask is not None and not stays:  # flex_attention has a mask that is no tensor
            first = media_first(attention_mask, context, latents, layer=self)
            late = first is None and reads_padding_when_run(attention_mask, context, latents, sdpa=sdpa)
            stays = first is None and not late
        if stays:
            rest = (attention_mask, position_ids, cache)
            return super().forward(latents, context, *rest, **kwargs)
        lengths = None
        if first is not None:
            order, lengths = first
            context = in_order(context, order)
        q = self.q_proj(latents).unflatten(-1, (self.num_heads, -1))  # [N, R, H, d]
        keys_and_values = (*self._kv(context), *self._kv(latents))
        if attention_mask is not None and late:
            tensors = (q, *keys_and_values, attention_mask)
            out = dense_perceiver_attention(*tensors, scale=self.scaling, sdpa=sdpa)
        else:
            out = perceiver_attention(q, *keys_and_values, media_lengths=lengths, scale=self.scaling)
        return self.o_proj(out.flatten(-2)), None

    def _kv(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, ., Hkv, d] each
        heads = (self.num_key_value_heads, -1)
        return self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)


FAMILY = Family(
    "transformers Idefics2, resampler",
    "transformers.models.idefics2.modeling_idefics2",
    (Idefics2PerceiverAttention,),
    TRANSFORMERS,
)
