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
from ..._backends.triton.language import wide
from ..._backends.triton.launch import launch, precision, scales, strides
from ..._backends.triton.softmax import (
    empty_softmax,
    load_softmax,
    online_softmax,
    scaled_exp2,
    scores,
    store_softmax,
)
from ..._backends.triton.tiles import head_ptr, load_head, load_rows, load_tile, store_rows
from .config import COMBINE, Queries, count_key_splits, forward


def perceiver_attention_fwd(q, k_media, v_media, k_latents, v_latents, media_lengths, scale):
    k, v = (k_media, k_latents), (v_media, v_latents)
    check("perceiver_attention_fwd", q, k, v, media_lengths)
    clips, queries, heads, head_dim = q.shape
    features, latents, kv_heads = k_media.shape[1], k_latents.shape[1], k_media.shape[2]
    out = q.new_empty(q.shape)
    softmax = q.new_empty(2, clips, heads, queries, dtype=torch.float32)

    def programs(tiles: Queries) -> int:
        return clips * triton.cdiv(queries, tiles.block_r) * heads

    device = device_of(q.device)
    choice = forward(queries, head_dim, q.dtype, device)
    splits = count_key_splits(programs(choice.default), features + latents, choice.default, device)
    outputs = (out, tuple(softmax))
    partials = outputs
    if splits > 1:
        partial_out = q.new_empty(splits, *q.shape, dtype=torch.float32)
        partials = (partial_out, tuple(q.new_empty(2, splits, *softmax.shape[1:], dtype=torch.float32)))
    launch(
        _perceiver_fwd_kernel,
        lambda tiles: splits * programs(tiles),
        choice,
        *((q, k, v), (*strides(q), strides(*k), strides(*v)), ((heads, heads // kv_heads), scales(scale))),
        *(media_lengths, *partials, clips, queries, features, latents, splits),
        D=head_dim,
        PRECISION=precision(q),
    )
    if splits > 1:
        sizes = (clips, queries, splits, heads, scales(scale))
        launch(_perceiver_fwd_combine_kernel, programs, COMBINE, partials, outputs, *sizes, D=head_dim)
    return out, softmax


Segments = tuple[Tensor, Tensor]  # of the media [N, S, Hkv, d], of the latents [N, L, Hkv, d]


def check(operation: str, q: Tensor, k: Segments, v: Segments, media_lengths: Tensor | None) -> Checks:
    checks = Checks(operation, "q", q, 4)
    checks.dimensions("k_media", k[0], 4)
    checks.dimensions("k_latents", k[1], 4)
    clips, _, heads, head_dim = q.shape
    kv_heads = k[0].shape[2]
    checks.rows("q", q, q.shape)
    for name, keys, values in zip(("media", "latents"), k, v, strict=True):
        shape = (clips, keys.shape[1], kv_heads, head_dim)
        checks.rows_like_first(f"k_{name}", keys, shape)
        checks.rows_like_first(f"v_{name}", values, shape)
    checks.latents("k_latents", k[1], 1)
    checks.head_groups(heads, kv_heads)
    if media_lengths is not None:
        checks.whole("media_lengths", media_lengths, (clips,), torch.int32)
    return checks


@triton.jit(do_not_specialize=["N", "R", "S", "L", "splits"])
def _perceiver_fwd_kernel(
    inputs,  # q [N, R, H, d]; k, v: [N, S, Hkv, d] of media, [N, L, Hkv, d] of latents
    strides,  # of each input
    settings,  # (H, GROUP), (scale, scale_log2, sign)
    media_lengths_ptr,  # [N] or None
    out_ptr,  # [splits, N, R, H, d]
    stats,  # row_max, row_sum [splits, N, H, R]
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
    H, GROUP = settings[0]
    _, scale_log2, sign = settings[1]
    clip, split, rows, head = program_tile(R, H, splits, BLOCK_R)
    q = load_head(inputs[0], strides[0], clip, rows, head, rows < R, D)

    acc, row_max, row_sum = empty_softmax(BLOCK_R, D)
    length = load_length(media_lengths_ptr, clip, S)
    begin, end = blocks_in_split(split, splits, length, L, BLOCK_S)
    for block in range(begin, end):
        media, keys, real = keys_in_block(block, length, L, BLOCK_S)
        k, v = load_keys(inputs, strides, media, clip, keys, head // GROUP, real, D)
        s = scores(q, k, real[None, :], sign, PRECISION)  # [BLOCK_R, BLOCK_S]
        acc, row_max, row_sum = online_softmax(acc, row_max, row_sum, s, v, None, scale_log2, PRECISION)

    clip += split * N
    store_rows(out_ptr, clip, rows, head, acc / row_sum[:, None], rows < R, R, H, D)
    store_softmax(stats, clip, rows, head, row_max, row_sum, R, H, sign)


@triton.jit(do_not_specialize=["N", "R", "splits"])
def _perceiver_fwd_combine_kernel(
    partials,  # out [splits, N, R, H, d]; stats, (row_max, row_sum) [splits, N, H, R]
    outputs,  # the same without splits
    N,
    R,
    splits,
    H,
    scales,  # scale, scale_log2, sign
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    partial_out_ptr, partial_stats = partials
    out_ptr, stats = outputs
    _, scale_log2, sign = scales
    clip, _, rows, head = program_tile(R, H, 1, BLOCK_R)

    acc, row_max, row_sum = empty_softmax(BLOCK_R, D)
    for split in range(splits):
        index = split * N + clip
        partial_max, partial_sum = load_softmax(partial_stats, index, rows, head, rows < R, R, H, sign)
        has_keys = (rows < R) & (partial_sum != 0)  # a split without keys has no average
        partial_out = load_rows(partial_out_ptr, index, rows, head, has_keys, R, H, D)
        new_max = tl.maximum(row_max, partial_max)
        alpha = scaled_exp2(row_max, new_max, scale_log2)
        weight = partial_sum * scaled_exp2(partial_max, new_max, scale_log2)
        row_sum = row_sum * alpha + weight
        acc = acc * alpha[:, None] + partial_out * weight[:, None]
        row_max = new_max

    store_rows(out_ptr, clip, rows, head, acc / row_sum[:, None], rows < R, R, H, D)
    store_softmax(stats, clip, rows, head, row_max, row_sum, R, H, sign)


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
    return wide(clip), split, block * BLOCK + tl.arange(0, BLOCK), program % H


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
def load_keys(inputs, strides, media, clip, keys, head, real, D: tl.constexpr):  # k, v [keys, BLOCK_D]
    """Keys and values of a head, of the media or of the latents."""
    k = load_segment(inputs[1], strides[1], media, clip, keys, head, real, D)
    return k, load_segment(inputs[2], strides[2], media, clip, keys, head, real, D)


@triton.jit
def load_segment(ptrs, strides, media, clip, keys, head, real, D: tl.constexpr):  # [keys, BLOCK_D]
    """From `[N, S, Hkv, d]` of the media or `[N, L, Hkv, d]` of the latents, with any strides."""
    media_ptr = head_ptr(ptrs[0], strides[0], clip, head)
    latents_ptr = head_ptr(ptrs[1], strides[1], clip, head)
    stride = tl.where(media, strides[0][1], strides[1][1])
    return load_tile(tl.where(media, media_ptr, latents_ptr), keys, stride, real, D)
