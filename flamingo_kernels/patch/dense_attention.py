"""Attention with a dense mask, for compiled models: the mask is read when the model runs.

Tracing has no numbers, so it cannot know whether a mask is one of spans. These operators find out when they
run, and take a kernel if it is, else the attention that the original has.

    dense_cross_attention       text attends to the keys that its mask shows
    dense_perceiver_attention   latents attend to the media that their mask shows, and to themselves

Reading a mask waits for a GPU. Each call reads its own, or compares it with the last one: that it is the same
tensor says nothing in a compiled model, where memory serves many tensors in turn and no change is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_LARGEST_COPY = 2**22  # numbers in a mask that is kept to compare the next one with


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
        rows: `[B, T]`, zero where a row must see nothing, and gets 0. Default: no row must.
        scale: factor on the scores.
        sdpa: whether a mask that is no spans goes to torch's own attention, as in transformers' "sdpa"; if
            not, to products and a softmax in float32, as in its "eager".
    """
    q, k, v = checks.autocast(q, k, v)
    _expect_cross(q, k, v, mask, rows)
    backend = dispatch.resolve("masked_cross_attention", "auto", q, k[:, :, None], v[:, :, None])
    if backend == "reference":
        return _blanked(_dense(q, k, v, mask, sdpa, scale), rows)
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
    """Attention to `[media ; latents]`, by a kernel where the mask is padding among the media.

    Args:
        q: queries `[N, R, H, d]`.
        k_media: keys of the media `[N, S, Hkv, d]`, same dtype; Hkv divides H.
        v_media: values, like k_media.
        k_latents: keys of the latents `[N, L, Hkv, d]`.
        v_latents: values, like k_latents.
        mask: `[N, 1, R, S + L]` or `[N, 1, 1, S + L]`, added to the scores, or bool; or `[N, S + L]`, 1 where
            a key is seen.
        scale: factor on the scores.
        sdpa: as in `dense_cross_attention`.
    """
    tensors = checks.autocast(q, k_media, v_media, k_latents, v_latents)
    q, k_media, v_media, k_latents, v_latents = tensors
    _expect_perceiver(q, k_media, v_media, k_latents, v_latents, mask)
    backend = dispatch.resolve("perceiver_attention", "auto", *tensors)
    if backend == "reference":
        return _dense(q, *_joined(k_media, v_media, k_latents, v_latents), mask, sdpa, scale)
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
    kv_heads, keys = k_media.shape[2], k_media.shape[1] + k_latents.shape[1]
    checks.expect_head_groups(name, heads, kv_heads)
    checks.expect_shape(name, "v_media", v_media, tuple(k_media.shape), "to match k_media")
    checks.expect_shape(name, "k_latents", k_latents, (clips, "L", kv_heads, head_dim), "to match k_media")
    checks.expect_shape(name, "v_latents", v_latents, tuple(k_latents.shape), "to match k_latents")
    one_row = mask.ndim == 4 and mask.shape[2] == 1
    expected = (clips, keys) if mask.ndim == 2 else (clips, 1, 1 if one_row else length, keys)
    checks.expect_shape(name, "mask", mask, expected, "to match q and the keys")
    given = {"q": q, "k_media": k_media, "v_media": v_media, "k_latents": k_latents, "v_latents": v_latents}
    checks.expect_same_dtype(name, **given)
    checks.expect_same_device(name, **given, mask=mask)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sdpa: bool, scale: float) -> Tensor:
    """What the original computes, whatever the mask."""
    mask = _added(mask, q.dtype) if mask.ndim == 2 else mask
    group = q.shape[2] // k.shape[2]
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, ., d]
    with checks.without_autocast(q):  # its dtypes are those that autocast gave q, k and v
        if sdpa:
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            p = (q @ k.transpose(-1, -2) * scale + mask).softmax(-1, dtype=torch.float32)
            out = p.to(q.dtype) @ v
    return out.transpose(1, 2).contiguous()


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:  # [N, 1, 1, S]
    """A mask `[N, S]`, 1 where a key is seen, as it is added to scores."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill(mask != 1, torch.finfo(dtype).min)[:, None, None]


def _dense_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_dense` in q, k and v; `rest` are its other arguments."""
    # A dispatch mode, as a counter of FLOPs, has switched autograd off below it.
    with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False), torch.enable_grad():
        q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
        dq, dk, dv = torch.autograd.grad(_dense(q, k, v, *rest), (q, k, v), dout)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _blanked(x: Tensor, rows: Tensor | None) -> Tensor:
    """x `[B, T, H, d]`, and 0 in the rows that must see nothing."""
    return x if rows is None else x.masked_fill((rows == 0)[..., None, None], 0)


