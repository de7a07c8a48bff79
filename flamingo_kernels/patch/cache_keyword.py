"""The model's cache as an argument: transformers calls it `past_key_values`, and `cache` from 5.24 on.

A fused forward calls it `cache`. The class that is combined with an original takes the original's keyword
too, and the one that the original has deprecated, with its warning.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from torch import nn

CACHE = "cache"
_NAMES = (CACHE, "past_key_values")
_DEPRECATION = ("transformers.utils.deprecation", "wrapped_func")

Forward = Callable[..., Any]


def with_cache_keyword(fused: type[nn.Module], original: type[nn.Module]) -> dict[str, Any]:
    """The members of a combined class that differ by the original's keyword; none if it takes no cache.

    Members:
        forward: the fused forward, with the keywords of the original's.
        cache_keyword: what the original calls the cache.
    """
    taken = inspect.signature(original.forward).parameters
    keyword = next((name for name in _NAMES if name in taken), None)
    if keyword is None:
        return {}
    forward = fused.forward if keyword == CACHE else _renaming(fused.forward, keyword)
    return {"cache_keyword": keyword, "forward": _deprecating(forward, original.forward)}


def _renaming(forward: Forward, keyword: str) -> Forward:
    @functools.wraps(forward)
    def renamed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if keyword in kwargs:
            kwargs[CACHE] = kwargs.pop(keyword)
        return forward(self, *args, **kwargs)

    return renamed


def _deprecating(forward: Forward, original: Any) -> Forward:
    """A forward in the wrapper of the original's, if transformers has deprecated a keyword there."""
    while (original.__globals__.get("__name__"), original.__code__.co_name) != _DEPRECATION:
        if (original := getattr(original, "__wrapped__", None)) is None:
            return forward
    code = original.__code__.replace()  # its own, as torch.compile counts recompilations by code object
    cells = [
        CellType(forward) if name == "func" else cell
        for name, cell in zip(code.co_freevars, original.__closure__, strict=True)
    ]
    wrapper = FunctionType(code, original.__globals__, closure=tuple(cells))
    return functools.wraps(forward)(wrapper)
