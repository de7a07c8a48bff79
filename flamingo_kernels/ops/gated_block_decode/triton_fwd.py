"""One decoding step of a gated block in Triton, for inference alone. Oracle: `reference.py`.

norm        A program norms a row. Twice: before the queries, and before the feed-forward network.
linear      `multiply` of linear. Four times: `to_q`; `to_out`, gate and residual; `up`, activation and, in a
            gated linear unit, `gate_proj`; `down`, gate and residual.
attention   A program takes the query heads of a key head, and an equal share of the keys that its text sees,
            through an online softmax.
merge       A program puts the shares of a head together, in order.

Bytes: each weight, and each key and value that a text sees, read once; x, z and what lies between them, a row
each, are small beside. FLOPs: 2 a weight and row, and 4 d a query head and key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton.checks import Checks
from ..._backends.triton.config import device_of, power_of_two
from ..._backends.triton.language import power_of_two as block_of
from ..._backends.triton.language import wide
from ..._backends.triton.launch import launch, precision, scales, strides
from ..._backends.triton.softmax import LOWEST, empty_softmax, online_softmax, scaled_exp2, scores
from ..._backends.triton.tiles import load_tile, store_tile
from ..linear.schema import ACTIVATIONS
from ..linear.triton_fwd import load_vector, multiply
from ..weights import Linear, Norm
from .config import BLOCK_H, MERGE, attention, count_key_splits, norm
from .schema import dtypes
from .weights import TENSORS, GatedBlockWeights


def gated_block_decode_fwd(
    x: Tensor,  # [B, D]
    k: Tensor,  # [S, M, R, Hkv, d]
    v: Tensor,  # [S, M, R, Hkv, d]
    lo: Tensor,  # [B]
    hi: Tensor,  # [B]
    weights: list[Tensor],  # in the order of TENSORS
    heads: int,
    scale: float,
    eps: list[float],
    rms: list[int],
    activation: int,
) -> Tensor:  # [B, D]
    checks = Checks("gated_block_decode_fwd", "k", k, 5)
    checks.place("activation", activation, len(ACTIVATIONS))
    for name, values, count in (("weights", weights, len(TENSORS)), ("eps", eps, 3), ("rms", rms, 3)):
        checks.count(name, values, count)
    w = GatedBlockWeights.from_tensors(weights, eps, rms, activation)
    check_media(checks, x, k, v, lo, hi)
    check_weights(checks, w, x.shape[1], heads, k.shape[4])
    checks.head_groups(heads, k.shape[3])
    z_dtype, out_dtype = dtypes(x, k, w.gate, w.ff_gate)
    out, z = x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape, dtype=z_dtype)
    q = k.new_empty(len(x), len(w.to_q.weight))
    h = k.new_empty(len(x), len(w.up.weight))
    multiply(normed(x, w.norm, k.dtype), w.to_q, q)
    attended = attend(q, k, v, lo, hi, w.q_norm, scale)
    multiply(attended, w.to_out, z, gate=w.gate, residual=x)
    multiply(normed(z, w.ff_norm, k.dtype), w.up, h, activation, gate_proj=w.gate_proj)
    return multiply(h, w.down, out, gate=w.ff_gate, residual=z)


def check_media(checks: Checks, x: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> None:
    checks.dimensions("x", x, 2)
    checks.rows("x", x, x.shape)
    checks.rows_like_first("k", k, k.shape)
    checks.rows_like_first("v", v, k.shape)
    checks.latents("k", k, 2)
    checks.divisor("k", len(k), len(x))
    for name, span in (("lo", lo), ("hi", hi)):
        checks.whole(name, span, x.shape[:1], torch.int32)


def check_weights(checks: Checks, w: GatedBlockWeights, width: int, heads: int, head_dim: int) -> None:
    checks.given("up.weight", w.up.weight)
    checks.dimensions("up.weight", w.up.weight, 2)
    inner, hidden = heads * head_dim, len(w.up.weight)
    shapes = {"to_q": (inner, width), "to_out": (width, inner), "down": (width, hidden)}
    for name, layer in w.linears().items():
        names = [f"{name}.{field}" for field in Linear._fields]
        checks.given(names[0], layer.weight)
        checks.layer(names, layer, shapes.get(name, (hidden, width)))
    for name, by in w.norms().items():
        size = head_dim if name == "q_norm" else width
        checks.given(f"{name}.weight", by.weight)
        checks.vector(f"{name}.weight", by.weight, size)
        if by.bias is not None:
            checks.vector(f"{name}.bias", by.bias, size)
    for name, gate in w.gates().items():
        checks.parameter(name, gate, width)


def normed(x: Tensor, by: Norm, dtype: torch.dtype) -> Tensor:
    """The normed rows `[B, D]`, in the dtype of the products."""
    out = x.new_empty(x.shape, dtype=dtype)
    launch(
        _gated_block_decode_fwd_norm_kernel,
        lambda _: len(x),
        norm(x.shape[1]),
        *((x, out), x.stride(0), _parameters(by)),
        D=x.shape[1],
        RMS=by.rms,
    )
    return out


def attend(
    q: Tensor,  # [B, H * d]
    k: Tensor,  # [S, M, R, Hkv, d]
    v: Tensor,  # [S, M, R, Hkv, d]
    lo: Tensor,  # [B]
    hi: Tensor,  # [B]
    q_norm: Norm | None,
    scale: float,
) -> Tensor:  # [B, H * d]
    """The attention of every text, 0 where it sees nothing."""
    sequences, media, latents, kv_heads, head_dim = k.shape
    batch, heads = len(q), q.shape[1] // head_dim
    device = device_of(q.device)
    programs = batch * kv_heads * triton.cdiv(heads // kv_heads, BLOCK_H)
    splits = count_key_splits(programs, media * latents, device)
    acc = q.new_empty(splits, batch, heads, head_dim, dtype=torch.float32)
    stats = q.new_empty(2, splits, batch, heads, dtype=torch.float32)
    partials, spans = (acc, *stats), (lo, hi)
    scaled = scales(scale)
    launch(
        _gated_block_decode_fwd_attention_kernel,
        lambda _: splits * programs,
        attention(head_dim, q.dtype, device),
        *((q, k, v), strides(k, v), (heads, kv_heads), scaled),
        *(spans, _parameters(q_norm), partials),
        *(batch, batch // max(sequences, 1), media, splits),
        R=latents,
        D=head_dim,
        RMS=q_norm is not None and q_norm.rms,
        PRECISION=precision(q),
        BLOCK_H=BLOCK_H,
    )
    attended = torch.empty_like(q)
    launch(
        _gated_block_decode_fwd_merge_kernel,
        lambda _: batch * heads,
        MERGE,
        *(partials, attended, spans, heads, scaled, batch, media, splits),
        D=head_dim,
        BLOCK_SPLITS=power_of_two(splits),
    )
    return attended


def _parameters(by: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps; no weight where there is no norm."""
    if by is None:
        return None, None, 0.0
    return by.weight.contiguous(), None if by.bias is None else by.bias.contiguous(), by.eps


