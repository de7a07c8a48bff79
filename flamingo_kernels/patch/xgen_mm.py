"""xGen-MM (BLIP-3): a resampler with a mask of the features, and a projection of its latents.

The order of the features does not matter, so those that are seen move to the front and become a length. In a
compiled model the original's forward computes masks. Its language model has no cross-attention.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .._anatomy import Linear
from ..layers.fused import is_fused
from ..layers.resampler import LatentAttention, perceive, resample
from ..media_cache import Source
from . import open_flamingo
from .dense import in_order, media_first
from .family import Family


class PerceiverAttention(LatentAttention):
    def forward(
        self,
        x: Tensor,  # [B, M, S, D]
        latents: Tensor,  # [B, M, R, D]
        vision_attn_masks: Tensor | None = None,  # [B, S], 0 where a feature is not seen
    ) -> Tensor:  # [B, M, R, D]
        seen = None if self.is_watched() else _seen_first(x, vision_attn_masks, layer=self)
        if seen is None:
            return cast(Tensor, super().forward(x, latents, vision_attn_masks))
        x, lengths = seen
        k, v = Source(self.to_kv, self.heads, self.norm_media).project(x)
        return perceive(self, latents, k, v, None if lengths is None else lengths.flatten())


class PerceiverResampler(open_flamingo.PerceiverResampler):
    anatomy = {
        **open_flamingo.PerceiverResampler.anatomy,
        "projection": Linear("D", "I", optional=True),
    }

    projection: nn.Module | None

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, M, F, v, D]
        vision_attn_masks: Tensor | None,  # [B, F * v], 0 where a feature is not seen
    ) -> Tensor:  # [B, M, R, I]
        seen, layers = None, cast("list[nn.ModuleList]", [*self.layers])
        if not self.is_watched() and all(is_fused(layer[0]) for layer in layers):
            seen = _seen_first(self.add_positions(x), vision_attn_masks, layer=self)
        if seen is None:
            return cast(Tensor, super(open_flamingo.PerceiverResampler, self).forward(x, vision_attn_masks))
        latents = self.norm(resample(self.latents, self.layers, *seen))
        return latents if self.projection is None else self.projection(latents)


def _seen_first(
    x: Tensor,  # [B, M, S, D]
    mask: Tensor | None,  # [B, S]
    *,
    layer: object,
) -> tuple[Tensor, Tensor | None] | None:
    """The features with the seen ones first, and their number `[B, M]`; None if the mask cannot be read."""
    if mask is None:
        return x, None
    first = media_first(mask != 0, x[:, 0], x[:, 0, :0], layer=layer)
    if first is None:
        return None
    order, lengths = first
    x = in_order(x.transpose(1, 2), order).transpose(1, 2)
    return x, lengths[:, None].expand(-1, x.shape[1])


FAMILY = Family(
    "xGen-MM, resampler",
    "xgen_mm.src.helpers",
    (PerceiverAttention, PerceiverResampler),
    "LAVIS@xgen-mm 2024.10",
)
