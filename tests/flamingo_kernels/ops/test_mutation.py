"""The tests can fail: with one comparison of the C++ mask flipped, the oracle refuses the kernels."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT
from tests.helpers.scratch import Scratch
from tests.mutations.faults import Fault
from tests.mutations.plant import plant

pytestmark = pytest.mark.slow

FLIPS = {
    "the medium after the last": ("m < params.hi[", "m <= params.hi["),
    "not the first medium": ("params.lo[b * params.length + t] <= m", "params.lo[b * params.length + t] < m"),
    "averaging rows return zero": ("params.hi[b * params.length + t] < 0;", "false;"),
    # only poisoned memory gives this one away
    "rows that see nothing get no gradient written": (
        "if (!params.immediate || fully_masked(",
        "if (!params.immediate && fully_masked(",
    ),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_comparison_fails(flip, compiled, tmp_path):
    fault = Fault(
        "flips",
        "csrc/cpu/masked_cross_attention.h",
        flip,
        *FLIPS[flip],
        tests=("tests/flamingo_kernels/ops/test_masked_cross_attention.py",),
        only="cpu and test_oracle and (default or jumps)",
    )
    verdict = plant(Scratch(ROOT, tmp_path / "copy"), fault)
    assert verdict.outcome == "killed", verdict
    assert "error budget exceeded: masked_cross_attention, cpu" in verdict.run.tail
