"""A linear layer, with what may follow it: activation, gate and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks as checks
from ..._backends import cpu, dispatch
from ..._predicates import is_batched, is_eager, needs_grad
from . import config, reference
from .config import TORCH as _TORCH
from .config import Ways
from .products import PRODUCTS
from .schema import ACTIVATIONS, FWD

_NAME = "linear"
_LIBRARIES = ("mkl", "onednn")


def linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    *,
    activation: str | None = None,
    residual: Tensor | None = None,  # [..., out]
    gate: Tensor | None = None,  # [1] or [out]
    backend: str = "auto",
) -> Tensor:  # [..., out]
    """A linear layer by the product that is the fastest for its rows, and what follows it::

        residual + tanh(gate) * activation(x @ weight.T + bias)

    For few rows a kernel reads every weight once, at the speed of the memory, and what follows costs no pass
    of its own. For many it is the library that was measured to be the fastest on processors of this kind.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16 (the reference takes float64 too).
        weight: `[out, in]`, same dtype.
        bias: `[out]`, same dtype. Default: none.
        activation: "gelu" (erf), "gelu_tanh", "relu", "squared_relu" or "silu". Default: none.
        residual: `[..., out]`, added last; its dtype may differ. Default: none.
        gate: alpha before tanh, 1 element or one an output; its dtype may differ. Default: a factor of 1.
        backend: "auto", "cpu" (our kernel, made for up to 16 rows), "onednn", "mkl" or "reference" (torch's
            product, whatever that is). "auto" takes what `python -m flamingo_kernels tune linear` found, and
            torch's product where nobody has measured.

    Returns:
        `[..., out]` in the dtype that torch's promotion gives the sum, contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: an argument that is no dense floating-point tensor, or a product of two dtypes.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: "cpu" has no backward pass of its own: gradients are products as "auto" takes them. It computes in
    float32 and rounds once; a row's result is the same to the last bit for any number of threads and of other
    rows. The libraries' products are as deterministic as torch's, whose switches they heed
    (`torch.backends.mkldnn.flags`, `torch.set_float32_matmul_precision`). Differentiable as often as torch's
    own. Under torch.autocast the product takes its dtype. Under a compiler, in torch.func's transforms and
    on a GPU "auto" is torch's product; the libraries are refused there.

    Source: Flamingo (arXiv 2204.14198), section 2.2, for gate and residual.

    Example:
        >>> x, weight, residual = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(2, 3, 8)
        >>> linear(x, weight, activation="gelu").shape
        torch.Size([2, 3, 8])
        >>> torch.equal(linear(x, weight, residual=residual, gate=torch.zeros(1)), residual)
        True
    """
    _validate(x, weight, bias, activation, residual, gate)
    x, weight, *others = checks.autocast(x, weight, *([] if bias is None else [bias]))
    bias = others[0] if others else None
    checks.expect_same_dtype(_NAME, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    asked = dispatch.default_backend if backend == "auto" else backend
    if asked != "auto":
        asked = dispatch.resolve(_NAME, asked, x, weight, bias, residual, gate)
    gate = gate.flatten() if gate is not None and gate.ndim > 1 else gate
    with checks.without_autocast(x):
        if asked == "reference" or x.numel() == 0 or len(weight) == 0:
            return reference.linear(x, weight, bias, activation, gate, residual).contiguous()
        ways = _ways(asked, x, weight, bias)
        fused = ways.forward == "cpu" and (asked == "cpu" or (_is_plain(gate) and _is_plain(residual)))
        if fused and not needs_grad(x, weight, bias, residual, gate):
            y = _few_rows(x, weight, bias, activation, gate, residual)
        else:
            y = reference.follow(_product(ways, x, weight, bias), activation, gate, residual)
        return y.contiguous()


def multiply(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
) -> Tensor:  # [..., out]
    """`F.linear` by the fastest product, for layers; it asks little, as a decoding step calls it often."""
    if weight.numel() < config.LEAST_WEIGHTS or not _is_simple(x, weight, bias):
        return F.linear(x, weight, bias)
    ways = _fastest(x)
    return F.linear(x, weight, bias) if ways == _TORCH else _product(ways, x, weight, bias)


def _ways(asked: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Ways:
    """The products of a call: those that were asked for, or by "auto" the fastest."""
    if asked in _LIBRARIES:
        return Ways(asked, asked, asked)
    if asked == "cpu":
        return (_TORCH if torch.compiler.is_compiling() else _fastest(x))._replace(forward="cpu")
    return _fastest(x) if weight.numel() >= config.LEAST_WEIGHTS and _is_simple(x, weight, bias) else _TORCH


def _fastest(x: Tensor) -> Ways:
    ways = config.choose(x.dtype, x.numel() // x.shape[-1])
    if ways == _TORCH or not any(_why_not(name, x.dtype) for name in ways):
        return ways
    return Ways(*("torch" if _why_not(name, x.dtype) else name for name in ways))


def _why_not(name: str, dtype: torch.dtype) -> str:
    """Why a product that was measured to be the fastest cannot run now, or an empty string."""
    return cpu.why_not() if name == "cpu" else PRODUCTS[name].why_not(dtype)


def _is_simple(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all are plain tensors of one kernel dtype on the processor, and nothing watches or casts.

    Shapes as a layer has them, too: torch takes others, as a weight of one dimension.
    """
    dtype = x.dtype
    return (
        x.is_cpu
        and weight.is_cpu
        and x.layout == weight.layout == torch.strided
        and dtype in dispatch.KERNEL_DTYPES
        and weight.dtype == dtype
        and weight.ndim == 2
        and type(weight) in _PLAIN
        and (
            bias is None or (bias.dtype == dtype and type(bias) in _PLAIN and bias.shape == weight.shape[:1])
        )
        and not torch.is_autocast_enabled("cpu")
        and is_eager(x)
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and x.shape[-1:] == weight.shape[-1:]
    )


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether the kernel can read what follows the product, or there is none."""
    return tensor is None or (type(tensor) in _PLAIN and tensor.dtype in dispatch.KERNEL_DTYPES)


_PLAIN = (Tensor, torch.nn.Parameter)


def _few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The kernel, on rows of any strides."""
    y: Tensor = FWD["cpu"](
        checks.as_rows(x),
        checks.unit_stride(weight),
        None if bias is None else checks.unit_stride(bias),
        ACTIVATIONS.index(activation),
        gate,
        None if residual is None else checks.as_rows(residual),
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(ways: Ways, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if needs_grad(x, weight, bias):
        return F.linear(x, weight, bias) if ways == _TORCH else _Linear.apply(ways, x, weight, bias)
    return _forward(ways.forward, x, weight, bias)


def _forward(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _few_rows(x, weight, bias) if name == "cpu" else PRODUCTS[name].forward(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ways, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        ctx.ways = ways
        return _forward(ways.forward, x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        batched = is_batched(dy)
        # A gradient that is differentiated again is made of operations whose derivatives torch knows; a batch
        # of them, of those that it knows how to batch.
        dx_by, dw_by = ("torch", "torch") if torch.is_grad_enabled() or batched else ctx.ways[1:]
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1]) if batched else checks.as_rows(dy)
        dx = PRODUCTS[dx_by].dx(rows, weight).view(*dy.shape[:-1], weight.shape[1]) if needs_x else None
        dweight = PRODUCTS[dw_by].dw(rows, checks.as_rows(x)) if needs_weight else None
        return None, dx, dweight, rows.sum(0) if needs_bias else None


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        legal = ", ".join(map(str, ACTIVATIONS))
        raise ValueError(f"{_NAME}: expected activation to be one of {legal}, got {activation!r}.")
    given = {"bias": bias, "residual": residual, "gate": gate}
    tensors = {"x": x, "weight": weight, **{name: each for name, each in given.items() if each is not None}}
    checks.expect_tensors(_NAME, **tensors)
    if x.ndim == 0:
        raise ValueError(f"{_NAME}: expected x with shape (..., in), got ().")
    checks.expect_shape(_NAME, "weight", weight, ("out", x.shape[-1]), "to match x")
    out = weight.shape[0]
    if bias is not None:
        checks.expect_shape(_NAME, "bias", bias, (out,), "to match weight")
    if residual is not None:
        checks.expect_shape(_NAME, "residual", residual, (*x.shape[:-1], out), "to match x and weight")
    if gate is not None and (gate.numel() not in (1, out) or gate.shape[:-1].numel() != 1):
        raise ValueError(f"{_NAME}: expected a gate of 1 or out={out} elements, got {tuple(gate.shape)}.")
    checks.expect_floating_point(_NAME, **tensors)
    checks.expect_same_device(_NAME, **tensors)


dispatch.register(
    _NAME,
    sizes=lambda *_: {},
    libraries={name: PRODUCTS[name].why_not for name in _LIBRARIES},
    cpu={},
    reference={},
)