@triton.jit
def _gated_block_decode_fwd_norm_kernel(
    rows_ptrs,  # x, out [B, D]
    x_stride,
    parameters,  # weight [D], bias [D] or None, eps
    D: tl.constexpr,
    RMS: tl.constexpr,
):
    row = wide(tl.program_id(0))
    columns = tl.arange(0, block_of(D))[None, :]
    x = tl.load(rows_ptrs[0] + row * x_stride + columns, mask=columns < D, other=0.0).to(tl.float32)
    n = norm_rows(x, parameters, D, RMS)
    tl.store(rows_ptrs[1] + row * D + columns, n.to(rows_ptrs[1].dtype.element_ty), mask=columns < D)


@triton.jit
def norm_rows(x, parameters, D: tl.constexpr, RMS: tl.constexpr):  # [rows, BLOCK_D]
    """LayerNorm, or RMSNorm, of rows in float32 that are 0 beyond D."""
    columns = tl.arange(0, block_of(D))
    if not RMS:
        mean = tl.sum(x, 1) / D
        x = tl.where((columns < D)[None, :], x - mean[:, None], 0.0)
    weight_ptr, bias_ptr, eps = parameters
    rstd = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)
    n = x * rstd[:, None] * load_vector(weight_ptr, columns, D)
    return n if bias_ptr is None else n + load_vector(bias_ptr, columns, D)


