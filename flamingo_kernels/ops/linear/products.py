"""The products of a linear layer by every library that torch can call: forward, and the two gradients.

torch gives a product in float32 to MKL, where it has that, and one in bfloat16 or float16 to oneDNN. MKL
takes a slower path on other processors than Intel's, and few rows nowhere well. oneDNN takes a product in any
of these dtypes, through operations that torch keeps for its compiler: they are looked for once, and called
only as torch's own switches allow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(NamedTuple):
    """A library's products of rows and a weight.

    Attributes:
        forward: `x @ weight.T + bias` of x `[N, in]`, weight `[out, in]`, and bias `[out]` or None.
        dx: `dy @ weight` of dy `[N, out]` and the weight.
        dw: `dy.T @ x` of dy and x.
        why_not: why it cannot multiply tensors of this dtype now, or an empty string.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dx: Callable[[Tensor, Tensor], Tensor]
    dw: Callable[[Tensor, Tensor], Tensor]
    why_not: Callable[[torch.dtype], str]


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


_BY_TORCH = Product(
    F.linear,
    torch.mm,
    lambda dy, x: torch.mm(dy.t(), x),
    lambda dtype: "",
)

PRODUCTS = {
    "torch": _BY_TORCH,
    "mkl": _BY_TORCH._replace(why_not=_why_no_mkl),
    "onednn": Product(
        _multiply_by_onednn,
        lambda dy, weight: _multiply_by_onednn(dy, weight.t()),
        lambda dy, x: _multiply_by_onednn(dy.t(), x.t()),
        _why_no_onednn,
    ),
}
