"""Attention with a dense mask, for traced models: the mask is read when the model runs.

Tracing has no numbers, so it cannot know whether a mask is one of spans. These operators find out when they
run, and take a kernel if it is, else the attention that the original has. A graph holds the operator for both.

    dense_cross_attention       text attends to the keys that its mask shows
    dense_perceiver_attention   latents attend to the media that their mask shows, and to themselves

Reading a mask waits for a GPU; a step of generation does not take these operators (`dense.reads_when_run`).
Each layer reads it, or compares it with the last one that was read: which tensor it is says nothing in a
compiled model, as its memory serves many tensors in turn.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as checks
from .._backends import dispatch
from .._backends.library import compose, fresh
from .._kept import once_for_equal
from .._predicates import is_recording, needs_grad
from ..ops.masked_cross_attention import schema as masked
from ..ops.once_differentiable import once_differentiable
from ..ops.perceiver_attention import schema as perceiver
from .dense import KeySpans, in_order, read_padding, read_spans

_LARGEST_COPY = 2**22  # numbers in a mask that is kept to compare the next one with

Options = tuple[str, bool, float]  # backend, sdpa, scale


def dense_cross_attention(
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, S, Hkv, d]
    v: Tensor,  # [B, S, Hkv, d]
    mask: Tensor,
    rows: Tensor | None = None,
    *,
    scale: float,
    sdpa: bool,
) -> Tensor:  # [B, T, H, d]
    """`softmax(scale * q k^T + mask) v`, by a kernel where the mask is one of spans.

    Args:
        q: queries `[B, T, H, d]`.
        k: keys `[B, S, Hkv, d]`, same dtype; Hkv divides H.
        v: values, like k.
        mask: `[B, 1, T, S]`, added to the scores, or bool.
        rows: `[B, T]`, zero where a row sees nothing and gets 0. Default: no row.
        scale: factor on the scores.
        sdpa: whether other masks go to `F.scaled_dot_product_attention`, or to a softmax in float32.
    """
    q, k, v = checks.autocast(q, k, v)
    _expect_cross(q, k, v, mask, rows)
    backend = dispatch.resolve("masked_cross_attention", "auto", q, k[:, None], v[:, None])
    with checks.without_autocast(q):
        if backend == "reference":
            return _only(rows, _dense(q, k, v, mask, sdpa, scale))
        return _call(_CROSS, (q, k, v), (mask, rows), (backend, sdpa, scale))


def dense_perceiver_attention(
    q: Tensor,  # [N, R, H, d]
    k_media: Tensor,  # [N, S, Hkv, d]
    v_media: Tensor,  # [N, S, Hkv, d]
    k_latents: Tensor,  # [N, L, Hkv, d]
    v_latents: Tensor,  # [N, L, Hkv, d]
    mask: Tensor,
    *,
    scale: float,
    sdpa: bool,
) -> Tensor:  # [N, R, H, d]
    """`dense_cross_attention` to `[media ; latents]`, by a kernel where the mask is the padding of media.

    Args:
        q: queries `[N, R, H, d]`.
        k_media: keys of the media `[N, S, Hkv, d]`, same dtype; Hkv divides H.
        v_media: values, like k_media.
        k_latents: keys of the latents `[N, L, Hkv, d]`.
        v_latents: values, like k_latents.
        mask: `[N, 1, R, S + L]` or `[N, 1, 1, S + L]`, added to the scores, or bool.
        scale: factor on the scores.
        sdpa: as in `dense_cross_attention`.
    """
    tensors = checks.autocast(q, k_media, v_media, k_latents, v_latents)
    _expect_perceiver(*tensors, mask)
    backend = dispatch.resolve("perceiver_attention", "auto", *tensors)
    with checks.without_autocast(q):
        if backend == "reference":
            return _dense(tensors[0], *_joined(*tensors[1:]), mask, sdpa, scale)
        return _call(_PERCEIVER, tensors, (mask,), (backend, sdpa, scale))


def _expect_cross(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: Tensor | None) -> None:
    name = "dense_cross_attention"
    checks.expect_shape(name, "q", q, ("B", "T", "H", "d"), "")
    batch, length, heads, head_dim = q.shape
    checks.expect_shape(name, "k", k, (batch, "S", "Hkv", head_dim), "to match q")
    checks.expect_shape(name, "v", v, tuple(k.shape), "to match k")
    checks.expect_head_groups(name, heads, k.shape[2])
    checks.expect_shape(name, "mask", mask, (batch, 1, length, k.shape[1]), "to match q and k")
    if rows is not None:
        checks.expect_shape(name, "rows", rows, (batch, length), "to match q")
    checks.expect_same_dtype(name, q=q, k=k, v=v)
    checks.expect_same_device(name, q=q, k=k, v=v, mask=mask, rows=rows)


def _expect_perceiver(
    q: Tensor, k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor, mask: Tensor
) -> None:
    name = "dense_perceiver_attention"
    checks.expect_shape(name, "q", q, ("N", "R", "H", "d"), "")
    clips, length, heads, head_dim = q.shape
    checks.expect_shape(name, "k_media", k_media, (clips, "S", "Hkv", head_dim), "to match q")
    kv_heads = k_media.shape[2]
    checks.expect_head_groups(name, heads, kv_heads)
    checks.expect_shape(name, "v_media", v_media, tuple(k_media.shape), "to match k_media")
    checks.expect_shape(name, "k_latents", k_latents, (clips, "L", kv_heads, head_dim), "to match k_media")
    checks.expect_shape(name, "v_latents", v_latents, tuple(k_latents.shape), "to match k_latents")
    rows = 1 if mask.ndim == 4 and mask.shape[2] == 1 else length
    keys = k_media.shape[1] + k_latents.shape[1]
    checks.expect_shape(name, "mask", mask, (clips, 1, rows, keys), "to match q and the keys")
    given = {"q": q, "k_media": k_media, "v_media": v_media, "k_latents": k_latents, "v_latents": v_latents}
    checks.expect_same_dtype(name, **given)
    checks.expect_same_device(name, **given, mask=mask)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sdpa: bool, scale: float) -> Tensor:
    """The attention of transformers: "sdpa", or else "eager"."""
    group = q.shape[2] // k.shape[2]
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, ., d]
    if sdpa:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        p = (q @ k.transpose(-1, -2) * scale + mask).softmax(-1, dtype=torch.float32)
        out = p.to(q.dtype) @ v
    return out.transpose(1, 2).contiguous()


def _dense_gradients(dout: Tensor, tensors: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """Of `_dense` in its q, k and v; `rest` are its other arguments."""
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in tensors]
        grads = torch.autograd.grad(_dense(*leaves, *rest), leaves, dout)
    return tuple(each.contiguous() for each in grads)


def _only(rows: Tensor | None, x: Tensor) -> Tensor:
    """x `[B, T, H, d]`, and 0 in the rows that see nothing."""
    return x if rows is None else x.masked_fill((rows == 0)[..., None, None], 0)


def _joined(k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([k_media, k_latents], dim=1), torch.cat([v_media, v_latents], dim=1)


def _read(read: Any, tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """What a reader finds in a mask; None where nothing may be read, as while a CUDA graph is captured."""
    if is_recording(tensors[0]):
        return None
    if tensors[0].numel() > _LARGEST_COPY:
        return read(*tensors, *options)
    return once_for_equal(read, tensors, *options)


def _spans(mask: Tensor, rows: Tensor | None) -> KeySpans | None:
    return cast("KeySpans | None", _read(read_spans, (mask,) if rows is None else (mask, rows)))


def _no_softmax(q: Tensor) -> Tensor:
    """In the place of a softmax that was not kept; a kernel that read it would show."""
    batch, length, heads, _ = q.shape
    return q.new_full((2, batch, heads, length), torch.nan, dtype=torch.float32)


def _media(spans: KeySpans, *kv: Tensor) -> tuple[Tensor, ...]:
    """Keys and values in the order of the spans, as the kernels take them."""
    shape = (spans.mask.num_media, -1)
    return tuple(checks.unit_stride(in_order(x, spans.order).unflatten(1, shape)) for x in kv)


def _back_in_order(dx: Tensor, order: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of x `[N, S, ...]` from that of `in_order(x, order)`."""
    if order is None:
        return dx
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    out[torch.arange(len(x), device=x.device)[:, None], order] = dx
    return out


