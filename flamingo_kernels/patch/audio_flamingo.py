"""Audio Flamingo 1, and 2 as it is trained: text attends to the windows of all audios so far, less padding.

::

    text              a  <audio>  b  <audio>  c
    windows of 1      #     #     #     #     #        # attended, but for windows of padding
    windows of 2      .     .     .     #     #

Text before the first audio hears the first, and a row whose windows are all padding averages every key. The
text that follows (`use_cached_media`) is counted from 0 again, so a generated token hears the first audio
alone, as in the original. The order of the keys does not matter, so those that are no padding move to the
front where they are not there, and each row hears the first few of them.

A text without an audio, which the original refuses, is left to its forward, as are its asserts, and traced
runs, which have no values to read. Hence a compiled model has the original's operations.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .._anatomy import Number
from .._kept import once, once_for_equal
from .._predicates import is_recording
from ..layers.cross_attention import ATTENTION_ANATOMY, BLOCK_ANATOMY, Media, attend_to_media, gated_block
from ..layers.fused import BLOCK_FOLDS, Fused, is_fused
from ..mask import Policy
from .dense import KeySpans, chosen_first, read_mask
from .family import Family
from .open_flamingo import AttentionToMedia


class MaskedCrossAttention(AttentionToMedia):
    anatomy = {**ATTENTION_ANATOMY, "max_window_per_audio": Number("W")}
    policy: Policy = "open_flamingo"
    adds_locations = False
    reads_locations = True

    max_window_per_audio: int
    only_attend_immediate_media: bool

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor,  # [B, L, 1, D_audio]
        media_mask: Tensor,  # [B, L, 1], 0 at padding
        media_locations: Tensor | None = None,  # [B, T]
        use_cached_media: bool = False,
    ) -> Tensor:  # [B, T, D]
        given = (media, media_mask, media_locations, use_cached_media)
        heard = None if self.is_watched() else self.heard(x, *given)
        if heard is None:
            return cast(Tensor, super().forward(x, *given))
        return attend_to_media(self, x, heard)

    def heard(
        self, x: Tensor, media: Tensor, padding: Tensor, locations: Tensor | None, follows: bool
    ) -> Media | None:
        """The media with the spans that a text hears; None for a call of which the original must decide."""
        if not self._takes(x, media, padding, locations, follows):
            return None
        rule = (x.shape[1], self.max_window_per_audio)
        read = _read_step if x.shape[1] == 1 else _read
        if locations is None or not self.reads_locations:
            spans = once(read, (padding,), None, *rule, layer=self)
        else:
            spans = once(read, (padding, locations), *rule, layer=self)
        if spans is None:
            return None
        features = cast(KeySpans, spans).media(media[:, : spans.keys, 0])  # [B, M, R, D_audio]
        # Audio Flamingo 2 does not say of a token that it follows a text.
        return Media(features, spans.mask, cached=follows or x.shape[1] == 1)

    def _takes(
        self, x: Tensor, media: Tensor, padding: Tensor, locations: Tensor | None, follows: bool
    ) -> bool:
        """Whether the shapes are those that the original does not refuse, and nothing is broadcast."""
        if is_recording(x) or x.is_meta or x.ndim != 3 or self.only_attend_immediate_media is not False:
            return False
        (batch, length, _), keys, window = x.shape, media.shape[1], self.max_window_per_audio
        fits = media.shape[:-1] == padding.shape == (batch, keys, 1) and window > 0 and keys % window == 0
        if locations is None:
            placed = follows
        else:
            texts = locations.ndim == 2 and len(locations) == batch and locations.numel() > 0
            placed = texts and (follows or locations.shape[1] == length)
        return fits and placed and x.numel() > 0 and keys > 0


class GatedCrossAttentionBlock(Fused):
    folds = BLOCK_FOLDS
    anatomy = BLOCK_ANATOMY

    attn: nn.Module
    attn_gate: nn.Parameter  # [1]
    ff: nn.Sequential
    ff_gate: nn.Parameter

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor,  # [B, L, 1, D_audio]
        media_mask: Tensor,  # [B, L, 1], 0 at padding
        media_locations: Tensor | None = None,  # [B, T]
        use_cached_media: bool = False,
    ) -> Tensor:  # [B, T, D]
        given, attn, heard = (media, media_mask, media_locations, use_cached_media), self.attn, None
        if isinstance(attn, MaskedCrossAttention) and is_fused(attn) and not self.is_watched():
            heard = attn.heard(x, *given)
        if heard is None:
            return cast(Tensor, super().forward(x, *given))
        return gated_block(self, x, heard)


def _read_step(padding: Tensor, locations: Tensor | None, length: int, window: int) -> KeySpans | None:
    """The spans of a step of generation, which may make its tensors anew, mostly with equal values."""
    if locations is None:
        found = once_for_equal(_read, (padding,), None, length, window)
    else:
        found = once_for_equal(_read, (padding, locations), length, window)
    return cast("KeySpans | None", found)


def _read(padding: Tensor, locations: Tensor | None, length: int, window: int) -> KeySpans | None:
    """The spans of a text of this length; with no locations all of it hears every audio."""
    batch, keys = padding.shape[:2]
    if locations is None:
        ends = torch.full((batch, length), keys, device=padding.device)
    else:
        audios = (locations != 0).cumsum(1)  # [B, S]
        if not bool(audios[:, -1].all()):
            return None
        rows = torch.arange(length, device=audios.device).clamp(max=audios.shape[1] - 1)
        ends = (audios[:, rows].clamp(min=1) * window).clamp(max=keys)  # [B, T]
    return _first_keys(padding[..., 0].bool(), ends)


def _first_keys(
    seen: Tensor,  # [B, L]
    ends: Tensor,  # [B, T]
) -> KeySpans | None:
    """The spans of rows that see those of the first `ends` keys that can be seen."""
    before = seen.cumsum(1)  # [B, L]
    counts = before.gather(1, ends - 1)  # [B, T]
    averages = counts == 0
    keys = seen.shape[1] if bool(averages.any()) else int(counts.max())
    order = None
    if not torch.equal(before.gather(1, (counts - 1).clamp(min=0)), counts):  # some are behind padding
        order = chosen_first(seen)[:, :keys]
    spans = read_mask(torch.arange(keys, device=seen.device) < counts[..., None], averages)
    return None if spans is None else KeySpans(keys if order is None else seen.shape[1], spans, order)


FAMILY = Family(
    "Audio Flamingo 1 and 2",
    "audio_flamingo_2.src.helpers",
    (MaskedCrossAttention, GatedCrossAttentionBlock),
    "audio-flamingo 1 to 2",
)
