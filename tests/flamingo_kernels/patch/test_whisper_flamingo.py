"""Whisper-Flamingo: keys and values of video and audio are kept while a text grows, and what stays."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo_kernels import patch
from tests.helpers.audio_lookalikes import Listens, Watches, make_known
from tests.helpers.parity import assert_parity
from tests.helpers.weights import shake

B, T, WIDTH, HEADS, AUDIO, VIDEO = 3, 5, 24, 3, 9, 4
CAUSAL = torch.full((16, 16), -torch.inf).triu(1)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    make_known(monkeypatch)


def block(**options):
    made = shake(Watches(WIDTH, HEADS, **{"cross_attention": True, "add_gated_x_attn": 1, **options}))
    return made.eval()


def patched(module):
    fused = copy.deepcopy(module)
    assert list(patch(fused).replaced) == [""]
    return fused


def inputs(length=T, batch=B, media=B):
    random = torch.Generator().manual_seed(5)
    shapes = ((batch, length, WIDTH), (media, AUDIO, WIDTH), (media, VIDEO, WIDTH))
    return [torch.randn(shape, generator=random) for shape in shapes]


def call(module, x, xa, xv):
    """As the decoder calls it, whose cache stays empty."""
    return module(x, xa, mask=CAUSAL.to(x.dtype), kv_cache={}, xv=xv)


@pytest.fixture
def products(monkeypatch):
    """The number of products by each weight, without a hook, which would be honoured."""
    counts, linear = Counter(), F.linear

    def noted(x, weight, bias=None):
        counts[weight.data_ptr()] += 1
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", noted)
    return lambda module: counts[module.weight.data_ptr()]


class TestResults:
    @dtypes
    @pytest.mark.parametrize("media", [B, 1], ids=["each its own", "one for all"])
    def test_results_and_gradients(self, dtype, media):
        original = block() if dtype == torch.bfloat16 else block().to(dtype)
        for gate in (original.attn_gate, original.ff_gate):  # all else casts
            gate.data = gate.to(dtype)
        assert_parity(
            original,
            patched(original),
            (B, T, WIDTH),
            (media, AUDIO, WIDTH),
            (media, VIDEO, WIDTH),
            dtype=dtype,
            call=call,
        )

    def test_one_sequence_without_audio(self):
        original = block(cross_attention=False)
        assert_parity(
            original,
            patched(original),
            (1, T, WIDTH),
            (1, VIDEO, WIDTH),
            call=lambda module, x, xv: module(x, mask=CAUSAL.to(x.dtype), xv=xv),
        )

    def test_gates_in_float32(self):
        original = block(cross_attention=False)
        x, _, xv = (each.bfloat16() for each in inputs())
        got, expected = (each(x, mask=CAUSAL, xv=xv) for each in (patched(original), original))
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)

    def test_autocast(self):
        original = block()
        fused = patched(original)
        with torch.autocast("cpu", torch.bfloat16):
            x, xa, xv = inputs()
            got, expected = (call(each, x, xa.bfloat16(), xv.bfloat16()) for each in (fused, original))
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


class TestSteps:
    @torch.no_grad()
    @pytest.mark.parametrize("media", [B, 1], ids=["each its own", "one for all"])
    def test_a_text_that_grows(self, media, products):
        original = block()
        fused = patched(original)
        x, xa, xv = inputs(9, media=media)
        for length in range(3, 10):
            got, expected = (call(each, x[:, :length], xa, xv) for each in (fused, original))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for attn in (fused.gated_x_attn, fused.cross_attn):
            assert products(attn.key) == products(attn.value) == 1
            assert products(attn.query) == 7
        assert products(fused.attn.key) == products(original.cross_attn.key) == 7

    @torch.no_grad()
    @pytest.mark.parametrize("what", ["a shorter text", "an equal text", "other media", "media", "weights"])
    def test_what_is_made_anew(self, what, products):
        original = block()
        fused, (x, xa, xv) = patched(original), inputs(9)
        call(fused, x[:, :4], xa, xv)
        length = {"a shorter text": 3, "an equal text": 4}.get(what, 5)
        if what == "other media":
            xa, xv = -xa, -xv
        if what == "media":
            xa.neg_(), xv.neg_()
        if what == "weights":
            for attn in (each for module in (original, fused) for each in (module.gated_x_attn,)):
                attn.key.weight.neg_(), attn.value.bias.neg_()
        got, expected = (call(each, x[:, :length], xa, xv) for each in (fused, original))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert products(fused.gated_x_attn.key) == products(fused.gated_x_attn.value) == 2
        assert products(fused.cross_attn.key) == (1 if what == "weights" else 2)

    def test_nothing_is_kept_with_gradients(self, products):
        fused, (x, xa, xv) = patched(block()), inputs()
        for length in (4, 5):
            call(fused, x[:, :length], xa, xv)
        assert products(fused.gated_x_attn.key) == 2

    @torch.no_grad()
    def test_an_adapter_is_called_every_time(self):
        class Adapter(nn.Module):
            calls = 0

            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                self.calls += 1
                return self.calls * self.base(x)

        original = block()
        original.gated_x_attn.key = Adapter(original.gated_x_attn.key)
        fused, (x, xa, xv) = patched(original), inputs()
        for length in (4, 5):
            got, expected = (call(each, x[:, :length], xa, xv) for each in (fused, original))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert fused.gated_x_attn.key.calls == 2


class TestLeft:
    """What the original's forward computes, or a part of it that is called."""

    def test_a_text_without_a_video(self):
        """Whose gated attention is to the text itself, all of it."""
        original = block()
        x, xa, _ = inputs()
        assert torch.equal(call(patched(original), x, xa, None), call(original, x, xa, None))

    def test_blocks_without_gates(self):
        model = nn.ModuleList([block(add_gated_x_attn=0), block()])
        assert list(patch(model).replaced) == ["1"]

    def test_gates_that_are_turned_off(self):
        original = block()
        fused = patched(original)
        original.add_gated_x_attn = fused.add_gated_x_attn = 0
        assert torch.equal(call(fused, *inputs()), call(original, *inputs()))

    @torch.no_grad()
    def test_keys_in_the_cache(self):
        original = block()
        fused, (x, xa, xv) = patched(original), inputs()
        expected = []
        for module in (original, fused):
            attn = module.cross_attn
            cache = {attn.key: attn.key(2 * xa), attn.value: attn.value(2 * xa)}
            expected.append(module(x, xa, CAUSAL, cache, xv))
        torch.testing.assert_close(*expected, rtol=1e-4, atol=1e-5)

    def test_hooks_get_the_scores(self):
        """As those do that find out when a word was said."""
        original = block()
        fused, scores = patched(original), []
        for module in (original, fused):
            module.cross_attn.register_forward_hook(lambda *given: scores.append(given[-1][-1]))
        out, expected = (call(each, *inputs()) for each in (fused, original))
        assert torch.equal(out, expected)
        assert torch.equal(*scores)
        assert scores[0].shape == (B, HEADS, T, AUDIO)

    def test_an_attention_of_another_class(self):
        class Louder(Listens):
            def forward(self, *given, **options):
                out, scores = super().forward(*given, **options)
                return 2 * out, scores

        original = block()
        original.gated_x_attn.__class__ = original.cross_attn.__class__ = Louder
        torch.testing.assert_close(
            call(patched(original), *inputs()), call(original, *inputs()), rtol=1e-4, atol=1e-5
        )

    def test_one_text_of_all_media(self):
        """The original broadcasts it."""
        original = block()
        given = inputs(batch=1)
        torch.testing.assert_close(
            call(patched(original), *given), call(original, *given), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_compiled(self):
        torch._dynamo.reset()
        original = block()
        compiled = torch.compile(patched(original), backend="eager")
        torch.testing.assert_close(call(compiled, *inputs()), call(original, *inputs()))
