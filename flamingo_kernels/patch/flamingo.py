"""The reference models of this repository. Their modules bring their own mask policy."""

from __future__ import annotations

from .. import layers
from .family import Family

FAMILY = Family(
    "flamingo",
    "flamingo.modules",
    {
        "MaskedCrossAttention": layers.MaskedCrossAttention,
        "GatedCrossAttentionBlock": layers.GatedCrossAttentionBlock,
        "PerceiverAttention": layers.PerceiverAttention,
        "PerceiverResampler": layers.PerceiverResampler,
    },
    "this one",
)
