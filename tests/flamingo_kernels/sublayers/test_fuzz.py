"""Both sublayers with random options, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume

from flamingo_kernels.testing import assert_within_budget
from tests.helpers.fuzz import beyond_chance, fuzz, seeds
from tests.helpers.random_cases import SUBLAYERS, has_budget, is_supported

EXAMPLES = {"reference": 5, "cpu": 20, "triton": 2, "cuda": 5}


def hold(case, backend):
    if has_budget(case):  # other numbers may overflow
        assert_within_budget(case, backend)


@seeds
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_oracle(sublayer, backend, fresh):
    def check(case):
        assume(is_supported(case, backend) and has_budget(case))
        beyond_chance(lambda n: hold(replace(case, seed=case.seed + 10 * n), backend))

    fuzz(check, SUBLAYERS[sublayer], examples=EXAMPLES[backend], fresh=fresh)
