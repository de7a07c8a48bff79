"""Forward of perceiver attention in Triton. Oracle: `reference.py`.

A program takes a block of queries of one head of one clip through an online softmax over blocks of keys: the
clip's media as far as they are real, then its latents, two segments that are read where they lie. Where there
are too few programs to fill the device, the keys of a clip are split among several. Each has a softmax of its
own, and a second kernel combines these in order.

Bytes: q and every real key and value read once from memory (again from the cache by further blocks of
queries and by heads that share them), out and two numbers a query written once. Splits write theirs in
float32, to be read once more. FLOPs: 4 d a query and real key.
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
    head_ptr,
    load_head,
    load_rows,
    load_softmax,
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
from .config import COMBINE, Queries, count_key_splits, forward


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

    def programs(tiles: Queries) -> int:
        return clips * triton.cdiv(queries, tiles.block_r) * heads

    device = device_of(q.device)
    choice = forward(queries, head_dim, q.dtype, device)
    splits = count_key_splits(programs(choice.default), features + latents, device)
    outputs = (out, *softmax)
    partials = outputs
    if splits > 1:
        partial_out = q.new_empty(splits, *q.shape, dtype=torch.float32)
        partials = (partial_out, *q.new_empty(2, splits, clips, heads, queries, dtype=torch.float32))
    launch(
        _perceiver_fwd_kernel,
        lambda tiles: splits * programs(tiles),
        choice,
        (q, (k_media, k_latents), (v_media, v_latents)),
        (*strides(q), strides(k_media, k_latents), strides(v_media, v_latents)),
        *(media_lengths, partials),
        *(clips, queries, features, latents, splits, (heads, heads // kv_heads), scales(scale)),
        D=head_dim,
        PRECISION=precision(q),
    )
    if splits > 1:
        sizes = (clips, queries, splits, heads, scales(scale))
        launch(_perceiver_fwd_combine_kernel, programs, COMBINE, partials, outputs, *sizes, D=head_dim)
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


@triton.jit(do_not_specialize=["N", "R", "S", "L", "splits"])
def _perceiver_fwd_kernel(
    inputs,  # q [N, R, H, d]; k, v: [N, S, Hkv, d] of media, [N, L, Hkv, d] of latents
    strides,  # of each input
    media_lengths_ptr,  # [N] or None
    outputs,  # out [splits, N, R, H, d]; row_max, row_sum [splits, N, H, R]
    N,
    R,
    S,
    L,
    splits,
    heads,  # H, GROUP
    scales,  # scale, scale_log2, sign
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    q_ptr, k_ptrs, v_ptrs = inputs
    q_strides, k_strides, v_strides = strides
    out_ptr, row_max_ptr, row_sum_ptr = outputs
    H, GROUP = heads
    _, scale_log2, sign = scales
    clip, split, rows, head = program_tile(R, H, splits, BLOCK_R)
    q = load_head(q_ptr, q_strides, clip, rows, head, rows < R, D)

    acc = tl.zeros([BLOCK_R, power_of_two(D)], tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    row_max = tl.full([BLOCK_R], LOWEST, tl.float32)
    length = load_length(media_lengths_ptr, clip, S)
    begin, end = blocks_in_split(split, splits, length, L, BLOCK_S)
    for block in range(begin, end):
        media, keys, real = keys_in_block(block, length, L, BLOCK_S)
        k = load_keys(k_ptrs, k_strides, media, clip, keys, head // GROUP, real, D)
        v = load_keys(v_ptrs, v_strides, media, clip, keys, head // GROUP, real, D)
        s = scores(q, k, real[None, :], sign, PRECISION)  # [BLOCK_R, BLOCK_S]
        acc, row_max, row_sum = online_softmax(acc, row_max, row_sum, s, v, None, scale_log2, PRECISION)

    clip += split * N
    store_rows(out_ptr, clip, rows, head, acc / row_sum[:, None], rows < R, R, H, D)
    store_softmax(row_max_ptr, row_sum_ptr, clip, rows, head, row_max, row_sum, R, H, sign)


@triton.jit(do_not_specialize=["N", "R", "splits"])
def _perceiver_fwd_combine_kernel(
    partials,  # out [splits, N, R, H, d]; row_max, row_sum [splits, N, H, R]
    outputs,  # the same without splits
    N,
    R,
    splits,
    H,
    scales,  # scale, scale_log2, sign
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    partial_out_ptr, partial_max_ptr, partial_sum_ptr = partials
    out_ptr, row_max_ptr, row_sum_ptr = outputs
    _, scale_log2, sign = scales
    clip, _, rows, head = program_tile(R, H, 1, BLOCK_R)

    acc = tl.zeros([BLOCK_R, power_of_two(D)], tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    row_max = tl.full([BLOCK_R], LOWEST, tl.float32)
    for split in range(splits):
        index = split * N + clip
        partial_max, partial_sum = load_softmax(
            partial_max_ptr, partial_sum_ptr, index, rows, head, rows < R, R, H, sign
        )
        has_keys = (rows < R) & (partial_sum != 0)  # a split without keys has no average
        partial_out = load_rows(partial_out_ptr, index, rows, head, has_keys, R, H, D)
        new_max = tl.maximum(row_max, partial_max)
        alpha = scaled_exp2(row_max, new_max, scale_log2)
        weight = partial_sum * scaled_exp2(partial_max, new_max, scale_log2)
        row_sum = row_sum * alpha + weight
        acc = acc * alpha[:, None] + partial_out * weight[:, None]
        row_max = new_max

    store_rows(out_ptr, clip, rows, head, acc / row_sum[:, None], rows < R, R, H, D)
    store_softmax(row_max_ptr, row_sum_ptr, clip, rows, head, row_max, row_sum, R, H, sign)


@triton.jit
def program_tile(length, H, splits, BLOCK: tl.constexpr):
    """Clip, split, rows and head of this program: heads first, which lie side by side in memory, then blocks
    of rows, which meet the same rows of the other side.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BLOCK)
    block = program // H % blocks
    split = program // H // blocks % splits
    clip = program // H // blocks // splits
    return wide(clip), split, block * BLOCK + tl.arange(0, BLOCK), wide(program % H)


