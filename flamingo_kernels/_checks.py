"""Checks and conversions of arguments that all operators share."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._predicates import autocast_dtype

_FLOATING_POINT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = sys.float_info.max
_NUMBERS: Any = (Real, torch.SymFloat, torch.SymInt)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def expect_tensors(operator: str, **tensors: Any) -> None:
    """Raise TypeError unless each argument is a dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: expected {name} to be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.is_nested:
            raise TypeError(
                f"{operator}: expected a dense {name}, got a nested tensor; pad it with "
                "torch.nested.to_padded_tensor."
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{operator}: expected a dense {name}, got {tensor.layout}; make it dense with .to_dense()."
            )


def expect_number(operator: str, name: str, value: Any, least: float | None = None) -> float:
    """The value as a float; raise TypeError or ValueError unless it is finite and not below the least."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{operator}: expected {name} to be a number, got {type(value).__name__}.")
    number = float(value)
    if not (-_LARGEST if least is None else least) <= number <= _LARGEST:  # NaN is neither
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{operator}: expected {name} to be a finite number{bound}, got {value}.")
    return number


def expect_count(operator: str, name: str, value: Any, least: int = 0) -> int:
    """The value as an int; raise TypeError or ValueError unless it is one and not below the least."""
    if isinstance(value, torch.SymInt) or torch.jit.is_tracing():
        return value  # a traced size: the next call may have another
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{operator}: expected {name} to be an integer, got {type(value).__name__} {value!r}."
        )
    if value < least:
        raise ValueError(f"{operator}: expected {name} >= {least}, got {value}.")
    return int(value)


def expect_scale(operator: str, scale: Any, head_dim: int) -> float:
    """The factor on the scores as a float, by default `head_dim ** -0.5`."""
    if head_dim == 0:
        raise ValueError(f"{operator}: expected a head_dim of at least 1, got 0.")
    return head_dim**-0.5 if scale is None else expect_number(operator, "scale", scale)


def expect_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | str, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has the expected shape; a str in it names a free dimension."""
    if len(tensor.shape) == len(expected):
        for size, want in zip(tensor.shape, expected, strict=True):
            if size != want and not isinstance(want, str):
                break
        else:
            return
    shape = str(tuple(expected)).replace("'", "")
    raise ValueError(f"{operator}: expected {name} with shape {shape} {why}, got {tuple(tensor.shape)}.")


def expect_same_device(operator: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise ValueError(
                f"{operator}: expected {name} on {given[first].device} with {first}, "
                f"got {given[name].device}; move it with .to({first}.device)."
            )


def expect_floating_point(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor has a dtype that the reference computes in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATING_POINT:
            raise TypeError(
                f"{operator}: expected a floating-point {name}, got {tensor.dtype}; cast it to float32, "
                "bfloat16, float16 or float64."
            )


def expect_same_dtype(operator: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors have the dtype of the first, a floating-point one."""
    first, *others = tensors
    dtype = tensors[first].dtype
    expect_floating_point(operator, **{first: tensors[first]})
    for name in others:
        if tensors[name].dtype != dtype:
            raise TypeError(
                f"{operator}: expected {name} in {dtype} like {first}, got {tensors[name].dtype}; "
                f"cast it with .to({first}.dtype) or run under torch.autocast."
            )


def expect_head_groups(operator: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless every key/value head serves a whole number of query heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{operator}: expected the {heads} heads of q to be a multiple of the heads of k, got {kv_heads}."
        )


def expect_latents(operator: str, name: str, keys: Tensor, dim: int) -> None:
    """Raise ValueError if there is no key in this dimension: a softmax needs at least one."""
    if keys.shape[dim] == 0:
        raise ValueError(f"{operator}: expected at least one latent key, got {name} {tuple(keys.shape)}.")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that torch.autocast gives matrix products, or as they are where it is off."""
    dtype = autocast_dtype(tensors[0].device)
    return (
        tensors if dtype is None else tuple(t.to(dtype) if t.dtype in _AUTOCAST_CASTS else t for t in tensors)
    )


_AUTOCAST_CASTS = (torch.float32, torch.bfloat16, torch.float16)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which torch.autocast is off on the device of a tensor."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)  # it knows no "meta"


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, copied only if it is not."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    # .contiguous() would keep the strides of an empty tensor.
    return tensor.clone(memory_format=torch.contiguous_format)


def as_rows(tensor: Tensor) -> Tensor:  # [N, D]
    """A tensor `[..., D]` as rows with a contiguous last dimension, copied only if no such view exists."""
    return unit_stride(tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None])
