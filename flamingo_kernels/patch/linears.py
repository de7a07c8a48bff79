"""The linear layers of a whole model, by the fastest product: `patch(model, linears=True)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .._predicates import is_ordinary
from ..ops.linear import config, multiply
from .swap import has_other_forward, is_swapped, original_class, swap

_CONV1D = ("transformers.pytorch_utils", "Conv1D")


class Linear(nn.Linear):
    """A linear layer by the product that is the fastest for its rows, see `flamingo_kernels.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(input, self.weight, self.bias)

    forward.same_as = nn.Linear.forward  # type: ignore[attr-defined]


class Conv1D(nn.Module):
    """The same for transformers' linear layer of GPT-2, whose weight is `[in, out]`."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight.t(), self.bias)


def find(model: nn.Module, *, also_swapped: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """Every linear layer of a model with its path, and why it must stay as it is, or an empty string."""
    inside = _of_attention(model)
    for path, module in model.named_modules():
        if is_linear(module) and (also_swapped or not is_swapped(module)):
            reason = (
                "its attention multiplies by its weight itself" if id(module) in inside else _why_not(module)
            )
            yield path, module, reason


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch or transformers, swapped or not."""
    return isinstance(module, nn.Linear) or _is_conv1d(original_class(module))


def expect_table(layers: Iterable[Any]) -> None:
    """Raise ValueError if these layers will choose their products by a table that is damaged."""
    if any(layer.weight.numel() >= config.LEAST_WEIGHTS for layer in layers):
        config.table()


def swap_linear(module: nn.Module) -> None:
    """Give a linear layer the forward with the fastest product."""
    swap(module, Linear if isinstance(module, nn.Linear) else Conv1D)


def _of_attention(model: nn.Module) -> set[int]:
    """The layers that torch's own attention never calls."""
    owners = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {id(module) for owner in owners for module in owner.modules() if isinstance(module, nn.Linear)}


def _is_conv1d(cls: type[nn.Module]) -> bool:
    return (cls.__module__, cls.__name__) == _CONV1D


def _why_not(module: Any) -> str:
    cls = original_class(module)
    if cls is not nn.Linear and not _is_conv1d(cls):
        return f"{cls.__name__} is a linear layer of another kind"
    if has_other_forward(module):
        return f"{cls.__name__} has a forward set on the instance"
    weight = module.weight
    if not is_ordinary(weight):
        return f"its weight is a {type(weight).__name__}, which computes in its own way"
    return "" if weight.is_floating_point() else f"its weight is in {weight.dtype}"
