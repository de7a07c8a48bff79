"""Results do not depend on which threads come first: blocks, warps and lanes take turns in three ways."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from flamingo_kernels._backends import cuda
from flamingo_kernels.testing import (
    DTYPES,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Int8LinearCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    evaluate,
)

FORWARD, REVERSED, RANDOM = range(3)
CASES = [
    MaskedCrossAttentionCase(length=130, groups=2, policy="open_flamingo", head_dim=40),
    MaskedCrossAttentionCase(length=70, immediate=False, latents=70, policy="open_flamingo", times="jumps"),
    PerceiverAttentionCase(features=600, queries=64, heads=1, clips=1, lengths=(550,)),  # in parts
    PerceiverAttentionCase(features=70, queries=70, groups=2, lengths=(0, 66)),
    GatedResidualCase(shape=(70, 130)),
    GatedResidualCase(shape=(70, 136), gate=(136,)),
    GatedResidualCase(shape=(9, 4200)),  # columns in blocks
    GatedBlockDecodeCase(batch=9, dim=100, hidden=70, latents=70, immediate=False),
    GatedBlockDecodeCase(dim=2100, hidden=40, policy="open_flamingo", media=1),  # inputs in chunks
    GatedBlockDecodeCase(
        batch=3, heads=1, media=2, latents=1100, immediate=False, q_norm=True, glu=True
    ),  # keys in splits
    LinearCase(rows=(20,), width=100, residual=True, gate=(24,)),
    Int8LinearCase(rows=(3,), width=2100),
    LinearCase(rows=(16,), width=2100),  # in two chunks
]


@pytest.fixture
def order():
    """Chooses who comes first; in order again after the test."""
    if not cuda.emulated():
        pytest.skip(f"no emulation: {cuda.why_not() or 'there is a GPU'}; make emulated")
    choose = ctypes.CDLL(str(cuda.path())).flamingo_kernels_emulation_order
    yield choose
    choose(FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case}")
def test_any_order_gives_the_same_bits(case, dtype, order):
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))

    def run(chosen: int) -> dict[str, torch.Tensor]:
        order(chosen)
        return evaluate(case, lambda **t: case.kernel("cuda", **t), tensors, douts)

    expected = run(FORWARD)
    for chosen in (REVERSED, RANDOM):
        for name, tensor in run(chosen).items():
            assert torch.equal(tensor, expected[name]), name
