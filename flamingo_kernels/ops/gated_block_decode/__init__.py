from .api import gated_block_decode
from .weights import GatedBlockWeights

__all__ = ["GatedBlockWeights", "gated_block_decode"]
