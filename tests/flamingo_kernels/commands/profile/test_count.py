"""What is counted without running a model is what the model has, and what a formula gives."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from flamingo import FlamingoConfig
from flamingo_kernels import patch
from flamingo_kernels.commands.measure.memory import saved_bytes
from flamingo_kernels.commands.profile import count, models, parts, run
from flamingo_kernels.commands.profile.subject import QUICK

PLAN, DTYPE = models.plan("tiny", QUICK), torch.bfloat16


@pytest.fixture(scope="module")
def counted():
    return count.run(PLAN, DTYPE, "cpu", "is asked to")


def test_flops_are_those_of_the_matrix_products(counted):
    config, (text, media, *_) = FlamingoConfig.preset("tiny"), PLAN.sizes
    width, blocks = config.language_dim, len(config.cross_attn_layers)
    inner, keys = config.cross_attn_heads * config.cross_attn_dim_head, media * config.num_latents
    kv = keys * config.resampler_dim * 2 * inner
    expected = {
        parts.PROJECTIONS: 2 * blocks * (2 * text * width * inner + kv),
        parts.ATTENTION: 2 * blocks * 2 * text * keys * inner,  # a dense mask computes every score
        parts.FEED_FORWARD: 2 * blocks * 2 * text * width * config.ff_mult * width,
    }
    found = counted.prefill_flops
    assert {part: found[part] for part in expected} == expected
    layer = 12 * text * width**2 + 2 * text**2 * width  # as torch counts attention, as if it were not causal
    head = text * width * config.vocab_size
    assert found[parts.LANGUAGE] == 2 * (config.language_layers * layer + head)
    assert parts.GATE not in found
    assert sum(found.values()) == counted.flops[models.PREFILL]
    assert counted.flops[models.DECODE] < counted.flops[models.PREFILL] < counted.flops[models.STEP]


def test_parameters_and_saved_bytes_are_those_of_the_model(counted):
    assert counted.bytes_each == 2
    subject = PLAN.subject(DTYPE, "cpu")
    after = run.twin(subject.model)
    patch(after)
    assert sum(counted.parameters.values()) == sum(each.numel() for each in subject.model.parameters())
    assert counted.parameters[parts.GATE] == 2 * len(subject.model.cross_attn)
    assert counted.parameters[parts.RESAMPLER] == sum(
        each.numel() for each in subject.model.resampler.parameters()
    )
    start = subject.works[models.STEP].start
    for side, model in ((run.BEFORE, subject.model), (run.PATCHED, after)):
        assert counted.saved[side] == saved_bytes(start(model), model)


def test_flops_of_each_operator_forward_and_backward():
    """A backward pass has two products for one; that of torch's attention computes its scores again."""
    batch, heads, length, keys, width = 2, 3, 4, 5, 6
    q, k, v = (torch.randn(batch, heads, n, width, requires_grad=True) for n in (length, keys, keys))
    a, b = torch.randn(4, 7, requires_grad=True), torch.randn(7, 5, requires_grad=True)

    def flops(call, with_gradients):
        def run():
            out = call()
            if with_gradients:
                out.sum().backward()

        return sum(count.flops_by_part(run, {}).values())

    product = 2 * batch * heads * length * keys * width
    attention = partial(nn.functional.scaled_dot_product_attention, q, k, v)
    assert (flops(attention, False), flops(attention, True)) == (2 * product, 7 * product)
    product = 2 * 4 * 7 * 5
    assert (flops(lambda: a @ b, False), flops(lambda: a @ b, True)) == (product, 3 * product)
    linear = nn.Linear(7, 5)
    assert (flops(lambda: linear(a), False), flops(lambda: linear(a), True)) == (product, 3 * product)


def test_each_product_counts_for_the_innermost_part_once():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(2, 3), nn.Linear(3, 5)

        def forward(self, x):
            y = self.inner(self.first(x))
            return y @ y.mT

    model, x = Outer(), torch.randn(4, 2, requires_grad=True)
    of_module = {model: parts.VISION, model.inner: parts.RESAMPLER}
    found = count.flops_by_part(lambda: model(x) @ x, of_module)
    assert found == {
        parts.VISION: 2 * (4 * 2 * 3 + 4 * 5 * 4),
        parts.RESAMPLER: 2 * 4 * 3 * 5,
        parts.LANGUAGE: 2 * 4 * 4 * 2,
    }


def test_a_shared_parameter_counts_once_where_it_comes_first():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    of_module = {model[0]: parts.VISION, model[1]: parts.RESAMPLER}
    assert count.parameters_by_part(model, of_module) == {parts.VISION: 6}


def test_memory_of_weights_and_gradients_in_float64(monkeypatch):
    needed = 16 * sum(each.numel() for each in PLAN.subject(torch.float32, "cpu").model.parameters())
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(count, "available", lambda device, free=free: free)
        assert (count.lacking_memory(PLAN, torch.float32, "cpu") == "") == fits


@pytest.mark.parametrize("name", ["openflamingo-9b", "flamingo-80b"])
def test_large_models_are_built_without_memory_and_not_run(name, monkeypatch):
    monkeypatch.setattr(count, "available", lambda device: 64 * 2**30)
    lacking = count.lacking_memory(models.plan(name), torch.bfloat16, "cpu")
    assert lacking.endswith("GiB to be compared in float64, 64 GiB are free")
    assert int(lacking.split()[1].replace(",", "")) > 64


@pytest.mark.parametrize("free", [None, math.inf])
def test_a_model_that_fits_is_run(free, monkeypatch):
    monkeypatch.setattr(count, "available", lambda device: free)
    assert count.lacking_memory(PLAN, torch.float32, "cpu") == ""
