"""Flamingo's gated cross-attention, by this library's operators: the same parameters, another forward.

The functions below the classes serve adapters of `patch` for other libraries too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flamingo import modules

from .._anatomy import Alpha, Kind, Linear, Norm, Number, Part
from .._kept import MaskKey, kept_mask
from ..fold import Affine
from ..mask import MediaMask
from ..media_cache import MediaCache, Source, media_of
from ..ops import masked_cross_attention
from ..sublayers import arguments, gated_cross_attention
from ..sublayers.labels import ATTENTION, in_part
from .decode import decode, may_decode
from .fused import (
    ATTENTION_FOLDS,
    BLOCK_FOLDS,
    Fused,
    add_feed_forward,
    add_gated,
    gate_of,
    is_fused,
    plain_feed_forward,
)

ATTENTION_ANATOMY: Mapping[str, Kind] = {
    "heads": Number("H"),
    "norm": Norm("D"),
    "to_q": Linear("D", "H*d"),
    "to_kv": Linear("V", "2*H*d"),
    "to_out": Linear("H*d", "D"),
}
BLOCK_ANATOMY: Mapping[str, Kind] = {
    "attn": Part(),
    "attn_gate": Alpha("D"),
    "ff": Part(),
    "ff_gate": Alpha("D"),
}


class MaskedCrossAttention(Fused, modules.MaskedCrossAttention):
    """Text attends to the media that come before it, without a score for any other.

    ::

        to_out(masked_cross_attention(to_q(LN(x)), *to_kv(media), mask))

        text       a  <image>  b  c  <image>  d
        medium 0   .     #     #  #     .     .        # attended, . never computed
        medium 1   .     .     .  .     #     #

    Args: those of `flamingo.modules.MaskedCrossAttention`, also those of `forward`.

    The `MediaMask` is built by the first layer of a forward pass that meets a `media_locations` tensor and
    kept for the next ones: pass all layers the same tensor. One made under `torch.inference_mode` counts no
    changes, so every layer reads it anew.

    Without gradients, keys and values are kept for text that follows (`use_cached_media=True`), until a call
    without it, other media, or the end of these. They are made anew if media or weights were changed; what
    torch does not count, as through `.data` or NumPy, is seen on a CPU in a sample of the numbers, and on a
    GPU not at all. A `MediaCache` keeps them for longer.

    Raises: what `masked_cross_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.3.

    Example:
        >>> attn = MaskedCrossAttention(dim=16, dim_visual=8, dim_head=4, heads=2)
        >>> x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 5, 8)
        >>> attn(x, media, torch.tensor([[0, 1, 0, 0, 1, 0]])).shape
        torch.Size([1, 6, 16])
    """

    folds = (*ATTENTION_FOLDS, Affine("norm_media", ("to_kv",)))
    anatomy = {**ATTENTION_ANATOMY, "norm_media": Norm("V", identity=True)}

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        if self.is_watched() and not isinstance(media, MediaCache):
            return super().forward(x, media, media_locations, use_cached_media)
        if not isinstance(media, MediaCache):
            modules.check_cross_attention_inputs(x, media, media_locations)
        return attend_to_media(self, x, media, media_locations, use_cached_media)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, media_locations: Tensor | None, use_cached_media: bool
    ) -> Tensor:
        return attend(self, q, k, v, media_locations, use_cached_media)

    def media_source(self) -> Source:
        norm = self.norm_media if isinstance(self.norm_media, nn.LayerNorm) else None
        return Source(self.to_kv, self.heads, norm)


class GatedCrossAttentionBlock(Fused, modules.GatedCrossAttentionBlock):
    """GATED XATTN-DENSE, each of its two sublayers as one node of autograd.

    ::

        z = gated_cross_attention(x, keys and values of media, mask, LN, to_q, to_out, attn_gate)
        gated_feed_forward(z, LN, hidden, output, ff_gate)

    Args: those of `flamingo.modules.GatedCrossAttentionBlock`, also those of `forward`; the media may be a
    `MediaCache`.

    A sublayer that is not plain, as with hooks, adapters or weights of a tensor subclass, is called as a
    module, and its gate and residual take one pass. Gates in float32 promote the result as in the reference.

    Raises: what the operators raise. Determinism: theirs.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4.

    Example:
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
        >>> x, media = torch.randn(1, 3, 16), torch.randn(1, 1, 5, 8)
        >>> torch.equal(block(x, media, torch.tensor([[1, 0, 0]])), x)
        True
    """

    folds = BLOCK_FOLDS
    anatomy = BLOCK_ANATOMY

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn.__class__ = MaskedCrossAttention

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        if self.is_watched():
            return super().forward(x, cast(Tensor, media), media_locations, use_cached_media)
        return gated_block(self, x, media, media_locations, use_cached_media)


def attend_to_media(
    attn: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """What a masked cross-attention module computes, operator by operator."""
    k, v = media_of(attn, x, media, follows=use_cached_media)
    q = attn.to_q(attn.norm(x)).unflatten(-1, (attn.heads, -1))  # [B, T, H, d]
    return attn.to_out(attn.attend(q, k, v, media_locations, use_cached_media).flatten(-2))


def attend(
    attn: Any,
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, H, d], or with a divisor of B, of which each serves as many texts in a row
    v: Tensor,  # like k
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, H, d]
    """The core of a masked cross-attention module."""
    mask = mask_of(attn, q, k, media_locations, use_cached_media)
    return masked_cross_attention(_fold(q, k), k, v, mask, scale=attn.scale).view(q.shape)


def gated_block(
    block: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """What a gated cross-attention block computes, by sublayers where they are plain."""
    given = (x, media, media_locations, use_cached_media)
    inputs = _inputs_of(block.attn, *given)
    decoded = None if inputs is None or not may_decode(x) else _decoded(block, x, inputs)
    if decoded is not None:
        return decoded
    z = _add_attended(block, inputs, *given)
    return add_feed_forward(z, block.ff, gate_of(block, "ff_gate"))


def add_attended(
    block: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """`x + tanh(attn_gate) * attn(x, media)`, as one sublayer where attn is plain."""
    given = (x, media, media_locations, use_cached_media)
    return _add_attended(block, _inputs_of(block.attn, *given), *given)


class _Inputs(NamedTuple):
    """What an attention of plain parts is made of beside the text."""

    parts: arguments.CrossAttention
    k: Tensor  # [B, M, R, H, d], or with a divisor of B
    v: Tensor
    mask: MediaMask


def _inputs_of(
    attn: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> _Inputs | None:
    fused = is_fused(attn)
    parts = arguments.cross_attention_of(x, attn.norm, attn.to_q, attn.to_out) if fused else None
    if parts is None:
        return None
    k, v = media_of(attn, x, media, follows=use_cached_media)
    return _Inputs(parts, k, v, mask_of(attn, x, k, media_locations, use_cached_media))


def _decoded(block: Any, x: Tensor, inputs: _Inputs) -> Tensor | None:  # [B, 1, D]
    """The block's result for one token by one operator, or None where that does not compute it."""
    ff, (attn, k, v, mask) = plain_feed_forward(block.ff, x), inputs
    if ff is None or len(x) != len(k):
        return None
    return decode(x, k, v, mask, attn, ff, (block.attn_gate, block.ff_gate), block.attn.scale)


def _add_attended(
    block: Any,
    inputs: _Inputs | None,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,
    media_locations: Tensor | None,
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    gate = gate_of(block, "attn_gate")
    if inputs is None:
        attended = block.attn(x, media, media_locations, *([True] if use_cached_media else []))
        return add_gated(x, attended, gate)
    parts, k, v, mask = inputs
    z = gated_cross_attention(_fold(x, k), k, v, mask, gate=gate, scale=block.attn.scale, **parts._asdict())
    return z.view(x.shape)


@in_part(ATTENTION)
def mask_of(
    attn: Any,
    x: Tensor,  # [B, T, ...]
    k: Tensor,  # [B, M, R, H, d], or with a divisor of B
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> MediaMask:
    """Which media the text of a module sees. Without locations every row sees every medium."""
    (batch, length), (sequences, num_media) = x.shape[:2], k.shape[:2]
    texts = _texts(x, k)
    if media_locations is None:
        last = torch.full((sequences, texts * length), num_media, device=x.device)
        return MediaMask.from_text_time(last, num_media, immediate=False)
    if not use_cached_media and media_locations.shape[-1] != length:
        raise ValueError(
            f"MaskedCrossAttention: expected media_locations with shape {(batch, length)} to match x, got "
            f"{tuple(media_locations.shape)}. Pass use_cached_media=True if the text follows these locations."
        )
    cached = length if use_cached_media else None
    key = MaskKey(num_media, attn.only_attend_immediate_media, attn.policy, cached, texts)
    return kept_mask(media_locations, key, attn)


def _texts(x: Tensor, k: Tensor) -> int:
    """How many texts in a row share a sequence of media."""
    batch, sequences = len(x), len(k)
    if batch != sequences and (sequences == 0 or batch % sequences):
        raise ValueError(
            f"MaskedCrossAttention: expected media with B={batch} like x, or a MediaCache with a divisor of "
            f"that, got {sequences}."
        )
    return batch // sequences if sequences else 1


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """The texts `[B, T, ...]` that share a sequence of media, one after the other."""
    texts = _texts(x, k)
    return x if texts == 1 else x.reshape(len(k), texts * x.shape[1], *x.shape[2:])