def _joined(k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([k_media, k_latents], dim=1), torch.cat([v_media, v_latents], dim=1)


def _read(read: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """What a reader finds in a mask; None where nothing may be read, as while a CUDA graph is captured."""
    if is_recording(tensors[0]):
        return None
    if tensors[0].numel() > _LARGEST_COPY:
        return read(*tensors, *options)
    return once_for_equal(read, tensors, *options)


def _spans(mask: Tensor, rows: Tensor | None) -> KeySpans | None:
    found: KeySpans | None = _read(read_spans, (mask,) if rows is None else (mask, rows))
    return found


def _padding(mask: Tensor, k_latents: Tensor) -> tuple[Tensor | None, Tensor] | None:
    """An order of the media, and how many of them are seen, see `media_first`."""
    found = _read(read_padding, (mask,), k_latents.shape[1])
    return None if found is None else (found[0], found[1].int())


def _no_softmax(q: Tensor) -> Tensor:
    """In the place of a softmax that is not kept; a kernel that read it would divide by 0."""
    batch, length, heads, _ = q.shape
    return q.new_zeros(2, batch, heads, length, dtype=torch.float32)


def _gradient_of(x: Tensor, dx: Tensor, order: Tensor | None) -> Tensor:
    """The gradient of x `[N, S, ...]` from that of `in_order(x, order)`."""
    if order is None:
        return dx
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    out[torch.arange(len(x), device=x.device)[:, None], order] = dx
    return out


def _cross_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    backend: str,
    sdpa: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _expect_cross(q, k, v, mask, rows)
    spans = _spans(mask, rows)
    if spans is None:
        return _blanked(_dense(q, k, v, mask, sdpa, scale), rows), _no_softmax(q)
    kv = _media(spans, k, v)
    settings = (*spans.mask.spans, spans.mask.immediate, False, scale)
    out, softmax = masked.FWD[backend](checks.unit_stride(q), *kv, *settings)
    return out, _no_softmax(q) if masked.makes_anew(backend, spans.mask.immediate, kv[0]) else softmax


def _cross_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    backend: str,
    sdpa: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_cross(q, k, v, mask, rows)
    spans = _spans(mask, rows)
    if spans is None:
        return _dense_gradients(_blanked(dout, rows), q, k, v, mask, sdpa, scale)
    kv = _media(spans, k, v)
    if masked.makes_anew(backend, spans.mask.immediate, kv[0]):
        softmax = softmax[..., :0].contiguous()
    settings = (*spans.mask.spans, spans.mask.immediate, False, scale)
    inputs = (checks.unit_stride(dout), checks.unit_stride(q), *kv, out, softmax)
    dq, dk, dv = masked.BWD[backend](*inputs, *settings)
    dk, dv = (_gradient_of(k, dx.flatten(1, 2), spans.order) for dx in (dk, dv))
    return dq, dk, dv


def _media(spans: KeySpans, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:  # [B, M, R, Hkv, d] each
    """Keys and values as the kernels take them."""
    shape = (spans.mask.num_media, -1)
    return tuple(checks.unit_stride(in_order(x, spans.order).unflatten(1, shape)) for x in (k, v))


def _perceiver_fwd(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    mask: Tensor,
    backend: str,
    sdpa: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _expect_perceiver(q, k_media, v_media, k_latents, v_latents, mask)
    padding = _padding(mask, k_latents)
    if padding is None:
        kv = _joined(k_media, v_media, k_latents, v_latents)
        return _dense(q, *kv, mask, sdpa, scale), _no_softmax(q)
    order, lengths = padding
    tensors = (q, in_order(k_media, order), in_order(v_media, order), k_latents, v_latents)
    out, softmax = perceiver.FWD[backend](*map(checks.unit_stride, tensors), lengths, scale)
    return out, softmax


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
    backend: str,
    sdpa: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    _expect_perceiver(q, k_media, v_media, k_latents, v_latents, mask)
    padding = _padding(mask, k_latents)
    if padding is None:
        kv, media = _joined(k_media, v_media, k_latents, v_latents), k_media.shape[1]
        dq, *dkv = _dense_gradients(dout, q, *kv, mask, sdpa, scale)
        parts = [dx[:, part] for part in (slice(media), slice(media, None)) for dx in dkv]
        return dq, *(part.clone(memory_format=torch.contiguous_format) for part in parts)
    order, lengths = padding
    tensors = (dout, q, in_order(k_media, order), in_order(v_media, order), k_latents, v_latents)
    inputs = (*map(checks.unit_stride, tensors), out, softmax, lengths, scale)
    grads = perceiver.BWD[backend](*inputs)
    return grads[0], *(_gradient_of(k_media, dx, order) for dx in grads[1:3]), *grads[3:]


def _forward_shapes(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return fresh(q), q.new_empty(2, batch, heads, length, dtype=torch.float32)


class _Operator(NamedTuple):
    fwd: Any
    bwd: Any


def _operator(
    name: str, tensors: list[str], masks: str, fwd: Callable[..., Any], bwd: Callable[..., Any]
) -> _Operator:
    """Make an operator known, whose gradients are those of `tensors`."""
    given = ", ".join(f"Tensor {each}" for each in tensors) + f", {masks}"
    options, saved = "str backend, bool sdpa, float scale", "Tensor out, Tensor softmax"
    gradients = ", ".join(f"Tensor d{each}" for each in tensors)

    def gradient_shapes(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(fresh(each) for each in arguments[: len(tensors)])

    return _Operator(
        compose(f"{name}_fwd", f"({given}, {options}) -> ({saved})", fwd, _forward_shapes),
        compose(
            f"{name}_bwd",
            f"(Tensor dout, {given}, {saved}, {options}) -> ({gradients})",
            bwd,
            gradient_shapes,
        ),
    )


_CROSS = _operator(
    "dense_cross_attention", ["q", "k", "v"], "Tensor mask, Tensor? rows", _cross_fwd, _cross_bwd
)
_PERCEIVER = _operator(
    "dense_perceiver_attention",
    ["q", "k_media", "v_media", "k_latents", "v_latents"],
    "Tensor mask",
    _perceiver_fwd,
    _perceiver_bwd,
)


def _call(
    operator: _Operator,
    tensors: tuple[Tensor, ...],
    masks: tuple[Tensor | None, ...],
    options: tuple[str, bool, float],
) -> Tensor:
    if not needs_grad(*tensors):
        out, _ = operator.fwd(*tensors, *masks, *options)
    else:
        out = _DenseAttention.apply(operator, options, *tensors, *masks)
    return out


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, options, *tensors):
        out, softmax = operator.fwd(*tensors, *options)
        ctx.save_for_backward(*tensors, out, softmax)
        ctx.operator, ctx.options, ctx.backend = operator, options, options[0]
        return out

    @staticmethod
    @once_differentiable("dense attention")
    def backward(ctx, saved, dout):
        gradients = ctx.operator.bwd(dout, *saved, *ctx.options)
        masks = len(saved) - 2 - len(gradients)
        return None, None, *gradients, *[None] * masks
