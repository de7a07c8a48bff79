"""Perceiver attention: latents attend to the features of a medium and to themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import needs_grad
from ..once_differentiable import once_differentiable
from . import reference
from .schema import BWD, FWD

_NAME = "perceiver_attention"
_LARGEST_OF_CUDA = 128  # head_dim
_LARGEST = 256  # head_dim that the compiled kernels keep in one block


def perceiver_attention(
    q: Tensor,  # [N, R, H, d]
    k_media: Tensor,  # [N, S, Hkv, d]
    v_media: Tensor,  # [N, S, Hkv, d]
    k_latents: Tensor,  # [N, L, Hkv, d]
    v_latents: Tensor,  # [N, L, Hkv, d]
    *,
    media_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [N, R, H, d]
    """Latents attend to `[media ; latents]`, read as two segments that are never concatenated::

        out = softmax(scale * q @ [K_media ; K_latents].T) @ [V_media ; V_latents]

        keys           media 0..S-1        latents
        a whole clip   # # # # # # # #     # # #
        length 5       # # # # # . . .     # # #

    Args:
        q: queries `[N, R, H, d]`, one row of latents for each of N clips; float32, bfloat16 or float16
            (the reference takes float64 too).
        k_media: keys of the flattened frames x positions, `[N, S, Hkv, d]`, same dtype; Hkv divides H.
        v_media: values, like k_media.
        k_latents: keys of the latents `[N, L, Hkv, d]` (L = R in a resampler).
        v_latents: values, like k_latents.
        media_lengths: integer `[N]`, how many of the S media keys of each clip are real, between 0 and
            S (larger counts as S, smaller as 0). Default: all.
        scale: factor on the scores. Default: `d ** -0.5`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `[N, R, H, d]` in the dtype of q, contiguous.

    Raises:
        ValueError: a shape, device or scale that does not fit, or no latents (L = 0).
        TypeError: dtypes that differ, or an argument that is no dense floating-point tensor.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: cpu and triton take d up to 256, cuda up to 128; any strides (a non-contiguous last dimension is
    copied). Accumulates in float32 (triton multiplies float32 in tf32 where torch's own switch asks for it).
    Differentiable once in all five tensors; for second derivatives: backend="reference", which "auto" takes
    under torch.func's transforms and in forward mode. Bitwise deterministic, for any number of threads.

    Source: Flamingo (arXiv 2204.14198), section 2.1 and appendix A.1.1.

    Example:
        >>> q, latents = torch.randn(2, 64, 8, 64), torch.randn(2, 64, 8, 64)
        >>> media = torch.randn(2, 256, 8, 64)
        >>> perceiver_attention(q, media, media, latents, latents).shape
        torch.Size([2, 64, 8, 64])
    """
    given = {"q": q, "k_media": k_media, "v_media": v_media, "k_latents": k_latents, "v_latents": v_latents}
    checks.expect_tensors(_NAME, **given)
    tensors = checks.autocast(*given.values())
    _validate(*tensors, media_lengths=media_lengths)
    scale = checks.expect_scale(_NAME, scale, q.shape[-1])
    if media_lengths is not None:
        media_lengths = media_lengths.long().clamp(0, k_media.shape[1]).int()
    backend = dispatch.resolve(_NAME, backend, *tensors)
    if backend == "reference":
        with checks.without_autocast(q):  # it accumulates in float32 itself
            return reference.perceiver_attention(
                *tensors, media_lengths=media_lengths, scale=scale
            ).contiguous()
    inputs = (*map(checks.unit_stride, tensors), media_lengths, scale)
    return _PerceiverAttention.apply(backend, *inputs) if needs_grad(*tensors) else FWD[backend](*inputs)[0]


def _validate(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    *,
    media_lengths: Tensor | None,
) -> None:
    checks.expect_shape(_NAME, "q", q, ("N", "R", "H", "d"), "")
    clips, _, heads, head_dim = q.shape
    checks.expect_shape(_NAME, "k_media", k_media, (clips, "S", "Hkv", head_dim), "to match q")
    checks.expect_shape(_NAME, "v_media", v_media, tuple(k_media.shape), "to match k_media")
    kv_heads = k_media.shape[2]
    checks.expect_shape(_NAME, "k_latents", k_latents, (clips, "L", kv_heads, head_dim), "to match k_media")
    checks.expect_shape(_NAME, "v_latents", v_latents, tuple(k_latents.shape), "to match k_latents")
    checks.expect_head_groups(_NAME, heads, kv_heads)
    checks.expect_latents(_NAME, "k_latents", k_latents, 1)
    checks.expect_same_dtype(
        _NAME, q=q, k_media=k_media, v_media=v_media, k_latents=k_latents, v_latents=v_latents
    )
    if media_lengths is not None:
        checks.expect_tensors(_NAME, media_lengths=media_lengths)
        checks.expect_shape(_NAME, "media_lengths", media_lengths, (clips,), "to match q[:N]")
        if media_lengths.dtype not in checks.INTEGERS:
            raise TypeError(f"{_NAME}: expected integer media_lengths, got {media_lengths.dtype}.")
    checks.expect_same_device(
        _NAME,
        q=q,
        k_media=k_media,
        v_media=v_media,
        k_latents=k_latents,
        v_latents=v_latents,
        media_lengths=media_lengths,
    )


dispatch.register(
    _NAME,
    sizes=lambda q, *_: {"head_dim": q.shape[-1]},
    cuda={"head_dim": _LARGEST_OF_CUDA},
    triton={"head_dim": _LARGEST},
    cpu={"head_dim": _LARGEST},
    reference={},
)


class _PerceiverAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k_media, v_media, k_latents, v_latents, media_lengths, scale):
        tensors = (q, k_media, v_media, k_latents, v_latents)
        out, softmax = FWD[backend](*tensors, media_lengths, scale)
        ctx.save_for_backward(*tensors, out, softmax, media_lengths)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    @once_differentiable(_NAME)
    def backward(ctx, saved, dout):
        gradients = BWD[ctx.backend](dout, *saved, ctx.scale)
        return None, *gradients, None, None
