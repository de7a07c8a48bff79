"""What a decoding step is given of a block."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = (None, "gelu", "squared_relu", "relu")  # as `Activation` in csrc/cuda/params.h counts them


class GatedBlockWeights(NamedTuple):
    """The parameters of a gated cross-attention block but for the projection of its media.

    Attributes:
        norm, norm_bias: LayerNorm before the attention `[D]`; the bias may be None.
        to_q: `[H * d, D]`.
        to_out: `[D, H * d]`.
        gate: alpha of the attention before tanh, 1 element or D.
        ff_norm, ff_norm_bias: LayerNorm before the feed-forward network `[D]`; the bias may be None.
        up: its first product `[F, D]`.
        down: its second `[D, F]`.
        ff_gate: its alpha, 1 element or D.
    """

    norm: Tensor
    norm_bias: Tensor | None
    to_q: Tensor
    to_out: Tensor
    gate: Tensor
    ff_norm: Tensor
    ff_norm_bias: Tensor | None
    up: Tensor
    down: Tensor
    ff_gate: Tensor
