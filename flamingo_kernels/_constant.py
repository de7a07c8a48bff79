"""`torch.compiler.assume_constant_result`, which imports torch's compiler: that takes as long as torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """Has torch.compile call this function once, while it compiles, and keep the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
