"""The device functions that kernels share, in the interpreter."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton backend is optional")

import triton.language as tl  # noqa: E402

from flamingo_kernels._backends.triton import language  # noqa: E402
from flamingo_kernels._backends.triton.reduction import add_in_order  # noqa: E402
from flamingo_kernels._backends.triton.softmax import scaled_exp2_saved  # noqa: E402

tanh, dtanh, dot, row_dot = language.tanh, language.dtanh, language.dot, language.row_dot


@triton.jit
def _tanh_kernel(a, values, derivatives, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(values + at, tanh(tl.load(a + at)))
    tl.store(derivatives + at, dtanh(tl.load(a + at)))


def test_tanh_and_its_derivative_are_accurate_everywhere():
    powers = torch.logspace(-30, 1.3, 2045)
    a = torch.cat([torch.tensor([0.0, torch.inf, 200.0]), powers])
    a = torch.cat([a, -a])
    values, derivatives = torch.empty_like(a), torch.empty_like(a)
    _tanh_kernel[(1,)](a, values, derivatives, BLOCK=a.numel())
    exact = a.double().tanh()
    assert ((values.double() - exact).abs() <= 3.5 * torch.finfo(torch.float32).eps / 2 * exact.abs()).all()
    derivative = 1 / a.double().cosh() ** 2
    assert ((derivatives.double() - derivative).abs() <= 1e-6 * derivative + 1e-37).all()


def test_tanh_of_nan_is_nan():
    a = torch.tensor([torch.nan, 0.0])
    values, derivatives = torch.empty_like(a), torch.empty_like(a)
    _tanh_kernel[(1,)](a, values, derivatives, BLOCK=2)
    assert values.isnan().tolist() == derivatives.isnan().tolist() == [True, False]


@triton.jit
def _dot_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = at[:, None] * BLOCK + at[None, :]
    tl.store(out + tile, dot(tl.load(a + tile), tl.load(b + tile), "ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_is_exact_to_float32(dtype):
    """In bfloat16 too, of which the interpreter's own product is not one."""
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, BLOCK=16)
    torch.testing.assert_close(out, a.float() @ b.float())


@triton.jit
def _weights_kernel(s, row_max, weights, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(weights + at, scaled_exp2_saved(tl.load(s + at), tl.load(row_max + at), 0.5))


def test_a_weight_by_a_maximum_that_was_saved():
    """A score above it counts as the maximum; one that is no number weighs no number."""
    s, row_max = torch.tensor([1.0, 3.0, 3.5, torch.nan, -torch.inf, 3.0, 3.0, 3.0]), torch.full((8,), 3.0)
    weights = torch.empty(8)
    _weights_kernel[(1,)](s, row_max, weights, BLOCK=8)
    torch.testing.assert_close(weights[:5], torch.tensor([0.5, 1, 1, torch.nan, 0]), equal_nan=True)


@triton.jit
def _row_dot_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = at[:, None] * BLOCK + at[None, :]
    tl.store(out + at, row_dot(tl.load(a + tile), tl.load(b + tile)))


def test_row_dot_cancels_in_double():
    a, b = torch.ones(16, 16), torch.zeros(16, 16)
    b[:, 0], b[:, 1], b[:, 2] = 1e8, 1.0, -1e8
    out = torch.empty(16)
    _row_dot_kernel[(1,)](a, b, out, BLOCK=16)
    assert out.tolist() == [1.0] * 16


@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (7, 5, 300), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # to bfloat16 the interpreter rounds down
def test_partial_results_are_added_in_order(shape, dtype):
    partials = torch.randn(shape)
    expected = torch.zeros(shape[1:])
    for part in partials:
        expected += part
    assert torch.equal(add_in_order(partials, dtype), expected.to(dtype))
