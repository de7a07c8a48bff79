"""torchtune's layers of Llama 3.2 Vision: masks, its cache, and all that is left to the original."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from flamingo_kernels import patch
from flamingo_kernels.layers import Fused
from flamingo_kernels.layers.decode import Step
from flamingo_kernels.patch import torchtune
from flamingo_kernels.patch.known import KNOWN
from flamingo_kernels.patch.source import code_hash
from tests.helpers import torchtune_twin
from tests.helpers.copies import assert_same
from tests.helpers.variants import load
from tests.helpers.weights import randomise

D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, KEYS = 64, 4, 2, 16, 96, 40
PLACES = {
    "transformer": "TransformerCrossAttentionLayer",
    "attention": "MultiHeadAttention",
    "rms_norm": "RMSNorm",
    "feed_forward": "FeedForward",
    "tanh_gate": "TanhGate",
}


@pytest.fixture(scope="module")
def library():
    """The twin's classes by name, each from the module where torchtune has it, with known code."""
    with pytest.MonkeyPatch.context() as change:
        path = Path(torchtune_twin.__file__)
        classes = {}
        for place, name in PLACES.items():
            cls = getattr(load(path, f"torchtune.modules.{place}", change), name)
            change.setitem(KNOWN[f"torchtune.modules.{place}.{name}"], code_hash(cls), "ours")
            classes[name] = cls
        classes["attention"] = load(path, "torchtune.modules.attention_utils", change).attention
        yield classes


@pytest.fixture
def pair(library):
    """Makes a layer as it was, and the same one after the swap."""

    def make(*, gates=True, norms=True, up=True, dtype=torch.float32, kv_heads=KV_HEADS, **options):
        norm = library["RMSNorm"] if norms else None
        sizes = (D, HEADS, kv_heads, HEAD_DIM)
        attn = library["MultiHeadAttention"](*sizes, norm=norm, call=library["attention"], **options)
        into, back = (nn.Linear(D, HIDDEN, bias=False) for _ in range(2)), nn.Linear(HIDDEN, D, bias=False)
        gate_proj, up_proj = into
        layer = library["TransformerCrossAttentionLayer"](
            attn,
            library["FeedForward"](gate_proj, back, up_proj if up else None),
            ca_norm=norm and norm(D),
            mlp_norm=norm and norm(D),
            ca_scale=library["TanhGate"]() if gates else None,
            mlp_scale=library["TanhGate"]() if gates else None,
        )
        original = randomise(layer).to(dtype)
        swapped = copy.deepcopy(original)
        report = patch(swapped)
        assert isinstance(swapped, Fused)
        assert not report.notes
        return original, swapped

    return make


def inputs(batch=2, text=7, dtype=torch.float32):
    random = torch.Generator().manual_seed(3)
    x, states = (torch.randn(batch, n, D, generator=random) for n in (text, KEYS))
    return x.to(dtype), states.to(dtype)


