"""Idefics of transformers: its gated cross-attention blocks, and the attention of its resampler.

The classes here hold a forward and nothing else, as those for open_flamingo. A mask that is no `MediaMask`, a
dropout in training, an attention implementation other than "eager" and "sdpa", and hooks on the block's
attention leave that attention to the module; gates, residuals and the norm between are fused all the same.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from .._anatomy import Alpha, Linear, Norm, Number, Part
from .._kept import kept_kv
from .._predicates import is_plain
from ..fold import Affine, Gate, Scale
from ..layers.fused import Fused, add_gated, gate_of
from ..mask import Policy
from ..ops import masked_cross_attention, perceiver_attention
from ..sublayers import arguments, gated_cross_attention, gated_feed_forward
from .dense import is_softmax, key_spans
from .family import TRANSFORMERS, Family

_HOME = "transformers.models.idefics"
_ATTENTION = f"{_HOME}.modeling_idefics.IdeficsAttention"
_MLP = f"{_HOME}.modeling_idefics.IdeficsMLP"


class IdeficsGatedCrossAttentionLayer(Fused):
    policy: Policy = "zero"
    folds = (
        Affine("input_layernorm", ("cross_attn.q_proj",)),
        Scale("cross_attn.scaling", ("cross_attn.q_layer_norm", "cross_attn.q_proj")),
        Gate("alpha_cross_attn", "cross_attn.o_proj"),
        Affine("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Gate("alpha_dense", "mlp.down_proj"),
    )

    anatomy = {
        "input_layernorm": Norm("D"),
        "post_attention_layernorm": Norm("D"),
        "cross_attn": Part(),
        "mlp": Part(),
        "alpha_cross_attn": Alpha("D"),
        "alpha_dense": Alpha("D"),
        "act_cross_attn": Part(nn.Tanh),
        "act_dense": Part(nn.Tanh),
    }

    config: float  # the model's dropout, by this name
    cross_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    alpha_cross_attn: nn.Parameter  # [1] or [1, 1, D]
    alpha_dense: nn.Parameter

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        attention_mask: Tensor | None = None,  # of the text, not used
        image_hidden_states: Tensor | None = None,  # [B, M * R, D_visual]
        image_attention_mask: Tensor | None = None,  # [B, 1, T, M * R], added to the scores
        cross_attention_gate: Tensor | None = None,  # [B, T], 0 where a token sees no image
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # [B, T, D]
        media, sees = image_hidden_states, cross_attention_gate
        if media is None or sees is None or past_key_values is not None or self.is_watched():
            given = (attention_mask, media, image_attention_mask, sees)
            return cast(Tensor, super().forward(hidden_states, *given, past_key_values, **kwargs))
        z = self._add_attended(hidden_states, media, image_attention_mask, sees, kwargs)
        return self._add_feed_forward(z)

    def _add_attended(
        self, x: Tensor, media: Tensor, mask: Tensor | None, sees: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        attn, norm, gate = self.cross_attn, self.input_layernorm, gate_of(self, "alpha_cross_attn")
        spans = key_spans(mask, x, sees, layer=self) if mask is not None and _replaceable(attn) else None
        if spans is None:
            y, _ = attn(hidden_states=norm(x), key_value_states=media, attention_mask=mask, **kwargs)
            y = F.dropout(y, self.config, self.training).masked_fill((sees == 0)[..., None], 0)
            return add_gated(x, y, gate)
        step = x.shape[1] == 1
        kv = kept_kv(self, media, _kv_modules(attn), lambda: _project(attn, media), step=step)
        k, v = map(spans.media, kv)
        q_norm = attn.q_layer_norm if attn.qk_layer_norms else None
        parts = arguments.cross_attention_of(x, norm, attn.q_proj, attn.o_proj, q_norm)
        if parts is None or self._drops():
            q = _heads(attn, attn.q_proj(norm(x)))  # [B, T, H, d]
            q = q if q_norm is None else q_norm(q)
            out = masked_cross_attention(q, k, v, spans.mask, scale=attn.scaling)
            y = F.dropout(attn.o_proj(out.flatten(-2)), self.config, self.training)
            return add_gated(x, y, gate)
        return gated_cross_attention(x, k, v, spans.mask, gate=gate, scale=attn.scaling, **parts._asdict())

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        norm, mlp, gate = self.post_attention_layernorm, self.mlp, gate_of(self, "alpha_dense")
        parts = None if self._drops() else arguments.glu_of(x, norm, mlp, _MLP)
        if parts is None:
            return add_gated(x, F.dropout(mlp(norm(x)), self.config, self.training), gate)
        return gated_feed_forward(x, gate=gate, **parts._asdict())

    def _drops(self) -> bool:
        return bool(self.config and self.training)


def _replaceable(attn: Any) -> bool:
    """Whether the block may compute what its attention computes."""
    dropout = attn.dropout and attn.training
    known = is_plain(attn, _ATTENTION) and is_softmax(attn.config._attn_implementation)
    biased = any("bias" in name for name, _ in attn.o_proj.named_parameters())  # would show in empty rows
    return known and not dropout and not biased


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.num_heads, attn.head_dim))


def _project(attn: Any, media: Tensor) -> tuple[Tensor, Tensor]:  # [B, M * R, H, d] each
    k = _heads(attn, attn.k_proj(media))
    return attn.k_layer_norm(k) if attn.qk_layer_norms else k, _heads(attn, attn.v_proj(media))


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
        heads = (self.n_heads, -1)
        q = self.q_proj(latents).unflatten(-1, heads)  # [N, R, H, d]
        k_media, k_latents = (self.k_proj(x).unflatten(-1, heads) for x in (context, latents))
        v_media, v_latents = (self.v_proj(x).unflatten(-1, heads) for x in (context, latents))
        if self.qk_layer_norms:
            q, k_media, k_latents = (
                self.q_layer_norm(q),
                self.k_layer_norm(k_media),
                self.k_layer_norm(k_latents),
            )
        out = perceiver_attention(q, k_media, v_media, k_latents, v_latents, scale=self.qk_scale)
        return self.output_proj(out.flatten(-2))


FAMILY = Family(
    "transformers Idefics",
    f"{_HOME}.modeling_idefics",
    {"IdeficsGatedCrossAttentionLayer": IdeficsGatedCrossAttentionLayer},
    TRANSFORMERS,
)
RESAMPLER = Family(
    "transformers Idefics, resampler",
    f"{_HOME}.perceiver",
    {"IdeficsPerceiverAttention": IdeficsPerceiverAttention},
    TRANSFORMERS,
)
