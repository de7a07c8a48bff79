"""The mask of the last batch, kept for the layers that ask for the same."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import is_recording
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


class _KeptMask(NamedTuple):
    locations: weakref.ref[Tensor]
    version: tuple[int, bool]
    key: MaskKey
    mask: MediaMask


# The last mask: layers of one batch ask for the same. Replaced as a whole, so a thread never sees half of it.
_kept: _KeptMask | None = None


def kept_mask(locations: Tensor, key: MaskKey) -> MediaMask:
    """The mask of these locations: the kept one if nothing has changed since."""
    global _kept
    if is_recording(locations) or locations.is_inference():
        return key.build(locations)
    # A mask made in inference mode cannot be saved for a backward pass.
    version = (locations._version, torch.is_inference_mode_enabled())
    kept = _kept
    if kept is not None and kept.locations() is locations and (kept.version, kept.key) == (version, key):
        return kept.mask
    mask = key.build(locations)
    _kept = _KeptMask(weakref.ref(locations), version, key, mask)
    return mask
