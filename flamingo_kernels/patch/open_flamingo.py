"""Models of open-flamingo (PyPI 2.0.1). Their rows without a visible medium follow policy "open_flamingo".

The classes here add a forward to the class of a module and nothing else. Each computes the same as that
class, except that x and media_locations must have one batch size; the original broadcasts a batch of one, as
here that of media. With `media_locations=None` every row sees every medium.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .._anatomy import Norm, Part, Weight
from ..layers import cross_attention
from ..layers.cross_attention import ATTENTION_ANATOMY, BLOCK_ANATOMY, FusedCrossAttention, Media
from ..layers.fused import ATTENTION_FOLDS, BLOCK_FOLDS, Fused
from ..layers.resampler import LatentAttention, perceive, resample
from ..mask import Policy
from ..media_cache import MediaCache, Source
from .family import Family


class AttentionToMedia(Fused):
    """Base class of the masked cross-attentions with open_flamingo's names, whatever their forward takes."""

    folds = ATTENTION_FOLDS
    anatomy = ATTENTION_ANATOMY

    heads: int
    scale: float
    norm: nn.LayerNorm
    to_q: nn.Linear
    to_kv: nn.Linear
    to_out: nn.Linear

    attend = cross_attention.attend
    mask = cross_attention.media_mask

    def media_source(self) -> Source:
        return Source(self.to_kv, self.heads)


class MaskedCrossAttention(AttentionToMedia, FusedCrossAttention):
    adds_locations = True

    only_attend_immediate_media: bool

    @property
    def policy(self) -> Policy:
        return "zero" if "uniform_rows" in self.fixes else "open_flamingo"

    def original_takes(self, media: Media) -> bool:
        return media.locations is not None and not isinstance(media.features, MediaCache)

    compute = cross_attention.attend_to_media


class GatedCrossAttentionBlock(FusedCrossAttention):
    folds = BLOCK_FOLDS
    anatomy = BLOCK_ANATOMY

    attn: nn.Module
    attn_gate: nn.Parameter
    ff: nn.Sequential
    ff_gate: nn.Parameter

    compute = cross_attention.gated_block


class PerceiverAttention(LatentAttention):
    def forward(
        self,
        x: Tensor,  # [B, M, S, D]
        latents: Tensor,  # [B, M, R, D]
    ) -> Tensor:  # [B, M, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(x, latents))
        k, v = Source(self.to_kv, self.heads, self.norm_media).project(x)
        return perceive(self, latents, k, v)


class PerceiverResampler(Fused):
    anatomy = {
        "latents": Weight("R D"),
        "frame_embs": Weight("F D", optional=True),
        "media_time_embs": Weight("M 1 D", optional=True),
        "layers": Part(nn.ModuleList),
        "norm": Norm("D"),
    }

    latents: nn.Parameter
    layers: nn.ModuleList
    norm: nn.LayerNorm
    frame_embs: nn.Parameter | None
    media_time_embs: nn.Parameter | None

    def forward(
        self,
        x: Tensor,  # [B, M, F, v, D]
    ) -> Tensor:  # [B, M, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(x))
        return self.norm(self.resample(self.add_positions(x)))

    def resample(self, x: Tensor) -> Tensor:  # [B, M, R, D], from [B, M, S, D]
        return resample(self.latents, self.layers, x, None)

    def add_positions(self, x: Tensor) -> Tensor:  # [B, M, S, D]
        if self.frame_embs is not None:
            x = x + self.frame_embs[: x.shape[2], None]
        x = x.flatten(2, 3)
        return x if self.media_time_embs is None else x + self.media_time_embs[: x.shape[1]]


FIXES = {"uniform_rows": "text whose image was not passed averages all images"}
FAMILY = Family(
    "open_flamingo",
    "open_flamingo.src.helpers",
    (MaskedCrossAttention, GatedCrossAttentionBlock, PerceiverAttention, PerceiverResampler),
    "open-flamingo 2.0.1",
    FIXES,
)
