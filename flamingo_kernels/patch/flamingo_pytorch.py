"""Models of flamingo-pytorch (PyPI 0.1.2), from which open-flamingo's modules descend: the same mathematics.

Its media have the width of the text, its blocks know no cached media, and its mask policy is "open_flamingo".
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import Fused, add_gated
from .family import Family
from .open_flamingo import FIXES, MaskedCrossAttention, PerceiverAttention


class GatedCrossAttentionBlock(Fused):
    attn: nn.Module
    attn_gate: nn.Parameter
    ff: nn.Sequential
    ff_gate: nn.Parameter

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None) -> Tensor:
        attended = self.attn(x, media, media_locations=media_locations)
        return add_gated(x, attended, self.attn_gate, self.ff, self.ff_gate)


FAMILY = Family(
    "flamingo_pytorch",
    "flamingo_pytorch.flamingo_pytorch",
    {cls.__name__: cls for cls in (MaskedCrossAttention, GatedCrossAttentionBlock, PerceiverAttention)},
    "flamingo-pytorch 0.1.2",
    FIXES,
)
