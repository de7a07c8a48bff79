"""Small instances of open_flamingo's and flamingo_pytorch's classes, and calls in which copies may differ."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import flamingo_pytorch, open_flamingo
from .call import Arguments, Call, Sample, randn

_SIZES = {
    "dim": 12,
    "dim_head": 4,
    "heads": 2,
    "ff_mult": 2,
    "depth": 2,
    "num_latents": 3,
}


def _build(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An instance by those of the sizes that its constructor names, with the optional parts of the module."""
    sizes: dict[str, Any] = dict(_SIZES)
    if hasattr(module, "only_attend_immediate_media"):
        sizes["only_attend_immediate_media"] = module.only_attend_immediate_media
    if getattr(module, "media_time_embs", None) is not None:
        sizes["max_num_media"] = 4
    if getattr(module, "media_pos_emb", None) is not None:
        sizes["num_media_embeds"] = 4
    if getattr(module, "frame_embs", None) is not None:
        sizes["max_num_frames"] = 3
    sizes["dim_visual"] = 8
    takes = inspect.signature(cls).parameters
    return cls(**{name: size for name, size in sizes.items() if name in takes})


_PLACES = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0]]).bool()  # text has 7 tokens, 3 media
_MORE_IMAGES = torch.tensor([[1, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
_NO_IMAGE = torch.zeros_like(_PLACES)


def _masked_calls(module: nn.Module) -> Iterator[Call]:
    """Text with media, where images stand at odd places."""
    attn: Any = getattr(module, "attn", module)
    width, visual = attn.to_q.in_features, attn.to_kv.in_features

    def call(
        title: str, places: Tensor | None, *, text: int = 7, media: int = 3, size: float = 1, **flags: bool
    ) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x, features = randn(dtype, 2, text, width), randn(dtype, 2, media, 5, visual, size=size)
            return (x, features, None if places is None else places.clone()), flags

        return Call(title, make)

    yield call("text before, at and after images", _PLACES)
    yield call("more images than media", _MORE_IMAGES)
    yield call("no image", _NO_IMAGE)
    yield call("one medium", _PLACES, media=1)
    yield call("locations as numbers", _PLACES.long())
    yield call("no locations", None)
    yield call("scores beyond the range of exp", _PLACES, size=1e4)
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
        yield call("a step without locations", None, text=1, use_cached_media=True)


def _perceiver_calls(module: nn.Module) -> Iterator[Call]:
    attn: Any = module
    width = attn.to_q.in_features

    def call(title: str, *, features: int = 5, latents: int = 3, size: float = 1) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            return (
                randn(dtype, 2, 2, features, width, size=size),
                randn(dtype, 2, 2, latents, width, size=size),
            ), {}

        return Call(title, make)

    yield call("more features than latents")
    yield call("fewer features than latents", features=2, latents=4)
    yield call("one feature", features=1)
    yield call("one latent", latents=1)
    yield call("large features", size=1e3)


def _resampler_calls(module: nn.Module) -> Iterator[Call]:
    resampler: Any = module
    width = resampler.latents.shape[-1]
    shapes = {
        "media of one frame": (2, 3, 1, 5, width),
        "one medium": (2, 1, 1, 5, width),
        "one feature": (1, 2, 1, 1, width),
        "media of frames": (2, 2, 3, 4, width),
        "media of few frames": (1, 4, 2, 4, width),
        "media without frames": (2, 3, 5, width),
        "one medium without its axis": (2, 5, width),
    }
    for title, shape in shapes.items():
        yield Call(title, functools.partial(_features, shape))


def _features(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return (randn(dtype, *shape),), {}


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
