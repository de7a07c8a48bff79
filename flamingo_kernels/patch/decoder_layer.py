"""What the gated cross-attention layers of transformers share: the names of Llama's decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._anatomy import Kind, Norm, Part
from ..fold import Affine, Gate, Scale
from ..layers import Fused


class DecoderLayer(Fused):
    """Base class of the layers, of a norm and attention, a norm and a gated linear unit; gates are added."""

    anatomy: Mapping[str, Kind] = {
        "input_layernorm": Norm("D"),
        "post_attention_layernorm": Norm("D"),
        "cross_attn": Part(),
        "mlp": Part(),
    }

    cross_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


def folds_of(attn_gate: str, mlp_gate: str, *, queries: tuple[str, ...]) -> tuple[Affine | Gate | Scale, ...]:
    """What `fold` may multiply into the weights of a layer.

    Args:
        attn_gate: the name of the attention's gate.
        mlp_gate: the name of the other gate.
        queries: the paths of what may give the queries, the last first, see `Scale`.
    """
    return (
        Affine("input_layernorm", ("cross_attn.q_proj",)),
        Scale("cross_attn.scaling", queries),
        Gate(attn_gate, "cross_attn.o_proj"),
        Affine("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Gate(mlp_gate, "mlp.down_proj"),
    )
