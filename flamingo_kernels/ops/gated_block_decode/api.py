"""One decoding step of a gated cross-attention block over cached media keys and values."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ... import _checks as checks
from ..._backends import cpu, dispatch
from ..._predicates import is_eager, needs_grad
from ...mask import MediaMask
from ..linear.schema import ACTIVATIONS
from ..weights import Norm, expect_gate, expect_linear, expect_norm
from . import reference
from .schema import FWD
from .weights import GatedBlockWeights

_NAME = "gated_block_decode"
_NAMES = ", ".join(map(str, ACTIVATIONS[1:]))


def gated_block_decode(
    x: Tensor,  # [B, D]
    k: Tensor,  # [S, M, R, Hkv, d]
    v: Tensor,  # [S, M, R, Hkv, d]
    mask: MediaMask,
    weights: GatedBlockWeights,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, D]
    """The gated block for one new token of every sequence, each weight read once for all of them::

        q   = to_q(norm(x))                          or  q_norm(to_q(norm(x))), over each head
        z   = x + tanh(gate) * to_out(attention(q, k, v))
        out = z + tanh(ff_gate) * down(act(up(ff_norm(z))))
                                       or  down(act(gate_proj(ff_norm(z))) * up(ff_norm(z)))

    Args:
        x: residual stream `[B, D]`, float32, bfloat16 or float16.
        k: cached keys of the media `[S, M, R, Hkv, d]`, in the dtype of the products; Hkv divides H. S is B,
            or a divisor of it where B / S texts in a row share media, as the beams of a search do.
        v: cached values, like k.
        mask: which media each row sees, for one row a text:
            `MediaMask.cached(locations, num_media=M, length=1)`, and `.fold(B // S)` of it where texts share
            media.
        weights: see `GatedBlockWeights`; matrices in the dtype of k, or of 8-bit integers with a scale.
        scale: factor on the scores. Default: `d ** -0.5`.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Returns:
        `[B, D]` in the dtype that torch's promotion gives the sums.

    Raises:
        ValueError: a shape, device, activation or mask that does not fit.
        TypeError: dtypes that differ.
        UnsupportedError: the requested backend cannot run these inputs, or a gradient is asked for.

    Limits: inference only. Kernels take contiguous matrices, as a copy in every step would take as long as
    the step. cuda takes head_dim up to 128. The kernels read no value on the host and take their working
    memory from torch, so a CUDA graph can capture a step. They compute in float32, round what a product reads
    to its dtype (for weights of integers see `linear`), and the sums once. Bitwise deterministic, for any
    number of threads. Under torch.autocast products take its dtype; matrices in another are cast at each
    call.

    Source: Flamingo (arXiv 2204.14198), section 2.2.

    Example:
        >>> from flamingo_kernels.sublayers import Linear, Norm
        >>> x, k, v = torch.randn(2, 16), torch.randn(2, 3, 5, 2, 8), torch.randn(2, 3, 5, 2, 8)
        >>> mask = MediaMask.cached(torch.tensor([[0, 1, 0], [1, 0, 1]]), num_media=3, length=1)
        >>> norm, gate, square = Norm(torch.ones(16)), torch.zeros(1), Linear(torch.randn(16, 16))
        >>> up, down = Linear(torch.randn(64, 16)), Linear(torch.randn(16, 64))
        >>> weights = GatedBlockWeights(norm, square, square, norm, up, down, gate, gate)
        >>> gated_block_decode(x, k, v, mask, weights).shape
        torch.Size([2, 16])
    """
    asked = dispatch.default_backend if backend == "auto" else backend
    if asked in ("auto", "cpu") and (out := _at_once(x, k, v, mask, weights, scale)) is not None:
        return out
    scale = _validate(x, k, v, mask, weights, scale)
    k, v = checks.autocast(k, v)
    weights = weights.autocast()
    _expect_dtypes(k, v, weights)
    backend = dispatch.resolve(_NAME, backend, x, k, v, *_numbers(weights))
    with checks.without_autocast(x):
        if backend == "reference" or 0 in (
            *x.shape,
            weights.to_q.weight.shape[0],
            weights.up.weight.shape[0],
        ):
            return reference.gated_block_decode(x, k, v, mask, weights, scale)
        if reason := why_not(x, k, v, weights):
            raise dispatch.UnsupportedError(f"{_NAME}: {reason}.", {backend: [reason]})
        return run(backend, x, k, v, mask, weights.tensors(), weights.options(), scale)


def _at_once(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MediaMask,
    weights: GatedBlockWeights,
    scale: float | None,
) -> Tensor | None:
    """The result by the kernels on a processor, which check sizes, dtypes and strides as this file does: that
    takes longer than a small step. None where they refuse, or would not see a mistake.
    """
    if not (_are_usual(x, k, v) and isinstance(weights, GatedBlockWeights) and _is_for(mask, k)):
        return None
    norms = (weights.norm, weights.q_norm or weights.norm, weights.ff_norm)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    known = type(scale) is float and abs(scale) < _LARGEST and weights.activation in ACTIVATIONS[1:]
    if not known or not all(map(_is_right, norms)):
        return None
    tensors = weights.tensors()
    if not all(type(each) in _PLAIN for each in tensors):
        return None
    try:
        return run("cpu", x, k, v, mask, tensors, weights.options(), scale)
    except RuntimeError:
        return None


_PLAIN = (Tensor, nn.Parameter)
_LARGEST = sys.float_info.max


def _are_usual(x: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are plain tensors on a processor that has kernels, and nothing records the call."""
    usual = all(type(each) in _PLAIN and each.is_cpu for each in (x, k, v)) and is_eager(x)
    alone = usual and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return alone and x.ndim == 2 and k.ndim == v.ndim == 5 and k.shape[-1] > 0 and not cpu.why_not()


