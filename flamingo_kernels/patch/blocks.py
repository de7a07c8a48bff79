"""Parts of gated blocks that adapters for several libraries need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_unhooked
from ..ops.gated_residual import gated_residual
from ..ops.gated_residual_norm import gated_residual_norm

LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"


def is_plain(module: nn.Module, *classes: str) -> bool:
    """Whether calling the module runs the forward of one of these classes, and nothing else."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__name__}" in classes and is_unhooked(module)


def add_gated(
    x: Tensor,  # [B, T, D]
    y: Tensor,  # [B, T, D]
    gate: Tensor,  # [1] or [1, 1, D]
    norm: Any,
    rms_norm: str = "",
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, T, D]
    """`z = x + tanh(gate) * y` and `norm(z)`, in one pass if norm is a LayerNorm or of the class named."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)
    known = is_plain(norm, rms_norm, LAYER_NORM) and norm.weight is not None
    if known and (norm.weight.shape, norm.weight.dtype) == (x.shape[-1:], dtype):
        if is_plain(norm, LAYER_NORM):
            return gated_residual_norm(x, y, gate, norm.weight, norm.bias, eps=norm.eps)
        return gated_residual_norm(x, y, gate, norm.weight, eps=norm.variance_epsilon, norm="rms")
    z = gated_residual(x, y, gate)
    return z, norm(z)
