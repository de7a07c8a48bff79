"""Labels of what a gated block does, which a profiler shows around the operators of a fused sublayer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd import profiler

BLOCKS = "gated blocks"
NORM, PROJECTIONS, ATTENTION, GATE, FEED_FORWARD = INSIDE = tuple(
    f"{BLOCKS}: {each}" for each in ("norm", "projections", "attention", "gate", "feed-forward")
)

F = TypeVar("F", bound=Callable[..., Any])


def labelled(label: str) -> Callable[[F], F]:
    """Let a profiler show a function under this label; without a profiler that costs nothing."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with profiler.record_function(label):
                return function(*args, **kwargs)

        return cast(F, run)

    return decorate
