"""Small instances of the classes that can be swapped, and calls in which others may turn out to differ.

call           what a sample is
open_flamingo  those of open_flamingo and flamingo_pytorch
transformers   those of transformers
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import nn

from .call import Call, Sample


@cache
def samples() -> Mapping[type[nn.Module], Sample]:
    """All samples, by the fused class."""
    from . import (
        open_flamingo,
        transformers,
    )  # they need `flamingo`, which `import flamingo_kernels` does not

    return {**open_flamingo.SAMPLES, **transformers.SAMPLES}


__all__ = ["Call", "Sample", "samples"]
