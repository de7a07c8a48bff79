"""Masked cross-attention: text rows attend to the media their MediaMask names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from ..._checks import (
    autocast,
    expect_head_groups,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    needs_grad,
    unit_stride,
)
from ...mask import MediaMask
from . import reference

_NAME = "masked_cross_attention"
_fwd = torch.ops.flamingo_kernels.masked_cross_attention_fwd.default
_bwd = torch.ops.flamingo_kernels.masked_cross_attention_bwd.default
_LARGEST = 256  # latents a medium, and head_dim, that the compiled kernels keep in one block


def masked_cross_attention(
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, T, H, d]
    r"""Every text row attends to the latents of the media it may see, and to nothing else.

    For a row t that sees the media `lo <= m < hi`::

        out[t] = softmax(scale * q[t] @ K[lo:hi].T) @ V[lo:hi]

        text     a  <image>  b  c  <image>  d         # attends, . never computed
        medium 0 .     #     #  #     .     .
        medium 1 .     .     .  .     #     #

    A row that sees no medium returns exactly 0 and sends no gradient; under
    `MediaMask(policy="open_flamingo")` some rows average all values instead (see `MediaMask`).

    Args:
        q: queries `[B, T, H, d]`, float32, bfloat16 or float16 (the reference takes float64 too).
        k: keys `[B, M, R, Hkv, d]`, same dtype; Hkv divides H (query head h reads head `h * Hkv // H`).
        v: values, like k.
        mask: which media each row sees, for the same B, T and M; build it once per batch.
        scale: factor on the scores. Default: `d ** -0.5`.
        backend: "auto", "cpu" or "reference".

    Returns:
        `[B, T, H, d]` in the dtype of q, contiguous.

    Raises:
        ValueError: a shape, device or mask that does not fit.
        TypeError: k or v in another dtype than q.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: cpu takes R and d up to 256; any strides (a non-contiguous last dimension is copied).
    Accumulates in float32. Differentiable once in q, k and v. Bitwise deterministic, for any number of
    threads. Memory beside inputs and outputs does not grow with T * M.

    Source: Flamingo (arXiv 2204.14198), sections 2.2 and 2.3.

    Example:
        >>> locations = torch.tensor([[False, True, False, True]])
        >>> mask = MediaMask.last_preceding(locations, num_media=2)
        >>> q, k, v = torch.randn(1, 4, 8, 64), torch.randn(1, 2, 64, 8, 64), torch.randn(1, 2, 64, 8, 64)
        >>> out = masked_cross_attention(q, k, v, mask)
        >>> out.shape, out[:, 0].any().item()
        (torch.Size([1, 4, 8, 64]), False)
    """
    q, k, v = autocast(q, k, v)
    _validate(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if _dispatch.resolve(_NAME, backend, q, k, v) == "reference":
        with torch.autocast(q.device.type, enabled=False):  # it accumulates in float32 itself
            return reference.masked_cross_attention(q, k, v, mask, scale).contiguous()
    spans = (mask.lo, mask.hi, mask.start, mask.stop)
    inputs = (unit_stride(q), unit_stride(k), unit_stride(v), *spans, mask.immediate, scale)
    return _MaskedCrossAttention.apply(*inputs) if needs_grad(q, k, v) else _fwd(*inputs)[0]


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> None:
    if not isinstance(mask, MediaMask):
        raise TypeError(
            f"{_NAME}: expected a MediaMask, got {type(mask).__name__}; build one with "
            "MediaMask.last_preceding(media_locations, num_media)."
        )
    expect_shape(_NAME, "q", q, ("B", "T", "H", "d"), "")
    batch, length, heads, head_dim = q.shape
    expect_shape(_NAME, "k", k, (batch, "M", "R", "Hkv", head_dim), "to match q")
    expect_shape(_NAME, "v", v, tuple(k.shape), "to match k")
    expect_head_groups(_NAME, heads, k.shape[3])
    expect_shape(_NAME, "a mask", mask.lo, (batch, length), "to match q[:, :T]")
    expect_shape(_NAME, "a mask over media", mask.start, (batch, k.shape[1]), "to match k[:, :M]")
    expect_same_dtype(_NAME, q=q, k=k, v=v)
    expect_same_device(_NAME, q=q, k=k, v=v, mask=mask.lo)


def _cpu_reasons(*tensors: Tensor) -> list[str]:
    reasons = _dispatch.cpu_reasons(*tensors)
    if tensors:
        _, _, latents, _, head_dim = tensors[1].shape
        reasons += [f"R={latents} is above {_LARGEST}"] if latents > _LARGEST else []
        reasons += [f"head_dim={head_dim} is above {_LARGEST}"] if head_dim > _LARGEST else []
    return reasons


_dispatch.register(_NAME, cpu=_cpu_reasons, reference=_dispatch.reference_reasons)


class _MaskedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lo, hi, start, stop, immediate, scale):
        out, softmax = _fwd(q, k, v, lo, hi, start, stop, immediate, scale)
        ctx.save_for_backward(q, k, v, out, softmax, lo, hi, start, stop)
        ctx.immediate, ctx.scale = immediate, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gradients = _bwd(unit_stride(dout), *ctx.saved_tensors, ctx.immediate, ctx.scale)
        return *gradients, None, None, None, None, None, None
