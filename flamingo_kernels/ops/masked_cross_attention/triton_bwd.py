"""Backward of masked cross-attention in Triton. Oracle: autograd through `reference.py`.

    p = softmax(scale q k^T)    dp = dout v^T    delta = rowsum(dout out)    ds = p (dp - delta)
    dq = scale ds k             dk = scale ds^T q                            dv = p^T dout

Rows in which one key weighs more than all others have delta = rowsum(p dp), by a pass over the keys before.

one shot    A program has a medium of one head. k, v, dk and dv stay with it while it goes through the rows
            that see the medium. They see no other, so it makes their softmax anew, needs neither out nor sums
            that were kept, and writes their dq, once.
spans       Rows belong to several media. One kernel has a tile of rows and visits the keys they see, for dq;
            one has a tile of keys and visits the rows that see it, for dk and dv.

Where there are too few keys to fill the device, the rows of each are split among programs, whose sums for dk
and dv are added in order.

Bytes: one shot reads q, dout, k, v and writes dq, dk, dv, each once; spans read q, dout, k, v twice and out
once. FLOPs: one shot 10 d a row and visible key, spans 14 d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import count_splits, device_of
from ..._backends.triton.language import dot, power_of_two, row_dot, wide
from ..._backends.triton.launch import launch, precision, scales, strides
from ..._backends.triton.reduction import add_in_order
from ..._backends.triton.softmax import (
    is_saturated,
    load_softmax,
    load_stats,
    scaled_exp2,
    scaled_exp2_saved,
    scores,
    store_delta,
)
from ..._backends.triton.tiles import load_head, load_q_and_dout, store_rows, store_tile
from .config import AVERAGES, FEW_ROWS, Static, backward_keys, backward_rows, block_r, is_one_shot
from .triton_fwd import check, latents_in_tile, load_keys, load_spans, media_ptrs, program_rows, tiles_seen


def masked_cross_attention_bwd(dout, q, k, v, out, softmax, lo, hi, start, stop, immediate, averages, scale):
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

    static = Static(latents, head_dim, q.dtype, length <= FEW_ROWS, device_of(q.device))
    stats = (*softmax, softmax.new_empty(softmax.shape[1:]))  # row_max, row_sum, delta
    inputs, settings = (q, k, v, dout), ((heads, heads // kv_heads), scales(scale))
    constants = {"R": latents, "D": head_dim, "PRECISION": precision(q)}
    programs = batch * media * kv_heads  # that keep a tile of keys
    if not one_shot:
        constants["BLOCK_R"] = block_r(latents, head_dim, q.dtype)
        programs *= triton.cdiv(latents, constants["BLOCK_R"])
        launch(
            _masked_xattn_bwd_rows_kernel,
            lambda config: batch * triton.cdiv(length, config.block_t) * heads,
            backward_rows(static),
            *((*inputs, out), strides(*inputs, out), settings, (lo, hi), stats, dq, length, media),
            **constants,
        )

    choice = backward_keys(static, one_shot)
    splits = count_splits(programs, triton.cdiv(length, media * choice.default.block_t), static.device)
    if splits > 1:
        dk, dv = torch.empty(2, splits, *k.shape, dtype=torch.float32, device=k.device)
    launch(
        _masked_xattn_bwd_one_shot_kernel if one_shot else _masked_xattn_bwd_keys_kernel,
        lambda config: splits * programs,
        choice,
        *(inputs, strides(*inputs), settings, (lo, hi, start, stop), stats),
        *(_dv_share(dout, hi, k) if averages else None, (dq, dk, dv), batch, length, media, splits),
        **constants,
    )
    if splits > 1:
        dk, dv = add_in_order(dk, k.dtype), add_in_order(dv, v.dtype)
    return dq, dk, dv


@triton.jit(do_not_specialize=["B", "T", "M", "splits"])
def _masked_xattn_bwd_one_shot_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]; dout like q
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    spans,  # lo, hi [B, T]; start, stop [B, M]
    stats,  # row_max, row_sum, delta, all empty
    dv_share_ptr,  # [B, Hkv, d] or None
    grads,  # dq [B, T, H, d]; dk, dv [splits, B, M, R, Hkv, d]
    B,
    T,
    M,
    splits,
    R: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    H, GROUP = settings[0]
    scale, scale_log2, sign = settings[1]
    kv_heads = H // GROUP
    batch, medium, kv_head, split = program_medium(M, kv_heads, splits)
    BLOCK_R: tl.constexpr = power_of_two(R)
    latents = tl.arange(0, BLOCK_R)
    k, v = load_keys(media_ptrs(inputs, strides, batch, kv_head), strides, medium, latents, R, D)

    dk, dv = initial_sums(dv_share_ptr, batch, kv_head, split, kv_heads, BLOCK_R, D)
    seen = tl.zeros([BLOCK_T], tl.int1)
    begin, end = rows_in_split(spans, batch * M + medium, split, splits, T, BLOCK_T)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for first in range(begin, end, BLOCK_T):
            rows, here = rows_that_see(medium, spans, batch, first, end, T, M, BLOCK_T)
            seen |= here
            q, dout = load_q_and_dout(inputs, strides, batch, rows, head, here, D)

            s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
            p = scaled_exp2(s, tl.max(s, 1)[:, None], scale_log2)
            p = tl.where(here[:, None], p * (1 / tl.sum(p, 1))[:, None], 0.0)
            dp = dot(dout, tl.trans(v), PRECISION)
            delta = tl.sum(p * dp, 1)
            ds = (p * (dp - delta[:, None])).to(q.dtype)

            dv += dot(tl.trans(p.to(dout.dtype)), dout, PRECISION)
            dk += dot(tl.trans(ds), q, PRECISION)
            dq = dot(ds, k, PRECISION) * scale
            store_rows(grads[0], batch, rows, head, dq, here, T, H, D)

    if tl.max(seen.to(tl.int32)) == 0:  # NaN of a medium that lies among rows, but none sees, stays there
        dk, dv = initial_sums(dv_share_ptr, batch, kv_head, split, kv_heads, BLOCK_R, D)
    place = medium * splits + split
    clear_blind_rows(grads[0], spans, batch, place, M * splits, kv_head, T, M, H, GROUP, D, BLOCK_T)
    store_latents(grads[1], dk * scale, split, batch, medium, latents, kv_head, B, M, R, kv_heads, D)
    store_latents(grads[2], dv, split, batch, medium, latents, kv_head, B, M, R, kv_heads, D)


@triton.jit(do_not_specialize=["T", "M"])
def _masked_xattn_bwd_rows_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]; dout, out like q
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    spans,  # lo, hi [B, T]
    stats,  # row_max, row_sum, delta [B, H, T]; delta is written
    dq_ptr,  # [B, T, H, d]
    T,
    M,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    H, GROUP = settings[0]
    scale, scale_log2, sign = settings[1]
    batch, rows, head, lo, hi = program_rows(spans, T, M, H, BLOCK_T)
    sees = lo < hi
    media = media_ptrs(inputs, strides, batch, head // GROUP)
    q, dout = load_q_and_dout(inputs, strides, batch, rows, head, sees, D)
    # by its strides: the offsets of the contiguous dq, if they were made here, would stay in registers
    delta = row_dot(dout, load_head(inputs[4], strides[4], batch, rows, head, sees, D))
    row_max, row_sum = load_softmax(stats, batch, rows, head, sees, T, H, sign)
    begin, end = tiles_seen(lo, hi, R, BLOCK_R)

    saturated = is_saturated(sees, row_sum)
    row_max, row_sum = row_max[:, None], row_sum[:, None]
    # There dp cancels against delta, which the rounded out would spoil.
    if tl.max(saturated.to(tl.int32)) > 0:
        exact = tl.zeros([BLOCK_T], tl.float32)
        for tile in range(begin, end):
            medium, latents = latents_in_tile(tile, R, BLOCK_R)
            k, v = load_keys(media, strides, medium, latents, R, D)
            s = scores(q, k, (latents < R)[None, :], sign, PRECISION)
            p = scaled_exp2_saved(s, row_max, scale_log2) / row_sum
            added = tl.sum(p * dot(dout, tl.trans(v), PRECISION), 1)
            exact = tl.where((lo <= medium) & (medium < hi), exact + added, exact)
        delta = tl.where(saturated, exact, delta)
    store_delta(stats, batch, rows, head, delta, T, H)

    dq = tl.zeros([BLOCK_T, power_of_two(D)], tl.float32)
    for tile in range(begin, end):
        medium, latents = latents_in_tile(tile, R, BLOCK_R)
        k, v = load_keys(media, strides, medium, latents, R, D)
        s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
        p = scaled_exp2_saved(s, row_max, scale_log2) / row_sum
        ds = p * (dot(dout, tl.trans(v), PRECISION) - delta[:, None])
        here = (lo <= medium) & (medium < hi)
        dq = tl.where(here[:, None], dq + dot(ds.to(k.dtype), k, PRECISION), dq)
    store_rows(dq_ptr, batch, rows, head, dq * scale, rows < T, T, H, D)


@triton.jit(do_not_specialize=["B", "T", "M", "splits"])
def _masked_xattn_bwd_keys_kernel(
    inputs,  # q [B, T, H, d]; k, v [B, M, R, Hkv, d]; dout like q
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    spans,  # lo, hi [B, T]; start, stop [B, M]
    stats,  # row_max, row_sum, delta [B, H, T]
    dv_share_ptr,  # [B, Hkv, d] or None
    grads,  # dq, not written here; dk, dv [splits, B, M, R, Hkv, d]
    B,
    T,
    M,
    splits,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    H, GROUP = settings[0]
    scale, scale_log2, sign = settings[1]
    kv_heads = H // GROUP
    batch, tile, kv_head, split = program_keys(B, kv_heads, splits)
    medium, latents = latents_in_tile(tile, R, BLOCK_R)
    k, v = load_keys(media_ptrs(inputs, strides, batch, kv_head), strides, medium, latents, R, D)

    dk, dv = initial_sums(dv_share_ptr, batch, kv_head, split, kv_heads, BLOCK_R, D)
    begin, end = rows_in_split(spans, batch * M + medium, split, splits, T, BLOCK_T)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for first in range(begin, end, BLOCK_T):
            rows, here = rows_that_see(medium, spans, batch, first, end, T, M, BLOCK_T)
            q, dout = load_q_and_dout(inputs, strides, batch, rows, head, here, D)
            row_max, row_sum, delta = load_stats(stats, batch, rows, head, here, T, H, sign)

            s = scores(q, k, (latents < R)[None, :], sign, PRECISION)  # [BLOCK_T, BLOCK_R]
            p = scaled_exp2_saved(s, row_max[:, None], scale_log2) / row_sum[:, None]
            p = tl.where(here[:, None], p, 0.0)
            dp = dot(dout, tl.trans(v), PRECISION)
            ds = tl.where(here[:, None], p * (dp - delta[:, None]), 0.0)
            dv += dot(tl.trans(p.to(dout.dtype)), dout, PRECISION)
            dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)

    store_latents(grads[1], dk * scale, split, batch, medium, latents, kv_head, B, M, R, kv_heads, D)
    store_latents(grads[2], dv, split, batch, medium, latents, kv_head, B, M, R, kv_heads, D)


@triton.jit
def program_medium(M, kv_heads, splits):
    """Sequence, medium, head and split of this program; heads first, which lie side by side in memory."""
    program = tl.program_id(0)
    medium = program // kv_heads // splits
    return wide(medium // M), wide(medium % M), program % kv_heads, program // kv_heads % splits


@triton.jit
def program_keys(B, kv_heads, splits):
    """Sequence, tile of keys, head and split of this program; the media that most rows see, the first, come
    first.
    """
    program = tl.program_id(0)
    tile = program // kv_heads // splits
    return wide(tile % B), wide(tile // B), program % kv_heads, program // kv_heads % splits


@triton.jit
def rows_in_split(spans, index, split, splits, T, BLOCK_T: tl.constexpr):
    """The first row of this split, and the one after its last, among those from the first that sees a medium
    to the last; `index` is the medium's in `[B, M]`.
    """
    begin, end = tl.maximum(tl.load(spans[2] + index), 0), tl.minimum(tl.load(spans[3] + index), T)
    size = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_T) * BLOCK_T
    return begin + split * size, tl.minimum(begin + (split + 1) * size, end)


@triton.jit
def rows_that_see(medium, spans, batch, first, end, T, M, BLOCK_T: tl.constexpr):
    """The tile of rows from `first` on, and which of those before `end` see a medium."""
    rows = first + tl.arange(0, BLOCK_T)
    lo, hi = load_spans(spans, batch, rows, T, M)
    return rows, (lo <= medium) & (medium < hi) & (rows < end)


@triton.jit
def initial_sums(
    dv_share_ptr, batch, kv_head, split, kv_heads, BLOCK_R: tl.constexpr, D: tl.constexpr
):  # dk, dv [BLOCK_R, BLOCK_D]
    """0, and for dv what the rows that average all values send to each value, once."""
    dk = tl.zeros([BLOCK_R, power_of_two(D)], tl.float32)
    dv = tl.zeros([BLOCK_R, power_of_two(D)], tl.float32)
    if dv_share_ptr is not None:
        columns = tl.arange(0, power_of_two(D))
        if split == 0:
            ptrs = dv_share_ptr + (batch * kv_heads + kv_head) * D + columns
            dv += tl.load(ptrs, mask=columns < D, other=0.0)[None, :]
    return dk, dv


@triton.jit
def store_latents(
    ptr, tile, split, batch, medium, latents, kv_head, B, M, R: tl.constexpr, kv_heads, D: tl.constexpr
):
    """To contiguous `[splits, B, M, R, Hkv, d]`."""
    row = ((wide(split) * B + batch) * M + medium) * R * kv_heads + kv_head
    store_tile(ptr + row * D, latents, kv_heads * D, tile, latents < R, D)


@triton.jit
def clear_blind_rows(
    dq_ptr, spans, batch, slice, slices, kv_head, T, M, H, GROUP, D: tl.constexpr, BLOCK_T: tl.constexpr
):
    """No program has the rows that see no medium, so each clears those in its slice of the text."""
    size = tl.cdiv(T, slices)
    end = tl.minimum((slice + 1) * size, T)
    for first in range(slice * size, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        lo, hi = load_spans(spans, batch, rows, T, M)
        blind = (lo >= hi) & (rows < end)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            zeros = tl.zeros([BLOCK_T, power_of_two(D)], tl.float32)
            store_rows(dq_ptr, batch, rows, head, zeros, blind, T, H, D)


def _dv_share(dout: Tensor, hi: Tensor, k: Tensor) -> Tensor:  # [B, Hkv, d]
    """What the rows that average all values of their sequence send to each of them."""
    batch, length, heads, head_dim = dout.shape
    _, media, latents, kv_heads, _ = k.shape
    dv_share = dout.new_empty(batch, kv_heads, head_dim, dtype=torch.float32)
    launch(
        _masked_xattn_bwd_averages_kernel,
        lambda config: batch * kv_heads,
        AVERAGES,
        *(dout, *strides(dout), hi, dv_share, length, media * latents, (heads, heads // kv_heads)),
        D=head_dim,
    )
    return dv_share


@triton.jit(do_not_specialize=["T", "values"])
def _masked_xattn_bwd_averages_kernel(
    dout_ptr,  # [B, T, H, d]
    dout_strides,
    hi_ptr,  # [B, T]
    dv_share_ptr,  # [B, Hkv, d]
    T,
    values,  # M * R
    heads,  # H, GROUP
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    H, GROUP = heads
    program = tl.program_id(0)
    batch, kv_head = wide(program // (H // GROUP)), program % (H // GROUP)
    total = tl.zeros([power_of_two(D)], tl.float32)
    for first in range(0, T, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        averages = tl.load(hi_ptr + batch * T + rows, mask=rows < T, other=0) < 0
        if tl.max(averages.to(tl.int32)) > 0:  # rarely
            for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
                dout = load_head(dout_ptr, dout_strides, batch, rows, head, averages, D)
                total += tl.sum(dout.to(tl.float32), 0)
    columns = tl.arange(0, power_of_two(D))
    tl.store(dv_share_ptr + wide(program) * D + columns, total / values, mask=columns < D)
