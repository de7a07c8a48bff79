"""The shapes and contenders of `python -m flamingo_kernels bench` under pytest-benchmark.

One group for every operator or layer at one shape, dtype and mode. A contender with a wrong result fails its
test and is not timed.
"""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.commands.bench.baselines import contenders
from flamingo_kernels.commands.bench.run import check
from flamingo_kernels.commands.bench.shapes import CASES, QUICK, Case

# By operator, taken from the small shapes: their inputs cost nothing.
NAMES = {case.op: list(contenders(case)) for case in QUICK}


def entrants() -> list:
    return [
        pytest.param(case, name, id=f"{case}-{name}".replace(" ", "-").replace("+", "-"))
        for case in CASES
        for name in NAMES[case.op]
    ]


@pytest.mark.parametrize(("case", "contender"), entrants())
def test_shape(benchmark, case: Case, contender: str) -> None:
    torch.compiler.reset()
    sound, refused = check(case, [contender])
    if contender in refused:
        reason = refused[contender].reason
        pytest.fail(reason) if refused[contender].wrong else pytest.skip(reason)
    if contender not in sound:
        pytest.skip(f"{contender} does not compute {case.mode}")
    benchmark.group = str(case)
    benchmark.extra_info.update(err=sound[contender].err, budget=sound[contender].budget)
    benchmark(sound[contender].call)
