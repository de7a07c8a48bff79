"""What a decoding step is given of a block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.schema import ACTIVATIONS
from ..weights import Linear, Norm, named_parameters


class GatedBlockWeights(NamedTuple):
    """The parameters of a gated cross-attention block but for the projection of its media.

    Attributes:
        norm: before the attention, over D.
        to_q: to queries, `[H * d, D]`.
        to_out: behind the heads, `[D, H * d]`.
        ff_norm: before the feed-forward network, over D.
        up: its first product, `[F, D]`.
        down: its last, `[D, F]`.
        gate: alpha of the attention before tanh, 1 element or D; None for a factor of 1.
        ff_gate: alpha of the feed-forward network.
        q_norm: norm of each head's queries, over d; None for none.
        gate_proj: with it the network is a gated linear unit, `down(act(gate_proj(n)) * up(n))`.
        activation: a name as `linear` takes it.
    """

    norm: Norm
    to_q: Linear
    to_out: Linear
    ff_norm: Norm
    up: Linear
    down: Linear
    gate: Tensor | None = None
    ff_gate: Tensor | None = None
    q_norm: Norm | None = None
    gate_proj: Linear | None = None
    activation: str = "gelu"

    def norms(self) -> dict[str, Norm]:
        """By name, those that there are."""
        norms = {"norm": self.norm, "q_norm": self.q_norm, "ff_norm": self.ff_norm}
        return {name: norm for name, norm in norms.items() if norm is not None}

    def linears(self) -> dict[str, Linear]:
        """By name, those that there are."""
        linears = {name: getattr(self, name) for name in ("to_q", "to_out", "gate_proj", "up", "down")}
        return {name: linear for name, linear in linears.items() if linear is not None}

    def gates(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        gates = {"gate": self.gate, "ff_gate": self.ff_gate}
        return {name: gate for name, gate in gates.items() if gate is not None}

    def autocast(self) -> GatedBlockWeights:
        """The same with what products read in the dtype of torch.autocast, if that is on."""
        cast: Any = {name: linear.autocast() for name, linear in self.linears().items()}
        return self._replace(**cast)

    def by_name(self) -> dict[str, Tensor]:
        """Every tensor, as "to_q.weight" and "gate"."""
        return {**named_parameters(**self.norms(), **self.linears()), **self.gates()}

    def tensors(self) -> list[Tensor]:
        """One tensor for each name in `TENSORS`, without an element where there is none."""
        none = torch.empty(0, device=self.to_q.weight.device)
        q_norm, gate_proj = self.q_norm or (None, None), self.gate_proj or (None, None, None)
        tensors = (
            *(*self.norm[:2], *self.to_q, *q_norm[:2], *self.to_out, self.gate),
            *(*self.ff_norm[:2], *gate_proj, *self.up, *self.down, self.ff_gate),
        )
        given = (none if tensor is None else tensor for tensor in tensors)
        return [tensor if tensor.ndim == 2 else tensor.contiguous() for tensor in given]

    def options(self) -> tuple[list[float], list[int], int]:
        """The eps of each norm, whether it is an RMSNorm, and the place of the activation."""
        norms = [self.norm, self.q_norm or self.norm, self.ff_norm]
        return (
            [norm.eps for norm in norms],
            [int(norm.rms) for norm in norms],
            ACTIVATIONS.index(self.activation),
        )

    @classmethod
    def from_tensors(
        cls, tensors: list[Tensor], eps: list[float], rms: list[int], activation: int
    ) -> GatedBlockWeights:
        """What `tensors` and `options` were made of."""
        pairs = zip(TENSORS, tensors, strict=True)
        given: dict[str, Any] = {name: each if each.numel() else None for name, each in pairs}

        def linear(name: str) -> Linear:
            return Linear(*(given[f"{name}.{field}"] for field in Linear._fields))

        def norm(name: str, place: int) -> Norm:
            return Norm(given[f"{name}.weight"], given[f"{name}.bias"], eps[place], bool(rms[place]))

        return cls(
            *(
                norm("norm", 0),
                linear("to_q"),
                linear("to_out"),
                norm("ff_norm", 2),
                linear("up"),
                linear("down"),
            ),
            *(given["gate"], given["ff_gate"]),
            q_norm=None if given["q_norm.weight"] is None else norm("q_norm", 1),
            gate_proj=None if given["gate_proj.weight"] is None else linear("gate_proj"),
            activation=str(ACTIVATIONS[activation]),
        )


# The order in which the operation takes them, as `GatedBlock` in csrc/gated_block.h reads them.
TENSORS = (
    *("norm.weight", "norm.bias", "to_q.weight", "to_q.bias", "to_q.scale", "q_norm.weight", "q_norm.bias"),
    *("to_out.weight", "to_out.bias", "to_out.scale", "gate", "ff_norm.weight", "ff_norm.bias"),
    *("gate_proj.weight", "gate_proj.bias", "gate_proj.scale", "up.weight", "up.bias", "up.scale"),
    *("down.weight", "down.bias", "down.scale", "ff_gate"),
)
