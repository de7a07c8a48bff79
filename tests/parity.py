"""A module against the one it stands for: outputs and every gradient, by the error budget of testing.py.

    error(fused) <= 2 * error(original in the same dtype) + 2 ulp

with errors against the original in float64 on the same, already rounded weights and inputs. An error is the
root mean square over all elements of several draws of inputs and upstream gradients. Through a whole module
the roundings of both sides grow and spread alike, and which of them has the one largest error is luck.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flamingo_kernels.testing import Measurement, ulp

Call = Callable[..., Tensor]
DRAWS = 8


def assert_parity(
    original: nn.Module, fused: nn.Module, *shapes, dtype=torch.float32, call: Call | None = None
):
    """Compare two modules with equal weights on random tensors of these shapes, or made by these functions.

    call: how to use a module, `call(module, *tensors)`; default: `module(*tensors)`.
    """
    call = call or (lambda module, *tensors: module(*tensors))
    double = copy.deepcopy(original).double()
    draws = [[make(shape, dtype, 100 * i + n) for n, shape in enumerate(shapes)] for i in range(DRAWS)]
    douts = [
        torch.randn(out.shape, generator=_generator(7 + i)).to(out.dtype)
        for i, out in enumerate(call(original, *draw).detach() for draw in draws)
    ]
    eager = run(original, draws, douts, call)
    kernel = run(fused, draws, douts, call)
    if dtype == torch.float64:
        for name, value in eager.items():
            torch.testing.assert_close(
                kernel[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        return
    doubles = [[_double(tensor) for tensor in draw] for draw in draws]
    with torch.autocast("cpu", enabled=False):
        exact = run(double, doubles, [dout.double() for dout in douts], call)
    measurements = [measure(name, kernel[name], eager[name], exact[name]) for name in exact]
    report = "\n".join(map(str, measurements))
    print(report)
    assert all(measurement.passed for measurement in measurements), report


def measure(name: str, kernel: Tensor, eager: Tensor, exact: Tensor) -> Measurement:
    assert (kernel.shape, kernel.dtype) == (eager.shape, eager.dtype), (
        f"{name}: {kernel.dtype} for {eager.dtype}"
    )
    kernel_error, eager_error = ((t.double() - exact).square().mean().sqrt().item() for t in (kernel, eager))
    return Measurement(name, kernel_error, eager_error, ulp(exact.abs().max().item(), kernel.dtype))


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
    stacked = {name: torch.stack([result[name] for result in results]) for name in results[0]}
    # Single numbers have no mean to speak of, so they are judged together.
    gates = [name for name in stacked if name.endswith("_gate")]
    return stacked | ({"dgates": torch.stack([stacked.pop(name) for name in gates])} if gates else {})


def _double(tensor: Tensor) -> Tensor:
    """In float64 with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float64).copy_(tensor)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