def _cross_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    _expect_cross(q, k, v, mask, rows)
    backend, sdpa, scale = options
    spans = _spans(mask, rows)
    if spans is None:
        return _only(rows, _dense(q, k, v, mask, sdpa, scale)), _no_softmax(q)
    inputs = (checks.unit_stride(q), *_media(spans, k, v), *spans.mask.spans)
    out, softmax = masked.FWD[backend](*inputs, spans.mask.immediate, False, scale)
    return out, softmax if softmax.shape[-1] == q.shape[1] else _no_softmax(q)


def _cross_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    _expect_cross(q, k, v, mask, rows)
    backend, sdpa, scale = options
    spans = _spans(mask, rows)
    if spans is None:
        return _dense_gradients(_only(rows, dout), (q, k, v), mask, sdpa, scale)
    immediate, (k_media, v_media) = spans.mask.immediate, _media(spans, k, v)
    if masked.makes_anew(backend, immediate, k_media):
        softmax = softmax[..., :0].contiguous()
    inputs = (checks.unit_stride(dout), checks.unit_stride(q), k_media, v_media, out, softmax)
    dq, *dkv = masked.BWD[backend](*inputs, *spans.mask.spans, immediate, False, scale)
    return dq, *(_back_in_order(dx.flatten(1, 2), spans.order, k) for dx in dkv)


