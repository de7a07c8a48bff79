"""The arithmetic of the C++ kernels, in every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels import gated_residual, perceiver_attention
from flamingo_kernels._backends import cpu, env, library
from flamingo_kernels.testing import DTYPES

HALVES = [torch.bfloat16, torch.float16]
OPEN = torch.tensor(torch.inf)  # a gate whose tanh is 1


@pytest.fixture(params=env.CPU_VARIANTS, autouse=True)
def variant(request, compiled, select_variant):
    """Has the kernels run with one instruction set."""
    if request.param not in cpu.cpu_variants():
        pytest.skip(f"{request.param} is not built, or this processor lacks it")
    select_variant(request.param)


def every_number(dtype: torch.dtype) -> torch.Tensor:  # [256, 256]
    """All that 16 bits can say: NaN, infinities and subnormal numbers too."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_read(dtype):
    x = every_number(dtype)
    assert_equal(gated_residual(x, torch.zeros(256, 256), OPEN, backend="cpu"), x.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_read_from_a_gate(dtype):
    gate = every_number(dtype).flatten()
    rows = torch.zeros(1, len(gate)), torch.ones(1, len(gate))
    found, expected = (gated_residual(*rows, each, backend="cpu") for each in (gate, gate.float()))
    assert_equal(found, expected)


@pytest.mark.parametrize("bits", [-1, 2**31 - 1, 0x7F800001, -0x7FFFFF])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_nan_is_rounded_to_one_whatever_its_bits(dtype, bits):
    ones, gate = torch.ones(2, 40, dtype=dtype), torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    z = gated_residual(ones, ones, gate, backend="cpu")
    assert z.dtype == dtype
    assert z.isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_result_is_rounded_to_the_nearest_and_halfway_to_the_even(dtype):
    x = every_number(dtype)
    for finer in (1, 2, 5, 9, 12):  # bits of y that x + y has no place for
        y = (x.float() / 2**finer).to(dtype).roll(1)
        assert_equal(gated_residual(x, y, OPEN, backend="cpu"), (x.float() + y.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_results_are_rounded_to_subnormal_numbers(dtype):
    y, gate, one = every_number(dtype), torch.tensor([0.3], dtype=dtype), torch.ones(1, 1)
    tanh = gated_residual(torch.zeros(1, 1), one, gate, backend="cpu")
    assert_equal(gated_residual(torch.zeros_like(y), y, gate, backend="cpu"), (tanh * y.float()).to(dtype))


@pytest.mark.parametrize("first", [True, False], ids=["rescaled", "later"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_of_a_key_far_below_the_heaviest(dtype, first):
    """e^x to the last bits down to e^-87, and exactly 0 below; NaN stays NaN."""
    x = -torch.cat([torch.arange(0, 87, 0.5), torch.tensor([87.0, 87.5, 88.0, 100.0, 120.0, 250.0])])
    large = 2.0 ** (15 if dtype == torch.float16 else 100)  # the value of the light key; the other's is 0
    light, heavy = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    keys = (light, light * large, heavy, heavy) if first else (heavy, heavy, light, light * large)
    q = torch.cat([x, torch.tensor([torch.nan])]).view(1, -1, 1, 1)
    out = perceiver_attention(*(t.to(dtype) for t in (q, *keys)), scale=1.0, backend="cpu").flatten()
    assert out[-1].isnan()
    p = x.double().exp().where(x >= -87, 0)
    lost = 0.0 if dtype != torch.float16 else 2**-25  # half of its smallest number
    expected = large * p / (1 + p)
    error = (out[:-1].double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * 4 * expected + lost).all()


# Where the terms of a sum lie that only double holds: 2^30, 1 and -2^30.
# The rows of a task are added in float for a channel's own gate.
@pytest.mark.parametrize(
    ("channels", "rows", "places"),
    [
        pytest.param(1, 1, [(0, 0), (0, 600), (0, 1100)], id="one gate, in a row"),
        pytest.param(1, 192, [(0, 0), (1, 0), (2, 0)], id="one gate, in the rows of a task"),
        pytest.param(1, 64, [(0, 0), (1, 0), (63, 0)], id="one gate, in tasks"),
        pytest.param(1536, 64, [(0, 0), (1, 0), (63, 0)], id="a gate each, in tasks"),
    ],
)
def test_the_gradient_of_a_gate_is_summed_in_double(channels, rows, places):
    y = torch.zeros(rows, 1536)
    for place, value in zip(places, (2.0**30, 1.0, -(2.0**30)), strict=True):
        y[place] = value
    gate, dz = torch.zeros(channels), torch.ones_like(y)
    _, dgate = library.backends_of("gated_residual_bwd")["cpu"](dz, y, gate)
    assert dgate.sum() == 1
