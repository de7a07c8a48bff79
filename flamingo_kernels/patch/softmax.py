"""Whether an attention of transformers is a plain softmax, which is all that the kernels compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

_SDPA = "transformers.integrations.sdpa_attention"


class Attention(Protocol):
    """A fused attention of a model of transformers."""

    config: Any
    training: bool

    def is_watched(self) -> bool: ...


def must_stay(attn: Attention, dropout: float, kwargs: Mapping[str, Any]) -> bool:
    """Whether the original's forward must compute a call.

    It must if the call or the configuration asks for attention weights, if the attention is no softmax, if
    hooks watch it, and in training with dropout.
    """
    asks = kwargs.get("output_attentions") or attn.config.output_attentions
    other = not is_softmax(attn.config._attn_implementation)
    return bool(asks or other or attn.is_watched() or (dropout and attn.training))


def is_softmax(implementation: str) -> bool:
    """Whether an implementation is "eager" or "sdpa", and nobody has registered another by that name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(implementation)  # None for "eager", which each model has itself
    if implementation == "sdpa":
        return getattr(function, "__globals__", {}).get("__name__") == _SDPA
    return implementation == "eager" and function is None
