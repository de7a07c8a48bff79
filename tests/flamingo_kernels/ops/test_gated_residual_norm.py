"""gated_residual_norm against float64: both norms, all widths, every mix of dtypes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flamingo_kernels import gated_residual, gated_residual_norm
from flamingo_kernels._backends import library
from flamingo_kernels.testing import DTYPES, assert_within_budget, evaluate, ulp
from flamingo_kernels.testing import GatedResidualNormCase as Case
from tests.helpers.parity import hold

CASES = [
    Case(),
    Case(norm="rms"),
    Case(bias=False),
    Case(shape=(0, 40)),
    Case(shape=(0, 40), norm="rms", gate=(40,)),
    *(Case(shape=(5, width)) for width in (7, 2048, 8192)),
    *(Case(shape=(5, width), norm="rms") for width in (1, 7, 2048, 8192)),
    *(Case(shape=(5, 8200), norm=norm) for norm in ("layer", "rms")),
    Case(shape=(5, 8192), gate=(8192,)),
    Case(shape=(257, 63), gate=(63,)),
    Case(shape=(7,), gate=()),
    Case(shape=(2, 3, 96), gate=(1, 1, 96), norm="rms"),
    *(Case(eps=eps, norm=norm) for eps, norm in itertools.product((1e-12, 1.0), ("layer", "rms"))),
    *(Case(layout=layout) for layout in ("slice", "transposed", "strided", "expanded")),
    *(
        Case(layout=layout, norm="rms", gate=(40,))
        for layout in ("slice", "transposed", "strided", "expanded")
    ),
]
# x, y, gate, weight and bias
MIXES = [
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float16, torch.float16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    assert_within_budget(replace(case, dtype=dtype), backend)


def test_oracle_of_one_channel(backend):
    """Float32 alone: centring leaves nothing but rounding, and torch rounds less in the half dtypes."""
    assert_within_budget(Case(shape=(5, 1)), backend)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("gate", [(), (1,), (40,)], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
def test_oracle_of_mixed_dtypes(mix, gate, norm, backend):
    x, y, alpha, weight = mix
    case = Case(dtype=x, y_dtype=y, gate_dtype=alpha, weight_dtype=weight, gate=gate, norm=norm)
    assert_within_budget(case, backend)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck_of_the_reference(norm):
    tensors = [
        t.double().requires_grad_() for t in Case(shape=(3, 5), gate=(5,), norm=norm).tensors().values()
    ]
    assert torch.autograd.gradcheck(
        lambda *t: gated_residual_norm(*t, eps=1e-3, norm=norm, backend="reference"), tensors
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_z_is_the_gated_residual(dtype, backend):
    x, y, gate, weight, bias = Case(dtype=dtype).tensors().values()
    z, _ = gated_residual_norm(x, y, gate, weight, bias, backend=backend)
    assert torch.equal(z, gated_residual(x, y, gate, backend=backend))


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used, backend):
    case = Case()
    tensors = case.tensors()
    douts = list(case.douts(case.eager(**tensors)))
    douts[1 - used].zero_()
    expected = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = case.kernel(backend, **leaves)[used]
    grads = torch.autograd.grad(out, list(leaves.values()), douts[used], materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"]), name


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_cancel(offset, backend):
    """The variance is that of the centred row, not a difference of two large numbers."""
    x = torch.randn(5, 2048) + offset
    gate, weight = torch.zeros(1), torch.ones(2048)
    _, n = gated_residual_norm(x, torch.zeros_like(x), gate, weight, backend=backend)
    measured = hold("n", n, lambda: F.layer_norm(x, (2048,)), F.layer_norm(x.double(), (2048,)))
    assert measured.passed, measured
    if backend == "triton":  # the others are no better here than eager
        assert n.double().mean(1).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_a_large_mean_is_right_to_its_last_bit(offset, kernels):
    """Though a sum of the row has lost more than that, and the variance is taken around that sum's mean."""
    x = torch.randn(16, 2048) + offset
    gate, weight = torch.zeros(1), torch.ones(2048)
    forward = library.backends_of("gated_residual_norm_fwd")[kernels]
    _, n, mean, rstd = forward(x, torch.zeros_like(x), gate, weight, None, 1e-5, False)
    exact = x.double()
    if kernels != "cpu":  # which is no better here than eager
        torch.testing.assert_close(n.double(), F.layer_norm(exact, (2048,)), rtol=0, atol=4e-6)
    assert (mean - exact.mean(1)).abs().max() <= 0.51 * ulp(offset, torch.float32)
    assert (rstd * (exact.var(1, correction=0) + 1e-5).sqrt() - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_row_whose_squares_overflow_is_zero(norm, backend):
    """As in eager: one over an infinite deviation. What its mean has lost to rounding overflows, too."""
    x = (torch.randn(20, 1000) * 2.0**118).requires_grad_()
    gate, weight = torch.zeros(1), torch.ones(1000)
    _, n = gated_residual_norm(x, torch.zeros(20, 1000), gate, weight, norm=norm, backend=backend)
    assert torch.equal(n, torch.zeros_like(n))
    (dx,) = torch.autograd.grad(n.sum(), x)
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("name", ["x", "y", "dz", "dn"])
def test_nan_stays_in_its_row(name, norm, backend):
    case = Case(shape=(5, 40), gate=(40,), norm=norm)
    tensors = case.tensors()
    tensors["dz"], tensors["dn"] = case.douts(case.eager(**tensors))
    clean = _run(case, backend, tensors)
    tensors[name][2, 17] = torch.nan
    found = _run(case, backend, tensors)
    others = [0, 1, 3, 4]
    for key in ("z", "n", "dx", "dy"):
        assert torch.equal(found[key][others], clean[key][others]), key
    assert found["n"][2].isnan().all().item() is (name in "xy")
    assert found["dx"][2].isnan().any()


def _run(case, backend, tensors):
    tensors = dict(tensors)
    douts = tensors.pop("dz"), tensors.pop("dn")
    return evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
