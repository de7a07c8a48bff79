"""Attentions of transformers, fused where they are a plain softmax: the kernels compute nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._anatomy import Kind, Linear, Number
from ..layers import Fused

_SDPA = "transformers.integrations.sdpa_attention"


class GroupedAttention(Fused):
    """Base class of the attentions with grouped heads, their parts under the names of transformers."""

    anatomy: Mapping[str, Kind] = {
        "num_key_value_heads": Number("G"),
        "num_key_value_groups": Number("n"),
        "num_heads": Number("G*n"),
        "head_dim": Number("d"),
        "q_proj": Linear("D", "G*n*d"),
        "k_proj": Linear("V", "G*d"),
        "v_proj": Linear("V", "G*d"),
        "o_proj": Linear("G*n*d", "D"),
    }

    config: Any
    num_heads: int
    num_key_value_heads: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def must_stay(self, dropout: float, kwargs: Mapping[str, Any]) -> bool:
        """Whether the original's forward must compute a call.

        It must if the call or the configuration asks for attention weights, if the attention is no softmax,
        if hooks watch it, and in training with dropout.
        """
        asks = kwargs.get("output_attentions") or self.config.output_attentions
        other = not is_softmax(self.config._attn_implementation)
        return bool(asks or other or self.is_watched() or (dropout and self.training))


def is_sdpa(attn: Any) -> bool:
    """Whether the softmax of an attention is "sdpa", not "eager"."""
    return bool(attn.config._attn_implementation == "sdpa")


def is_softmax(implementation: str) -> bool:
    """Whether an implementation is "eager" or "sdpa", and nobody has registered another by that name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(implementation)  # None for "eager", which each model has itself
    if implementation == "sdpa":
        return getattr(function, "__globals__", {}).get("__name__") == _SDPA
    return implementation == "eager" and function is None
