"""Models of open_flamingo's unmerged branches of 2023, which hold several architectures.

The locations of media may be longer than the text, which is their end then. The resampler projects features
to the width of its layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._anatomy import Linear
from .._kept import once
from ..layers.cross_attention import Media, media_mask
from ..mask import MediaMask
from ..media_cache import MediaCache
from . import open_flamingo
from .family import Family
from .open_flamingo import FIXES


class MaskedCrossAttention(open_flamingo.MaskedCrossAttention):
    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | MediaCache,  # [B, M, R, D_visual]
        media_locations: Tensor | None = None,  # [B, T] or longer
    ) -> Tensor:  # [B, T, D]
        return self.run(x, Media(media, media_locations))

    def fits(self, x: Tensor, media: Media) -> bool:
        return isinstance(media.locations, Tensor) and media.locations.shape[-1] >= x.shape[1]

    def mask(self, x: Tensor, k: Tensor, media: Media) -> MediaMask:
        if isinstance(media.locations, Tensor) and media.follows(x):
            end = once(_end, (media.locations,), x.shape[1], layer=self)
            media = media._replace(locations=end)
        return media_mask(self, x, k, media)


def _end(locations: Tensor, length: int) -> Tensor:  # [B, length]
    """The last locations, the first of them with the number of all before: their sums are those of all."""
    before, end = locations.long().split([locations.shape[1] - length, length], dim=1)
    return torch.cat([before.sum(1, keepdim=True) + end[:, :1], end[:, 1:]], dim=1)


class PerceiverResampler(open_flamingo.PerceiverResampler):
    anatomy = {
        "projection": Linear("V", "D", optional=True),
        **open_flamingo.PerceiverResampler.anatomy,
    }

    projection: nn.Module | None

    def add_positions(self, x: Tensor) -> Tensor:  # [B, M, S, D], from [B, M, F, v, V]
        return super().add_positions(x if self.projection is None else self.projection(x))


FAMILY = Family(
    "open_flamingo, branches",
    "open_flamingo_vlm.src.helpers",
    (MaskedCrossAttention, PerceiverResampler),
    "open_flamingo@mllm 2023.12",
    FIXES,
)
