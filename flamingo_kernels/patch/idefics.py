"""Idefics of transformers: its gated cross-attention blocks, and the attention of its resampler.

A block calls its attention as a module if the mask is no `MediaMask`, in training with dropout, with other
attention implementations than "eager" and "sdpa", and if the attention has hooks. A compiled model reads the
mask when it runs, and calls the attention for one token. Gates, residuals and the norm between are fused all
the same.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from .._anatomy import Alpha, Linear, Norm, Number, Part
from .._kept import kept_kv
from .._predicates import is_plain
from ..layers.decode import may_decode, step_of
from ..layers.fused import Fused, add_feed_forward, add_gated, gate_unless_open
from ..mask import Policy
from ..ops import masked_cross_attention, perceiver_attention
from ..sublayers import arguments, gated_cross_attention
from .decoder_layer import DecoderLayer, folds_of
from .dense import KeySpans, key_spans, reads_when_run
from .dense_attention import dense_cross_attention
from .family import TRANSFORMERS, Family
from .softmax import is_sdpa, is_softmax

_HOME = "transformers.models.idefics"
_ATTENTION = f"{_HOME}.modeling_idefics.IdeficsAttention"
_MLP = f"{_HOME}.modeling_idefics.IdeficsMLP"


class IdeficsGatedCrossAttentionLayer(DecoderLayer):
    policy: Policy = "zero"
    folds = folds_of(
        "alpha_cross_attn", "alpha_dense", queries=("cross_attn.q_layer_norm", "cross_attn.q_proj")
    )
    anatomy = {
        **DecoderLayer.anatomy,
        "alpha_cross_attn": Alpha("D"),
        "alpha_dense": Alpha("D"),
        "act_cross_attn": Part(nn.Tanh),
        "act_dense": Part(nn.Tanh),
    }

    config: float  # the model's dropout, by this name
    alpha_cross_attn: nn.Parameter  # [1] or [1, 1, D]
    alpha_dense: nn.Parameter

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        attention_mask: Tensor | None = None,  # of the text, not used
        image_hidden_states: Tensor | None = None,  # [B, M * R, D_visual]
        image_attention_mask: Tensor | None = None,  # [B, 1, T, M * R], added to the scores
        cross_attention_gate: Tensor | None = None,  # [B, T], 0 where a token sees no image
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # [B, T, D]
        media, sees = image_hidden_states, cross_attention_gate
        if media is None or sees is None or cache is not None or self.is_watched():
            given = (attention_mask, media, image_attention_mask, sees)
            return cast(Tensor, super().forward(hidden_states, *given, cache, **kwargs))
        x, mask, drops = hidden_states, image_attention_mask, self._drops()
        spans = None
        if mask is not None and _replaceable(self.cross_attn):
            spans = key_spans(mask, x, sees, layer=self)
        if may_decode(self, x) and spans is not None and not drops:
            decoded = self._decode(x, media, spans)
            if decoded is not None:
                return decoded
        z = self._add_attended(x, media, mask, sees, spans, kwargs)
        norm, mlp = self.post_attention_layernorm, self.mlp
        plain = None if drops else arguments.as_glu(z, norm, mlp, _MLP)
        gate = gate_unless_open(self, "alpha_dense")
        return add_feed_forward(z, plain, lambda x: self._drop(mlp(norm(x))), gate)

    def _decode(self, x: Tensor, media: Tensor, spans: KeySpans) -> Tensor | None:  # [B, 1, D]
        attn = self.cross_attn
        if not is_plain(self.mlp, _MLP):
            return None
        parts = self.parts(_query_norm(attn), "alpha_cross_attn", "alpha_dense")
        step = step_of(self, parts, x)
        if step is None:
            return None
        return step.run(x, *self._kv(media, spans, step=True), spans.mask, attn.scaling)

    def _kv(self, media: Tensor, spans: KeySpans, *, step: bool) -> tuple[Tensor, Tensor]:
        attn = self.cross_attn
        k, v = kept_kv(self, media, _kv_modules(attn), lambda: _project(attn, media), step=step)
        return spans.media(k), spans.media(v)

    def _add_attended(
        self,
        x: Tensor,
        media: Tensor,
        mask: Tensor | None,
        sees: Tensor,
        spans: KeySpans | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        attn, norm, gate = self.cross_attn, self.input_layernorm, gate_unless_open(self, "alpha_cross_attn")
        if spans is None:
            replaceable = mask is not None and _replaceable(attn)
            if replaceable and reads_when_run(cast(Tensor, mask), x, sees, sdpa=is_sdpa(attn)):
                y = _attend(attn, norm(x), media, cast(Tensor, mask), sees)
            else:
                y, _ = attn(hidden_states=norm(x), key_value_states=media, attention_mask=mask, **kwargs)
            y = self._drop(y).masked_fill((sees == 0)[..., None], 0)
            return add_gated(x, y, gate)
        k, v = self._kv(media, spans, step=x.shape[1] == 1)
        plain = arguments.as_cross_attention(x, norm, attn.q_proj, attn.o_proj, _query_norm(attn))
        if plain is None or self._drops():
            q = _queries(attn, norm(x))
            out = masked_cross_attention(q, k, v, spans.mask, scale=attn.scaling)
            return add_gated(x, self._drop(attn.o_proj(out.flatten(-2))), gate)
        return gated_cross_attention(x, k, v, spans.mask, gate=gate, scale=attn.scaling, **plain._asdict())

    def _drops(self) -> bool:
        return bool(self.config and self.training)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config, self.training)


def _replaceable(attn: Any) -> bool:
    """Whether the block may compute its attention instead of calling it."""
    dropout = attn.dropout and attn.training
    known = is_plain(attn, _ATTENTION) and is_softmax(attn.config._attn_implementation)
    # Rows without an image are 0 in the original; with a bias the block would give them that.
    biased = any("bias" in name for name, _ in attn.o_proj.named_parameters())
    return known and not dropout and not biased


def _query_norm(attn: Any) -> nn.Module | None:
    return attn.q_layer_norm if attn.qk_layer_norms else None


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.num_heads, attn.head_dim))


def _project(attn: Any, media: Tensor) -> tuple[Tensor, Tensor]:  # [B, M * R, H, d] each
    k = _heads(attn, attn.k_proj(media))
    return attn.k_layer_norm(k) if attn.qk_layer_norms else k, _heads(attn, attn.v_proj(media))


def _queries(attn: Any, x: Tensor) -> Tensor:  # [B, T, H, d]
    q = _heads(attn, attn.q_proj(x))
    return cast(Tensor, attn.q_layer_norm(q)) if attn.qk_layer_norms else q


def _attend(attn: Any, x: Tensor, media: Tensor, mask: Tensor, rows: Tensor) -> Tensor:  # [B, T, D]
    """What the attention computes, in a compiled model."""
    k, v = _project(attn, media)
    q, sdpa = _queries(attn, x), is_sdpa(attn)
    out = dense_cross_attention(q, k, v, mask, rows, scale=attn.scaling, sdpa=sdpa)
    return cast(Tensor, attn.o_proj(out.flatten(-2)))


def _kv_modules(attn: Any) -> tuple[nn.Module, ...]:
    return (attn.k_proj, attn.v_proj, *([attn.k_layer_norm] if attn.qk_layer_norms else []))


class IdeficsPerceiverAttention(Fused):
    anatomy = {
        "n_heads": Number("H"),
        "head_dim": Number("d"),
        "context_layer_norm": Norm("D"),
        "latents_layer_norm": Norm("D"),
        "q_layer_norm": Norm("d", optional=True),
        "k_layer_norm": Norm("d", optional=True),
        "q_proj": Linear("D", "H*d"),
        "k_proj": Linear("D", "H*d"),
        "v_proj": Linear("D", "H*d"),
        "output_proj": Linear("H*d", "D"),
    }

    n_heads: int
    qk_layer_norms: bool
    qk_scale: float
    context_layer_norm: nn.LayerNorm
    latents_layer_norm: nn.LayerNorm
    q_layer_norm: nn.LayerNorm
    k_layer_norm: nn.LayerNorm
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    output_proj: nn.Linear

    def forward(
        self,
        context: Tensor,  # [N, S, D]
        latents: Tensor,  # [N, R, D]
    ) -> Tensor:  # [N, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(context, latents))
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        q = self._heads(self.q_proj(latents))  # [N, R, H, d]
        q = self.q_layer_norm(q) if self.qk_layer_norms else q
        out = perceiver_attention(q, *self._kv(context), *self._kv(latents), scale=self.qk_scale)
        return self.output_proj(out.flatten(-2))

    def _kv(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, ., H, d] each
        k = self._heads(self.k_proj(x))
        return self.k_layer_norm(k) if self.qk_layer_norms else k, self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))


FAMILY = Family(
    "transformers Idefics",
    f"{_HOME}.modeling_idefics",
    (IdeficsGatedCrossAttentionLayer,),
    TRANSFORMERS,
)
RESAMPLER = Family(
    "transformers Idefics, resampler",
    f"{_HOME}.perceiver",
    (IdeficsPerceiverAttention,),
    TRANSFORMERS,
)
