"""Idefics2 of transformers: the attention of its resampler, with grouped heads and padding among the patches.

The order of its keys does not matter, so the visible patches of an image move to the front and become a
length. Masks that differ between the latents of an image stay with the attention that the module had, and so
do a dropout in training, other attention implementations than "eager" and "sdpa", and everything traced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._anatomy import Linear, Number
from ..layers import Fused
from ..ops import perceiver_attention
from .dense import in_order, is_softmax, media_first
from .family import TRANSFORMERS, Family


class Idefics2PerceiverAttention(Fused):
    anatomy = {
        "num_key_value_heads": Number("G"),
        "num_key_value_groups": Number("n"),
        "num_heads": Number("G*n"),
        "head_dim": Number("d"),
        "q_proj": Linear("D", "G*n*d"),
        "k_proj": Linear("D", "G*d"),
        "v_proj": Linear("D", "G*d"),
        "o_proj": Linear("G*n*d", "D"),
    }

    config: Any
    num_heads: int
    num_key_value_heads: int
    scaling: float
    attention_dropout: float
    is_causal: bool  # False, unless somebody changes it; with a mask, transformers 4 adds it and 5 drops it
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        latents: Tensor,  # [N, R, D]
        context: Tensor,  # [N, S, D]
        attention_mask: Tensor | None = None,  # [N, 1, R, S + R]
        position_ids: Tensor | None = None,  # not used
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # [N, R, D], and no weights
        first = None
        if attention_mask is not None:
            first = media_first(attention_mask, context, latents, layer=self)
        dense = self.is_causal or (attention_mask is not None and first is None)
        if dense or past_key_values is not None or self._must_stay(kwargs):
            rest = (attention_mask, position_ids, past_key_values)
            return super().forward(latents, context, *rest, **kwargs)
        lengths = None
        if first is not None:
            order, lengths = first
            context = in_order(context, order)
        heads, kv_heads = (self.num_heads, -1), (self.num_key_value_heads, -1)
        q = self.q_proj(latents).unflatten(-1, heads)  # [N, R, H, d]
        k_media, k_latents = (self.k_proj(x).unflatten(-1, kv_heads) for x in (context, latents))
        v_media, v_latents = (self.v_proj(x).unflatten(-1, kv_heads) for x in (context, latents))
        keys_and_values = (k_media, v_media, k_latents, v_latents)
        out = perceiver_attention(q, *keys_and_values, media_lengths=lengths, scale=self.scaling)
        return self.o_proj(out.flatten(-2)), None

    def _must_stay(self, kwargs: dict[str, Any]) -> bool:
        weights = kwargs.get("output_attentions") or getattr(self, "past_key_values", None) is not None
        other = not is_softmax(self.config._attn_implementation)
        return bool(weights or other or self.is_watched() or (self.attention_dropout and self.training))


FAMILY = Family(
    "transformers Idefics2, resampler",
    "transformers.models.idefics2.modeling_idefics2",
    {"Idefics2PerceiverAttention": Idefics2PerceiverAttention},
    TRANSFORMERS,
)
