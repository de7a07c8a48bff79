"""Activations of a hidden layer: forward, and backward from their input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._predicates import is_eager


class Activation(NamedTuple):
    """A function of each element, in the three ways that a hidden layer calls it.

    Attributes:
        forward: `act(u)`, into a tensor, which may be u.
        backward: `dh * act'(u)`, which may take the memory of dh.
        eager: `act(u)`, for autograd.
        modules: classes of modules that compute it, or their names; GELUs also depend on their attributes.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    modules: tuple[type[nn.Module] | str, ...] = ()


def _in_place(backward: Any, dh: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """A backward operation that writes into dh, except under a compiler, which plans its memory itself."""
    if not is_eager(dh):
        return backward(dh, *arguments, **options)
    return backward.grad_input(dh, *arguments, **options, grad_input=dh)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda u, into: _aten.gelu.out(u, approximate=approximate, out=into),
        lambda dh, u: _in_place(_aten.gelu_backward, dh, u, approximate=approximate),
        partial(F.gelu, approximate=approximate),
    )


_aten = torch.ops.aten
ACTIVATIONS = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(
        lambda u, into: torch.clamp_min(u, 0, out=into),
        lambda dh, u: _in_place(_aten.threshold_backward, dh, u, 0),
        F.relu,
        (nn.ReLU,),
    ),
    "squared_relu": Activation(
        lambda u, into: torch.clamp_min(u, 0, out=into).square_(),
        lambda dh, u: dh.mul_(u.clamp_min(0)).mul_(2),
        lambda u: F.relu(u).square(),
        ("flamingo.modules.SquaredReLU", "transformers.activations.ReLUSquaredActivation"),
    ),
    "silu": Activation(
        lambda u, into: _aten.silu.out(u, out=into),
        lambda dh, u: _in_place(_aten.silu_backward, dh, u),
        F.silu,
        (nn.SiLU, "transformers.activations.SiLUActivation"),
    ),
}
