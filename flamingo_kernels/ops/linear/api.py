"""A linear layer, with what may follow it: activation, gate and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as checks
from ..._backends import dispatch
from ..._predicates import is_batched, needs_grad
from . import int8, products, reference
from .products import KERNELS, PRODUCTS
from .schema import ACTIVATIONS

_NAME = "linear"
_LIBRARIES = ("mkl", "onednn")


def linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    *,
    weight_scale: Tensor | None = None,  # [out]
    activation: str | None = None,
    residual: Tensor | None = None,  # [..., out]
    gate: Tensor | None = None,  # [1] or [out]
    backend: str = "auto",
) -> Tensor:  # [..., out]
    """A linear layer by the product that is the fastest for its rows, and what follows it::

        residual + tanh(gate) * activation(x @ weight.T + bias)

    For few rows a kernel reads every weight once, at the speed of the memory, and what follows costs no pass
    of its own. For many it is the library that was measured to be the fastest on processors of this kind.

    With `weight_scale` the weight is `weight_scale[:, None] * weight` of 8-bit integers, a quarter of the
    bytes of float32: see `quantize`. On a processor a kernel multiplies the integers. It rounds each row of x
    to 16-bit integers of a scale of its own. Where the processor has products of 8 bits, x has so many from 5
    rows on (AVX-VNNI, AVX-512 VNNI) or from 17 on (AMX), unless the largest number of a row is above 16 times
    the root of its mean square: 8 bits would leave the others few steps. On a GPU the integers become numbers
    in the dtype of x in registers, which is exact.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16 (the reference takes float64 too).
        weight: `[out, in]`, same dtype; int8 with `weight_scale`.
        bias: `[out]`, in the dtype of x. Default: none.
        weight_scale: `[out]`, float32, of a weight of integers. Default: none, for other weights.
        activation: "gelu" (erf), "gelu_tanh", "relu", "squared_relu" or "silu". Default: none.
        residual: `[..., out]`, added last; its dtype may differ. Default: none.
        gate: alpha before tanh, 1 element or one an output; its dtype may differ. Default: a factor of 1.
        backend: "auto", "cpu", "triton" or "cuda" (our kernels, made for up to 16 rows; "cpu" takes any
            number of rows where the weight is of integers), "onednn", "mkl" or "reference" (torch's product,
            whatever that is). "auto" takes what `python -m flamingo_kernels tune linear` found, and torch's
            product where nobody has measured; of integers on a GPU a kernel for few rows, and for more
            torch's product with the weight in the dtype of x.

    Returns:
        `[..., out]` in the dtype that torch's promotion gives the sum, contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: an argument that is no dense floating-point tensor, a product of two dtypes, or integers
            without a scale.
        UnsupportedError: the requested backend cannot run these inputs.

    Limits: our kernels have no backward pass of their own: gradients are products as "auto" takes them. They
    compute in float32 and round once; a row's result is the same to the last bit for any number of threads,
    and on a processor of other rows, but where weights are of integers, and that bfloat16 on AMX takes tiles
    from 5 rows on. The libraries' products are as deterministic as torch's, whose switches
    they heed (`torch.backends.mkldnn.flags`, `torch.set_float32_matmul_precision`). Differentiable as often
    as torch's own. Under torch.autocast the product takes its dtype. Under a compiler, in torch.func's
    transforms and on a GPU "auto" is torch's product of weights that are no integers; the libraries are
    refused there.

    Source: Flamingo (arXiv 2204.14198), section 2.2, for gate and residual.

    Example:
        >>> x, weight, residual = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(2, 3, 8)
        >>> linear(x, weight, activation="gelu").shape
        torch.Size([2, 3, 8])
        >>> torch.equal(linear(x, weight, residual=residual, gate=torch.zeros(1)), residual)
        True
    """
    alone = activation is None and residual is None and gate is None and weight_scale is None
    if alone and backend == dispatch.default_backend == "auto" and _is_usual(x, weight, bias):
        return multiply(x, weight, bias)
    _validate(x, weight, bias, weight_scale, activation, residual, gate)
    if weight_scale is None:
        x, weight, *others = checks.autocast(x, weight, *([] if bias is None else [bias]))
    else:
        x, *others = checks.autocast(x, *([] if bias is None else [bias]))
    bias = others[0] if others else None
    same = {"x": x, "weight": weight if weight_scale is None else None, "bias": bias}
    checks.expect_same_dtype(_NAME, **{name: each for name, each in same.items() if each is not None})
    asked = dispatch.default_backend if backend == "auto" else backend
    if asked != "auto":
        numbers = weight if weight_scale is None else weight_scale
        asked = dispatch.resolve(_NAME, asked, x, numbers, bias, residual, gate)
    gate = gate.flatten() if gate is not None and gate.ndim > 1 else gate
    with checks.without_autocast(x):
        if asked == "reference" or x.numel() == 0 or len(weight) == 0:
            return reference.linear(x, weight, bias, activation, gate, residual, weight_scale).contiguous()
        if weight_scale is not None:
            return _of_integers(asked, x, weight, weight_scale, bias, activation, gate, residual)
        by = _fastest(x, weight, bias) if asked == "auto" else asked
        fused = by in KERNELS and (asked == by or all(map(products.is_plain, (gate, residual))))
        if fused and not needs_grad(x, weight, bias, residual, gate):
            return products.by_kernel(x, weight, bias, activation, gate, residual, backend=by)
        y = _multiply(asked, by, x, weight, bias)
        return reference.follow(y, activation, gate, residual).contiguous()


def _of_integers(
    asked: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if asked in _LIBRARIES:
        raise dispatch.UnsupportedError(
            f'{_NAME}: backend="{asked}" was requested but it has no products with a weight of integers.',
            {asked: ["it has no products with a weight of integers"]},
        )
    by = int8.fastest(x) if asked == "auto" else asked
    fused = by in KERNELS and (asked == by or all(map(products.is_plain, (gate, residual))))
    if fused and not needs_grad(x, bias, residual, gate):
        return products.by_kernel(x, weight, bias, activation, gate, residual, weight_scale, by)
    y = int8.multiply(x, weight, weight_scale, bias, asked)
    return reference.follow(y, activation, gate, residual).contiguous()


def multiply(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
) -> Tensor:  # [..., out]
    """`F.linear` by the fastest product, for layers; it asks little, as a decoding step calls it often."""
    return _multiply("auto", _fastest(x, weight, bias), x, weight, bias)


def _is_usual(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is nothing to complain of: quick to find out, beside a product of one row."""
    if not (products.is_plain(x) and products.is_plain(weight) and x.dtype == weight.dtype):
        return False
    fits = x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    return fits and (bias is None or _is_bias(bias, weight)) and not torch.is_autocast_enabled("cpu")


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The fastest product, or torch's for tensors of which `F.linear` makes more than a layer does."""
    by = products.fastest("forward", x, weight, weight.numel())
    if by == "torch" or torch.jit.is_tracing() or x.shape[-1:] != weight.shape[1:]:
        return "torch"
    return by if bias is None or _is_bias(bias, weight) else "torch"


