"""Schemas and shape functions of the compiled operators; needs torch alone, so everything traces anywhere.

Each operator has one `_fwd` and one `_bwd`; the C++ extension supplies their CPU kernels. `softmax` is the
maximum and the sum of every row's softmax, `[2, B, H, T]`: their logarithm in one float would round all
weights of a row alike. It is empty where each row sees one medium: there the backward pass makes it anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("flamingo_kernels", "DEF")

_LIBRARY.define(
    "masked_cross_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, "
    "Tensor stop, bool immediate, float scale) -> (Tensor out, Tensor softmax)"
)
_LIBRARY.define(
    "masked_cross_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, "
    "Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
_LIBRARY.define(
    "perceiver_attention_fwd(Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, "
    "Tensor v_latents, Tensor? media_lengths, float scale) -> (Tensor out, Tensor softmax)"
)
_LIBRARY.define(
    "perceiver_attention_bwd(Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, "
    "Tensor v_latents, Tensor out, Tensor softmax, Tensor? media_lengths, float scale) "
    "-> (Tensor dq, Tensor dk_media, Tensor dv_media, Tensor dk_latents, Tensor dv_latents)"
)
_LIBRARY.define("gated_residual_fwd(Tensor x, Tensor y, Tensor gate) -> Tensor")
_LIBRARY.define("gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)")
_LIBRARY.define(
    "gated_residual_norm_fwd(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor? bias, float eps, "
    "bool rms) -> (Tensor z, Tensor n, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "gated_residual_norm_bwd(Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, "
    "Tensor mean, Tensor rstd, bool rms) "
    "-> (Tensor dx, Tensor dy, Tensor dgate, Tensor dweight, Tensor dbias)"
)


def _fresh(tensor: Tensor) -> Tensor:
    """What every kernel returns: a contiguous tensor, whatever the strides of the input."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.register_fake("flamingo_kernels::masked_cross_attention_fwd", lib=_LIBRARY)
def _(q, k, v, lo, hi, start, stop, immediate, scale):
    batch, length, heads, _ = q.shape
    return _fresh(q), q.new_empty(2, batch, heads, 0 if immediate else length, dtype=torch.float32)


@torch.library.register_fake("flamingo_kernels::masked_cross_attention_bwd", lib=_LIBRARY)
def _(dout, q, k, v, out, softmax, lo, hi, start, stop, immediate, scale):
    return _fresh(q), _fresh(k), _fresh(v)


@torch.library.register_fake("flamingo_kernels::perceiver_attention_fwd", lib=_LIBRARY)
def _(q, k_media, v_media, k_latents, v_latents, media_lengths, scale):
    batch, latents, heads, _ = q.shape
    return _fresh(q), q.new_empty(2, batch, heads, latents, dtype=torch.float32)


@torch.library.register_fake("flamingo_kernels::perceiver_attention_bwd", lib=_LIBRARY)
def _(dout, q, k_media, v_media, k_latents, v_latents, out, softmax, media_lengths, scale):
    return tuple(_fresh(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents))


@torch.library.register_fake("flamingo_kernels::gated_residual_fwd", lib=_LIBRARY)
def _(x, y, gate):
    return x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))


@torch.library.register_fake("flamingo_kernels::gated_residual_bwd", lib=_LIBRARY)
def _(dz, y, gate):
    return _fresh(y), gate.new_empty(gate.shape, dtype=torch.float32)


@torch.library.register_fake("flamingo_kernels::gated_residual_norm_fwd", lib=_LIBRARY)
def _(x, y, gate, weight, bias, eps, rms):
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    rows = x.shape[:-1]
    return z, torch.empty_like(z), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("flamingo_kernels::gated_residual_norm_bwd", lib=_LIBRARY)
def _(dz, dn, y, gate, weight, z, mean, rstd, rms):
    sums = (tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (gate, weight, weight))
    return _fresh(z), _fresh(y), *sums


def residual_dtype(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    """The dtype of `x + tanh(gate) * y` under torch's type promotion, 0-dimensional gates included."""
    product = torch.result_type(gate, y)
    return torch.promote_types(product, x.dtype)
