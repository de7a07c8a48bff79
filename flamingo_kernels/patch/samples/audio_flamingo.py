"""Small instances of Audio Flamingo's classes, and calls in which copies may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import audio_flamingo, audio_flamingo_inference
from .call import Arguments, Call, Sample, randn

# No two sizes that meet are equal, so that none is taken for another.
_SIZES = {"dim": 12, "dim_audio": 10, "dim_head": 8, "heads": 3, "max_window_per_audio": 2}
_LENGTH, _KEYS = 7, 6
_PLACES = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]).bool()
_ADJACENT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]]).bool()  # more than there are audios
_NO_AUDIO = torch.tensor([[0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
_HEARD = {
    "no padding": torch.ones(2, _KEYS),
    "padding at the end": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]),
    "padding between": torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1]]),
    "nothing but padding": torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1]]),
}


def _build(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    attn: Any = getattr(module, "attn", module)
    more = {"ff_mult": 3} if hasattr(module, "ff") else {}
    immediate = attn.only_attend_immediate_media
    small: nn.Module = cls(**_SIZES, **more, only_attend_immediate_media=immediate)
    return small


def _calls(module: nn.Module) -> Iterator[Call]:
    attn: Any = getattr(module, "attn", module)
    width, audio = attn.to_q.in_features, attn.to_kv.in_features

    def call(
        title: str,
        heard: str,
        places: Tensor | None,
        *,
        length: int = _LENGTH,
        batch: int = 2,
        size: float = 1,
        follows: bool = False,
    ) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x = randn(dtype, batch, length, width, size=min(size, 1))
            media = randn(dtype, batch, _KEYS, 1, audio, size=size)
            padding = _HEARD[heard][:batch, :, None].to(dtype)
            given = None if places is None else places[:batch].clone()
            return (x, media, padding, given, follows), {}

        return Call(title, make, exact=size > 1)

    for heard in _HEARD:
        yield call(heard, heard, _PLACES)
        yield call(f"a step, {heard}", heard, _PLACES, length=1, follows=True)
        yield call(f"no locations, {heard}", heard, None, follows=True)
    for name, places in (("adjacent audios", _ADJACENT), ("a text without an audio", _NO_AUDIO)):
        yield call(name, "padding between", places)
        yield call(f"a step after {name}", "no padding", places, length=1, follows=True)
    yield call("a token", "padding at the end", _PLACES[:, 1:2], length=1)
    yield call("text after audios", "padding between", _PLACES, length=4, follows=True)
    yield call("longer text after audios", "no padding", _PLACES, length=9, follows=True)
    yield call("one sequence", "padding at the end", _PLACES, batch=1)
    yield call("locations as numbers", "padding between", _PLACES.long() * 2)
    yield call("large media", "padding between", _PLACES, size=100)
    yield call("no locations, and they are asked for", "no padding", None)
    yield call("fewer tokens than locations", "no padding", _PLACES, length=4)


SAMPLES: Mapping[type[nn.Module], Sample] = {
    cls: Sample(_build, _calls)
    for cls in (
        audio_flamingo.MaskedCrossAttention,
        audio_flamingo.GatedCrossAttentionBlock,
        audio_flamingo_inference.MaskedCrossAttention,
    )
}
