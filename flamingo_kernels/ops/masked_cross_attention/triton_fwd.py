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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.checks import Checks
from ..._backends.triton.config import device_of
from ..._backends.triton.language import (
    LOWEST,
    dot,
    load_head,
    load_tile,
    online_softmax,
    power_of_two,
    scaled_exp2,
    scores,
    store_rows,
    store_softmax,
    wide,
)
from ..._backends.triton.launch import launch, precision, scales, strides
from .config import FEW_ROWS, Static, block_r, forward, is_one_shot


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
        _masked_xattn_fwd_one_shot_kernel if one_shot else _masked_xattn_fwd_spans_kernel,
        lambda config: batch * triton.cdiv(length, config.block_t) * heads,
        forward(Static(latents, head_dim, q.dtype, length <= FEW_ROWS, device_of(q.device))),
        *((q, k, v), strides(q, k, v), (lo, hi), (out, *softmax)),
        *(length, media, (heads, heads // kv_heads), scales(scale)),
        R=latents,
        D=head_dim,
        BLOCK_R=block_r(one_shot, latents, head_dim, q.dtype),
        AVERAGES=averages,
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


NOWHERE = tl.constexpr(2**31 - 1)  # the medium after the last


@triton.jit(do_not_specialize=["T", "M"])
def _masked_xattn_fwd_one_shot_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]
    strides,  # of each input
    spans,  # lo, hi [B, T]
    outputs,  # out [B, T, H, d]; row_max, row_sum, both empty
    T,
    M,
    heads,  # H, GROUP
    scales,  # scale, scale_log2, sign
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AVERAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr = inputs
    q_strides, k_strides, v_strides = strides
    out_ptr, _, _ = outputs
    H, GROUP = heads
    _, scale_log2, sign = scales
    batch, rows, head = program_rows(T, H, BLOCK_T)
    lo, hi = load_spans(spans, batch, rows, T, M)  # [BLOCK_T] each
    sees = lo < hi
    k_ptr = media_ptr(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = media_ptr(v_ptr, v_strides, batch, head // GROUP)
    q = load_head(q_ptr, q_strides, batch, rows, head, sees, D)
    latents = tl.arange(0, BLOCK_R)

    acc = tl.zeros([BLOCK_T, power_of_two(D)], tl.float32)
    row_sum = tl.full([BLOCK_T], 1.0, tl.float32)
    medium = tl.min(tl.where(sees, lo, NOWHERE))
    while medium < NOWHERE:
        k = load_latents(k_ptr, k_strides, medium, latents, R, D)
        v = load_latents(v_ptr, v_strides, medium, latents, R, D)
        s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
        p = scaled_exp2(s, tl.max(s, 1)[:, None], scale_log2)
        here = sees & (lo == medium)
        row_sum = tl.where(here, tl.sum(p, 1), row_sum)
        acc = tl.where(here[:, None], dot(p.to(v.dtype), v, PRECISION), acc)
        medium = tl.min(tl.where(sees & (lo > medium), lo, NOWHERE))

    acc = acc / row_sum[:, None]
    if AVERAGES:
        acc = average_blind_rows(acc, hi, v_ptr, v_strides, M, R, D, BLOCK_R)
    store_rows(out_ptr, batch, rows, head, acc, rows < T, T, H, D)


@triton.jit(do_not_specialize=["T", "M"])
def _masked_xattn_fwd_spans_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]
    strides,  # of each input
    spans,  # lo, hi [B, T]
    outputs,  # out [B, T, H, d]; row_max, row_sum [B, H, T]
    T,
    M,
    heads,  # H, GROUP
    scales,  # scale, scale_log2, sign
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AVERAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr = inputs
    q_strides, k_strides, v_strides = strides
    out_ptr, row_max_ptr, row_sum_ptr = outputs
    H, GROUP = heads
    _, scale_log2, sign = scales
    batch, rows, head = program_rows(T, H, BLOCK_T)
    lo, hi = load_spans(spans, batch, rows, T, M)  # [BLOCK_T] each
    sees = lo < hi
    k_ptr = media_ptr(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = media_ptr(v_ptr, v_strides, batch, head // GROUP)
    q = load_head(q_ptr, q_strides, batch, rows, head, sees, D)

    acc = tl.zeros([BLOCK_T, power_of_two(D)], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = tl.full([BLOCK_T], LOWEST, tl.float32)
    begin, end = tiles_seen(lo, hi, R, BLOCK_R)
    for tile in range(begin, end):
        medium, latents = latents_in_tile(tile, R, BLOCK_R)
        k = load_latents(k_ptr, k_strides, medium, latents, R, D)
        v = load_latents(v_ptr, v_strides, medium, latents, R, D)
        s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
        here = (lo <= medium) & (medium < hi)
        acc, row_max, row_sum = online_softmax(acc, row_max, row_sum, s, v, here, scale_log2, PRECISION)

    row_max = tl.where(sees, row_max, 0.0)
    row_sum = tl.where(sees, row_sum, 1.0)
    store_softmax(row_max_ptr, row_sum_ptr, batch, rows, head, row_max, row_sum, T, H, sign)
    acc = acc / row_sum[:, None]
    if AVERAGES:
        acc = average_blind_rows(acc, hi, v_ptr, v_strides, M, R, D, BLOCK_R)
    store_rows(out_ptr, batch, rows, head, acc, rows < T, T, H, D)


@triton.jit
def program_rows(T, H, BLOCK_T: tl.constexpr):
    """Sequence, rows and head of this program: heads first, which lie side by side in memory, then tiles from
    the end of the text, where rows may see the most media.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tiles - 1 - program // H % tiles
    return wide(program // H // tiles), tile * BLOCK_T + tl.arange(0, BLOCK_T), wide(program % H)


@triton.jit
def load_spans(spans, batch, rows, T, M):  # lo, hi [rows]
    """The first medium that each row sees, and the one after its last; rows beyond the text see none."""
    index = batch * T + rows
    lo = tl.load(spans[0] + index, mask=rows < T, other=0)
    return tl.maximum(lo, 0), tl.minimum(tl.load(spans[1] + index, mask=rows < T, other=0), M)


@triton.jit
def tiles_seen(lo, hi, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first tile of keys that some row sees, and the one after the last."""
    TILES: tl.constexpr = tl.cdiv(R, BLOCK_R)  # of a medium
    end = tl.max(tl.where(lo < hi, hi, 0))
    return tl.min(tl.where(lo < hi, lo, end)) * TILES, end * TILES


@triton.jit
def latents_in_tile(tile, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The medium of a tile of keys, and its latents there."""
    TILES: tl.constexpr = tl.cdiv(R, BLOCK_R)  # of a medium
    return tile // TILES, tile % TILES * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def media_ptr(ptr, strides, batch, kv_head):
    """Where the media of a head begin in `[B, M, R, Hkv, d]` with any strides."""
    return ptr + batch * strides[0] + kv_head * strides[3]


@triton.jit
def load_latents(ptr, strides, medium, latents, R: tl.constexpr, D: tl.constexpr):  # [latents, BLOCK_D]
    """Keys or values of a medium; `ptr` is a `media_ptr`."""
    return load_tile(ptr + wide(medium) * strides[1], latents, strides[2], latents < R, D)


@triton.jit
def average_blind_rows(acc, hi, v_ptr, v_strides, M, R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows whose span ends at -1 get the mean of all values of their sequence."""
    if tl.min(hi) < 0:
        total = tl.zeros([power_of_two(D)], tl.float32)
        for tile in range(0, M * tl.cdiv(R, BLOCK_R)):
            medium, latents = latents_in_tile(tile, R, BLOCK_R)
            v = load_latents(v_ptr, v_strides, medium, latents, R, D)
            total += tl.sum(v.to(tl.float32), 0)
        acc = tl.where((hi < 0)[:, None], (total / (M * R))[None, :], acc)
    return acc
