"""Calls of every operator: their inputs, and what one writes without the operator.

The eager baselines share no code with a kernel, its `reference.py` or `MediaMask`. Needs `flamingo` (hence
einops) beside torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

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
Shape = tuple[int, ...]
Spec = tuple[Shape, torch.dtype]
Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"]

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
        texts: how many in a row share media, B / S.
        groups: query heads that share one key/value head, H / Hkv.
        immediate, policy: of the MediaMask; text b has b % (M + 2) media before it.
        gate: shape of both gates: `(1,)` or `(D,)`; None for none.
        rms: RMSNorms rather than LayerNorms.
        norm_bias: whether LayerNorms have one.
        q_norm: whether queries are normed.
        bias: whether linear layers have one.
        glu: whether the feed-forward network is a gated linear unit.
        activation: of it.
        eps: of all norms.
        integers: whether weights are of 8 bits.
        x_dtype, gate_dtype: where they differ from dtype.
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
    texts: int = 1
    groups: int = 1
    immediate: bool = True
    policy: Policy = "zero"
    gate: tuple[int, ...] | None = (1,)
    rms: bool = False
    norm_bias: bool = True
    q_norm: bool = False
    bias: bool = False
    glu: bool = False
    activation: Activation = "gelu"
    eps: float = 1e-5
    integers: bool = False
    x_dtype: torch.dtype | None = None
    gate_dtype: torch.dtype | None = None

    def specs(self) -> dict[str, Spec]:
        inner, kv_heads = self.heads * self.head_dim, self.heads // self.groups
        media = (self.batch // self.texts, self.media, self.latents, kv_heads, self.head_dim)
        norms = {"norm": self.dim, "ff_norm": self.dim} | ({"q_norm": self.head_dim} if self.q_norm else {})
        matrices = {"to_q": (inner, self.dim), "to_out": (self.dim, inner)}
        matrices |= {"up": (self.hidden, self.dim), "down": (self.dim, self.hidden)}
        matrices |= {"gate_proj": (self.hidden, self.dim)} if self.glu else {}
        shapes: dict[str, tuple[int, ...]] = {"k": media, "v": media}
        for name, width in norms.items():
            shapes[f"{name}.weight"] = (width,)
            if self.norm_bias and not self.rms:
                shapes[f"{name}.bias"] = (width,)
        for name, (out, width) in matrices.items():
            shapes[f"{name}.weight"] = (out, width)
            if self.bias:
                shapes[f"{name}.bias"] = (out,)
        specs: dict[str, Spec] = {"x": ((self.batch, self.dim), self.x_dtype or self.dtype)}
        specs |= {name: (shape, self.dtype) for name, shape in shapes.items()}
        gates = ("gate", "ff_gate") if self.gate is not None else ()
        return specs | {name: (cast(Shape, self.gate), self.gate_dtype or self.dtype) for name in gates}

    def tensors(self) -> Tensors:
        tensors = super().tensors()
        for name, tensor in tensors.items():  # products of numbers around 1 stay around 1
            if name.endswith(".weight") and tensor.ndim == 2:
                tensors[name] = tensor.contiguous() / max(tensor.shape[1], 1) ** 0.5
        return tensors

    def options(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"immediate": self.immediate, "policy": self.policy}
        mask = MediaMask.from_text_time(self.text_time(), self.media, **rule)
        return {"mask": mask if self.texts == 1 else mask.fold(self.texts)}

    def weights(self, tensors: Tensors) -> ops.GatedBlockWeights:
        """What the operator is given of the block, in the place of these tensors."""

        def norm(name: str) -> ops.Norm:
            return ops.Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), self.eps, self.rms)

        def linear(name: str) -> ops.Linear:
            weight, scale = tensors[f"{name}.weight"], None
            if self.integers:
                weight, scale = quantize_weight(weight)
            return ops.Linear(weight, tensors.get(f"{name}.bias"), scale)

        return ops.GatedBlockWeights(
            *(norm("norm"), linear("to_q"), linear("to_out")),
            *(norm("ff_norm"), linear("up"), linear("down")),
            *(tensors.get("gate"), tensors.get("ff_gate")),
            q_norm=norm("q_norm") if self.q_norm else None,
            gate_proj=linear("gate_proj") if self.glu else None,
            activation=self.activation,
        )

    def call(self, tensors: Tensors, options: dict[str, Any], backend: str = "auto") -> Outputs:
        x, k, v = (tensors[name] for name in ("x", "k", "v"))
        return (self.function(x, k, v, weights=self.weights(tensors), **options, backend=backend),)

    def eager(self, x: Tensor, k: Tensor, v: Tensor, **weights: Tensor) -> Outputs:
        heads = (self.batch, self.heads, self.head_dim)
        k, v = (each.repeat_interleave(self.groups, dim=3) for each in (k, v))
        k, v = (each.repeat_interleave(self.texts, dim=0) for each in (k, v))

        def norm(x: Tensor, name: str) -> Tensor:
            weight, bias = (weights.get(f"{name}.{field}") for field in ("weight", "bias"))
            weight, bias = (each if each is None else each.to(x.dtype) for each in (weight, bias))
            if self.rms:
                return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(k.dtype)
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(k.dtype)

        def linear(x: Tensor, name: str) -> Tensor:
            weight = weights[f"{name}.weight"]
            return F.linear(x, dequantized(weight) if self.integers else weight, weights.get(f"{name}.bias"))

        def add(x: Tensor, y: Tensor, name: str) -> Tensor:
            if self.gate is None:
                return x + y
            return x + torch.tanh(weights[name].reshape(self.gate[-1:])) * y

        q = linear(norm(x, "norm"), "to_q").view(heads)
        q = norm(q, "q_norm") if self.q_norm else q
        rule: dict[str, Any] = {"only_immediate": self.immediate, "policy": self.policy}
        attended = dense_masked_attention(q[:, None], k, v, self.text_time(), **rule).flatten(1)
        z = add(x, linear(attended, "to_out"), "gate")
        n = norm(z, "ff_norm")
        first = activate(linear(n, "gate_proj" if self.glu else "up"), self.activation)
        h = first * linear(n, "up") if self.glu else first
        return (add(z, linear(h, "down"), "ff_gate"),)

    def excess(self) -> float:
        """Kernels of integers round a row to steps of a share of its largest number, before each product."""
        if not self.integers or self.batch == 0:
            return 0.0
        (out,) = self.eager(**self.tensors())
        return float(out.abs().max()) / (64 if self.batch > 4 else 64 * 128)

    def text_time(self) -> Tensor:
        """How many media are before the token of each text, int64 `[B, 1]`."""
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
    activation: Activation | None = None
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
        y = y if self.activation is None else activate(y, self.activation)
        if gate is not None:
            y = torch.tanh(gate.reshape(gate.shape[-1:])) * y
        return (y if residual is None else residual + y,)


@dataclass(frozen=True, kw_only=True)
class Int8LinearCase(LinearCase):
    """A call of `linear` with a weight of 8-bit integers, made of a weight in the dtype; for inference."""

    differentiable: ClassVar[bool] = False

    def call(self, tensors: Tensors, options: dict[str, Any], backend: str = "auto") -> Outputs:
        integers, scale = quantize_weight(tensors["weight"])
        return super().call(tensors | {"weight": integers, "weight_scale": scale}, options, backend)

    def multiplied(self, weight: Tensor) -> Tensor:
        return dequantized(weight)

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


def activate(y: Tensor, activation: Activation) -> Tensor:
    """An activation by torch."""
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="none" if activation == "gelu" else "tanh")
    if activation == "silu":
        return F.silu(y)
    return F.relu(y) if activation == "relu" else F.relu(y) ** 2


def dequantized(weight: Tensor) -> Tensor:
    """What the 8-bit integers of a weight stand for."""
    integers, scale = quantize_weight(weight)
    return (integers.double() * scale.double()[:, None]).to(weight.dtype)


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
