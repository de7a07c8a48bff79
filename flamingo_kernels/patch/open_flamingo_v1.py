"""Models of open-flamingo 0.0.2, and of what was copied from it while it had `attend_previous`.

The media that text sees, immediate ones, and a token that is generated after it: ::

    text                    a  <image>  b  c  <image>  d  |  e
    attend_previous=True    .     1     1  1     2     2  |  .
    attend_previous=False   1     1     2  2     2     .  |  .

A layer counts the images of the call alone. So generated tokens see nothing, their attention is exactly 0,
and here it is not computed. The resampler is that of open-flamingo 2.0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._kept import once
from .._predicates import autocast_dtype, is_eager, is_plain
from ..layers.cross_attention import FusedCrossAttention, Media, add_network, attend_to_media, gated_block
from ..layers.fused import gate_unless_open, is_fused
from ..media_cache import MediaCache
from . import open_flamingo
from .family import Family
from .open_flamingo import FIXES


class FirstVersion(FusedCrossAttention):
    """Base class of the layers that know `attend_previous`."""

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | MediaCache,  # [B, M, R, D_visual]
        media_locations: Tensor | None = None,  # [B, T]
        attend_previous: bool = True,
    ) -> Tensor:  # [B, T, D]
        return self.run(x, Media(media, media_locations, ahead=not attend_previous))

    def fits(self, x: Tensor, media: Media) -> bool:
        locations = media.locations
        if not isinstance(locations, Tensor) or isinstance(media.features, MediaCache):
            return True
        return locations.shape == x.shape[:2] and (locations.dtype == torch.bool or not media.ahead)


class MaskedCrossAttention(FirstVersion, open_flamingo.MaskedCrossAttention):
    def compute(self, x: Tensor, media: Media) -> Tensor:
        if is_blind(self, x, media):
            return torch.zeros_like(x, dtype=_dtype_of_products(x))
        return attend_to_media(self, x, media)


class GatedCrossAttentionBlock(FirstVersion, open_flamingo.GatedCrossAttentionBlock):
    def compute(self, x: Tensor, media: Media) -> Tensor:
        if not (is_fused(self.attn) and is_blind(self.attn, x, media)):
            return gated_block(self, x, media)
        gate = gate_unless_open(self, "attn_gate")
        dtypes = (_dtype_of_products(x), x.dtype if gate is None else gate.dtype)
        return add_network(self, x.to(torch.promote_types(x.dtype, torch.promote_types(*dtypes))))


def is_blind(attn: Any, x: Tensor, media: Media) -> bool:
    """Whether a text without gradients has no image, so that the result of its attention is 0."""
    locations = media.locations
    if not isinstance(locations, Tensor) or not attn.only_attend_immediate_media or torch.is_grad_enabled():
        return False
    keeps_zeros = is_plain(attn.to_out, nn.Linear) and attn.to_out.bias is None
    return keeps_zeros and is_eager(x) and not once(_has_media, (locations,), layer=attn)


def _has_media(locations: Tensor) -> bool:
    return bool(locations.any())


def _dtype_of_products(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device) or x.dtype


FAMILY = Family(
    "open_flamingo 0.0",
    "open_flamingo_v1.src.helpers",
    (MaskedCrossAttention, GatedCrossAttentionBlock),
    "open-flamingo 0.0.2",
    FIXES,
)