def _is_right(norm: Norm) -> bool:
    return 0 <= norm.eps < _LARGEST and not (norm.rms and norm.bias is not None)


def _is_for(mask: MediaMask, k: Tensor) -> bool:
    fits = isinstance(mask, MediaMask) and mask.lo.is_cpu
    return fits and mask.num_media == k.shape[1] and len(mask.lo) == len(k)


def run(
    backend: str,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MediaMask,
    tensors: list[Tensor],
    options: tuple[list[float], list[int], int],
    scale: float,
) -> Tensor:
    """The kernels of a backend, of inputs that fit, with `GatedBlockWeights.tensors` and its options."""
    heads = tensors[2].shape[0] // k.shape[-1]  # those of to_q
    lo, hi = mask.lo.reshape(-1), mask.hi.reshape(-1)
    step = (checks.unit_stride(x), checks.unit_stride(k), checks.unit_stride(v), lo, hi)
    out: Tensor = FWD[backend](*step, tensors, heads, scale, *options)
    return out


def why_not(x: Tensor, k: Tensor, v: Tensor, weights: GatedBlockWeights) -> str:
    """Why the kernels refuse a call that the reference takes, or an empty string."""
    if needs_grad(x, k, v, *weights.by_name().values()):
        return "it has no gradient; call it under torch.no_grad()"
    for name, linear in weights.linears().items():
        if not linear.weight.is_contiguous():
            strides = linear.weight.stride()
            return f"expected a contiguous {name}.weight, got strides {strides}; make it so once"
    return ""


def _numbers(weights: GatedBlockWeights) -> list[Tensor]:
    """The tensors whose dtype the kernels must know; integers are known where they are expected."""
    return [tensor for tensor in weights.by_name().values() if tensor.dtype != torch.int8]


def _validate(
    x: Tensor, k: Tensor, v: Tensor, mask: MediaMask, weights: GatedBlockWeights, scale: float | None
) -> float:
    """Raise unless the arguments fit; returns the scale."""
    if not isinstance(weights, GatedBlockWeights):
        raise TypeError(f"{_NAME}: expected weights to be GatedBlockWeights, got {type(weights).__name__}.")
    if weights.activation not in ACTIVATIONS[1:]:
        raise ValueError(f"{_NAME}: expected activation to be one of {_NAMES}, got {weights.activation!r}.")
    checks.expect_tensors(_NAME, x=x, k=k, v=v)
    checks.expect_shape(_NAME, "x", x, ("B", "D"), "")
    _expect_media(x, k, v, mask)
    scale = checks.expect_scale(_NAME, scale, k.shape[-1])
    _expect_weights(weights, x.shape[1], k.shape[3], k.shape[4])
    given = weights.by_name()
    integers = [f"{name}.weight" for name, linear in weights.linears().items() if linear.scale is not None]
    numbers = {name: tensor for name, tensor in given.items() if name not in integers}
    checks.expect_floating_point(_NAME, x=x, k=k, v=v, **numbers)
    checks.expect_same_device(_NAME, x=x, k=k, v=v, mask=mask.lo, **given)
    return scale


