"""gated_residual against float64, with every mix of dtypes and every shape of gate."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from flamingo_kernels import gated_residual
from flamingo_kernels.testing import DTYPES, assert_within_budget, evaluate
from flamingo_kernels.testing import GatedResidualCase as Case

CASES = [
    Case(),
    Case(shape=(0, 40)),
    Case(shape=(0, 40), gate=(40,)),
    Case(shape=(1,), gate=()),
    Case(shape=(7,), gate=(7,)),
    Case(shape=(5, 1)),
    Case(shape=(2, 3, 1), gate=(1, 1, 1)),
    Case(shape=(111, 2048), gate=()),
    Case(shape=(257, 63), gate=(63,)),
    Case(shape=(2, 19, 96), gate=(1, 1, 96)),
    Case(shape=(2, 1, 3, 8192)),
    *(Case(layout=layout) for layout in ("slice", "transposed", "strided", "expanded")),
    *(Case(layout=layout, gate=(40,)) for layout in ("slice", "transposed", "strided", "expanded")),
]
MIXES = list(itertools.product(DTYPES, repeat=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    assert_within_budget(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("gate", [(), (1,), (40,), (1, 1, 40), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
def test_oracle_of_mixed_dtypes(mix, gate, backend):
    """Dtypes, too, are those of `x + tanh(gate) * y`: the budget compares them first."""
    x, y, alpha = mix
    assert_within_budget(Case(dtype=x, y_dtype=y, gate_dtype=alpha, gate=gate), backend)


@pytest.mark.parametrize("gate", [(1,), (40,)], ids=str)
def test_the_gradient_of_an_open_gate(gate, kernels):
    """1 - tanh(gate)^2 is what is left of near numbers, unless it is computed otherwise."""
    tensors = Case(gate=gate).tensors()
    tensors["gate"] = torch.full(gate, -8.5)
    dz = torch.ones_like(tensors["x"])
    alpha = tensors["gate"].requires_grad_()
    z = gated_residual(**tensors, backend=kernels)
    (found,) = torch.autograd.grad(z, alpha, dz)
    by_channel = tensors["y"].double().sum((0, 1)) / alpha.detach().double().cosh() ** 2
    exact = by_channel if gate == (40,) else by_channel.sum()[None]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-12)


def test_gradcheck_of_the_reference():
    for gate in ((), (1,), (5,), (1, 1, 5)):
        tensors = [t.double().requires_grad_() for t in Case(shape=(2, 3, 5), gate=gate).tensors().values()]
        assert torch.autograd.gradcheck(lambda *t: gated_residual(*t, backend="reference"), tensors)


def test_a_closed_gate_passes_x_on(backend):
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    gate = torch.zeros(1, requires_grad=True)
    out = gated_residual(x, y, gate, backend=backend)
    assert torch.equal(out, x)
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(dgate, y.sum()[None])


@pytest.mark.parametrize("alpha", [-100.0, 100.0, torch.inf, -torch.inf])
def test_a_saturated_gate(alpha, backend):
    x, y, gate = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([alpha], requires_grad=True)
    out = gated_residual(x, y, gate, backend=backend)
    assert torch.equal(out, x + y if alpha > 0 else x - y)
    assert torch.autograd.grad(out.sum(), gate)[0].item() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_nan_and_infinity_stay_in_their_element(name, value, backend):
    case = Case(shape=(5, 40), gate=(40,))
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    clean = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    tensors[name][2, 17] = value
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    here = torch.zeros(5, 40, dtype=torch.bool)
    here[2, 17] = True
    assert (~found["out"].isfinite()).equal(here)
    assert torch.equal(found["out"][~here], clean["out"][~here])
    assert torch.equal(found["dx"], clean["dx"])
    assert torch.equal(found["dy"], clean["dy"])
    assert torch.equal(found["dgate"][~here[2]], clean["dgate"][~here[2]])


def test_the_gradient_of_x_is_that_of_the_output(backend):
    x, y, gate = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7), torch.randn(1)
    dout = torch.randn(3, 7)
    (dx,) = torch.autograd.grad(gated_residual(x, y, gate, backend=backend), x, dout)
    assert dx.data_ptr() == dout.data_ptr()


@pytest.mark.parametrize("alpha", [3.0, -9.0, 20.0])
def test_the_slope_of_a_gate_far_out_is_no_difference(alpha, compiled):
    """1 - tanh(20)^2 is 0 even in float64, and 1 / cosh(20)^2 is 1.7e-17."""
    y, gate = torch.randn(3, 7) + 1, torch.tensor([alpha], requires_grad=True)
    (dgate,) = torch.autograd.grad(gated_residual(torch.randn(3, 7), y, gate, backend=compiled).sum(), gate)
    exact = y.double().sum() / math.cosh(alpha) ** 2
    torch.testing.assert_close(dgate[0].double(), exact, rtol=1e-6, atol=0)
