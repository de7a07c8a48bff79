"""Inference in 16 bits: a model takes what Processor makes, and says about what it says in float32."""

from __future__ import annotations

import copy

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, Processor, complete
from flamingo.fewshot import image_embeddings, log_likelihoods
from flamingo.vision import NFNet, VisionEncoder
from flamingo_kernels import patch, quantize
from tests.helpers.weights import randomise

HALVES = [torch.bfloat16, torch.float16]
DOCUMENT_ENDS = ["Output:", "is:"]


@pytest.fixture
def model(seed):
    return randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2).eval()


def prepared(model, how):
    if how != "as it is":
        patch(model)
    if how == "quantized":
        quantize(model, vision=True)
    return model


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["as it is", "patched", "quantized"])
def test_scores_and_text(model, dtype, how):
    processor, images = Processor(image_size=32), list(torch.rand(4, 3, 16, 20))
    documents = [[images[0], "one.", images[1], DOCUMENT_ENDS[0]], [images[2:], DOCUMENT_ENDS[1]]]
    half = prepared(copy.deepcopy(model).to(dtype), how)
    candidates = ["a", "a long candidate"]
    expected = log_likelihoods(model, processor, documents, candidates)
    torch.testing.assert_close(
        log_likelihoods(half, processor, documents, candidates).float(), expected, rtol=0.05, atol=0.5
    )
    for options in ({}, {"num_beams": 3}):
        assert len(complete(half, processor, documents, max_new_tokens=4, **options)) == len(documents)


@pytest.mark.parametrize("dtype", HALVES)
def test_embeddings_of_images(model, dtype):
    processor, images = Processor(image_size=32), list(torch.rand(4, 3, 16, 20))
    expected = image_embeddings(model.vision, processor, images)
    found = image_embeddings(copy.deepcopy(model.vision).to(dtype), processor, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VisionEncoder(image_size=32, patch_size=8, dim=12, layers=1, heads=2),
        lambda: NFNet(depths=(1, 1, 1, 1), widths=(16, 16, 16, 16), group_width=8),
    ],
    ids=["ViT", "NFNet"],
)
class TestAnEncoder:
    @pytest.mark.parametrize("dtype", HALVES)
    def test_takes_float32(self, make, dtype, seed):
        encoder, pixels = make(), torch.randn(1, 2, 1, 3, 32, 32)
        expected = encoder(pixels)
        found = encoder.to(dtype)(pixels)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)

    def test_refuses_integers(self, make):
        with pytest.raises(TypeError, match=r"expected floating-point pixels, got torch\.uint8"):
            make()(torch.zeros(1, 1, 1, 3, 32, 32, dtype=torch.uint8))


class TestTowersBesideFloat32:
    """As they are loaded with `dtype=torch.bfloat16`, beside new layers in float32."""

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("how", ["as it is", "patched", "quantized"])
    def test_scores(self, model, dtype, how):
        half = copy.deepcopy(model)
        half.vision.to(dtype), half.language.to(dtype)
        half = prepared(half, how)
        processor, images = Processor(image_size=32), list(torch.rand(2, 3, 16, 20))
        documents = [[images[0], "one.", images[1], DOCUMENT_ENDS[0]]]
        expected = log_likelihoods(model, processor, documents, ["a", "a long candidate"])
        found = log_likelihoods(half, processor, documents, ["a", "a long candidate"])
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.5)
        assert len(complete(half, processor, documents, max_new_tokens=3)) == 1

    @pytest.mark.parametrize("how", ["as it is", "patched"])
    def test_training_step(self, model, how):
        model.vision.bfloat16(), model.language.bfloat16()
        model = prepared(model.freeze().train(), how)
        input_ids = torch.tensor([[256, 65, 66, 67]])
        model(input_ids, torch.rand(1, 1, 1, 3, 32, 32), labels=input_ids).loss.backward()
        learned = [each for each in model.parameters() if each.requires_grad]
        assert {each.grad.dtype for each in learned} >= {torch.float32}
        assert all(each.grad.isfinite().all() for each in learned)
