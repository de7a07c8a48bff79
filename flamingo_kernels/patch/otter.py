"""Otter: open-flamingo 0.0.2 under other names, its networks in lists, and a resampler of whole blocks.

Its first revisions see every medium where they find xformers. That is other code, and is left alone.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .._anatomy import Alpha, Part
from ..fold import Affine, Gate
from ..layers.fused import is_fused
from ..layers.resampler import LatentAttention, add_network, perceive
from ..media_cache import Source, keys_and_values
from . import open_flamingo, open_flamingo_v1
from .family import Family
from .open_flamingo import FIXES


class OtterMaskedCrossAttention(open_flamingo_v1.MaskedCrossAttention):
    """The attention of open-flamingo 0.0.2."""


class OtterGatedCrossAttentionBlock(open_flamingo_v1.GatedCrossAttentionBlock):
    folds = (
        Gate("attn_gate", "attn.to_out"),
        Affine("feed_forward.0", ("feed_forward.1",)),
        Gate("ff_gate", "feed_forward.3"),
    )
    anatomy = {
        "attn": Part(),
        "attn_gate": Alpha("D"),
        "feed_forward": Part(nn.ModuleList),
        "ff_gate": Alpha("D"),
    }

    feed_forward: nn.ModuleList

    @property
    def ff(self) -> nn.ModuleList:  # type: ignore[override]
        return self.feed_forward


class OtterPerceiverBlock(LatentAttention):
    """Attention and network, each with its residual."""

    anatomy = {**LatentAttention.anatomy, "feed_forward": Part(nn.ModuleList)}

    feed_forward: nn.ModuleList

    def forward(
        self,
        x: Tensor,  # [B, M, S, D]
        latents: Tensor,  # [B, M, R, D]
    ) -> Tensor:  # [B, M, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(x, latents))
        k, v = Source(self.to_kv, self.heads, self.norm_media).project(x)
        return self.advance(latents, k, v)

    def advance(self, latents: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return add_network(latents + perceive(self, latents, k, v), self.feed_forward)


class OtterPerceiverResampler(open_flamingo.PerceiverResampler):
    def resample(self, x: Tensor) -> Tensor:  # [B, M, R, D], from [B, M, S, D]
        blocks, latents = cast("list[OtterPerceiverBlock]", [*self.layers]), self.latents[None, None]
        if not all(map(is_fused, blocks)):
            latents = latents.expand(*x.shape[:2], -1, -1)
            for block in blocks:
                latents = block(x, latents)
            return latents
        sources = [Source(block.to_kv, block.heads, block.norm_media) for block in blocks]
        for block, (k, v) in zip(blocks, keys_and_values(sources, x), strict=True):
            latents = block.advance(latents, k, v)
        return latents


FAMILY = Family(
    "Otter",
    "otter_ai.models.otter.modeling_otter",
    (
        OtterMaskedCrossAttention,
        OtterGatedCrossAttentionBlock,
        OtterPerceiverBlock,
        OtterPerceiverResampler,
    ),
    "otter-ai 0.0.0a8",
    FIXES,
)
