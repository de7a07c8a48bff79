"""Audio Flamingo 2 as it is published for inference: every row hears every audio, wherever it stands.

Its blocks have the code of the other copies, see `audio_flamingo`.
"""

from __future__ import annotations

from . import audio_flamingo
from .family import Family


class MaskedCrossAttention(audio_flamingo.MaskedCrossAttention):
    reads_locations = False


FAMILY = Family(
    "Audio Flamingo 2, inference",
    "inference_HF_pretrained.src.helpers",
    (MaskedCrossAttention,),
    "audio-flamingo 2",
)
