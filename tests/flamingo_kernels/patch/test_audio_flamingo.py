"""Audio Flamingo: which windows each row hears, what is kept for the tokens to come, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flamingo_kernels import UnsupportedError, fold, patch
from flamingo_kernels.layers import decode
from flamingo_kernels.patch import audio_flamingo
from tests.flamingo_kernels.patch.test_models import count_calls
from tests.helpers.audio_lookalikes import Hears, HearsAll, HearsGated, make_known
from tests.helpers.parity import assert_parity
from tests.helpers.weights import randomise

B, T, L, WINDOW, WIDTH, AUDIO = 3, 7, 6, 2, 16, 12
SIZES = {"dim": WIDTH, "dim_audio": AUDIO, "dim_head": 8, "heads": 2, "max_window_per_audio": WINDOW}
PLACES = torch.tensor(
    [
        [0, 1, 0, 0, 1, 0, 0],  # text before the first of two audios; the third is not in the text
        [1, 1, 1, 1, 0, 0, 0],  # adjacent, and more than there are
        [0, 0, 0, 1, 0, 0, 0],
    ]
).bool()
PADDING = {
    "none": torch.ones(B, L),
    "at the end": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]),
    "between": torch.tensor([[1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]),
    "of whole audios": torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]),
}
rules = pytest.mark.parametrize("hears", [Hears, HearsAll], ids=["so far", "all"])
paddings = pytest.mark.parametrize("padding", PADDING)


@pytest.fixture
def _known(monkeypatch):
    make_known(monkeypatch)


known = pytest.mark.usefixtures("_known")


def block(hears=Hears, **sizes):
    sizes = {"only_attend_immediate_media": False, **SIZES, **sizes}
    return randomise(HearsGated(hears=hears, **sizes))


def patched(module, **options):
    fused = copy.deepcopy(module)
    assert "" in patch(fused, **options).replaced
    return fused


def inputs(padding="none", length=T, keys=L):
    random = torch.Generator().manual_seed(5)
    x = torch.randn(B, length, WIDTH, generator=random)
    media = torch.randn(B, keys, 1, AUDIO, generator=random)
    return x, media, PADDING[padding][:, :, None].float() if keys == L else torch.ones(B, keys, 1)


def is_computed(fused, *given):
    """Whether the operators compute a call, and not the original's forward."""
    return getattr(fused, "attn", fused).heard(*given) is not None


@known
class TestRows:
    @rules
    @paddings
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_results_and_gradients(self, hears, padding, dtype):
        original = block(hears).to(dtype)
        fused, heard = patched(original), PADDING[padding][:, :, None]
        assert is_computed(fused, *inputs(padding), PLACES, False)
        assert_parity(
            original,
            fused,
            (B, T, WIDTH),
            (B, L, 1, AUDIO),
            dtype=dtype,
            call=lambda module, x, media: module(x, media, heard.to(x.dtype), PLACES),
        )

    @rules
    @pytest.mark.parametrize("places", [PLACES, PLACES.long() * 3, None], ids=["bool", "numbers", "none"])
    @pytest.mark.parametrize("length", [1, 3, 9])
    def test_text_that_follows(self, hears, places, length):
        """The places of the text before count as if they were its own."""
        original = block(hears)
        fused, given = patched(original), (places, True)
        assert is_computed(fused, *inputs("between", length), *given)
        assert_parity(
            original,
            fused,
            (B, length, WIDTH),
            (B, L, 1, AUDIO),
            call=lambda module, x, media: module(x, media, PADDING["between"][:, :, None], *given),
            count=1,
        )

    @rules
    def test_attention_without_its_block(self, hears):
        original = block(hears).attn
        fused = patched(original)
        call = (PADDING["between"][:, :, None], PLACES)
        assert_parity(
            original,
            fused,
            (B, T, WIDTH),
            (B, L, 1, AUDIO),
            call=lambda module, x, media: module(x, media, *call),
        )

    @rules
    def test_one_sequence_of_one_audio(self, hears):
        original = block(hears)
        places, padding = PLACES[2:], torch.tensor([1, 0])[None, :, None]
        assert_parity(
            original,
            patched(original),
            (1, T, WIDTH),
            (1, WINDOW, 1, AUDIO),
            call=lambda module, x, media: module(x, media, padding, places),
        )

    @rules
    def test_autocast(self, hears):
        original = block(hears)
        fused = patched(original)
        with torch.autocast("cpu", torch.bfloat16):
            assert_parity(
                original,
                fused,
                (B, T, WIDTH),
                (B, L, 1, AUDIO),
                call=lambda module, x, media: module(x, media, PADDING["between"][:, :, None], PLACES),
            )

    def test_windows_of_one_key_among_many(self):
        """As published: a text of one audio hears its first key alone, so the others are not read."""
        original = block(max_window_per_audio=1)
        fused, given = patched(original), (*inputs(keys=320), PLACES, False)
        assert is_computed(fused, *given)
        torch.testing.assert_close(fused(*given), original(*given), rtol=1e-4, atol=1e-5)

    def test_many_keys_with_odd_padding(self):
        """Media of one key each do not pay, so the original computes them."""
        original = block(HearsAll)
        fused, (x, media, padding) = patched(original), inputs(keys=320)
        padding[0, 301:], padding[1, 299:] = 0, 0
        assert not is_computed(fused, x, media, padding, PLACES, False)
        assert torch.equal(fused(x, media, padding, PLACES), original(x, media, padding, PLACES))

    @torch.no_grad()
    def test_folded(self):
        fused = patched(block().eval())
        given = (*inputs("between"), PLACES)
        expected = fused(*given)
        fold(fused)
        torch.testing.assert_close(fused(*given), expected, rtol=1e-4, atol=1e-5)


