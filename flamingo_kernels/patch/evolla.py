"""Evolla of transformers: the gated cross-attention of text to a protein, and the attention of its resampler.

Padding text, and text of a sequence without a protein, averages all values, as in the original. Structures
and alignments beside the protein, and masks for their keys, are left to the original's forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._anatomy import Alpha, Linear, Norm, Number, Part
from .._kept import once
from .._predicates import is_plain, is_recording
from ..fold import Affine, Gate, Scale
from ..layers.decode import Parts, may_decode, step_of
from ..layers.fused import Fused, add_feed_forward, add_gated, gate_unless_open
from ..layers.resampler import LatentAttention, perceive
from ..mask import MediaMask
from ..media_cache import Source
from ..ops import masked_cross_attention
from ..sublayers import arguments, gated_cross_attention
from .dense import in_order, media_first, read_mask, reads_padding_when_run
from .dense_attention import dense_perceiver_attention
from .family import TRANSFORMERS, Family

_HOME = "transformers.models.evolla.modeling_evolla"
_FEED_FORWARD = f"{_HOME}.EvollaFeedForward"


class EvollaSequenceCompressorAttention(LatentAttention):
    def forward(
        self,
        x: Tensor,  # [N, S, D]
        latents: Tensor,  # [N, R, D]
        mask: Tensor,  # [N, S + R], 1 where a key is seen
    ) -> Tensor:  # [N, R, D]
        first = media_first(mask, x, latents, layer=self)
        late = first is None and reads_padding_when_run(mask, x, latents, sdpa=False)
        if late and not self.is_watched():
            return self._attend(x, latents, mask)
        if first is None or self.is_watched():
            return cast(Tensor, super().forward(x, latents, mask))
        order, lengths = first
        k, v = Source(self.to_kv, self.heads, self.norm_media).project(in_order(x, order)[:, None])
        return perceive(self, latents[:, None], k, v, lengths)[:, 0]

    def _attend(self, x: Tensor, latents: Tensor, mask: Tensor) -> Tensor:  # [N, R, D]
        """The same in a compiled model."""
        n, source = self.norm_latents(latents), Source(self.to_kv, self.heads)
        q = self.to_q(n).unflatten(-1, (self.heads, -1))  # [N, R, H, d]
        tensors = (q, *source.project(self.norm_media(x)), *source.project(n))
        out = dense_perceiver_attention(*tensors, mask, scale=self.scale, sdpa=False)
        return self.to_out(out.flatten(-2))


class EvollaSequenceAlignerCrossAttention(Fused):
    folds = (
        Affine("attention_norm", ("query",)),
        Scale("scale", ("query",)),
        Gate("gate_attention", "out_proj"),
        Affine("ff.norm", ("ff.fc1",)),
        Gate("gate_ffw", "ff.fc2"),
    )

    anatomy = {
        "num_attention_heads": Number("H"),
        "attention_head_size": Number("d"),
        "all_head_size": Number("H*d"),
        "attention_norm": Norm("D"),
        "query": Linear("D", "H*d"),
        "key_protein": Linear("P", "H*d"),
        "value_protein": Linear("P", "H*d"),
        "key_structure": Linear("S", "H*d", optional=True),
        "value_structure": Linear("S", "H*d", optional=True),
        "key_msa": Linear("A", "H*d", optional=True),
        "value_msa": Linear("A", "H*d", optional=True),
        "dropout": Part(),  # not called
        "out_proj": Linear("H*d", "D"),
        "ff": Part(),
        "gate_attention": Alpha("D"),
        "gate_ffw": Alpha("D"),
    }

    num_attention_heads: int
    scale: float
    attention_norm: nn.Module
    query: nn.Module
    key_protein: nn.Module
    value_protein: nn.Module
    out_proj: nn.Module
    ff: Any
    gate_attention: nn.Parameter  # [1]
    gate_ffw: nn.Parameter

    def forward(
        self,
        query_states: Tensor,  # [B, T, D]
        protein_kv_states: Tensor | None,  # [B, S, D]
        structure_kv_states: Tensor | None,
        msa_kv_states: Tensor | None,
        query_attn_mask: Tensor | None,  # [B, T], 0 at padding
        protein_kv_attn_mask: Tensor | None = None,
        structure_kv_attn_mask: Tensor | None = None,
        msa_kv_attn_mask: Tensor | None = None,
        protein_batch_mask: Tensor | None = None,  # [B], 0 without a protein
        structure_batch_mask: Tensor | None = None,
        msa_batch_mask: Tensor | None = None,
        cache: Any = None,  # not used
    ) -> Tensor:  # [B, T, D]
        others = (structure_kv_states, msa_kv_states, protein_kv_attn_mask)
        spans = None
        alone = all(other is None for other in others) and not self.is_watched()
        if alone and protein_kv_states is not None:
            spans = self._spans(query_states, protein_kv_states, query_attn_mask, protein_batch_mask)
        if spans is None:
            states = (query_states, protein_kv_states, structure_kv_states, msa_kv_states, query_attn_mask)
            masks = (protein_kv_attn_mask, structure_kv_attn_mask, msa_kv_attn_mask)
            batch_masks = (protein_batch_mask, structure_batch_mask, msa_batch_mask)
            return cast(Tensor, super().forward(*states, *masks, *batch_masks, cache))
        if spans.num_media == 0:
            return query_states  # no sequence of the batch has a protein
        media = cast(Tensor, protein_kv_states).to(query_states)
        if may_decode(self, query_states):
            decoded = self._decode(query_states, media, spans)
            if decoded is not None:
                return decoded
        z = self._add_attended(query_states, media, spans)
        z = add_feed_forward(z, self._feed_forward(z), self.ff, gate_unless_open(self, "gate_ffw"))
        if torch.compiler.is_compiling():
            return torch.where(cast(Tensor, protein_batch_mask).any(), z, query_states.to(z.dtype))
        return z

    def _spans(self, x: Tensor, media: Tensor, rows: Tensor | None, batch: Tensor | None) -> MediaMask | None:
        if rows is None or batch is None or rows.shape != x.shape[:2]:
            return None
        if is_recording(x):
            return _spans_of_all(rows, batch, media.shape[1]) if torch.compiler.is_compiling() else None
        return cast("MediaMask | None", once(_read_spans, (rows, batch), media.shape[1], layer=self))

    def _decode(self, x: Tensor, media: Tensor, spans: MediaMask) -> Tensor | None:  # [B, 1, D]
        ff: Any = self.ff
        if torch.compiler.is_compiling() or not is_plain(ff, _FEED_FORWARD):
            return None
        parts = Parts(
            norm=self.attention_norm,
            to_q=self.query,
            to_out=self.out_proj,
            gate=gate_unless_open(self, "gate_attention"),
            ff_norm=ff.norm,
            up=ff.fc1,
            activation=ff.activation,
            down=ff.fc2,
            ff_gate=gate_unless_open(self, "gate_ffw"),
        )
        step = step_of(self, parts, x)
        return None if step is None else step.run(x, *self._kv(media, spans), spans, self.scale)

    def _kv(self, media: Tensor, spans: MediaMask) -> tuple[Tensor, Tensor]:  # [B, M, R, H, d] each
        split = (spans.num_media, media.shape[1] // spans.num_media)
        k, v = (project(media).unflatten(1, split) for project in (self.key_protein, self.value_protein))
        heads = (self.num_attention_heads, -1)
        return k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _add_attended(self, x: Tensor, media: Tensor, spans: MediaMask) -> Tensor:
        heads, gate = (self.num_attention_heads, -1), gate_unless_open(self, "gate_attention")
        k, v = self._kv(media, spans)
        plain = arguments.as_cross_attention(x, self.attention_norm, self.query, self.out_proj)
        if plain is None:
            q = self.query(self.attention_norm(x)).unflatten(-1, heads)  # [B, T, H, d]
            attended = masked_cross_attention(q, k, v, spans, scale=self.scale)
            return add_gated(x, self.out_proj(attended.flatten(-2)), gate)
        return gated_cross_attention(x, k, v, spans, gate=gate, scale=self.scale, **plain._asdict())

    def _feed_forward(self, x: Tensor) -> arguments.FeedForward | None:
        """The feed-forward network, if it is plain."""
        ff = self.ff
        if not is_plain(ff, _FEED_FORWARD):
            return None
        return arguments.as_feed_forward(x, ff.norm, ff.fc1, ff.activation, ff.fc2)


def _seeing(rows: Tensor, batch: Tensor) -> Tensor:  # [B, T]
    """Which rows see the protein: all of it, as the others see nothing."""
    return (rows == 1) & (batch == 1).to(rows.device)[:, None]


def _spans_of_all(rows: Tensor, batch: Tensor, keys: int) -> MediaMask | None:
    """What `_read_spans` finds, from shapes: a traced model has no numbers to read."""
    if keys == 0:
        return None
    return MediaMask.from_text_time(_seeing(rows, batch).long(), 1, immediate=False, policy="open_flamingo")


def _read_spans(rows: Tensor, batch: Tensor, keys: int) -> MediaMask | None:
    seen = _seeing(rows, batch)
    if not bool(batch.any()):
        keys = 0
    return read_mask(seen[..., None].expand(-1, -1, keys).contiguous(), ~seen)


FAMILY = Family(
    "transformers Evolla",
    _HOME,
    (EvollaSequenceCompressorAttention, EvollaSequenceAlignerCrossAttention),
    TRANSFORMERS,
)
