"""Modules of every family with random weights, for tests that hold for all of them."""

from __future__ import annotations

from flamingo import modules
from tests.helpers import third_party
from tests.helpers.weights import randomise

# The reference twice, once for each policy of its own.
FAMILIES = ("flamingo", "flamingo, zero", "open_flamingo", "flamingo_pytorch")
TEXT, VISUAL, HEAD_DIM, HEADS = 20, 12, 8, 3


def media_width(family: str) -> int:
    """flamingo_pytorch has one width for text and media."""
    return TEXT if family == "flamingo_pytorch" else VISUAL


def library(family: str):
    """The module that defines a family's classes."""
    if family == "open_flamingo":
        return third_party.open_flamingo("helpers")
    return third_party.flamingo_pytorch() if family == "flamingo_pytorch" else modules


def cross_attention(family: str, kind: str = "GatedCrossAttentionBlock", *, immediate: bool = True, **sizes):
    """A MaskedCrossAttention or GatedCrossAttentionBlock of a family."""
    options = {"dim": TEXT, "dim_head": HEAD_DIM, "heads": HEADS, "only_attend_immediate_media": immediate}
    if family != "flamingo_pytorch":
        options["dim_visual"] = VISUAL
    if family.startswith("flamingo,") or family == "flamingo":
        options["policy"] = "zero" if family == "flamingo, zero" else "open_flamingo"
    return randomise(getattr(library(family), kind)(**{**options, **sizes}))


def perceiver_attention(family: str):
    return randomise(library(family).PerceiverAttention(dim=VISUAL, dim_head=HEAD_DIM, heads=HEADS))


def resampler(family: str):
    sizes = {"dim": VISUAL, "depth": 2, "dim_head": HEAD_DIM, "heads": HEADS, "num_latents": 5}
    extra = {"num_media_embeds": 3} if family == "flamingo_pytorch" else {"max_num_media": 3}
    return randomise(library(family).PerceiverResampler(**sizes, **extra))
