"""The products of a linear layer by every library that torch can call: forward, and the two gradients.

torch gives a product in float32 to MKL, where it has that, and one in bfloat16 or float16 to oneDNN. MKL
takes a slower path on other processors than Intel's, and few rows nowhere well. oneDNN takes a product in any
of these dtypes, through operations that torch keeps for its compiler: they are looked for once, and called
only as torch's own switches allow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as checks
from ..._backends import cpu, cuda, dispatch, triton
from ..._predicates import is_eager
from . import config
from .schema import ACTIVATIONS, FWD


class Product(NamedTuple):
    """The products of rows and a weight by one library.

    Attributes:
        forward: `x @ weight.T + bias` of x `[..., in]`, weight `[out, in]`, and bias `[out]` or None.
        dx: `dy @ weight` of dy `[N, out]` and the weight.
        dw: `dy.T @ x` of dy and x `[N, in]`.
        why_not: why it cannot multiply tensors of this dtype now, or an empty string.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dx: Callable[[Tensor, Tensor], Tensor]
    dw: Callable[[Tensor, Tensor], Tensor]
    why_not: Callable[[torch.dtype], str]


def fastest(way: str, a: Tensor, b: Tensor, weights: int) -> str:
    """Which product was measured to be the fastest: a name in `PRODUCTS`.

    Args:
        way: "forward", "dx" or "dw".
        a, b: what is multiplied, in the order of the product's arguments; a has the rows.
        weights: how many the weight has.
    """
    if torch.compiler.is_compiling() or weights < config.LEAST_WEIGHTS or type(a) not in _PLAIN:
        return "torch"
    rows = a.numel() // (a.shape[-1] if a.numel() and a.ndim else 1)
    name = config.choose(way, a.dtype, rows)
    if name == "torch" or not _are_plain(a, b) or PRODUCTS[name].why_not(a.dtype):
        return "torch"
    return "torch" if name == "cpu" and not _suits_kernel(rows, b) else name


def _suits_kernel(rows: int, b: Tensor) -> bool:
    """Whether the kernel is what was measured: not where it must copy a transposed weight, nor for many rows
    where tiles, which are 32 wide, cannot take them.
    """
    return b.stride(-1) == 1 and (rows <= FEW_ROWS or b.shape[-1] % 32 == 0)


def _are_plain(a: Tensor, b: Tensor) -> bool:
    """Whether both are plain, in a dtype of the kernels on the processor, and nothing watches or casts."""
    return (
        is_plain(a)
        and is_plain(b)
        and a.dtype == b.dtype
        and a.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and is_eager(a)
    )


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a kernel on the processor can read a tensor that is nothing but its numbers; None is none."""
    if tensor is None:
        return True
    plain = type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided
    return plain and tensor.dtype in dispatch.KERNEL_DTYPES


_PLAIN = (Tensor, nn.Parameter)
FEW_ROWS = 16  # of x, which the kernel on a processor multiplies one at a time


def by_kernel(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    activation: str | None = None,
    gate: Tensor | None = None,  # 1 or out elements
    residual: Tensor | None = None,  # [..., out]
    weight_scale: Tensor | None = None,  # [out], of a weight of int8
    backend: str = "cpu",
) -> Tensor:  # [..., out]
    """Our kernels, with what follows the product; x and residual in any strides."""
    y: Tensor = FWD[backend](
        checks.as_rows(x),
        checks.unit_stride(weight),
        weight_scale,
        None if bias is None else checks.unit_stride(bias),
        ACTIVATIONS.index(activation),
        gate,
        None if residual is None else checks.as_rows(residual),
    )
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(weight))


def _why_no_mkl(dtype: torch.dtype) -> str:
    if not torch.backends.mkl.is_available():
        return "this torch is built without MKL"
    if dtype != torch.float32:
        return f"torch gives it no product in {dtype}"
    if torch.get_float32_matmul_precision() != "highest":
        return "torch gives it no product while torch.set_float32_matmul_precision asks for less than float32"
    return ""


def _why_no_onednn(dtype: torch.dtype) -> str:
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is switched off"
    if not _has_onednn():
        return f"torch {torch.__version__} has no operation that takes its product"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "it has no products in bfloat16 for this processor"
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "it has no products in float16 for this processor"
    return ""


@cache
def _has_onednn() -> bool:
    """Whether torch has its private operation for a product by oneDNN, with the arguments that we know."""
    kind: Any = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are
    try:
        _multiply_by_onednn(torch.ones(2, 3, **kind), torch.ones(4, 3, **kind))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


_BY_TORCH = Product(F.linear, torch.mm, lambda dy, x: torch.mm(dy.t(), x), lambda dtype: "")


def _of_kernel(backend: str, why_not: Callable[[], str]) -> Product:
    return _BY_TORCH._replace(forward=partial(by_kernel, backend=backend), why_not=lambda dtype: why_not())


# Ours by backend, with gradients of torch's kind.
KERNELS = {
    "cpu": _of_kernel("cpu", cpu.why_not),
    "cuda": _of_kernel("cuda", cuda.why_not),
    "triton": _of_kernel("triton", triton.why_not),
}
# By name; "torch" is what F.linear and the gradients of it call.
PRODUCTS = {
    "torch": _BY_TORCH,
    **KERNELS,
    "mkl": _BY_TORCH._replace(why_not=_why_no_mkl),
    "onednn": Product(
        _multiply_by_onednn,
        lambda dy, weight: _multiply_by_onednn(dy, weight.t()),
        lambda dy, x: _multiply_by_onednn(dy.t(), x.t()),
        _why_no_onednn,
    ),
}
