"""MediaMask: which media each text token may see. No other file knows the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._checks import INTEGERS, expect_count, expect_same_device, expect_shape, expect_tensors
from ._drawing import SEEN, UNSEEN, draw
from ._html import drawing, page, paragraph

Policy = Literal["zero", "open_flamingo"]


@dataclass(frozen=True, eq=False, repr=False)
class MediaMask:
    """The span of media that every text row sees, built once per batch and shared by every layer.

    Row `t` of sequence `b` attends to all latents of the media `lo[b, t] <= m < hi[b, t]`::

        media_locations   .  1  .  .  1  .  .        (1 = an <image> token)
        text_time         0  1  1  1  2  2  2

        last_preceding    .  #  #  #  .  .  .        medium 0
                          .  .  .  .  #  #  #        medium 1
        all_preceding     .  #  #  #  #  #  #        medium 0
                          .  .  .  .  #  #  #        medium 1

    A row that sees no medium (here the first) returns exactly 0 under `policy="zero"`. Under
    `policy="open_flamingo"` some of these rows average all values instead, as in open_flamingo, where a
    softmax over equal scores does that: rows whose `text_time` exceeds the number of media (last_preceding),
    and rows before the first image (all_preceding).

    Build one with `last_preceding`, `all_preceding`, `from_text_time`, `cached` or `from_dense`.

    Attributes:
        lo: int32 `[B, T]`, the first medium that a row sees.
        hi: int32 `[B, T]`, one past the last; a row with `hi <= lo` sees nothing, one with `hi == -1`
            averages everything.
        start: int32 `[B, M]`, no row before it sees medium m (where text_time grows, it is the first that
            does).
        stop: int32 `[B, M]`, no row at or after it sees medium m. Rows in between may see other media.
        immediate: no row sees more than one medium, so a softmax needs one pass.
        policy: what rows without a medium get; "zero" means that no row averages.

    Source: Flamingo (arXiv 2204.14198), section 2.3; the two policies: open_flamingo 2.0.1 `helpers.py`.

    Example:
        >>> locations = torch.tensor([[False, True, False, True, False]])
        >>> mask = MediaMask.last_preceding(locations, num_media=2)
        >>> mask.lo.tolist(), mask.hi.tolist()
        ([[0, 0, 0, 1, 1]], [[0, 1, 1, 2, 2]])
        >>> mask
        MediaMask of 1 x 5 tokens and 2 media on cpu, policy "zero"
          text 0  medium 0  .##..
                  medium 1  ...##
    """

    lo: Tensor
    hi: Tensor
    start: Tensor
    stop: Tensor
    immediate: bool
    policy: Policy

    def __post_init__(self) -> None:
        spans = {"lo": self.lo, "hi": self.hi, "start": self.start, "stop": self.stop}
        expect_tensors("MediaMask", **spans)
        for name, span in spans.items():
            if span.dtype != torch.int32:
                raise TypeError(f"MediaMask: expected {name} in torch.int32, got {span.dtype}.")
        expect_shape("MediaMask", "lo", self.lo, ("B", "T"), "")
        expect_shape("MediaMask", "hi", self.hi, tuple(self.lo.shape), "to match lo")
        expect_shape("MediaMask", "start", self.start, (len(self.lo), "M"), "to match lo")
        expect_shape("MediaMask", "stop", self.stop, tuple(self.start.shape), "to match start")
        expect_same_device("MediaMask", **spans)
        _expect_policy(self.policy)

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {line}" for line in draw(self.lo, self.hi, self.num_media))])

    def _repr_html_(self) -> str:
        filled = {ord(SEEN): "█", ord(UNSEEN): "·"}
        lines = [line.translate(filled) for line in draw(self.lo, self.hi, self.num_media)]
        return page(paragraph(self._title()), drawing(lines))

    def _title(self) -> str:
        (batch, length), device = self.lo.shape, self.lo.device
        return (
            f"MediaMask of {batch} x {length} tokens and {self.num_media} media on {device}, "
            f'policy "{self.policy}"'
        )

    @property
    def num_media(self) -> int:
        return self.start.shape[1]

    @property
    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lo, hi, start and stop as the kernels read them: contiguous."""
        return self.lo.contiguous(), self.hi.contiguous(), self.start.contiguous(), self.stop.contiguous()

    @classmethod
    def last_preceding(cls, media_locations: Tensor, num_media: int, *, policy: Policy = "zero") -> MediaMask:
        """Each row sees the last medium at or before it.

        Args:
            media_locations: bool or integer `[B, T]`, non-zero at each `<image>` token.
            num_media: M, the number of media of each sequence (padding included).
            policy: "zero" or "open_flamingo", see the class.
        """
        text_time = _count_media(media_locations).cumsum(1)
        return cls.from_text_time(text_time, num_media, policy=policy)

    @classmethod
    def all_preceding(cls, media_locations: Tensor, num_media: int, *, policy: Policy = "zero") -> MediaMask:
        """Each row sees every medium at or before it. Arguments as for `last_preceding`."""
        text_time = _count_media(media_locations).cumsum(1)
        return cls.from_text_time(text_time, num_media, immediate=False, policy=policy)

    @classmethod
    def cached(
        cls,
        media_locations: Tensor,
        num_media: int,
        length: int,
        *,
        immediate: bool = True,
        policy: Policy = "zero",
    ) -> MediaMask:
        """For decoding: all `length` new rows come after the whole prompt.

        Args:
            media_locations: bool or integer `[B, T_prompt]`, the prompt's `<image>` tokens.
            num_media: M.
            length: T, the number of new rows (1 in token-by-token decoding).
            immediate: see the last medium only (True) or all of the prompt's (False).
            policy: "zero" or "open_flamingo", see the class.
        """
        length = expect_count("MediaMask", "length", length)
        text_time = _count_media(media_locations).sum(1, keepdim=True).expand(-1, length)
        return cls.from_text_time(text_time, num_media, immediate=immediate, policy=policy)

    @classmethod
    def from_text_time(
        cls, text_time: Tensor, num_media: int, *, immediate: bool = True, policy: Policy = "zero"
    ) -> MediaMask:
        """A mask from the 1-based index of the last preceding medium of every row, 0 where there is none.

        Args:
            text_time: integer `[B, T]`, in any order (it need not grow along T).
            num_media: M.
            immediate: see medium `text_time` only (True) or all media up to it (False).
            policy: "zero" or "open_flamingo", see the class.
        """
        expect_tensors("MediaMask", text_time=text_time)
        if text_time.ndim != 2 or text_time.dtype not in INTEGERS:
            raise ValueError(
                "MediaMask: expected integer text_time with shape (B, T), "
                f"got {text_time.dtype} with shape {tuple(text_time.shape)}."
            )
        _expect_policy(policy)
        num_media = expect_count("MediaMask", "num_media", num_media)

        text_time = text_time.long()  # wide enough for any number of media
        hi = text_time.clamp(0, num_media)
        lo = hi - 1 if immediate else torch.zeros_like(hi)
        seen = (text_time >= 1) & (text_time <= num_media) if immediate else hi > 0
        lo, hi = torch.where(seen, lo, 0), torch.where(seen, hi, 0)
        start, stop = _token_ranges(lo, hi, seen, num_media)
        if policy == "open_flamingo" and num_media > 0:
            averages = text_time > num_media if immediate else text_time <= 0
            hi = torch.where(averages, -1, hi)
        lo, hi = (span.int().contiguous() for span in (lo, hi))
        return cls(lo, hi, start, stop, bool(immediate or num_media <= 1), policy)

    @classmethod
    def from_dense(
        cls, visible: Tensor, *, averages: Tensor | None = None, max_latents: int | None = None
    ) -> MediaMask:
        """A mask from a dense one over keys, in which every row sees one run of keys.

        ::

            keys        0 1 2 3 4 5 6 7         media of R = 2 keys    lo  hi
            row 0       . . # # # # . .         . # # .                 1   3
            row 1       . . . . . . . .         . . . .                 0   0

        The keys are cut into equal media, the largest that leave every run whole: M is `mask.num_media`, and
        K and V become `[B, M, S // M, Hkv, d]`.

        Args:
            visible: bool `[B, T, S]`, True where a row sees a key.
            averages: bool `[B, T]`, rows without a visible key that average every value, see policy
                "open_flamingo". Default: none.
            max_latents: the largest R. Default: any.

        Returns:
            A mask with policy "zero", or "open_flamingo" where some rows average.

        Raises:
            ValueError: not bool or of another shape, or a row that sees keys with a gap between them.

        Limits: reads its result on the host, so on a GPU it waits, and it cannot be traced.

        Source: the dense masks of transformers' Idefics and Mllama.

        Example:
            >>> visible = torch.tensor([[[False, False, True, True, True, True, False, False]]])
            >>> mask = MediaMask.from_dense(visible)
            >>> mask.num_media, mask.lo.item(), mask.hi.item()
            (4, 1, 3)
        """
        if max_latents is not None:
            expect_count("MediaMask", "max_latents", max_latents, least=1)
        lo, hi, gap = _runs(visible)
        if averages is not None:
            expect_tensors("MediaMask", averages=averages)
            expect_shape("MediaMask", "averages", averages, tuple(visible.shape[:2]), "to match visible")
            if averages.dtype != torch.bool:
                raise TypeError(f"MediaMask: expected bool averages, got {averages.dtype}.")
        if gap is not None:
            raise ValueError(
                f"MediaMask: expected rows that see one run of keys each, got a gap in row {gap}; a dense "
                "attention must compute such a mask."
            )
        keys = visible.shape[-1]
        latents = math.gcd(keys, *lo.unique().tolist(), *hi.unique().tolist())
        if max_latents is not None:
            latents = _largest_divisor(latents, max_latents)
        num_media = keys // latents if latents else 0
        lo, hi = (span.div(max(latents, 1), rounding_mode="floor") for span in (lo, hi))
        start, stop = _token_ranges(lo, hi, hi > lo, num_media)
        immediate = bool((hi - lo <= 1).all())
        policy: Policy = "zero"
        if averages is not None and num_media > 0:
            hi = torch.where(averages.cpu() & (hi == lo), -1, hi)
            policy = "open_flamingo" if bool((hi < 0).any()) else "zero"
        return cls(lo.int(), hi.int(), start, stop, immediate, policy).to(visible.device)

    def sees(self, medium: int) -> Tensor:
        """Bool `[B, T]`: the rows that attend to `medium`."""
        return (self.lo <= medium) & (medium < self.hi)

    def averages(self) -> Tensor:
        """Bool `[B, T]`: the rows that average every value (policy "open_flamingo" only)."""
        return self.hi < 0

    def dense(self, num_latents: int) -> Tensor:
        """The same mask as bool `[B, 1, T, M * R]`, True where a row sees a key, for dense attention."""
        num_latents = expect_count("MediaMask", "num_latents", num_latents)
        media = torch.arange(self.num_media, device=self.lo.device)
        visible = (self.lo[..., None] <= media) & (media < self.hi[..., None])  # [B, T, M]
        return visible.repeat_interleave(num_latents, dim=-1)[:, None]

    def fold(self, texts: int) -> MediaMask:
        """The mask `[B / texts, texts * T]` of texts that share their media, joined one after the other.

        Args:
            texts: how many in a row share a sequence of media, as beams do. Divides B.

        Example:
            >>> locations = torch.tensor([[True, False], [False, True]])
            >>> MediaMask.last_preceding(locations, num_media=1).fold(2).hi.tolist()
            [[1, 1, 0, 1]]
        """
        batch, length = self.lo.shape
        if batch % expect_count("MediaMask", "texts", texts, least=1):
            raise ValueError(f"MediaMask: expected texts to be a divisor of B={batch}, got {texts}.")
        lo, hi = (each.view(batch // texts, texts * length) for each in (self.lo, self.hi))
        offsets = (torch.arange(texts, device=lo.device, dtype=lo.dtype) * length)[:, None]
        start, stop = (each.unflatten(0, (-1, texts)) + offsets for each in (self.start, self.stop))
        return MediaMask(lo, hi, start.amin(1), stop.amax(1), self.immediate, self.policy)

    def to(self, device: torch.device | str) -> MediaMask:
        """The same mask on another device."""
        lo, hi, start, stop = (span.to(device) for span in (self.lo, self.hi, self.start, self.stop))
        return MediaMask(lo, hi, start, stop, self.immediate, self.policy)


def _expect_policy(policy: str) -> None:
    if policy not in ("zero", "open_flamingo"):
        raise ValueError(f"MediaMask: policy={policy!r} is not one of 'zero', 'open_flamingo'.")


def _count_media(media_locations: Tensor) -> Tensor:
    expect_tensors("MediaMask", media_locations=media_locations)
    if media_locations.ndim != 2 or media_locations.dtype not in (torch.bool, *INTEGERS):
        raise ValueError(
            "MediaMask: expected bool or integer media_locations with shape (B, T), "
            f"got {media_locations.dtype} with shape {tuple(media_locations.shape)}."
        )
    return (media_locations != 0).int()


def _runs(visible: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """On the host: the run of keys that each row sees, (0, 0) for none, and the first row that sees more."""
    expect_tensors("MediaMask", visible=visible)
    if visible.ndim != 3 or visible.dtype != torch.bool:
        raise ValueError(
            "MediaMask: expected bool visible with shape (B, T, S), "
            f"got {visible.dtype} with shape {tuple(visible.shape)}."
        )
    if visible.is_meta:
        raise ValueError("MediaMask: expected visible with values to read, got a tensor on meta.")
    if visible.numel() == 0:
        empty = torch.zeros(visible.shape[:2], dtype=torch.int64)
        return empty, empty, None
    bits = visible.view(torch.uint8)
    count = visible.sum(-1)
    lo, left = bits.argmax(-1), bits.flip(-1).argmax(-1)
    lo, left, count = torch.stack([lo, left, count]).cpu()
    hi = torch.where(count > 0, visible.shape[-1] - left, 0)
    gaps = (hi - lo != count).nonzero()
    return lo, hi, tuple(gaps[0].tolist()) if len(gaps) else None


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to `most`; 0 if there is none."""
    return next((divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0), 0)


def _token_ranges(lo: Tensor, hi: Tensor, seen: Tensor, num_media: int) -> tuple[Tensor, Tensor]:
    """For every medium, a range of rows that contains all rows which see it."""
    batch, length = lo.shape
    if length == 0:
        empty = torch.zeros(batch, num_media, dtype=torch.int32, device=lo.device)
        return empty, empty
    media = torch.arange(num_media, device=lo.device, dtype=lo.dtype).expand(batch, -1).contiguous()
    # Both sequences grow along T even where the spans do not, so a binary search finds each range.
    reached = torch.where(seen, hi, 0).cummax(1).values
    left = torch.where(seen, lo, num_media).flip(1).cummin(1).values.flip(1).contiguous()
    start = torch.searchsorted(reached, media, right=True, out_int32=True)
    stop = torch.searchsorted(left, media, right=True, out_int32=True)
    return start, torch.maximum(start, stop)
