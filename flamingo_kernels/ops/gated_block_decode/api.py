"""One decoding step of a gated cross-attention block over cached media keys and values."""

from __future__ import annotations

from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import needs_grad
from ...mask import MediaMask
from ..masked_cross_attention.api import expect_media
from . import reference
from .schema import STEP
from .weights import ACTIVATIONS, GatedBlockWeights

_NAME = "gated_block_decode"
_MATRICES = ("to_q", "to_out", "up", "down")
_OPTIONAL = ("norm_bias", "ff_norm_bias")


def gated_block_decode(
    x: Tensor,  # [B, D]
    k: Tensor,  # [B, M, R, Hkv, d]
    v: Tensor,  # [B, M, R, Hkv, d]
    mask: MediaMask,
    weights: GatedBlockWeights,
    *,
    scale: float | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:  # [B, D]
    """The gated block for one new token of every sequence, in four launches on a GPU::

        z   = x + tanh(gate) * attention(norm(x) @ to_q.T, k, v) @ to_out.T
        out = z + tanh(ff_gate) * activation(ff_norm(z) @ up.T) @ down.T

    Args:
        x: residual stream `[B, D]`, float32, bfloat16 or float16.
        k: cached keys of the media `[B, M, R, Hkv, d]`, same dtype; Hkv divides H.
        v: cached values, like k.
        mask: which media each row sees, for one row a sequence: `MediaMask.cached(locations, M, length=1)`.
        weights: see `GatedBlockWeights`; matrices in the dtype of x.
        scale: factor on the scores. Default: `d ** -0.5`.
        eps: added to the variance in both LayerNorms. Default: 1e-5.
        activation: "gelu" (exact), "squared_relu" or "relu". Default: "gelu".
        backend: "auto", "cuda" or "reference".

    Returns:
        `[B, D]` in the dtype of x.

    Raises:
        ValueError: a shape, device, activation or mask that does not fit.
        TypeError: dtypes that differ.
        UnsupportedError: the requested backend cannot run these inputs, or a gradient is asked for.

    Limits: inference only. cuda takes up to 16 sequences, head_dim up to 128, H * d up to 16384, and
        contiguous
    matrices: a copy in every step would take as long as the step. It reads no value on the host and takes its
    working memory from torch, so a CUDA graph can capture it. Bitwise deterministic.

    Source: Flamingo (arXiv 2204.14198), section 2.2.

    Example:
        >>> x, k, v = torch.randn(2, 16), torch.randn(2, 3, 5, 2, 8), torch.randn(2, 3, 5, 2, 8)
        >>> mask = MediaMask.cached(torch.tensor([[0, 1, 0], [1, 0, 1]]), num_media=3, length=1)
        >>> norm, gate = (torch.ones(16), torch.zeros(16)), torch.ones(1)
        >>> attn, ff = (torch.randn(16, 16), torch.randn(16, 16)), (torch.randn(64, 16), torch.randn(16, 64))
        >>> weights = GatedBlockWeights(*norm, *attn, gate, *norm, *ff, gate)
        >>> gated_block_decode(x, k, v, mask, weights).shape
        torch.Size([2, 16])
    """
    scale = _validate(x, k, v, mask, weights, activation, scale)
    eps = checks.expect_number(_NAME, "eps", eps, least=0)
    backend = dispatch.resolve(_NAME, backend, x, k, v, *weights)
    if backend == "reference":
        return reference.gated_block_decode(x, k, v, mask, weights, scale, eps, activation)
    if reason := _why_not(x, k, v, weights):
        raise dispatch.UnsupportedError(f"{_NAME}: {reason}.", {backend: [reason]})
    x, k, v = x.contiguous(), checks.unit_stride(k), checks.unit_stride(v)
    weights = GatedBlockWeights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]
    heads = weights.to_q.shape[0] // k.shape[-1]
    options = (heads, scale, eps, ACTIVATIONS.index(activation))
    lo, hi, *_ = mask.spans
    return STEP["cuda"](x, k, v, lo, hi, *weights, *options)


def _validate(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MediaMask,
    weights: GatedBlockWeights,
    activation: str,
    scale: float | None,
) -> float:
    """Raise unless the arguments fit; returns the scale."""
    if activation not in ACTIVATIONS[1:]:
        legal = ", ".join(map(str, ACTIVATIONS[1:]))
        raise ValueError(f"{_NAME}: activation={activation!r} is not one of {legal}.")
    if not isinstance(weights, GatedBlockWeights):
        raise TypeError(f"{_NAME}: expected weights to be GatedBlockWeights, got {type(weights).__name__}.")
    given = {
        name: weight
        for name, weight in weights._asdict().items()
        if name not in _OPTIONAL or weight is not None
    }
    checks.expect_tensors(_NAME, x=x, k=k, v=v, **given)
    checks.expect_shape(_NAME, "x", x, ("B", "D"), "")
    batch, dim = x.shape
    expect_media(_NAME, k, v, mask, (batch, 1, "d"), of="x")
    scale = checks.expect_scale(_NAME, scale, k.shape[-1])
    checks.expect_shape(_NAME, "to_q", weights.to_q, ("H * d", dim), "to match x")
    checks.expect_shape(_NAME, "up", weights.up, ("F", dim), "to match x")
    inner, hidden = weights.to_q.shape[0], weights.up.shape[0]
    checks.expect_head_groups(_NAME, inner // k.shape[-1], k.shape[3])
    checks.expect_shape(
        _NAME, "to_q", weights.to_q, (inner // k.shape[-1] * k.shape[-1], dim), "to match x and k"
    )
    checks.expect_shape(_NAME, "to_out", weights.to_out, (dim, inner), "to match to_q")
    checks.expect_shape(_NAME, "down", weights.down, (dim, hidden), "to match up")
    for name in ("norm", "norm_bias", "ff_norm", "ff_norm_bias"):
        if (vector := getattr(weights, name)) is not None:
            checks.expect_shape(_NAME, name, vector, (dim,), "to match x")
    for name in ("gate", "ff_gate"):
        if getattr(weights, name).numel() not in (1, dim):
            shape = tuple(getattr(weights, name).shape)
            raise ValueError(f"{_NAME}: expected {name} of 1 or D={dim} elements, got {shape}.")
    checks.expect_same_dtype(_NAME, x=x, k=k, v=v, **{name: getattr(weights, name) for name in _MATRICES})
    checks.expect_floating_point(_NAME, **given)
    checks.expect_same_device(_NAME, x=x, k=k, v=v, mask=mask.lo, **given)
    return scale


def _why_not(x: Tensor, k: Tensor, v: Tensor, weights: GatedBlockWeights) -> str:
    """Why the kernels refuse a call that the reference takes, or an empty string."""
    if needs_grad(x, k, v, *weights):
        return "it has no gradient; call it under torch.no_grad()"
    for name in _MATRICES:
        if not getattr(weights, name).is_contiguous():
            strides = getattr(weights, name).stride()
            return f"expected a contiguous {name}, got strides {strides}; make it so once"
    return ""


def _sizes(x: Tensor, k: Tensor, v: Tensor, *weights: Tensor | None) -> dict[str, int]:
    to_q = weights[2]
    assert to_q is not None
    return {"B": x.shape[0], "head_dim": k.shape[4], "H * d": to_q.shape[0]}


dispatch.register(
    _NAME,
    sizes=_sizes,
    differentiable=False,
    cuda={"B": 16, "head_dim": 128, "H * d": 16384},
    reference={},
)
