"""What a module of a known class is made of: a fingerprint of the instance, compared before it is swapped.

A fused class names every child and parameter of the class it stands for, with sizes in letters that must
agree: ::

    {"heads": Number("H"), "norm": Norm("D"), "to_q": Linear("D", "H*d"), "to_out": Linear("H*d", "D")}

A child of another library's class, such as an adapter or a quantised layer, will be called as the module it
is, so it may be anything of these sizes. A child of another torch.nn class means another architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Functions that wrappers leave on a module, and that its forward does not call.
_WRAPPERS = {"forward", "_old_forward", "_compiled_call_impl", "_gradient_checkpointing_func"}


class Sizes(dict[str, int]):
    """The sizes that letters stand for, each from the first attribute that has it."""

    def fit(self, term: str, size: int) -> bool:
        """Whether a size equals a product such as "2*H*d"; a letter that has no size yet gets one."""
        known, new = 1, ""
        for factor in term.split("*"):
            if factor.isdigit() or factor in self:
                known *= int(factor) if factor.isdigit() else self[factor]
            else:
                new = factor
        if not new:
            return size == known
        self[new] = size // known if known else 0
        return self[new] * known == size

    def expected(self, term: str) -> str:
        known = ", ".join(
            f"{letter}={self[letter]}" for letter in re.findall(r"[A-Za-z]", term) if letter in self
        )
        return f"{term} with {known}" if known else term


class Kind(Protocol):
    """What an attribute of a module must be.

    Attributes:
        optional: whether the attribute may be None or absent.
    """

    @property
    def optional(self) -> bool: ...

    def misfit(self, value: Any, sizes: Sizes) -> str:
        """What is wrong with a value; empty if it fits."""


@dataclass(frozen=True)
class Number:
    """A number that is a size of the module."""

    size: str
    optional: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        if isinstance(value, int) and sizes.fit(self.size, value):
            return ""
        return f"is {value!r}, expected {sizes.expected(self.size)}"


@dataclass(frozen=True)
class Linear:
    """A linear layer, or another library's module in its place."""

    inputs: str
    outputs: str
    optional: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        if reason := _other_kind(value, nn.Linear):
            return reason
        for name, term in (("in_features", self.inputs), ("out_features", self.outputs)):
            size = getattr(value, name, None)
            if isinstance(size, int) and not sizes.fit(term, size):
                return f"has {name}={size}, expected {sizes.expected(term)}"
        return ""


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension: a LayerNorm, or an RMSNorm of another library."""

    width: str
    optional: bool = False
    identity: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        if self.identity and type(value) is nn.Identity:
            return ""
        if reason := _other_kind(value, nn.LayerNorm):
            return reason
        weight = getattr(value, "weight", None)
        shape = getattr(value, "normalized_shape", None) or _shape(weight)
        if shape is not None and (len(shape) != 1 or not sizes.fit(self.width, shape[0])):
            return f"is over {tuple(shape)}, expected {sizes.expected(self.width)}"
        return ""


@dataclass(frozen=True)
class Weight:
    """A parameter with a shape such as "M 1 D"."""

    shape: str
    optional: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        shape = _shape(value)
        if not isinstance(value, Tensor):
            return f"is a {type(value).__name__}, expected a parameter"
        if shape is None:
            return ""
        terms = self.shape.split()
        if len(shape) == len(terms) and all(map(sizes.fit, terms, shape)):
            return ""
        return f"has shape {shape}, expected {sizes.expected(self.shape)}"


@dataclass(frozen=True)
class Alpha:
    """A gate: one number, or one for each channel."""

    width: str
    optional: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        if not isinstance(value, Tensor):
            return f"is a {type(value).__name__}, expected a parameter"
        shape = _shape(value)
        if shape is None or value.numel() == 1:
            return ""
        if value.numel() == shape[-1] and sizes.fit(self.width, shape[-1]):
            return ""
        return f"has shape {shape}, expected (1,) or {sizes.expected(self.width)}"


@dataclass(frozen=True)
class Part:
    """A child of any sizes, which is called as it is; or of one class, whose function alone is computed."""

    cls: type[nn.Module] | None = None
    optional: bool = False

    def misfit(self, value: Any, sizes: Sizes) -> str:
        if not isinstance(value, nn.Module):
            return f"is a {type(value).__name__}, expected a module"
        if self.cls is not None and type(value) is not self.cls:
            return f"is a {type(value).__name__}, expected a {self.cls.__name__}"
        return ""


def misfit(module: nn.Module, anatomy: Mapping[str, Kind]) -> str:
    """The first difference between a module and an anatomy; empty if it fits."""
    return measure(module, anatomy)[1]


def measure(module: nn.Module, anatomy: Mapping[str, Kind]) -> tuple[Sizes, str]:
    """The sizes of a module's parts, and its first difference from an anatomy; empty if it fits."""
    sizes = Sizes()
    for name in contents(module):
        if name not in anatomy:
            return sizes, f"{name} is not one of its parts"
    for name, kind in anatomy.items():
        value = getattr(module, name, None)
        if value is None:
            if not kind.optional:
                return sizes, f"{name} is missing"
        elif reason := kind.misfit(value, sizes):
            return sizes, f"{name} {reason}"
    return sizes, ""


def contents(module: nn.Module) -> Iterator[str]:
    """The names of all attributes that may take part in the computation of a module."""
    for registered in (module._modules, module._parameters, module._buffers):
        yield from (name for name, value in registered.items() if value is not None)
    for name, value in vars(module).items():
        called = callable(value) and not isinstance(value, type) and name not in _WRAPPERS
        if called or isinstance(value, Tensor):
            yield name


def _other_kind(value: Any, expected: type[nn.Module]) -> str:
    """Why a module cannot stand in place of torch's own class; empty if it can."""
    own = type(value).__module__.startswith("torch.nn.modules.")
    if not isinstance(value, nn.Module) or (own and not isinstance(value, expected)):
        return f"is a {type(value).__name__}, expected a {expected.__name__}"
    return ""


def _shape(weight: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None if it may be a flat piece of a sharded parameter."""
    if not isinstance(weight, Tensor):
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        return tuple(weight.shape) if isinstance(weight, DTensor) else None
    return tuple(weight.shape)
