"""Modules that compute what their class says and nothing else, as arguments of the sublayers.

A module with hooks, another forward, or weights of a tensor subclass, as adapters and quantization make them,
is not plain: then it is called, and nothing is computed in its place. Neither are those of a step of decoding
on a CPU, where the host's work between the products counts, and to call modules is the least of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backends import dispatch
from .._predicates import autocast_dtype, is_eager, is_ordinary, is_plain
from . import Linear, Norm

_STEP = 2**18  # bytes: of 16 sequences in float32 at a width of 4096
_MODELS = "transformers.models"
_RMS_NORMS = (
    f"{_MODELS}.idefics.modeling_idefics.IdeficsRMSNorm",
    f"{_MODELS}.mllama.modeling_mllama.MllamaTextRMSNorm",
    f"{_MODELS}.evolla.modeling_evolla.EvollaRMSNorm",
)
_ACTIVATIONS: dict[str, tuple[type[nn.Module] | str, ...]] = {
    "relu": (nn.ReLU,),
    "squared_relu": ("flamingo.modules.SquaredReLU", "transformers.activations.ReLUSquaredActivation"),
    "silu": (nn.SiLU, "transformers.activations.SiLUActivation"),
}


def norm_of(module: Any, x: Tensor) -> Norm | None:
    """A plain LayerNorm or RMSNorm over one dimension, in a dtype that fits x."""
    if not is_norm(module):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    if module.weight.dtype != x.dtype:
        return None
    return Norm(module.weight, eps=module.variance_epsilon, rms=True)


def is_norm(module: Any) -> bool:
    """Whether it is a plain LayerNorm or RMSNorm over one dimension, with a weight."""
    weight: Any = getattr(module, "weight", None)
    if not is_ordinary(weight) or weight.ndim != 1:  # quantised layers have a method of that name
        return False
    return is_plain(module, nn.LayerNorm, *_RMS_NORMS)


def linear_of(module: Any, x: Tensor) -> Linear | None:
    """A plain linear layer, in the dtype of x, or under autocast in any that it casts."""
    if not is_plain(module, nn.Linear) or not is_ordinary(module.weight):
        return None
    dtypes = (x.dtype,) if autocast_dtype(x.device) is None else dispatch.KERNEL_DTYPES
    return Linear(module.weight, module.bias) if module.weight.dtype in dtypes else None


def activation_of(module: Any) -> str | None:
    """The name of a plain activation."""
    if is_plain(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if is_plain(module, "transformers.activations.GELUActivation") and module.act is F.gelu:
        return "gelu"
    return next((name for name, kinds in _ACTIVATIONS.items() if is_plain(module, *kinds)), None)


class FeedForward(NamedTuple):
    """Arguments of `gated_feed_forward`."""

    norm: Norm
    hidden: Linear
    activation: str
    output: Linear
    factor: Linear | None = None


def feed_forward_of(
    x: Tensor, norm: Any, hidden: Any, activation: Any, output: Any, factor: Any = None
) -> FeedForward | None:
    """A feed-forward network of plain parts; with `factor` a gated linear unit."""
    if _is_step(x):
        return None
    before, act = norm_of(norm, x), activation_of(activation)
    first, last = linear_of(hidden, x), linear_of(output, x)
    beside = None if factor is None else linear_of(factor, x)
    if before is None or act is None or first is None or last is None or (factor is not None and not beside):
        return None
    return FeedForward(before, first, act, last, beside)


def glu_of(x: Tensor, norm: Any, mlp: Any, kind: str) -> FeedForward | None:
    """A norm and the gated linear unit behind it, of the class named, with the names of Llama's."""
    if not is_plain(mlp, kind):
        return None
    return feed_forward_of(x, norm, mlp.gate_proj, mlp.act_fn, mlp.down_proj, mlp.up_proj)


class CrossAttention(NamedTuple):
    """Arguments of `gated_cross_attention`."""

    norm: Norm
    to_q: Linear
    to_out: Linear
    q_norm: Norm | None = None


def cross_attention_of(
    x: Tensor, norm: Any, to_q: Any, to_out: Any, q_norm: Any = None
) -> CrossAttention | None:
    """What is around the core of a cross-attention of plain parts."""
    if _is_step(x):
        return None
    before, first, last = norm_of(norm, x), linear_of(to_q, x), linear_of(to_out, x)
    between = None if q_norm is None else norm_of(q_norm, x)
    if before is None or first is None or last is None or (q_norm is not None and not between):
        return None
    return CrossAttention(before, first, last, between)


def _is_step(x: Tensor) -> bool:
    """Whether x `[B, 1, D]` is one token a sequence on a CPU, of which a sublayer has nothing to save.

    Not where CUDA is emulated there: its operator makes a whole block of the parts.
    """
    few = x.device.type == "cpu" and x.shape[-2] == 1 and x.numel() * x.dtype.itemsize < _STEP
    called = few and not torch.is_grad_enabled() and is_eager(x)
    return called and not dispatch.is_chosen("gated_block_decode", "cuda")
