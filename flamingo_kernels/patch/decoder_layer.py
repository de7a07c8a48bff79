"""What the gated cross-attention layers of transformers share: the names of Llama's decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._anatomy import Kind, Norm, Part
from ..fold import Affine, Gate, Scale
from ..layers import Fused
from ..layers.decode import Parts
from ..layers.fused import gate_unless_open


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

    def parts(self, q_norm: nn.Module | None, attn_gate: str, mlp_gate: str) -> Parts:
        """The layer as a decoding step takes it; its gates by name."""
        attn, mlp = self.cross_attn, self.mlp
        return Parts(
            norm=self.input_layernorm,
            to_q=attn.q_proj,
            q_norm=q_norm,
            to_out=attn.o_proj,
            gate=gate_unless_open(self, attn_gate),
            ff_norm=self.post_attention_layernorm,
            gate_proj=mlp.gate_proj,
            up=mlp.up_proj,
            activation=mlp.act_fn,
            down=mlp.down_proj,
            ff_gate=gate_unless_open(self, mlp_gate),
        )


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
