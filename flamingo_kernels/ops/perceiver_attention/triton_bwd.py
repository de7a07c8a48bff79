"""Backward of perceiver attention in Triton. Oracle: autograd through `reference.py`.

    P = softmax(scale q k^T),  delta = rowsum(dout out),  dS = P (dout v^T - delta)
    dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout

Rows in which one key weighs more than all others have delta = rowsum(P dP), by a pass over the keys before.

One kernel keeps queries and goes through the keys, media then latents, for dq. Where it keeps all queries of
a head, and no other head shares the keys, it writes dk and dv of every key on the way. Elsewhere a second
kernel keeps keys and goes through the queries. Where there are too few programs to fill the device the keys
of a clip are cut into parts, whose dq are added in order. Keys that are not real get gradients of 0.

Bytes: the first way reads q, dout, out, k, v and writes dq, dk, dv, each once; the second reads q, dout, k, v
twice. FLOPs: 10 d a query and real key the first way, 14 d the second.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of, power_of_two
from ..._backends.triton.language import (
    dot,
    is_saturated,
    kept_weights,
    load_head,
    load_rows,
    load_softmax,
    row_dot,
    row_of,
    store_rows,
)
from ..._backends.triton.launch import base2, launch, precision
from ..._backends.triton.reduction import add_in_order
from .config import Tiles, backward_keys, backward_queries, is_whole, parts_of
from .triton_fwd import SIZES, check, keys_of, length_of, load_keys, part_of_keys, strides_of, tile_of


def perceiver_attention_bwd(
    dout: Tensor,  # [N, R, H, d]
    q: Tensor,  # [N, R, H, d]
    k_media: Tensor,  # [N, S, Hkv, d]
    v_media: Tensor,  # [N, S, Hkv, d]
    k_latents: Tensor,  # [N, L, Hkv, d]
    v_latents: Tensor,  # [N, L, Hkv, d]
    out: Tensor,  # [N, R, H, d]
    softmax: Tensor,  # [2, N, H, R]
    media_lengths: Tensor | None,  # [N]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # dq, dk_media, dv_media, dk_latents, dv_latents
    checks = check("perceiver_attention_bwd", q, k_media, v_media, k_latents, v_latents, media_lengths)
    clips, queries, heads, head_dim = q.shape
    features, latents, kv_heads = k_media.shape[1], k_latents.shape[1], k_media.shape[2]
    checks.rows_like_first("dout", dout, q.shape)
    checks.whole("out", out, q.shape, q.dtype)
    checks.whole("softmax", softmax, (2, clips, heads, queries), torch.float32)
    inputs = (q, k_media, v_media, k_latents, v_latents)
    fresh = q.new_empty if q.numel() else q.new_zeros
    dq, dk_media, dv_media, dk_latents, dv_latents = (fresh(tensor.shape) for tensor in inputs)
    if q.numel() == 0:
        return dq, dk_media, dv_media, dk_latents, dv_latents

    group, device = heads // kv_heads, device_of(q.device)
    whole = is_whole(queries, head_dim, q.dtype, group)
    delta = softmax.new_empty(softmax.shape[1:])
    scales = (scale, base2(scale))
    constants = {
        "D": head_dim,
        "COLUMNS": power_of_two(head_dim),
        "SIGN": math.copysign(1, scale),
        "PRECISION": precision(q),
    }

    def programs(tiles: Tiles) -> int:
        return clips * triton.cdiv(queries, tiles.block_queries) * heads

    choice = backward_queries(whole, queries, head_dim, q.dtype, device)
    parts = parts_of(programs(choice.default), features + latents, device)
    dqs = dq if parts == 1 else q.new_empty(parts, *q.shape, dtype=torch.float32)
    launch(
        _queries_kernel,
        lambda tiles: parts * programs(tiles),
        choice,
        *(dout, q, (k_media, k_latents), (v_media, v_latents), out, *softmax, media_lengths),
        *(dqs, (dk_media, dk_latents), (dv_media, dv_latents), delta),
        *(*strides_of(dout, q), strides_of(k_media, k_latents), strides_of(v_media, v_latents)),
        *(clips, queries, features, latents, heads, group, parts, *scales),
        **constants,
        WHOLE=whole,
    )
    if parts > 1:
        dq = add_in_order(dqs, q.dtype)

    def collect(k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, lengths: Tensor | None) -> None:
        launch(
            _keys_kernel,
            lambda tiles: clips * triton.cdiv(k.shape[1], tiles.block_keys) * kv_heads,
            backward_keys(head_dim, q.dtype, device),
            *(dout, q, k, v, *softmax, delta, lengths, dk, dv, *strides_of(dout, q, k, v)),
            *(queries, k.shape[1], heads, group, *scales),
            **constants,
        )

    if not whole:
        collect(k_media, v_media, dk_media, dv_media, media_lengths)
        collect(k_latents, v_latents, dk_latents, dv_latents, None)
    return dq, dk_media, dv_media, dk_latents, dv_latents


@triton.jit(do_not_specialize=SIZES)
def _queries_kernel(
    dout,
    q,
    k,
    v,
    out,
    softmax_max,
    softmax_sum,
    media_lengths,
    dq,
    dk,
    dv,
    delta,
    dout_strides,
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
    scale,
    base2_scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    clip, part, rows, head = tile_of(R, H, parts, BLOCK_QUERIES)
    inside = rows < R
    queries = load_head(q, q_strides, clip, rows, head, inside, D, COLUMNS)
    douts = load_head(dout, dout_strides, clip, rows, head, inside, D, COLUMNS)
    deltas = row_dot(douts, load_rows(out, clip, rows, head, inside, R, H, D, COLUMNS))
    highest, total = load_softmax(softmax_max, softmax_sum, clip, rows, head, inside, R, H, SIGN)
    highest, share = highest[:, None], 1 / total[:, None]
    length = length_of(media_lengths, clip, S)

    saturated = is_saturated(inside, total)
    if (
        tl.max(saturated.to(tl.int32)) > 0
    ):  # there dP cancels against delta: from the rounded out it would not
        sums = tl.zeros([BLOCK_QUERIES], tl.float32)
        for block in range(0, tl.cdiv(length, BLOCK_KEYS) + tl.cdiv(L, BLOCK_KEYS)):
            media, at, real = keys_of(block, length, L, BLOCK_KEYS)
            keys = load_keys(k, k_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
            values = load_keys(v, v_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
            scores = dot(queries, tl.trans(keys), PRECISION) * SIGN
            seen = inside[:, None] & real[None, :]
            weights = kept_weights(tl.where(seen, scores, float("-inf")), highest, base2_scale) * share
            sums += tl.sum(weights * dot(douts, tl.trans(values), PRECISION), 1)
        deltas = tl.where(saturated, sums, deltas)

    dqueries = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    begin, end = part_of_keys(part, parts, length, L, BLOCK_KEYS)
    for block in range(begin, end):
        media, at, real = keys_of(block, length, L, BLOCK_KEYS)
        keys = load_keys(k, k_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
        values = load_keys(v, v_strides, media, clip, at, head // GROUP, real, D, COLUMNS)
        scores = dot(queries, tl.trans(keys), PRECISION) * SIGN
        seen = inside[:, None] & real[None, :]
        weights = kept_weights(tl.where(seen, scores, float("-inf")), highest, base2_scale) * share
        dscores = weights * (dot(douts, tl.trans(values), PRECISION) - deltas[:, None])
        weights, dscores = weights.to(values.dtype), dscores.to(keys.dtype)
        if WHOLE:  # turned around, so that the first factor is what is kept: it takes the fewest registers
            dkeys = tl.trans(dot(tl.trans(queries), dscores, PRECISION)) * scale
            dvalues = tl.trans(dot(tl.trans(douts), weights, PRECISION))
            store_keys(dk, media, clip, at, head, dkeys, real, S, L, H, D, COLUMNS)
            store_keys(dv, media, clip, at, head, dvalues, real, S, L, H, D, COLUMNS)
        dqueries += dot(dscores, keys, PRECISION)
    store_rows(dq, part * N + clip, rows, head, dqueries * scale, inside, R, H, D, COLUMNS)

    if WHOLE:
        zeros = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
        for first in range(length + part * BLOCK_KEYS, S, parts * BLOCK_KEYS):
            at = first + tl.arange(0, BLOCK_KEYS)
            store_rows(dk[0], clip, at, head, zeros, at < S, S, H, D, COLUMNS)
            store_rows(dv[0], clip, at, head, zeros, at < S, S, H, D, COLUMNS)
    elif part == 0:
        tl.store(delta + row_of(clip, rows, head, R, H), deltas, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _keys_kernel(
    dout,
    q,
    k,
    v,
    softmax_max,
    softmax_sum,
    delta,
    lengths,
    dk,
    dv,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    R,
    S,
    H,
    GROUP,
    scale,
    base2_scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    kv_heads = H // GROUP
    clip, _, at, kv_head = tile_of(S, kv_heads, 1, BLOCK_KEYS)
    length = length_of(lengths, clip, S)
    real = at < length
    keys = load_head(k, k_strides, clip, at, kv_head, real, D, COLUMNS)
    values = load_head(v, v_strides, clip, at, kv_head, real, D, COLUMNS)

    dkeys = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    dvalues = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    blocks = tl.cdiv(R, BLOCK_QUERIES)
    for step in range(tl.where(tl.min(at) < length, GROUP * blocks, 0)):
        head = kv_head * GROUP + step // blocks
        rows = step % blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        inside = rows < R
        queries = load_head(q, q_strides, clip, rows, head, inside, D, COLUMNS)
        douts = load_head(dout, dout_strides, clip, rows, head, inside, D, COLUMNS)
        highest, total = load_softmax(softmax_max, softmax_sum, clip, rows, head, inside, R, H, SIGN)
        deltas = tl.load(delta + row_of(clip, rows, head, R, H), mask=inside, other=0.0)
        scores = dot(keys, tl.trans(queries), PRECISION) * SIGN
        seen = real[:, None] & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        weights = kept_weights(scores, highest[None, :], base2_scale) / total[None, :]
        dscores = weights * (dot(values, tl.trans(douts), PRECISION) - deltas[None, :])
        dkeys += dot(dscores.to(queries.dtype), queries, PRECISION)
        dvalues += dot(weights.to(douts.dtype), douts, PRECISION)

    dkeys = tl.where(real[:, None], dkeys * scale, 0.0)
    dvalues = tl.where(real[:, None], dvalues, 0.0)
    store_rows(dk, clip, at, kv_head, dkeys, at < S, S, kv_heads, D, COLUMNS)
    store_rows(dv, clip, at, kv_head, dvalues, at < S, S, kv_heads, D, COLUMNS)


@triton.jit
def store_keys(
    segments, media, clip, keys, head, tile, real, S, L, H, D: tl.constexpr, COLUMNS: tl.constexpr
):
    """To contiguous `[N, S, H, d]` or `[N, L, H, d]`."""
    into = tl.where(media, segments[0], segments[1])
    store_rows(into, clip, keys, head, tile, real, tl.where(media, S, L), H, D, COLUMNS)
