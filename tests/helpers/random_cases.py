"""Strategies for calls of every operator and sublayer, with numbers of many sizes and mixed layouts.

The first value of a list is the plainest, to which a failure is reduced.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, booleans, builds, just, none, sampled_from
from torch import Tensor

from flamingo_kernels import MediaMask, UnsupportedError
from flamingo_kernels._backends import dispatch
from flamingo_kernels.ops.linear.schema import ACTIVATIONS as OF_LINEAR
from flamingo_kernels.sublayers.activation import ACTIVATIONS
from flamingo_kernels.testing import (
    CASES,
    DTYPES,
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Layout,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    Tensors,
    evaluate,
    lay_out,
)
from tests.helpers.sublayer_cases import CrossAttentionCase, FeedForwardCase

Numbers = Literal["normal", "zero", "tiny", "large", "some subnormal", "huge", "equal"]
NUMBERS: tuple[Numbers, ...] = get_args(Numbers)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, kw_only=True)
class RandomCase(Case):
    """A case whose tensors take these kinds of numbers and these layouts in turn."""

    limit: ClassVar[float] = 2.0**55  # of huge numbers: products of two are sums in float32

    numbers: tuple[Numbers, ...] = ("normal",)
    layouts: tuple[Layout, ...] = ("contiguous",)

    def tensors(self) -> Tensors:
        kinds, layouts = itertools.cycle(self.numbers), itertools.cycle(self.layouts)
        return {
            name: lay_out(self._numbers(name, tensor, kind), layout)
            for (name, tensor), kind, layout in zip(super().tensors().items(), kinds, layouts, strict=False)
        }

    def _numbers(self, name: str, tensor: Tensor, kind: Numbers) -> Tensor:
        """Numbers of another kind in the same dtype."""
        if kind == "equal":
            return torch.ones_like(tensor)
        limits = torch.finfo(tensor.dtype)
        if kind == "some subnormal":
            odd = torch.arange(tensor.numel()).view(tensor.shape) % 2 == 1
            return torch.where(odd, tensor * limits.tiny, tensor)
        huge = min(limits.max / 16, self.limit)
        tensor = tensor * {"zero": 0, "tiny": 2**-10, "large": 2**6, "huge": huge}.get(kind, 1)
        # Further out, eager's slope of tanh is a difference of near numbers even in float64.
        return tensor.clamp(-9, 9) if "gate" in name else tensor


@dataclass(frozen=True, kw_only=True)
class RandomMasked(RandomCase, MaskedCrossAttentionCase):
    """Also with times far below 0 and far above M, which mean the same as 0 and M + 1."""

    far: bool = False

    def mask(self) -> MediaMask:
        if not self.far:
            return super().mask()
        times = self.text_time()
        times = times.masked_fill(times == 0, -(2**40)).masked_fill(times > self.media, 2**40)
        return MediaMask.from_text_time(times, self.media, immediate=self.immediate, policy=self.policy)


@dataclass(frozen=True, kw_only=True)
class RandomPerceiver(RandomCase, PerceiverAttentionCase):
    """A perceiver attention."""


@dataclass(frozen=True, kw_only=True)
class RandomResidual(RandomCase, GatedResidualCase):
    limit: ClassVar[float] = math.inf


@dataclass(frozen=True, kw_only=True)
class RandomBlockDecode(RandomCase, GatedBlockDecodeCase):
    def tensors(self) -> Tensors:
        """Kernels refuse other matrices than contiguous ones."""
        tensors = super().tensors().items()
        return {n: t.contiguous() if n.endswith(".weight") and t.ndim == 2 else t for n, t in tensors}


@dataclass(frozen=True, kw_only=True)
class RandomLinear(RandomCase, LinearCase):
    """A linear layer, by the products of its gradients too."""


@dataclass(frozen=True, kw_only=True)
class RandomLinearInference(RandomLinear):
    """Where the kernel does what follows the product too."""

    differentiable: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class RandomCrossAttention(RandomCase, CrossAttentionCase):
    """A gated cross-attention."""


@dataclass(frozen=True, kw_only=True)
class RandomFeedForward(RandomCase, FeedForwardCase):
    """A gated feed-forward network."""


FEW = sampled_from([1, 2, 0, 3, 5])
MANY = sampled_from([1, 2, 3, 0, 7, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 257])
KEYS = sampled_from([1, 2, 3, 7, 16, 31, 32, 33, 60, 63, 64, 65, 128, 129, 200, 256])
HEAD_DIMS = sampled_from([16, 1, 2, 7, 8, 15, 17, 31, 33, 40, 63, 64, 65, 80, 96, 128, 129, 255, 256])
WIDTHS = sampled_from([1, 2, 7, 8, 16, 31, 33, 40, 63, 64, 65, 127, 129, 1000])
# A norm of fewer centred numbers leaves nothing but their rounding.
NORM_WIDTHS = sampled_from([8, 7, 16, 31, 33, 40, 63, 64, 65, 127, 129, 1000])
HEADS = sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (6, 2), (5, 5)])  # and their groups
SCALES = sampled_from([None, 1.0, 0.0, -0.25, 1e-4, 4.0])
POLICIES = sampled_from(["zero", "open_flamingo"])
MEDIA = {"batch": FEW, "media": FEW, "latents": KEYS, "immediate": booleans()}
DTYPE, OTHER_DTYPE = sampled_from(DTYPES), none() | sampled_from(DTYPES)


def some(values) -> SearchStrategy[tuple]:
    """One to three of these."""
    return st.lists(sampled_from(values), min_size=1, max_size=3).map(tuple)


def cases(kind: type[RandomCase], alike: bool = True, **fields: SearchStrategy) -> SearchStrategy[RandomCase]:
    """alike: whether with tensors of equal numbers or equal rows."""
    layouts, numbers = (LAYOUTS, NUMBERS) if alike else (LAYOUTS[:-1], NUMBERS[:-1])
    fields |= {"numbers": some(numbers), "layouts": some(layouts), "layout": sampled_from(layouts)}
    return builds(kind, dtype=DTYPE, seed=st.integers(0, 9), **fields).filter(
        lambda case: largest(case) <= 2**15
    )


def may_norm_queries(case: RandomCrossAttention) -> bool:
    """Whether the norm of queries has enough numbers, and its gradient few enough rows, for a budget.

    In half dtypes an attention starts its backward pass from the rounded output. What that costs a query adds
    up over many rows.
    """
    few = case.dtype == torch.float32 or case.length <= 17
    return few and case.head_dim >= 7


def largest(case: Case) -> int:
    """Elements of its largest tensor."""
    return max(math.prod(shape) for shape, _ in case.specs().values())


@st.composite
def attentions(draw, kind, **fields):
    heads, groups = draw(HEADS)
    fields |= {"heads": just(heads), "groups": just(groups), "head_dim": HEAD_DIMS}
    return draw(cases(kind, **fields))


@st.composite
def residuals(draw):
    shape = (*draw(st.lists(MANY, max_size=3)), draw(WIDTHS))
    fields = {"shape": just(shape), "gate": _gates(shape[-1])}
    return draw(cases(RandomResidual, y_dtype=OTHER_DTYPE, gate_dtype=OTHER_DTYPE, **fields))


@st.composite
def decodes(draw):
    width = draw(WIDTHS)
    texts = draw(sampled_from([1, 1, 2, 3]))
    fields = {"dim": just(width), "hidden": WIDTHS, "gate": none() | _gates(width), "texts": just(texts)}
    fields |= {**MEDIA, "batch": FEW.map(lambda batch: batch * texts), "policy": POLICIES, "rms": booleans()}
    fields |= {"norm_bias": booleans(), "bias": booleans(), "glu": booleans(), "x_dtype": OTHER_DTYPE}
    fields |= {"activation": sampled_from(OF_LINEAR[1:]), "gate_dtype": OTHER_DTYPE}
    return draw(attentions(RandomBlockDecode, **fields))


@st.composite
def linears(draw):
    out = draw(WIDTHS)
    fields = {"rows": st.lists(MANY, max_size=2).map(tuple), "width": WIDTHS, "out": just(out)}
    fields |= {"bias": booleans(), "residual": booleans(), "gate": none() | _gates(out)}
    fields |= {"activation": sampled_from(OF_LINEAR), "residual_dtype": OTHER_DTYPE}
    kind = draw(sampled_from([RandomLinearInference, RandomLinear]))
    # Equal rows round alike, and so do their terms in the gradient of a gate, as in sublayers below.
    return draw(cases(kind, alike=kind is RandomLinearInference, gate_dtype=OTHER_DTYPE, **fields))


@st.composite
def sublayers(draw, kind, **fields):
    width = draw(NORM_WIDTHS)
    fields |= {"width": just(width), "gate": none() | _gates(width), "rms": booleans(), "biased": booleans()}
    strategy = attentions if kind is RandomCrossAttention else cases
    # Equal rows round alike, and what adds up in a sum of them is no chance as in the budget.
    return draw(strategy(kind, alike=False, **fields))


def _gates(width: int) -> SearchStrategy[tuple[int, ...]]:
    return sampled_from([(1,), (), (width,), (1, 1, 1), (1, 1, width)])


OPERATORS: dict[str, SearchStrategy[RandomCase]] = {
    "masked_cross_attention": attentions(
        RandomMasked,
        **MEDIA,
        length=MANY,
        times=sampled_from(["locations", "jumps", "cached"]),
        far=booleans(),
        policy=POLICIES,
        scale=SCALES,
    ),
    "perceiver_attention": attentions(
        RandomPerceiver,
        clips=FEW,
        queries=MANY,
        features=MANY,
        latents=KEYS,
        lengths=none() | some([0, 1, 2, 31, 33, 64, 1000]),
        scale=SCALES,
    ),
    "gated_residual": residuals(),
    "gated_block_decode": decodes(),
    "linear": linears(),
}
SUBLAYERS: dict[str, SearchStrategy[RandomCase]] = {
    "gated_cross_attention": sublayers(
        RandomCrossAttention,
        **MEDIA,
        length=MANY,
        q_norm=booleans(),
    ).filter(lambda case: not case.q_norm or may_norm_queries(case)),
    "gated_feed_forward": sublayers(
        RandomFeedForward,
        rows=st.lists(MANY, max_size=2).map(tuple),
        inner=WIDTHS,
        activation=sampled_from(list(ACTIVATIONS)),
        glu=booleans(),
    ),
}


def is_supported(case: Case, backend: str) -> bool:
    """Whether a backend takes it; it says so of everything that it refuses."""
    tensors = case.tensors()
    try:
        with torch.no_grad():
            if case.operator in CASES:
                dispatch.resolve(case.operator, backend, *tensors.values())
            else:
                case.kernel(backend, **tensors)
    except UnsupportedError:
        return False
    return True


def has_budget(case: Case) -> bool:
    """Whether eager's results fit their dtype, and are no dust: a kernel's weights below e^-87 are 0."""
    tensors = case.tensors()
    with torch.no_grad():
        douts = case.douts(case.eager(**tensors))
    results = evaluate(case, case.eager, tensors, douts).values()
    peaks = [each.abs().max() for each in results if each.numel()]
    return all(peak.isfinite() and not 0 < peak < 2**-100 for peak in peaks)
