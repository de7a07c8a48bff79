"""Softmaxes with most of their weight on one key, through every kernel of both attentions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo_kernels import MediaMask, masked_cross_attention, perceiver_attention
from flamingo_kernels.testing import (
    DTYPES,
    Case,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    assert_within_budget,
    evaluate,
)

Masked, Perceiver = MaskedCrossAttentionCase, PerceiverAttentionCase


def name(case: Case) -> str:
    return f"{case.operator}-{case}"


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def dtype(request) -> torch.dtype:
    return request.param


# Every kernel of a backward pass: of rows, of keys, of both at once, with keys in parts.
ONE_KEY = [
    Masked(latents=1, media=1, head_dim=40, length=35, immediate=False),
    Masked(latents=1, media=3, head_dim=40, length=35),
    Perceiver(features=0, latents=1, queries=13, head_dim=40),
    Perceiver(features=0, latents=1, queries=70, head_dim=40, groups=2),
    Perceiver(features=700, latents=1, queries=5, head_dim=40, clips=1, heads=1, lengths=(0,), scale=-2.0),
]


@pytest.mark.parametrize("case", ONE_KEY, ids=name)
def test_one_key_gets_no_gradient_but_its_value(case, dtype, kernels):
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(kernels, **t), tensors, douts)
    for key, tensor in found.items():
        assert tensor.any() == (key in ("out", "dv", "dv_latents")), key


LARGE_SCALES = [
    Masked(latents=40, length=35, scale=30.0, immediate=False),
    Masked(latents=40, length=35, scale=-30.0, immediate=False, groups=2),
    Masked(latents=40, length=35, scale=30.0),
    Perceiver(features=40, latents=30, queries=24, scale=30.0),
    Perceiver(features=40, latents=30, queries=70, scale=-30.0, groups=2),
    Perceiver(features=500, latents=300, queries=24, clips=1, heads=1, scale=30.0),  # in parts
    Perceiver(
        features=500, latents=300, queries=24, clips=1, heads=1, scale=3.0
    ),  # of which each has some weight
]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", LARGE_SCALES, ids=name)
def test_saturated_rows_are_within_the_budget(case, dtype, kernels):
    """In float32 the rounding of the scores, which depends on the order of sums, is all of the error."""
    assert_within_budget(replace(case, dtype=dtype), kernels)


@pytest.mark.parametrize("case", [Masked(media=1), Masked(immediate=False), Perceiver()], ids=name)
def test_keys_that_weigh_less_than_any_number_get_no_gradient(case, dtype, kernels):
    """One key is 3200 above the others, of which e^-3200 is 0."""
    case = replace(case, dtype=dtype, scale=100.0)
    tensors = case.tensors()
    tensors["q"].fill_(1)
    for key in [key for key in tensors if key.startswith("k")]:
        tensors[key].fill_(-1)
    key = tensors["k"][:, 0] if "k" in tensors else tensors["k_latents"]
    key[:, 0] = 1
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(kernels, **t), tensors, douts)
    gradients = {key for key, tensor in found.items() if tensor.any()}
    assert gradients == {key for key in found if key in ("out", "dv", "dv_latents")}


@pytest.mark.parametrize("scale", [2.0, -2.0, 0.0])
def test_a_key_that_is_infinitely_far_below_counts_for_nothing(scale, kernels):
    """In the first tile of keys, too, when nothing else has been seen."""
    q, k = torch.ones(1, 3, 1, 16), torch.randn(1, 2, 70, 1, 16)
    v, mask = (
        torch.randn(1, 2, 70, 1, 16),
        MediaMask.from_text_time(torch.full((1, 3), 2), 2, immediate=False),
    )
    k[:, 0, :, :, 0] = -torch.inf if scale > 0 else torch.inf
    far = masked_cross_attention(q, k, v, mask, scale=scale, backend=kernels)
    clip = perceiver_attention(q, k[:, 0], v[:, 0], k[:, 1], v[:, 1], scale=scale, backend=kernels)
    if scale == 0:  # 0 * inf
        assert far.isnan().all()
        assert clip.isnan().all()
        return
    near = perceiver_attention(
        q, k[:, 0, :0], v[:, 0, :0], k[:, 1], v[:, 1], scale=scale, backend="reference"
    )
    torch.testing.assert_close(far, near)
    torch.testing.assert_close(clip, near)
