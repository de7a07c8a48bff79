"""Linear layers with a weight of 8-bit integers: the classes that `quantize` gives to layers.

A layer whose original is kept has it as its parameter still, and makes the integers anew when that has
changed. One without has the integers as its `weight`, and their scales as `weight_scale`. Both are buffers,
so that the first of a model's parameters still tells in which dtype it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._predicates import is_transformed
from ..ops.linear import int8

_SAMPLE = 61  # numbers of a weight that are compared, for changes that torch does not count


@dataclass(frozen=True)
class Integers:
    """The integers of a weight, and what tells whether it is still the one that they were made of.

    Attributes:
        weight: int8 `[out, in]`.
        scale: float32 `[out]`.
        source: the weight.
        version: torch's count of its changes; None where torch does not count.
        sampled: a view of some of its numbers.
        sample: a copy of them.
    """

    weight: Tensor
    scale: Tensor
    source: Tensor
    version: int | None
    sampled: Tensor
    sample: Tensor

    @staticmethod
    def of(source: Tensor, weight: Tensor) -> Integers:
        """Those of a parameter, whose numbers are `weight` `[out, in]`."""
        sampled = _some(source.detach())
        integers, scale = int8.quantize_weight(weight)
        return Integers(integers, scale, source, _version(source), sampled, sampled.clone())

    def are_of(self, source: Tensor) -> bool:
        """Whether they stand for this parameter as it is now."""
        same = source is self.source and _version(source) == self.version
        if not same or source.data_ptr() != self.sampled.data_ptr() or source.dtype != self.sample.dtype:
            return False
        return torch.equal(self.sampled, self.sample)


class Quantized(nn.Module):
    """What layers with integers share.

    Attributes:
        integers: those of the weight, where that is kept; None where the weight is integers.
        learned: whether the kept weight required a gradient.
        was: the class of the layer before.
    """

    reads_parameters_alone = True  # so K and V that it makes may be kept

    weight: Any
    bias: Any
    weight_scale: Any
    integers: Integers | None
    learned: bool
    was: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight, scale = self.integer_weight()
        return int8.multiply(input, weight, scale, self.bias)

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """The integers and their scales, those of the weight as it is now."""
        source, kept = self.weight, self.integers
        if source.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: expected a weight that needs no gradient, which integers do not "
                "have; weight.requires_grad_(False), or unquantize(model) before training it."
            )
        if kept is None:
            if source.dtype != torch.int8:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a weight of torch.int8, as quantize(keep=False) leaves "
                    f"it, got {source.dtype}; quantize the model with the new weight again."
                )
            return source, self.weight_scale
        # A compiler's code cannot make integers, so it takes those that are there.
        if not torch.compiler.is_compiling() and not is_transformed(source) and not kept.are_of(source):
            self.integers = kept = Integers.of(source, self.rows_of(source))
        return kept.weight, kept.scale

    def rows_of(self, weight: Tensor) -> Tensor:
        """The weight as `[out, in]`."""
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self._buffers.get("weight_scale")
        super()._apply(fn, recurse)
        if scale is not None and self.weight_scale.dtype != scale.dtype:  # half its bits would be lost
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        loaded, wanted = state.get(f"{prefix}weight"), self.weight.dtype
        if isinstance(loaded, Tensor) and (loaded.dtype == torch.int8) != (wanted == torch.int8):
            kept = "True" if self.integers is None else "False"
            errors.append(
                f"{prefix}weight: expected {wanted}, got {loaded.dtype}, as of a model with "
                f"{'its own weights' if self.integers is None else 'integers'}; load it into a model that "
                f"is not quantized, or quantize(model, keep={kept}) before."
            )
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


class QuantizedLinear(Quantized, nn.Linear):
    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {_repr(self)}"


class QuantizedConv1D(Quantized):
    """transformers' linear layer of GPT-2, whose weight is `[in, out]`; as integers `[out, in]`."""

    def rows_of(self, weight: Tensor) -> Tensor:
        return weight.t()

    def extra_repr(self) -> str:
        return _repr(self)


def quantize_layer(layer: Any, *, keep: bool) -> float:
    """Give a plain linear layer its integers; returns the largest error of a weight.

    Raises:
        ValueError: its weight is not finite. The layer is then unchanged.
    """
    cls = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv1D
    rows = cls.rows_of(layer, layer.weight.detach())
    made = Integers.of(layer.weight, rows)
    error = int8.largest_error(rows, made.weight, made.scale)
    layer.was, layer.learned = type(layer), layer.weight.requires_grad
    layer.__class__ = cls
    if keep:
        layer.integers = made
        layer.weight.requires_grad_(False)
    else:
        layer.integers = None
        del layer.weight
        layer.register_buffer("weight", made.weight)
        layer.register_buffer("weight_scale", made.scale)
    return error


def restore_layer(layer: Any) -> None:
    """Make a layer whose weight is kept what it was before."""
    layer.weight.requires_grad_(layer.learned)
    layer.__class__ = layer.was
    for name in ("integers", "learned", "was"):
        vars(layer).pop(name)


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, Quantized)


def integers_of(layer: Quantized) -> tuple[Tensor, Tensor]:
    """The integers and scales of a layer."""
    kept = layer.integers
    return (layer.weight, layer.weight_scale) if kept is None else (kept.weight, kept.scale)


def _repr(layer: Quantized) -> str:
    return "int8" if layer.integers is None else "int8, weight kept"


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _some(tensor: Tensor) -> Tensor:
    """A view of some numbers from all over a tensor's memory."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or span <= _SAMPLE:
        return tensor.as_strided((min(span, tensor.numel()),), (1,))
    step = (span - 1) // (_SAMPLE - 1)
    return tensor.as_strided((_SAMPLE,), (step - 1 + step % 2,))  # an odd step meets all columns