def _is_bias(bias: Tensor, weight: Tensor) -> bool:
    return bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and products.is_plain(bias)


def _multiply(asked: str, by: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product that was asked for, or that "auto" has chosen, and its gradients."""
    others = asked != "auto" or by != "torch"
    if needs_grad(x, weight, bias) and (others or _has_faster_gradients(x, weight)):
        return _Linear.apply(asked, by, checks.as_rows(x), weight, bias).view(*x.shape[:-1], len(weight))
    return PRODUCTS[by].forward(x, weight, bias)


def _has_faster_gradients(x: Tensor, weight: Tensor) -> bool:
    """Whether another product than torch's is faster for either gradient: then ours must call it."""
    size = weight.numel()
    return weight.ndim == 2 and any(products.fastest(way, x, weight, size) != "torch" for way in ("dx", "dw"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, asked, by, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)
        ctx.asked = asked
        return PRODUCTS[by].forward(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        _, _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = checks.unit_stride(dy)
        dx = PRODUCTS[_by(ctx.asked, "dx", dy, weight, weight)].dx(dy, weight) if needs_x else None
        dweight = PRODUCTS[_by(ctx.asked, "dw", dy, x, weight)].dw(dy, x) if needs_weight else None
        return None, None, dx, dweight, dy.sum(0) if needs_bias else None


def _by(asked: str, way: str, a: Tensor, b: Tensor, weight: Tensor) -> str:
    """The product of a gradient; torch's where torch differentiates the gradient again or batches it."""
    if torch.is_grad_enabled() or is_batched(a):
        return "torch"
    return asked if asked in _LIBRARIES else products.fastest(way, a, b, weight.numel())


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        legal = ", ".join(map(str, ACTIVATIONS))
        raise ValueError(f"{_NAME}: expected activation to be one of {legal}, got {activation!r}.")
    given = {"bias": bias, "weight_scale": weight_scale, "residual": residual, "gate": gate}
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
    if weight_scale is not None:
        _expect_integers(weight, weight_scale)
    elif weight.dtype == torch.int8:
        raise TypeError(f"{_NAME}: expected a weight_scale [out] for a weight of torch.int8, got none.")
    numbers = {name: each for name, each in tensors.items() if name != "weight" or weight_scale is None}
    checks.expect_floating_point(_NAME, **numbers)
    checks.expect_same_device(_NAME, **tensors)


def _expect_integers(weight: Tensor, weight_scale: Tensor) -> None:
    checks.expect_shape(_NAME, "weight_scale", weight_scale, (weight.shape[0],), "to match weight")
    if weight.dtype != torch.int8:
        raise TypeError(f"{_NAME}: expected a weight of torch.int8 with weight_scale, got {weight.dtype}.")
    if weight_scale.dtype != torch.float32:
        raise TypeError(f"{_NAME}: expected weight_scale in torch.float32, got {weight_scale.dtype}.")
    if weight_scale.requires_grad:
        raise TypeError(f"{_NAME}: expected a weight_scale without a gradient, got one that requires it.")


dispatch.register(
    _NAME,
    sizes=lambda *_: {},
    libraries={name: PRODUCTS[name].why_not for name in _LIBRARIES},
    triton={},
    cuda={},
    cpu={},
    reference={},
)
