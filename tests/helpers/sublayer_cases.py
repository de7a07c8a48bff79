"""What the sublayers are held to: `flamingo_kernels.testing.Case` with a projection on either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.modules import dense_masked_attention, text_time
from flamingo_kernels import MediaMask
from flamingo_kernels.mask import Policy
from flamingo_kernels.sublayers import Linear, Norm, gated_cross_attention, gated_feed_forward
from flamingo_kernels.testing import Case, Outputs, Spec, Tensors, lay_out

EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": torch.relu,
    "squared_relu": lambda u: torch.relu(u) ** 2,
    "silu": lambda u: u * torch.sigmoid(u),
}


@dataclass(frozen=True, kw_only=True)
class SublayerCase(Case):
    """What both sublayers have.

    Args:
        width: D of the text.
        rms: RMSNorm rather than LayerNorm.
        biased: whether the projections have biases.
        gate: shape of the gate; None for none.
        gate_dtype: where it differs from dtype.
        eps: of the norm.
    """

    width: int = 24
    rms: bool = False
    eps: float = 1e-5
    biased: bool = False
    gate: tuple[int, ...] | None = (1,)
    gate_dtype: torch.dtype | None = None

    def shared_specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {"norm_weight": ((self.width,), self.dtype)}
        if not self.rms:
            specs["norm_bias"] = ((self.width,), self.dtype)
        if self.gate is not None:
            specs["gate"] = (self.gate, self.gate_dtype or self.dtype)
        return specs

    def linear_specs(self, name: str, out: int, into: int) -> dict[str, Spec]:
        specs: dict[str, Spec] = {f"{name}_weight": ((out, into), self.dtype)}
        if self.biased:
            specs[f"{name}_bias"] = ((out,), self.dtype)
        return specs

    def tensors(self) -> Tensors:
        """Weights of about the scale of trained ones, so that a norm or an activation has something to do."""
        tensors = super().tensors()
        for name, tensor in tensors.items():
            if name.endswith("_weight") and tensor.ndim == 2:
                factor = 2 * max(tensor.shape[1], 1) ** -0.5
                tensors[name] = lay_out(tensor * factor, self.layout)
        return tensors

    def norm(self, t: Tensors) -> Norm:
        return Norm(t["norm_weight"], t.get("norm_bias"), self.eps, self.rms)

    def eager_norm(self, t: Tensors, x: Tensor, name: str = "norm", eps: float | None = None) -> Tensor:
        eps = self.eps if eps is None else eps
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], t[f"{name}_weight"], eps)
        return F.layer_norm(x, x.shape[-1:], t[f"{name}_weight"], t[f"{name}_bias"], eps)

    def eager_residual(self, t: Tensors, y: Tensor) -> Tensor:
        return (
            t["x"] + y
            if self.gate is None
            else t["x"] + torch.tanh(t["gate"].reshape(t["gate"].shape[-1:])) * y
        )


def linear(t: Tensors, name: str) -> Linear:
    return Linear(t[f"{name}_weight"], t.get(f"{name}_bias"))


@dataclass(frozen=True, kw_only=True)
class CrossAttentionCase(SublayerCase):
    """A call of `gated_cross_attention`.

    Args:
        batch, length, media, latents, heads, head_dim: B, T, M, R, H, d.
        groups: query heads that share one key/value head.
        immediate, policy: of the MediaMask.
        q_norm: whether each head's queries have a norm of their own.
        q_eps: of that norm.
        scale: factor on the scores.
    """

    operator: ClassVar[str] = "gated_cross_attention"
    function: ClassVar[Callable[..., Any]] = staticmethod(gated_cross_attention)

    batch: int = 2
    length: int = 19
    media: int = 3
    latents: int = 5
    heads: int = 4
    head_dim: int = 16
    groups: int = 1
    immediate: bool = True
    policy: Policy = "zero"
    q_norm: bool = False
    q_eps: float = 1e-5
    scale: float | None = None

    def specs(self) -> dict[str, Spec]:
        inner = self.heads * self.head_dim
        media = (self.batch, self.media, self.latents, self.heads // self.groups, self.head_dim)
        return {
            "x": ((self.batch, self.length, self.width), self.dtype),
            "k": (media, self.dtype),
            "v": (media, self.dtype),
            **self.shared_specs(),
            **self.linear_specs("q", inner, self.width),
            **self.linear_specs("out", self.width, inner),
            **({"q_norm_weight": ((self.head_dim,), self.dtype)} if self.q_norm else {}),
            **({"q_norm_bias": ((self.head_dim,), self.dtype)} if self.q_norm and not self.rms else {}),
        }

    def locations(self) -> Tensor:
        return torch.rand(self.batch, self.length, generator=torch.Generator().manual_seed(3)) < 0.2

    def kernel(self, backend: str, **t: Tensor) -> Outputs:
        build = MediaMask.last_preceding if self.immediate else MediaMask.all_preceding
        mask = build(self.locations(), self.media, policy=self.policy)
        q_norm = None
        if self.q_norm:
            q_norm = Norm(t["q_norm_weight"], t.get("q_norm_bias"), self.q_eps, self.rms)
        z = gated_cross_attention(
            t["x"],
            t["k"],
            t["v"],
            mask,
            norm=self.norm(t),
            to_q=linear(t, "q"),
            to_out=linear(t, "out"),
            gate=t.get("gate"),
            q_norm=q_norm,
            scale=self.scale,
            backend=backend,
        )
        return (z,)

    def eager(self, **t: Any) -> Outputs:
        k, v = (t[name].repeat_interleave(self.groups, dim=3) for name in ("k", "v"))
        q = F.linear(self.eager_norm(t, t["x"]), *linear(t, "q")[:2]).unflatten(
            -1, (self.heads, self.head_dim)
        )
        q = self.eager_norm(t, q, "q_norm", self.q_eps) if self.q_norm else q
        rule: dict[str, Any] = {"only_immediate": self.immediate, "policy": self.policy, "scale": self.scale}
        out = dense_masked_attention(q, k, v, text_time(self.locations()), **rule)
        return (self.eager_residual(t, F.linear(out.flatten(2), *linear(t, "out")[:2])),)


@dataclass(frozen=True, kw_only=True)
class FeedForwardCase(SublayerCase):
    """A call of `gated_feed_forward`.

    Args:
        rows: shape of x without D.
        inner: width F of the hidden layer.
        activation: of it.
        glu: whether it is a gated linear unit.
    """

    operator: ClassVar[str] = "gated_feed_forward"
    function: ClassVar[Callable[..., Any]] = staticmethod(gated_feed_forward)

    rows: tuple[int, ...] = (2, 19)
    inner: int = 40
    activation: str = "gelu"
    glu: bool = False

    def specs(self) -> dict[str, Spec]:
        return {
            "x": ((*self.rows, self.width), self.dtype),
            **self.shared_specs(),
            **self.linear_specs("up", self.inner, self.width),
            **self.linear_specs("down", self.width, self.inner),
            **(self.linear_specs("gate_proj", self.inner, self.width) if self.glu else {}),
        }

    def kernel(self, backend: str, **t: Tensor) -> Outputs:
        z = gated_feed_forward(
            t["x"],
            norm=self.norm(t),
            up=linear(t, "up"),
            down=linear(t, "down"),
            gate_proj=linear(t, "gate_proj") if self.glu else None,
            gate=t.get("gate"),
            activation=self.activation,
            backend=backend,
        )
        return (z,)

    def eager(self, **t: Any) -> Outputs:
        n = self.eager_norm(t, t["x"])
        act, h = EAGER[self.activation], F.linear(n, *linear(t, "up")[:2])
        h = act(F.linear(n, *linear(t, "gate_proj")[:2])) * h if self.glu else act(h)
        return (self.eager_residual(t, F.linear(h, *linear(t, "down")[:2])),)
