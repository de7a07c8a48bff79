"""Flamingo's Perceiver Resampler, computed by this library's operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from flamingo import modules

from .._anatomy import Kind, Linear, Norm, Number, Part, Weight
from ..media_cache import Source, keys_and_values
from ..ops import perceiver_attention
from .fused import Fused, add_feed_forward, is_fused, network_of, sequential_feed_forward


class LatentAttention(Fused):
    """Base class of the perceiver attentions with open_flamingo's names.

    Attributes:
        heads: the number of heads H.
        scale: factor on the scores.
        norm_media: over the features.
        norm_latents: over the latents.
        to_q: the projection to queries.
        to_kv: the projection to keys and values side by side.
        to_out: the projection behind the heads.
    """

    anatomy: Mapping[str, Kind] = {
        "heads": Number("H"),
        "norm_media": Norm("D"),
        "norm_latents": Norm("D"),
        "to_q": Linear("D", "H*d"),
        "to_kv": Linear("D", "2*H*d"),
        "to_out": Linear("H*d", "D"),
    }

    heads: int
    scale: float
    norm_media: nn.LayerNorm
    norm_latents: nn.LayerNorm
    to_q: nn.Linear
    to_kv: nn.Linear
    to_out: nn.Linear

    @property
    def norms(self) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """Over the features, and over the latents."""
        return self.norm_media, self.norm_latents

    @property
    def softmax_scale(self) -> float:
        return self.scale


class PerceiverAttention(LatentAttention, modules.PerceiverAttention):
    """Latents attend to the features of their medium and to themselves, without concatenating the two.

    Args: those of `flamingo.modules.PerceiverAttention`, also those of `forward`.

    Raises: what `perceiver_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.1 and figure 5.

    Example:
        >>> attn = PerceiverAttention(dim=16, dim_head=4, heads=2)
        >>> attn(torch.randn(2, 1, 9, 16), torch.randn(2, 1, 4, 16)).shape
        torch.Size([2, 1, 4, 16])
    """

    def attend(
        self,
        q: Tensor,
        k_media: Tensor,
        v_media: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        media_lengths: Tensor | None = None,
    ) -> Tensor:
        return perceiver_attention(
            q, k_media, v_media, k_latents, v_latents, media_lengths=media_lengths, scale=self.scale
        )


class PerceiverResampler(Fused, modules.PerceiverResampler):
    """Turns any number of visual features of a medium into a fixed number of latents.

    Args: those of `flamingo.modules.PerceiverResampler`, also those of `forward`.

    Source: Flamingo (arXiv 2204.14198), section 2.1 and figure 5.

    Example:
        >>> resampler = PerceiverResampler(dim=16, depth=1, dim_head=4, heads=2, num_latents=5)
        >>> resampler(torch.randn(2, 3, 1, 9, 16)).shape
        torch.Size([2, 3, 5, 16])
    """

    anatomy = {
        "project_input": Part(),
        "latents": Weight("R D"),
        "frame_embs": Weight("K D", optional=True),
        "media_time_embs": Weight("M 1 D", optional=True),
        "layers": Part(nn.ModuleList),
        "norm": Norm("D"),
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for layer in self.layers:
            attn, _ = cast(nn.ModuleList, layer)
            attn.__class__ = PerceiverAttention

    def resample(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if self.is_watched():
            return super().resample(x, lengths)
        return resample(self.latents, self.layers, x, lengths)


def resample(
    latents: Tensor,  # [R, D] for all media, or [B, M, R, D], where B and M may be 1
    layers: Iterable[nn.Module],  # of an attention and a feed-forward network each
    x: Tensor,  # [B, M, S, D]
    lengths: Tensor | None,  # [B, M]
) -> Tensor:  # [B, M, R, D]
    """The layers of a resampler: they norm the features once and take all keys and values in one product.

    In the first layer the latents are the same for all media, so they are projected once.
    """
    attns, ffs = zip(*(layer.children() for layer in layers), strict=True)
    latents = latents if latents.ndim == 4 else latents[None, None]
    if not all(map(is_fused, attns)):
        latents = latents.expand(*x.shape[:2], -1, -1)
        for attn, ff in zip(attns, ffs, strict=True):
            attended = attn(x, latents) if lengths is None else attn(x, latents, lengths)
            latents = add_network(latents + attended, ff)
        return latents
    sources = [Source(attn.to_kv, attn.heads, attn.norms[0]) for attn in attns]
    flat = None if lengths is None else lengths.flatten()
    for attn, ff, kv in zip(attns, ffs, keys_and_values(sources, x), strict=True):
        latents = add_network(latents + perceive(attn, latents, *kv, flat), ff)
    return latents


def add_network(x: Tensor, ff: nn.Module) -> Tensor:
    """`x + ff(x)`."""
    return add_feed_forward(x, sequential_feed_forward(ff, x), network_of(ff), None)


def perceive(
    attn: LatentAttention,
    latents: Tensor,  # [B, M, R, D], or [1, 1, R, D] for all media
    k_media: Tensor,  # [B, M, S, H, d]
    v_media: Tensor,  # [B, M, S, H, d]
    lengths: Tensor | None = None,  # [B * M]
) -> Tensor:  # [B, M, R, D]
    """A perceiver attention whose features are keys and values already."""
    batch, media = k_media.shape[:2]
    n = attn.norms[1](latents)
    q = attn.to_q(n).unflatten(-1, (attn.heads, -1))
    k, v = Source(attn.to_kv, attn.heads).project(n)
    q, k, v = (each.expand(batch, media, *each.shape[2:]).flatten(0, 1) for each in (q, k, v))
    media_kv, scale = (k_media.flatten(0, 1), v_media.flatten(0, 1)), attn.softmax_scale
    out = perceiver_attention(q, *media_kv, k, v, media_lengths=lengths, scale=scale)
    return attn.to_out(out.flatten(-2)).unflatten(0, (batch, media))
