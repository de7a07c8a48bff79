"""Backward of masked cross-attention in Triton. Oracle: autograd through `reference.py`.

    P = softmax(scale q k^T),  delta = rowsum(dout out),  dS = P (dout v^T - delta)
    dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout

Rows in which one key weighs more than all others have delta = rowsum(P dP), by a pass over the keys before.

one shot    A program has a medium of one head. k, v, dk and dv stay with it while it goes through the rows
            that see the medium. They see no other, so it makes their softmax anew, needs neither out nor sums
            that were kept, and writes their dq, once.
spans       Rows belong to several media. One kernel has a tile of rows and visits the keys they see, for dq;
            one has a tile of keys and visits the rows that see it, for dk and dv.

Where there are too few keys to fill the device, their rows are cut into parts, whose dk and dv are added in
order.

Bytes: one shot reads q, dout, k, v and writes dq, dk, dv, each once; spans read q, dout, k, v twice and out
once. FLOPs: one shot 10 d a row and visible key, spans 14 d.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of, power_of_two, splits
from ..._backends.triton.language import (
    dot,
    head_of,
    is_saturated,
    kept_weights,
    load_head,
    load_rows,
    load_softmax,
    load_tile,
    power_below,
    row_dot,
    row_of,
    store_rows,
    store_tile,
    wide,
)
from ..._backends.triton.launch import base2, launch, precision
from ..._backends.triton.reduction import add_in_order
from .config import AVERAGES, FEW_ROWS, Static, backward_keys, backward_rows, block_of_latents, is_one_shot
from .triton_fwd import (
    SIZES,
    check,
    keys_of,
    load_latents,
    media_of,
    scores_of,
    spans_of,
    tile_of,
    tiles_seen,
)


def masked_cross_attention_bwd(
    dout: Tensor,  # [B, T, H, d]
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    out: Tensor,  # [B, T, H, d]
    softmax: Tensor,  # [2, B, H, T]
    lo: Tensor,  # [B, T]
    hi: Tensor,  # [B, T]
    start: Tensor,  # [B, M]
    stop: Tensor,  # [B, M]
    immediate: bool,
    averages: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # dq [B, T, H, d], dk and dv [B, M, R, Hkv, d]
    checks = check("masked_cross_attention_bwd", q, k, v, lo, hi, start, stop)
    batch, length, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    one_shot = is_one_shot(immediate, latents, head_dim, q.dtype)
    checks.rows_like_first("dout", dout, q.shape)
    checks.whole("out", out, q.shape, q.dtype)
    checks.whole("softmax", softmax, (2, batch, heads, 0 if one_shot else length), torch.float32)
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    block_r = block_of_latents(one_shot, latents, head_dim, q.dtype)
    static = Static(latents, head_dim, q.dtype, length <= FEW_ROWS, device_of(q.device))
    inputs = (q, k, v, dout, q.stride()[:3], k.stride()[:4], v.stride()[:4], dout.stride()[:3], lo, hi)
    sizes = (length, media, heads, heads // kv_heads, base2(scale))
    constants = {
        "R": latents,
        "D": head_dim,
        "BLOCK_R": block_r,
        "COLUMNS": power_of_two(head_dim),
        "SIGN": math.copysign(1, scale),
        "PRECISION": precision(q),
    }

    delta = softmax.new_empty(softmax.shape[1:])
    if not one_shot:
        launch(
            _rows_kernel,
            lambda config: batch * triton.cdiv(length, config.block_t) * heads,
            backward_rows(static),
            *(*inputs, out, *softmax, delta, dq, *sizes, scale),
            **constants,
        )

    share = _share_of_averages(dout, hi, k) if averages else delta
    programs = batch * media * triton.cdiv(latents, block_r) * kv_heads
    choice = backward_keys(static, one_shot)
    parts = splits(programs, triton.cdiv(length, media * choice.default.block_t), static.device)
    partial_dk, partial_dv = (
        (dk, dv) if parts == 1 else torch.empty(2, parts, *k.shape, dtype=torch.float32, device=k.device)
    )
    launch(
        _one_shot_kernel if one_shot else _keys_kernel,
        lambda config: parts * programs,
        choice,
        *(*inputs, start, stop, *softmax, delta, share, dq, partial_dk, partial_dv),
        *(batch, *sizes, scale, parts),
        **constants,
        AVERAGES=averages,
    )
    if parts > 1:
        dk, dv = add_in_order(partial_dk, k.dtype), add_in_order(partial_dv, v.dtype)
    return dq, dk, dv


@triton.jit(do_not_specialize=["B", *SIZES, "parts"])
def _one_shot_kernel(
    q,
    k,
    v,
    dout,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lo,
    hi,
    start,
    stop,
    softmax_max,
    softmax_sum,
    delta,
    share,
    dq,
    dk,
    dv,
    B,
    T,
    M,
    H,
    GROUP,
    base2_scale,
    scale,
    parts,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    AVERAGES: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    kv_heads = H // GROUP
    batch, medium, kv_head, part = medium_of(M, kv_heads, parts)
    latents = tl.arange(0, BLOCK_R)
    inside = latents < R
    keys = load_latents(media_of(k, k_strides, batch, kv_head), k_strides, medium, latents, R, D, COLUMNS)
    values = load_latents(media_of(v, v_strides, batch, kv_head), v_strides, medium, latents, R, D, COLUMNS)

    dkeys = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    dvalues = first_dvalues(share, batch, kv_head, part, kv_heads, BLOCK_R, D, COLUMNS, AVERAGES)
    begin, after = part_of(start, stop, batch * M + medium, part, parts, T, BLOCK_T)
    for index in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        head = wide(index)
        q_head = head_of(q, q_strides, batch, head)
        dout_head = head_of(dout, dout_strides, batch, head)
        for at in range(begin, after, BLOCK_T):
            rows = at + tl.arange(0, BLOCK_T)
            first, end = spans_of(lo, hi, batch, rows, T, M)
            here = (first <= medium) & (medium < end) & (rows < after)
            queries = load_tile(q_head, rows, q_strides[1], here, D, COLUMNS)
            douts = load_tile(dout_head, rows, dout_strides[1], here, D, COLUMNS)

            scores = scores_of(queries, keys, inside, SIGN, PRECISION)  # [BLOCK_T, BLOCK_R]
            weights = power_below(scores, tl.max(scores, 1)[:, None], base2_scale)
            weights = weights / tl.sum(weights, 1)[:, None]
            dweights = dot(douts, tl.trans(values), PRECISION)
            difference = dweights - tl.sum(weights * dweights, 1)[:, None]
            weights = tl.where(here[:, None], weights, 0.0)
            dscores = tl.where(here[:, None], weights * difference, 0.0).to(queries.dtype)

            dvalues += dot(tl.trans(weights.to(douts.dtype)), douts, PRECISION)
            dkeys += dot(tl.trans(dscores), queries, PRECISION)
            dqueries = dot(dscores, keys, PRECISION) * scale
            store_rows(dq, batch, rows, head, dqueries, here, T, H, D, COLUMNS)

    store_keys(dk, dkeys * scale, batch, medium, latents, kv_head, part, B, M, R, kv_heads, D, COLUMNS)
    store_keys(dv, dvalues, batch, medium, latents, kv_head, part, B, M, R, kv_heads, D, COLUMNS)
    clear_blind_rows(
        dq, lo, hi, batch, medium * parts + part, M * parts, kv_head, T, M, H, GROUP, D, COLUMNS, BLOCK_T
    )


@triton.jit(do_not_specialize=SIZES)
def _rows_kernel(
    q,
    k,
    v,
    dout,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lo,
    hi,
    out,
    softmax_max,
    softmax_sum,
    delta,
    dq,
    T,
    M,
    H,
    GROUP,
    base2_scale,
    scale,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch, rows, head = tile_of(T, H, BLOCK_T)
    first, end = spans_of(lo, hi, batch, rows, T, M)
    sees = first < end
    k = media_of(k, k_strides, batch, head // GROUP)
    v = media_of(v, v_strides, batch, head // GROUP)
    queries = load_head(q, q_strides, batch, rows, head, sees, D, COLUMNS)
    douts = load_head(dout, dout_strides, batch, rows, head, sees, D, COLUMNS)
    deltas = row_dot(douts, load_rows(out, batch, rows, head, sees, T, H, D, COLUMNS))
    highest, total = load_softmax(softmax_max, softmax_sum, batch, rows, head, sees, T, H, SIGN)
    begin, after = tiles_seen(first, end, R, BLOCK_R)

    saturated = is_saturated(sees, total)
    highest, total = highest[:, None], total[:, None]
    if (
        tl.max(saturated.to(tl.int32)) > 0
    ):  # there dP cancels against delta: from the rounded out it would not
        sums = tl.zeros([BLOCK_T], tl.float32)
        for tile in range(begin, after):
            medium, latents = keys_of(tile, R, BLOCK_R)
            keys = load_latents(k, k_strides, medium, latents, R, D, COLUMNS)
            values = load_latents(v, v_strides, medium, latents, R, D, COLUMNS)
            scores = scores_of(queries, keys, latents < R, SIGN, PRECISION)
            weights = kept_weights(scores, highest, base2_scale) / total
            added = tl.sum(weights * dot(douts, tl.trans(values), PRECISION), 1)
            sums = tl.where((first <= medium) & (medium < end), sums + added, sums)
        deltas = tl.where(saturated, sums, deltas)
    tl.store(delta + row_of(batch, rows, head, T, H), deltas, mask=rows < T)

    dqueries = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
    for tile in range(begin, after):
        medium, latents = keys_of(tile, R, BLOCK_R)
        keys = load_latents(k, k_strides, medium, latents, R, D, COLUMNS)
        values = load_latents(v, v_strides, medium, latents, R, D, COLUMNS)
        scores = scores_of(queries, keys, latents < R, SIGN, PRECISION)  # [BLOCK_T, BLOCK_R]
        weights = kept_weights(scores, highest, base2_scale) / total
        dscores = weights * (dot(douts, tl.trans(values), PRECISION) - deltas[:, None])
        here = (first <= medium) & (medium < end)
        added = dqueries + dot(dscores.to(keys.dtype), keys, PRECISION)
        dqueries = tl.where(here[:, None], added, dqueries)
    store_rows(dq, batch, rows, head, dqueries * scale, rows < T, T, H, D, COLUMNS)


@triton.jit(do_not_specialize=["B", *SIZES, "parts"])
def _keys_kernel(
    q,
    k,
    v,
    dout,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lo,
    hi,
    start,
    stop,
    softmax_max,
    softmax_sum,
    delta,
    share,
    dq,
    dk,
    dv,
    B,
    T,
    M,
    H,
    GROUP,
    base2_scale,
    scale,
    parts,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    AVERAGES: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    kv_heads = H // GROUP
    batch, tile, kv_head, part = tile_of_keys(B, kv_heads, parts)
    medium, latents = keys_of(tile, R, BLOCK_R)
    inside = latents < R
    keys = load_latents(media_of(k, k_strides, batch, kv_head), k_strides, medium, latents, R, D, COLUMNS)
    values = load_latents(media_of(v, v_strides, batch, kv_head), v_strides, medium, latents, R, D, COLUMNS)

    dkeys = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    dvalues = first_dvalues(share, batch, kv_head, part, kv_heads, BLOCK_R, D, COLUMNS, AVERAGES)
    begin, after = part_of(start, stop, batch * M + medium, part, parts, T, BLOCK_T)
    for index in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        head = wide(index)
        q_head = head_of(q, q_strides, batch, head)
        dout_head = head_of(dout, dout_strides, batch, head)
        for at in range(begin, after, BLOCK_T):
            rows = at + tl.arange(0, BLOCK_T)
            first, end = spans_of(lo, hi, batch, rows, T, M)
            here = (first <= medium) & (medium < end) & (rows < after)
            queries = load_tile(q_head, rows, q_strides[1], here, D, COLUMNS)
            douts = load_tile(dout_head, rows, dout_strides[1], here, D, COLUMNS)
            highest, total = load_softmax(softmax_max, softmax_sum, batch, rows, head, here, T, H, SIGN)
            deltas = tl.load(delta + row_of(batch, rows, head, T, H), mask=here, other=0.0)

            scores = scores_of(queries, keys, inside, SIGN, PRECISION)  # [BLOCK_T, BLOCK_R]
            weights = kept_weights(scores, highest[:, None], base2_scale) / total[:, None]
            weights = tl.where(here[:, None], weights, 0.0)
            dweights = dot(douts, tl.trans(values), PRECISION)
            dscores = tl.where(here[:, None], weights * (dweights - deltas[:, None]), 0.0)
            dvalues += dot(tl.trans(weights.to(douts.dtype)), douts, PRECISION)
            dkeys += dot(tl.trans(dscores.to(queries.dtype)), queries, PRECISION)

    store_keys(dk, dkeys * scale, batch, medium, latents, kv_head, part, B, M, R, kv_heads, D, COLUMNS)
    store_keys(dv, dvalues, batch, medium, latents, kv_head, part, B, M, R, kv_heads, D, COLUMNS)


@triton.jit
def medium_of(M, kv_heads, parts):
    """Sequence, medium, head and part of this program; heads first, which lie side by side in memory."""
    program = tl.program_id(0)
    medium = program // kv_heads // parts
    return wide(medium // M), wide(medium % M), program % kv_heads, program // kv_heads % parts


@triton.jit
def tile_of_keys(B, kv_heads, parts):
    """Sequence, key tile, head and part of this program; the first media, which most rows see, come first."""
    program = tl.program_id(0)
    tile = program // kv_heads // parts
    return wide(tile % B), wide(tile // B), program % kv_heads, program // kv_heads % parts


@triton.jit
def part_of(start, stop, at, part, parts, T, BLOCK_T: tl.constexpr):
    """The rows this program goes through: its part of those from the first to the last that see a medium."""
    begin, after = tl.maximum(tl.load(start + at), 0), tl.minimum(tl.load(stop + at), T)
    each = tl.cdiv(tl.cdiv(after - begin, parts), BLOCK_T) * BLOCK_T
    return begin + part * each, tl.minimum(begin + (part + 1) * each, after)


@triton.jit
def first_dvalues(
    share,
    batch,
    kv_head,
    part,
    kv_heads,
    BLOCK_R: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    AVERAGES: tl.constexpr,
):  # [BLOCK_R, COLUMNS]
    """What dv starts with: the share that every value has in the rows that average all."""
    dvalues = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    if AVERAGES:
        columns = tl.arange(0, COLUMNS)
        if part == 0:
            at = share + (batch * kv_heads + kv_head) * D + columns
            dvalues += tl.load(at, mask=columns < D, other=0.0)[None, :]
    return dvalues


@triton.jit
def store_keys(
    into,
    tile,
    batch,
    medium,
    latents,
    kv_head,
    part,
    B,
    M,
    R,
    kv_heads,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """To `[part, B, M, R, Hkv, d]`."""
    row = ((wide(part) * B + batch) * M + medium) * R * kv_heads + kv_head
    store_tile(into + row * D, latents, kv_heads * D, tile, latents < R, D, COLUMNS)


@triton.jit
def clear_blind_rows(
    dq,
    lo,
    hi,
    batch,
    slice,
    slices,
    kv_head,
    T,
    M,
    H,
    GROUP,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """No program has the rows that see no medium, so each clears those in its slice of the text."""
    each = tl.cdiv(T, slices)
    after = tl.minimum((slice + 1) * each, T)
    for at in range(slice * each, after, BLOCK_T):
        rows = at + tl.arange(0, BLOCK_T)
        first, end = spans_of(lo, hi, batch, rows, T, M)
        blind = (first >= end) & (rows < after)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            zeros = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
            store_rows(dq, batch, rows, wide(head), zeros, blind, T, H, D, COLUMNS)


def _share_of_averages(dout: Tensor, hi: Tensor, k: Tensor) -> Tensor:  # [B, Hkv, d]
    """What the rows that average all values of their sequence send to each of them."""
    batch, length, heads, head_dim = dout.shape
    _, media, latents, kv_heads, _ = k.shape
    share = dout.new_empty(batch, kv_heads, head_dim, dtype=torch.float32)
    launch(
        _share_kernel,
        lambda config: batch * kv_heads,
        AVERAGES,
        *(dout, hi, share, dout.stride()[:3], length, media * latents, heads, heads // kv_heads),
        D=head_dim,
        COLUMNS=power_of_two(head_dim),
    )
    return share


@triton.jit(do_not_specialize=["T", "H", "GROUP", "values"])
def _share_kernel(
    dout,
    hi,
    share,
    strides,
    T,
    values,
    H,
    GROUP,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch, kv_head = wide(tl.program_id(0) // (H // GROUP)), tl.program_id(0) % (H // GROUP)
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, T, BLOCK_T):
        rows = at + tl.arange(0, BLOCK_T)
        averages = tl.load(hi + batch * T + rows, mask=rows < T, other=0) < 0
        if tl.max(averages.to(tl.int32)) > 0:  # rarely
            for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
                douts = load_head(dout, strides, batch, rows, wide(head), averages, D, COLUMNS)
                total += tl.sum(douts.to(tl.float32), 0)
    columns = tl.arange(0, COLUMNS)
    tl.store(share + wide(tl.program_id(0)) * D + columns, total / values, mask=columns < D)
