"""Checks of the tensors that a kernel dereferences, as anybody can call torch.ops.flamingo_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...ops.weights import Linear

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
        self._side_by_side(name, tensor)

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

    def vector(self, name: str, tensor: Tensor, size: int) -> None:
        """`[size]` in any dtype of the kernels and any layout."""
        self._number(name, tensor)
        self._place(name, tensor, (size,))

    def layer(self, names: Sequence[str], layer: Linear, shape: tuple[int, int]) -> None:
        """A weight in the dtype of the first tensor, or of int8 with a scale in float32; perhaps a bias. The
        names are those of weight, bias and scale.
        """
        weight, bias, scale = names
        if layer.scale is None:
            self.rows_like_first(weight, layer.weight, shape)
        else:
            self._dtype(weight, layer.weight, torch.int8)
            self._place(weight, layer.weight, shape)
            self._side_by_side(weight, layer.weight)
            self._dtype(scale, layer.scale, torch.float32)
            self._place(scale, layer.scale, shape[:1])
        if layer.bias is not None:
            self.vector(bias, layer.bias, shape[0])

    def place(self, name: str, place: int, size: int) -> None:
        """One in a table of so many."""
        if not 0 <= place < size:
            self._refuse(ValueError, f"{name} from 0 to {size - 1}", place)

    def count(self, name: str, values: Sequence[Any], size: int) -> None:
        if len(values) != size:
            self._refuse(ValueError, f"{size} {name}", len(values))

    def given(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            self._refuse(ValueError, name, "none")

    def whole(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Contiguous, in one dtype."""
        self._dtype(name, tensor, dtype)
        self._place(name, tensor, shape)
        if not tensor.is_contiguous():
            self._refuse(ValueError, f"a contiguous {name}", f"strides {tensor.stride()}")

    def latents(self, name: str, tensor: Tensor, dim: int) -> None:
        """A softmax needs at least one key."""
        if tensor.shape[dim] == 0:
            self._refuse(ValueError, f"{name} with at least one latent", tuple(tensor.shape))

    def divisor(self, name: str, sequences: int, texts: int) -> None:
        """Texts in a row may share a sequence of media."""
        if texts % sequences if sequences else texts:
            self._refuse(ValueError, f"{name} of {texts} sequences or a divisor of them", sequences)

    def head_groups(self, heads: int, kv_heads: int) -> None:
        if kv_heads == 0 or heads % kv_heads:
            self._refuse(
                ValueError, f"the {heads} heads of q to be a multiple of those of the keys", kv_heads
            )

    def _number(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES:
            self._refuse(TypeError, f"{name} in float32, bfloat16 or float16", tensor.dtype)

    def _dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            self._refuse(TypeError, f"{name} in {dtype}", tensor.dtype)

    def _side_by_side(self, name: str, tensor: Tensor) -> None:
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1 and tensor.numel():
            self._refuse(ValueError, f"{name} with a contiguous last dimension", f"strides {tensor.stride()}")

    def _place(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            self._refuse(ValueError, f"{name} with shape {tuple(shape)}", tuple(tensor.shape))
        self._device(name, tensor)

    def _device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.first.device:
            self._refuse(ValueError, f"{name} on {self.first.device} with {self.first_name}", tensor.device)

    def _refuse(self, error: type[Exception], expected: str, got: Any) -> NoReturn:
        raise error(f"{self.operation}: expected {expected}, got {got}.")
