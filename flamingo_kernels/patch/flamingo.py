"""The reference models of this repository. Their modules bring their own mask policy."""

from __future__ import annotations

from .. import layers
from .family import Family

FAMILY = Family(
    "flamingo",
    "flamingo.modules",
    (
        layers.MaskedCrossAttention,
        layers.GatedCrossAttentionBlock,
        layers.PerceiverAttention,
        layers.PerceiverResampler,
    ),
    "this one",
)