def _perceiver_fwd(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    mask: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k_media, v_media, k_latents, v_latents)
    _expect_perceiver(*tensors, mask)
    backend, sdpa, scale = options
    found = _read(read_padding, (mask,), k_latents.shape[1])
    if found is None:
        return _dense(q, *_joined(*tensors[1:]), mask, sdpa, scale), _no_softmax(q)
    order, lengths = found
    tensors = (q, in_order(k_media, order), in_order(v_media, order), k_latents, v_latents)
    return cast(
        "tuple[Tensor, Tensor]", perceiver.FWD[backend](*map(checks.unit_stride, tensors), lengths.int(), scale)
    )


def _perceiver_bwd(
    dout: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    mask: Tensor,
    out: Tensor,
    softmax: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    tensors = (q, k_media, v_media, k_latents, v_latents)
    _expect_perceiver(*tensors, mask)
    backend, sdpa, scale = options
    found = _read(read_padding, (mask,), k_latents.shape[1])
    if found is None:
        dq, dk, dv = _dense_gradients(dout, (q, *_joined(*tensors[1:])), mask, sdpa, scale)
        parts = [x.split([k_media.shape[1], k_latents.shape[1]], dim=1) for x in (dk, dv)]
        return dq, *(x.clone() for pair in zip(*parts, strict=True) for x in pair)
    order, lengths = found
    tensors = (q, in_order(k_media, order), in_order(v_media, order), k_latents, v_latents)
    inputs = (*map(checks.unit_stride, (dout, *tensors)), out, softmax, lengths.int(), scale)
    dq, dk, dv, *rest = perceiver.BWD[backend](*inputs)
    return dq, *(_back_in_order(dx, order, k_media) for dx in (dk, dv)), *rest


def _forward_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return fresh(q), q.new_empty(2, batch, heads, length, dtype=torch.float32)


def _cross_gradients(dout: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(fresh(each) for each in tensors[:3])


def _perceiver_gradients(dout: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(fresh(each) for each in tensors[:5])


_OPTIONS = "str backend, bool sdpa, float scale"
_CROSS_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? rows"
_PERCEIVER_TENSORS = (
    "Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor mask"
)
_CROSS, _PERCEIVER = "dense_cross_attention", "dense_perceiver_attention"
_FWD = {
    _CROSS: compose(
        f"{_CROSS}_fwd",
        f"({_CROSS_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor softmax)",
        _cross_fwd,
        _forward_shapes,
    ),
    _PERCEIVER: compose(
        f"{_PERCEIVER}_fwd",
        f"({_PERCEIVER_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor softmax)",
        _perceiver_fwd,
        _forward_shapes,
    ),
}
_BWD = {
    _CROSS: compose(
        f"{_CROSS}_bwd",
        f"(Tensor dout, {_CROSS_TENSORS}, Tensor out, Tensor softmax, {_OPTIONS}) "
        "-> (Tensor dq, Tensor dk, Tensor dv)",
        _cross_bwd,
        _cross_gradients,
    ),
    _PERCEIVER: compose(
        f"{_PERCEIVER}_bwd",
        f"(Tensor dout, {_PERCEIVER_TENSORS}, Tensor out, Tensor softmax, {_OPTIONS}) "
        "-> (Tensor dq, Tensor dk_media, Tensor dv_media, Tensor dk_latents, Tensor dv_latents)",
        _perceiver_bwd,
        _perceiver_gradients,
    ),
}


def _call(
    operator: str, tensors: tuple[Tensor, ...], masks: tuple[Tensor | None, ...], options: Options
) -> Tensor:
    if needs_grad(*tensors):
        return cast(Tensor, _DenseAttention.apply(operator, len(tensors), options, *tensors, *masks))
    return cast(Tensor, _FWD[operator](*tensors, *masks, *options)[0])


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, count, options, *tensors):
        out, softmax = _FWD[operator](*tensors, *options)
        ctx.save_for_backward(*tensors, out, softmax)
        ctx.operator, ctx.count, ctx.options, ctx.backend = operator, count, options, options[0]
        return out

    @staticmethod
    @once_differentiable("dense attention")
    def backward(ctx, saved, dout):
        gradients = _BWD[ctx.operator](dout, *saved, *ctx.options)
        masks = len(saved) - 2 - ctx.count
        return None, None, None, *gradients, *[None] * masks
