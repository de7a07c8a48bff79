"""Mllama (Llama 3.2 Vision) of transformers: its cross-attention layers.

The module's own attention computes what no kernel can take: masks that are no spans even with the padding
tiles moved behind; dropout in training; attention implementations other than "eager" and "sdpa"; calls
that ask for attention weights; one token in a compiled model, which reads other masks when it runs.
Gates, residuals and the norm between are fused all the same. K and V are kept where the original keeps
them, in the model's cache.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._anatomy import Alpha, Norm
from .._kept import once
from .._predicates import is_plain, is_unhooked
from ..layers.decode import may_decode, step_of
from ..layers.fused import add_feed_forward, add_gated, gate_unless_open
from ..ops import masked_cross_attention
from ..sublayers import arguments, gated_cross_attention
from .cache_keyword import CACHE
from .decoder_layer import DecoderLayer, folds_of
from .dense import KeySpans, key_spans, reads_when_run
from .dense_attention import dense_cross_attention
from .family import TRANSFORMERS, Family
from .softmax import GroupedAttention, is_sdpa

_HOME = "transformers.models.mllama.modeling_mllama"
_MLP = f"{_HOME}.MllamaTextMLP"
_FEW = 2**20  # numbers in a layer's keys: reading them takes no longer than reading a mask


class MllamaTextCrossAttention(GroupedAttention):
    anatomy = {**GroupedAttention.anatomy, "q_norm": Norm("d"), "k_norm": Norm("d")}

    cache_keyword: str
    layer_idx: int
    dropout: float
    q_norm: nn.Module
    k_norm: Any

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        cross_attention_states: Tensor | None = None,  # [B * tiles, tokens, D], or K and V are in the cache
        cache: Any = None,
        attention_mask: Tensor | None = None,  # [B, 1, T, S], added to the scores
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # [B, T, D], and no weights
        media = (cross_attention_states, cache, attention_mask)
        spans = self.spans(hidden_states, *media, kwargs, layer=self)
        late = spans is None and self.reads_when_run(hidden_states, *media, kwargs)
        sees_all = attention_mask is None and "causal" in self.fixes
        has_media = cross_attention_states is not None or cache is not None
        sees_all = sees_all and has_media and not self.must_stay(self.dropout, kwargs)
        if spans is None and not late and not sees_all:
            return super().forward(hidden_states, *media, use_cache, **kwargs)
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)))  # [B, T, H, d]
        k, v = self.kv(q.shape[0], cross_attention_states, cache, kwargs)
        if late:
            mask, sdpa = cast(Tensor, attention_mask), is_sdpa(self)
            out = dense_cross_attention(q, k, v, mask, scale=self.scaling, sdpa=sdpa)
        elif spans is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling, enable_gqa=True).transpose(1, 2)
        else:
            out = masked_cross_attention(q, spans.media(k), spans.media(v), spans.mask, scale=self.scaling)
        return self.o_proj(out.flatten(-2)), None

    def spans(
        self,
        x: Tensor,  # [B, T, D]
        states: Tensor | None,
        cache: Any,
        mask: Tensor | None,  # [B, 1, T, S], added to the scores
        kwargs: dict[str, Any],
        layer: object,
    ) -> KeySpans | None:
        """Which keys the text sees, read for `layer`; None if no kernel can take the mask or the call."""
        if mask is None or not self._may_read(x, states, cache, mask, kwargs):
            return None
        return key_spans(mask, x, layer=layer)

    def reads_when_run(
        self, x: Tensor, states: Tensor | None, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> bool:
        """Whether a compiled model reads the mask when it runs; arguments as for `spans`."""
        if mask is None or not reads_when_run(mask, x, sdpa=is_sdpa(self)):
            return False  # as always without torch.compile
        return self._may_read(x, states, cache, mask, kwargs)

    def _may_read(
        self, x: Tensor, states: Tensor | None, cache: Any, mask: Tensor, kwargs: dict[str, Any]
    ) -> bool:
        no_media = states is None and cache is None
        short = _is_short_step(x, states, mask)
        return not (no_media or short or self.must_stay(self.dropout, kwargs))

    def kv(
        self, batch: int, states: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:  # [B, S, Hkv, d] each
        """Keys and values of new media, or those in the model's cache."""
        if states is None:
            layer = cache.layers[self.layer_idx]
            return layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        shape = (batch, -1, self.num_key_value_heads, self.k_norm.weight.shape[0])
        k, v = self.k_norm(self.k_proj(states).view(shape)), self.v_proj(states).view(shape)
        if cache is None:
            return k, v
        rest = {"kwargs": kwargs} if self.cache_keyword == CACHE else _positions(kwargs)
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, **rest)
        return k.transpose(1, 2), v.transpose(1, 2)


