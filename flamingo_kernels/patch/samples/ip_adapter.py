"""Small instances of IP-Adapter's classes, and calls in which copies may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import ip_adapter
from .call import Arguments, Call, Sample, build, randn

# No two sizes that meet are equal, so that none is taken for another.
_SIZES = {
    "dim": 12,
    "dim_head": 8,
    "heads": 3,
    "ff_mult": 3,
    "num_queries": 4,
    "embedding_dim": 10,
    "output_dim": 14,
    "max_seq_len": 300,
}


def _build(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An instance with the optional parts of the module."""
    sizes: dict[str, Any] = dict(_SIZES)
    if isinstance(layers := getattr(module, "layers", None), nn.ModuleList):
        sizes["depth"] = len(layers)
    if getattr(module, "pos_emb", None) is not None:
        sizes["apply_pos_emb"] = True
    if getattr(module, "to_latents_from_mean_pooled_seq", None) is not None:
        sizes["num_latents_mean_pooled"] = 2
    return build(cls, sizes)


def _attention_calls(module: nn.Module) -> Iterator[Call]:
    attn: Any = module
    width = attn.to_q.in_features

    def call(title: str, *, batch: int = 2, features: int = 5, latents: int = 3, size: float = 1) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x = randn(dtype, batch, features, width, size=size)
            return (x, randn(dtype, batch, latents, width, size=size)), {}

        return Call(title, make)

    yield call("more features than latents")
    yield call("fewer features than latents", features=2, latents=4)
    yield call("as many", features=3)
    yield call("one feature", features=1)
    yield call("one latent", latents=1)
    yield call("one image", batch=1)
    yield call("many images", batch=7)
    yield call("many features and latents", features=300, latents=70)
    yield call("large features", size=1e3)
    yield call("small features", size=0.01)


def _resampler_calls(module: nn.Module) -> Iterator[Call]:
    resampler: Any = module
    width = resampler.proj_in.in_features

    def call(title: str, *, batch: int = 2, features: int = 5, size: float = 1) -> Call:
        return Call(title, lambda dtype: ((randn(dtype, batch, features, width, size=size),), {}))

    yield call("some images")
    yield call("one image", batch=1)
    yield call("many images", batch=7)
    yield call("one feature", features=1)
    yield call("many features", features=300)
    yield call("large features", size=1e3)


SAMPLES: Mapping[type[nn.Module], Sample] = {
    ip_adapter.PerceiverAttention: Sample(_build, _attention_calls),
    ip_adapter.Resampler: Sample(_build, _resampler_calls),
}
