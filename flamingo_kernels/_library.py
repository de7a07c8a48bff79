"""Schemas and shape functions of the compiled operators; needs torch alone, so everything traces anywhere.

Each operator has one `_fwd` and one `_bwd`, in three overloads: `default`, for which the C++ extension has
kernels, `cuda`, for which the CUDA extension has them, and `triton`. Which one runs is decided before the
call, so that a traced graph holds no choice.

`softmax` is what makes every row's weights anew, `[2, B, H, T]`: the maximum of its scores, in the backend's
own unit, and the sum of the weights relative to it. Their logarithm in one float would round all weights of a
row alike. It is empty where the backward pass makes the softmax anew.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import _cuda

_LIBRARY = torch.library.Library("flamingo_kernels", "DEF")

_SCHEMAS = {
    "masked_cross_attention_fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, "
        "bool averages, float scale) -> (Tensor out, Tensor softmax)"
    ),
    "masked_cross_attention_bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, "
        "Tensor start, Tensor stop, bool immediate, bool averages, float scale) "
        "-> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "perceiver_attention_fwd": (
        "(Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, "
        "Tensor? media_lengths, float scale) -> (Tensor out, Tensor softmax)"
    ),
    "perceiver_attention_bwd": (
        "(Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, "
        "Tensor out, Tensor softmax, Tensor? media_lengths, float scale) "
        "-> (Tensor dq, Tensor dk_media, Tensor dv_media, Tensor dk_latents, Tensor dv_latents)"
    ),
    "gated_residual_fwd": "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    "gated_residual_bwd": "(Tensor dz, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)",
    "gated_residual_norm_fwd": (
        "(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor? bias, float eps, bool rms) "
        "-> (Tensor z, Tensor n, Tensor mean, Tensor rstd)"
    ),
    "gated_residual_norm_bwd": (
        "(Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, Tensor mean, Tensor rstd, "
        "bool rms) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dweight, Tensor dbias)"
    ),
}


def _run_triton(name: str) -> Any:
    """The function `<operator>_<way>` of the operator's `triton_<way>.py`, imported at the first call."""
    operator, _, way = name.rpartition("_")

    def run(*arguments: Any) -> Any:
        module = import_module(f".ops.{operator}.triton_{way}", __package__)
        return getattr(module, name)(*arguments)

    return run


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.define(f"{_name}.triton{_schema}")
    _LIBRARY.define(f"{_name}.cuda{_schema}")
    for _key in ("CUDA", "CPU"):  # on a CPU in Triton's interpreter; see `_triton.reasons`
        _LIBRARY.impl(f"{_name}.triton", _run_triton(_name), _key)


# Inference only, hence one operation; `activation` is a place in `gated_block_decode.api.ACTIVATIONS`.
_LIBRARY.define(
    "gated_block_decode.cuda(Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor norm, "
    "Tensor? norm_bias, Tensor to_q, Tensor to_out, Tensor gate, Tensor ff_norm, Tensor? ff_norm_bias, "
    "Tensor up, Tensor down, Tensor ff_gate, int heads, float scale, float eps, int activation) -> Tensor"
)


def backends_of(name: str) -> dict[str, Any]:
    """What each compiled backend calls for an operation, `<operator>_fwd` or `_bwd`."""
    operation = getattr(torch.ops.flamingo_kernels, name)
    return {"cpu": operation.default, "triton": operation.triton, "cuda": operation.cuda}


def _shapes_of(*overloads: str) -> Any:
    """Registers a shape function."""

    def register(function: Any) -> Any:
        for name in overloads:
            torch.library.register_fake(f"flamingo_kernels::{name}", function, lib=_LIBRARY)
        return function

    return register


def _fresh(tensor: Tensor) -> Tensor:
    """What every kernel returns: a contiguous tensor, whatever the strides of the input."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_shapes_of("masked_cross_attention_fwd")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    batch, length, heads, _ = q.shape
    return _fresh(q), q.new_empty(2, batch, heads, 0 if immediate else length, dtype=torch.float32)


@_shapes_of("masked_cross_attention_fwd.triton")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    from .ops.masked_cross_attention.config import is_one_shot

    batch, length, heads, head_dim = q.shape
    kept = 0 if is_one_shot(immediate, k.shape[2], head_dim, q.dtype) else length
    return _fresh(q), q.new_empty(2, batch, heads, kept, dtype=torch.float32)


@_shapes_of("masked_cross_attention_fwd.cuda")
def _(q, k, v, lo, hi, start, stop, immediate, averages, scale):
    batch, length, heads, _ = q.shape
    kept = 0 if _cuda.is_one_shot(immediate, k.shape[2], q.dtype) else length
    return _fresh(q), q.new_empty(2, batch, heads, kept, dtype=torch.float32)


@_shapes_of(
    "masked_cross_attention_bwd", "masked_cross_attention_bwd.triton", "masked_cross_attention_bwd.cuda"
)
def _(dout, q, k, v, out, softmax, lo, hi, start, stop, immediate, averages, scale):
    return _fresh(q), _fresh(k), _fresh(v)


@_shapes_of("perceiver_attention_fwd", "perceiver_attention_fwd.triton", "perceiver_attention_fwd.cuda")
def _(q, k_media, v_media, k_latents, v_latents, media_lengths, scale):
    batch, latents, heads, _ = q.shape
    return _fresh(q), q.new_empty(2, batch, heads, latents, dtype=torch.float32)


@_shapes_of("perceiver_attention_bwd", "perceiver_attention_bwd.triton", "perceiver_attention_bwd.cuda")
def _(dout, q, k_media, v_media, k_latents, v_latents, out, softmax, media_lengths, scale):
    return tuple(_fresh(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents))


@_shapes_of("gated_residual_fwd", "gated_residual_fwd.triton", "gated_residual_fwd.cuda")
def _(x, y, gate):
    return x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))


@_shapes_of("gated_residual_bwd", "gated_residual_bwd.triton", "gated_residual_bwd.cuda")
def _(dz, y, gate):
    return _fresh(y), gate.new_empty(gate.shape, dtype=torch.float32)


@_shapes_of("gated_residual_norm_fwd", "gated_residual_norm_fwd.triton", "gated_residual_norm_fwd.cuda")
def _(x, y, gate, weight, bias, eps, rms):
    z = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    rows = x.shape[:-1]
    return z, torch.empty_like(z), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@_shapes_of("gated_residual_norm_bwd", "gated_residual_norm_bwd.triton", "gated_residual_norm_bwd.cuda")
def _(dz, dn, y, gate, weight, z, mean, rstd, rms):
    sums = (tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (gate, weight, weight))
    return _fresh(z), _fresh(y), *sums


@_shapes_of("gated_block_decode.cuda")
def _(x, *others):
    return _fresh(x)


def residual_dtype(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    """The dtype of `x + tanh(gate) * y` under torch's type promotion, 0-dimensional gates included."""
    product = torch.result_type(gate, y)
    return torch.promote_types(product, x.dtype)
