"""The first release of open_flamingo, with `attend_previous`, and Otter: masks, and what is not computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flamingo_kernels import MediaCache, UnsupportedError, fold, patch, quantize, unfold
from flamingo_kernels.layers import cross_attention
from tests.helpers import third_party
from tests.helpers.copies import Doubled, assert_a_trial_finds, assert_same, known, pair
from tests.helpers.lookalikes import (
    GatedAhead,
    ListedAhead,
    LooksAhead,
    LooksAtMedia,
    ReadsOn,
    SumsOn,
    inputs,
    make,
)
from tests.helpers.variants import load

LAYERS = (LooksAhead, GatedAhead, ListedAhead)
SPANS = {
    "an image at odd places": [[0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]],
    "adjacent images": [[1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "more images than media": [[1, 1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 0]],
    "no image": [[0] * 7, [0] * 7],
}
PLACES = {name: torch.tensor(rows).bool() for name, rows in SPANS.items()}


@pytest.fixture(scope="module", autouse=True)
def of_known_code():
    with known(*LAYERS, ReadsOn, SumsOn):
        yield


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
class TestMask:
    def test_both_ways(self, cls, immediate):
        """The flag is a rule of the call: one module takes it either way, again and again."""
        original, swapped = pair(cls, only_attend_immediate_media=immediate)
        x, media, _ = inputs(original, text=7)
        for places in PLACES.values():
            for flag in (True, False, True):
                assert_same(original, swapped, x, media, places, attend_previous=flag)

    def test_without_gradients(self, cls, immediate):
        original, swapped = pair(cls, only_attend_immediate_media=immediate)
        x, media, _ = inputs(original, text=7)
        with torch.no_grad():
            for places in (*PLACES.values(), None):
                for flag in (True, False):
                    assert_same(original, swapped, x, media, places, attend_previous=flag)
                    one = None if places is None else places[:, 1:2]
                    assert_same(original, swapped, x[:, :1], media, one, attend_previous=flag)


@pytest.mark.parametrize("cls", LAYERS)
class TestTokensWithoutAnImage:
    def test_nothing_is_computed(self, cls, monkeypatch):
        original, swapped = pair(cls)
        x, media, _ = inputs(original, text=1)
        none = torch.zeros(2, 1, dtype=torch.bool)
        with torch.no_grad():
            expected = original(x, media, none)
            monkeypatch.setattr(
                cross_attention, "load_or_project", lambda *_, **__: pytest.fail("K and V are made")
            )
            torch.testing.assert_close(swapped(x, media, none), expected)
            torch.testing.assert_close(swapped(x, media, none, attend_previous=False), expected)
            with pytest.raises(pytest.fail.Exception, match="K and V are made"):
                swapped(x, media, ~none)

    def test_a_change_of_places_is_seen(self, cls):
        original, swapped = pair(cls)
        x, media, _ = inputs(original, text=1)
        places = torch.zeros(2, 1, dtype=torch.bool)
        with torch.no_grad():
            for _ in range(2):
                assert_same(original, swapped, x, media, places)
                places[0] = True  # the second time without a change

    def test_in_bfloat16(self, cls):
        original, swapped = (each.bfloat16() for each in pair(cls))
        x, media, places = inputs(original, dtype=torch.bfloat16)
        with torch.no_grad():
            assert_same(original, swapped, x, media, places & False, tolerance=2e-2)

    def test_under_autocast(self, cls):
        """Gates of different dtypes: the first one decides what the network reads."""
        original, swapped = pair(cls)
        for module in (original, swapped):
            if cls is not LooksAhead:
                module.ff_gate.data = module.ff_gate.data.bfloat16()
        x, media, places = inputs(original)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for each in (x, x.bfloat16()):
                assert_same(original, swapped, each, media, places & False, tolerance=2e-2)
                assert_same(original, swapped, each, media, places, tolerance=2e-2)

    def test_a_bias_is_added(self, cls):
        """An adapter may have put one there: then the result is not 0."""
        original, swapped = pair(cls)
        for module in (original, swapped):
            attn = getattr(module, "attn", module)
            attn.to_out = nn.Linear(attn.to_out.in_features, attn.to_out.out_features)
            nn.init.ones_(attn.to_out.bias)
            nn.init.ones_(attn.to_out.weight)
        x, media, places = inputs(original)
        with torch.no_grad():
            assert_same(original, swapped, x, media, places & False)

    def test_hooks_see_the_calls(self, cls):
        original, swapped = pair(cls)
        x, media, places = inputs(original)
        seen = []
        getattr(swapped, "attn", swapped).to_kv.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            assert_same(original, swapped, x, media, places & False)
        assert seen


@pytest.mark.parametrize("cls", LAYERS)
class TestTheOriginalComputes:
    def test_numbers_for_places(self, cls):
        """Integers become a bitwise not there, whatever it may mean; without the flag they add up."""
        original, swapped = pair(cls)
        x, media, places = inputs(original)
        assert_same(original, swapped, x, media, places.long() * 2)
        assert_same(original, swapped, x, media, places.long(), attend_previous=False)

    def test_one_place_for_all(self, cls):
        original, swapped = pair(cls)
        x, media, places = inputs(original)
        assert_same(original, swapped, x, media, places[:, :1])

    def test_fewer_tokens_than_places(self, cls):
        original, swapped = pair(cls)
        x, media, places = inputs(original)
        for module in (original, swapped):
            with pytest.raises(RuntimeError, match="size of tensor"):
                module(x[:, :4], media, places)


@pytest.mark.parametrize("cls", [GatedAhead, ListedAhead])
class TestWholeBlocks:
    @pytest.mark.parametrize("part", ["to_q", "to_kv", "to_out"])
    def test_adapted_projections(self, cls, part):
        original, swapped = pair(cls)
        for module in (original, swapped):
            setattr(module.attn, part, Doubled(getattr(module.attn, part)))
        x, media, _ = inputs(original, text=7)
        for places in PLACES.values():
            for flag in (True, False):
                assert_same(original, swapped, x, media, places, attend_previous=flag)

    def test_media_cache(self, cls):
        _, swapped = pair(cls)
        x, media, places = inputs(swapped)
        with torch.no_grad():
            cache = MediaCache(swapped, media)
            for flag in (True, False):
                torch.testing.assert_close(swapped(x, cache, places, flag), swapped(x, media, places, flag))
        with pytest.raises(TypeError, match="bool media_locations"):
            swapped(x, cache, places.long(), attend_previous=False)

    def test_fold(self, cls):
        original, swapped = (each.eval() for each in pair(cls))
        x, media, places = inputs(original)
        with torch.no_grad():
            fold(swapped)
            assert swapped.folded
            assert_same(original, swapped, x, media, places)
            assert_same(original, swapped, x, media, places & False)
            unfold(swapped)
            assert_same(original, swapped, x, media, places)

    def test_integers(self, cls):
        original, swapped = (each.eval() for each in pair(cls, dim=64, dim_head=32))
        x = torch.randn(2, 5, 64)
        media, places = torch.randn(2, 3, 4, 12), torch.rand(2, 5) < 0.3
        quantize(swapped)
        with torch.no_grad():
            assert_same(original, swapped, x, media, places, tolerance=0.1)
            assert_same(original, swapped, x, media, places & False, tolerance=0.1)


class TestOttersResampler:
    @pytest.mark.parametrize("cls", [ReadsOn, SumsOn])
    def test_same(self, cls):
        original, swapped = pair(cls)
        assert_same(original, swapped, *inputs(original))

    def test_positions(self):
        original, swapped = pair(SumsOn, max_num_media=4, max_num_frames=3)
        assert_same(original, swapped, *inputs(original))

    def test_a_hook_on_one_block(self):
        original, swapped = pair(SumsOn)
        seen = []
        swapped.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert_same(original, swapped, *inputs(original))
        assert seen == [1]

    def test_a_block_that_stays(self):
        original, swapped = pair(SumsOn)
        for module in (original, swapped):
            module.layers[1] = Doubled(module.layers[1])
        assert_same(original, swapped, *inputs(original))


@pytest.mark.parametrize(
    ("cls", "parts"),
    [
        (LooksAhead, ()),
        pytest.param(GatedAhead, (LooksAhead,), marks=pytest.mark.slow),
        pytest.param(ListedAhead, (LooksAhead,), marks=pytest.mark.slow),
        (ReadsOn, ()),
        (SumsOn, (ReadsOn,)),
    ],
)
def test_a_trial_finds_the_same(cls, parts):
    assert_a_trial_finds(cls, *parts)


def test_a_module_that_follows_other_rules_is_refused():
    """Code of 2.0.1 has the same parts; its last argument means something else."""
    with pytest.raises(UnsupportedError, match="takes use_cached_media, which is not known"):
        patch(make(LooksAtMedia), like={LooksAtMedia: "open_flamingo_v1.MaskedCrossAttention"})


def test_another_release_at_the_same_place(monkeypatch):
    """What stands at the place of a known class may be a copy of another: its code counts."""
    original = third_party.flamingo_pytorch()
    theirs = load(original.__file__, "open_flamingo.src.helpers", monkeypatch)
    attn = theirs.MaskedCrossAttention(dim=16, dim_head=8, heads=2)
    report = patch(attn)
    assert "a copy of flamingo_pytorch.MaskedCrossAttention" in report.notes[""]
