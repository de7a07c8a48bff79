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
from ..._backends.triton.language import dot, power_of_two, wide
from ..._backends.triton.launch import launch, precision, scales, strides
from ..._backends.triton.softmax import empty_softmax, online_softmax, scaled_exp2, scores, store_softmax
from ..._backends.triton.tiles import load_head, load_tile, store_rows
from .config import FEW_ROWS, Static, block_r, forward, is_one_shot


def masked_cross_attention_fwd(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    check("masked_cross_attention_fwd", q, k, v, lo, hi, start, stop)
    batch, length, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    one_shot = is_one_shot(immediate, latents, head_dim, q.dtype)
    out = q.new_empty(q.shape)
    softmax = q.new_empty(2, batch, heads, 0 if one_shot else length, dtype=torch.float32)
    constants = {"R": latents, "D": head_dim, "AVERAGES": averages, "PRECISION": precision(q)}
    if not one_shot:
        constants["BLOCK_R"] = block_r(latents, head_dim, q.dtype)
    launch(
        _masked_xattn_fwd_one_shot_kernel if one_shot else _masked_xattn_fwd_spans_kernel,
        lambda config: batch * triton.cdiv(length, config.block_t) * heads,
        forward(Static(latents, head_dim, q.dtype, length <= FEW_ROWS, device_of(q.device)), one_shot),
        *((q, k, v), strides(q, k, v), ((heads, heads // kv_heads), scales(scale))),
        *((out, tuple(softmax)), (lo, hi), length, media),
        **constants,
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
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    outputs,  # out [B, T, H, d]; stats, which are empty
    spans,  # lo, hi [B, T]
    T,
    M,
    R: tl.constexpr,
    D: tl.constexpr,
    AVERAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    BLOCK_R: tl.constexpr = power_of_two(R)
    H, GROUP = settings[0]
    _, scale_log2, sign = settings[1]
    batch, rows, head, lo, hi = program_rows(spans, T, M, H, BLOCK_T)
    sees = lo < hi
    media = media_ptrs(inputs, strides, batch, head // GROUP)
    q = load_head(inputs[0], strides[0], batch, rows, head, rows < T, D)
    latents = tl.arange(0, BLOCK_R)

    acc = tl.zeros([BLOCK_T, power_of_two(D)], tl.float32)
    row_sum = tl.full([BLOCK_T], 1.0, tl.float32)
    medium = tl.min(tl.where(sees, lo, NOWHERE))
    while medium < NOWHERE:
        k, v = load_keys(media, strides, medium, latents, R, D)
        s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
        p = scaled_exp2(s, tl.max(s, 1)[:, None], scale_log2)
        here = sees & (lo == medium)
        row_sum = tl.where(here, tl.sum(p, 1), row_sum)
        acc = tl.where(here[:, None], dot(p.to(v.dtype), v, PRECISION), acc)
        medium = tl.min(tl.where(sees & (lo > medium), lo, NOWHERE))

    acc = acc / row_sum[:, None]
    if AVERAGES:
        acc = average_blind_rows(acc, hi, media[1], strides[2], M, R, D, BLOCK_R)
    store_rows(outputs[0], batch, rows, head, acc, rows < T, T, H, D)


@triton.jit(do_not_specialize=["T", "M"])
def _masked_xattn_fwd_spans_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    outputs,  # out [B, T, H, d]; stats, row_max and row_sum [B, H, T]
    spans,  # lo, hi [B, T]
    T,
    M,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AVERAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    acc, row_max, row_sum = empty_softmax(BLOCK_T, D)
    H, GROUP = settings[0]
    _, scale_log2, sign = settings[1]
    batch, rows, head, lo, hi = program_rows(spans, T, M, H, BLOCK_T)
    sees = lo < hi
    media = media_ptrs(inputs, strides, batch, head // GROUP)
    q = load_head(inputs[0], strides[0], batch, rows, head, sees, D)

    begin, end = tiles_seen(lo, hi, R, BLOCK_R)
    for tile in range(begin, end):
        medium, latents = latents_in_tile(tile, R, BLOCK_R)
        k, v = load_keys(media, strides, medium, latents, R, D)
        s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
        here = (lo <= medium) & (medium < hi)
        acc, row_max, row_sum = online_softmax(acc, row_max, row_sum, s, v, here, scale_log2, PRECISION)

    row_max = tl.where(sees, row_max, 0.0)
    row_sum = tl.where(sees, row_sum, 1.0)
    store_softmax(outputs[1], batch, rows, head, row_max, row_sum, T, H, sign)
    acc = acc / row_sum[:, None]
    if AVERAGES:
        acc = average_blind_rows(acc, hi, media[1], strides[2], M, R, D, BLOCK_R)
    store_rows(outputs[0], batch, rows, head, acc, rows < T, T, H, D)


@triton.jit
def program_rows(spans, T, M, H, BLOCK_T: tl.constexpr):
    """Sequence, rows and head of this program, and the spans of the rows: heads first, which lie side by side
    in memory, then tiles from the end of the text, where rows may see the most media.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tiles - 1 - program // H % tiles
    batch, rows = wide(program // H // tiles), tile * BLOCK_T + tl.arange(0, BLOCK_T)
    lo, hi = load_spans(spans, batch, rows, T, M)
    return batch, rows, program % H, lo, hi


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
def media_ptrs(inputs, strides, batch, kv_head):  # of k, of v
    """Where the media of a head begin in k and v, `[B, M, R, Hkv, d]` with any strides."""
    head = wide(kv_head)
    return (
        inputs[1] + batch * strides[1][0] + head * strides[1][3],
        inputs[2] + batch * strides[2][0] + head * strides[2][3],
    )


@triton.jit
def load_keys(media, strides, medium, latents, R: tl.constexpr, D: tl.constexpr):  # k, v [latents, BLOCK_D]
    """Keys and values of a medium; `media` are `media_ptrs`."""
    k = load_latents(media[0], strides[1], medium, latents, R, D)
    return k, load_latents(media[1], strides[2], medium, latents, R, D)


@triton.jit
def load_latents(ptr, strides, medium, latents, R: tl.constexpr, D: tl.constexpr):  # [latents, BLOCK_D]
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
