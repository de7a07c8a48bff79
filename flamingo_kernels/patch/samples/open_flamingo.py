"""Small instances of open_flamingo's and flamingo_pytorch's classes, and calls in which copies may differ."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import flamingo_pytorch, open_flamingo
from .call import Arguments, Call, Sample, build, randn

# No two sizes that meet are equal, so that none is taken for another.
_SIZES = {
    "dim": 12,
    "dim_head": 8,
    "heads": 3,
    "ff_mult": 3,
    "num_latents": 4,
    "dim_visual": 10,
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
    if "use_cached_media" in inspect.signature(type(module).forward).parameters:
        for places, name in (
            (_PLACES, "images"),
            (_MORE_IMAGES, "more images than media"),
            (_NO_IMAGE, "no image"),
        ):
            yield call(f"a step after {name}", places, text=1, use_cached_media=True)
            yield call(f"text after {name}", places, text=4, use_cached_media=True)
        yield call("a step of one sequence", _PLACES[:1], batch=1, text=1, use_cached_media=True)
        yield call("a step without locations", None, text=1, use_cached_media=True)


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
    width = resampler.latents.shape[-1]
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


def _features(shape: tuple[int, ...], dtype: torch.dtype, blank: bool = False) -> Arguments:
    return (randn(dtype, *shape, blank=blank),), {}


SAMPLES: Mapping[type[nn.Module], Sample] = {
    **{
        cls: Sample(_build, _masked_calls)
        for cls in (
            open_flamingo.MaskedCrossAttention,
            open_flamingo.GatedCrossAttentionBlock,
            flamingo_pytorch.GatedCrossAttentionBlock,
        )
    },
    open_flamingo.PerceiverAttention: Sample(_build, _perceiver_calls),
    **{
        cls: Sample(_build, _resampler_calls)
        for cls in (open_flamingo.PerceiverResampler, flamingo_pytorch.PerceiverResampler)
    },
}
