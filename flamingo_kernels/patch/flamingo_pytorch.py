"""Models of flamingo-pytorch (PyPI 0.1.2), from which open-flamingo's modules descend: the same mathematics.

Its media have the width of the text, its blocks know no cached media, and its mask policy is "open_flamingo".
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import BLOCK_FOLDS, Fused, gated_block, resample
from .family import Family
from .open_flamingo import FIXES, MaskedCrossAttention, PerceiverAttention


class GatedCrossAttentionBlock(Fused):
    folds = BLOCK_FOLDS

    attn: nn.Module
    attn_gate: nn.Parameter
    ff: nn.Sequential
    ff_gate: nn.Parameter

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None) -> Tensor:
        return gated_block(self, x, media, media_locations, use_cached_media=False)


class PerceiverResampler(Fused):
    latents: nn.Parameter
    layers: nn.ModuleList
    norm: nn.LayerNorm
    media_pos_emb: nn.Parameter

    def forward(
        self,
        x: Tensor,  # [B, M, S, D] or [B, S, D]
    ) -> Tensor:  # [B, M, R, D]
        x = x if x.ndim == 4 else x[:, None]
        x = x + self.media_pos_emb[: x.shape[1]]
        return self.norm(resample(self.latents, self.layers, x, None))


_CLASSES = (MaskedCrossAttention, GatedCrossAttentionBlock, PerceiverAttention, PerceiverResampler)
FAMILY = Family(
    "flamingo_pytorch",
    "flamingo_pytorch.flamingo_pytorch",
    {cls.__name__: cls for cls in _CLASSES},
    "flamingo-pytorch 0.1.2",
    FIXES,
)