def stacked(hears, layers=2):
    return nn.ModuleList(block(hears) for _ in range(layers))


@torch.no_grad()
def generated(blocks, padding, *, says_so, media=None, steps=3):
    """A text and the tokens after it; `says_so`: as the first release, which says what a token follows."""
    x, features, heard = inputs(padding)
    features, outs = features if media is None else media, []
    places = PLACES
    for step in range(1 + steps):
        for each in blocks:
            x = each(x, features, heard, places, step > 0 and says_so)
        outs.append(x)
        x = x[:, -1:] * 0.9
        if not says_so:
            places = torch.zeros(B, 1, dtype=torch.bool)
    return outs


@known
class TestSteps:
    @pytest.mark.parametrize(("hears", "says_so"), [(Hears, True), (HearsAll, True), (HearsAll, False)])
    @paddings
    def test_tokens(self, hears, says_so, padding, monkeypatch):
        """One operator each; keys and values are made once for a text, or again for fewer of them."""
        original, met, projected, read = stacked(hears), [], [], []
        fused = copy.deepcopy(original)
        patch(fused)
        run, reads = decode.api.run, audio_flamingo._read
        monkeypatch.setattr(decode.api, "run", lambda *given: met.append(1) or run(*given))
        monkeypatch.setattr(audio_flamingo, "_read", lambda *given: read.append(1) or reads(*given))
        count_calls(monkeypatch, [each.attn.to_kv for each in fused], projected)
        expected, got = (generated(each, padding, says_so=says_so) for each in (original, fused))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert len(met) == 2 * 3
        assert len(read) == 2  # for the text, and for its tokens
        same = hears is HearsAll and padding in ("none", "at the end")  # as a token hears and the text did
        assert len(projected) == (2 if same else 4)

    def test_a_token_hears_the_first_audio(self):
        """As in the original: it does not know how long the text before it was."""
        fused = stacked(Hears)
        patch(fused)
        media = inputs()[1]
        media[:, WINDOW:] += 1
        same, other = (generated(fused, "none", says_so=True, media=each) for each in (None, media))
        assert not torch.allclose(same[0], other[0])
        x = inputs(length=1)[0]
        with torch.no_grad():
            a, b = (fused[0](x, each, torch.ones(B, L, 1), PLACES, True) for each in (inputs()[1], media))
        assert torch.equal(a[[0, 2]], b[[0, 2]])

    @torch.no_grad()
    @pytest.mark.parametrize("padding", ["none", "between"])
    def test_what_is_kept_is_made_anew(self, padding):
        """For other media, changed ones, changed weights, and another padding."""
        original = block(HearsAll)
        fused, (x, media, heard) = patched(original), inputs(padding)
        token, none = x[:, :1], torch.zeros(B, 1, dtype=torch.bool)

        def same():
            got, expected = (each(token, media, heard, none) for each in (fused, original))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

        fused(x, media, heard, PLACES)
        same()
        media[1] += 1
        same()
        media = media.clone() - 2
        same()
        heard = heard.clone()
        heard[:, 3] = 1 - heard[:, 3]
        same()
        heard[:, 2] = 1 - heard[:, 2]
        same()
        for each in (fused, original):
            each.attn.to_kv.weight.mul_(2)
        same()

    @torch.no_grad()
    def test_a_token_under_autocast(self):
        original = block(HearsAll)
        fused, (x, media, heard) = patched(original), inputs("between")
        none = torch.zeros(B, 1, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            fused(x, media, heard, PLACES)
            got, expected = (each(x[:, :1], media, heard, none) for each in (fused, original))
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@known
class TestLeft:
    """Calls that the original's forward computes or refuses."""

    @pytest.mark.parametrize(
        ("error", "change"),
        [
            (IndexError, {"media_locations": torch.zeros(B, T, dtype=torch.bool)}),
            (IndexError, {"media_locations": PLACES & (torch.arange(B) > 0)[:, None]}),
            (IndexError, {"media_locations": torch.zeros(B, 0), "use_cached_media": True}),
            (RuntimeError, {"media_locations": PLACES[:2]}),
            (AssertionError, {"media_locations": PLACES[:, 1:]}),
            (AssertionError, {"media": torch.randn(B, L // 2, 2, AUDIO)}),
            (AssertionError, {"media": torch.randn(B, 5, 1, AUDIO), "media_mask": torch.ones(B, 5, 1)}),
            (RuntimeError, {"media_mask": torch.ones(B, L - 1, 1)}),
            (AttributeError, {"media_locations": None}),
        ],
        ids=lambda each: each.__name__ if isinstance(each, type) else ", ".join(each),
    )
    def test_what_the_original_refuses(self, error, change):
        original = block()
        x, media, heard = inputs()
        given = {"media": media, "media_mask": heard, "media_locations": PLACES, **change}
        for module in (original, patched(original), patched(original.attn)):
            with pytest.raises(error):
                module(x, **given)

    def test_immediate_media(self):
        with pytest.raises(AssertionError):
            patched(block(only_attend_immediate_media=True))(*inputs(), PLACES)

    def test_all_texts_of_one_audio(self):
        """The original broadcasts it."""
        original = block(HearsAll)
        x, media, heard = inputs()
        given = (x, media[:1], heard[:1], PLACES)
        assert torch.equal(patched(original)(*given), original(*given))

    def test_hooks_see_every_call(self):
        original = block()
        fused = patched(original)
        seen = ([], [])
        for module, calls in zip((original, fused), seen, strict=True):
            for name, part in module.named_modules():
                if name:
                    part.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        assert torch.equal(fused(*inputs(), PLACES), original(*inputs(), PLACES))
        assert seen[0] == seen[1] != []

    def test_an_adapter(self):
        """It is called, and the operators compute the rest."""

        class Adapter(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

            def forward(self, x):
                return 2 * self.base(x)

        original = block()
        for name in ("to_q", "to_kv"):
            setattr(original.attn, name, Adapter(getattr(original.attn, name)))
        fused = patched(original)
        assert_parity(
            original,
            fused,
            (B, T, WIDTH),
            (B, L, 1, AUDIO),
            call=lambda module, x, media: module(x, media, PADDING["between"][:, :, None], PLACES),
        )

    def test_a_block_whose_attention_is_another(self):
        class Louder(Hears):
            def end(self, starts, token):
                return min(L, super().end(starts, token) + 1)

        original = block(Louder)
        fused = copy.deepcopy(original)
        assert list(patch(fused).replaced) == [""]
        assert torch.equal(fused(*inputs(), PLACES), original(*inputs(), PLACES))

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_compiled(self):
        torch._dynamo.reset()
        original = block(HearsAll)
        compiled = torch.compile(patched(original), backend="eager")
        given = (*inputs("between"), PLACES)
        torch.testing.assert_close(compiled(*given), original(*given))


class TestKnown:
    @known
    def test_each_copy_by_its_code(self):
        model = nn.ModuleList([block(Hears), block(HearsAll)])
        notes = patch(model).notes
        assert notes == {
            "0": "a copy of audio_flamingo_2.GatedCrossAttentionBlock",
            "0.attn": "a copy of audio_flamingo_2.MaskedCrossAttention",
            "1": "a copy of audio_flamingo_2.GatedCrossAttentionBlock",
            "1.attn": "a copy of inference_HF_pretrained.MaskedCrossAttention",
        }

    TARGETS = {
        Hears: "audio_flamingo_2.MaskedCrossAttention",
        HearsAll: "inference_HF_pretrained.MaskedCrossAttention",
    }

    @pytest.mark.parametrize("gated", [True, False], ids=["of a block", "of the other copy"])
    def test_a_trial(self, gated):
        like = {HearsGated: "audio_flamingo_2.GatedCrossAttentionBlock", Hears: self.TARGETS[Hears]}
        fused = block(Hears) if gated else block(HearsAll).attn
        original = copy.deepcopy(fused)
        report = patch(fused, like=like if gated else {HearsAll: self.TARGETS[HearsAll]})
        assert all("calls agrees" in note for note in report.notes.values())
        given = (*inputs("between"), PLACES)
        torch.testing.assert_close(fused(*given), original(*given), rtol=1e-4, atol=1e-5)

    @rules
    def test_a_trial_as_the_other_copy(self, hears):
        (other,) = set(self.TARGETS) - {hears}
        with pytest.raises(UnsupportedError, match="the result differs"):
            patch(block(hears).attn, like={hears: self.TARGETS[other]})

    def test_a_trial_of_other_rules(self):
        class FirstLater(Hears):
            def end(self, starts, token):
                return self.max_window_per_audio * max(sum(start < token for start in starts), 1)

        class StepsHearAll(Hears):
            def forward(self, x, media, media_mask, media_locations=None, use_cached_media=False):
                places = None if use_cached_media else media_locations
                return super().forward(x, media, media_mask, places, use_cached_media)

        class IgnoresPadding(Hears):
            def forward(self, x, media, media_mask, media_locations=None, use_cached_media=False):
                return super().forward(x, media, media_mask * 0 + 1, media_locations, use_cached_media)

        for trap in (FirstLater, StepsHearAll, IgnoresPadding):
            with pytest.raises(UnsupportedError, match="the result differs"):
                patch(block(trap).attn, like={trap: self.TARGETS[Hears]})
