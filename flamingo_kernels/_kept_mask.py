"""The mask of a batch, built for the first layer of a forward pass and kept for the others."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor

from ._once import once
from .mask import MediaMask, Policy


class MaskKey(NamedTuple):
    """What a mask depends on beside the locations.

    length is None unless the media are cached; texts is how many in a row share a sequence of media.
    """

    num_media: int
    immediate: bool
    policy: Policy
    length: int | None
    texts: int = 1

    def build(self, locations: Tensor) -> MediaMask:
        num_media, immediate, policy, length, texts = self
        if length is not None:
            mask = MediaMask.cached(locations, num_media, length, immediate=immediate, policy=policy)
        else:
            build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
            mask = build(locations, num_media, policy=policy)
        return mask if texts == 1 else mask.fold(texts)


def kept_mask(locations: Tensor, key: MaskKey, layer: object) -> MediaMask:
    """The mask of these locations: the one that a layer before this one built in the same forward pass."""
    return cast(MediaMask, once(_build, (locations,), key, layer=layer))


def _build(locations: Tensor, key: MaskKey) -> MediaMask:
    return key.build(locations)
