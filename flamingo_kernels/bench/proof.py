"""Whether a result is right, judged as a whole: outputs and all gradients together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Proof(NamedTuple):
    """The worst relative error of a result against float64, and how large it may be.

    A tensor's error is its largest difference over its largest value. Tensors of one element are taken
    together as one: the gradient of a gate is a sum that may nearly cancel, and eager may hit it by luck.
    """

    err: float
    budget: float  # 2 * eager's worst relative error + 2 eps

    @property
    def passed(self) -> bool:
        return self.err <= self.budget


def prove(result: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> Proof:
    """Hold a result against float64, beside eager's in the same dtype.

    Raises:
        AssertionError: another number, shape or dtype of tensors than eager's.
    """
    found, expected = ([(tuple(each.shape), each.dtype) for each in tensors] for tensors in (result, eager))
    if found != expected:
        raise AssertionError(f"expected tensors like eager's, {expected}, got {found}.")
    result, eager, exact = map(_join_scalars, (result, eager, exact))
    eps = max((torch.finfo(tensor.dtype).eps for tensor in eager), default=0.0)
    return Proof(_worst_error(result, exact), 2 * _worst_error(eager, exact) + 2 * eps)


def _join_scalars(tensors: Sequence[Tensor]) -> list[Tensor]:
    scalars = [tensor.flatten() for tensor in tensors if tensor.numel() == 1]
    others = [tensor for tensor in tensors if tensor.numel() != 1]
    return [*others, torch.cat(scalars)] if scalars else others


def _worst_error(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    errors = [0.0]
    for tensor, wanted in zip(tensors, exact, strict=True):
        if wanted.numel():
            difference = (tensor.double() - wanted).abs().max().item()
            largest = wanted.abs().max().item()
            errors.append(difference / largest if largest else math.inf if difference else 0.0)
    return math.nan if any(map(math.isnan, errors)) else max(errors)  # max() alone may lose a NaN
