"""Forward of masked cross-attention in Triton. Oracle: `reference.py`.

A program takes a tile of text rows of one head.

one shot    Every row sees one medium, whose keys are one tile, so its softmax takes one pass. The tile visits
            the media that its rows name, and each row keeps the product with its own.
spans       Rows see several media, or a medium has many keys: an online softmax over tiles of keys, where a
            row skips what it does not see.

Bytes: q, k, v read once from memory (tiles of keys again from the cache), out written once, and for spans two
numbers a row. FLOPs: 4 d a row and key, for all keys of the media that the tile visits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.checks import Checks
from ..._backends.triton.config import device_of, power_of_two
from ..._backends.triton.language import (
    LOWEST,
    dot,
    load_head,
    load_tile,
    power_below,
    store_rows,
    store_softmax,
    wide,
)
from ..._backends.triton.launch import base2, launch, precision
from .config import FEW_ROWS, Static, block_of_latents, forward, is_one_shot


def masked_cross_attention_fwd(
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    lo: Tensor,  # [B, T]
    hi: Tensor,  # [B, T]
    start: Tensor,  # [B, M]
    stop: Tensor,  # [B, M]
    immediate: bool,
    averages: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # out [B, T, H, d], softmax [2, B, H, T]
    check("masked_cross_attention_fwd", q, k, v, lo, hi, start, stop)
    batch, length, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    one_shot = is_one_shot(immediate, latents, head_dim, q.dtype)
    out = q.new_empty(q.shape)
    softmax = q.new_empty(2, batch, heads, 0 if one_shot else length, dtype=torch.float32)
    launch(
        _one_shot_kernel if one_shot else _spans_kernel,
        lambda config: batch * triton.cdiv(length, config.block_t) * heads,
        forward(Static(latents, head_dim, q.dtype, length <= FEW_ROWS, device_of(q.device))),
        *(q, k, v, out, *softmax, lo, hi),
        *(q.stride()[:3], k.stride()[:4], v.stride()[:4]),
        *(length, media, heads, heads // kv_heads, base2(scale)),
        R=latents,
        D=head_dim,
        BLOCK_R=block_of_latents(one_shot, latents, head_dim, q.dtype),
        COLUMNS=power_of_two(head_dim),
        AVERAGES=averages,
        SIGN=math.copysign(1, scale),
        PRECISION=precision(q),
    )
    return out, softmax


def check(
    operation: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, start: Tensor, stop: Tensor
) -> Checks:
    checks = Checks(operation, "q", q, 4)
    checks.dimensions("k", k, 5)
    batch, length, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    checks.rows("q", q, (batch, length, heads, head_dim))
    checks.rows_like_first("k", k, (batch, media, latents, kv_heads, head_dim))
    checks.rows_like_first("v", v, (batch, media, latents, kv_heads, head_dim))
    checks.latents("k", k, 2)
    checks.head_groups(heads, kv_heads)
    for name, span in (("lo", lo), ("hi", hi)):
        checks.whole(name, span, (batch, length), torch.int32)
    for name, span in (("start", start), ("stop", stop)):
        checks.whole(name, span, (batch, media), torch.int32)
    return checks


SIZES = ["T", "M", "H", "GROUP"]
NOWHERE = tl.constexpr(2**31 - 1)  # the medium after the last


@triton.jit(do_not_specialize=SIZES)
def _one_shot_kernel(
    q,
    k,
    v,
    out,
    softmax_max,
    softmax_sum,
    lo,
    hi,
    q_strides,
    k_strides,
    v_strides,
    T,
    M,
    H,
    GROUP,
    base2_scale,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    AVERAGES: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch, rows, head = tile_of(T, H, BLOCK_T)
    first, end = spans_of(lo, hi, batch, rows, T, M)  # [BLOCK_T] each
    sees = first < end
    k = media_of(k, k_strides, batch, head // GROUP)
    v = media_of(v, v_strides, batch, head // GROUP)
    queries = load_head(q, q_strides, batch, rows, head, sees, D, COLUMNS)
    latents = tl.arange(0, BLOCK_R)

    product = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
    total = tl.full([BLOCK_T], 1.0, tl.float32)
    medium = tl.min(tl.where(sees, first, NOWHERE))
    while medium < NOWHERE:
        keys = load_latents(k, k_strides, medium, latents, R, D, COLUMNS)
        values = load_latents(v, v_strides, medium, latents, R, D, COLUMNS)
        scores = scores_of(queries, keys, latents < R, SIGN, PRECISION)  # [BLOCK_T, BLOCK_R]
        weights = power_below(scores, tl.max(scores, 1)[:, None], base2_scale)
        here = sees & (first == medium)
        total = tl.where(here, tl.sum(weights, 1), total)
        product = tl.where(here[:, None], dot(weights.to(values.dtype), values, PRECISION), product)
        medium = tl.min(tl.where(sees & (first > medium), first, NOWHERE))

    product = product / total[:, None]
    if AVERAGES:
        product = average_blind_rows(product, end, v, v_strides, M, R, D, BLOCK_R, COLUMNS)
    store_rows(out, batch, rows, head, product, rows < T, T, H, D, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def _spans_kernel(
    q,
    k,
    v,
    out,
    softmax_max,
    softmax_sum,
    lo,
    hi,
    q_strides,
    k_strides,
    v_strides,
    T,
    M,
    H,
    GROUP,
    base2_scale,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    AVERAGES: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch, rows, head = tile_of(T, H, BLOCK_T)
    first, end = spans_of(lo, hi, batch, rows, T, M)  # [BLOCK_T] each
    sees = first < end
    k = media_of(k, k_strides, batch, head // GROUP)
    v = media_of(v, v_strides, batch, head // GROUP)
    queries = load_head(q, q_strides, batch, rows, head, sees, D, COLUMNS)

    product = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    highest = tl.full([BLOCK_T], LOWEST, tl.float32)
    begin, after = tiles_seen(first, end, R, BLOCK_R)
    for tile in range(begin, after):
        medium, latents = keys_of(tile, R, BLOCK_R)
        keys = load_latents(k, k_strides, medium, latents, R, D, COLUMNS)
        values = load_latents(v, v_strides, medium, latents, R, D, COLUMNS)
        scores = scores_of(queries, keys, latents < R, SIGN, PRECISION)  # [BLOCK_T, BLOCK_R]
        here = (first <= medium) & (medium < end)
        higher = tl.where(here, tl.maximum(highest, tl.max(scores, 1)), highest)
        shrink = power_below(highest, higher, base2_scale)
        weights = power_below(scores, higher[:, None], base2_scale)
        added = product * shrink[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        total = tl.where(here, total * shrink + tl.sum(weights, 1), total)
        product = tl.where(here[:, None], added, product)
        highest = higher

    highest = tl.where(sees, highest, 0.0)
    total = tl.where(sees, total, 1.0)
    store_softmax(softmax_max, softmax_sum, batch, rows, head, highest, total, T, H, SIGN)
    product = product / total[:, None]
    if AVERAGES:
        product = average_blind_rows(product, end, v, v_strides, M, R, D, BLOCK_R, COLUMNS)
    store_rows(out, batch, rows, head, product, rows < T, T, H, D, COLUMNS)


@triton.jit
def tile_of(T, H, BLOCK_T: tl.constexpr):
    """Sequence, rows and head of this program: heads first, which lie side by side in memory, then tiles from
    the end of the text, where rows may see the most media.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tiles - 1 - program // H % tiles
    return wide(program // H // tiles), tile * BLOCK_T + tl.arange(0, BLOCK_T), wide(program % H)


@triton.jit
def spans_of(lo, hi, batch, rows, T, M):
    """The first medium that each row sees, and the one after its last; rows beyond the text see none."""
    at = batch * T + rows
    first = tl.load(lo + at, mask=rows < T, other=0)
    return tl.maximum(first, 0), tl.minimum(tl.load(hi + at, mask=rows < T, other=0), M)


@triton.jit
def tiles_seen(first, end, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The range of key tiles that some row sees."""
    each: tl.constexpr = tl.cdiv(R, BLOCK_R)
    after = tl.max(tl.where(first < end, end, 0))
    return tl.min(tl.where(first < end, first, after)) * each, after * each


@triton.jit
def keys_of(tile, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The medium of a key tile, and its latents there."""
    each: tl.constexpr = tl.cdiv(R, BLOCK_R)
    return tile // each, tile % each * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def media_of(tensor, strides, batch, kv_head):
    """Where the media of a head begin in `[B, M, R, Hkv, d]` with any strides."""
    return tensor + batch * strides[0] + kv_head * strides[3]


@triton.jit
def load_latents(media, strides, medium, latents, R: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Keys or values of a medium; `media` as `media_of` gives it."""
    return load_tile(media + wide(medium) * strides[1], latents, strides[2], latents < R, D, COLUMNS)


@triton.jit
def scores_of(queries, keys, inside, SIGN: tl.constexpr, PRECISION: tl.constexpr):  # [BLOCK_T, BLOCK_R]
    """Scores, not scaled yet, turned so that the highest weighs the most; -inf where there is no key."""
    return tl.where(inside[None, :], dot(queries, tl.trans(keys), PRECISION) * SIGN, float("-inf"))


@triton.jit
def average_blind_rows(
    product,
    end,
    v,
    v_strides,
    M,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows whose span ends at -1 get the mean of all values of their sequence."""
    if tl.min(end) < 0:
        total = tl.zeros([COLUMNS], tl.float32)
        for tile in range(0, M * tl.cdiv(R, BLOCK_R)):
            medium, latents = keys_of(tile, R, BLOCK_R)
            values = load_latents(v, v_strides, medium, latents, R, D, COLUMNS)
            total += tl.sum(values.to(tl.float32), 0)
        product = tl.where((end < 0)[:, None], (total / (M * R))[None, :], product)
    return product