class MllamaCrossAttentionDecoderLayer(DecoderLayer):
    folds = folds_of("cross_attn_attn_gate", "cross_attn_mlp_gate", queries=("cross_attn.q_norm",))
    anatomy = {
        **DecoderLayer.anatomy,
        "cross_attn_attn_gate": Alpha("D"),
        "cross_attn_mlp_gate": Alpha("D"),
    }

    cache_keyword: str
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
        cache: Any = None,
        use_cache: bool | None = False,
        *,
        position_embeddings: Any = None,  # not used
        **kwargs: Any,
    ) -> Tensor:  # [B, T, D]
        x, rows = hidden_states, full_text_row_masked_out_mask
        if may_decode(self, x) and cross_attention_states is None:
            decoded = self._decode(x, cache, cross_attention_mask, rows, kwargs)
            if decoded is not None:
                return decoded
        if not self.fixes and _is_short_step(x, cross_attention_states, cross_attention_mask):
            given = (cross_attention_states, cross_attention_mask, attention_mask, rows, position_ids)
            return cast(Tensor, super().forward(x, *given, cache, use_cache, **kwargs))
        z = self._add_attended(x, cross_attention_states, cache, cross_attention_mask, kwargs)
        if "row_leak" in self.fixes:
            z = _where_seeing(rows, z, x)
        norm, mlp, gate = (
            self.post_attention_layernorm,
            self.mlp,
            gate_unless_open(self, "cross_attn_mlp_gate"),
        )
        out = add_feed_forward(z, arguments.as_glu(z, norm, mlp, _MLP), lambda x: mlp(norm(x)), gate)
        return _where_seeing(rows, out, z)

    def _decode(
        self, x: Tensor, cache: Any, mask: Tensor | None, rows: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:  # [B, 1, D]
        attn = self.cross_attn
        known = isinstance(attn, MllamaTextCrossAttention) and is_unhooked(attn)
        replaceable = known and is_plain(self.mlp, _MLP)
        if not replaceable or mask is None or cache is None or attn.must_stay(attn.dropout, kwargs):
            return None
        parts = self.parts(attn.q_norm, "cross_attn_attn_gate", "cross_attn_mlp_gate")
        step = step_of(self, parts, x)
        spans = None if step is None else key_spans(mask, x, layer=self)
        if step is None or spans is None or not (rows is None or once(_all_see, (rows,), layer=self)):
            return None
        k, v = (spans.media(each) for each in attn.kv(len(x), None, cache, kwargs))
        return step.run(x, k, v, spans.mask, attn.scaling)

    def _add_attended(
        self, x: Tensor, states: Tensor | None, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        attn, gate = self.cross_attn, gate_unless_open(self, "cross_attn_attn_gate")
        spans = plain = None
        if isinstance(attn, MllamaTextCrossAttention) and is_unhooked(attn):
            plain = arguments.as_cross_attention(
                x, self.input_layernorm, attn.q_proj, attn.o_proj, attn.q_norm
            )
        if plain is not None:
            spans = attn.spans(x, states, cache, mask, kwargs, layer=self)
        if spans is None or plain is None:
            media = {"cross_attention_states": states, self.cache_keyword: cache, "attention_mask": mask}
            attended, _ = attn(hidden_states=self.input_layernorm(x), **media, **kwargs)
            return add_gated(x, attended, gate)
        k, v = (spans.media(each) for each in attn.kv(x.shape[0], states, cache, kwargs))
        return gated_cross_attention(x, k, v, spans.mask, gate=gate, scale=attn.scaling, **plain._asdict())


def _positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a cache takes beside keys and values before transformers 5.4."""
    position = kwargs.get("cache_position")
    return {} if position is None else {"cache_kwargs": {"cache_position": position}}


def _all_see(rows: Tensor) -> bool:
    """Whether every token sees an image."""
    return bool((rows != 0).all())


def _is_short_step(x: Tensor, states: Tensor | None, mask: Tensor | None) -> bool:
    """Whether one token attends to few cached keys: a dense attention costs less than reading the mask."""
    return states is None and x.shape[1] == 1 and mask is not None and mask.shape[-1] * x.shape[-1] < _FEW


def _where_seeing(rows: Tensor | None, z: Tensor, x: Tensor) -> Tensor:
    """z in the rows that see an image, x in the others."""
    return z if rows is None else torch.where(rows[:, 0] != 0, z, x.to(z.dtype))


FAMILY = Family(
    "transformers Mllama",
    _HOME,
    (MllamaTextCrossAttention, MllamaCrossAttentionDecoderLayer),
    TRANSFORMERS,
    {
        "row_leak": "text before the first image attends to every image and its padding (transformers#39379)",
        "causal": 'under "sdpa" and without a mask, row t sees no vision token after t (transformers#48172)',
    },
)