def _expect_media(x: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> None:
    """Keys and values of a divisor of B sequences, and a mask with a row for each text."""
    if not isinstance(mask, MediaMask):
        raise TypeError(
            f"{_NAME}: expected a MediaMask, got {type(mask).__name__}; build one with "
            "MediaMask.cached(media_locations, num_media, length=1)."
        )
    checks.expect_shape(_NAME, "k", k, ("S", "M", "R", "Hkv", "d"), "")
    batch, sequences = len(x), len(k)
    if batch != sequences and (sequences == 0 or batch % sequences):
        raise ValueError(f"{_NAME}: expected k of B={batch} sequences or a divisor of them, got {sequences}.")
    checks.expect_shape(_NAME, "v", v, tuple(k.shape), "to match k")
    checks.expect_latents(_NAME, "k", k, 2)
    rows = (sequences, batch // sequences if sequences else "texts")
    checks.expect_shape(_NAME, "a mask", mask.lo, rows, "to match x and k")
    checks.expect_shape(_NAME, "a mask over media", mask.start, tuple(k.shape[:2]), "to match k[:, :M]")


def _expect_weights(weights: GatedBlockWeights, width: int, kv_heads: int, head_dim: int) -> None:
    w = weights
    expect_norm(_NAME, "norm", w.norm, width)
    expect_linear(_NAME, "to_q", w.to_q, ("H * d", width), "to match x")
    inner = len(w.to_q.weight)
    checks.expect_head_groups(_NAME, inner // head_dim, kv_heads)
    whole = (inner // head_dim * head_dim, width)
    checks.expect_shape(_NAME, "to_q.weight", w.to_q.weight, whole, "to match x and k")
    expect_linear(_NAME, "to_out", w.to_out, (width, inner), "to match to_q.weight")
    expect_norm(_NAME, "ff_norm", w.ff_norm, width)
    expect_linear(_NAME, "up", w.up, ("F", width), "to match x")
    hidden = len(w.up.weight)
    expect_linear(_NAME, "down", w.down, (width, hidden), "to match up.weight")
    if w.gate_proj is not None:
        expect_linear(_NAME, "gate_proj", w.gate_proj, (hidden, width), "to match up.weight")
    if w.q_norm is not None:
        expect_norm(_NAME, "q_norm", w.q_norm, head_dim)
    expect_gate(_NAME, "gate", w.gate, width)
    expect_gate(_NAME, "ff_gate", w.ff_gate, width)


def _expect_dtypes(k: Tensor, v: Tensor, weights: GatedBlockWeights) -> None:
    """Products are in one dtype, that of k, or of integers."""
    linears = weights.linears()
    matrices = {f"{name}.weight": each.weight for name, each in linears.items() if each.scale is None}
    biases = {f"{name}.bias": each.bias for name, each in linears.items() if each.bias is not None}
    checks.expect_same_dtype(_NAME, k=k, v=v, **matrices, **biases)
    for name, linear in linears.items():
        if linear.scale is None:
            continue
        for field, tensor, dtype in (
            ("weight", linear.weight, torch.int8),
            ("scale", linear.scale, torch.float32),
        ):
            if tensor.dtype != dtype:
                raise TypeError(f"{_NAME}: expected {name}.{field} in {dtype}, got {tensor.dtype}.")


def _sizes(x: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> dict[str, int]:
    return {"head_dim": k.shape[4]}


dispatch.register(
    _NAME,
    sizes=_sizes,
    differentiable=False,
    triton={},
    cuda={"head_dim": 128},
    cpu={},
    reference={},
)