def masks(batch=2, text=7):
    """Bool `[B, T, S]` by name; the first text of most sees nothing."""
    random = torch.Generator().manual_seed(4)
    key, row = torch.arange(KEYS), torch.arange(text)[:, None]
    none = torch.zeros(batch, text, KEYS, dtype=torch.bool)
    return {
        "no mask": None,
        "all": ~none,
        "none": none,
        "padding at the end": (key < torch.arange(9, 9 + batch)[:, None, None]).expand(-1, text, -1),
        "one image after the other": (key // 10 == row // 2 - 1).expand(batch, -1, -1),
        "padding between": ((key % 10 < 7) & (key // 20 < row)).expand(batch, -1, -1),
        "anywhere": torch.rand(batch, text, KEYS, generator=random) < 0.5,
    }


class TestResults:
    @pytest.mark.parametrize("name", masks())
    def test_masks(self, pair, name):
        original, swapped = pair()
        for batch, text in ((1, 1), (2, 7), (3, 1)):
            x, states = inputs(batch, text)
            assert_same(original, swapped, x, encoder_input=states, encoder_mask=masks(batch, text)[name])

    @pytest.mark.parametrize("name", [name for name in masks() if name != "anywhere"])
    def test_masks_that_a_kernel_takes(self, pair, name, monkeypatch):
        _, swapped = pair()
        x, states = inputs()
        monkeypatch.setattr(torchtune_twin.nn.functional, "scaled_dot_product_attention", None)
        swapped(x, encoder_input=states, encoder_mask=masks()[name])

    @pytest.mark.parametrize(
        "options",
        [{"gates": False}, {"norms": False}, {"up": False}, {"kv_heads": HEADS}, {"is_causal": True}],
        ids=str,
    )
    def test_other_parts(self, pair, options):
        original, swapped = pair(**options)
        for text in (1, 7):
            x, states = inputs(text=text)
            for mask in (None, masks(text=text)["one image after the other"]):
                assert_same(original, swapped, x, encoder_input=states, encoder_mask=mask)
                with torch.no_grad():
                    assert_same(original, swapped, x, encoder_input=states, encoder_mask=mask)

    def test_gradients_of_the_images(self, pair):
        results = []
        for layer in pair():
            x, states = inputs()
            states.requires_grad_()
            mask = masks()["one image after the other"]
            layer(x, encoder_input=states, encoder_mask=mask).square().sum().backward()
            results.append(states.grad)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("text", [1, 7])
    def test_in_bfloat16(self, pair, text):
        original, swapped = pair(dtype=torch.bfloat16)
        x, states = inputs(text=text, dtype=torch.bfloat16)
        mask = masks(text=text)["padding at the end"]
        with torch.no_grad():
            assert_same(original, swapped, x, encoder_input=states, encoder_mask=mask, tolerance=3e-2)

    @pytest.mark.parametrize("text", [1, 7])
    def test_under_autocast(self, pair, text):
        original, swapped = pair()
        x, states = inputs(text=text)
        mask = masks(text=text)["one image after the other"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert_same(original, swapped, x, encoder_input=states, encoder_mask=mask, tolerance=3e-2)

    def test_no_images(self, pair):
        for layer in pair():
            x, _ = inputs()
            assert layer(x) is x

    def test_linear_layers(self, pair):
        original, swapped = pair()
        patch(swapped, linears=True)
        x, states = inputs()
        assert_same(original, swapped, x, encoder_input=states, encoder_mask=masks()["padding between"])


class TestCache:
    @pytest.fixture
    def cached(self, pair):
        def make(dtype=torch.float32, **options):
            layers = pair(dtype=dtype, **options)
            for layer in layers:
                layer.attn.setup_cache(2, dtype, KEYS + 8)
            return layers

        return make

    @staticmethod
    def mask(text, keys=KEYS):
        """Over the whole cache, of which the last keys were never written."""
        seen = torch.zeros(2, text, KEYS + 8, dtype=torch.bool)
        seen[:, text // 2 :, :keys] = True
        return seen

    def test_before_any_image(self, cached):
        for layer in cached():
            x, _ = inputs()
            assert layer(x) is x
            assert layer.attn.kv_cache.size == 0

    def test_a_prompt_and_its_tokens(self, cached):
        layers = cached()
        x, states = inputs()
        with torch.no_grad():
            assert_same(*layers, x, encoder_input=states, encoder_mask=self.mask(7))
            for keys in (KEYS, KEYS, 13, 0):
                assert_same(*layers, x[:, :1] * keys, encoder_mask=self.mask(1, keys))
            assert_same(*layers, x[:, :3], encoder_mask=self.mask(3))
            assert_same(*layers, x[:, :1])  # without a mask all of the cache is seen
        assert [layer.attn.kv_cache.size for layer in layers] == [KEYS, KEYS]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_is_one_operator(self, cached, dtype, monkeypatch):
        original, swapped = cached(dtype)
        x, states = inputs(dtype=dtype)
        steps = []
        run = Step.run
        monkeypatch.setattr(Step, "run", lambda step, *given: steps.append(run(step, *given)) or steps[-1])
        with torch.no_grad():
            for layer in (original, swapped):
                layer(x, encoder_input=states, encoder_mask=self.mask(7))
            for _ in range(3):
                assert_same(original, swapped, x[:, :1], encoder_mask=self.mask(1), tolerance=3e-2)
        assert len(steps) == 3
        assert all(step is not None for step in steps)

    def test_changed_weights_are_seen(self, cached):
        layers = cached()
        x, states = inputs()
        with torch.no_grad():
            assert_same(*layers, x, encoder_input=states, encoder_mask=self.mask(7))
            for name in ("ca_norm.scale", "attn.q_norm.scale", "mlp.w2.weight", "ca_scale.scale"):
                assert_same(*layers, x[:, :1], encoder_mask=self.mask(1))
                for layer in layers:
                    path, _, last = name.rpartition(".")
                    part = layer.get_submodule(path)
                    setattr(part, last, nn.Parameter(getattr(part, last) * 1.5))
                assert_same(*layers, x[:, :1], encoder_mask=self.mask(1))

    def test_the_cache_may_be_off(self, cached):
        layers = cached()
        x, states = inputs()
        for layer in layers:
            layer.attn.cache_enabled = False
        for mask in (None, masks()["padding between"]):
            assert_same(*layers, x, encoder_input=states, encoder_mask=mask)
        assert all(layer.attn.kv_cache.size == 0 for layer in layers)


class TestLeftToTheOriginal:
    def test_a_mask_that_is_added(self, pair):
        original, swapped = pair()
        x, states = inputs()
        added = torch.zeros(2, 7, KEYS).masked_fill(~masks()["padding at the end"], -torch.inf)
        assert_same(original, swapped, x, encoder_input=states, encoder_mask=added)
        biased = added + torch.randn(KEYS)
        assert_same(original, swapped, x, encoder_input=states, encoder_mask=biased)

    def test_a_mask_of_another_size(self, pair):
        x, states = inputs()
        for layer in pair():
            with pytest.raises(RuntimeError):
                layer(x, encoder_input=states, encoder_mask=masks()["all"][..., :-3])

    def test_dropout(self, pair):
        layers = pair(attn_dropout=0.5)
        x, states = inputs()
        for mode in (True, False):
            results = []
            for layer in layers:
                torch.manual_seed(1)
                results.append(layer.train(mode)(x, encoder_input=states))
            torch.testing.assert_close(*results)

    def test_hooks_see_the_calls(self, pair):
        original, swapped = pair()
        x, states = inputs()
        seen = []
        swapped.attn.register_forward_hook(lambda *_: seen.append(1))
        assert_same(original, swapped, x, encoder_input=states, encoder_mask=masks()["padding between"])
        assert seen == [1]

    @pytest.mark.parametrize("part", ["attn", "mlp", "ca_scale", "mlp_norm"])
    def test_other_modules(self, pair, part):
        original, swapped = pair()
        for layer in (original, swapped):
            setattr(layer, part, Louder(getattr(layer, part)))
            layer.attn.cache_enabled = False
        x, states = inputs()
        assert_same(original, swapped, x, encoder_input=states, encoder_mask=masks()["padding between"])

    def test_another_attention_function(self, pair):
        original, swapped = pair()
        for layer in (original, swapped):
            layer.attn._attention_call = lambda q, k, v, **_: q
        x, states = inputs()
        assert_same(original, swapped, x, encoder_input=states)

    def test_positions(self, pair):
        _, swapped = pair()
        swapped.attn.pos_embeddings = nn.Identity()
        assert not swapped._is_known()

    def test_torch_compile(self, pair):
        original, swapped = pair()
        x, states = inputs()
        compiled = torch.compile(swapped, backend="eager")
        for mask in (None, masks()["padding between"]):
            expected = original(x, encoder_input=states, encoder_mask=mask)
            torch.testing.assert_close(compiled(x, encoder_input=states, encoder_mask=mask), expected)


class Louder(nn.Module):
    """A module that somebody has put around another, such as an adapter."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return 2 * self.module(*inputs, **options)


def test_a_release_whose_attention_is_not_known(library, monkeypatch):
    """The layer is computed with its parts, so their code counts too."""
    monkeypatch.setitem(KNOWN, "torchtune.modules.attention.MultiHeadAttention", {})
    sizes = (D, HEADS, KV_HEADS, HEAD_DIM)
    attn = library["MultiHeadAttention"](*sizes, norm=library["RMSNorm"], call=library["attention"])
    layer = library["TransformerCrossAttentionLayer"](attn, nn.Identity())
    report = patch(layer)
    assert not isinstance(layer, Fused)
    assert "attn is a MultiHeadAttention, and its forward is not one that is known" in str(report)


def test_the_fused_class_is_named_as_theirs():
    assert torchtune.FAMILY.fused.keys() == {"TransformerCrossAttentionLayer"}
