"""Calls of every operator: their inputs, and what one writes without the operator.

The eager baselines share no code with a kernel, its `reference.py` or `MediaMask`. Needs `flamingo` (hence
einops) beside torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.modules import dense_masked_attention, text_time

from .. import ops
from ..mask import MediaMask, Policy
from ..ops.linear.int8 import quantize_weight

Layout = Literal["contiguous", "slice", "transposed", "strided", "expanded"]
Outputs = tuple[Tensor, ...]
Tensors = dict[str, Tensor]
Spec = tuple[tuple[int, ...], torch.dtype]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of one operator: its shapes, options, dtype and memory layout; a subclass for each operator.

    Args:
        dtype: of every tensor that has no dtype of its own.
        layout: how the tensors lie in memory, see `lay_out`.
        seed: of the random values; they are the same on every device.
        device: where the tensors are.

    Example:
        >>> from flamingo_kernels.testing import MaskedCrossAttentionCase, measure
        >>> case = MaskedCrossAttentionCase(dtype=torch.bfloat16, length=63)
        >>> all(each.passed for each in measure(case, "reference"))
        True
    """

    operator: ClassVar[str]
    function: ClassVar[Callable[..., Any]]
    outputs: ClassVar[tuple[str, ...]] = ("out",)
    mean: ClassVar[float] = 0.0  # of the random values
    differentiable: ClassVar[bool] = True  # or for inference alone: then nothing has a gradient

    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    seed: int = 0
    device: str = "cpu"

    @abstractmethod
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each of the operator's differentiable tensors."""

    def tensors(self) -> Tensors:
        """Those tensors: random, rounded to their dtype, laid out."""
        return self._random(self.specs(), self.seed)

    def options(self) -> dict[str, Any]:
        """The operator's other arguments, without the backend."""
        return {}

    def excess(self) -> float:
        """How far the results may be off, beyond rounding in their dtype, by what the operator is."""
        return 0.0

    @abstractmethod
    def eager(self, *args: Any, **kwargs: Any) -> Outputs:
        """What one writes without the operator, in the dtype of the tensors."""

    def kernel(self, backend: str, **tensors: Tensor) -> Outputs:
        """The operator itself."""
        return self.call(tensors, self.options(), backend)

    def call(self, tensors: Tensors, options: dict[str, Any], backend: str = "auto") -> Outputs:
        """The operator with these tensors and options instead of the case's own."""
        outputs = self.function(**tensors, **options, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def douts(self, outputs: Outputs) -> Outputs:
        """Random gradients for these outputs, in their dtype."""
        specs = {name: (tuple(out.shape), out.dtype) for name, out in zip(self.outputs, outputs, strict=True)}
        return tuple(self._random(specs, self.seed + 1).values())

    def _random(self, specs: dict[str, Spec], seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (shape, dtype) in specs.items():
            values = torch.randn(shape, generator=generator) + self.mean
            tensors[name] = lay_out(values.to(self.device, dtype), self.layout)
        return tensors

    def __str__(self) -> str:
        """The fields that differ from their defaults: the name of the case in tables and test ids."""
        named = [f for f in fields(self) if f.name != "device"]  # a table is of one device, and says which
        changed = {f.name: getattr(self, f.name) for f in named if getattr(self, f.name) != f.default}
        shown = {name: str(value).removeprefix("torch.").replace(" ", "") for name, value in changed.items()}
        return ",".join(f"{name}={value}" for name, value in shown.items()) or "default"


@dataclass(frozen=True, kw_only=True)
class MaskedCrossAttentionCase(Case):
    """A call of `masked_cross_attention`.

    Args:
        batch, length, media, latents, heads, head_dim: B, T, M, R, H, d.
        groups: query heads that share one key/value head, H / Hkv.
        immediate: rows see the last medium only, or all media up to it.
        times: where text_time comes from: "locations" of images in the text (in turn over the batch one more
            than there are media, as many, one fewer), "cached" locations of a prompt, or "jumps", any number
            from 0 to M + 1 in any order.
        policy: of the MediaMask.
        scale: factor on the scores.
    """

    operator: ClassVar[str] = "masked_cross_attention"
    function: ClassVar[Callable[..., Any]] = staticmethod(ops.masked_cross_attention)

    batch: int = 2
    length: int = 19
    media: int = 3
    latents: int = 8
    heads: int = 4
    head_dim: int = 16
    groups: int = 1
    immediate: bool = True
    times: Literal["locations", "cached", "jumps"] = "locations"
    policy: Policy = "zero"
    scale: float | None = None

    def specs(self) -> dict[str, Spec]:
        media = (self.batch, self.media, self.latents, self.heads // self.groups, self.head_dim)
        shapes = {"q": (self.batch, self.length, self.heads, self.head_dim), "k": media, "v": media}
        return {name: (shape, self.dtype) for name, shape in shapes.items()}

    def options(self) -> dict[str, Any]:
        return {"mask": self.mask(), "scale": self.scale}

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        k, v = (tensor.repeat_interleave(self.groups, dim=3) for tensor in (k, v))
        rule: dict[str, Any] = {"only_immediate": self.immediate, "policy": self.policy, "scale": self.scale}
        return (dense_masked_attention(q, k, v, self.text_time(), **rule),)

    def mask(self) -> MediaMask:
        """The mask as a user builds it."""
        rule: dict[str, Any] = {"immediate": self.immediate, "policy": self.policy}
        if self.times == "jumps":
            return MediaMask.from_text_time(self.text_time(), self.media, **rule)
        if self.times == "cached":
            return MediaMask.cached(self.media_locations(), self.media, self.length, **rule)
        build = MediaMask.last_preceding if self.immediate else MediaMask.all_preceding
        return build(self.media_locations(), self.media, policy=self.policy)

    def text_time(self) -> Tensor:
        """What the mask is made from, int64 `[B, T]`, without the mask's help."""
        if self.times == "jumps":
            generator = torch.Generator().manual_seed(self.seed + 2)
            times = torch.randint(0, self.media + 2, (self.batch, self.length), generator=generator)
            return times.to(self.device)
        return text_time(self.media_locations(), self.times == "cached", self.length)

    def media_locations(self) -> Tensor:
        """Bool `[B, T]`, or `[B, 16]` of a cached prompt; the first row is no image where there is room."""
        length = 16 if self.times == "cached" else self.length
        generator = torch.Generator().manual_seed(self.seed + 2)
        locations = torch.zeros(self.batch, length, dtype=torch.bool)
        for b, row in enumerate(locations):
            images = max(self.media + 1 - b % 3, 0)
            room = range(min(1, length - 1), length) if length else range(0)
            order = torch.randperm(len(room), generator=generator)[:images]
            row[order + room.start] = True
        return locations.to(self.device)


@dataclass(frozen=True, kw_only=True)
class PerceiverAttentionCase(Case):
    """A call of `perceiver_attention`.

    Args:
        clips, queries, features, latents, heads, head_dim: N, R, S, L, H, d.
        groups: query heads that share one key/value head, H / Hkv.
        lengths: media_lengths, repeated over the clips; None for none.
        scale: factor on the scores.
    """

    operator: ClassVar[str] = "perceiver_attention"
    function: ClassVar[Callable[..., Any]] = staticmethod(ops.perceiver_attention)

    clips: int = 2
    queries: int = 9
    features: int = 21
    latents: int = 9
    heads: int = 4
    head_dim: int = 16
    groups: int = 1
    lengths: tuple[int, ...] | None = None
    scale: float | None = None

    def specs(self) -> dict[str, Spec]:
        kv_heads = self.heads // self.groups
        media = (self.clips, self.features, kv_heads, self.head_dim)
        latents = (self.clips, self.latents, kv_heads, self.head_dim)
        shapes = {
            "q": (self.clips, self.queries, self.heads, self.head_dim),
            "k_media": media,
            "v_media": media,
            "k_latents": latents,
            "v_latents": latents,
        }
        return {name: (shape, self.dtype) for name, shape in shapes.items()}

    def options(self) -> dict[str, Any]:
        return {"media_lengths": self.media_lengths(), "scale": self.scale}

    def eager(
        self, q: Tensor, k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor
    ) -> Outputs:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        keys = torch.cat([k_media, k_latents], dim=1).repeat_interleave(self.groups, dim=2)
        values = torch.cat([v_media, v_latents], dim=1).repeat_interleave(self.groups, dim=2)
        scores = torch.einsum("nrhd,nshd->nhrs", q * scale, keys)
        lengths = self.media_lengths()
        if lengths is not None:
            position = torch.arange(keys.shape[1], device=keys.device)
            padding = (position >= lengths[:, None]) & (position < self.features)  # [N, S + L]
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        return (torch.einsum("nhrs,nshd->nrhd", scores.softmax(-1), values),)

    def media_lengths(self) -> Tensor | None:
        """Int64 `[N]`, or None."""
        if self.lengths is None:
            return None
        lengths = [self.lengths[n % len(self.lengths)] for n in range(self.clips)]
        return torch.tensor(lengths, dtype=torch.int64, device=self.device)


@dataclass(frozen=True, kw_only=True)
class GatedResidualCase(Case):
    """A call of `gated_residual`.

    Args:
        shape: of x and y, `[..., D]`.
        gate: shape of the gate: `()`, `(1,)`, `(D,)` or either with leading ones.
        y_dtype, gate_dtype: where they differ from dtype.
    """

    operator: ClassVar[str] = "gated_residual"
    function: ClassVar[Callable[..., Any]] = staticmethod(ops.gated_residual)
    mean: ClassVar[float] = 1.0  # the gradient of a gate is one long sum, which must not cancel by chance

    shape: tuple[int, ...] = (3, 7, 40)
    gate: tuple[int, ...] = (1,)
    y_dtype: torch.dtype | None = None
    gate_dtype: torch.dtype | None = None

    def specs(self) -> dict[str, Spec]:
        return {
            "x": (self.shape, self.dtype),
            "y": (self.shape, self.y_dtype or self.dtype),
            "gate": (self.gate, self.gate_dtype or self.dtype),
        }

    def tensors(self) -> Tensors:
        tensors = super().tensors()
        # around 0, where the derivative of tanh is no difference of two near numbers
        tensors["gate"] -= self.mean
        return tensors

    def eager(self, x: Tensor, y: Tensor, gate: Tensor) -> Outputs:
        return (x + torch.tanh(gate.reshape(gate.shape[-1:])) * y,)


@dataclass(frozen=True, kw_only=True)
class GatedBlockDecodeCase(Case):
    """A call of `gated_block_decode`.

    Args:
        batch, dim, hidden, media, latents, heads, head_dim: B, D, F, M, R, H, d.
        groups: query heads that share one key/value head, H / Hkv.
        immediate, policy: of the MediaMask; sequence b has b % (M + 2) media before it.
        gate: shape of both gates: `(1,)` or `(D,)`.
        bias: whether the norms have one.
        activation: of the feed-forward network.
        eps: of both norms.
    """

    operator: ClassVar[str] = "gated_block_decode"
    function: ClassVar[Callable[..., Any]] = staticmethod(ops.gated_block_decode)
    differentiable: ClassVar[bool] = False

    batch: int = 2
    dim: int = 64
    hidden: int = 96
    media: int = 3
    latents: int = 8
    heads: int = 4
    head_dim: int = 16
    groups: int = 1
    immediate: bool = True
    policy: Policy = "zero"
    gate: tuple[int, ...] = (1,)
    bias: bool = True
    activation: Literal["gelu", "squared_relu", "relu"] = "gelu"
    eps: float = 1e-5

    def specs(self) -> dict[str, Spec]:
        inner = self.heads * self.head_dim
        media = (self.batch, self.media, self.latents, self.heads // self.groups, self.head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.batch, self.dim),
            "k": media,
            "v": media,
            "norm": (self.dim,),
            "norm_bias": (self.dim,),
            "to_q": (inner, self.dim),
            "to_out": (self.dim, inner),
            "gate": self.gate,
            "ff_norm": (self.dim,),
            "ff_norm_bias": (self.dim,),
            "up": (self.hidden, self.dim),
            "down": (self.dim, self.hidden),
            "ff_gate": self.gate,
        }
        return {
            name: (shape, self.dtype) for name, shape in shapes.items() if self.bias or "bias" not in name
        }

    def tensors(self) -> Tensors:
        tensors = super().tensors()
        for name in ("to_q", "to_out", "up", "down"):  # products of numbers around 1 stay around 1
            tensors[name] = tensors[name].contiguous() / tensors[name].shape[1] ** 0.5
        return tensors

    def options(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"immediate": self.immediate, "policy": self.policy}
        mask = MediaMask.from_text_time(self.text_time(), self.media, **rule)
        return {"mask": mask, "activation": self.activation, "eps": self.eps}

    def call(self, tensors: Tensors, options: dict[str, Any], backend: str = "auto") -> Outputs:
        names = ops.GatedBlockWeights._fields
        weights = ops.GatedBlockWeights(*map(tensors.get, names))  # type: ignore[arg-type]
        x, k, v = (tensors[name] for name in ("x", "k", "v"))
        return (self.function(x, k, v, weights=weights, **options, backend=backend),)

    def eager(self, x: Tensor, k: Tensor, v: Tensor, **weights: Tensor) -> Outputs:
        w, time = weights, self.text_time()
        k, v = (tensor.repeat_interleave(self.groups, dim=3) for tensor in (k, v))
        n = F.layer_norm(x, (self.dim,), w["norm"], w.get("norm_bias"), self.eps)
        q = (n @ w["to_q"].T).view(self.batch, 1, self.heads, self.head_dim)
        rule: dict[str, Any] = {"only_immediate": self.immediate, "policy": self.policy}
        attended = dense_masked_attention(q, k, v, time, **rule).flatten(1)
        z = x + torch.tanh(w["gate"]) * (attended @ w["to_out"].T)
        n = F.layer_norm(z, (self.dim,), w["ff_norm"], w.get("ff_norm_bias"), self.eps)
        act = {"gelu": F.gelu, "squared_relu": lambda u: F.relu(u) ** 2, "relu": F.relu}[self.activation]
        return (z + torch.tanh(w["ff_gate"]) * (act(n @ w["up"].T) @ w["down"].T),)

    def text_time(self) -> Tensor:
        """How many media are before the token of each sequence, int64 `[B, 1]`."""
        return torch.arange(self.batch, device=self.device)[:, None] % (self.media + 2)


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A call of `linear`.

    Args:
        rows: shape of x without its last dimension.
        width, out: inputs and outputs of the layer.
        bias: whether there is one.
        activation: after the product, or None.
        gate: shape of the gate: `()`, `(1,)`, `(out,)` or either with leading ones; None for none.
        residual: whether there is one.
        residual_dtype, gate_dtype: where they differ from dtype.
    """

    operator: ClassVar[str] = "linear"
    function: ClassVar[Callable[..., Any]] = staticmethod(ops.linear)

    rows: tuple[int, ...] = (2, 3)
    width: int = 40
    out: int = 24
    bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] | None = None
    gate: tuple[int, ...] | None = None
    residual: bool = False
    residual_dtype: torch.dtype | None = None
    gate_dtype: torch.dtype | None = None

    def specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {
            "x": ((*self.rows, self.width), self.dtype),
            "weight": ((self.out, self.width), self.dtype),
        }
        if self.bias:
            specs["bias"] = ((self.out,), self.dtype)
        if self.residual:
            specs["residual"] = ((*self.rows, self.out), self.residual_dtype or self.dtype)
        if self.gate is not None:
            specs["gate"] = (self.gate, self.gate_dtype or self.dtype)
        return specs

    def tensors(self) -> Tensors:
        tensors = super().tensors()
        # products of numbers around 1 stay around 1
        tensors["weight"] = lay_out(tensors["weight"] / max(self.width, 1) ** 0.5, self.layout)
        return tensors

    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    def multiplied(self, weight: Tensor) -> Tensor:
        """The weight that x is multiplied by."""
        return weight

    def eager(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Outputs:
        weight = self.multiplied(weight)
        y = F.linear(x.reshape(math.prod(self.rows), self.width), weight, bias).view(*self.rows, self.out)
        if self.activation in ("gelu", "gelu_tanh"):
            y = F.gelu(y, approximate="none" if self.activation == "gelu" else "tanh")
        elif self.activation == "silu":
            y = F.silu(y)
        elif self.activation is not None:
            y = F.relu(y) if self.activation == "relu" else F.relu(y) ** 2
        if gate is not None:
            y = torch.tanh(gate.reshape(gate.shape[-1:])) * y
        return (y if residual is None else residual + y,)


@dataclass(frozen=True, kw_only=True)
class Int8LinearCase(LinearCase):
    """A call of `linear` with a weight of 8-bit integers, made of a weight in the dtype; for inference."""

    differentiable: ClassVar[bool] = False

    def kernel(self, backend: str, **tensors: Tensor) -> Outputs:
        integers, scale = quantize_weight(tensors["weight"])
        return super().kernel(backend, **tensors | {"weight": integers, "weight_scale": scale})

    def multiplied(self, weight: Tensor) -> Tensor:
        integers, scale = quantize_weight(weight)
        return (integers.double() * scale.double()[:, None]).to(weight.dtype)

    def excess(self) -> float:
        """The kernels round a row of x to steps of a share of its largest number."""
        tensors = {name: tensor.double() for name, tensor in self.tensors().items()}
        largest = float(tensors["x"].abs().max()) if tensors["x"].numel() else 0.0
        weights = float(tensors["weight"].abs().sum(1).max()) if tensors["weight"].numel() else 0.0
        return largest / (127 if math.prod(self.rows) > 4 else 127 * 128) / 2 * weights


CASES: dict[str, type[Case]] = {
    case.operator: case
    for case in (
        MaskedCrossAttentionCase,
        PerceiverAttentionCase,
        GatedResidualCase,
        GatedBlockDecodeCase,
        LinearCase,
    )
}


def lay_out(tensor: Tensor, layout: Layout) -> Tensor:
    """The same values in another place, surrounded by NaN; tensors of too few dimensions come out contiguous.

    Args:
        tensor: any floating-point tensor.
        layout: "contiguous"; "slice" of a larger buffer; "transposed", dimensions -3 and -2 swapped in
            memory; "strided", every second element of a buffer; "expanded", tensor[0] repeated with stride 0
            (other values, then).
    """
    if layout == "slice":
        buffer = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
        return buffer[(slice(1, -2),) * tensor.ndim].copy_(tensor)
    if layout == "strided":
        return tensor.new_full([*tensor.shape, 2], torch.nan)[..., 1].copy_(tensor)
    if layout == "transposed" and tensor.ndim >= 3:
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded" and tensor.ndim >= 2:
        return tensor[:1].contiguous().expand_as(tensor)
    return tensor.contiguous()
