"""Plain modules as arguments of the sublayers: each `as_` function gives None for a module that is not plain.

A plain module computes what its class says and nothing else. A module with hooks, another forward, or weights
of a tensor subclass, as adapters and quantisation make them, is not plain, and is called as it is. A decoding
step on a CPU also calls its modules: there the host's work between the products counts, and calling modules
is the least of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backends import dispatch
from .._predicates import autocast_dtype, is_eager, is_ordinary, is_plain, is_unhooked
from ..ops.weights import Linear, Norm
from .activation import ACTIVATIONS

_LARGEST_STEP = 2**18  # bytes of x: 16 sequences in float32 at a width of 4096
_MODELS = "transformers.models"
_RMS_NORMS = {  # what each calls its weight and its eps
    f"{_MODELS}.idefics.modeling_idefics.IdeficsRMSNorm": ("weight", "variance_epsilon"),
    f"{_MODELS}.mllama.modeling_mllama.MllamaTextRMSNorm": ("weight", "variance_epsilon"),
    f"{_MODELS}.evolla.modeling_evolla.EvollaRMSNorm": ("weight", "variance_epsilon"),
    "torchtune.modules.rms_norm.RMSNorm": ("scale", "eps"),
}


def as_norm(module: Any, x: Tensor) -> Norm | None:
    """A plain LayerNorm or RMSNorm over one dimension, in a dtype that fits x."""
    if not is_norm(module):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    weight, eps = (getattr(module, name) for name in _names_of(module))
    return Norm(weight, eps=eps, rms=True) if weight.dtype == x.dtype else None


def is_norm(module: Any) -> bool:
    """Whether a module is a plain LayerNorm or RMSNorm over one dimension, with a weight."""
    weight: Any = getattr(module, _names_of(module)[0], None)
    if not is_ordinary(weight) or weight.ndim != 1:  # quantised layers have a method of that name
        return False
    return is_plain(module, nn.LayerNorm, *_RMS_NORMS)


def _names_of(norm: Any) -> tuple[str, str]:
    """What a norm calls its weight and its eps."""
    cls = type(norm)
    return _RMS_NORMS.get(f"{cls.__module__}.{cls.__name__}", ("weight", "eps"))


def as_linear(module: Any, x: Tensor) -> Linear | None:
    """A plain linear layer in the dtype of x, or under autocast in any dtype that it casts."""
    if not is_plain(module, nn.Linear) or not is_ordinary(module.weight):
        return None
    dtypes = (x.dtype,) if autocast_dtype(x.device) is None else dispatch.KERNEL_DTYPES
    return Linear(module.weight, module.bias) if module.weight.dtype in dtypes else None


def has_integers(module: Any) -> bool:
    """Whether a module is a linear layer with a weight of integers, see `quantize`."""
    return hasattr(module, "integer_weight")


def as_weight(module: Any, x: Tensor) -> Linear | None:
    """The same for a decoding step, which takes weights of integers, too."""
    if not has_integers(module):
        return as_linear(module, x)
    fits = is_unhooked(module) and (module.bias is None or module.bias.dtype == x.dtype)
    weight, scale = module.integer_weight()
    return Linear(weight, module.bias, scale) if fits else None


def as_activation(module: Any) -> str | None:
    """The name of a plain activation."""
    if is_plain(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if is_plain(module, "transformers.activations.GELUActivation") and module.act is F.gelu:
        return "gelu"
    return next((name for name, act in ACTIVATIONS.items() if is_plain(module, *act.modules)), None)


class FeedForward(NamedTuple):
    """Arguments of `gated_feed_forward`."""

    norm: Norm
    up: Linear
    activation: str
    down: Linear
    gate_proj: Linear | None = None


def as_feed_forward(
    x: Tensor, norm: Any, up: Any, activation: Any, down: Any, gate_proj: Any = None
) -> FeedForward | None:
    """A feed-forward network of plain modules; with `gate_proj` a gated linear unit."""
    if _is_small_step(x):
        return None
    plain_norm, name = as_norm(norm, x), as_activation(activation)
    first, last = as_linear(up, x), as_linear(down, x)
    beside = None if gate_proj is None else as_linear(gate_proj, x)
    if plain_norm is None or name is None or first is None or last is None:
        return None
    if gate_proj is not None and beside is None:
        return None
    return FeedForward(plain_norm, first, name, last, beside)


def as_glu(x: Tensor, norm: Any, mlp: Any, kind: str) -> FeedForward | None:
    """A norm and the gated linear unit behind it: a module of the class named, with Llama's attributes."""
    if not is_plain(mlp, kind):
        return None
    return as_feed_forward(x, norm, mlp.up_proj, mlp.act_fn, mlp.down_proj, mlp.gate_proj)


class CrossAttention(NamedTuple):
    """Arguments of `gated_cross_attention`."""

    norm: Norm
    to_q: Linear
    to_out: Linear
    q_norm: Norm | None = None


def as_cross_attention(
    x: Tensor, norm: Any, to_q: Any, to_out: Any, q_norm: Any = None
) -> CrossAttention | None:
    """The plain modules around the core of a cross-attention."""
    if _is_small_step(x):
        return None
    plain_norm, first, last = as_norm(norm, x), as_linear(to_q, x), as_linear(to_out, x)
    between = None if q_norm is None else as_norm(q_norm, x)
    if plain_norm is None or first is None or last is None or (q_norm is not None and between is None):
        return None
    return CrossAttention(plain_norm, first, last, between)


def _is_small_step(x: Tensor) -> bool:
    """Whether x `[B, 1, D]` is one token a sequence on a CPU, where a sublayer would save nothing."""
    few = x.device.type == "cpu" and x.shape[-2] == 1 and x.numel() * x.dtype.itemsize < _LARGEST_STEP
    return few and not torch.is_grad_enabled() and is_eager(x)
