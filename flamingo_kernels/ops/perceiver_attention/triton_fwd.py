"""Forward of perceiver attention in Triton. Oracle: `reference.py`.

A program takes a block of queries of one head of one clip through an online softmax over blocks of keys: the
clip's media as far as they are real, then its latents, two segments that are read where they lie. Where there
are too few programs to fill the device the keys of a clip are cut into parts, each with a softmax of its own,
which a second kernel combines in order.

Bytes: q and every real key and value read once from memory (again from the cache by further blocks of
queries and by heads that share them), out and two numbers a query written once. Parts write theirs in
float32, to be read once more. FLOPs: 4 d a query and real key.
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
    head_of,
    load_head,
    load_rows,
    load_softmax,
    load_tile,
    power_below,
    store_rows,
    store_softmax,
    wide,
)
from ..._backends.triton.launch import base2, launch, precision
from .config import COMBINE, Queries, forward, parts_of


def perceiver_attention_fwd(
    q: Tensor,  # [N, R, H, d]
    k_media: Tensor,  # [N, S, Hkv, d]
    v_media: Tensor,  # [N, S, Hkv, d]
    k_latents: Tensor,  # [N, L, Hkv, d]
    v_latents: Tensor,  # [N, L, Hkv, d]
    media_lengths: Tensor | None,  # [N]
    scale: float,
) -> tuple[Tensor, Tensor]:  # out [N, R, H, d], softmax [2, N, H, R]
    check("perceiver_attention_fwd", q, k_media, v_media, k_latents, v_latents, media_lengths)
    clips, queries, heads, head_dim = q.shape
    features, latents, kv_heads = k_media.shape[1], k_latents.shape[1], k_media.shape[2]
    out = q.new_empty(q.shape)
    softmax = q.new_empty(2, clips, heads, queries, dtype=torch.float32)
    constants = {"D": head_dim, "COLUMNS": power_of_two(head_dim), "SIGN": math.copysign(1, scale)}

    def programs(tiles: Queries) -> int:
        return clips * triton.cdiv(queries, tiles.block_queries) * heads

    device = device_of(q.device)
    choice = forward(queries, head_dim, q.dtype, device)
    parts = parts_of(programs(choice.default), features + latents, device)
    outs, softmaxes = out, softmax
    if parts > 1:
        outs = q.new_empty(parts, *q.shape, dtype=torch.float32)
        softmaxes = q.new_empty(2, parts, clips, heads, queries, dtype=torch.float32)
    launch(
        _attention_kernel,
        lambda tiles: parts * programs(tiles),
        choice,
        *(q, (k_media, k_latents), (v_media, v_latents), media_lengths, outs, *softmaxes),
        *(*strides_of(q), strides_of(k_media, k_latents), strides_of(v_media, v_latents)),
        *(clips, queries, features, latents, heads, heads // kv_heads, parts, base2(scale)),
        **constants,
        PRECISION=precision(q),
    )
    if parts > 1:
        sizes = (clips, queries, heads, parts, base2(scale))
        launch(_combine_kernel, programs, COMBINE, outs, *softmaxes, out, *softmax, *sizes, **constants)
    return out, softmax


def check(
    operation: str,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
) -> Checks:
    checks = Checks(operation, "q", q, 4)
    checks.dimensions("k_media", k_media, 4)
    checks.dimensions("k_latents", k_latents, 4)
    clips, queries, heads, head_dim = q.shape
    features, latents, kv_heads = k_media.shape[1], k_latents.shape[1], k_media.shape[2]
    checks.rows("q", q, (clips, queries, heads, head_dim))
    checks.rows_like_first("k_media", k_media, (clips, features, kv_heads, head_dim))
    checks.rows_like_first("v_media", v_media, (clips, features, kv_heads, head_dim))
    checks.rows_like_first("k_latents", k_latents, (clips, latents, kv_heads, head_dim))
    checks.rows_like_first("v_latents", v_latents, (clips, latents, kv_heads, head_dim))
    checks.latents("k_latents", k_latents, 1)
    checks.head_groups(heads, kv_heads)
    if media_lengths is not None:
        checks.whole("media_lengths", media_lengths, (clips,), torch.int32)
    return checks


def strides_of(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """How far clips, rows and heads lie apart."""
    return tuple(tensor.stride()[:3] for tensor in tensors)


SIZES = ["N", "R", "S", "L", "H", "GROUP", "parts"]


@triton.jit(do_not_specialize=SIZES)
def _attention_kernel(
    q,
    k,
    v,
    media_lengths,
    out,
    softmax_max,
    softmax_sum,
    q_strides,
    k_strides,
    v_strides,
    N,
    R,
    S,
    L,
    H,
    GROUP,
    parts,
    base2_scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    clip, part, rows, head = tile_of(R, H, parts, BLOCK_QUERIES)
    queries = load_head(q, q_strides, clip, rows, head, rows < R, D, COLUMNS)

    product = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    highest = tl.full([BLOCK_QUERIES], LOWEST, tl.float32)
    length = length_of(media_lengths, clip, S)
    begin, end = part_of_keys(part, parts, length, L, BLOCK_KEYS)
    for block in range(begin, end):
        media, at, real = keys_of(block, length, L, BLOCK_KEYS)
        keys = load_keys(k, k_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
        values = load_keys(v, v_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
        scores = dot(queries, tl.trans(keys), PRECISION) * SIGN
        scores = tl.where(real[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = power_below(highest, higher, base2_scale)
        weights = power_below(scores, higher[:, None], base2_scale)
        total = total * shrink + tl.sum(weights, 1)
        product = product * shrink[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        highest = higher

    clip += part * N
    store_rows(out, clip, rows, head, product / total[:, None], rows < R, R, H, D, COLUMNS)
    store_softmax(softmax_max, softmax_sum, clip, rows, head, highest, total, R, H, SIGN)


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    outs,
    maxima,
    sums,
    out,
    softmax_max,
    softmax_sum,
    N,
    R,
    H,
    parts,
    base2_scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    clip, _, rows, head = tile_of(R, H, 1, BLOCK_QUERIES)

    product = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    highest = tl.full([BLOCK_QUERIES], LOWEST, tl.float32)
    for part in range(parts):
        at = part * N + clip
        part_highest, part_total = load_softmax(maxima, sums, at, rows, head, rows < R, R, H, SIGN)
        has_keys = (rows < R) & (part_total != 0)  # without any a part has no average
        part_out = load_rows(outs, at, rows, head, has_keys, R, H, D, COLUMNS)
        higher = tl.maximum(highest, part_highest)
        shrink = power_below(highest, higher, base2_scale)
        weight = part_total * power_below(part_highest, higher, base2_scale)
        total = total * shrink + weight
        product = product * shrink[:, None] + part_out * weight[:, None]
        highest = higher

    store_rows(out, clip, rows, head, product / total[:, None], rows < R, R, H, D, COLUMNS)
    store_softmax(softmax_max, softmax_sum, clip, rows, head, highest, total, R, H, SIGN)


@triton.jit
def tile_of(R, H, parts, BLOCK_QUERIES: tl.constexpr):
    """Clip, part of its keys, queries and head of this program: heads first, which lie side by side, then the
    blocks of queries that read the same keys.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK_QUERIES)
    block = program // H % blocks
    part = program // H // blocks % parts
    clip = program // H // blocks // parts
    return wide(clip), part, block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES), wide(program % H)


