"""Every operator on random configurations, against float64."""

from __future__ import annotations

import pytest
from hypothesis import assume
from hypothesis.strategies import sampled_from

from flamingo_kernels._backends import cpu, dispatch
from flamingo_kernels.testing import assert_within_budget
from tests.conftest import BACKENDS
from tests.helpers.fuzz import fuzz, seeds
from tests.helpers.random_cases import OPERATORS, has_budget, is_supported, largest

EXAMPLES = {"reference": 4, "cpu": 20, "triton": 3, "cuda": 8}  # the emulations are slow


@seeds
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("operator", OPERATORS)
def test_oracle(operator, backend, fresh, select_variant):
    available = dispatch.available_backends(operator).get(backend)
    if available is not True:
        pytest.skip(f"{operator}, {backend}: {available}")

    def check(case, variant):
        assume(is_supported(case, backend) and has_budget(case))
        select_variant(variant)
        assert_within_budget(case, backend)

    calls = OPERATORS[operator]
    if backend == "triton":  # its interpreter is the slowest
        calls = calls.filter(lambda case: largest(case) <= 2**11)
    variants = cpu.cpu_variants() if backend == "cpu" else [cpu.cpu_variant()]
    fuzz(check, calls, sampled_from(variants), examples=EXAMPLES[backend], fresh=fresh)
