"""accelerate's offload, which has weights in memory only while their module is called: the same numbers."""

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, PretrainedLanguage
from flamingo_kernels import patch
from tests.helpers import language_models as families
from tests.helpers.weights import randomise

accelerate = pytest.importorskip("accelerate")


def build(kind):
    """A Flamingo in eval mode; gates open."""
    torch.manual_seed(1)
    if kind in families.FAMILIES:
        language = PretrainedLanguage(families.build(kind, vocab_size=257), new_tokens=[256, 257])
        sizes = {"language_dim": families.WIDTH, "language_layers": families.LAYERS, "vocab_size": 258}
        model = Flamingo(FlamingoConfig.preset("tiny", **sizes), language=language)
    else:
        choices = {
            "tied": {},
            "untied": {"tie_embeddings": False},
            "new tokens": {"new_tokens": (257,)},
            "relative positions": {"language_positions": "relative"},
        }
        model = Flamingo(FlamingoConfig.preset("tiny", **choices[kind]))
    for part in (model.vision, model.resampler, model.cross_attn):
        randomise(part)
    return model.eval()


def results(model):
    ids = torch.tensor([[65, 256, 66, 257, 67, 256, 68], [256, 69, 70, 71, 72, 73, 74]])
    pixels = torch.linspace(-1, 1, 2 * 2 * 2 * 3 * 32 * 32).view(2, 2, 2, 3, 32, 32)
    with torch.no_grad():
        yield model(ids, pixels).logits
        yield model(ids, pixels, labels=ids, loss_only=True).loss
    yield model.generate(ids, pixels, max_new_tokens=4, num_beams=2)
    yield model.generate(ids.clamp(max=255), max_new_tokens=4)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize(
    "kind", ["tied", "untied", "new tokens", "relative positions", "opt", "llama", "gemma"]
)
def test_a_model_whose_weights_come_and_go(kind, patched):
    model = build(kind)
    expected = list(results(model))
    if patched:
        patch(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    for got, want in zip(results(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_new_tokens_join_a_model_before_it_is_offloaded():
    model = families.build("llama")
    ids = families.tokens(1, 4)
    with torch.no_grad():
        expected = model(ids).logits
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert torch.equal(PretrainedLanguage(model)(ids), expected)
    with pytest.raises(
        ValueError, match=r"expected weights in memory, .* Offload the PretrainedLanguage, or"
    ):
        PretrainedLanguage(model, new_tokens=[families.VOCABULARY])
