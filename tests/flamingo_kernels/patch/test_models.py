"""Whole models, patched: this repository's, flamingo_pytorch's, and open_flamingo's parts put together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flamingo import Flamingo, FlamingoConfig, Processor
from flamingo_kernels import layers, patch, unpatch, use_backend
from tests.helpers import third_party
from tests.helpers.parity import assert_parity
from tests.helpers.weights import randomise

VOCAB, IMAGE, TEXT, VISUAL = 17, 16, 20, 512
TOKENS = torch.tensor([[1, IMAGE, 2, 3, IMAGE, 4, 5], [6, 7, IMAGE, IMAGE, IMAGE, 8, 9]])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(TEXT, TEXT)

    def forward(self, x, attention_mask=None):
        return x + self.linear(x).tanh() * attention_mask[..., None]


class Language(nn.Module):
    """The least that open_flamingo's mixin takes for a language model; every token stands alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, TEXT)
        self.blocks = nn.ModuleList(Decoder() for _ in range(4))
        self.head = nn.Linear(TEXT, VOCAB, bias=False)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask)
        return self.head(x)


class OpenFlamingo(nn.Module):
    """What its Flamingo class does around the parts, which open_clip would be needed to import."""

    def __init__(self):
        super().__init__()
        helpers, lm, utils = map(third_party.open_flamingo, ("helpers", "flamingo_lm", "utils"))
        self.perceiver = helpers.PerceiverResampler(dim=VISUAL, depth=1, dim_head=8, heads=2, num_latents=5)
        self.lang_encoder = Language()
        utils.extend_instance(self.lang_encoder, lm.FlamingoLMMixin)
        self.lang_encoder.set_decoder_layers_attr_name("blocks")
        self.lang_encoder.init_flamingo(
            media_token_id=IMAGE,
            lang_hidden_size=TEXT,
            vis_hidden_size=VISUAL,
            cross_attn_every_n_layers=2,
            gradient_checkpointing=False,
        )

    def condition(self, vision_x):
        media = self.perceiver(vision_x)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(media)

    def forward(self, vision_x, input_ids=TOKENS):
        self.condition(vision_x)
        return self.lang_encoder(input_ids, torch.ones_like(input_ids))

    @torch.no_grad()
    def generate(self, vision_x, input_ids, steps):
        """Greedy, the prompt first and then a token at a time, as generate() of transformers calls it."""
        self.lang_encoder._use_cached_vision_x = True
        self.condition(vision_x)
        generated, token = [], input_ids
        for _ in range(steps):
            logits = self.lang_encoder(token, torch.ones_like(token))[:, -1]
            logits[:, IMAGE] = -torch.inf
            token = logits.argmax(-1, keepdim=True)
            generated.append(logits)
        self.lang_encoder.clear_conditioned_layers()
        self.lang_encoder._use_cached_vision_x = False
        return torch.stack(generated)


def open_flamingo():
    return randomise(OpenFlamingo(), std=0.2)


def count_calls(monkeypatch, modules, calls):
    """Note the products of linear layers, without a hook or another forward, which would be honoured."""
    linear = nn.functional.linear

    def noted(x, weight, bias=None):
        if any(weight is each.weight for each in modules):
            calls.append(1)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", noted)


def vision(randn):
    return randn(2, 2, 1, 6, VISUAL)


