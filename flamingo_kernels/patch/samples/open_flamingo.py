"""Small instances of open_flamingo's classes and of what descends from it, and calls that may differ."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    flamingo_mini,
    flamingo_pytorch,
    open_flamingo,
    open_flamingo_v1,
    open_flamingo_vlm,
    otter,
    xgen_mm,
)
from .call import Arguments, Call, Sample, build, randn

# No two sizes that meet are equal, so that none is taken for another.
_SIZES = {
    "dim": 12,
    "dim_head": 8,
    "heads": 3,
    "ff_mult": 3,
    "num_latents": 4,
    "dim_visual": 10,
    "n_visual": 5,
}


def _build(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An instance with the optional parts of the module."""
    sizes: dict[str, Any] = dict(_SIZES)
    if hasattr(module, "only_attend_immediate_media"):
        sizes["only_attend_immediate_media"] = module.only_attend_immediate_media
    if getattr(module, "media_time_embs", None) is not None:
        sizes["max_num_media"] = 4
    if getattr(module, "media_pos_emb", None) is not None:
        sizes["num_media_embeds"] = 4
    if isinstance(layers := getattr(module, "layers", None), nn.ModuleList):
        sizes["depth"] = len(layers)
    if getattr(module, "frame_embs", None) is not None:
        sizes["max_num_frames"] = 3
    if getattr(module, "projection", None) is not None:
        sizes["dim_inner"] = 14
    return build(cls, sizes)


def _places(*rows: str) -> Tensor:
    """Rows of text as locations, an `i` for every image."""
    return torch.tensor([[token == "i" for token in row] for row in rows])


_PLACES = _places(".i..i.i..i..", "...i........")
_MORE_IMAGES = _places("i.i.ii..i.i.", "iiiii.......")
_NO_IMAGE = torch.zeros_like(_PLACES)
_MANY = _places(".i." * 14, "i." * 21, "." * 41 + "i")


def _masked_calls(module: nn.Module) -> Iterator[Call]:
    """Text with media, where images stand at odd places."""
    attn: Any = module if hasattr(module, "to_q") else module.attn
    width, visual = attn.to_q.in_features, attn.to_kv.in_features

    def call(
        title: str,
        places: Tensor | None,
        *,
        batch: int = 2,
        text: int = 12,
        media: int = 4,
        latents: int = 5,
        size: float = 1,
        exact: bool = False,
        blank: bool = False,
        **flags: bool,
    ) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x = randn(dtype, batch, text, width, size=min(size, 1))
            features = randn(dtype, batch, media, latents, visual, size=size, blank=blank)
            return (x, features, None if places is None else places.clone()), flags

        return Call(title, make, exact, (batch, text, width))

    yield call("text before, at and after images", _PLACES)
    yield call("more images than media", _MORE_IMAGES, media=2)
    yield call("no image", _NO_IMAGE)
    yield call("one medium", _PLACES, media=1)
    yield call("a blank medium", _MORE_IMAGES, blank=True)
    yield call("one sequence", _PLACES[:1], batch=1)
    yield call("many images", _MANY, batch=3, text=42, media=14)
    yield call("long text", _PLACES[:1].repeat(1, 25), batch=1, text=300, media=3, latents=70)
    yield call("locations as numbers", _PLACES.long())
    yield call("numbers that add up", _PLACES.long() * 2)
    yield call("no locations", None)
    yield call("large media", _PLACES, size=100, exact=True)
    yield call("small numbers", _PLACES, size=0.01)
    yield call("one token", _PLACES[:, 1:2], text=1)
    yield call("fewer tokens than locations", _PLACES, text=4)
    yield call("one token of more", _PLACES, text=1)
    takes = inspect.signature(type(module).forward).parameters
    if "attend_previous" in takes:
        yield call("images ahead", _PLACES, attend_previous=False)
        yield call("more images ahead than media", _MORE_IMAGES, media=2, attend_previous=False)
        yield call("no image ahead", _NO_IMAGE, attend_previous=False)
        yield call("one token with an image ahead", _PLACES[:, 1:2], text=1, attend_previous=False)
        yield call("one token with no image ahead", _PLACES[:, :1], text=1, attend_previous=False)
        yield call("nowhere ahead", None, attend_previous=False)
    if "use_cached_media" in takes:
        for places, name in (
            (_PLACES, "images"),
            (_MORE_IMAGES, "more images than media"),
            (_NO_IMAGE, "no image"),
        ):
            yield call(f"a step after {name}", places, text=1, use_cached_media=True)
            yield call(f"text after {name}", places, text=4, use_cached_media=True)
        yield call("a step of one sequence", _PLACES[:1], batch=1, text=1, use_cached_media=True)
        yield call("a step without locations", None, text=1, use_cached_media=True)


