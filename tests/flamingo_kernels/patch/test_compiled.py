"""Layers and models of transformers under torch.compile: the original's results, whatever the masks say."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from flamingo_kernels import _kept, patch
from flamingo_kernels.testing import tiny
from tests.flamingo_kernels.patch.test_dense import LOWEST, added, keys
from tests.flamingo_kernels.patch.test_transformers import REPLACED, build, patched
from tests.helpers import third_party
from tests.helpers.graphs import recording
from tests.helpers.parity import assert_parity

transformers = pytest.importorskip("transformers")

ROWS = {
    "an image each": ("#####.....", ".....#####", "#####....."),
    "rows that see nothing": ("..........", ".....#####", "##########"),
    "an unused image": ("###....###", "###.......", ".......###"),
    "a gap": ("##..##....", "####......", ".....#####"),
}
KINDS = [*ROWS, "a bias"]
every_kind = pytest.mark.parametrize(
    ("kind", "implementation", "backend"),
    [
        *(pytest.param(kind, "sdpa", "eager", marks=pytest.mark.slow) for kind in KINDS[1:]),
        ("an image each", "sdpa", "aot_eager"),
        ("a gap", "eager", "aot_eager"),
    ],
)


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mask_of(kind: str) -> torch.Tensor:
    """`[2, 1, 3, 10]`, as it is added to scores."""
    if kind == "a bias":
        return torch.linspace(-1, 1, 60).view(2, 1, 3, 10)
    return added(torch.cat([keys(*ROWS[kind]), keys(*reversed(ROWS[kind]))]))


def compile_patched(layer: torch.nn.Module, backend: str = "eager", **options):
    """A patched copy, compiled as one graph, and the operations in its graphs."""
    fused, found = copy.deepcopy(layer), Counter()
    patch(fused)
    fused.compile(backend=recording(backend, found), fullgraph=True, **options)
    return fused, found


class TestIdefics:
    def block(self, **config):
        return build("idefics-tiny", **config).model.model.gated_cross_attn_layers[0]

    def call(self, mask, rows=None):
        """A block called with a mask; rows that see nothing are closed, as the model does it."""
        rows = (mask == 0).any(-1)[:, 0].float() if rows is None else rows
        return lambda module, x, media: module(x, None, media, mask.to(x.dtype), rows)

    @every_kind
    def test_every_kind_of_mask(self, kind, implementation, backend):
        block = self.block()
        block.cross_attn.config._attn_implementation = implementation
        fused, found = compile_patched(block, backend)
        rows = torch.ones(2, 3) if kind == "a bias" else None
        call = self.call(mask_of(kind), rows)
        assert_parity(block, fused, (2, 3, 32), (2, 10, 16), call=call)
        assert found["dense_cross_attention_fwd"]

    def test_under_autocast(self):
        block = self.block()
        fused, found = compile_patched(block)
        with torch.autocast("cpu", torch.bfloat16):
            assert_parity(block, fused, (2, 3, 32), (2, 10, 16), call=self.call(mask_of("an image each")))
        assert found["dense_cross_attention_fwd"]

    def test_one_graph_for_texts_of_other_lengths(self):
        block = self.block()
        fused, found = compile_patched(block, dynamic=True)
        for length in (3, 6, 9):
            visible = torch.rand(2, length, 2) < 0.6
            call = self.call(added(visible.repeat_interleave(5, -1)))
            x, media = torch.randn(2, length, 32), torch.randn(2, 10, 16)
            torch.testing.assert_close(call(fused, x, media), call(block, x, media))
        assert found["dense_cross_attention_fwd"] == 1

    @torch.no_grad()
    def test_a_step_keeps_nothing_and_is_the_originals(self):
        block = self.block()
        fused, found = compile_patched(block)
        call = self.call(mask_of("an image each")[:, :, :1])
        x, media = torch.randn(2, 1, 32), torch.randn(2, 10, 16)
        for _ in range(2):
            torch.testing.assert_close(call(fused, x, media), call(block, x, media))
            media.data += 1  # which torch does not count
        assert not found["dense_cross_attention_fwd"]
        assert fused not in vars(_kept._threads).get("kept", ())

    def test_a_mask_with_a_gradient(self):
        block = self.block()
        fused, found = compile_patched(block)
        call = lambda module, x, media, bias: module(x, None, media, bias, torch.ones(2, 3))  # noqa: E731
        assert_parity(block, fused, (2, 3, 32), (2, 10, 16), (2, 1, 3, 10), call=call)
        assert not found["dense_cross_attention_fwd"]

    def test_dropout_in_training(self):
        block = self.block(dropout=0.3).train()
        fused, found = compile_patched(block)
        x, media, call = torch.randn(2, 3, 32), torch.randn(2, 10, 16), self.call(mask_of("an image each"))
        torch.manual_seed(1)
        expected = call(block, x, media)
        torch.manual_seed(1)
        torch.testing.assert_close(call(fused, x, media), expected)
        assert not found["dense_cross_attention_fwd"]


class TestMllama:
    def layer(self):
        return build("mllama-tiny").model.model.language_model.layers[1]

    @every_kind
    def test_every_kind_of_mask(self, kind, implementation, backend):
        """A text that sees no image sees them all, as the model does it."""
        layer, mask = self.layer(), mask_of(kind)
        layer.cross_attn.config._attn_implementation = implementation
        rows = torch.ones(2, 1, 3, 1) if kind == "a bias" else (mask == 0).any(-1, keepdim=True).float()
        fused, found = compile_patched(layer, backend)

        def call(module, x, states):
            return module(x, states.flatten(0, 1), (mask * rows).to(x.dtype), None, rows.to(x.dtype))

        assert_parity(layer, fused, (2, 3, 32), (2, 2, 5, 32), call=call)
        assert found["dense_cross_attention_fwd"]

    def test_fixes(self):
        layer, mask = self.layer(), mask_of("rows that see nothing")
        rows = (mask == 0).any(-1, keepdim=True).float()
        fixed = copy.deepcopy(layer)
        patch(fixed, fixes=["row_leak"])
        fused = copy.deepcopy(fixed)
        fused.compile(backend="eager", fullgraph=True)
        x, states = torch.randn(2, 3, 32), torch.randn(4, 5, 32)
        given = (states, mask * rows, None, rows)
        torch.testing.assert_close(fused(x, *given), fixed(x, *given))

    @pytest.mark.skipif(
        third_party.transformers_version() < (5, 24),
        reason="its cross-attention layers fit into no static cache before transformers 5.24",
    )
    @pytest.mark.parametrize("images", ["of both", "of the first alone", "of none"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_static_cache(self, images, compiled):
        original = build("mllama-tiny")
        inputs = {**original.inputs, "attention_mask": original.inputs["attention_mask"].clone()}
        inputs["attention_mask"][0, :3] = 0
        if images == "of the first alone":
            inputs["cross_attention_mask"] = (
                inputs["cross_attention_mask"] * torch.tensor([1, 0])[:, None, None, None]
            )
        elif images == "of none":
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        original = tiny.TinyModel("mllama-tiny", original.model, inputs)
        options = {"cache_implementation": "static"}
        if compiled:
            config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
            config._compile_all_devices = True
            options["compile_config"] = config
        expected = original.generate(6)
        assert torch.equal(patched(original).generate(6, **options), expected)


class TestIdefics2:
    def layer(self):
        return build("idefics2-tiny").model.model.connector.perceiver_resampler.layers[0].self_attn

    @pytest.mark.parametrize("hidden", [(1, 3), (1, 8)], ids=["media", "a latent"])
    @pytest.mark.parametrize("rows_differ", [False, True])
    @pytest.mark.parametrize("as_bool", [False, True])
    def test_every_kind_of_mask(self, hidden, rows_differ, as_bool):
        layer = self.layer()
        seen = torch.ones(2, 1, 5, 12, dtype=torch.bool)  # 7 media, 5 latents
        seen[0, :, 1 if rows_differ else slice(None), list(hidden)] = False
        mask = seen if as_bool else torch.where(seen, 0.0, LOWEST)
        fused, found = compile_patched(layer)

        def call(module, latents, context):
            return module(latents, context, mask if as_bool else mask.to(latents.dtype))[0]

        assert_parity(layer, fused, (2, 5, 32), (2, 7, 32), call=call)
        assert found["dense_perceiver_attention_fwd"]


class TestEvolla:
    @pytest.mark.parametrize("proteins", [[1, 0], [1, 1], [0, 0]], ids=str)
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_padding_and_sequences_without_a_protein(self, proteins, backend):
        """As one graph, which the original is not: it asks whether there is any protein."""
        layers = build("evolla-tiny").model.model.layers
        aligner = next(layer.adapter for layer in layers if hasattr(layer, "adapter"))
        fused, found = compile_patched(aligner, backend)
        padding, batch = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor(proteins)

        def call(module, x, media):
            return module(x, media, None, None, padding, protein_batch_mask=batch)

        assert_parity(aligner, fused, (2, 4, 32), (2, 5, 32), call=call)
        assert found["masked_cross_attention_fwd"]

    @pytest.mark.parametrize("hidden", [(1, 3), (1, 8)], ids=["media", "a latent"])
    def test_residues_that_are_padding(self, hidden):
        model = build("evolla-tiny").model.model
        attention = model.protein_encoder.sequence_compressor_resampler.layers[0][0]
        fused, found = compile_patched(attention)
        mask = torch.ones(2, 12)  # 7 residues, 5 latents
        mask[0, list(hidden)] = 0
        call = lambda module, x, latents: module(x, latents, mask)  # noqa: E731
        assert_parity(attention, fused, (2, 7, 16), (2, 5, 16), call=call)
        assert found["dense_perceiver_attention_fwd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_generated_tokens(name):
    """A prompt and the tokens after it, each over more keys than the one before."""
    original = build(name)
    fused, options = patched(original), {"output_scores": True, "return_dict_in_generate": True}
    fused.model.compile(backend="eager", dynamic=True)
    expected, got = original.generate(4, **options), fused.generate(4, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
