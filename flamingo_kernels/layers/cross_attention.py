"""Flamingo's gated cross-attention, by this library's operators: the same parameters, another forward.

The functions below the classes also serve the adapters of `patch` for other libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flamingo import modules

from .._anatomy import Alpha, Kind, Linear, Norm, Number, Part
from .._kept import MaskKey, kept_mask
from .._labels import ATTENTION, labelled
from ..fold import Affine
from ..mask import MediaMask
from ..media_cache import MediaCache, Source, load_or_project
from ..ops import masked_cross_attention
from ..sublayers import arguments, gated_cross_attention
from .decode import Parts, may_decode, step_of
from .fused import (
    ATTENTION_FOLDS,
    BLOCK_FOLDS,
    Fused,
    add_feed_forward,
    add_gated,
    chain_of,
    gate_unless_open,
    is_fused,
    network_of,
    sequential_feed_forward,
)
from .protocols import GatedBlock, MediaAttention

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


class Media(NamedTuple):
    """The media of a text, as the forward of a layer takes them.

    Attributes:
        features: `[B, M, R, D_visual]`, or the keys and values made of them, `[B, M, R, H, d]` each.
        locations: `[B, T]`, where the text has its media; None if all of it sees every medium; or the mask,
            where a library has a rule of its own.
        cached: whether the text follows these locations.
        ahead: whether text sees the medium after it, not the one before.
    """

    features: Tensor | MediaCache | tuple[Tensor, Tensor]
    locations: Tensor | MediaMask | None
    cached: bool = False
    ahead: bool = False

    def follows(self, x: Tensor) -> bool:
        """Whether x `[B, T, ...]` comes after another text, whose keys and values may serve."""
        longer = isinstance(self.locations, Tensor) and self.locations.shape[-1] > x.shape[1]
        return self.cached or longer

    def arguments(self) -> tuple[Any, ...]:
        """As an original takes them, with the last one, whatever that is there, only if it is not usual."""
        unusual = (True,) if self.cached else (False,) if self.ahead else ()
        return (self.features, self.locations, *unusual)


class FusedCrossAttention(Fused):
    """Base class of the fused layers that read a text and its media, over the class of the original."""

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | MediaCache,  # [B, M, R, D_visual]
        media_locations: Tensor | None = None,  # [B, T]
        use_cached_media: bool = False,
    ) -> Tensor:  # [B, T, D]
        return self.run(x, Media(media, media_locations, use_cached_media))

    def run(self, x: Tensor, media: Media) -> Tensor:
        """The result, by the original's forward where hooks must see the calls of its parts."""
        watched = self.is_watched() and self.original_takes(media)
        if watched or not self.fits(x, media):
            return cast(Tensor, super().forward(x, *media.arguments()))
        return self.compute(x, media)

    def fits(self, x: Tensor, media: Media) -> bool:
        """Whether the operators compute a call, or say what is wrong with it."""
        return True

    def original_takes(self, media: Media) -> bool:
        """Whether the original's forward can compute a call with these media."""
        return True

    def compute(self, x: Tensor, media: Media) -> Tensor:
        """The result by this library's operators."""
        raise NotImplementedError