@triton.jit(do_not_specialize=["B", "TEXTS", "M", "splits"])
def _gated_block_decode_fwd_attention_kernel(
    inputs,  # q [B, H, d]; k, v [S, M, R, Hkv, d]
    strides,  # of k, of v
    counts,  # H, Hkv
    scales,  # scale, scale_log2, sign
    spans,  # lo, hi [B]
    q_norm,  # weight [d] or None, bias [d] or None, eps
    partials,  # acc [splits, B, H, d]; row_max, row_sum [splits, B, H]
    B,
    TEXTS,
    M,
    splits,
    R: tl.constexpr,
    D: tl.constexpr,
    RMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    H, KV_HEADS = counts
    _, scale_log2, sign = scales
    text, kv_head, heads, real, split = program_heads(H, KV_HEADS, splits, BLOCK_H)
    begin, end, weighs = keys_seen(spans, text, M, R)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, end)
    q = load_tile(inputs[0] + text * H * D, heads, D, real, D)
    if q_norm[0] is not None:
        q = norm_rows(q.to(tl.float32), q_norm, D, RMS).to(q.dtype)
    q = tl.where(weighs, q, tl.zeros_like(q))
    k_ptr = inputs[1] + text // TEXTS * strides[0][0] + wide(kv_head) * strides[0][3]
    v_ptr = inputs[2] + text // TEXTS * strides[1][0] + wide(kv_head) * strides[1][3]

    acc, row_max, row_sum = empty_softmax(BLOCK_H, D)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        seen = keys < end
        k = load_keys(k_ptr, strides[0], keys, keys < tl.where(weighs, end, 0), R, D)
        v = load_keys(v_ptr, strides[1], keys, seen, R, D)
        s = scores(q, k, seen[None, :], sign, PRECISION)  # [BLOCK_H, BLOCK_N]
        acc, row_max, row_sum = online_softmax(acc, row_max, row_sum, s, v, None, scale_log2, PRECISION)

    rows = (split * B + text) * H + heads
    store_tile(partials[0], rows, D, acc, real, D)
    tl.store(partials[1] + rows, row_max, mask=real)
    tl.store(partials[2] + rows, row_sum, mask=real)


@triton.jit(do_not_specialize=["B", "M", "splits"])
def _gated_block_decode_fwd_merge_kernel(
    partials,  # acc [splits, B, H, d]; row_max, row_sum [splits, B, H]
    out_ptr,  # [B, H, d]
    spans,  # lo, hi [B]
    H,
    scales,  # scale, scale_log2, sign
    B,
    M,
    splits,
    D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    _, scale_log2, _ = scales
    row = wide(tl.program_id(0))
    real = tl.arange(0, BLOCK_SPLITS) < splits
    rows = tl.arange(0, BLOCK_SPLITS) * wide(B * H) + row
    row_max = tl.load(partials[1] + rows, mask=real, other=LOWEST)
    row_sum = tl.load(partials[2] + rows, mask=real, other=0.0)
    weight = scaled_exp2(row_max, tl.max(row_max, 0), scale_log2)
    acc = tl.sum(load_tile(partials[0], rows, D, real, D) * weight[:, None], 0)
    begin, end, _ = keys_seen(spans, row // H, M, 1)
    out = acc / tl.where(begin < end, tl.sum(row_sum * weight, 0), 1.0)
    columns = tl.arange(0, block_of(D))
    tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def program_heads(H, KV_HEADS, splits, BLOCK_H: tl.constexpr):
    """Text, key head, a block of the query heads that share it, which of them are real, and the split of
    keys: key heads first, which lie side by side in memory.
    """
    program = tl.program_id(0)
    group = H // KV_HEADS
    blocks = tl.cdiv(group, BLOCK_H)
    kv_head = program % KV_HEADS
    places = program // KV_HEADS % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    split = program // KV_HEADS // blocks % splits
    text = wide(program // KV_HEADS // blocks // splits)
    return text, kv_head, kv_head * group + places, places < group, split


@triton.jit
def keys_seen(spans, text, M, R: tl.constexpr):  # begin, end, weighs
    """The first key that a text sees, the one after its last, and whether it weighs them: one that averages
    all values reads no keys, so that all scores are 0.
    """
    lo, hi = tl.load(spans[0] + text), tl.load(spans[1] + text)
    weighs = hi != -1
    begin = tl.where(weighs, tl.minimum(tl.maximum(lo, 0), M), 0)
    end = tl.where(weighs, tl.minimum(tl.maximum(hi, 0), M), M)
    return begin * R, tl.maximum(begin, end) * R, weighs


@triton.jit
def load_keys(ptr, strides, keys, seen, R: tl.constexpr, D: tl.constexpr):  # [keys, BLOCK_D]
    """Keys of all media of a head, counted through."""
    return load_tile(ptr, wide(keys // R) * strides[1] + wide(keys % R) * strides[2], 1, seen, D)
