"""Small instances of the classes that can be swapped, and calls in which others may turn out to differ.

call           what a sample is
open_flamingo  those of open_flamingo and flamingo_pytorch
transformers   those of transformers
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from . import open_flamingo, transformers
from .call import Call, Sample

SAMPLES: Mapping[type[nn.Module], Sample] = {**open_flamingo.SAMPLES, **transformers.SAMPLES}

__all__ = ["SAMPLES", "Call", "Sample"]
