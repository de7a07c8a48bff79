"""Llama 3.2 Vision of torchtune: its cross-attention layers.

The original's forward computes masks that are no spans even with padding moved behind, masks that are added
to the scores, causal attention, dropout in training, and everything under torch.compile. K and V are kept
where the original keeps them, in the layer's cache, whose end is seen where no mask hides it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._anatomy import Part
from .._kept import once
from .._predicates import is_plain, is_recording
from ..layers.decode import Parts, may_decode, step_of
from ..layers.fused import Fused, add_feed_forward, add_gated
from ..mask import MediaMask
from ..ops import masked_cross_attention
from ..sublayers import arguments, gated_cross_attention
from .dense import KeySpans, key_spans
from .family import Family

_MODULES = "torchtune.modules"
_ATTENTION = f"{_MODULES}.attention.MultiHeadAttention"
_FEED_FORWARD = f"{_MODULES}.feed_forward.FeedForward"
_GATE = f"{_MODULES}.tanh_gate.TanhGate"


class _Seen(NamedTuple):
    """What a text sees.

    Attributes:
        spans: the keys of every row.
        rows: bool `[B, T, 1]`, which rows see any; None if all do.
    """

    spans: KeySpans
    rows: Tensor | None


class TransformerCrossAttentionLayer(Fused):
    anatomy = {
        "attn": Part(),
        "mlp": Part(),
        "ca_norm": Part(),
        "mlp_norm": Part(),
        "ca_scale": Part(),
        "mlp_scale": Part(),
    }

    attn: Any
    mlp: Any
    ca_norm: nn.Module
    mlp_norm: nn.Module
    ca_scale: Any
    mlp_scale: Any

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        *,
        encoder_input: Tensor | None = None,  # [B, S, D], or K and V are in the layer's cache
        encoder_mask: Tensor | None = None,  # bool [B, T, S]
        **kwargs: Any,
    ) -> Tensor:  # [B, T, D]
        known = not (is_recording(x) or self.is_watched()) and self._is_known()
        seen = self._seen(x, encoder_input, encoder_mask) if known else None
        if seen is None:
            given = {"encoder_input": encoder_input, "encoder_mask": encoder_mask}
            return cast(Tensor, super().forward(x, **given, **kwargs))
        k, v = (seen.spans.media(each) for each in self._kv(encoder_input))
        out = self._decode(x, k, v, seen.spans.mask) if may_decode(self, x) else None
        if out is None:
            out = self._add_mlp(self._add_attended(x, k, v, seen.spans.mask))
        return out if seen.rows is None else torch.where(seen.rows, out, x.to(out.dtype))

    def _is_known(self) -> bool:
        """Whether the layer is made of the library's own modules, and computes what their classes say."""
        attn = self.attn
        gates = all(is_plain(gate, _GATE, nn.Identity) for gate in (self.ca_scale, self.mlp_scale))
        if not gates or not is_plain(attn, _ATTENTION) or attn.pos_embeddings is not None:
            return False
        own = getattr(attn._attention_call, "__module__", "") == f"{_MODULES}.attention_utils"
        return own and not (attn.training and attn.attn_dropout > 0)

    def _seen(self, x: Tensor, states: Tensor | None, mask: Tensor | None) -> _Seen | None:
        """What the text sees; None if no kernel can take the mask or the call."""
        attn = self.attn
        cached = attn.kv_cache is not None and attn.cache_enabled
        if states is None and not (cached and attn.kv_cache.size > 0):
            return None  # there are no media
        keys = attn.kv_cache.k_cache.shape[2] if cached else cast(Tensor, states).shape[1]
        if mask is None:
            causal = attn.is_causal and attn.kv_cache is None
            return None if causal or keys == 0 else _Seen(_every_key(x, keys), None)
        if mask.dtype != torch.bool or mask.shape != (*x.shape[:2], keys):
            return None
        dense, rows = once(_rows_that_see, (mask,), layer=self)
        spans = key_spans(dense, x, None if rows is None else rows[..., 0], layer=self)
        return None if spans is None else _Seen(spans, rows)

    def _kv(self, states: Tensor | None) -> tuple[Tensor, Tensor]:  # [B, S, Hkv, d] each
        """Keys and values of new media, or those in the layer's cache."""
        attn = self.attn
        if states is None:
            return attn.kv_cache.k_cache.transpose(1, 2), attn.kv_cache.v_cache.transpose(1, 2)
        k, v = (project(states).unflatten(-1, (-1, attn.head_dim)) for project in (attn.k_proj, attn.v_proj))
        if attn.k_norm is not None:
            k = attn.k_norm(k)
        if attn.kv_cache is None or not attn.cache_enabled:
            return k, v
        k, v = attn.kv_cache.update(k.transpose(1, 2), v.transpose(1, 2))
        return k.transpose(1, 2), v.transpose(1, 2)

    def _decode(self, x: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> Tensor | None:  # [B, 1, D]
        attn, mlp = self.attn, self.mlp
        if not is_plain(mlp, _FEED_FORWARD) or mlp.w3 is None:
            return None
        parts = Parts(
            norm=self.ca_norm,
            to_q=attn.q_proj,
            q_norm=attn.q_norm,
            to_out=attn.output_proj,
            gate=_gate_of(self.ca_scale),
            ff_norm=self.mlp_norm,
            gate_proj=mlp.w1,
            up=mlp.w3,
            activation=mlp.activation,
            down=mlp.w2,
            ff_gate=_gate_of(self.mlp_scale),
        )
        step = step_of(self, parts, x)
        return None if step is None else step.run(x, k, v, mask, attn.head_dim**-0.5)

    def _add_attended(self, x: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> Tensor:
        attn, gate, scale = self.attn, _gate_of(self.ca_scale), self.attn.head_dim**-0.5
        plain = arguments.as_cross_attention(x, self.ca_norm, attn.q_proj, attn.output_proj, attn.q_norm)
        if plain is not None:
            return gated_cross_attention(x, k, v, mask, gate=gate, scale=scale, **plain._asdict())
        q = attn.q_proj(self.ca_norm(x)).unflatten(-1, (attn.num_heads, -1))  # [B, T, H, d]
        if attn.q_norm is not None:
            q = attn.q_norm(q)
        attended = masked_cross_attention(q, k, v, mask, scale=scale)
        return add_gated(x, attn.output_proj(attended.flatten(-2)), gate)

    def _add_mlp(self, x: Tensor) -> Tensor:
        norm, mlp, plain = self.mlp_norm, self.mlp, None
        if is_plain(mlp, _FEED_FORWARD):
            up, gate_proj = (mlp.w1, None) if mlp.w3 is None else (mlp.w3, mlp.w1)
            plain = arguments.as_feed_forward(x, norm, up, mlp.activation, mlp.w2, gate_proj)
        return add_feed_forward(x, plain, lambda x: mlp(norm(x)), _gate_of(self.mlp_scale))


def _gate_of(scale: Any) -> Tensor | None:
    """The alpha of a gate; None if there is no gate."""
    return None if isinstance(scale, nn.Identity) else cast(Tensor, scale.scale)


def _every_key(x: Tensor, keys: int) -> KeySpans:
    one = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    return KeySpans(keys, MediaMask.from_text_time(one, 1), None)


def _rows_that_see(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mask with an axis for heads, and `[B, T, 1]`, which rows see a key; None if all do."""
    rows = mask.any(-1, keepdim=True)
    return mask[:, None], None if bool(rows.all()) else rows


FAMILY = Family(
    "torchtune Llama 3.2 Vision",
    f"{_MODULES}.transformer",
    (TransformerCrossAttentionLayer,),
    "torchtune 0.5.0 to 0.6.1",
)
