"""Dense masks of other libraries, read once for all layers of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .._kept import newest, once, once_for_equal
from .._labels import ATTENTION, labelled
from .._predicates import is_recording
from ..mask import MediaMask

# A kernel does not pay for media of fewer latents than this among many keys.
_FEWEST_LATENTS = 16
_FEW_KEYS = 256


@dataclass(frozen=True, eq=False)
class KeySpans:
    """A mask over S keys as spans of media, if need be for the keys in another order.

    Attributes:
        keys: S.
        mask: the spans.
        order: `[B, S]`, or `[B, n]` if no row sees the other keys; None for the order that they have.
    """

    keys: int
    mask: MediaMask
    order: Tensor | None

    def media(self, kv: Tensor) -> Tensor:
        """Keys or values `[B, S, Hkv, d]` as media `[B, M, R, Hkv, d]`, copied if they take another order.

        Without gradients a decoding step keeps the copy for the next step, while kv and these spans live.
        """
        if kv.shape[1] != self.keys:
            raise ValueError(f"expected a mask over {kv.shape[1]} keys, got one over {self.keys}.")
        if self.order is not None and self.mask.lo.shape[1] == 1:
            base = kv if kv._base is None else kv._base
            kv = newest(base, self, (kv,), lambda: in_order(kv, self.order), reuse=True)
        else:
            kv = in_order(kv, self.order)
        return kv.unflatten(1, (self.mask.num_media, -1))


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """`x` `[N, S, ...]` with the second dimension in an order `[N, n]`, if there is one."""
    return x if order is None else x[torch.arange(len(x), device=x.device)[:, None], order]


@labelled(ATTENTION)
def key_spans(mask: Tensor, text: Tensor, rows: Tensor | None = None, *, layer: object) -> KeySpans | None:
    """The spans of a mask over keys, read once in a forward pass; None if only a dense attention can take it.

    Keys that no row sees, such as those of padding tiles between two images, move behind the others. None
    means: gaps that this does not close, other values than 0 and the lowest, rows that see nothing though
    they may, media too small for many keys, a mask that is broadcast, or a traced run, which has no values
    to read (see `reads_when_run`).

    Args:
        mask: `[B, 1, T, S]`, bool, or added to the scores.
        text: the text that the mask is for, `[B, T, D]`.
        rows: `[B, T]`, zero where a row must see nothing. Default: no row must.
        layer: the layer that asks.
    """
    if is_recording(mask) or not _fits(mask, text, rows):
        return None
    tensors = (mask,) if rows is None else (mask, rows)
    step = text.shape[1] == 1
    return cast("KeySpans | None", once(_read_step if step else read_spans, tensors, layer=layer))


def reads_when_run(mask: Tensor, text: Tensor, rows: Tensor | None = None, *, sdpa: bool) -> bool:
    """Whether a compiled model reads this mask when it runs, by `dense_cross_attention`.

    A step of generation does not: to read its mask would cost more than a kernel can save.

    Args:
        mask: as for `key_spans`.
        text: as for `key_spans`.
        rows: as for `key_spans`.
        sdpa: whether a mask that is no spans is for "sdpa", which takes bool ones too.
    """
    return _is_compiled(mask, sdpa) and text.shape[1] > 1 and _fits(mask, text, rows)


def _is_compiled(mask: Tensor, sdpa: bool) -> bool:
    """Whether torch.compile or torch.export records this, with a mask that is but a mask."""
    adds = mask.dtype.is_floating_point or (sdpa and mask.dtype == torch.bool)
    return torch.compiler.is_compiling() and adds and not mask.requires_grad


def _fits(mask: Tensor, text: Tensor, rows: Tensor | None) -> bool:
    """Whether a mask has a row for every token and is not empty."""
    batch, length, _ = text.shape
    one_each = mask.shape[:-1] == (batch, 1, length) and mask.numel() > 0
    return one_each and (rows is None or rows.shape == (batch, length))


def _are_small(latents: int, keys: int) -> bool:
    """Whether media of so many latents are too small for a kernel, among so many keys."""
    return keys > _FEW_KEYS and latents < _FEWEST_LATENTS


def _read_step(*tensors: Tensor) -> KeySpans | None:
    """The spans of a step of generation, which makes its mask anew, mostly with equal values."""
    return cast("KeySpans | None", once_for_equal(read_spans, tensors))


def read_spans(mask: Tensor, rows: Tensor | None = None) -> KeySpans | None:
    seen = _visible(mask)
    if seen is None:
        return None
    seen = seen[:, 0]  # [B, T, S]
    allowed = torch.ones_like(seen[..., 0]) if rows is None else rows != 0
    if bool((allowed & ~seen.any(-1)).any()):
        return None
    seen, order = seen & allowed[..., None], None
    spans = read_mask(seen)
    if spans is None:
        order = _used_first(seen)
        if seen.shape[1] == 1:
            order = order[:, : max(int(seen.sum(-1).max()), 1)]  # a softmax needs at least one
        spans = read_mask(seen.take_along_dim(order[:, None], dim=-1))
    return None if spans is None else KeySpans(seen.shape[-1], spans, order)


def read_mask(seen: Tensor, averages: Tensor | None = None) -> MediaMask | None:
    """`MediaMask.from_dense`, or None if there are gaps or the media are too small for many keys."""
    try:
        mask = MediaMask.from_dense(seen, averages=averages)
    except ValueError:
        return None
    keys = seen.shape[-1]
    return None if mask.num_media > 0 and _are_small(keys // mask.num_media, keys) else mask


def _used_first(seen: Tensor) -> Tensor:
    """An order of the keys with the unseen ones last; rows that see all keys fit any order."""
    return chosen_first((seen & ~seen.all(-1, keepdim=True)).any(1))


def chosen_first(chosen: Tensor) -> Tensor:
    """An order of the last dimension with the chosen entries first."""
    return chosen.int().argsort(dim=-1, descending=True, stable=True)


def media_first(
    mask: Tensor, media: Tensor, latents: Tensor, *, layer: object
) -> tuple[Tensor | None, Tensor] | None:
    """For keys `[media ; latents]`: an order `[N, S]` with the visible media first, and their number `[N]`.

    The order is None if they come first already. The result is None if the rows of a clip see different keys,
    if one does not see a latent, if the mask is broadcast over clips, or in a traced run (see
    `reads_padding_when_run`).

    Args:
        mask: `[N, 1, R, S + L]`, bool, or added to the scores; or `[N, S + L]`, 1 where a key is seen.
        media: `[N, S, D]`.
        latents: `[N, L, D]`.
        layer: the layer that asks.
    """
    if is_recording(mask) or not _fits_latents(mask, media, latents):
        return None
    return cast(
        "tuple[Tensor | None, Tensor] | None", once(read_padding, (mask,), latents.shape[1], layer=layer)
    )


def reads_padding_when_run(mask: Tensor, media: Tensor, latents: Tensor, *, sdpa: bool) -> bool:
    """Whether a compiled model reads this mask when it runs, by `dense_perceiver_attention`.

    Args:
        mask: as for `media_first`.
        media: as for `media_first`.
        latents: as for `media_first`.
        sdpa: as for `reads_when_run`.
    """
    flat = mask.ndim == 2 and torch.compiler.is_compiling()
    return (flat or _is_compiled(mask, sdpa)) and _fits_latents(mask, media, latents)


def _fits_latents(mask: Tensor, media: Tensor, latents: Tensor) -> bool:
    """Whether a mask is for the keys `[media ; latents]`."""
    clips, keys = media.shape[0], media.shape[1] + latents.shape[1]  # `len` would fix a traced size
    added = mask.ndim == 4 and (*mask.shape[:2], mask.shape[3]) == (clips, 1, keys)
    return added or mask.shape == (clips, keys)


def read_padding(mask: Tensor, latents: int) -> tuple[Tensor | None, Tensor] | None:
    seen = _visible(mask) if mask.ndim == 4 else (mask == 1)[:, None, None]
    if seen is None:
        return None
    seen = seen[:, 0]  # [N, R, S + L]
    media, own = seen[:, 0].split([seen.shape[-1] - latents, latents], dim=-1)
    if not bool((seen == seen[:, :1]).all() & own.all()):
        return None
    order = chosen_first(media)
    sorted_already = bool((media == in_order(media, order)).all())
    return None if sorted_already else order, media.sum(-1)


def _visible(mask: Tensor) -> Tensor | None:
    """Bool, True where a key is seen; None if the mask has other values than 0 and the lowest."""
    if not mask.dtype.is_floating_point:
        return mask.bool()
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()) else None
