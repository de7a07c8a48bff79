"""The model's cache, given to layers of transformers by every name that the installed version has for it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_kernels import patch
from flamingo_kernels.patch.swap import is_swapped
from flamingo_kernels.testing import tiny
from tests.helpers import third_party

transformers = pytest.importorskip("transformers")

SIZES = tiny.Sizes(batch=2, text=6, images=2, width=32, heads=4, layers=2, visual=16, latents=5)
VERSION = third_party.transformers_version()
if VERSION < (5, 0):
    NAMES = ("past_key_values", "past_key_value")
elif VERSION < (5, 24):
    NAMES = ("past_key_values",)
else:
    NAMES = ("cache", "past_key_values")
OWN, *DEPRECATED = NAMES

# By class: what is called before the cache.
MEDIA, X = torch.randn(2, 10, 32), torch.randn(2, 6, 32)
MASK = torch.zeros(2, 1, 6, 10)
GIVEN: dict[str, tuple[Any, ...]] = {
    "MllamaTextCrossAttention": (X, MEDIA),
    "MllamaCrossAttentionDecoderLayer": (X, MEDIA, MASK, None, None, None),
    "Idefics2PerceiverAttention": (X, MEDIA, None, None),
    "EvollaSequenceAlignerCrossAttention": (
        *(X, MEDIA, None, None, torch.ones(2, 6)),
        *(None, None, None, torch.ones(2), None, None),
    ),
    "IdeficsGatedCrossAttentionLayer": (X, None, MEDIA[..., :16], MASK, torch.ones(2, 6)),
}
HOMES = {
    "Mllama": "mllama-tiny",
    "Idefics": "idefics-tiny",
    "Idefics2": "idefics2-tiny",
    "Evolla": "evolla-tiny",
}
TAKES = [name for name in GIVEN if not name.startswith("IdeficsGated")]  # which refuses every cache


deprecated = pytest.mark.parametrize(
    "old",
    DEPRECATED
    or [
        pytest.param(
            "", marks=pytest.mark.skip(reason="transformers 5.0 to 5.23 has no deprecated name of the cache")
        )
    ],
)


class Cache(transformers.DynamicCache):
    """Records what it is given beside keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def update(self, k, v, *args, **kwargs):
        self.given.append((args, kwargs))
        return super().update(k, v, *args, **kwargs)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A layer with its position in the cache at 0, and a copy that is swapped."""
    home = next(HOMES[each] for each in sorted(HOMES, reverse=True) if name.startswith(each))
    model = tiny.build(home, SIZES).model
    layer = next(module for module in model.modules() if type(module).__name__ == name)
    for part in layer.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = 0
    fused = copy.deepcopy(layer)
    patch(fused)
    assert is_swapped(fused)
    return layer, fused


@torch.no_grad()
def call(layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Cache, list[tuple[type, str]]]:
    """The result, the cache after it, and the warnings."""
    cache = next(each for each in (*args, *kwargs.values()) if isinstance(each, Cache))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = layer(*args, **kwargs)
    return out, cache, [(each.category, str(each.message)) for each in caught]


def assert_same(layer: nn.Module, fused: nn.Module, make: Any) -> list[tuple[type, str]]:
    """The warnings, after a comparison of everything."""
    results = []
    for each in (layer, fused):
        args, kwargs = make()
        results.append(call(each, *args, **kwargs))
    (expected, its, warned), (got, mine, mine_warned) = results
    torch.testing.assert_close(got, expected)
    assert mine_warned == warned
    assert len(mine.layers) == len(its.layers)
    for a, b in zip(mine.layers, its.layers, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values))
    if VERSION >= (5, 0):  # before, the original gives the cache positions that it has not been given
        assert mine.given == its.given
    return warned


@pytest.mark.parametrize("name", TAKES)
class TestEveryLayer:
    def test_by_position(self, name):
        assert not assert_same(*pair(name), lambda: ((*GIVEN[name], Cache()), {}))

    def test_by_its_own_name(self, name):
        assert not assert_same(*pair(name), lambda: (GIVEN[name], {OWN: Cache()}))

    @deprecated
    def test_by_a_deprecated_name_which_warns(self, name, old):
        warned = assert_same(*pair(name), lambda: (GIVEN[name], {old: Cache()}))
        assert len(warned) == 1

    @deprecated
    def test_by_both_names_of_which_the_new_one_counts(self, name, old):
        warned = assert_same(*pair(name), lambda: (GIVEN[name], {OWN: Cache(), old: None}))
        assert len(warned) == 1

    def test_the_new_name_with_every_version(self, name):
        _, fused = pair(name)
        expected, got = (call(fused, *GIVEN[name], **{each: Cache()}) for each in (OWN, "cache"))
        torch.testing.assert_close(got[0], expected[0])
        assert len(got[1].layers) == len(expected[1].layers)


@pytest.mark.parametrize("name", [name for name in TAKES if name.startswith("Mllama")])
def test_the_cache_is_given_what_the_original_gives_it(name):
    given = {"use_cache": True, "of_a_caller": 5}
    assert_same(*pair(name), lambda: (GIVEN[name], {OWN: Cache(), **given}))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_layer_without_a_cache_refuses_one():
    for each in pair("IdeficsGatedCrossAttentionLayer"):
        for name in NAMES:
            with pytest.raises(NotImplementedError):
                each(*GIVEN["IdeficsGatedCrossAttentionLayer"], **{name: Cache()})


@torch.no_grad()
def test_a_cache_set_on_the_attention_of_idefics2():
    name = "Idefics2PerceiverAttention"
    results = []
    for each in pair(name):
        setattr(each, OWN, Cache())
        results.append([each(X, media, None, None)[0] for media in (MEDIA, MEDIA.flip(0))])
        delattr(each, OWN)
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[1][1], each(X, MEDIA.flip(0), None, None)[0])
