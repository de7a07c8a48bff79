"""Checks of the tensors that a kernel dereferences, as anybody can call torch.ops.flamingo_kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checks:
    """The checks of one operation. All tensors must lie on the device of the first.

    Example:
        >>> Checks("gated_residual_fwd", "x", torch.ones(2, 4), 2).rows("y", torch.ones(2, 5), (2, 4))
        Traceback (most recent call last):
        ValueError: gated_residual_fwd: expected y with shape (2, 4), got (2, 5).
    """

    def __init__(self, operation: str, first_name: str, first: Tensor, dimensions: int) -> None:
        self.operation, self.first_name, self.first = operation, first_name, first
        self.dimensions(first_name, first, dimensions)

    def dimensions(self, name: str, tensor: Tensor, dimensions: int) -> None:
        if tensor.ndim != dimensions:
            self._refuse(ValueError, f"{name} with {dimensions} dimensions", tuple(tensor.shape))

    def rows(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """`[..., D]` in any dtype of the kernels, with the elements of a row side by side."""
        self._number(name, tensor)
        self._place(name, tensor, shape)
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1 and tensor.numel():
            self._refuse(ValueError, f"{name} with a contiguous last dimension", f"strides {tensor.stride()}")

    def rows_like_first(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """The same, in the dtype of the first tensor."""
        self.rows(name, tensor, shape)
        if tensor.dtype != self.first.dtype:
            self._refuse(TypeError, f"{name} in {self.first.dtype} like {self.first_name}", tensor.dtype)

    def parameter(self, name: str, tensor: Tensor, channels: int) -> None:
        """One element for all channels or one for each, in any dtype of the kernels and any layout."""
        self._number(name, tensor)
        self._device(name, tensor)
        if tensor.numel() not in (1, channels):
            self._refuse(ValueError, f"{name} with 1 or {channels} elements", f"shape {tuple(tensor.shape)}")

    def whole(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Contiguous, in one dtype."""
        if tensor.dtype != dtype:
            self._refuse(TypeError, f"{name} in {dtype}", tensor.dtype)
        self._place(name, tensor, shape)
        if not tensor.is_contiguous():
            self._refuse(ValueError, f"a contiguous {name}", f"strides {tensor.stride()}")

    def latents(self, name: str, tensor: Tensor, dim: int) -> None:
        """A softmax needs at least one key."""
        if tensor.shape[dim] == 0:
            self._refuse(ValueError, f"{name} with at least one latent", tuple(tensor.shape))

    def head_groups(self, heads: int, kv_heads: int) -> None:
        if kv_heads == 0 or heads % kv_heads:
            self._refuse(
                ValueError, f"the {heads} heads of q to be a multiple of those of the keys", kv_heads
            )

    def _number(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES:
            self._refuse(TypeError, f"{name} in float32, bfloat16 or float16", tensor.dtype)

    def _place(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            self._refuse(ValueError, f"{name} with shape {tuple(shape)}", tuple(tensor.shape))
        self._device(name, tensor)

    def _device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.first.device:
            self._refuse(ValueError, f"{name} on {self.first.device} with {self.first_name}", tensor.device)

    def _refuse(self, error: type[Exception], expected: str, got: Any) -> NoReturn:
        raise error(f"{self.operation}: expected {expected}, got {got}.")
