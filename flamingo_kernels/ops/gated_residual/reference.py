"""What the gated residual computes, in plain PyTorch: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # [], [1] or [D]
) -> Tensor:  # [..., D]
    return x + torch.tanh(gate) * y
