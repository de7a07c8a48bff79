"""Models of flamingo-pytorch (PyPI 0.1.2), from which open-flamingo's modules descend: the same mathematics.

Its media have the width of the text, its blocks know no cached media, and its mask policy is "open_flamingo".
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .._anatomy import Norm, Part, Weight
from ..layers.cross_attention import BLOCK_ANATOMY, gated_block
from ..layers.fused import BLOCK_FOLDS, Fused
from ..layers.resampler import resample
from .family import Family
from .open_flamingo import FIXES, MaskedCrossAttention, PerceiverAttention


class GatedCrossAttentionBlock(Fused):
    folds = BLOCK_FOLDS
    anatomy = BLOCK_ANATOMY

    attn: nn.Module
    attn_gate: nn.Parameter
    ff: nn.Sequential
    ff_gate: nn.Parameter

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None) -> Tensor:
        if self.is_watched():
            return cast(Tensor, super().forward(x, media, media_locations))
        return gated_block(self, x, media, media_locations, use_cached_media=False)


class PerceiverResampler(Fused):
    anatomy = {
        "latents": Weight("R D"),
        "media_pos_emb": Weight("M 1 D"),
        "layers": Part(nn.ModuleList),
        "norm": Norm("D"),
    }

    latents: nn.Parameter
    layers: nn.ModuleList
    norm: nn.LayerNorm
    media_pos_emb: nn.Parameter

    def forward(
        self,
        x: Tensor,  # [B, M, S, D] or [B, S, D]
    ) -> Tensor:  # [B, M, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(x))
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
