"""Mllama (Llama 3.2 Vision) of transformers: its cross-attention layers.

What no kernel can take stays with the attention that the module had: tiles of 1601 tokens, a prime, as at 560
pixels; masks that are no spans even with the padding tiles moved behind; a dropout in training; attention
implementations other than "eager" and "sdpa"; calls that ask for attention weights. Gates, residuals and the
norm between are fused all the same. K and V are kept where the original keeps them, in the model's cache.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Fused
from ..ops import gated_residual, masked_cross_attention
from .blocks import add_gated
from .dense import key_spans
from .family import TRANSFORMERS, Family

_HOME = "transformers.models.mllama.modeling_mllama"
_RMS_NORM = f"{_HOME}.MllamaTextRMSNorm"


class MllamaTextCrossAttention(Fused):
    config: Any
    num_heads: int
    num_key_value_heads: int
    layer_idx: int
    scaling: float
    dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: Any

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        cross_attention_states: Tensor | None = None,  # [B * tiles, tokens, D], or K and V are in the cache
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,  # [B, 1, T, S], added to the scores
        use_cache: bool | None = None,
        *,
        cache_position: Tensor | None = None,  # transformers 4 only
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # [B, T, D], and no weights
        spans = None if attention_mask is None else key_spans(attention_mask, hidden_states)
        sees_all = attention_mask is None and "causal" in self.fixes
        no_media = cross_attention_states is None and past_key_values is None
        if no_media or self._must_stay(kwargs) or (spans is None and not sees_all):
            if cache_position is not None:
                kwargs["cache_position"] = cache_position
            return super().forward(
                hidden_states, cross_attention_states, past_key_values, attention_mask, use_cache, **kwargs
            )
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)))  # [B, T, H, d]
        k, v = self._kv(len(q), cross_attention_states, past_key_values, cache_position)  # [B, S, Hkv, d]
        if spans is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling, enable_gqa=True).transpose(1, 2)
        else:
            out = masked_cross_attention(q, spans.media(k), spans.media(v), spans.mask, scale=self.scaling)
        return self.o_proj(out.flatten(-2)), None

    def _must_stay(self, kwargs: dict[str, Any]) -> bool:
        weights = kwargs.get("output_attentions") or self.config.output_attentions
        other = self.config._attn_implementation not in ("eager", "sdpa")
        return bool(weights or other or (self.dropout and self.training))

    def _kv(
        self, batch: int, states: Tensor | None, cache: Any, position: Tensor | None
    ) -> tuple[Tensor, ...]:  # [B, S, Hkv, d] each
        if states is None:
            layer = cache.layers[self.layer_idx]
            return layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        shape = (batch, -1, self.num_key_value_heads, self.k_norm.weight.shape[0])
        k, v = self.k_norm(self.k_proj(states).view(shape)), self.v_proj(states).view(shape)
        if cache is None:
            return k, v
        position_of = () if position is None else ({"cache_position": position},)
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, *position_of)
        return k.transpose(1, 2), v.transpose(1, 2)


class MllamaCrossAttentionDecoderLayer(Fused):
    cross_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    cross_attn_attn_gate: nn.Parameter  # [1]
    cross_attn_mlp_gate: nn.Parameter

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        cross_attention_states: Tensor | None,
        cross_attention_mask: Tensor | None,
        attention_mask: Tensor | None,  # of the text, not used
        full_text_row_masked_out_mask: Tensor | None,  # [B, 1, T, 1], 0 where a token sees no image
        position_ids: Tensor | None = None,  # not used
        past_key_values: Any = None,
        use_cache: bool | None = False,
        *,
        cache_position: Tensor | None = None,  # transformers 4 only
        position_embeddings: Any = None,  # not used
        **kwargs: Any,
    ) -> Tensor:  # [B, T, D]
        if cache_position is not None:
            kwargs["cache_position"] = cache_position
        attended, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states,
            past_key_values=past_key_values,
            **kwargs,
        )
        rows = None if full_text_row_masked_out_mask is None else full_text_row_masked_out_mask[:, 0]
        if rows is not None and "row_leak" in self.fixes:
            attended = rows * attended
        norm = self.post_attention_layernorm
        z, y = add_gated(hidden_states, attended, self.cross_attn_attn_gate, norm, _RMS_NORM)
        y = self.mlp(y)
        y = y if rows is None else rows * y
        return gated_residual(z, cast(Tensor, y), self.cross_attn_mlp_gate)


FAMILY = Family(
    "transformers Mllama",
    _HOME,
    {cls.__name__: cls for cls in (MllamaTextCrossAttention, MllamaCrossAttentionDecoderLayer)},
    TRANSFORMERS,
    {
        "row_leak": "text before the first image attends to every image and its padding (transformers#39379)",
        "causal": 'under "sdpa" and without a mask, row t sees no vision token after t (transformers#48172)',
    },
)
