"""What is counted without running a model is what the model has, and what a formula gives."""

from __future__ import annotations

import math

import pytest
import torch

from flamingo import FlamingoConfig
from flamingo_kernels import patch
from flamingo_kernels.commands.measure.memory import saved_bytes
from flamingo_kernels.commands.profile import count, models, parts, run

PLAN = models.plan("tiny", quick=True)


@pytest.fixture(scope="module")
def counted():
    return count.run(PLAN, torch.float32, "cpu", "is asked to")


def test_flops_are_those_of_the_matrix_products(counted):
    config, (text, media) = FlamingoConfig.preset("tiny"), PLAN.sizes
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
    subject = PLAN.subject(torch.float32, "cpu")
    after = run.twin(subject.model)
    patch(after)
    assert sum(counted.parameters.values()) == sum(each.numel() for each in subject.model.parameters())
    assert counted.parameters[parts.GATE] == 2 * len(subject.model.cross_attn)
    assert counted.parameters[parts.RESAMPLER] == sum(
        each.numel() for each in subject.model.resampler.parameters()
    )
    start = subject.works[models.STEP].start
    for side, model in ((run.BEFORE, subject.model), (run.AFTER, after)):
        assert counted.saved[side] == saved_bytes(start(model), model)


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
