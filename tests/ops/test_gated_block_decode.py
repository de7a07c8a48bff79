"""gated_block_decode against float64, for every path of its two kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from flamingo_kernels import MediaMask, UnsupportedError, _cuda
from flamingo_kernels.ops import GatedBlockWeights, gated_block_decode
from flamingo_kernels.testing import DTYPES, compare


@dataclass(frozen=True)
class Case:
    batch: int = 2
    dim: int = 64
    heads: int = 4
    groups: int = 1
    head_dim: int = 16
    media: int = 3
    latents: int = 8
    hidden: int = 96
    immediate: bool = True
    policy: Any = "zero"
    bias: bool = True
    gate: tuple[int, ...] = (1,)
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32

    def mask(self) -> MediaMask:
        times = torch.arange(self.batch)[:, None] % (self.media + 2)
        rule: Any = {"immediate": self.immediate, "policy": self.policy}
        return MediaMask.from_text_time(times, self.media, **rule)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        inner, media = self.heads * self.head_dim, self.latents * self.media
        kv = (self.batch, self.media, self.latents, self.heads // self.groups, self.head_dim)
        assert media
        shapes = [(self.batch, self.dim), kv, kv]
        vector, matrices = (self.dim,), [(inner, self.dim), (self.dim, inner)]
        more = [vector, vector, *matrices, self.gate, vector, vector]
        more += [(self.hidden, self.dim), (self.dim, self.hidden), self.gate]
        tensors = [torch.randn(shape) for shape in shapes + more]
        # such weights that every stage has numbers around 1
        tensors = [t / t.shape[-1] ** 0.5 if t.ndim == 2 and i > 2 else t for i, t in enumerate(tensors)]
        return tuple(tensor.to(self.dtype) for tensor in tensors)

    def run(self, tensors: tuple[torch.Tensor, ...], backend: str) -> torch.Tensor:
        x, k, v, *weights = tensors
        if not self.bias:
            weights[1] = weights[6] = None
        options: Any = {"activation": self.activation, "backend": backend}
        return gated_block_decode(x, k, v, self.mask(), GatedBlockWeights(*weights), **options)


CASES = [
    Case(),
    Case(batch=1, dim=1, heads=1, head_dim=1, media=1, latents=1, hidden=1),
    Case(batch=5, immediate=False, policy="open_flamingo"),
    Case(batch=9, policy="open_flamingo", groups=2, activation="squared_relu"),
    Case(batch=16, dim=40, hidden=72, head_dim=40, heads=3, activation="relu", gate=(40,)),
    Case(batch=3, dim=63, hidden=65, head_dim=7, latents=70, bias=False),  # nothing is aligned
    Case(batch=1, dim=2100, heads=2, head_dim=128, hidden=40, latents=64, immediate=False),  # in chunks
]


@pytest.fixture(params=["reference", "cuda"])
def backend(request) -> str:
    if request.param == "cuda" and _cuda.why_not():
        pytest.skip(f"cuda: {_cuda.why_not()}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    case = replace(case, dtype=dtype)
    drawn = []
    for _ in range(3):
        tensors = case.tensors()
        exact = case.run(tuple(tensor.double() for tensor in tensors), "reference")
        eager = case.run(tensors, "reference")
        drawn.append(compare("out", case.run(tensors, backend), eager, exact))
    worst = max(each.error for each in drawn)
    budget = 2 * max(each.eager_error for each in drawn) + 2 * max(each.ulp for each in drawn)
    assert worst <= budget, [str(each) for each in drawn]


def test_what_a_row_does_not_see_is_not_read(backend):
    case = Case(batch=4)
    x, k, v, *weights = case.tensors()
    expected = case.run((x, k, v, *weights), backend)
    for medium in range(case.media):
        unseen = ~case.mask().sees(medium)[:, 0]
        k[unseen, medium] = v[unseen, medium] = torch.nan
    assert torch.equal(case.run((x, k, v, *weights), backend), expected)
    assert expected.isfinite().all()


def test_a_gradient_is_refused():
    if _cuda.why_not():
        pytest.skip(f"cuda: {_cuda.why_not()}")
    tensors = Case().tensors()
    tensors[0].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"no gradient; call it under torch\.no_grad"):
        Case().run(tensors, "cuda")
    with torch.no_grad():
        Case().run(tensors, "cuda")


def test_more_sequences_than_fit_are_named():
    if _cuda.why_not():
        pytest.skip(f"cuda: {_cuda.why_not()}")
    case = Case(batch=17)
    with pytest.raises(UnsupportedError, match="B=17 is above 16"):
        case.run(case.tensors(), "cuda")
    assert case.run(case.tensors(), "auto").shape == (17, 64)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("to_out", (64, 63), r"to_out with shape \(64, 64\)"),
        ("up", (96, 63), r"up with shape \(96, 64\)"),
        ("down", (64, 95), r"down with shape \(64, 96\)"),
        ("ff_norm", (63,), r"ff_norm with shape \(64,\)"),
        ("gate", (5,), r"gate of 1 or D=64 elements, got \(5,\)"),
    ],
)
def test_a_mistake_is_named(name, shape, message):
    x, k, v, *weights = Case().tensors()
    wrong = GatedBlockWeights(*weights)._replace(**{name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=f"^gated_block_decode: expected .*{message}"):
        gated_block_decode(x, k, v, Case().mask(), wrong)
