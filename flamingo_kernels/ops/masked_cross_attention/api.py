"""Masked cross-attention: text rows attend to the media their MediaMask names."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import needs_grad
from ...mask import MediaMask
from ..once_differentiable import once_differentiable
from . import reference
from .schema import BWD, FWD

_NAME = "masked_cross_attention"
_LARGEST_OF_CUDA, _LARGEST = 128, 256  # head_dim that kernels keep in one block


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
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `[B, T, H, d]` in the dtype of q, contiguous.

    Raises:
        ValueError: a shape, device, mask or scale that does not fit.
        TypeError: k or v in another dtype than q, or an argument that is no dense floating-point tensor.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: cpu and triton take d up to 256, cuda up to 128; any R and any strides (a non-contiguous last
    dimension is copied). Accumulates in float32 (triton multiplies float32 in tf32 where torch's own switch
    asks for it). Differentiable once in q, k and v; for second derivatives: backend="reference", which "auto"
    takes under torch.func's transforms and in forward mode. Bitwise deterministic, for any number of threads.
    Memory beside inputs and outputs does not grow with T * M.

    Source: Flamingo (arXiv 2204.14198), sections 2.2 and 2.3.

    Example:
        >>> locations = torch.tensor([[False, True, False, True]])
        >>> mask = MediaMask.last_preceding(locations, num_media=2)
        >>> q, k, v = torch.randn(1, 4, 8, 64), torch.randn(1, 2, 64, 8, 64), torch.randn(1, 2, 64, 8, 64)
        >>> out = masked_cross_attention(q, k, v, mask)
        >>> out.shape, out[:, 0].any().item()
        (torch.Size([1, 4, 8, 64]), False)
    """
    checks.expect_tensors(_NAME, q=q, k=k, v=v)
    q, k, v = checks.autocast(q, k, v)
    _validate(q, k, v, mask)
    scale = checks.expect_scale(_NAME, scale, q.shape[-1])
    backend = dispatch.resolve(_NAME, backend, q, k, v)
    if backend == "reference":
        with checks.without_autocast(q):  # it accumulates in float32 itself
            return reference.masked_cross_attention(q, k, v, mask, scale).contiguous()
    averages = mask.policy == "open_flamingo"
    inputs = (
        checks.unit_stride(q),
        checks.unit_stride(k),
        checks.unit_stride(v),
        *mask.spans,
        mask.immediate,
        averages,
        scale,
    )
    if needs_grad(q, k, v):
        return _MaskedCrossAttention.apply(backend, *inputs)
    return FWD[backend](*inputs)[0]


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> None:
    checks.expect_shape(_NAME, "q", q, ("B", "T", "H", "d"), "")
    batch, length, heads, head_dim = q.shape
    expect_media(_NAME, k, v, mask, (batch, length, head_dim), of="q")
    checks.expect_head_groups(_NAME, heads, k.shape[3])
    checks.expect_same_dtype(_NAME, q=q, k=k, v=v)
    checks.expect_same_device(_NAME, q=q, k=k, v=v, mask=mask.lo)


def expect_media(
    operator: str, k: Tensor, v: Tensor, mask: MediaMask, sizes: tuple[int, int, int | str], of: str
) -> None:
    """Check keys, values and a mask against the sizes B, T and d, which come from the tensor named `of`."""
    batch, length, head_dim = sizes
    if not isinstance(mask, MediaMask):
        raise TypeError(
            f"{operator}: expected a MediaMask, got {type(mask).__name__}; build one with "
            "MediaMask.last_preceding(media_locations, num_media)."
        )
    checks.expect_shape(operator, "k", k, (batch, "M", "R", "Hkv", head_dim), f"to match {of}")
    checks.expect_shape(operator, "v", v, tuple(k.shape), "to match k")
    checks.expect_latents(operator, "k", k, 2)
    checks.expect_shape(operator, "a mask", mask.lo, (batch, length), f"to match {of}[:, :T]")
    checks.expect_shape(operator, "a mask over media", mask.start, (batch, k.shape[1]), "to match k[:, :M]")


def _sizes(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> dict[str, int]:
    return {"head_dim": k.shape[4]}


dispatch.register(
    _NAME,
    sizes=_sizes,
    cuda={"head_dim": _LARGEST_OF_CUDA},
    triton={"head_dim": _LARGEST},
    cpu={"head_dim": _LARGEST},
    reference={},
)


class _MaskedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, lo, hi, start, stop, *options):
        out, softmax = FWD[backend](q, k, v, lo, hi, start, stop, *options)
        ctx.save_for_backward(q, k, v, out, softmax, lo, hi, start, stop)
        ctx.backend, ctx.options = backend, options
        return out

    @staticmethod
    @once_differentiable(_NAME)
    def backward(ctx, saved, dout):
        gradients = BWD[ctx.backend](dout, *saved, *ctx.options)
        return None, *gradients, None, None, None, None, None, None, None