def _mini_calls(module: nn.Module) -> Iterator[Call]:
    """Text with media, and text that comes with keys and values."""
    attn: Any = module if hasattr(module, "to_q") else module.attn
    inner, width, visual = attn.to_q.out_features, attn.to_q.in_features, attn.to_kv.in_features

    def call(
        title: str, places: Tensor, *, text: int = 12, media: int = 4, kv: bool = False, give: bool = True
    ) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            batch, size, seen = len(places), attn.n_visual, places.clone()
            y, features = randn(dtype, batch, text, width), randn(dtype, batch, media, size, visual)
            flags: dict[str, Any] = {"output_kv": give}
            if kv:
                shape = (batch, attn.heads, media * size, inner // attn.heads)
                flags["previous_kv"] = (randn(dtype, *shape), randn(dtype, *shape))
            return (y, seen, features) if attn is module else (y, features, seen), flags

        return Call(title, make)

    yield call("text before, at and after images", _PLACES)
    yield call("nothing given back", _PLACES, give=False)
    yield call("more images than media", _MORE_IMAGES, media=2)
    yield call("no image", _NO_IMAGE)
    yield call("one medium", _PLACES, media=1)
    yield call("one sequence", _PLACES[:1])
    yield call("many images", _MANY, text=42, media=14)
    yield call("numbers that add up", _PLACES.long() * 2)
    yield call("fewer tokens than locations", _PLACES, text=4)
    for places, name in ((_PLACES, "images"), (_MORE_IMAGES, "many images"), (_NO_IMAGE, "no image")):
        yield call(f"a step after {name}", places, text=1, kv=True)
        yield call(f"text after {name}", places, text=4, kv=True)
    yield call("text with keys and values of its own", _PLACES, kv=True, give=False)


def _layer_calls(module: nn.Module) -> Iterator[Call]:
    attn: Any = module

    def make(clips: int, features: int, latents: int, dtype: torch.dtype) -> Arguments:
        width = attn.to_q.in_features
        return (randn(dtype, clips, features, width), randn(dtype, clips, latents, width)), {}

    for shape in ((2, 5, 3), (1, 2, 4), (3, 1, 1), (1, 300, 70), (2, 4, 4)):
        yield Call("{} clips of {} features, {} latents".format(*shape), functools.partial(make, *shape))


def _perceiver_calls(module: nn.Module) -> Iterator[Call]:
    attn: Any = module
    width = attn.to_q.in_features

    def call(
        title: str,
        *,
        batch: int = 2,
        media: int = 2,
        features: int = 5,
        latents: int = 3,
        size: float = 1,
        blank: bool = False,
    ) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x = randn(dtype, batch, media, features, width, size=size, blank=blank)
            return (x, randn(dtype, batch, media, latents, width, size=size)), {}

        return Call(title, make)

    yield call("more features than latents")
    yield call("fewer features than latents", features=2, latents=4)
    yield call("one feature", features=1)
    yield call("one latent", latents=1)
    yield call("one medium", batch=1, media=1)
    yield call("many media", batch=3, media=7)
    yield call("a blank medium", blank=True)
    yield call("many features and latents", media=1, features=300, latents=70)
    yield call("large features", size=1e3)
    yield call("small features", size=0.01)


def _resampler_calls(module: nn.Module) -> Iterator[Call]:
    resampler: Any = module
    projection = getattr(resampler, "projection", None)
    width = resampler.latents.shape[-1] if projection is None else projection.in_features
    shapes = {
        "media of one frame": (2, 3, 1, 5, width),
        "one medium": (2, 1, 1, 5, width),
        "one medium of one sequence": (1, 1, 1, 5, width),
        "one feature": (1, 2, 1, 1, width),
        "media of frames": (2, 2, 3, 4, width),
        "media of few frames": (1, 4, 2, 4, width),
        "many media": (3, 7, 1, 5, width),
        "many frames": (1, 2, 20, 15, width),
        "media without frames": (2, 3, 5, width),
        "one medium without frames": (1, 1, 5, width),
        "many features without frames": (1, 4, 90, width),
        "one medium without its axis": (2, 5, width),
    }
    for title, shape in shapes.items():
        yield Call(title, functools.partial(_features, shape))
    yield Call("a blank medium", functools.partial(_features, (2, 3, 1, 5, width), blank=True))


def _with_masks(calls: Callable[[nn.Module], Iterator[Call]], module: nn.Module) -> Iterator[Call]:
    """The calls of a class that takes a mask of the features too, each with none, all, some and none seen."""

    def make(call: Call, seen: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Arguments:
        (x, *rest), _ = call.make(dtype)
        if seen is None:
            return (x, *rest, None), {}
        all_seen = torch.ones(x.shape[0], math.prod(x.shape[2:-1]), dtype=torch.int64)
        return (x, *rest, seen(all_seen)), {}

    for call in calls(module):
        for title, seen in _SEEN.items():
            yield call._replace(title=f"{call.title}, {title}", make=functools.partial(make, call, seen))


_SEEN: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "no mask": None,
    "every feature": lambda seen: seen,
    "the first features": lambda seen: seen.cumsum(1) * 2 <= seen.shape[1] + 1,
    "every second feature": lambda seen: (seen.cumsum(1) % 2).double(),
    "no feature": lambda seen: seen * 0,
}


def _features(shape: tuple[int, ...], dtype: torch.dtype, blank: bool = False) -> Arguments:
    return (randn(dtype, *shape, blank=blank),), {}


SAMPLES: Mapping[type[nn.Module], Sample] = {
    **{
        cls: Sample(_build, _masked_calls)
        for cls in (
            open_flamingo.MaskedCrossAttention,
            open_flamingo.GatedCrossAttentionBlock,
            open_flamingo_v1.MaskedCrossAttention,
            open_flamingo_v1.GatedCrossAttentionBlock,
            otter.OtterMaskedCrossAttention,
            otter.OtterGatedCrossAttentionBlock,
            open_flamingo_vlm.MaskedCrossAttention,
            flamingo_pytorch.GatedCrossAttentionBlock,
        )
    },
    **{
        cls: Sample(_build, _perceiver_calls)
        for cls in (open_flamingo.PerceiverAttention, otter.OtterPerceiverBlock)
    },
    **{
        cls: Sample(_build, _resampler_calls)
        for cls in (
            open_flamingo.PerceiverResampler,
            otter.OtterPerceiverResampler,
            open_flamingo_vlm.PerceiverResampler,
            flamingo_pytorch.PerceiverResampler,
        )
    },
    flamingo_mini.MaskedCrossAttention: Sample(_build, _mini_calls),
    flamingo_mini.GatedCrossAttentionBlock: Sample(_build, _mini_calls),
    flamingo_mini.PerceiverAttentionLayer: Sample(_build, _layer_calls),
    xgen_mm.PerceiverAttention: Sample(_build, functools.partial(_with_masks, _perceiver_calls)),
    xgen_mm.PerceiverResampler: Sample(_build, functools.partial(_with_masks, _resampler_calls)),
}