class MaskedCrossAttention(FusedCrossAttention, modules.MaskedCrossAttention):
    """Text attends to the media that come before it, and no other scores are computed.

    ::

        to_out(masked_cross_attention(to_q(LN(x)), *to_kv(media), mask))

        text       a  <image>  b  c  <image>  d
        medium 0   .     #     #  #     .     .        # attended, . never computed
        medium 1   .     .     .  .     #     #

    Args: those of `flamingo.modules.MaskedCrossAttention`, also those of `forward`.

    The first layer that meets a `media_locations` tensor in a forward pass builds the `MediaMask`, and the
    next layers use it: pass all layers the same tensor. torch counts no changes of a tensor made under
    `torch.inference_mode`, so every layer reads such a tensor anew.

    Without gradients, keys and values are kept for text that follows (`use_cached_media=True`): until a call
    without it, until other media come, or until these media are freed. They are made anew if media or weights
    have changed. torch does not count a change through `.data` or NumPy; on a CPU it shows in a sample of the
    numbers, on a GPU it is not seen. A `MediaCache` keeps keys and values for longer.

    Raises: what `masked_cross_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.3.

    Example:
        >>> attn = MaskedCrossAttention(dim=16, dim_visual=8, dim_head=4, heads=2)
        >>> x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 5, 8)
        >>> attn(x, media, torch.tensor([[0, 1, 0, 0, 1, 0]])).shape
        torch.Size([1, 6, 16])
    """

    folds = (*ATTENTION_FOLDS, Affine("norm_media", ("to_kv",)))
    adds_locations = False
    anatomy = {**ATTENTION_ANATOMY, "norm_media": Norm("V", identity=True)}

    def original_takes(self, media: Media) -> bool:
        return not isinstance(media.features, MediaCache)

    def compute(self, x: Tensor, media: Media) -> Tensor:
        _expect_inputs(x, media)
        return attend_to_media(self, x, media)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        media_locations: Tensor | MediaMask | None,
        use_cached_media: bool,
    ) -> Tensor:
        return attend(self, q, k, v, media_locations, use_cached_media)

    def mask(self, x: Tensor, k: Tensor, media: Media) -> MediaMask:
        return media_mask(self, x, k, media)

    def media_source(self) -> Source:
        norm = self.norm_media if isinstance(self.norm_media, nn.LayerNorm) else None
        return Source(self.to_kv, self.heads, norm)


class GatedCrossAttentionBlock(FusedCrossAttention, modules.GatedCrossAttentionBlock):
    """GATED XATTN-DENSE, each of its two sublayers as one node of autograd.

    ::

        z = gated_cross_attention(x, keys and values of media, mask, LN, to_q, to_out, attn_gate)
        gated_feed_forward(z, LN, hidden, output, ff_gate)

    Args: those of `flamingo.modules.GatedCrossAttentionBlock`, also those of `forward`; the media may be a
    `MediaCache`.

    A sublayer that is not plain, because of hooks, adapters or weights of a tensor subclass, is called as a
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

    def compute(self, x: Tensor, media: Media) -> Tensor:
        _expect_inputs(x, media)
        return gated_block(self, x, media)


def _expect_inputs(x: Tensor, media: Media) -> None:
    if isinstance(media.features, Tensor):
        locations = cast("Tensor | None", media.locations)
        modules.check_cross_attention_inputs(x, media.features, locations)


@labelled(ATTENTION)
def attend_to_media(attn: MediaAttention, x: Tensor, media: Media) -> Tensor:  # [B, T, D]
    """A masked cross-attention module, operator by operator."""
    k, v = load_or_project(attn, x, media.features, follows=media.follows(x))
    q = attn.to_q(attn.norm(x)).unflatten(-1, (attn.heads, -1))  # [B, T, H, d]
    seen = attn.mask(q, k, media) if media.ahead else media.locations  # `attend` knows no other rule
    return attn.to_out(attn.attend(q, k, v, seen, media.cached).flatten(-2))


def attend(
    attn: MediaAttention,
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, H, d], or a divisor of B, so that several texts in a row share media
    v: Tensor,  # like k
    media_locations: Tensor | MediaMask | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, H, d]
    """The core of a masked cross-attention module."""
    mask = attn.mask(q, k, Media(k, media_locations, use_cached_media))
    return masked_cross_attention(_join(q, k), k, v, mask, scale=attn.scale).view(q.shape)


def gated_block(block: GatedBlock, x: Tensor, media: Media) -> Tensor:  # [B, T, D]
    """A gated cross-attention block: one operator if it can decode, else sublayers where they are plain."""
    if may_decode(cast(nn.Module, block), x):
        decoded = _decode(block, x, media)
        if decoded is not None:
            return decoded
    z = add_attended(block, x, media)
    return add_network(block, z)


def add_network(block: GatedBlock, z: Tensor) -> Tensor:  # [B, T, D]
    """`z + tanh(ff_gate) * ff(z)`."""
    plain = sequential_feed_forward(block.ff, z)
    return add_feed_forward(z, plain, network_of(block.ff), gate_unless_open(block, "ff_gate"))


def _decode(block: GatedBlock, x: Tensor, media: Media) -> Tensor | None:  # [B, 1, D]
    """The block's result for one token by one operator, or None if the operator does not compute it."""
    chain = chain_of(block.ff)
    if chain is None or not is_fused(block.attn):
        return None
    attn = cast(MediaAttention, block.attn)
    ff_norm, up, activation, down = chain
    parts = Parts(
        norm=attn.norm,
        to_q=attn.to_q,
        to_out=attn.to_out,
        gate=gate_unless_open(block, "attn_gate"),
        ff_norm=ff_norm,
        up=up,
        activation=activation,
        down=down,
        ff_gate=gate_unless_open(block, "ff_gate"),
    )
    step = step_of(cast(nn.Module, block), parts, x)
    if step is None:
        return None
    k, v = load_or_project(attn, x, media.features, follows=media.follows(x))
    return step.run(x, k, v, attn.mask(x, k, media), attn.scale)


