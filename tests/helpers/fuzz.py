"""Random calls of a test: Hypothesis draws them, and reduces one that fails to a small one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

# The same draws in every run; in the slow tests others each time, from the seed in pytest's header.
seeds = pytest.mark.parametrize(
    "fresh", [pytest.param(False, id="fixed"), pytest.param(True, id="fresh", marks=pytest.mark.slow)]
)


def fuzz(check: Callable[..., None], *draws: SearchStrategy[Any], examples: int, fresh: bool) -> None:
    """Call `check` with what is drawn, `examples` times, or ten times as often from a fresh seed.

    torch draws the same in every call, so that what failed fails again.
    """

    @functools.wraps(check)
    def run(*drawn: Any, **named: Any) -> None:
        torch.manual_seed(0)
        check(*drawn, **named)

    test = settings(
        max_examples=10 * examples if fresh else examples,
        database=None,  # nothing is written
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),  # a draw takes long, and many say nothing
    )(given(*draws)(run))
    (test if fresh else seed(0)(test))()


def beyond_chance(hold: Callable[[int], None]) -> None:
    """Fail if `hold` does with each of three seeds.

    A gradient that is a sum of many roundings may exceed its budget by chance with one, and a fault does so
    with all.
    """
    for first in (0, 1):
        try:
            return hold(first)
        except AssertionError as error:
            print(f"again with other numbers: {error}")
    hold(2)
