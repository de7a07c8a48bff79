"""Models of transformers, patched: the same logits, gradients and tokens, whatever wraps the model.

`test_oldest_transformers.py` runs this file with the oldest version that is supported.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections import Counter
from itertools import product

import pytest
import torch
from torch import nn

from flamingo_kernels import layers, patch, unpatch
from flamingo_kernels.patch import dense
from flamingo_kernels.testing import tiny
from tests.flamingo_kernels.patch.test_models import count_calls
from tests.helpers import slow_unless
from tests.helpers.graphs import recording
from tests.helpers.parity import assert_parity, hold

transformers = pytest.importorskip("transformers")

SIZES = tiny.Sizes(batch=2, text=14, images=3, width=32, heads=4, layers=4, visual=16, latents=5)
# By name: classes that are replaced, and operators that one forward pass calls, of which kernels compute all.
IDEFICS = {"IdeficsGatedCrossAttentionLayer": 2, "IdeficsPerceiverAttention": 2}
REPLACED = {
    "idefics-tiny": IDEFICS,
    "idefics2-tiny": {"Idefics2PerceiverAttention": 2},
    "mllama-tiny": {"MllamaCrossAttentionDecoderLayer": 2, "MllamaTextCrossAttention": 2},
    "evolla-tiny": {"EvollaSequenceAlignerCrossAttention": 2, "EvollaSequenceCompressorAttention": 2},
}
ATTENTION = {"idefics-tiny": 4, "idefics2-tiny": 2, "mllama-tiny": 2, "evolla-tiny": 4}
# By name: the operators in the graph of a compiled model; the dense ones read their masks when it runs.
IN_THE_GRAPH = {
    "idefics-tiny": {"perceiver_attention": 2, "dense_cross_attention": 2},
    "idefics2-tiny": {"dense_perceiver_attention": 2},
    "mllama-tiny": {"dense_cross_attention": 2},
    "evolla-tiny": {"dense_perceiver_attention": 2, "masked_cross_attention": 2},
}
models = pytest.mark.parametrize("name", REPLACED)
COMPILED = [("idefics-tiny", "aot_eager")]  # each takes long


def build(name: str, **config) -> tiny.TinyModel:
    return tiny.build(name, SIZES, **config)


def patched(original: tiny.TinyModel, **options) -> tiny.TinyModel:
    model = copy.deepcopy(original.model)
    patch(model, **options)
    return tiny.TinyModel(original.name, model, original.inputs)


@pytest.fixture
def attention(monkeypatch):
    """The calls of attention by the adapters, alone or within a sublayer."""
    calls = []
    adapters = [f"patch.{name}" for name in ("idefics", "idefics2", "mllama", "evolla")]
    for home in (*adapters, "layers.resampler"):
        module = importlib.import_module(f"flamingo_kernels.{home}")
        for name in ("masked_cross_attention", "gated_cross_attention", "perceiver_attention"):
            if operator := getattr(module, name, None):

                def call(*args, operator=operator, **kwargs):
                    calls.append(operator.__name__)
                    return operator(*args, **kwargs)

                monkeypatch.setattr(module, name, call)
    return calls


def assert_in_budget(original: tiny.TinyModel, fused: nn.Module, dtype=torch.float32, **inputs):
    """Logits and the gradients of all parameters, by the error budget."""
    given = {**original.inputs, **inputs}

    def call(module):
        if module.dtype == torch.float64:
            module.set_attn_implementation("sdpa")  # "eager" casts the lowest float64 to -inf
        return module(**_cast(given, module.dtype)).logits

    for model in (original.model, fused):
        for key, parameter in model.named_parameters():
            if key.endswith("k_layer_norm.bias"):
                parameter.requires_grad_(
                    False
                )  # a softmax does not see it: the gradient is 0, errors are all
    assert_parity(original.model, fused, dtype=dtype, call=call)


def _cast(inputs, dtype):
    return {name: x.to(dtype) if x.dtype.is_floating_point else x for name, x in inputs.items()}


class TestEveryModel:
    @models
    def test_what_is_replaced(self, name):
        model = build(name).model
        keys = list(model.state_dict())
        report = patch(model)
        found = [old.__name__ for old, _ in report.replaced.values()]
        assert {cls: found.count(cls) for cls in found} == REPLACED[name]
        assert not report.skipped
        assert list(model.state_dict()) == keys
        unpatch(model)
        assert not any(isinstance(module, layers.Fused) for module in model.modules())

    @pytest.mark.parametrize(
        ("name", "home"), [("idefics-tiny", "idefics"), ("mllama-tiny", "mllama"), ("evolla-tiny", "evolla")]
    )
    def test_plain_blocks_are_two_nodes(self, name, home, monkeypatch):
        """Blocks of a norm, a gate and two sublayers keep no branch, so that nothing of one is called."""
        module, calls = importlib.import_module(f"flamingo_kernels.patch.{home}"), []
        adapter = [(module, "gated_cross_attention"), (module, "add_gated")]
        for place, operation in [*adapter, (layers.fused, "gated_feed_forward"), (layers.fused, "add_gated")]:
            counted = getattr(place, operation)

            def call(*args, counted=counted, **kwargs):
                calls.append(counted.__name__)
                return counted(*args, **kwargs)

            monkeypatch.setattr(place, operation, call)
        original = build(name)
        model = patched(original).model
        model(**original.inputs)
        blocks = sum(hasattr(block, "_add_attended") for block in model.modules())
        assert calls == ["gated_cross_attention", "gated_feed_forward"] * blocks
        assert blocks > 0

    @models
    # No "eager" in bfloat16: its softmax is in float32, forward and backward, while a fused attention starts
    # its backward from the rounded output.
    @pytest.mark.parametrize(
        ("implementation", "dtype"),
        [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("eager", torch.float32)],
        ids=str,
    )
    def test_logits_and_gradients(self, name, implementation, dtype, attention):
        original = build(name)
        original.model.to(dtype).set_attn_implementation(implementation)
        fused = patched(original).model
        with torch.no_grad():
            fused(**_cast(original.inputs, dtype))
        assert len(attention) == ATTENTION[name]
        assert_in_budget(original, fused, dtype)

    @pytest.mark.parametrize("name", [*REPLACED, "open_flamingo-tiny"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
    def test_generated_tokens(self, name, options, attention):
        pytest.importorskip("einops_exts" if name == "open_flamingo-tiny" else "transformers")
        options = {**options, "output_scores": True, "return_dict_in_generate": True}
        original = build(name)
        expected, got = original.generate(6, **options), patched(original).generate(6, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert len(attention) >= ATTENTION.get(name, 0)
        media = {"evolla-tiny": "protein_input_ids", "open_flamingo-tiny": "vision_x"}.get(
            name, "pixel_values"
        )
        inputs = {**original.inputs, media: original.inputs[media].flip(0)}
        other = tiny.TinyModel(name, original.model, inputs).generate(6, **options)
        assert not torch.allclose(other.scores[0], expected.scores[0], atol=1e-2)

    @pytest.mark.slow  # test_modes has it too, but for the oldest transformers
    @models
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, name, dtype, attention):
        """Which gives a layer keys in float32, from a norm, beside values in a half, and text in either."""
        original = build(name)
        fused = patched(original).model
        with torch.autocast("cpu", dtype):
            with torch.no_grad():
                assert fused(**original.inputs).logits.dtype == original.logits().dtype
            assert len(attention) == ATTENTION[name]
            assert_in_budget(original, fused)

    @models
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_of_each_token(self, name, weights):
        """The logits of a prompt and of the tokens after it, which are given."""
        original = build(name)
        original.model.to(weights)
        inputs = _cast(original.inputs, weights)
        given = torch.randint(1, 60, (SIZES.batch, 3), generator=torch.Generator().manual_seed(5))
        length = original.tokens.shape[1] if name != "evolla-tiny" else inputs["input_ids"].shape[1]

        def logits(model, inputs):
            out = model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                prefix_allowed_tokens_fn=lambda row, ids: [int(given[row, len(ids) - length])],
            )
            return torch.stack(out.logits)

        double = copy.deepcopy(original.model).double().eval()
        double.set_attn_implementation("sdpa")
        exact = logits(double, _cast(inputs, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            kernel = logits(patched(original).model, inputs)
            found = hold(name, kernel, lambda: logits(original.model, inputs), exact)
        assert found.passed, found

    @models
    def test_saved_and_loaded(self, name, tmp_path):
        original = build(name)
        fused = patched(original)
        fused.model.save_pretrained(tmp_path)
        loaded = type(original.model).from_pretrained(tmp_path)
        assert not any(isinstance(module, layers.Fused) for module in loaded.modules())
        again = tiny.TinyModel(name, loaded.eval(), original.inputs)
        torch.testing.assert_close(again.logits(), original.logits())
        patch(loaded)
        assert torch.equal(again.logits(), fused.logits())

    # Reentrant checkpoints want media as positional arguments, which Idefics alone does.
    @pytest.mark.parametrize(
        ("name", "reentrant"), [*((name, False) for name in REPLACED), ("idefics-tiny", True)]
    )
    def test_gradient_checkpointing(self, name, reentrant):
        plain = patched(build(name))
        plain.model.train()
        checkpointed = tiny.TinyModel(name, copy.deepcopy(plain.model), plain.inputs)
        checkpointed.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed.model.enable_input_require_grads()
        for model in (plain, checkpointed):
            model.loss().backward()
        gradients = dict(checkpointed.model.named_parameters())
        for key, parameter in plain.model.named_parameters():
            torch.testing.assert_close(gradients[key].grad, parameter.grad, msg=key)

    @pytest.mark.parametrize(
        ("name", "backend"),
        slow_unless(COMPILED, product(REPLACED, ("aot_eager", "inductor"))),
    )
    @pytest.mark.filterwarnings(
        "ignore::UserWarning",
        "ignore::DeprecationWarning",
        "error:Dynamo detected a call to a `functools.lru_cache`",
    )
    def test_compiled(self, name, backend):
        """As one graph, with the operators in it."""
        torch._dynamo.reset()
        original = build(name)
        fused, found = patched(original), Counter()
        compiler = recording(backend, found)
        model = torch.compile(fused.model, backend=compiler, fullgraph=True)
        compiled = tiny.TinyModel(name, model, original.inputs)
        torch.testing.assert_close(compiled.logits(), original.logits(), rtol=1e-4, atol=1e-5)
        attention = {key: count for key, count in found.items() if key.endswith("attention_fwd")}
        assert attention == {f"{operator}_fwd": count for operator, count in IN_THE_GRAPH[name].items()}
        for model in (original, compiled):
            model.loss().backward()
        expected = dict(original.model.named_parameters())
        for key, parameter in fused.model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-5, msg=key)

    # The original Evolla cannot be exported.
    @pytest.mark.parametrize(
        ("name", "strict"),
        slow_unless([("idefics2-tiny", False)], product([*REPLACED][:3], (False, True))),
    )
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
    @torch.no_grad()
    def test_exported(self, name, strict):
        original = build(name)
        fused = patched(original)
        exported = torch.export.export(fused.model, (), fused.inputs | {"use_cache": False}, strict=strict)
        logits = exported.module()(**fused.inputs, use_cache=False).logits
        torch.testing.assert_close(logits, original.logits(), rtol=1e-4, atol=1e-5)

    @models
    @pytest.mark.parametrize("patch_first", [True, False])
    def test_lora(self, name, patch_first, attention):
        peft = pytest.importorskip("peft")
        # the projections of the replaced layers, by the names in their libraries
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "key_protein", "value_protein", "to_kv"]
        modules = {key.rpartition(".")[2] for key, _ in build(name).model.named_modules()}
        config = peft.LoraConfig(r=2, target_modules=[t for t in targets if t in modules])

        def adapted(original, fuse):
            model = copy.deepcopy(original.model)
            if fuse and patch_first:
                patch(model)
            torch.manual_seed(0)
            model = peft.get_peft_model(model, config)
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(parameter, std=0.3)
            if fuse and not patch_first:
                patch(model)
            return model.eval()

        original = build(name)
        plain, fused = (adapted(original, fuse) for fuse in (False, True))
        with torch.no_grad():
            fused(**original.inputs)
            assert len(attention) == ATTENTION[name]
            a, b = (tiny.TinyModel(name, model, original.inputs) for model in (plain, fused))
            assert torch.equal(a.generate(4), b.generate(4))
            with fused.disable_adapter():
                torch.testing.assert_close(b.logits(), original.logits())
        trained = {key: p for key, p in plain.named_parameters() if p.requires_grad}
        a.loss().backward()
        b.loss().backward()
        for key, parameter in fused.named_parameters():
            assert (parameter.grad is None) == (key not in trained)
            if key in trained:
                torch.testing.assert_close(parameter.grad, trained[key].grad, rtol=1e-3, atol=1e-6, msg=key)

    @models
    def test_recorded_hidden_states_and_attentions(self, name):
        original = build(name)
        original.model.set_attn_implementation("eager")
        fused = patched(original)
        record = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            expected, got = (model.model(**model.inputs, **record) for model in (original, fused))
        for kind in ("hidden_states", "attentions"):
            assert len(got[kind]) == len(expected[kind]) > 0
            for mine, its in zip(got[kind], expected[kind], strict=True):
                torch.testing.assert_close(mine, its)
        # transformers 4 leaves its traces on the modules
        patch(original.model)
        unpatch(fused.model)
        assert isinstance(next(m for m in original.model.modules() if isinstance(m, layers.Fused)), nn.Module)
        torch.testing.assert_close(original.logits(), fused.logits())

    @pytest.mark.slow
    @models
    def test_fully_sharded_on_two_processes(self, name, tmp_path):
        torch.multiprocessing.spawn(_train_sharded, (name, str(tmp_path)), nprocs=2)
        original = build(name)
        original.loss().backward()
        shards = torch.load(tmp_path / "gradients.pt")
        for key, parameter in original.model.named_parameters():
            torch.testing.assert_close(shards[key], parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


def _train_sharded(rank: int, name: str, folder: str) -> None:
    """One of two processes: shard every replaced block and the whole, save the gradients of one step."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    fused = patched(build(name))
    for module in reversed(list(fused.model.modules())):  # inner ones first
        if isinstance(module, layers.Fused):
            fully_shard(module)
    fully_shard(fused.model)
    fused.loss().backward()
    gradients = {
        key: None if parameter.grad is None else parameter.grad.full_tensor()
        for key, parameter in fused.model.named_parameters()
    }
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    distributed.barrier()  # who leaves first would abort the other
    distributed.destroy_process_group()


