"""open_flamingo's branches and xGen-MM: locations longer than the text, projections, masks of features."""

from __future__ import annotations

import copy

import pytest
import torch

from flamingo_kernels import MediaCache, patch
from flamingo_kernels.layers import Fused
from tests.helpers import third_party
from tests.helpers.copies import Doubled, assert_a_trial_finds, assert_same, known, pair
from tests.helpers.lookalikes import (
    VISUAL,
    LooksFromTheEnd,
    ReadsSome,
    SumsProjected,
    SumsSome,
    inputs,
)
from tests.helpers.weights import randomise

RESAMPLERS = (SumsProjected, SumsSome)


@pytest.fixture(scope="module", autouse=True)
def of_known_code():
    with known(LooksFromTheEnd, ReadsSome, *RESAMPLERS):
        yield


def in_a_block(immediate=True):
    """The branches have the block of flamingo_pytorch, word for word, around their own attention."""
    library = third_party.flamingo_pytorch()
    block = library.GatedCrossAttentionBlock(dim=16, dim_head=16, heads=2)
    sizes = {"dim": 16, "dim_head": 16, "heads": 2, "dim_visual": VISUAL}
    block.attn = LooksFromTheEnd(**sizes, only_attend_immediate_media=immediate)
    randomise(block)
    swapped = copy.deepcopy(block)
    patch(swapped)
    assert isinstance(swapped, Fused)
    assert isinstance(swapped.attn, Fused)
    return block, swapped


def both(immediate=True):
    return pair(LooksFromTheEnd, only_attend_immediate_media=immediate), in_a_block(immediate)


@pytest.mark.parametrize("immediate", [True, False])
class TestLocations:
    @pytest.mark.parametrize("text", [1, 4, 9])
    def test_the_text_is_their_end(self, immediate, text):
        for original, swapped in both(immediate):
            for batch in (1, 2):
                x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL), batch=batch)
                for each in (places, places.long() * 2, places & False):
                    assert_same(original, swapped, x[:, -text:], media, each)

    @pytest.mark.parametrize("part", ["to_q", "to_kv", "to_out"])
    def test_adapted_projections(self, immediate, part):
        original, swapped = in_a_block(immediate)
        for block in (original, swapped):
            setattr(block.attn, part, Doubled(getattr(block.attn, part)))
        x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL))
        for text in (1, 4, 9):
            assert_same(original, swapped, x[:, -text:], media, places)

    def test_steps_of_a_generation(self, immediate):
        """Each has one place more; keys and values are made once."""
        for original, swapped in both(immediate):
            x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL))
            with torch.no_grad():
                assert_same(original, swapped, x, media, places)
                for step in range(1, 4):
                    longer = torch.cat([places, places[:, :step] & False], dim=1)
                    assert_same(original, swapped, x[:, :1] * step, media, longer)
                media[0] += 1
                assert_same(original, swapped, x[:, :1], media, longer)


def test_keys_and_values_are_kept_for_a_step(monkeypatch):
    _, swapped = in_a_block()
    x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL))
    made = []
    source = type(swapped.attn).media_source
    monkeypatch.setattr(type(swapped.attn), "media_source", lambda attn: Counts(source(attn), made))
    with torch.no_grad():
        swapped(x, media, places)
        swapped(x[:, :1], media, torch.cat([places, places[:, :1]], dim=1))
        swapped(x[:, :2], media, torch.cat([places, places[:, :2]], dim=1))
        assert len(made) == 1
        swapped(x, media, places)
        assert len(made) == 2


class Counts:
    """A source of keys and values that counts how often it makes them."""

    def __init__(self, source, made):
        self.source, self.made = source, made

    def __getattr__(self, name):
        return getattr(self.source, name)

    def project(self, media):
        self.made.append(media)
        return self.source.project(media)


def test_fewer_locations_than_text():
    (original, swapped), (_, block) = both()
    x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL))
    for module in (original, swapped):
        with pytest.raises(AssertionError, match="longer than its locations"):
            module(x, media, places[:, :4])
        with pytest.raises(AttributeError):
            module(x, media, None)
    with pytest.raises(ValueError, match="expected media_locations with shape"):
        block(x, media, places[:, :4])


def test_media_cache():
    _, swapped = in_a_block()
    x, media, places = inputs(LooksFromTheEnd(dim=16, dim_visual=VISUAL))
    with torch.no_grad():
        cache = MediaCache(swapped, media)
        torch.testing.assert_close(swapped(x, cache, places), swapped(x, media, places))
        torch.testing.assert_close(swapped(x[:, :2], cache, places), swapped(x[:, :2], media, places))


def test_hooks_see_the_calls():
    original, swapped = pair(LooksFromTheEnd)
    x, media, places = inputs(original)
    seen = []
    swapped.to_q.register_forward_hook(lambda *_: seen.append(1))
    assert_same(original, swapped, x[:, :4], media, places)
    assert seen


MASKS = {
    "none": None,
    "all": torch.ones(2, 8),
    "a part at the end": (torch.arange(8) < torch.tensor([[5], [8]])).long(),
    "anywhere, and nothing": torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1], [0] * 8]).bool(),
    "numbers": torch.tensor([[0, 2, 0, 3, -1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]),
}


class TestResamplers:
    @pytest.mark.parametrize("width", [None, 24])
    @pytest.mark.parametrize("positions", [{}, {"max_num_media": 4, "max_num_frames": 3}])
    @pytest.mark.parametrize("cls", RESAMPLERS)
    def test_projections(self, cls, positions, width):
        original, swapped = pair(cls, dim_inner=width, **positions)
        (x,) = inputs(original)
        mask = () if cls is SumsProjected else (None,)
        assert_same(original, swapped, x, *mask)

    @pytest.mark.parametrize("mask", MASKS)
    def test_masks(self, mask):
        original, swapped = pair(SumsSome, dim_inner=24)
        (x,) = inputs(original)
        with torch.no_grad():
            assert_same(original, swapped, x, MASKS[mask])
        swapped.layers[0][0].register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert_same(original, swapped, x, MASKS[mask])

    def test_an_attention_that_stays(self):
        original, swapped = pair(SumsSome)
        for module in (original, swapped):
            module.layers[1][0] = Doubled(module.layers[1][0])
        (x,) = inputs(original)
        with torch.no_grad():
            assert_same(original, swapped, x, MASKS["numbers"])

    @pytest.mark.parametrize("mask", MASKS)
    def test_masks_of_one_attention(self, mask):
        original, swapped = pair(ReadsSome)
        x, latents = inputs(original)
        seen = MASKS[mask]
        with torch.no_grad():
            assert_same(original, swapped, x, latents, None if seen is None else seen[:, :6])

    def test_gradients_behind_a_mask(self):
        original, swapped = pair(SumsSome)
        (x,) = inputs(original)
        assert_same(original, swapped, x, MASKS["anywhere, and nothing"])

    def test_a_mask_of_another_size(self):
        """It fails as it does in the original."""
        original, swapped = pair(SumsSome)
        (x,) = inputs(original)
        for module in (original, swapped):
            with pytest.raises(RuntimeError, match="size of tensor"):
                module(x, torch.ones(2, 5))


@pytest.mark.parametrize(
    ("cls", "parts"),
    [
        (LooksFromTheEnd, ()),
        (SumsProjected, ()),
        (ReadsSome, ()),
        pytest.param(SumsSome, (ReadsSome,), marks=pytest.mark.slow),
    ],
)
def test_a_trial_finds_the_same(cls, parts):
    assert_a_trial_finds(cls, *parts)
