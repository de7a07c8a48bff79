"""The registry of small third-party models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo_kernels.testing import tiny
from tests.helpers import third_party

SIZES = tiny.Sizes(batch=2, text=11, images=2, width=16, heads=2, layers=2, visual=8, latents=3)


def build(name: str, **options) -> tiny.TinyModel:
    if "flamingo_pytorch" in name:
        third_party.flamingo_pytorch()
    else:
        pytest.importorskip("transformers")
    if "open_flamingo" in name:
        third_party.open_flamingo("helpers")
    return tiny.build(name, SIZES, **options)


@pytest.mark.parametrize("name", tiny.names())
def test_a_model_and_its_inputs(name):
    model = build(name)
    logits = model.logits()
    assert logits.shape == (*model.tokens.shape, tiny.VOCABULARY)
    assert not model.model.training
    assert all(p.numel() == 1 or p.unique().numel() > 1 for p in model.model.parameters())
    loss = model.loss()
    loss.backward()
    assert 0 < loss.item() < 20
    assert all(p.grad is not None for p in model.model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.equal(build(name).logits(), logits)
        assert not torch.equal(build(name, seed=1).logits(), logits)


@pytest.mark.parametrize("name", tiny.names())
def test_generation(name):
    model = build(name)
    if name == "flamingo_pytorch-tiny":
        with pytest.raises(NotImplementedError, match="flamingo_pytorch-tiny: its library generates no text"):
            model.generate(3)
    else:
        tokens = model.generate(3)
        assert tokens.shape == (2, model.tokens.shape[1] + 3)
        assert torch.equal(tokens[:, :-3], model.tokens)


def test_images_are_apart_in_one_row_and_adjacent_in_the_next():
    _, locations = tiny._text(SIZES)
    assert [row.nonzero().flatten().tolist() for row in locations] == [[2, 5], [2, 3]]


def test_more_images_than_flamingo_pytorch_has_embeddings_for():
    third_party.flamingo_pytorch()
    many = tiny.build("flamingo_pytorch-tiny", replace(SIZES, images=5))
    assert many.logits().shape == (2, 11, tiny.VOCABULARY)


def test_building_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build("flamingo_pytorch-tiny")
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="'gpt' is not one of open_flamingo-tiny, flamingo_pytorch-tiny, "):
        tiny.build("gpt")