class TestIdefics:
    @pytest.mark.parametrize("alpha", ["float", "vector"])
    @pytest.mark.parametrize("qk_layer_norms", [True, False])
    @pytest.mark.parametrize("use_resampler", [True, False])
    def test_every_kind_of_block(self, alpha, qk_layer_norms, use_resampler, attention):
        original = build(
            "idefics-tiny", alpha_type=alpha, qk_layer_norms=qk_layer_norms, use_resampler=use_resampler
        )
        fused = patched(original)
        fused.logits()
        assert len(attention) == (4 if use_resampler else 2)
        assert_in_budget(original, fused.model)

    def masks(self):
        """Images that each of 14 tokens sees, `[2, 14, 3]`."""
        from transformers.models.idefics import processing_idefics as processing

        image = tiny.IMAGE
        tokens = torch.randint(3, 60, (2, 14))
        tokens[0, [1, 6, 9]], tokens[0, 4], tokens[0, 11] = image, tiny.END, tiny.END
        tokens[1, [0, 1, 8]], tokens[1, 3] = image, tiny.END
        tokenizer = type("", (), {"eos_token_id": tiny.END, "convert_tokens_to_ids": lambda self, _: image})()
        index, _ = processing.image_attention_mask_for_packed_input_ids(tokens, tokenizer, "pt")
        reset = processing.incremental_to_binary_attention_mask(index, "pt", num_classes=3)
        assert reset[0].any(-1).int().tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]
        apart = torch.zeros_like(reset)
        apart[:, 3:, 0] = apart[:, 5:, 2] = 1
        mixed = apart.clone()
        mixed[:, 9:, 1] = 1
        mixed[:, 9:, 0] = 0
        return {
            "reset after the end of a text": (reset, 4),
            "all images before": (reset.cumsum(1).clamp(max=1), 4),
            "images around one that nobody sees": (apart, 4),
            "gaps": (torch.tensor([[[1, 0, 1], [1, 1, 1], [0, 1, 1]]]).repeat(2, 5, 1)[:, :14], 2),
            "no image at all": (torch.zeros_like(reset), 4),
            "some rows with a gap": (mixed, 2),
        }

    @pytest.mark.parametrize("kind", range(6))
    def test_every_kind_of_mask(self, kind, attention):
        mask, kernels = list(self.masks().values())[kind]
        original = build("idefics-tiny")
        fused = patched(original).model
        with torch.no_grad():
            fused(**{**original.inputs, "image_attention_mask": mask})
        assert len(attention) == kernels
        assert_in_budget(original, fused, image_attention_mask=mask)

    def test_rows_without_an_image_send_no_gradient(self):
        original = build("idefics-tiny")
        block = patched(original).model.model.gated_cross_attn_layers[0]
        x, media = torch.randn(1, 3, 32), torch.randn(1, 10, 16, requires_grad=True)
        mask = torch.full((1, 1, 3, 10), torch.finfo().min)
        mask[0, 0, 2, 5:] = 0
        out = block(x, None, media, mask, torch.tensor([[0.0, 0.0, 1.0]]))
        out[:, :2].sum().backward()
        assert not media.grad.any()

    def test_a_gate_that_closes_rows_which_the_mask_leaves_open(self):
        block = build("idefics-tiny").model.model.gated_cross_attn_layers[0]
        gate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        mask = torch.zeros(2, 1, 3, 10)
        mask[1, 0, 2, 5:] = torch.finfo().min
        fused = copy.deepcopy(block)
        patch(fused)
        call = lambda module, x, media: module(x, None, media, mask.to(x.dtype), gate)  # noqa: E731
        assert_parity(block, fused, (2, 3, 32), (2, 10, 16), call=call)

    def test_without_a_mask(self):
        block = build("idefics-tiny").model.model.gated_cross_attn_layers[0]
        fused = copy.deepcopy(block)
        patch(fused)
        call = lambda module, x, media: module(x, None, media, None, torch.ones(2, 3))  # noqa: E731
        assert_parity(block, fused, (2, 3, 32), (2, 10, 16), call=call)

    def block(self, **config):
        return copy.deepcopy(build("idefics-tiny", **config).model.model.gated_cross_attn_layers[0])

    def call(self, block, length=3):
        generator = torch.Generator().manual_seed(length)
        x, media = (torch.randn(2, *shape, generator=generator) for shape in ((length, 32), (10, 16)))
        mask, gate = torch.zeros(2, 1, length, 10), torch.ones(2, length)
        mask[0, 0, -1, 5:], mask[1, 0, 0] = torch.finfo().min, torch.finfo().min
        gate[1, 0] = 0
        torch.manual_seed(1)  # of dropout
        return block(x, None, media, mask, gate)

    @pytest.mark.parametrize(
        "path",
        [
            *(f"cross_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ],
    )
    def test_a_bias(self, path):
        block = self.block()
        linear = block.get_submodule(path)
        linear.bias = nn.Parameter(torch.randn(linear.out_features))
        expected = self.call(block)
        patch(block)
        torch.testing.assert_close(self.call(block), expected)

    @pytest.mark.parametrize("where", ["the attention", "the block"])
    def test_dropout_of_one_alone(self, where, attention):
        block = self.block().train()
        if where == "the block":
            block.config = 0.5
        else:
            block.cross_attn.dropout = 0.5
        expected, still = self.call(block), self.call(block.eval())
        patch(block)
        torch.testing.assert_close(self.call(block), still)
        assert attention == ["gated_cross_attention"]
        torch.testing.assert_close(self.call(block.train()), expected)

    @torch.no_grad()
    def test_a_token_sees_new_weights(self):
        """Of whatever its keys and values are made."""
        original = self.block(qk_layer_norms=True)
        fused = copy.deepcopy(original)
        patch(fused)
        media = torch.randn(2, 10, 16)
        ways = {
            n: (torch.randn(2, n, 32), None, media, torch.zeros(2, 1, n, 10), torch.ones(2, n))
            for n in (3, 1)
        }
        for ours, its in zip(fused.cross_attn.parameters(), original.cross_attn.parameters(), strict=True):
            fused(*ways[3]), fused(*ways[1])
            ours.mul_(-2), its.mul_(-2)
            torch.testing.assert_close(fused(*ways[1]), original(*ways[1]))

    def test_a_cache_is_refused(self):
        block = self.block()
        patch(block)
        x, media, cache = torch.randn(2, 3, 32), torch.randn(2, 10, 16), {block.cache_keyword: object()}
        with pytest.raises(NotImplementedError):
            block(x, None, media, None, torch.ones(2, 3), **cache)

    def test_a_hook_on_the_attention_of_a_block_is_called(self, attention):
        fused, calls = patched(build("idefics-tiny")), []
        for block in fused.model.model.gated_cross_attn_layers:
            block.cross_attn.register_forward_hook(lambda *_: calls.append(1))
        fused.logits()
        assert calls == [1, 1]
        assert attention == ["perceiver_attention"] * 2

    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize("seen", ["nobody", "the prompt alone", "one sequence"])
    def test_a_token_that_sees_no_image(self, images, seen):
        """Without a resampler: 16 x 16 patches and a class token, which no kernel can cut into media."""
        vision = {"embed_dim": 16, "image_size": 32, "patch_size": 2, "num_attention_heads": 2}
        vision |= {"num_hidden_layers": 1, "intermediate_size": 32}
        original = build("idefics-tiny", use_resampler=False, vision_config=vision)
        mask = torch.ones(2, 14, images, dtype=torch.int64)
        mask[{"nobody": slice(None), "the prompt alone": (slice(None), -1), "one sequence": 0}[seen]] = 0
        original.inputs["image_attention_mask"] = mask
        original.inputs["pixel_values"] = original.inputs["pixel_values"][:, :images]
        options = {"output_scores": True, "return_dict_in_generate": True}
        expected, got = original.generate(3, **options), patched(original).generate(3, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    @pytest.mark.parametrize("resampled", [True, False])
    def test_media_are_projected_once_for_a_text(self, options, resampled, monkeypatch):
        fused, calls = patched(build("idefics-tiny", use_resampler=resampled)), []
        projections = [block.cross_attn.k_proj for block in fused.model.model.gated_cross_attn_layers]
        for project in projections:
            project.weight.register_hook(lambda _: None)  # a hook on a tensor changes nothing
            project.forward = lambda x, project=project: calls.append(1) or type(project).forward(project, x)
        fused.generate(5, **options)
        assert len(calls) == 2 * 5  # a forward set on an instance: nothing is kept
        for project in projections:
            del project.forward
        calls.clear()
        count_calls(monkeypatch, projections, calls)
        fused.generate(5, **options)
        # transformers resamples the images for every token from 5.24 on: they are other tensors then
        every_token = resampled and fused.model.model.gated_cross_attn_layers[0].cache_keyword == "cache"
        assert len(calls) == (2 * 5 if every_token else 2)


class TestMllama:
    def test_the_mask_is_that_of_the_processor(self):
        from transformers.models.mllama import processing_mllama as processing

        inputs = build("mllama-tiny").inputs
        _, locations = tiny._text(SIZES)
        spans = [
            processing.get_cross_attention_token_mask(row.tolist(), image_token_id=1) for row in locations
        ]
        tiles = inputs["aspect_ratio_mask"].sum(-1).tolist()
        dense = processing.convert_sparse_cross_attention_mask_to_dense(spans, tiles, 4, SIZES.text)
        assert (inputs["cross_attention_mask"].numpy() == dense).all()
        partial = inputs["aspect_ratio_mask"][1].sum(-1)  # adjacent images
        assert partial[:2].lt(4).any()

    @pytest.mark.parametrize("few", [True, False])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_a_token_over_many_keys_and_over_few(self, few, beams, monkeypatch):
        """Without the operator of a step the original attends over few, over many a kernel."""
        mllama = importlib.import_module("flamingo_kernels.patch.mllama")
        read = []
        monkeypatch.setattr(
            mllama,
            "key_spans",
            lambda mask, x, **asker: read.append(x.shape[1]) or dense.key_spans(mask, x, **asker),
        )
        monkeypatch.setattr(mllama, "may_decode", lambda layer, x: False)
        if not few:
            monkeypatch.setattr(mllama, "_FEW", 0)
        original = build("mllama-tiny")
        options = {"num_beams": beams, "output_scores": True, "return_dict_in_generate": True}
        expected, got = original.generate(6, **options), patched(original).generate(6, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert (1 in read) != few

    def rows(self, model):
        return model.inputs["cross_attention_mask"].flatten(2).any(-1)  # [B, T]

    def attended(self, model: tiny.TinyModel, **changes):
        """What the attention of the first layer adds for every row, before its gate, `[B, T, D]`."""
        layer = model.model.model.language_model.layers[1]
        found = []
        handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: found.append(x[0]))
        first = layer.input_layernorm.register_forward_pre_hook(lambda _, x: found.append(x[0]))
        with torch.no_grad():
            model.model(**{**model.inputs, **changes})
        handle.remove()
        first.remove()
        return found[1] - found[0]

    def test_text_before_an_image_leaks_unless_fixed(self):
        original = build("mllama-tiny")
        before = ~self.rows(original)
        assert before.any()
        other = {"pixel_values": torch.randn_like(original.inputs["pixel_values"])}
        leaks = [self.attended(original, **change)[before] for change in ({}, other)]
        assert not torch.allclose(*leaks)
        same = [self.attended(patched(original), **change)[before] for change in ({}, other)]
        torch.testing.assert_close(same, leaks)
        fixed = patched(original, fixes=["row_leak"])
        assert not self.attended(fixed)[before].any()
        torch.testing.assert_close(self.attended(fixed)[~before], self.attended(original)[~before])

    def test_a_fixed_model_is_that_of_meta(self):
        """Meta's reference multiplies the attention by the same rows as the feed-forward network."""
        original = build("mllama-tiny")
        fixed = patched(original, fixes=["row_leak"]).model
        rows = self.rows(original)[..., None].float()
        for layer in original.model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.register_forward_hook(lambda _, __, out: (out[0] * rows.to(out[0]), out[1]))
        assert_in_budget(original, fixed)

    @pytest.mark.parametrize("fixes", [(), ("row_leak",)], ids=str)
    def test_text_that_sees_no_image(self, fixes):
        """Of a whole batch: the original averages every tile, or with the fix nothing is attended to."""
        original = build("mllama-tiny")
        original.inputs["cross_attention_mask"] = torch.zeros_like(original.inputs["cross_attention_mask"])
        fused = patched(original, fixes=fixes)
        assert fused.generate(3).shape == (2, 17)
        assert fixes or torch.equal(fused.generate(3), original.generate(3))
        assert not (fixes and self.attended(fused).any())

    def test_without_a_mask_it_is_causal_unless_fixed(self):
        original = build("mllama-tiny")
        del original.inputs["cross_attention_mask"]
        torch.testing.assert_close(patched(original).logits(), original.logits())
        fixed = patched(original, fixes=["causal"])
        assert not torch.allclose(fixed.logits(), original.logits(), atol=1e-2)
        original.model.set_attn_implementation("eager")
        torch.testing.assert_close(fixed.logits(), original.logits())
        for model in (original, fixed):
            model.loss().backward()
        gradients = dict(original.model.named_parameters())
        for key, parameter in fixed.model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-3, atol=1e-6, msg=key)

    def test_without_a_mask_another_fix_leaves_it_causal(self):
        original = build("mllama-tiny")
        del original.inputs["cross_attention_mask"]
        fixed = patched(original, fixes=["row_leak"])
        torch.testing.assert_close(fixed.logits(), original.logits())

    def test_with_a_mask_the_fix_of_causal_leaves_text_before_an_image(self):
        original = build("mllama-tiny")
        torch.testing.assert_close(patched(original, fixes=["causal"]).logits(), original.logits())

    @torch.no_grad()
    def test_a_call_updates_the_cache_once(self, attention):
        from transformers import DynamicCache

        layer = build("mllama-tiny").model.model.language_model.layers[1]
        fused = copy.deepcopy(layer)
        patch(fused)
        x, states, rows = torch.randn(1, 3, 32), torch.randn(2, 5, 32), torch.ones(1, 1, 3, 1)
        found = []
        for module in (layer, fused):
            cache = DynamicCache()
            for _ in range(2):  # the second call adds its keys to those of the first
                keys = 10 + (cache.get_seq_length(1) if len(cache.layers) > 1 else 0)
                out = module(x, states, torch.zeros(1, 1, 3, keys), None, rows, None, cache)
            found.append((out, cache.layers[1].keys, cache.layers[1].values))
        assert len(attention) == 2
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("fix", ["causal", "row_leak"])
    @pytest.mark.parametrize("masked", [True, False])
    def test_a_fix_changes_nothing_else(self, fix, masked, attention):
        """Without a mask "eager" is not causal, so the fix has nothing to change there."""
        original = build("mllama-tiny")
        if fix == "causal":
            original.model.set_attn_implementation("eager")
        layer = original.model.model.language_model.layers[1].cross_attn
        fused = copy.deepcopy(layer)
        patch(fused, fixes=[fix])
        x, states, mask = torch.randn(2, 6, 32), torch.randn(2, 8, 32), torch.zeros(2, 1, 6, 8)
        mask[0, :, :2, 4:] = torch.finfo().min
        given = {"attention_mask": mask if masked else None}
        for dropout, asked in ((0.0, False), (0.5, False), (0.0, True)):
            results = []
            for each in (layer, fused):
                each.dropout = dropout
                torch.manual_seed(1)
                results.append(each.train()(x, states, **given, output_attentions=asked))
            torch.testing.assert_close(results[1][0], results[0][0])
            assert not asked or (results[1][1] is None) == (results[0][1] is None)

    def test_keys_stay_in_the_cache_of_the_model(self):
        caches = []
        original = build("mllama-tiny")
        for model in (original, patched(original)):
            out = model.model(**model.inputs, use_cache=True)
            keyword = "cache" if "cache" in out else "past_key_values"
            cache = out[keyword]
            step = {"input_ids": torch.tensor([[5], [6]]), keyword: cache}
            step["cross_attention_mask"] = model.inputs["cross_attention_mask"][:, -1:]
            caches.append((cache, model.model(**step, use_cache=True).logits))
        (a, expected), (b, got) = caches
        torch.testing.assert_close(got, expected)
        for mine, its in zip(b.layers, a.layers, strict=True):
            torch.testing.assert_close(mine.keys, its.keys)
            torch.testing.assert_close(mine.values, its.values)

    def test_tiles_of_a_prime_number_of_tokens(self, attention):
        """As of Llama 3.2 Vision at 560 pixels."""
        sizes = tiny.Sizes(batch=2, text=6, images=1, width=32, heads=4, layers=2, visual=16)
        layer = tiny.build("mllama-tiny", sizes).model.model.language_model.layers[1].cross_attn
        fused = copy.deepcopy(layer)
        patch(fused)
        mask = torch.zeros(2, 1, 6, 4 * 1601)
        mask[0, :, :, 1601:] = torch.finfo().min
        x, states = torch.randn(2, 6, 32), torch.randn(2, 4 * 1601, 32)
        torch.testing.assert_close(
            fused(x, states, attention_mask=mask)[0], layer(x, states, attention_mask=mask)[0]
        )
        assert attention

    def test_dropout_in_training(self, attention):
        original = build("mllama-tiny", dropout=0.3)
        original.model.set_attn_implementation("eager")
        fused = patched(original)
        original.model.train()
        fused.model.train()
        torch.manual_seed(1)
        expected = original.logits()
        torch.manual_seed(1)
        torch.testing.assert_close(fused.logits(), expected)
        assert not attention

    def test_text_alone(self):
        original = build("mllama-tiny")
        text = {key: original.inputs[key] for key in ("input_ids", "attention_mask")}
        model = tiny.TinyModel("text", original.model, text)
        torch.testing.assert_close(patched(model).logits(), model.logits())


class TestIdefics2:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @torch.no_grad()
    def test_dropout_in_training_alone(self, implementation, attention):
        layer = build("idefics2-tiny").model.model.connector.perceiver_resampler.layers[0].self_attn
        layer.attention_dropout = 0.5
        layer.config._attn_implementation = implementation
        fused = copy.deepcopy(layer)
        patch(fused)
        latents, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        for training, kernels in ((True, 0), (False, 1)):
            results = []
            for module in (layer, fused):
                torch.manual_seed(1)
                results.append(module.train(training)(latents, context, None)[0])
            torch.testing.assert_close(*results)
            assert len(attention) == kernels

    @pytest.mark.parametrize("padded", [True, False])
    def test_padding_among_the_patches(self, padded, attention):
        original = build("idefics2-tiny")
        mask = original.inputs["pixel_attention_mask"]
        assert 0 < mask[:, 0].float().mean() < 1
        fused = patched(original).model
        changed = {} if padded else {"pixel_attention_mask": torch.ones_like(mask)}
        with torch.no_grad():
            fused(**{**original.inputs, **changed})
        assert len(attention) == 2
        assert_in_budget(original, fused, **changed)

    def test_a_mask_that_differs_between_latents(self, attention):
        layer = build("idefics2-tiny").model.model.connector.perceiver_resampler.layers[0].self_attn
        fused = copy.deepcopy(layer)
        patch(fused)
        latents, context, mask = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.zeros(2, 1, 5, 12)
        mask[:, :, 1, 3] = torch.finfo().min
        torch.testing.assert_close(fused(latents, context, mask)[0], layer(latents, context, mask)[0])
        assert not attention

    @pytest.mark.parametrize("how", ["causal", "a cache", "a cache of its own"])
    @torch.no_grad()
    def test_what_its_model_never_does(self, how):
        layer = build("idefics2-tiny").model.model.connector.perceiver_resampler.layers[0].self_attn
        latents, context, given, caches = torch.randn(2, 5, 32), torch.randn(2, 7, 32), {}, []
        layer.is_causal, layer.layer_idx = how == "causal", 0
        fused = copy.deepcopy(layer)
        patch(fused)
        results = []
        for each in (layer, fused):
            caches.append(transformers.DynamicCache())
            if how == "a cache":
                given = {fused.cache_keyword: caches[-1]}
            if how == "a cache of its own":
                setattr(each, fused.cache_keyword, caches[-1])
            results.append([each(latents, context, **given)[0] for _ in range(2)])
        torch.testing.assert_close(*results)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()

    @torch.no_grad()
    def test_a_mask_that_is_no_tensor(self):
        """As flex_attention has: it goes to the attention that is meant to read it."""
        from torch.nn.attention.flex_attention import create_block_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def flex(module, q, k, v, mask, **kwargs):
            return q.transpose(1, 2) * mask.shape[-1], None

        layer = build("idefics2-tiny").model.model.connector.perceiver_resampler.layers[0].self_attn
        fused = copy.deepcopy(layer)
        patch(fused)
        mask = create_block_mask(lambda b, h, q, k: q >= 0, 2, 1, 5, 12, device="cpu")
        latents, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        with pytest.MonkeyPatch.context() as changed:
            changed.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", flex)
            layer.config._attn_implementation = fused.config._attn_implementation = "flex_attention"
            torch.testing.assert_close(fused(latents, context, mask)[0], layer(latents, context, mask)[0])


def grouped_attention(name):
    """An attention with grouped heads, its patched copy, and the options of a call with 5 rows and 8 keys."""
    original = build(name)
    original.model.set_attn_implementation("eager")
    if name == "idefics2-tiny":
        layer = original.model.model.connector.perceiver_resampler.layers[0].self_attn
        options = {"attention_mask": None}
    else:
        decoder = original.model.model.language_model.layers
        layer = next(each.cross_attn for each in decoder if hasattr(each, "cross_attn"))
        options = {"attention_mask": torch.zeros(2, 1, 5, 8)}
    fused = copy.deepcopy(layer)
    patch(fused)
    return layer, fused, options


@pytest.mark.parametrize("name", ["idefics2-tiny", "mllama-tiny"])
@torch.no_grad()
def test_dropout_is_for_training_alone(name, attention):
    layer, fused, options = grouped_attention(name)
    x, media = torch.randn(2, 5, 32), torch.randn(2, 8, 32)
    for training in (False, True):
        results = []
        for each in (layer, fused):
            each.train(training).dropout = each.attention_dropout = 0.5
            torch.manual_seed(1)
            results.append(each(x, media, **options)[0])
        torch.testing.assert_close(*results)
        assert len(attention) == 1


@pytest.mark.parametrize("implementation", ["mine", "sdpa", "eager"])
@pytest.mark.parametrize("name", ["idefics2-tiny", "mllama-tiny", "idefics-tiny"])
@torch.no_grad()
def test_an_attention_that_somebody_has_registered(name, implementation, attention):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mine(module, q, k, v, mask, **kwargs):
        return 3 * q.transpose(1, 2), None

    if name == "idefics-tiny":
        layer = TestIdefics().block()
        fused = copy.deepcopy(layer)
        patch(fused)
        call = TestIdefics().call
    else:
        layer, fused, options = grouped_attention(name)
        x, media = torch.randn(2, 5, 32), torch.randn(2, 8, 32)

        def call(each):
            return each(x, media, **options)[0]

    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, mine)
        for each in (layer, fused):
            getattr(each, "cross_attn", each).config._attn_implementation = implementation
        torch.testing.assert_close(call(fused), call(layer))
    assert not attention


@pytest.mark.parametrize("by", ["the call", "the configuration"])
@pytest.mark.parametrize("name", ["idefics2-tiny", "mllama-tiny"])
@torch.no_grad()
def test_attention_weights_are_given_to_whoever_asks(name, by, attention):
    layer, fused, options = grouped_attention(name)
    x, media = torch.randn(2, 5, 32), torch.randn(2, 8, 32)
    assert fused(x, media, **options)[1] is None
    assert len(attention) == 1
    if by == "the call":
        options["output_attentions"] = True
    fused.config.output_attentions = by == "the configuration"
    expected, got = layer(x, media, **options), fused(x, media, **options)
    torch.testing.assert_close(got, expected)
    assert got[1].shape[-2] == 5
    assert len(attention) == 1


class TestEvolla:
    def test_padding_and_sequences_without_a_protein(self):
        original = build("evolla-tiny")
        aligner = next(layer.adapter for layer in original.model.model.layers if hasattr(layer, "adapter"))
        fused = copy.deepcopy(aligner)
        patch(fused)
        for proteins in ([True, False], [True, True], [False, False]):
            padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
            batch = torch.tensor(proteins)

            def call(module, x, media, padding=padding, batch=batch):
                return module(x, media, None, None, padding, protein_batch_mask=batch)

            assert_parity(aligner, fused, (2, 4, 32), (2, 5, 32), call=call)

    def test_masks_of_the_keys_stay_with_the_original(self, attention):
        original = build("evolla-tiny")
        aligner = next(layer.adapter for layer in original.model.model.layers if hasattr(layer, "adapter"))
        fused = copy.deepcopy(aligner)
        patch(fused)
        x, media, keys = torch.randn(2, 4, 32), torch.randn(2, 5, 32), torch.tensor([[1, 0, 1, 1, 0]] * 2)
        masks = {"query_attn_mask": torch.ones(2, 4), "protein_kv_attn_mask": keys}
        masks["protein_batch_mask"] = torch.ones(2)
        expected = aligner(x, media, None, None, **masks)
        torch.testing.assert_close(fused(x, media, None, None, **masks), expected)
        assert not attention


def test_the_library_imports_no_transformers():
    import subprocess

    code = "import sys, flamingo_kernels, flamingo; flamingo_kernels.patch(flamingo.MaskedCrossAttention("
    code += "dim=8, dim_visual=8)); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, text=True, capture_output=True)
    assert done.stdout.strip() == "False", done.stderr
