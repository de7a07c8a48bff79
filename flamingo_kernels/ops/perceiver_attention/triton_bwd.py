"""Backward of perceiver attention in Triton. Oracle: autograd through `reference.py`.

    p = softmax(scale q k^T)    dp = dout v^T    delta = rowsum(dout out)    ds = p (dp - delta)
    dq = scale ds k             dk = scale ds^T q                            dv = p^T dout

Rows in which one key weighs more than all others have delta = rowsum(p dp), by a pass over the keys before.

One kernel keeps queries and goes through the keys, media then latents, for dq. Where it keeps all queries of
a head, and no other head shares the keys, it writes dk and dv of every key on the way. Elsewhere a second
kernel keeps keys and goes through the queries. Where there are too few programs to fill the device, the keys
of a clip are split among several, whose dq are added in order. Keys that are not real get gradients of 0.

Bytes: the first way reads q, dout, out, k, v and writes dq, dk, dv, each once; the second reads q, dout, k, v
twice. FLOPs: 10 d a query and real key the first way, 14 d the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.config import device_of
from ..._backends.triton.language import dot, power_of_two, row_dot
from ..._backends.triton.launch import launch, precision, scales, strides
from ..._backends.triton.reduction import add_in_order
from ..._backends.triton.softmax import (
    is_saturated,
    load_softmax,
    load_stats,
    scaled_exp2_saved,
    scores,
    store_delta,
)
from ..._backends.triton.tiles import load_head, load_q_and_dout, store_rows
from .config import Tiles, backward_keys, backward_queries, count_key_splits, is_whole
from .triton_fwd import blocks_in_split, check, keys_in_block, load_keys, load_length, program_tile


def perceiver_attention_bwd(
    dout, q, k_media, v_media, k_latents, v_latents, out, softmax, media_lengths, scale
):
    k, v = (k_media, k_latents), (v_media, v_latents)
    checks = check("perceiver_attention_bwd", q, k, v, media_lengths)
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
    stats = (*softmax, softmax.new_empty(softmax.shape[1:]))  # row_max, row_sum, delta
    settings = ((heads, group), scales(scale))
    constants = {"D": head_dim, "PRECISION": precision(q)}

    def programs(tiles: Tiles) -> int:
        return clips * triton.cdiv(queries, tiles.block_r) * heads

    choice = backward_queries(whole, queries, head_dim, q.dtype, device)
    splits = count_key_splits(programs(choice.default), features + latents, choice.default, device)
    dkv = ((dk_media, dk_latents), (dv_media, dv_latents)) if whole else (None, None)
    partial_dq = dq if splits == 1 else q.new_empty(splits, *q.shape, dtype=torch.float32)
    launch(
        _perceiver_bwd_queries_kernel,
        lambda tiles: splits * programs(tiles),
        choice,
        *((q, k, v, dout, out), (*strides(q), strides(*k), strides(*v), *strides(dout, out)), settings),
        *(media_lengths, stats, (partial_dq, *dkv), clips, queries, features, latents, splits),
        **constants,
    )
    if splits > 1:
        dq = add_in_order(partial_dq, q.dtype)

    def collect(k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, lengths: Tensor | None) -> None:
        launch(
            _perceiver_bwd_keys_kernel,
            lambda tiles: clips * triton.cdiv(k.shape[1], tiles.block_s) * kv_heads,
            backward_keys(head_dim, q.dtype, device),
            *((q, k, v, dout), strides(q, k, v, dout), settings, lengths, stats, (dk, dv)),
            *(queries, k.shape[1]),
            **constants,
        )

    if not whole:
        collect(k_media, v_media, dk_media, dv_media, media_lengths)
        collect(k_latents, v_latents, dk_latents, dv_latents, None)
    return dq, dk_media, dv_media, dk_latents, dv_latents


@triton.jit(do_not_specialize=["N", "R", "S", "L", "splits"])
def _perceiver_bwd_queries_kernel(
    inputs,  # q [N, R, H, d]; k, v: [N, S, Hkv, d] of media, [N, L, Hkv, d] of latents; dout, out like q
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    media_lengths_ptr,  # [N] or None
    stats,  # row_max, row_sum, delta [N, H, R]; delta is written
    grads,  # dq [splits, N, R, H, d]; dk, dv like k, v, or None: another kernel makes them
    N,
    R,
    S,
    L,
    splits,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    dq_ptr, dk_ptrs, dv_ptrs = grads
    H, GROUP = settings[0]
    scale, scale_log2, sign = settings[1]
    clip, split, rows, head = program_tile(R, H, splits, BLOCK_R)
    inside = rows < R
    q, dout = load_q_and_dout(inputs, strides, clip, rows, head, inside, D)
    # by its strides: the offsets of the contiguous dq, if they were made here, would stay in registers
    delta = row_dot(dout, load_head(inputs[4], strides[4], clip, rows, head, inside, D))
    row_max, row_sum = load_softmax(stats, clip, rows, head, inside, R, H, sign)
    row_max, row_share = row_max[:, None], 1 / row_sum[:, None]
    length = load_length(media_lengths_ptr, clip, S)

    saturated = is_saturated(inside, row_sum)
    # There dp cancels against delta, which the rounded out would spoil.
    if tl.max(saturated.to(tl.int32)) > 0:
        exact = tl.zeros([BLOCK_R], tl.float32)
        for block in range(0, tl.cdiv(length, BLOCK_S) + tl.cdiv(L, BLOCK_S)):
            media, keys, real = keys_in_block(block, length, L, BLOCK_S)
            k, v = load_keys(inputs, strides, media, clip, keys, head // GROUP, real, D)
            s = scores(q, k, inside[:, None] & real[None, :], sign, PRECISION)
            p = scaled_exp2_saved(s, row_max, scale_log2) * row_share
            exact += tl.sum(p * dot(dout, tl.trans(v), PRECISION), 1)
        delta = tl.where(saturated, exact, delta)
    if dk_ptrs is None and split == 0:  # not after the loop, through which its place would take registers
        store_delta(stats, clip, rows, head, delta, R, H)

    dq = tl.zeros([BLOCK_R, power_of_two(D)], tl.float32)
    begin, end = blocks_in_split(split, splits, length, L, BLOCK_S)
    for block in range(begin, end):
        media, keys, real = keys_in_block(block, length, L, BLOCK_S)
        k, v = load_keys(inputs, strides, media, clip, keys, head // GROUP, real, D)
        s = scores(q, k, inside[:, None] & real[None, :], sign, PRECISION)  # [BLOCK_R, BLOCK_S]
        p = scaled_exp2_saved(s, row_max, scale_log2) * row_share
        ds = p * (dot(dout, tl.trans(v), PRECISION) - delta[:, None])
        p, ds = p.to(v.dtype), ds.to(k.dtype)
        if dk_ptrs is not None:
            # transposed, so that the first factor is what is kept: it takes the fewest registers
            dk = tl.trans(dot(tl.trans(q), ds, PRECISION)) * scale
            dv = tl.trans(dot(tl.trans(dout), p, PRECISION))
            store_keys(dk_ptrs, media, clip, keys, head, dk, real, S, L, H, D)
            store_keys(dv_ptrs, media, clip, keys, head, dv, real, S, L, H, D)
        dq += dot(ds, k, PRECISION)
    store_rows(dq_ptr, split * N + clip, rows, head, dq * scale, inside, R, H, D)

    if dk_ptrs is not None:
        zeros = tl.zeros([BLOCK_S, power_of_two(D)], tl.float32)
        for first in range(length + split * BLOCK_S, S, splits * BLOCK_S):
            keys = first + tl.arange(0, BLOCK_S)
            store_rows(dk_ptrs[0], clip, keys, head, zeros, keys < S, S, H, D)
            store_rows(dv_ptrs[0], clip, keys, head, zeros, keys < S, S, H, D)


@triton.jit(do_not_specialize=["R", "S"])
def _perceiver_bwd_keys_kernel(
    inputs,  # q [N, R, H, d]; k, v [N, S, Hkv, d], of media or of latents; dout like q
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    lengths_ptr,  # [N] or None
    stats,  # row_max, row_sum, delta [N, H, R]
    grads,  # dk, dv [N, S, Hkv, d]
    R,
    S,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    dk_ptr, dv_ptr = grads
    H, GROUP = settings[0]
    scale, scale_log2, sign = settings[1]
    kv_heads = H // GROUP
    clip, _, keys, kv_head = program_tile(S, kv_heads, 1, BLOCK_S)
    length = load_length(lengths_ptr, clip, S)
    real = keys < length
    k = load_head(inputs[1], strides[1], clip, keys, kv_head, real, D)
    v = load_head(inputs[2], strides[2], clip, keys, kv_head, real, D)

    dk = tl.zeros([BLOCK_S, power_of_two(D)], tl.float32)
    dv = tl.zeros([BLOCK_S, power_of_two(D)], tl.float32)
    blocks = tl.cdiv(R, BLOCK_R)
    for step in range(tl.where(tl.min(keys) < length, GROUP * blocks, 0)):
        head = kv_head * GROUP + step // blocks
        rows = step % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = rows < R
        q, dout = load_q_and_dout(inputs, strides, clip, rows, head, inside, D)
        row_max, row_sum, delta = load_stats(stats, clip, rows, head, inside, R, H, sign)
        s = scores(k, q, real[:, None] & inside[None, :], sign, PRECISION)  # [BLOCK_S, BLOCK_R]
        p = scaled_exp2_saved(s, row_max[None, :], scale_log2) / row_sum[None, :]
        ds = p * (dot(v, tl.trans(dout), PRECISION) - delta[None, :])
        dk += dot(ds.to(q.dtype), q, PRECISION)
        dv += dot(p.to(dout.dtype), dout, PRECISION)

    dk = tl.where(real[:, None], dk * scale, 0.0)
    dv = tl.where(real[:, None], dv, 0.0)
    store_rows(dk_ptr, clip, keys, kv_head, dk, keys < S, S, kv_heads, D)
    store_rows(dv_ptr, clip, keys, kv_head, dv, keys < S, S, kv_heads, D)


@triton.jit
def store_keys(ptrs, media, clip, keys, head, tile, real, S, L, H, D: tl.constexpr):
    """To contiguous `[N, S, H, d]` of the media or `[N, L, H, d]` of the latents."""
    ptr = tl.where(media, ptrs[0], ptrs[1])
    store_rows(ptr, clip, keys, head, tile, real, tl.where(media, S, L), H, D)
