"""What looks into an operator while it runs, and so sees nothing of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def transform() -> str:
    """What transforms the code that runs now, operation by operation, or an empty string."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func or torch.vmap"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else ""


def is_batched(tensor: Tensor | None) -> bool:
    """Whether `is_grads_batched=True` made this gradient, which `transform` does not notice."""
    return tensor is not None and torch._C._dispatch_keys(tensor).has("Batched")


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows this tensor."""
    in_forward_mode = tensor is not None and forward_ad._current_level >= 0
    return in_forward_mode and forward_ad.unpack_dual(tensor).tangent is not None
