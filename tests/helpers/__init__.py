"""What the tests share."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]  # of the repository


def slow_unless(usual: Collection[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Arguments for `parametrize`: all of them, marked slow but for the usual ones."""
    return [pytest.param(*each, marks=[] if each in usual else pytest.mark.slow) for each in every]
