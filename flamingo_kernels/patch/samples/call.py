"""What a class is tried with: a small instance, and calls of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        title: what is special about it.
        make: its arguments in a dtype, the same random numbers whenever the seed is the same.
        exact: whether the rounding of float16 and bfloat16 would decide the result.
        shape: of a result on which somebody may rely. Default: any.
    """

    title: str
    make: Callable[[torch.dtype], Arguments]
    exact: bool = False
    shape: tuple[int, ...] | None = None


class Sample(NamedTuple):
    """How a class is tried.

    Attributes:
        build: a small instance of a class, made like the user's module.
        calls: the calls for a small instance.
    """

    build: Callable[[type[nn.Module], nn.Module], nn.Module]
    calls: Callable[[nn.Module], Iterator[Call]]


def randn(dtype: torch.dtype, *shape: int, size: float = 1, blank: bool = False) -> Tensor:
    """Random numbers of a size; `blank` has the last medium of every sequence zero, as padding is."""
    numbers = torch.randn(*shape, dtype=torch.float64) * size
    if blank:
        numbers[:, -1] = 0
    return numbers.to(dtype).requires_grad_()


def build(cls: type[nn.Module], sizes: Mapping[str, Any]) -> nn.Module:
    """An instance by those of the sizes that its constructor names."""
    takes = set(_constructor(cls))
    return cls(**{name: size for name, size in sizes.items() if name in takes})


def _constructor(cls: type[nn.Module]) -> Iterator[str]:
    """The names of a constructor's arguments, with those of its bases if it takes any names."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            yield from (each.name for each in parameters)
            if all(each.kind != each.VAR_KEYWORD for each in parameters):
                return