class TestOpenFlamingo:
    def test_both_references_to_each_block_swap(self):
        model = open_flamingo()
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        report = patch(model)
        lm = model.lang_encoder
        for index in (1, 3):
            block = lm.gated_cross_attn_layers[index]
            assert block is lm.blocks[index].gated_cross_attn_layer
            assert isinstance(block, layers.Fused)
            assert isinstance(block.attn, layers.Fused)
        assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
        assert sorted(report.replaced) == [
            "lang_encoder.blocks.1.gated_cross_attn_layer",
            "lang_encoder.blocks.1.gated_cross_attn_layer.attn",
            "lang_encoder.blocks.3.gated_cross_attn_layer",
            "lang_encoder.blocks.3.gated_cross_attn_layer.attn",
            "perceiver",
            "perceiver.layers.0.0",
        ]
        lm.init_flamingo_layers(gradient_checkpointing=True)
        assert isinstance(lm.blocks[1].gated_cross_attn_layer, layers.Fused)
        assert lm.blocks[1].gated_cross_attn_layer._use_gradient_checkpointing

    def test_parity(self):
        model = open_flamingo()
        fused = copy.deepcopy(model)
        patch(fused)
        assert_parity(model, fused, vision)

    def test_generation_from_cached_media(self):
        model = open_flamingo().double()
        vision_x = torch.randn(2, 2, 1, 6, VISUAL, dtype=torch.float64)
        expected = model.generate(vision_x, TOKENS, steps=4)
        blind = model.generate(torch.zeros_like(vision_x), TOKENS, steps=4)
        with patch(model):
            torch.testing.assert_close(model.generate(vision_x, TOKENS, steps=4), expected)
        assert not torch.allclose(expected[-1], blind[-1])
        assert torch.equal(model.generate(vision_x, TOKENS, steps=4), expected)

    def test_media_are_projected_once_for_a_text(self, monkeypatch):
        model, calls = open_flamingo(), []
        vision_x = torch.randn(2, 2, 1, 6, VISUAL)
        projections = [block.attn.to_kv for block in model.lang_encoder.gated_cross_attn_layers if block]
        count_calls(monkeypatch, projections, calls)
        model.generate(vision_x, TOKENS, steps=4)
        assert len(calls) == 2 * 4
        calls.clear()
        with patch(model):
            model.generate(vision_x, TOKENS, steps=4)
            assert len(calls) == 2
            model.generate(vision_x, TOKENS, steps=4)
        assert len(calls) == 4

    def test_a_deep_copy_keeps_its_aliases(self):
        model = open_flamingo()
        patch(model)
        lm = copy.deepcopy(model).lang_encoder
        assert lm.blocks[1].gated_cross_attn_layer is lm.gated_cross_attn_layers[1]
        unpatch(lm)
        assert not any(isinstance(module, layers.Fused) for module in lm.modules())


class TestFlamingo:
    @pytest.fixture
    def model(self):
        return randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2)

    def test_parity(self, model, backend):
        fused = copy.deepcopy(model)
        patch(fused)
        tokens = torch.tensor([[65, 256, 66, 67, 256, 68], [256, 65, 66, 67, 68, 69]])
        with use_backend(backend):
            assert_parity(
                model, fused, (2, 2, 1, 3, 32, 32), call=lambda module, pixels: module(tokens, pixels).logits
            )

    def test_text_that_sees_the_next_image(self, model, backend):
        image = torch.rand(3, 8, 8)
        batch = Processor(image_size=32)([["a", image, "b", image, "c"], ["d", image]], p_next=1.0)
        inputs = {"input_ids": batch.input_ids, "media_starts": batch.media_starts}
        fused = copy.deepcopy(model)
        patch(fused)
        with use_backend(backend):
            assert_parity(
                model,
                fused,
                batch.pixels.shape,
                call=lambda module, pixels: module(pixels=pixels, **inputs).logits,
            )

    def test_generation(self, model):
        prompt, pixels = torch.tensor([[65, 256, 66]]), torch.randn(1, 1, 1, 3, 32, 32)
        expected = model.generate(prompt, pixels, max_new_tokens=4)
        with patch(model):
            assert torch.equal(model.generate(prompt, pixels, max_new_tokens=4), expected)


def test_flamingo_pytorch():
    third_party.flamingo_pytorch()
    palm = pytest.importorskip("flamingo_pytorch").FlamingoPaLM(
        dim=TEXT,
        num_tokens=VOCAB,
        depth=3,
        dim_head=8,
        heads=2,
        media_token_id=IMAGE,
        cross_attn_every=2,
        img_encoder=nn.Identity(),
        perceiver_num_latents=5,
    )
    fused = copy.deepcopy(randomise(palm, std=0.2))
    report = patch(fused)
    assert len(report.replaced) == 2 * 2 + 2 + 1
    assert report.policies == ("open_flamingo",)
    assert_parity(palm, fused, (2, 2, 6, TEXT), call=lambda module, images: module(TOKENS, images=images))
