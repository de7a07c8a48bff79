"""flamingo-mini: its blocks give their keys and values back, and take them again for the text that follows.

They are attended to where they lie. Text sees the last image alone, and locations may be longer than a text
that comes with keys and values: it is their end.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .._anatomy import Alpha, Linear, Norm, Number, Part
from .._kept import once
from ..layers.cross_attention import ATTENTION_ANATOMY, Media, attend_to_media, gated_block
from ..layers.fused import Fused, is_fused
from ..mask import MediaMask, Policy
from ..media_cache import MediaCache, load_or_project
from ..ops import perceiver_attention
from .family import Family
from .open_flamingo import AttentionToMedia

KV = tuple[Tensor, Tensor]  # [B, H, M * R, d] each


class MaskedCrossAttention(AttentionToMedia):
    anatomy = {**ATTENTION_ANATOMY, "n_visual": Number("R")}
    policy: Policy = "open_flamingo"
    adds_locations = True
    only_attend_immediate_media = True

    n_visual: int

    def forward(
        self,
        y: Tensor,  # [B, T, D]
        media_locations: Tensor,  # [B, T], or longer with keys and values
        visual_features: Tensor | MediaCache,  # [B, M, R, D_visual]; not read with keys and values
        previous_kv: KV | None = None,
        output_kv: bool = False,
    ) -> tuple[Tensor, KV | None]:  # [B, T, D], and keys and values if asked for
        media = None if self.is_watched() else self.seen(y, visual_features, media_locations, previous_kv)
        if media is None:
            given = (y, media_locations, visual_features, previous_kv, output_kv)
            return cast("tuple[Tensor, KV | None]", super().forward(*given))
        return attend_to_media(self, y, media), (previous_kv or kv_of(media)) if output_kv else None

    def seen(
        self, y: Tensor, features: Tensor | MediaCache, locations: Tensor, kv: KV | None
    ) -> Media | None:
        """The keys and values of a text with what it sees; None for a call of which the original decides."""
        batch, length, size = *y.shape[:2], self.n_visual
        if kv is None:
            if len(features.shape) != 4 or (features.shape[0], features.shape[2]) != (batch, size):
                return None
            k, v = load_or_project(self, y, features, follows=False)
        else:
            if kv[0].shape[0] != batch or kv[0].shape[2] % size:
                return None
            k, v = (each.transpose(1, 2).unflatten(1, (-1, size)) for each in kv)
        longer = kv is not None and locations.shape[1] > length
        if locations.shape[0] != batch or not (longer or locations.shape[1] == length):
            return None
        spans = once(_spans, (locations,), length, k.shape[1], layer=self)
        return Media((k, v), cast(MediaMask, spans))


def _spans(locations: Tensor, length: int, num_media: int) -> MediaMask:
    time = locations.cumsum(1)[:, -length:]
    return MediaMask.from_text_time(time, num_media, policy="open_flamingo")


def kv_of(media: Media) -> KV:
    k, v = (each.flatten(1, 2).transpose(1, 2) for each in cast(KV, media.features))
    return k, v


class GatedCrossAttentionBlock(Fused):
    anatomy = {"attn": Part(), "alpha_attn": Alpha("D"), "ffw": Part(), "alpha_ffw": Alpha("D")}

    attn: nn.Module
    alpha_attn: nn.Parameter  # [1]
    ffw: nn.Sequential
    alpha_ffw: nn.Parameter  # [1]

    def forward(
        self,
        y: Tensor,  # [B, T, D]
        visual_features: Tensor | MediaCache,  # [B, M, R, D_visual]; not read with keys and values
        media_locations: Tensor,  # [B, T], or longer with keys and values
        previous_kv: KV | None = None,
        output_kv: bool = False,
    ) -> tuple[Tensor, KV | None]:  # [B, T, D], and keys and values if asked for
        attn, media = self.attn, None
        if isinstance(attn, MaskedCrossAttention) and is_fused(attn) and not self.is_watched():
            media = attn.seen(y, visual_features, media_locations, previous_kv)
        if media is None:
            given = (y, visual_features, media_locations, previous_kv, output_kv)
            return cast("tuple[Tensor, KV | None]", super().forward(*given))
        return gated_block(cast(Any, self), y, media), (previous_kv or kv_of(media)) if output_kv else None

    @property
    def attn_gate(self) -> Tensor:
        return self.alpha_attn

    @property
    def ff(self) -> nn.Module:
        return self.ffw

    @property
    def ff_gate(self) -> Tensor:
        return self.alpha_ffw


class PerceiverAttentionLayer(Fused):
    anatomy = {
        "heads": Number("H"),
        "dim_head": Number("d"),
        "norm_media": Norm("D"),
        "norm_latents": Norm("D"),
        "to_q": Linear("D", "H*d"),
        "to_k": Linear("D", "H*d"),
        "to_v": Linear("D", "H*d"),
        "to_out": Linear("H*d", "D"),
    }

    heads: int
    scale: float
    norm_media: nn.LayerNorm
    norm_latents: nn.LayerNorm
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.Linear

    def forward(
        self,
        features: Tensor,  # [N, S, D]
        latents: Tensor,  # [N, R, D]
    ) -> Tensor:  # [N, R, D]
        if self.is_watched() or features.ndim != 3 or latents.shape[:1] != features.shape[:1]:
            return cast(Tensor, super().forward(features, latents))
        x, n = self.norm_media(features), self.norm_latents(latents)
        of_both = (project(each) for each in (x, n) for project in (self.to_k, self.to_v))
        q, *kv = (each.unflatten(-1, (self.heads, -1)) for each in (self.to_q(n), *of_both))
        return self.to_out(perceiver_attention(q, *kv, scale=self.scale).flatten(-2))


FAMILY = Family(
    "flamingo-mini",
    "flamingo_mini.gated_cross_attention",
    (MaskedCrossAttention, GatedCrossAttentionBlock),
    "flamingo-mini main",
)
RESAMPLER = Family(
    "flamingo-mini, resampler",
    "flamingo_mini.perceiver_resampler",
    (PerceiverAttentionLayer,),
    "flamingo-mini main",
)
