"""Registers operators with torch; needs torch alone, so everything traces anywhere.

An operator has operations, `_fwd` and `_bwd` unless it is for inference alone, each in an overload for every
backend: `default`, for which the C++ extension has kernels, `cuda`, for which the CUDA extension has them,
and `triton`. Which one runs is decided before the call, so that a traced graph holds no choice. What a model
decides when it runs is an operation that calls others, see `compose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("flamingo_kernels", "DEF")
_OVERLOADS = {"cpu": "", "triton": ".triton", "cuda": ".cuda"}

_OPERATIONS: dict[str, dict[str, Any]] = {}


def define(operation: str, schema: str, backends: Iterable[str] = tuple(_OVERLOADS)) -> dict[str, Any]:
    """Make an operation known to torch; what each of its backends calls."""
    for backend in backends:
        name = operation + _OVERLOADS[backend]
        _LIBRARY.define(name + schema)
        if backend == "triton":
            for key in ("CUDA", "CPU"):  # on a CPU in Triton's interpreter, see `triton.why_not`
                _LIBRARY.impl(name, _run_triton(operation), key)
    overloads = getattr(torch.ops.flamingo_kernels, operation)
    _OPERATIONS[operation] = {
        backend: getattr(overloads, "default" if backend == "cpu" else backend) for backend in backends
    }
    return _OPERATIONS[operation]


def compose(operation: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Make an operation known that calls others, as the numbers in its tensors say; what to call.

    A captured CUDA graph would repeat what was decided once, so torch.compile leaves it out of one.

    Args:
        operation: its name.
        schema: of arguments and results.
        run: computes it on any device.
        shapes: the same arguments to empty tensors like the results.
    """
    _LIBRARY.define(operation + schema, tags=(torch.Tag.cudagraph_unsafe,))
    _LIBRARY.impl(operation, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flamingo_kernels::{operation}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.flamingo_kernels, operation).default


def operations() -> list[str]:
    """The names of all operations."""
    return list(_OPERATIONS)


def backends_of(operation: str) -> dict[str, Any]:
    """What each backend of an operation calls."""
    return _OPERATIONS[operation]


def shapes_of(operation: str, *backends: str) -> Callable[[Any], Any]:
    """Registers a shape function for some backends of an operation, by default for all that it has."""

    def register(function: Any) -> Any:
        for backend in backends or _OPERATIONS[operation]:
            name = f"flamingo_kernels::{operation}{_OVERLOADS[backend]}"
            torch.library.register_fake(name, function, lib=_LIBRARY)
        return function

    return register


def fresh(tensor: Tensor) -> Tensor:
    """What every kernel returns: a contiguous tensor, whatever the strides of the input."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _run_triton(operation: str) -> Callable[..., Any]:
    """The function `<operator>_<way>` of the operator's `triton_<way>.py`, imported at the first call."""
    operator, _, way = operation.rpartition("_")

    def run(*arguments: Any) -> Any:
        module = import_module(f"..ops.{operator}.triton_{way}", __package__)
        return getattr(module, operation)(*arguments)

    return run