def add_attended(block: GatedBlock, x: Tensor, media: Media) -> Tensor:  # [B, T, D]
    """`x + tanh(attn_gate) * attn(x, media)`, as one sublayer where attn is plain."""
    gate = gate_unless_open(block, "attn_gate")
    attn, plain = cast(MediaAttention, block.attn), None
    if is_fused(block.attn):
        plain = arguments.as_cross_attention(x, attn.norm, attn.to_q, attn.to_out)
    if plain is None and is_fused(block.attn):
        return add_gated(x, attend_to_media(attn, x, media), gate)
    if plain is None:
        return add_gated(x, block.attn(x, *media.arguments()), gate)
    k, v = load_or_project(attn, x, media.features, follows=media.follows(x))
    mask = attn.mask(x, k, media)
    z = gated_cross_attention(_join(x, k), k, v, mask, gate=gate, scale=attn.scale, **plain._asdict())
    return z.view(x.shape)


@labelled(ATTENTION)
def media_mask(
    attn: MediaAttention,
    x: Tensor,  # [B, T, ...]
    k: Tensor,  # [B, M, R, H, d], or a divisor of B
    media: Media,
) -> MediaMask:
    """Which media the text of a module sees. Without locations every row sees every medium."""
    if isinstance(media.locations, MediaMask):
        return media.locations
    (batch, length), (sequences, num_media) = x.shape[:2], k.shape[:2]
    texts = _texts(x, k)
    if media.locations is None:
        last = torch.full((sequences, texts * length), num_media, device=x.device)
        return MediaMask.from_text_time(last, num_media, immediate=False)
    if not media.cached and media.locations.shape[-1] != length:
        raise ValueError(
            f"MaskedCrossAttention: expected media_locations with shape {(batch, length)} to match x, got "
            f"{tuple(media.locations.shape)}. Pass use_cached_media=True if the text follows these locations."
        )
    key = MaskKey(
        num_media,
        attn.only_attend_immediate_media,
        attn.policy,
        length if media.cached else None,
        texts,
        attn.adds_locations,
        media.ahead,
    )
    return kept_mask(media.locations, key, attn)


def _texts(x: Tensor, k: Tensor) -> int:
    """How many texts in a row share a sequence of media."""
    batch, sequences = x.shape[0], k.shape[0]
    if batch != sequences and (sequences == 0 or batch % sequences):
        raise ValueError(
            f"MaskedCrossAttention: expected media with B={batch} like x, or a MediaCache with a divisor of "
            f"that, got {sequences}."
        )
    return batch // sequences if sequences else 1


def _join(x: Tensor, k: Tensor) -> Tensor:
    """Texts `[B, T, ...]` with those that share a sequence of media joined one after the other."""
    texts = _texts(x, k)
    return x if texts == 1 else x.reshape(len(k), texts * x.shape[1], *x.shape[2:])
