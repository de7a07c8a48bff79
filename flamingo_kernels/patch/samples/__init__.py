"""Small instances of the classes that can be swapped, and calls in which others may turn out to differ.

call            what a sample is
audio_flamingo  those of Audio Flamingo
open_flamingo   those of open_flamingo and of what descends from it
ip_adapter      those of IP-Adapter
transformers    those of transformers
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import nn

from .call import Call, Sample


@cache
def samples() -> Mapping[type[nn.Module], Sample]:
    """All samples, by the fused class."""
    # they need `flamingo`, which `import flamingo_kernels` does not
    from . import audio_flamingo, ip_adapter, open_flamingo, transformers

    return {
        **open_flamingo.SAMPLES,
        **transformers.SAMPLES,
        **audio_flamingo.SAMPLES,
        **ip_adapter.SAMPLES,
    }


__all__ = ["Call", "Sample", "samples"]