@triton.jit
def length_of(media_lengths, clip, S):
    """How many of the media keys of a clip are real."""
    if media_lengths is None:
        return S
    else:
        return tl.minimum(tl.maximum(tl.load(media_lengths + clip), 0), S)


@triton.jit
def part_of_keys(part, parts, length, L, BLOCK_KEYS: tl.constexpr):
    """The first block of keys of one of equal parts, and the one after its last."""
    blocks = tl.cdiv(length, BLOCK_KEYS) + tl.cdiv(L, BLOCK_KEYS)
    each = tl.cdiv(blocks, parts)
    return part * each, tl.minimum((part + 1) * each, blocks)


@triton.jit
def keys_of(block, length, L, BLOCK_KEYS: tl.constexpr):
    """Whether a block of keys is of the media, which come first; its keys there; which of them are real."""
    blocks = tl.cdiv(length, BLOCK_KEYS)
    media = block < blocks
    at = tl.where(media, block, block - blocks) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    return media, at, at < tl.where(media, length, L)


@triton.jit
def load_keys(segments, strides, media, clip, keys, head, real, D: tl.constexpr, COLUMNS: tl.constexpr):
    """From `[N, S, Hkv, d]` or `[N, L, Hkv, d]`, with any strides."""
    base = tl.where(
        media, head_of(segments[0], strides[0], clip, head), head_of(segments[1], strides[1], clip, head)
    )
    return load_tile(base, keys, tl.where(media, strides[0][1], strides[1][1]), real, D, COLUMNS)
