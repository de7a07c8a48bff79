"""The ruler itself: inputs are what they say, and a wrong kernel does not fit the budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flamingo_kernels.testing import (
    DTYPES,
    GatedResidualCase,
    MaskedCrossAttentionCase,
    Measurement,
    PerceiverAttentionCase,
    assert_within_budget,
    compare,
    lay_out,
    measure,
    ulp,
)
from tests.helpers.plain_mask import averages, seen


@dataclass(frozen=True, kw_only=True)
class Broken(GatedResidualCase):
    """A gated residual with a fault in it."""

    fault: str = ""

    def kernel(self, backend, x, y, gate):
        gate = torch.tanh(gate)
        if self.fault == "value":
            return (x + gate * y * 1.001,)
        if self.fault == "one element":
            step = torch.zeros_like(x)
            step[0, 0, 0] = 1e-5
            return (x + gate * y + step,)
        if self.fault == "nan":
            return (torch.where(torch.arange(x.numel()).view_as(x) == 5, torch.nan, x + gate * y),)
        if self.fault == "no gradient":
            return (x + gate.detach() * y,)
        if self.fault == "dtype":
            return ((x + gate * y).double(),)
        if self.fault == "shape":
            return ((x + gate * y)[None],)
        return (x + gate * y,)


def test_a_right_kernel_fits(capsys):
    assert_within_budget(Broken())
    assert capsys.readouterr().out.count(" ok\n") == 4


@pytest.mark.parametrize(
    ("fault", "tensors"),
    [("value", "out dy dgate"), ("one element", "out"), ("nan", "out dx dy dgate"), ("no gradient", "dgate")],
)
def test_a_wrong_kernel_does_not(fault, tensors):
    failed = [each.name for each in measure(Broken(fault=fault)) if not each.passed]
    assert set(failed) <= set(tensors.split())
    assert failed
    with pytest.raises(AssertionError, match=r"(?s)budget exceeded: gated_residual, auto, fault=.*FAILED"):
        assert_within_budget(Broken(fault=fault))


@pytest.mark.parametrize(
    ("fault", "message"), [("dtype", "float32 .*got .* torch.float64"), ("shape", "got .1, 3")]
)
def test_another_dtype_or_shape_than_eager_is_an_error(fault, message):
    with pytest.raises(AssertionError, match=f"out: expected .*{message}"):
        measure(Broken(fault=fault))


def test_the_rule():
    assert Measurement("out", error=3.0, rounding=1.0, ulp=1.0).passed
    assert not Measurement("out", error=3.1, rounding=1.0, ulp=1.0).passed
    assert not Measurement("out", error=math.nan, rounding=1.0, ulp=1.0).passed
    assert Measurement("out", error=1.5, rounding=1.0, ulp=1.0).spent == 0.5


def test_what_is_exactly_zero_must_be_zero():
    zero = torch.zeros(3)
    assert compare("out", zero, zero.double(), 0.0).passed
    tiny = compare("out", zero + 1e-30, zero.double(), 0.0)
    assert not tiny.passed
    assert tiny.spent == math.inf
    assert compare("out", torch.empty(0), torch.empty(0).double(), 0.0).passed


@pytest.mark.parametrize("value", [1.0, 1.5, 2.0, 3.99, 1e-3, 65000.0, 1e-30, -2.0])
def test_ulp_of_float32_is_numpys_spacing(value):
    assert ulp(value, torch.float32) == np.spacing(np.float32(abs(value)))


def test_ulp_of_the_halves():
    assert ulp(1.0, torch.float16) == 2**-10
    assert ulp(1.0, torch.bfloat16) == 2**-7
    assert ulp(1e-7, torch.float16) == 2**-24  # subnormal
    assert ulp(0.0, torch.float16) == 0


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4), (7,), (0, 2, 3), (1,), ()])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed", "strided"])
def test_a_layout_keeps_the_values(layout, shape):
    tensor = torch.randn(shape)
    placed = lay_out(tensor, layout)
    assert torch.equal(placed, tensor)
    assert (
        placed.data_ptr() != tensor.data_ptr() or layout in ("contiguous", "transposed") or not tensor.numel()
    )


def test_the_layouts_are_what_they_say():
    tensor = torch.randn(2, 3, 4, 5)
    assert lay_out(tensor, "slice").stride() == (6 * 7 * 8, 7 * 8, 8, 1)
    assert lay_out(tensor, "transposed").stride() == (60, 5, 15, 1)
    assert lay_out(tensor, "strided").stride() == (120, 40, 10, 2)
    assert lay_out(tensor, "expanded").stride() == (0, 20, 5, 1)
    assert torch.equal(lay_out(tensor, "expanded")[1], tensor[0])
    around = lay_out(tensor, "slice")
    buffer = around.as_strided((5, 6, 7, 8), around.stride(), 0)
    assert buffer.isnan().sum() == 5 * 6 * 7 * 8 - tensor.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [MaskedCrossAttentionCase, PerceiverAttentionCase, GatedResidualCase])
def test_tensors_are_random_rounded_and_repeatable(case, dtype):
    tensors, again, other = (
        case(dtype=dtype).tensors(),
        case(dtype=dtype).tensors(),
        case(dtype=dtype, seed=1).tensors(),
    )
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        assert tensor.count_nonzero() == tensor.numel()  # gates too
    (dout, *_) = case(dtype=dtype).douts(case(dtype=dtype).eager(**tensors))
    assert dout.dtype == dtype
    assert dout.std() > 0.5


def test_a_gate_is_around_0_and_its_branch_is_not():
    """Where tanh is steep; and the sum that is the gradient of a gate does not cancel by chance."""
    tensors = GatedResidualCase(shape=(3, 4000), gate=(4000,)).tensors()
    assert tensors["gate"].mean().abs() < 0.1
    assert tensors["y"].mean() > 0.9


@pytest.mark.parametrize("times", ["locations", "jumps"])
def test_masks_have_every_kind_of_row(times):
    case = MaskedCrossAttentionCase(times=times, batch=3)
    assert set(case.text_time().flatten().tolist()) == {
        0,
        1,
        2,
        3,
        4,
    }  # before any, each medium, past the last
    assert (case.text_time().diff(dim=1) < 0).any().item() is (times == "jumps")
    assert case.media_locations()[:, 0].sum() == 0


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_texts_have_masks(length):
    assert MaskedCrossAttentionCase(length=length, media=1).text_time().shape == (2, length)


def test_a_cached_prompt_precedes_every_row():
    assert MaskedCrossAttentionCase(times="cached", batch=3, length=2).text_time().tolist() == [
        [4, 4],
        [3, 3],
        [2, 2],
    ]


def test_the_name_of_a_case_is_what_it_changes():
    assert str(MaskedCrossAttentionCase()) == "default"
    assert str(GatedResidualCase(dtype=torch.float16, shape=(2, 3))) == "dtype=float16,shape=(2,3)"


@pytest.mark.parametrize(
    ("immediate", "policy"), list(itertools.product((True, False), ("zero", "open_flamingo")))
)
def test_the_masked_oracle_row_by_row(immediate, policy):
    case = MaskedCrossAttentionCase(times="jumps", immediate=immediate, policy=policy, groups=2, scale=0.3)
    tensors = {name: tensor.double() for name, tensor in case.tensors().items()}
    (out,) = case.eager(**tensors)
    q, k, v = tensors.values()
    for b, t, h in itertools.product(range(case.batch), range(case.length), range(case.heads)):
        time, keys, values = case.text_time()[b, t].item(), k[b, :, :, h // 2], v[b, :, :, h // 2]
        media = seen(time, case.media, immediate)
        expected = torch.zeros(case.head_dim, dtype=torch.double)
        if averages(time, case.media, immediate, policy):
            expected = values.mean(dim=(0, 1))
        elif media:
            scores = 0.3 * keys[media].flatten(0, 1) @ q[b, t, h]
            expected = scores.softmax(0) @ values[media].flatten(0, 1)
        torch.testing.assert_close(out[b, t, h], expected, rtol=0, atol=1e-14)


def test_the_perceiver_oracle_row_by_row():
    case = PerceiverAttentionCase(clips=4, groups=2, lengths=(0, 1, 21, 30))
    tensors = {name: tensor.double() for name, tensor in case.tensors().items()}
    (out,) = case.eager(**tensors)
    q, k_media, v_media, k_latents, v_latents = tensors.values()
    for n, h in itertools.product(range(case.clips), range(case.heads)):
        real = case.lengths[n]
        keys = torch.cat([k_media[n, :real, h // 2], k_latents[n, :, h // 2]])
        values = torch.cat([v_media[n, :real, h // 2], v_latents[n, :, h // 2]])
        expected = (q[n, :, h] @ keys.T / 4).softmax(-1) @ values
        torch.testing.assert_close(out[n, :, h], expected, rtol=0, atol=1e-14)


def test_the_residual_oracle_element_by_element():
    case = GatedResidualCase(shape=(3, 5), gate=(5,))
    tensors = {name: tensor.double() for name, tensor in case.tensors().items()}
    (out,) = case.eager(**tensors)
    x, y, gate = (tensor.tolist() for tensor in tensors.values())
    for i, j in itertools.product(range(3), range(5)):
        assert out[i, j].item() == pytest.approx(x[i][j] + math.tanh(gate[j]) * y[i][j], abs=1e-14)


def test_memory_is_poisoned():
    tensors = (
        torch.empty(3),
        torch.empty_like(torch.ones(3)),
        torch.ones(3).new_empty(2),
        torch.empty_strided((2,), (1,)),
    )
    assert all(tensor.isnan().all() for tensor in tensors)
    assert not torch.empty(3, dtype=torch.int32).is_floating_point()
