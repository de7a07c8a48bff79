"""A module against the one it stands for: outputs and every gradient, by the error budget of `testing`.

The exact values come from the original in float64, on the same, already rounded weights and inputs, and so
does the rounding error, from the original with its rounding drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flamingo_kernels.testing import Measurement, assert_all_passed, compare, expect

Call = Callable[..., Tensor]
DRAWS = 3  # of inputs and upstream gradients


def assert_parity(
    original: nn.Module,
    fused: nn.Module,
    *shapes,
    dtype=torch.float32,
    call: Call | None = None,
    count: int = DRAWS,
):
    """Compare two modules with equal weights on random tensors of these shapes, or made by these functions.

    call: how to use a module, `call(module, *tensors)`; default: `module(*tensors)`.
    count: of the draws.
    """
    call = call or (lambda module, *tensors: module(*tensors))
    double = copy.deepcopy(original).double()
    draws = [[make(shape, dtype, 100 * i + n) for n, shape in enumerate(shapes)] for i in range(count)]
    douts = [
        torch.randn(out.shape, generator=_generator(7 + i)).to(out.dtype)
        for i, out in enumerate(call(original, *draw).detach() for draw in draws)
    ]
    kernel = run(fused, draws, douts, call)
    if dtype == torch.float64:
        for name, value in run(original, draws, douts, call).items():
            torch.testing.assert_close(
                kernel[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        return
    doubles = [[_double(tensor) for tensor in draw] for draw in draws]
    with torch.autocast("cpu", enabled=False):
        exact = run(double, doubles, [dout.double() for dout in douts], call)
    assert_all_passed(measure(kernel, lambda: run(original, draws, douts, call), exact), "parity")


def hold(name: str, found: Tensor, original: Callable[[], Tensor], exact: Tensor) -> Measurement:
    """One tensor against its exact values; `original` computes the same in its dtype."""
    (measured,) = measure({name: found}, lambda: {name: original()}, {name: exact})
    return measured


def measure(
    kernel: dict[str, Tensor], original: Callable[[], dict[str, Tensor]], exact: dict[str, Tensor]
) -> list[Measurement]:
    """Hold named results against float64; `original` computes the same in their dtype."""
    expected = expect(
        lambda: [found[name] for found in [original()] for name in exact], [*exact.values()], draws=2
    )
    found = []
    for name, right, dtype, rounding in zip(exact, *expected, strict=True):
        assert (kernel[name].shape, kernel[name].dtype) == (right.shape, dtype), (
            f"{name} in {kernel[name].dtype}"
        )
        found.append(compare(name, kernel[name], right, rounding))
    return found


def make(shape, dtype, seed):
    generator = _generator(seed)
    if callable(shape):
        return shape(lambda *size: torch.randn(size, generator=generator).to(dtype))
    return torch.randn(shape, generator=generator).to(dtype)


def run(module: nn.Module, draws, douts, call: Call) -> dict[str, Tensor]:
    """Outputs, input gradients and parameter gradients by name, each with the draws as first dimension."""
    results = []
    for draw, dout in zip(draws, douts, strict=True):
        leaves = [tensor.detach().requires_grad_() for tensor in draw]
        out = call(module, *leaves)
        assert out.shape == dout.shape
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wanted = [*leaves, *parameters.values()]
        grads = torch.autograd.grad(out, wanted, dout.to(out.dtype), materialize_grads=True)
        names = ["out", *(f"dinput{n}" for n in range(len(leaves))), *(f"d{name}" for name in parameters)]
        results.append(dict(zip(names, (out.detach(), *grads), strict=True)))
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def _double(tensor: Tensor) -> Tensor:
    """In float64 with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float64).copy_(tensor)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
