"""What every operator checks and normalises before it chooses a backend."""

from __future__ import annotations

import torch
from torch import Tensor


def expect_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | str, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has the expected shape; a str in it names a free dimension."""
    fits = tensor.ndim == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = "(" + ", ".join(map(str, expected)) + ")"
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


def expect_same_dtype(operator: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors have the dtype of the first, a floating-point one."""
    first, *others = tensors
    dtype = tensors[first].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{operator}: expected a floating-point {first}, got {dtype}.")
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


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast the tensors in its dtype, as its matrix products take them; else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in _AUTOCAST_CASTS else t for t in tensors)


_AUTOCAST_CASTS = (torch.float32, torch.bfloat16, torch.float16)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, copied only if it has none."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