@triton.jit
def load_length(lengths_ptr, clip, S):
    """How many of the S keys of a clip are real."""
    if lengths_ptr is None:
        return S
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + clip), 0), S)


@triton.jit
def blocks_in_split(split, splits, length, L, BLOCK_S: tl.constexpr):
    """The first block of keys of one of equal splits, and the one after its last."""
    blocks = tl.cdiv(length, BLOCK_S) + tl.cdiv(L, BLOCK_S)
    size = tl.cdiv(blocks, splits)
    return split * size, tl.minimum((split + 1) * size, blocks)


@triton.jit
def keys_in_block(block, length, L, BLOCK_S: tl.constexpr):
    """Whether a block of keys is of the media, which come first; its keys there; which of them are real."""
    blocks = tl.cdiv(length, BLOCK_S)
    media = block < blocks
    keys = tl.where(media, block, block - blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    return media, keys, keys < tl.where(media, length, L)


@triton.jit
def load_keys(ptrs, strides, media, clip, keys, head, real, D: tl.constexpr):  # [keys, BLOCK_D]
    """From `[N, S, Hkv, d]` of the media or `[N, L, Hkv, d]` of the latents, with any strides."""
    media_ptr, latents_ptr = (
        head_ptr(ptrs[0], strides[0], clip, head),
        head_ptr(ptrs[1], strides[1], clip, head),
    )
    stride = tl.where(media, strides[0][1], strides[1][1])
    return load_tile(tl.where(media, media_ptr, latents_ptr), keys, stride, real, D)
