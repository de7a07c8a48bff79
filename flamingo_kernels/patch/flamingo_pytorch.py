"""Models of flamingo-pytorch (PyPI 0.1.2), from which open-flamingo's modules descend: the same mathematics.

Its media have the width of the text, its blocks know no cached media, and its mask policy is "open_flamingo".
"""

from __future__ import annotations

from torch import Tensor, nn

from .._anatomy import Norm, Part, Weight
from . import open_flamingo
from .family import Family
from .open_flamingo import FIXES, MaskedCrossAttention, PerceiverAttention


class GatedCrossAttentionBlock(open_flamingo.GatedCrossAttentionBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, media, media_locations)


class PerceiverResampler(open_flamingo.PerceiverResampler):
    anatomy = {
        "latents": Weight("R D"),
        "media_pos_emb": Weight("M 1 D"),
        "layers": Part(nn.ModuleList),
        "norm": Norm("D"),
    }

    media_pos_emb: nn.Parameter

    def add_positions(self, x: Tensor) -> Tensor:  # [B, M, S, D], from that or from [B, S, D]
        x = x if x.ndim == 4 else x[:, None]
        return x + self.media_pos_emb[: x.shape[1]]


FAMILY = Family(
    "flamingo_pytorch",
    "flamingo_pytorch.flamingo_pytorch",
    (MaskedCrossAttention, GatedCrossAttentionBlock, PerceiverAttention, PerceiverResampler),
    "flamingo-pytorch 0.1.2",
    FIXES,
)
